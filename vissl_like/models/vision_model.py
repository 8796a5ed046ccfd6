"""A trunk with heads: what every engine trains, extracts from or evaluates."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vissl_like.config.schema_model import FeatureEval
from vissl_like.errors import ConfigError
from vissl_like.models.heads import is_chain
from vissl_like.models.pooling import PooledFeature, pooled_shape
from vissl_like.models.trunk import FLATTEN, Trunk, evaluating
from vissl_like.registry import suggest

HEADS = "heads"


class VisionModel(nn.Module):
    """forward(images (B, 3, H, W)) -> one output per head (a chain of heads has one; no heads: the features).

    State keys: "trunk._feature_blocks.*" (a ResNet's as in torchvision) and "heads.<index>.*".
    A frozen trunk stays in eval mode whatever train() says, so its batch-norm statistics never move.
    """

    def __init__(
        self,
        trunk: Trunk,
        heads: nn.ModuleList,
        *,
        pooled: Sequence[PooledFeature],
        settings: FeatureEval,
        input_type: str = "rgb",
        non_trainable: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads
        self.pooled = tuple(pooled)
        self.flatten = settings.SHOULD_FLATTEN_FEATS
        self.trunk_frozen = settings.FREEZE_TRUNK_ONLY or settings.FREEZE_TRUNK_AND_HEAD
        self.heads_frozen = settings.FREEZE_TRUNK_AND_HEAD
        self.with_heads_features = settings.EVAL_TRUNK_AND_HEAD and not settings.EXTRACT_TRUNK_FEATURES_ONLY
        self.input_type = input_type
        self._freeze(non_trainable)

    def _freeze(self, names: Sequence[str]) -> None:
        if self.trunk_frozen:
            self.trunk.requires_grad_(False)
        if self.heads_frozen:
            self.heads.requires_grad_(False)
        parameters = dict(self.named_parameters())
        unknown = [name for name in names if name not in parameters]
        if unknown:
            hints = "".join(f"\n  {name!r}{suggest(name, list(parameters)) or '.'}" for name in unknown)
            raise ConfigError(f"config.MODEL.NON_TRAINABLE_PARAMS: no parameter of this name:{hints}")
        for name in names:
            parameters[name].requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> VisionModel:
        """As nn.Module.train, but frozen parts stay in eval mode."""
        super().train(mode)
        if self.trunk_frozen:
            self.trunk.eval()
        if self.heads_frozen:
            self.heads.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        return head_outputs(self.heads, list(self.trunk_features(images).values()))

    def trunk_features(self, images: Tensor) -> dict[str, Tensor]:
        """{name: pooled feature} in the order of LINEAR_EVAL_FEAT_POOL_OPS_MAP; {"flatten": (B, D)} without a map."""
        layers = [feature.layer for feature in self.pooled]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.trunk_frozen):
            maps = self.trunk(self._input(images), layers)
        return {item.name: item.pool(maps[item.layer], flatten=self.flatten) for item in self.pooled}

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """What extraction stores: the trunk's features and, with EVAL_TRUNK_AND_HEAD, the outputs of the heads.

        Heads are called "heads", then "heads_1", ... EXTRACT_TRUNK_FEATURES_ONLY leaves them out.
        """
        features = self.trunk_features(images)
        if not self.with_heads_features or not len(self.heads):
            return features
        outputs = head_outputs(self.heads, list(features.values()))
        return features | {HEADS if i == 0 else f"{HEADS}_{i}": output for i, output in enumerate(outputs)}

    def _input(self, images: Tensor) -> Tensor:
        """RGB images (B, 3, H, W) in the order that the trunk takes; `lab` keeps the lightness of LAB images."""
        if self.input_type == "bgr":
            return images.flip(1)
        return images[:, :1] if self.input_type == "lab" else images

    def check_input(self, shape: tuple[int, ...], *, key: str) -> None:
        """Raise ConfigError if the model does not take images of this shape (C, H, W); `key`: what makes them."""
        channels = self._input(torch.empty((1, *shape), device="meta")).shape[1]
        wanted = self.trunk.adapter.in_channels
        if channels != wanted:
            raise ConfigError(
                f"{key}: makes images of {shape[0]} channels, but the trunk {self.trunk.adapter.name!r} takes {wanted} "
                f"(config.MODEL.INPUT_TYPE={self.input_type}). Change the transforms, or set the trunk's channels in "
                "config.MODEL.TRUNK.OPTIONS."
            )
        try:
            self.output_widths((shape[1], shape[2]))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{key}: images of {shape[1]}x{shape[2]} do not fit the heads, whose sizes follow from the images of "
                f"training ({error}). Make both of one size, or pool to a fixed size (AdaptiveAvgPool2d)."
            ) from error
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error

    def output_widths(self, size: tuple[int, int]) -> list[int]:
        """How many numbers each output has for images of this size (H, W)."""
        shapes = self.trunk.feature_shapes([item.layer for item in self.pooled], image_size=size)
        features = [pooled_shape(item, shapes[item.layer], flatten=self.flatten) for item in self.pooled]
        outputs = self._on_meta([torch.empty((2, *feature), device="meta") for feature in features])
        return [output.shape[1] for output in outputs]

    def _on_meta(self, features: list[Tensor]) -> list[Tensor]:
        """Outputs of the heads for features on the meta device."""
        return head_outputs(copy.deepcopy(self.heads).to("meta").eval(), features)

    def idle_parameters(self, size: Sequence[int]) -> list[str]:
        """Trainable parameters that no output depends on for images of this size: those behind the last wanted layer."""
        trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        if not trained or all(item.layer == FLATTEN for item in self.pooled):
            return []
        tensors = dict(chain(self.named_parameters(), self.named_buffers()))
        stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        wanted = [stand_ins[name].requires_grad_() for name in trained]
        channels = 3 if self.input_type == "lab" else self.trunk.adapter.in_channels
        with evaluating(self):
            try:
                outputs = functional_call(self, stand_ins, (torch.empty((2, channels, *size), device="meta"),))
            except (NotImplementedError, RuntimeError):
                return []  # a backbone that looks at values cannot run without them
        found = torch.autograd.grad([output.sum() for output in outputs], wanted, allow_unused=True)
        return [name for name, gradient in zip(trained, found) if gradient is None]

    def read_modules(self) -> list[str]:
        """Dotted names of the modules whose outputs are read while the trunk runs."""
        layers = [item.layer for item in self.pooled if item.layer != FLATTEN]
        return [f"trunk._feature_blocks.{self.trunk.module_of(layer)}" for layer in layers]

    def layer_names(self) -> list[str]:
        """Names that LINEAR_EVAL_FEAT_POOL_OPS_MAP may use (deeper modules too, by their dotted names)."""
        return self.trunk.layer_names()

    def feature_names(self) -> list[str]:
        """Names of the trunk features that this model returns, in order."""
        return [item.name for item in self.pooled]


def head_outputs(heads: nn.ModuleList, features: list[Tensor]) -> list[Tensor]:
    """What the heads make of the features: one output each, or that of their chain; no heads: the features."""
    if not len(heads):
        return features
    if is_chain(num_features=len(features), num_heads=len(heads)):
        value = features[0]
        for head in heads:
            value = head(value)
        return [value]
    return [head(feature) for head, feature in zip(heads, features)]
