"""What the train engine asks of a model that is no trunk with heads: which images it takes, and which weights idle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vissl_like.errors import ConfigError


class PartInputs(nn.Module):
    """Base of the models with a trunk or, in two stages, several."""

    def trunks(self) -> list[Any]:
        """The trunks that see the images."""
        trunk: Any = self.trunk
        return list(trunk.values()) if isinstance(trunk, nn.ModuleDict) else [trunk]

    def check_input(self, shape: tuple[int, ...], *, key: str) -> None:
        """Raise ConfigError if the model does not take images of this shape (C, H, W); `key`: what makes them."""
        for trunk in self.trunks():
            wanted = trunk.adapter.in_channels
            if shape[0] != wanted:
                raise ConfigError(
                    f"{key}: makes images of {shape[0]} channels, but the trunk {trunk.adapter.name!r} takes {wanted}."
                )
            try:
                trunk.feature_shapes(image_size=(shape[1], shape[2]))
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from error

    def idle_parameters(self, size: Sequence[int]) -> list[str]:
        """None: every trainable parameter takes part in some loss."""
        return []

    def read_modules(self) -> list[str]:
        """Names of the modules whose outputs are read: the stages of CNNs whose maps are joined."""
        names = {id(module): name for name, module in self.named_modules()}
        found = []
        for trunk in self.trunks():
            layers = trunk.adapter.layers
            for stage in getattr(trunk, "stages", ()):
                path = layers[stage].module if stage in layers else stage
                found.append(names[id(trunk.backbone.get_submodule(path))])
        return found
