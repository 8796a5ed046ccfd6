"""A trunk with heads: what every engine trains, extracts from or evaluates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vissl_like.config.schema_model import FeatureEval
from vissl_like.errors import ConfigError
from vissl_like.models.heads import is_chain
from vissl_like.models.pooling import PooledFeature
from vissl_like.models.trunk import Trunk
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
        return self._head_outputs(list(self.trunk_features(images).values()))

    def _head_outputs(self, features: list[Tensor]) -> list[Tensor]:
        if not len(self.heads):
            return features
        if is_chain(num_features=len(features), num_heads=len(self.heads)):
            value = features[0]
            for head in self.heads:
                value = head(value)
            return [value]
        return [head(feature) for head, feature in zip(self.heads, features)]

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
        outputs = self._head_outputs(list(features.values()))
        return features | {HEADS if i == 0 else f"{HEADS}_{i}": output for i, output in enumerate(outputs)}

    def _input(self, images: Tensor) -> Tensor:
        """RGB images (B, 3, H, W) in the order that the trunk takes; `lab` keeps the lightness of LAB images."""
        if self.input_type == "bgr":
            return images.flip(1)
        return images[:, :1] if self.input_type == "lab" else images

    def layer_names(self) -> list[str]:
        """Names that LINEAR_EVAL_FEAT_POOL_OPS_MAP may use (deeper modules too, by their dotted names)."""
        return self.trunk.layer_names()

    def feature_names(self) -> list[str]:
        """Names of the trunk features that this model returns, in order."""
        return [item.name for item in self.pooled]
