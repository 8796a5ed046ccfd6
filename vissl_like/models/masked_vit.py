"""Stage 2: a Vision Transformer that sees only what a mask lets through (iFAM, arXiv 2506.08915), and the decoupled model.

B images, N = P + n tokens: P prefix tokens (class and registers), then n patches in rows. Hard mask: every query attends
only to prefix tokens and foreground patches, in every block, so masked pixels have no influence at all. Soft mask m:
log(m + 1e-10) is added to the scores of each key. MASK_GRADIENT=straight_through (differs from the original): forward as
hard; backward as if token j had the weight m_j e^s_ij / sum_j m_j e^s_ij, through the soft mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vissl_like.config.schema_parts import PartsModel
from vissl_like.core.parallel import Forward, change_forward
from vissl_like.errors import ConfigError
from vissl_like.losses.parts import exact, full
from vissl_like.models.part_backbones import NAME_KEY, OPTIONS_KEY, MapTrunk, TokenTrunk
from vissl_like.models.part_inputs import PartInputs
from vissl_like.models.parts import LINEAR_STD

#: Added to soft masks before their logarithm.
SOFT_EPS = 1e-10
#: A masked token that would dominate attention e^20-fold is no longer told apart from stronger ones in the gradient.
LARGEST_EXPONENT = 20.0


@dataclass(frozen=True)
class TokenMask:
    """Foreground of the patches of each image, (B, n). `soft` carries gradient; `hard` is boolean."""

    hard: Tensor
    soft: Tensor


class MaskedHead(nn.Module):
    """Class token (B, D) -> logits (B, C): LayerNorm, then a linear layer without bias.

    State keys: fc_norm.*, classifier.weight, and prefix_mask (1, P), the ones that stand before every mask: the
    original's checkpoints have them too.
    """

    prefix_mask: Tensor

    def __init__(self, width: int, *, num_classes: int, num_prefix: int) -> None:
        super().__init__()
        self.fc_norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes, bias=False)
        nn.init.trunc_normal_(self.classifier.weight, std=LINEAR_STD)
        self.register_buffer("prefix_mask", torch.ones(1, num_prefix))

    def forward(self, token: Tensor) -> Tensor:
        return self.classifier(self.fc_norm(token))


class MeanHead(nn.Module):
    """A pooled feature (B, D) -> logits (B, C): a linear layer with bias, for late masking and CNNs.

    State keys: classifier.*.
    """

    def __init__(self, width: int, *, num_classes: int) -> None:
        super().__init__()
        self.classifier = new_classifier(width, num_classes)

    def forward(self, token: Tensor) -> Tensor:
        return self.classifier(token)


def new_classifier(width: int, num_classes: int) -> nn.Linear:
    """A linear layer with bias, truncated normal weights."""
    layer = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(layer.weight, std=LINEAR_STD)
    nn.init.zeros_(layer.bias)
    return layer


def masked_logits(
    trunk: TokenTrunk, head: MaskedHead, images: Tensor, mask: TokenMask, *, options: PartsModel
) -> Tensor:
    """Stage 2: images (B, 3, H, W) and the mask of their patches -> logits (B, C)."""
    return head(masked_token(trunk, head.prefix_mask, images, mask, options=options))


def masked_token(trunk: TokenTrunk, prefix: Tensor, images: Tensor, mask: TokenMask, *, options: PartsModel) -> Tensor:
    """The normalised class token (B, D) of the masked transformer; prefix: ones (1, P)."""
    tokens = trunk.embed(images)
    before = prefix.expand(len(tokens), -1)  # (B, P)
    if options.USE_SOFT_MASKS:
        bias = torch.cat([before.to(mask.soft.dtype), mask.soft], dim=1).add(SOFT_EPS).log()
        return trunk.encode(tokens, bias[:, None, None, :].to(tokens.dtype))[:, 0]
    hard = mask.hard
    has_gradient = options.MASK_GRADIENT != "none" and mask.soft.requires_grad
    if options.PRUNE_TOKENS and not trunk.training and not has_gradient:
        tokens, hard = prune(tokens, hard, num_prefix=trunk.num_prefix)
    keys = torch.cat([before.bool(), hard], dim=1)[:, None, None, :]  # (B, 1, 1, N)
    if not has_gradient:
        return trunk.encode(tokens, keys)[:, 0]
    soft = torch.cat([before.to(mask.soft.dtype), mask.soft], dim=1)[:, None, None, :]
    return trunk.encode(tokens, keys, soft=soft)[:, 0]


def prune(tokens: Tensor, hard: Tensor, *, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Leave out background tokens: tokens (B, P+n, D), mask (B, n) -> (B, P+m, D), (B, m) in the original order.

    m is the largest foreground of the batch, at least 1; what is background among the m stays masked.
    """
    kept = max(1, int(hard.sum(dim=1).max()))
    if kept == hard.shape[1]:
        return tokens, hard
    first = hard.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :kept].sort(dim=1).values
    wide = (first + num_prefix)[:, :, None].expand(-1, -1, tokens.shape[2])
    return torch.cat([tokens[:, :num_prefix], tokens.gather(1, wide)], dim=1), hard.gather(1, first)


