"""A model's weights under the names of another library, so that the published tools there can read them."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from vissl_like.core.weights_rules import BLOCKS
from vissl_like.errors import ConfigError
from vissl_like.models.heads import MLPHead
from vissl_like.models.vision_model import VisionModel

Names = Literal["torchvision", "timm", "hf", "vissl"]


def export_state_dict(model: VisionModel, *, names: Names) -> dict[str, Any]:
    """The state dict as `names` expects it; tensors are not copied.

    torchvision, timm, hf: the backbone's names, and a single linear head as the library's classifier. ResNets may go to
    torchvision and to timm, other backbones only to the library they are from. vissl: the nested dictionary of a VISSL
    checkpoint (its STATE_DICT_KEY_NAME classy_state_dict).
    """
    state = model.state_dict()
    if names == "vissl":
        parts = {part: _under(state, f"{part}.") for part in ("trunk", "heads")}
        return {"classy_state_dict": {"base_model": {"model": parts}}}
    adapter = model.trunk.adapter
    possible = {"torchvision", "timm"} if "conv1" in adapter.layers else {adapter.library} - {"own"}
    if names not in possible:
        known = ", ".join(sorted(possible | {"vissl"}))
        raise ConfigError(f"names={names!r}: trunk {adapter.name!r} has no names there. Possible: {known}.")
    exported: dict[str, Any] = _under(state, BLOCKS)
    linear = _linear_head(model)
    if linear is not None and adapter.classifier:
        exported |= {f"{adapter.classifier}.{key}": value for key, value in linear.state_dict().items()}
    return exported


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _linear_head(model: VisionModel) -> nn.Linear | None:
    """The head, if there is exactly one and it is one linear layer."""
    if len(model.heads) != 1 or not isinstance(model.heads[0], MLPHead):
        return None
    layers = list(model.heads[0].clf)
    return layers[0] if len(layers) == 1 and isinstance(layers[0], nn.Linear) else None
