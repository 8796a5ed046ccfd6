"""Stage 1: parts found by distance to prototypes (PDiscoFormer, arXiv 2407.04538).

B images, D width, h w grid, K foreground parts, C classes. Channel k < K of a map is a part, channel K the background.
With features x(r) and prototypes a_k: part_dot = <a_k, x>, distance = |x|^2 - 2 part_dot + |a_k|^2, maps = softmax over k
of (-distance + Gumbel noise) / temperature, part feature = mean over all positions of map times feature.

Differs from the original, each by an option: no noise at evaluation (EVAL_GUMBEL), thresholds that leave the distances
of other tokens alone (PART_LOGITS_THRESHOLD_METRIC). Everything is computed in the precision of the weights, whatever
autocast does to the backbone: distances are differences of large numbers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vissl_like.config.schema_parts import PartsModel
from vissl_like.errors import DataError
from vissl_like.losses.parts import exact
from vissl_like.models.part_backbones import MapTrunk, TokenTrunk
from vissl_like.models.part_inputs import PartInputs

THRESHOLD_KEY = "config.MODEL.PARTS.PART_LOGITS_THRESHOLD_PATH"
#: Standard deviation of new linear layers.
LINEAR_STD = 0.02


@dataclass(frozen=True)
class PartNoise:
    """Given random numbers instead of drawn ones: what is None is drawn where the configuration wants it."""

    #: Gumbel noise (B, K+1, h, w) of the maps, and of the mask if it has its own.
    maps: Tensor | None = None
    mask: Tensor | None = None
    #: Parts that stay (B, K), 1 or 0: in the class scores of stage 1, and in the mask.
    keep_scores: Tensor | None = None
    keep_mask: Tensor | None = None
    #: Standard normal numbers (B, D, K+1) of NOISE_VARIANCE.
    features: Tensor | None = None


@dataclass(frozen=True)
class PartsOutput:
    """What stage 1 finds."""

    #: (B, D, K+1), as the orthogonality loss sees them.
    features: Tensor
    #: (B, K+1, h, w), probabilities over channels.
    maps: Tensor
    #: (B, C, K), class scores of each part.
    scores: Tensor
    #: (B, K+1, h, w), inner products with the prototypes.
    part_dot: Tensor
    #: (B, C), mean of the scores over parts.
    logits: Tensor
    #: (B, K+1, h, w), squared distances to the prototypes.
    distances: Tensor
    #: What stage 1 finds on transformed images, if there were any.
    twin: PartsOutput | None = None


NO_NOISE = PartNoise()


class PartScale(nn.Module):
    """Multiplies each element of the part features (B, D, K+1) by a learned number."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, width, channels))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.weight


class PerPart(nn.Module):
    """A small network for each part: normalisation, linear layer and perhaps GELU; (B, D, parts) -> (B, outputs, parts)."""

    def __init__(self, width: int, parts: int, *, outputs: int, bias: bool, activation: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), _linear(width, outputs, bias=bias), *([nn.GELU()] if activation else []))
            for _ in range(parts)
        )

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([layer(features[:, :, k]) for k, layer in enumerate(self.layers)], dim=2)