class MaskGradient(TorchFunctionMode):
    """Inside the block, attention under the hard mask also has a gradient with respect to the soft one.

    With weights w_ij = e^s_ij / sum over unmasked j: d o_i / d m_j = w_ij (v_j - o_i) for the output o_i of query i. The
    term below is that derivative times (m - m), so outputs stay the same to the last bit. hard and soft (B, 1, 1, N).
    """

    def __init__(self, hard: Tensor, soft: Tensor) -> None:
        super().__init__()
        self.hard = hard
        self.soft = soft

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is not F.scaled_dot_product_attention:
            return output
        query, key, value = (full(tensor.detach()) for tensor in args[:3])
        scale = (kwargs or {}).get("scale") or query.shape[-1] ** -0.5
        with exact(query):
            scores = scale * query @ key.transpose(-2, -1)  # (B, heads, N, N)
            normaliser = scores.masked_fill(~self.hard, -torch.inf).logsumexp(dim=-1, keepdim=True)
            weights = (scores - normaliser).clamp(max=LARGEST_EXPONENT).exp()
            weights = weights * (self.soft - self.soft.detach()).to(weights.dtype)  # zero, with a gradient
            slope = weights @ value - weights.sum(dim=-1, keepdim=True) * full(output.detach())
        return output + slope.to(output.dtype)


def give_mask_gradient(trunk: TokenTrunk) -> None:
    """Let the blocks take, beside their mask, the soft one that gets a gradient.

    Each block by itself, so that it does the same when it is compiled, or computed again in the backward pass.
    """
    for block in trunk.face.blocks(trunk.backbone):
        change_forward(block, _with_mask_gradient)


def _with_mask_gradient(forward: Forward) -> Forward:
    def run(self: nn.Module, *arguments: Any, soft: Tensor | None = None, **named: Any) -> Any:
        if soft is None:
            return forward(self, *arguments, **named)
        (hard,) = named.values()
        with MaskGradient(hard, soft):
            return forward(self, *arguments, **named)

    return run


def check_masked(trunk: MapTrunk | TokenTrunk, options: PartsModel) -> TokenTrunk:
    """The trunk, if it can be masked; ConfigError if not, or if the options of masks do not fit together.

    LATE_MASKING needs patch tokens and nothing else: no attention is masked.
    """
    name, late = trunk.adapter.name, options.LATE_MASKING
    if not isinstance(trunk, TokenTrunk) or not (late or trunk.has_class_token):
        raise ConfigError(
            f"{NAME_KEY}={name!r}: only a Vision Transformer{'' if late else ' with a class token'} can be masked. Set"
            " config.MODEL.PARTS.STAGE_TWO_TRUNK.NAME (two_stage) or config.MODEL.TRUNK.NAME to timm/vit_... or hf/dinov2."
        )
    if late:
        return trunk
    if not trunk.patches_apart:
        raise ConfigError(
            f"{NAME_KEY}={name!r}: its patches overlap, so masked pixels would leak into their neighbours. Use a model"
            f" whose patch embedding has stride = kernel size, or change it in {OPTIONS_KEY}."
        )
    if options.USE_SOFT_MASKS and options.MASK_GRADIENT != "none":
        raise ConfigError(
            f"config.MODEL.PARTS.MASK_GRADIENT={options.MASK_GRADIENT!r}: soft masks (USE_SOFT_MASKS=true) have a"
            " gradient anyway; set none."
        )
    fused = all(getattr(module, "fused_attn", True) for module in trunk.modules())
    if options.MASK_GRADIENT != "none" and not fused:
        raise ConfigError(
            f"config.MODEL.PARTS.MASK_GRADIENT={options.MASK_GRADIENT!r} needs fused attention; unset TIMM_FUSED_ATTN=0."
        )
    return trunk


class Decoupled(PartInputs):
    """Stage 2 alone, with given masks: images (B, 3, H, W) and masks (B, H', W') -> logits (B, C).

    State keys: trunk._feature_blocks.* and heads.*. With LATE_MASKING the transformer is not masked; the mask multiplies
    its final patch tokens, whose mean over all positions is classified.
    """

    def __init__(self, trunk: TokenTrunk, *, options: PartsModel, num_classes: int) -> None:
        super().__init__()
        self.options = options
        self.trunk = check_masked(trunk, options)
        self.heads: MaskedHead | MeanHead
        if options.LATE_MASKING:
            self.heads = MeanHead(trunk.width, num_classes=num_classes)
        else:
            self.heads = MaskedHead(trunk.width, num_classes=num_classes, num_prefix=trunk.num_prefix)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """masks: values above 0.5 are foreground; of any size, brought to the grid of patches by nearest neighbour."""
        grid = self.trunk.grid(images)
        masks = masks[:, None] if masks.ndim == 3 else masks
        flat = F.interpolate(masks.float(), size=grid, mode="nearest-exact").flatten(1)  # (B, n)
        hard = flat > 0.5
        if isinstance(self.heads, MeanHead):
            patches = self.trunk.tokens(images)[:, self.trunk.num_prefix :]
            return self.heads((patches * hard[:, :, None].to(patches.dtype)).mean(dim=1))
        mask = TokenMask(hard=hard, soft=flat)
        return masked_logits(self.trunk, self.heads, images, mask, options=self.options)
