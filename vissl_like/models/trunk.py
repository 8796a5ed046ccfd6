"""A backbone of any library behind one face: named feature layers, pooled features, shapes without computing.

B batch, C channels, H W grid, N tokens, D width. State keys of a trunk: "_feature_blocks." + the backbone's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vissl_like.errors import ConfigError
from vissl_like.registry import suggest

FLATTEN = "flatten"


@dataclass(frozen=True)
class Layer:
    """Where a named layer is read: a module that runs once per forward; `average` pools its maps to (B, C, 1, 1)."""

    module: str
    average: bool = False


def _call(backbone: nn.Module, images: Tensor) -> Tensor:
    return backbone(images)


@dataclass(frozen=True)
class Adapter:
    """What a trunk has to know about its backbone."""

    name: str
    library: str = "own"
    pooled: Callable[[nn.Module, Tensor], Tensor] = _call
    layers: dict[str, Layer] = field(default_factory=dict)
    in_channels: int = 3
    image_size: tuple[int, int] = (224, 224)
    #: Name of the library's own classifier, which a trunk does not have; used when weights are exported.
    classifier: str = ""


class _AllFound(Exception):
    """Ends a forward pass once every wanted layer has been seen."""


def resnet_layers(backbone: nn.Module) -> dict[str, Layer]:
    """Names of the VISSL layers in a ResNet of ours, torchvision's or timm's; empty for anything else."""
    children = dict(backbone.named_children())
    activation = next((name for name in ("relu", "act1") if name in children), None)
    stages = [name for name in (f"layer{i}" for i in range(1, 10)) if name in children]
    if activation is None or "conv1" not in children or not stages:
        return {}
    layers = {"conv1": Layer(activation)}
    if "maxpool" in children:
        layers["res1"] = Layer("maxpool")
    layers |= {f"res{i}": Layer(stage) for i, stage in enumerate(stages, start=2)}
    return layers | {f"res{len(stages) + 1}avg": Layer(stages[-1], average=True)}


class Trunk(nn.Module):
    """forward(images, layers) -> {layer: features}. `flatten` (B, D) is the pooled last feature of every backbone.

    Other layers: ResNets have conv1 (after its ReLU), res1 ... res5, res5avg; every backbone has its modules by dotted
    name ("blocks.3", "layer2.1"). Maps are (B, C, H, W), tokens (B, N, C), as the backbone has them.
    """

    def __init__(self, backbone: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self._feature_blocks = backbone
        self.adapter = adapter

    @property
    def backbone(self) -> nn.Module:
        return self._feature_blocks

    def pooled(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> (B, D)."""
        return self.adapter.pooled(self.backbone, images)

    def forward(self, images: Tensor, layers: Sequence[str] = (FLATTEN,)) -> dict[str, Tensor]:
        """Runs the backbone up to the last wanted layer. Repeated names count once."""
        names = list(dict.fromkeys(layers))
        if names == [FLATTEN]:
            return {FLATTEN: self.pooled(images)}
        whole = FLATTEN in names
        taps = {name: self._layer(name) for name in names if name != FLATTEN}
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            self._listen(taps, found, hooks, stop=not whole)
            try:
                last = self.pooled(images)
            except _AllFound:
                last = images[:0]
        if whole:
            found[FLATTEN] = last
        missing = [name for name in names if name not in found]
        if missing:
            raise ConfigError(
                f"trunk {self.adapter.name!r}: its forward pass never runs the layer(s) {', '.join(missing)}."
            )
        return {name: _pool(found[name], taps.get(name)) for name in names}

    def _listen(self, taps: dict[str, Layer], found: dict[str, Tensor], hooks: ExitStack, *, stop: bool) -> None:
        """Hook the tapped modules for one forward pass; `found` fills up, and with `stop` the last one ends the pass.

        A module without parameters may run several times (a shared ReLU): its last output counts, so the pass can only
        end with its nearest ancestor that has parameters.
        """
        pending = {self._anchor(name, layer) for name, layer in taps.items()}
        aliases = self.adapter.layers

        def capture(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                value = _first_tensor(output)
                # What follows may work in place (ReLU after BatchNorm); layers of the alias table are known to be safe.
                found[name] = value if name in aliases else value.clone()

            return hook

        def arrive(anchor: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                pending.discard(anchor)
                if not pending:
                    raise _AllFound

            return hook

        for name, layer in taps.items():
            module = self.backbone.get_submodule(layer.module)
            hooks.callback(module.register_forward_hook(capture(name)).remove)
        for anchor in sorted(pending) if stop else []:
            hooks.callback(self.backbone.get_submodule(anchor).register_forward_hook(arrive(anchor)).remove)

    def _anchor(self, name: str, layer: Layer) -> str:
        path = layer.module
        if name in self.adapter.layers:
            return path
        while path and next(self.backbone.get_submodule(path).parameters(), None) is None:
            path = path.rpartition(".")[0]
        return path

    def _layer(self, name: str) -> Layer:
        if name in self.adapter.layers:
            return self.adapter.layers[name]
        modules = [module for module, _ in self.backbone.named_modules() if module]
        if name in modules:
            return Layer(name)
        known = self.layer_names()
        raise ConfigError(
            f"{name!r}: trunk {self.adapter.name!r} has no such layer{suggest(name, known + modules) or '.'}"
            f" Known: {', '.join(known)}; deeper modules by their dotted names."
        )

    def module_of(self, layer: str) -> str:
        """The dotted name, in the backbone, of the module at which a layer is read."""
        return self._layer(layer).module

    def check_layers(self, layers: Sequence[str], *, key: str) -> None:
        """Raises ConfigError, naming the key, for the first unknown layer."""
        for name in layers:
            try:
                if name != FLATTEN:
                    self._layer(name)
            except ConfigError as error:
                raise ConfigError(f"config.{key}={error}") from None

    def layer_names(self) -> list[str]:
        """Named layers, `flatten`, the modules of the first two levels that have parameters, and the items of lists."""
        backbone = self.backbone
        dotted = []
        for name, module in backbone.named_modules():
            listed = name.count(".") < 2 or isinstance(backbone.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
            runs = not isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None
            if name and listed and runs and name not in self.adapter.layers:
                dotted.append(name)
        return [*self.adapter.layers, FLATTEN, *dotted]

    def feature_shapes(
        self, layers: Sequence[str] = (FLATTEN,), *, image_size: int | tuple[int, int] | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Shape of each layer without the batch axis, found without computing. Works on a model on the meta device too.

        image_size in pixels; None: the backbone's default.
        """
        size = self.adapter.image_size if image_size is None else image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (2, self.adapter.in_channels, height, width)
        try:
            outputs = self._on_meta(shape, tuple(layers))
        except ConfigError:
            raise
        except Exception as error:  # any library's complaint about this input: said in words of the configuration
            raise ConfigError(
                f"config.MODEL.TRUNK.NAME={self.adapter.name!r} cannot take images of {height}x{width} with"
                f" {self.adapter.in_channels} channels ({error}). Change the size in DATA.*.TRANSFORMS or"
                " MODEL.TRUNK.OPTIONS."
            ) from error
        return {name: tuple(output.shape[1:]) for name, output in outputs.items()}

    def _on_meta(self, shape: tuple[int, ...], layers: tuple[str, ...]) -> dict[str, Tensor]:
        tensors = dict(chain(self.named_parameters(), self.named_buffers()))
        stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        with torch.no_grad(), evaluating(self):
            try:
                return functional_call(self, stand_ins, (torch.empty(shape, device="meta"), layers))
            except (NotImplementedError, RuntimeError):
                # A backbone that holds plain tensors or looks at values cannot run on meta: run it once for real.
                device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
                return self(torch.zeros(shape, device=device), layers)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Everything in eval mode inside the block, as it was afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in modes:
            child.training = False
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def _pool(value: Tensor, layer: Layer | None) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1) where the layer says so."""
    return value.mean(dim=(2, 3), keepdim=True) if layer is not None and layer.average else value


def _first_tensor(output: Any) -> Tensor:
    """The tensor of a module's output; blocks of transformers return tuples or mappings that begin with it."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    return next(value for value in values if isinstance(value, Tensor))
