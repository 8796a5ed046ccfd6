"""Heads on trunk features, with the state keys of VISSL: mlp, eval_mlp, identity. `auto` sizes are inferred here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vissl_like.config.schema_model import Head as HeadSection
from vissl_like.errors import ConfigError
from vissl_like.models.libraries import construct
from vissl_like.models.trunk import evaluating
from vissl_like.registry import resolve

KEY = "config.MODEL.HEAD.PARAMS"
AUTO = "auto"


class MLPHead(nn.Module):
    """(B, D) or (B, D, 1, 1) -> (B, dims[-1]). Layers of linear, batch norm, ReLU, dropout; the last is linear alone.

    State keys: clf.0.weight, clf.0.bias, ...
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        use_bn: bool = False,
        use_relu: bool = False,
        use_dropout: bool = False,
        use_bias: bool = True,
        skip_last_layer_relu_bn: bool = True,
        batchnorm_eps: float = 1e-5,
        batchnorm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if len(dims) < 2:
            raise ValueError(f"dims={list(dims)} needs at least an input and an output size")
        layers: list[nn.Module] = []
        last = len(dims) - 2
        for index, (inputs, outputs) in enumerate(pairwise(dims)):
            layers.append(nn.Linear(inputs, outputs, bias=use_bias))
            if index == last and skip_last_layer_relu_bn:
                break
            if use_bn:
                layers.append(nn.BatchNorm1d(outputs, eps=batchnorm_eps, momentum=batchnorm_momentum))
            if use_relu:
                layers.append(nn.ReLU(inplace=True))
            if use_dropout:
                layers.append(nn.Dropout())
        self.clf = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.clf(torch.flatten(features, 1))