class SharedLinear(nn.Linear):
    """One linear layer without bias for all parts: (B, D, parts) -> (B, outputs, parts)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs, bias=False)
        nn.init.trunc_normal_(self.weight, std=LINEAR_STD)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.transpose(1, 2)).transpose(1, 2)


def _linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=LINEAR_STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def build_modulation(kind: str, width: int, channels: int) -> nn.Module:
    """The re-weighting of part features (B, D, K+1) that MODULATION_TYPE names."""
    if kind == "none":
        return nn.Identity()
    if kind == "original":
        return PartScale(width, channels)
    if kind == "layer_norm":
        return nn.LayerNorm([width, channels])  # over width and parts together
    assert kind.startswith("parallel_mlp"), kind
    has_bias, has_activation = "no_bias" not in kind, "no_act" not in kind
    return PerPart(width, channels, outputs=width, bias=has_bias, activation=has_activation)


class PartLayers(nn.Module):
    """Everything of stage 1 behind its backbone: feature maps (B, D, h, w) -> PartsOutput.

    State keys: prototypes.weight (K+1, D, 1, 1), modulation.*, classifier.*.
    """

    thresholds: Tensor | None

    def __init__(self, width: int, options: PartsModel, *, num_classes: int) -> None:
        super().__init__()
        self.options = options
        self.num_parts = options.NUM_PARTS
        channels = self.num_parts + 1
        self.prototypes = nn.Conv2d(width, channels, 1, bias=False)
        self.modulation = build_modulation(options.MODULATION_TYPE, width, channels)
        self.classifier: nn.Module = SharedLinear(width, num_classes)
        if options.CLASSIFIER_TYPE == "independent_mlp":
            self.classifier = PerPart(width, self.num_parts, outputs=num_classes, bias=False, activation=False)
        self.register_buffer("thresholds", None, persistent=False)
        if options.PART_LOGITS_THRESHOLD_PATH:
            self.thresholds = read_thresholds(options.PART_LOGITS_THRESHOLD_PATH, num_parts=self.num_parts)

    def forward(self, x: Tensor, *, noise: PartNoise = NO_NOISE) -> PartsOutput:
        with exact(x):
            x = x.to(torch.promote_types(x.dtype, self.prototypes.weight.dtype))
            distances, part_dot = self.compare(x)
            gumbel = self._gumbel(distances, noise.maps, wanted=self.options.GUMBEL_SOFTMAX)
            maps = self.assign(distances, part_dot, gumbel=gumbel)
            if self.options.GUMBEL_SOFTMAX and self.options.GUMBEL_SOFTMAX_HARD:
                maps = _one_hot_forward(maps)
            plain = self._pooled(x, maps, noise.features)  # (B, D, K+1)
            modulated = self.modulation(plain)
            scores = self.classifier(self._dropped(modulated[:, :, :-1], noise.keep_scores))  # (B, C, K)
        return PartsOutput(
            features=modulated if self.options.MODULATION_ORTH else plain,
            maps=maps,
            scores=scores,
            part_dot=part_dot,
            logits=scores.mean(dim=2),
            distances=distances,
        )

    def compare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D, h, w) -> squared distances and inner products with the prototypes, each (B, K+1, h, w)."""
        weight = self.prototypes.weight.flatten(1)  # (K+1, D)
        part_dot = (weight @ x.flatten(2)).unflatten(2, tuple(x.shape[2:]))  # one GEMM
        squared = x.square().sum(dim=1, keepdim=True)
        return squared - 2 * part_dot + weight.square().sum(dim=1)[:, None, None], part_dot

    def assign(self, distances: Tensor, part_dot: Tensor, *, gumbel: Tensor | None = None) -> Tensor:
        """Distances and inner products -> probabilities over channels (B, K+1, h, w); at evaluation with thresholds."""
        options = self.options
        scores = -distances
        if self.thresholds is not None and not self.training:
            scores = scores if options.PART_LOGITS_THRESHOLD_METRIC == "distance" else part_dot
            below = part_dot[:, :-1] < self.thresholds.to(part_dot.dtype)[:, None, None]
            scores = torch.cat([scores[:, :-1].masked_fill(below, -math.inf), scores[:, -1:]], dim=1)
        if gumbel is not None:
            scores = scores + gumbel
        unheated = options.TEMPERATURE_NEEDS_GUMBEL and not options.GUMBEL_SOFTMAX
        return torch.softmax(scores / (1.0 if unheated else options.SOFTMAX_TEMPERATURE), dim=1)

    def mask_maps(self, output: PartsOutput, *, noise: PartNoise = NO_NOISE) -> Tensor:
        """The maps (B, K+1, h, w) that the mask of stage 2 is made of: in training, some parts are zeroed.

        The same as output.maps, or with noise of their own where SHARED_GUMBEL is off. The background stays, and what
        stays keeps its value.
        """
        options = self.options
        with exact(output.distances):
            maps = output.maps
            if not options.SHARED_GUMBEL:
                gumbel = self._gumbel(output.distances, noise.mask, wanted=True)
                maps = self.assign(output.distances, output.part_dot, gumbel=gumbel)
            keep = noise.keep_mask
            if keep is None and self.training and options.PART_DROPOUT_STAGE_2 > 0:
                keep = torch.rand(maps.shape[0], self.num_parts, device=maps.device) >= options.PART_DROPOUT_STAGE_2
            if keep is None:
                return maps
            return torch.cat([maps[:, :-1] * keep[:, :, None, None].to(maps.dtype), maps[:, -1:]], dim=1)

    def _gumbel(self, like: Tensor, given: Tensor | None, *, wanted: bool) -> Tensor | None:
        """Gumbel(0, 1) noise, if there is to be any."""
        if given is not None:
            return given.to(like.dtype)
        if not wanted or not (self.training or self.options.EVAL_GUMBEL):
            return None
        # Half precision would round small draws to zero, whose logarithm is infinite.
        dtype = torch.promote_types(like.dtype, torch.float32)
        return -torch.empty_like(like, dtype=dtype).exponential_().log().to(like.dtype)

    def _pooled(self, x: Tensor, maps: Tensor, normal: Tensor | None) -> Tensor:
        """Mean over all positions of map times feature: (B, D, K+1)."""
        positions = maps.shape[2] * maps.shape[3]
        pooled = x.flatten(2) @ maps.flatten(2).transpose(1, 2) / positions
        if self.options.NOISE_VARIANCE == 0 or not (self.training or normal is not None):
            return pooled
        # Independent noise on every position, averaged, is noise of this standard deviation on the average.
        deviation = self.options.NOISE_VARIANCE * x.detach().std() / math.sqrt(positions)
        return pooled + deviation * (torch.randn_like(pooled) if normal is None else normal.to(pooled.dtype))

    def _dropped(self, features: Tensor, keep: Tensor | None) -> Tensor:
        """Features (B, D, K) with whole parts zeroed in training and the others scaled up."""
        probability = self.options.PART_DROPOUT
        if keep is not None:
            return features * keep[:, None, :].to(features.dtype) / (1 - probability)
        return F.dropout1d(features.transpose(1, 2), probability, training=self.training).transpose(1, 2)


