"""Which features are read from a trunk and how each is pooled: LINEAR_EVAL_FEAT_POOL_OPS_MAP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vissl_like.errors import ConfigError
from vissl_like.models.trunk import FLATTEN
from vissl_like.registry import suggest

KEY = "MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP"
OPERATIONS: dict[str, type[nn.Module]] = {
    "AvgPool2d": nn.AvgPool2d,
    "MaxPool2d": nn.MaxPool2d,
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d,
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d,
    "Identity": nn.Identity,
}


@dataclass(frozen=True)
class PooledFeature:
    """One item of the map: `name` is unique ("res5", then "res5_1"), `layer` is the trunk's."""

    name: str
    layer: str
    operation: nn.Module

    def pool(self, value: Tensor, *, flatten: bool) -> Tensor:
        """(B, C, H, W) -> pooled maps, or (B, D) with `flatten`; (B, D) and tokens pass through Identity."""
        pooled = self.operation(value)
        return torch.flatten(pooled, 1) if flatten else pooled


def pooled_features(pool_map: Sequence[Any]) -> list[PooledFeature]:
    """The items in the order of the map, which is the order of the heads; `flatten` alone for an empty map.

    Differs from VISSL, which applied the operations in the order of the map to features in the order of the network.
    """
    if not pool_map:
        return [PooledFeature(FLATTEN, FLATTEN, nn.Identity())]
    seen: dict[str, int] = {}
    features = []
    for index, item in enumerate(pool_map):
        layer, operation = _item(item, key=f"config.{KEY}[{index}]")
        count = seen.get(layer, 0)
        seen[layer] = count + 1
        features.append(PooledFeature(layer if count == 0 else f"{layer}_{count}", layer, operation))
    return features


def _item(item: Any, *, key: str) -> tuple[str, nn.Module]:
    """("res5", AvgPool2d(...)) of ["res5", ["AvgPool2d", [[6, 6], 1, 0]]]."""
    form = f'{key}={item!r}: must be [layer, [operation, arguments]], such as ["res5", ["AvgPool2d", [[6, 6], 1, 0]]].'
    if not isinstance(item, list | tuple) or len(item) != 2 or not isinstance(item[0], str):
        raise ConfigError(form)
    layer, operation = item
    if not isinstance(operation, list | tuple) or not operation or not isinstance(operation[0], str):
        raise ConfigError(form)
    name = operation[0]
    arguments = operation[1] if len(operation) > 1 else []
    if len(operation) > 2 or not isinstance(arguments, list | tuple):
        raise ConfigError(form)
    if name not in OPERATIONS:
        known = sorted(OPERATIONS)
        raise ConfigError(
            f"{key}: {name!r} is no pooling operation{suggest(name, known) or '.'} Known: {', '.join(known)}."
        )
    try:
        return layer, OPERATIONS[name](*(tuple(value) if isinstance(value, list) else value for value in arguments))
    except TypeError as error:
        raise ConfigError(f"{key}: {name} does not take the arguments {arguments!r} ({error}).") from error


def pooled_shape(feature: PooledFeature, shape: tuple[int, ...], *, flatten: bool) -> tuple[int, ...]:
    """Shape after pooling, without the batch axis. ConfigError if the operation does not fit the layer's maps."""
    try:
        value = feature.pool(torch.empty((2, *shape), device="meta"), flatten=flatten)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"config.{KEY}: {feature.operation} does not fit layer {feature.layer!r}, whose features are"
            f" {'x'.join(map(str, shape))} here ({error}). Use a smaller window, AdaptiveAvgPool2d or Identity."
        ) from error
    return tuple(value.shape[1:])