class EvalMLPHead(nn.Module):
    """Maps (B, C, H, W), or the same flattened, -> (B, dims[-1]): batch norm per channel, flatten, mlp.

    State keys: channel_bn.weight, ..., clf.clf.0.weight, ...
    """

    def __init__(
        self,
        *,
        in_channels: int,
        dims: Sequence[int],
        use_bn: bool = False,
        use_relu: bool = False,
        batchnorm_eps: float = 1e-5,
        batchnorm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.channel_bn = nn.BatchNorm2d(in_channels, eps=batchnorm_eps, momentum=batchnorm_momentum)
        self.clf = MLPHead(
            dims=dims,
            use_bn=use_bn,
            use_relu=use_relu,
            batchnorm_eps=batchnorm_eps,
            batchnorm_momentum=batchnorm_momentum,
        )

    def forward(self, features: Tensor) -> Tensor:
        # Flattening keeps channels first, so (B, C*H*W) can be read as (B, C, H*W, 1) again.
        maps = features if features.ndim == 4 else features.reshape(len(features), self.in_channels, -1, 1)
        return self.clf(torch.flatten(self.channel_bn(maps), 1))


class IdentityHead(nn.Module):
    """Hands the feature on."""

    def __init__(self, *, batchnorm_eps: float = 1e-5, batchnorm_momentum: float = 0.1) -> None:
        super().__init__()

    def forward(self, features: Tensor) -> Tensor:
        return features


def build_heads(
    section: HeadSection, *, shapes: Sequence[tuple[str, tuple[int, ...]]] | None, num_classes: int | None
) -> nn.ModuleList:
    """Heads for features of these names and shapes (no batch axis); shapes=None: all sizes are given and unchecked.

    As many heads as features: one each. One feature and several heads: a chain. Anything else is a ConfigError.
    """
    params = [_parse(item, index) for index, item in enumerate(section.PARAMS)]
    heads = nn.ModuleList()
    if shapes is None:
        heads.extend(_construct(name, options, section, index=index) for index, (name, options) in enumerate(params))
    else:
        _check_count(shapes, len(params))
        _extend(heads, params, section, shapes=shapes, num_classes=num_classes)
    _scale(heads, section.PARAMS_MULTIPLIER)
    return heads


def _check_count(shapes: Sequence[tuple[str, tuple[int, ...]]], num_heads: int) -> None:
    chained = is_chain(num_features=len(shapes), num_heads=num_heads)
    if num_heads and not chained and num_heads != len(shapes):
        names = ", ".join(name for name, _ in shapes)
        raise ConfigError(
            f"{KEY}: {num_heads} heads for {len(shapes)} features ({names}). Give one head per feature, in the same"
            " order, or one feature and a chain of heads."
        )


def _extend(
    heads: nn.ModuleList,
    params: list[tuple[str, dict[str, Any]]],
    section: HeadSection,
    *,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    num_classes: int | None,
) -> None:
    """Append the heads, each checked against what it stands on."""
    chained = is_chain(num_features=len(shapes), num_heads=len(params))
    label, shape = shapes[0]
    for index, (name, options) in enumerate(params):
        if not chained:
            label, shape = shapes[index]
        ends = not chained or index == len(params) - 1
        settings = _resolve_auto(options, index=index, label=label, shape=shape, classes=num_classes if ends else None)
        head = _construct(name, settings, section, index=index)
        shape = _output_shape(head, shape, label=label, index=index, options=settings)
        if ends and num_classes is not None and shape and shape[0] < num_classes and "dims" in settings:
            raise ConfigError(
                f"{KEY}[{index}]: dims={settings['dims']} has {shape[0]} outputs, but the labels have"
                f" {num_classes} classes. Write {AUTO!r} as the last size."
            )
        heads.append(head)
        label = f"output of {KEY}[{index}]"


def is_chain(*, num_features: int, num_heads: int) -> bool:
    """One feature and several heads: each head stands on the one before, and the last one's output is the only one."""
    return num_features == 1 and num_heads > 1


def _parse(item: Any, index: int) -> tuple[str, dict[str, Any]]:
    right = isinstance(item, list | tuple) and len(item) in (1, 2) and isinstance(item[0], str)
    options = item[1] if right and len(item) == 2 else {}
    if not right or not isinstance(options, dict):
        raise ConfigError(
            f'{KEY}[{index}]={item!r}: must be [name, options], such as ["mlp", {{"dims": [2048, 1000]}}].'
        )
    return item[0], dict(options)


def _resolve_auto(
    options: dict[str, Any], *, index: int, label: str, shape: tuple[int, ...], classes: int | None
) -> dict[str, Any]:
    """Replace `auto`: the first of dims by the feature's size, the last by the number of classes, in_channels by C."""
    resolved = dict(options)
    if resolved.get("in_channels") == AUTO:
        resolved["in_channels"] = shape[0]
    dims = resolved.get("dims")
    if not isinstance(dims, list | tuple) or AUTO not in dims:
        return resolved
    dims = list(dims)
    if dims[0] == AUTO:
        dims[0] = torch.Size(shape).numel()
    if AUTO in dims[:-1]:
        raise ConfigError(f"{KEY}[{index}]: dims={options['dims']}: only the first and the last size can be {AUTO!r}.")
    if dims[-1] == AUTO and classes is None:
        raise ConfigError(
            f"{KEY}[{index}]: dims={options['dims']}: the number of classes is not known here (no labels, or a head"
            f" inside a chain). Write the number instead of {AUTO!r}."
        )
    if dims[-1] == AUTO:
        dims[-1] = classes
    return resolved | {"dims": dims}


def _construct(name: str, options: dict[str, Any], section: HeadSection, *, index: int) -> nn.Module:
    head = resolve("head", name, key="MODEL.HEAD.PARAMS")
    wrong_type = [
        size for size in options.get("dims", []) if not isinstance(size, int) or isinstance(size, bool) or size < 1
    ]
    if wrong_type:
        raise ConfigError(f"{KEY}[{index}]: dims={options['dims']}: sizes are whole numbers from 1, or {AUTO!r}.")
    arguments = options | {"batchnorm_eps": section.BATCHNORM_EPS, "batchnorm_momentum": section.BATCHNORM_MOMENTUM}
    return construct(f"head {name}", head, arguments, key=f"{KEY}[{index}]")


def _output_shape(
    head: nn.Module, shape: tuple[int, ...], *, label: str, index: int, options: dict[str, Any]
) -> tuple[int, ...]:
    """Shape of the head's output without the batch axis; ConfigError if it does not take this feature."""
    state = {name: torch.empty_like(value, device="meta") for name, value in head.state_dict().items()}
    try:
        with torch.no_grad(), evaluating(head):
            return tuple(functional_call(head, state, (torch.empty((2, *shape), device="meta"),)).shape[1:])
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{KEY}[{index}]={options}: does not take {label!r}, whose shape is {'x'.join(map(str, shape))}"
            f" ({torch.Size(shape).numel()} values; {error}). Write {AUTO!r} for sizes that follow from the feature."
        ) from error


def _scale(heads: nn.ModuleList, factor: float) -> None:
    """Multiply every initial parameter of the heads."""
    if factor == 1.0:
        return
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.mul_(factor)


def has_open_sizes(params: Sequence[Any]) -> bool:
    """Whether some size is still `auto`."""
    found = [options for _, options in (_parse(item, index) for index, item in enumerate(params))]
    return any(options.get("in_channels") == AUTO or AUTO in options.get("dims", []) for options in found)


def resolve_from_state(params: Sequence[Any], shapes: Mapping[str, tuple[int, ...]]) -> list[Any]:
    """PARAMS with every `auto` read off the shapes of saved heads (keys "heads.0.clf.0.weight", ...)."""
    resolved = []
    for index, item in enumerate(params):
        name, options = _parse(item, index)
        linear = re.compile(rf"heads\.{index}\.(?:clf\.)*(\d+)\.weight")
        found = sorted(
            (int(match[1]), shapes[key]) for key in shapes if (match := linear.fullmatch(key)) and len(shapes[key]) == 2
        )
        weights = [shape for _, shape in found]
        if weights and AUTO in options.get("dims", []):
            options["dims"] = [weights[0][1], *(shape[0] for shape in weights)]
        norm = f"heads.{index}.channel_bn.weight"
        if options.get("in_channels") == AUTO and norm in shapes:
            options["in_channels"] = shapes[norm][0]
        resolved.append([name, options])
    return resolved