def _one_hot_forward(maps: Tensor) -> Tensor:
    """One-hot of the largest channel, with the gradient of the soft maps."""
    one_hot = torch.zeros_like(maps).scatter_(1, maps.argmax(dim=1, keepdim=True), 1.0)
    return one_hot + (maps - maps.detach())


def read_thresholds(path: str, *, num_parts: int) -> Tensor:
    """The thresholds (K,) of a JSON file {"0": number, ...}; DataError if it is not one for this many parts."""
    try:
        table = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{THRESHOLD_KEY}={path!r}: cannot be read as JSON ({error}).") from error
    expected = [str(part) for part in range(num_parts)]
    good = isinstance(table, dict) and sorted(table) == sorted(expected)
    if not good or not all(isinstance(value, int | float) and math.isfinite(value) for value in table.values()):
        raise DataError(
            f"{THRESHOLD_KEY}={path!r}: must be an object with one finite number for each of the {num_parts} parts,"
            f' {{"0": ..., "{num_parts - 1}": ...}} (config.MODEL.PARTS.NUM_PARTS={num_parts}).'
        )
    return torch.tensor([float(table[part]) for part in expected])


class StageOne(PartInputs):
    """The single-stage model: images (B, 3, H, W) -> PartsOutput.

    State keys: trunk._feature_blocks.* and heads.* (see PartLayers).
    """

    def __init__(self, trunk: MapTrunk | TokenTrunk, heads: PartLayers) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads

    def forward(
        self,
        images: Tensor,
        *,
        noise: PartNoise | None = None,
        twin: Tensor | None = None,
        twin_noise: PartNoise | None = None,
    ) -> PartsOutput:
        """twin: transformed images (B, 3, H, W) for the equivariance loss, in the same pass."""
        found = self.stage_one(images, noise=noise)
        return found if twin is None else replace(found, twin=self.stage_one(twin, noise=twin_noise))

    def stage_one(self, images: Tensor, *, noise: PartNoise | None = None) -> PartsOutput:
        """The parts of images, without a twin."""
        return self.heads(self.trunk.maps(images), noise=noise or NO_NOISE)
