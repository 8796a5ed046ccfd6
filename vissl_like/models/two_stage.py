"""The two-stage model: parts first, then a classifier that sees only their pixels (iFAM, arXiv 2506.08915).

B images, K parts, C classes, h w grid of stage 1. A position is foreground if its largest single part probability is at
least that of the background. Differs from the original: maps and mask share one noise sample (SHARED_GUMBEL), evaluation
is free of noise (EVAL_GUMBEL), stage 1 may be a CNN, removing parts leaves the returned maps alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vissl_like.config.schema_parts import PartsModel
from vissl_like.errors import ConfigError
from vissl_like.models.masked_vit import MaskedHead, TokenMask, check_masked, give_mask_gradient, masked_logits
from vissl_like.models.part_backbones import MapTrunk, TokenTrunk
from vissl_like.models.part_inputs import PartInputs
from vissl_like.models.parts import NO_NOISE, PartLayers, PartNoise, PartsOutput


@dataclass(frozen=True)
class TwoStageOutput:
    """What both stages say. Channels of the masks: foreground, background."""

    #: (B, C) of stage 2.
    logits: Tensor
    stage_one: PartsOutput
    #: (B, 2, h, w), exactly 0 or 1.
    mask_hard: Tensor
    #: (B, 2, h, w), the largest part probability and that of the background.
    mask_soft: Tensor
    #: Stage 1 on transformed images, if there were any.
    twin: PartsOutput | None = None


def soft_mask(maps: Tensor, *, remove: Sequence[int] = ()) -> Tensor:
    """Maps (B, K+1, h, w) -> (B, 2, h, w): the largest part probability and the background's.

    remove: parts whose positions (where they are the largest channel) become background, and which count nowhere else.
    """
    parts, background = maps[:, :-1], maps[:, -1]
    if not len(remove):
        return torch.stack([parts.amax(dim=1), background], dim=1)
    gone = torch.zeros(maps.shape[1], dtype=torch.bool, device=maps.device)
    gone[list(remove)] = True
    removed = gone[maps.argmax(dim=1)]  # (B, h, w)
    foreground = parts.masked_fill(gone[:-1, None, None], 0).amax(dim=1).masked_fill(removed, 0)
    return torch.stack([foreground, background.masked_fill(removed, 1)], dim=1)


def hard_mask(soft: Tensor) -> Tensor:
    """(B, 2, h, w) -> (B, 2, h, w) of exact zeros and ones; ties are foreground, unless both are zero.

    Both are zero where the only part that is there was left out and the background is too far off to be represented.
    """
    foreground = (soft[:, 0] >= soft[:, 1]) & (soft[:, 0] > 0)
    return torch.stack([foreground, ~foreground], dim=1).to(soft.dtype)


def token_mask(soft: Tensor, hard: Tensor, *, grid: tuple[int, int]) -> TokenMask:
    """Masks (B, 2, h, w) on the grid of the patches of stage 2, which may be another one than that of stage 1.

    A patch is foreground if any position that it overlaps is.
    """
    foreground = torch.cat([soft[:, :1], hard[:, :1].detach()], dim=1)
    if tuple(soft.shape[2:]) != grid:
        foreground = F.adaptive_max_pool2d(foreground, grid)
    flat = foreground.flatten(2)  # (B, 2, n)
    return TokenMask(hard=flat[:, 1] > 0.5, soft=flat[:, 0])


class TwoStage(PartInputs):
    """images (B, 3, H, W) -> TwoStageOutput.

    State keys: trunk.stage_1._feature_blocks.*, trunk.stage_2._feature_blocks.*, heads.stage_1.* (see PartLayers) and
    heads.stage_2.* (see MaskedHead). A weights file with one backbone (trunk._feature_blocks.*) fills both stages.
    """

    def __init__(
        self, stage_1: MapTrunk | TokenTrunk, stage_2: TokenTrunk, *, options: PartsModel, num_classes: int
    ) -> None:
        super().__init__()
        check_masked(stage_2, options)
        for name, kind in (("LATE_MASKING", "decoupled"), ("GUMBEL_SOFTMAX_HARD", "single-stage")):
            if getattr(options, name):
                raise ConfigError(f"config.MODEL.PARTS.{name}=True: the {kind} model alone has it; set false.")
        check_parts(options.REMOVE_PARTS, num_parts=options.NUM_PARTS)
        if options.MASK_GRADIENT != "none":
            give_mask_gradient(stage_2)
        self.options = options
        head = MaskedHead(stage_2.width, num_classes=num_classes, num_prefix=stage_2.num_prefix)
        layers = PartLayers(stage_1.width, options, num_classes=num_classes)
        self.trunk = nn.ModuleDict({"stage_1": stage_1, "stage_2": stage_2})
        self.heads = nn.ModuleDict({"stage_1": layers, "stage_2": head})

    def forward(
        self,
        images: Tensor,
        *,
        noise: PartNoise | None = None,
        remove: Sequence[int] | None = None,
        twin: Tensor | None = None,
        twin_noise: PartNoise | None = None,
    ) -> TwoStageOutput:
        """remove: parts left out of the mask, at evaluation; None: REMOVE_PARTS.

        twin: transformed images (B, 3, H, W) for the equivariance loss, on which stage 1 alone runs in the same pass.
        """
        found = self.stage_one(images, noise=noise)
        gone = () if self.training else self.options.REMOVE_PARTS if remove is None else remove
        check_parts(gone, num_parts=self.options.NUM_PARTS)
        # Parts are taken out of the maps themselves, never of others with noise of their own (SHARED_GUMBEL=false).
        maps = found.maps if len(gone) else self.heads["stage_1"].mask_maps(found, noise=noise or NO_NOISE)
        soft = soft_mask(maps, remove=gone)
        hard = hard_mask(soft.detach())
        return TwoStageOutput(
            logits=self.stage_two(images, soft=soft, hard=hard),
            stage_one=found,
            mask_hard=hard,
            mask_soft=soft,
            twin=None if twin is None else self.stage_one(twin, noise=twin_noise),
        )

    def stage_one(self, images: Tensor, *, noise: PartNoise | None = None) -> PartsOutput:
        """Stage 1 alone."""
        return self.heads["stage_1"](self.trunk["stage_1"].maps(images), noise=noise or NO_NOISE)

    def stage_two(self, images: Tensor, *, soft: Tensor, hard: Tensor) -> Tensor:
        """Stage 2 alone: images (B, 3, H, W) under masks (B, 2, h, w) -> logits (B, C)."""
        trunk = self.trunk["stage_2"]
        mask = token_mask(soft, hard, grid=trunk.grid(images))
        return masked_logits(trunk, self.heads["stage_2"], images, mask, options=self.options)


def check_parts(parts: Sequence[int], *, num_parts: int, key: str = "config.MODEL.PARTS.REMOVE_PARTS") -> None:
    """ConfigError for a part number that does not exist."""
    wrong = [part for part in parts if not 0 <= part < num_parts]
    if wrong:
        raise ConfigError(
            f"{key}={list(parts)}: there is no part {wrong[0]}; parts are 0 to {num_parts - 1}"
            f" (config.MODEL.PARTS.NUM_PARTS={num_parts})."
        )


def leave_one_out(num_parts: int, *, fixed: Sequence[int] = ()) -> list[tuple[int, ...]]:
    """The sets of parts to remove, one evaluation each: every part alone, or together with the fixed ones."""
    check_parts(fixed, num_parts=num_parts, key="config.EVALUATE_PARTS.FIXED_PARTS")
    return [(*fixed, part) for part in range(num_parts) if part not in fixed]
