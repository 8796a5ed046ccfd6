"""The baseline of part discovery: one backbone, one pooling of its tokens, one linear layer. B images, n patches, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vissl_like.errors import ConfigError
from vissl_like.models.masked_vit import MeanHead, new_classifier
from vissl_like.models.part_backbones import NAME_KEY, TokenTrunk
from vissl_like.models.part_inputs import PartInputs
from vissl_like.models.parts import LINEAR_STD
from vissl_like.models.trunk import Trunk

KEY = "config.MODEL.PARTS.POOLING_TYPE"
#: Queries of efficient probing and heads of attention pooling.
EFFICIENT_QUERIES = 32
POOLING_HEADS = 12


class EfficientProbing(nn.Module):
    """Patches (B, n, D) -> (B, D): query i averages the i-th of 32 slices of the values (arXiv 2506.10178).

    Keys are the tokens themselves; values one linear layer. Then a LayerNorm.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        _divides(EFFICIENT_QUERIES, width, "ep", "queries")
        self.queries = nn.Parameter(torch.empty(EFFICIENT_QUERIES, width))
        nn.init.normal_(self.queries, std=LINEAR_STD)
        self.values = nn.Linear(width, width, bias=False)
        self.fc_norm = nn.LayerNorm(width)

    def forward(self, patches: Tensor) -> Tensor:
        attention = torch.softmax(
            self.queries @ patches.transpose(1, 2) * patches.shape[2] ** -0.5, dim=2
        )  # (B, 32, n)
        values = self.values(patches).unflatten(2, (EFFICIENT_QUERIES, -1))  # (B, n, 32, D/32)
        pooled = torch.einsum("bqn,bnqd->bqd", attention, values)
        return self.fc_norm(pooled.flatten(1))


class AttentionPooling(nn.Module):
    """Patches (B, n, D) -> (B, D): batch normalisation without weights, then one learned query in 12 heads (AIM, arXiv
    2401.08541)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        _divides(POOLING_HEADS, width, "aim", "heads")
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.query = nn.Parameter(torch.empty(1, width))
        nn.init.normal_(self.query, std=LINEAR_STD)
        self.keys = nn.Linear(width, width, bias=False)
        self.values = nn.Linear(width, width, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        patches = self.norm(patches.transpose(1, 2)).transpose(1, 2)
        query = self.query.expand(len(patches), -1)[:, None]
        heads = [
            part.unflatten(2, (POOLING_HEADS, -1)).transpose(1, 2)
            for part in (query, self.keys(patches), self.values(patches))
        ]
        return F.scaled_dot_product_attention(*heads).flatten(1)


def _divides(count: int, width: int, kind: str, what: str) -> None:
    if width % count:
        raise ConfigError(
            f"{KEY}={kind!r}: its {count} {what} do not divide the width {width} of the tokens. Use cls or gap."
        )


class PoolingHead(nn.Module):
    """All tokens (B, P+n, D) -> logits (B, C), by the pooling that POOLING_TYPE names.

    cls: class token; gap: mean of patches; gap_cls: both; ep: EfficientProbing; aim: AttentionPooling. State keys:
    pool.* (ep, aim) and classifier.*.
    """

    def __init__(self, width: int, *, kind: str, num_prefix: int, num_classes: int) -> None:
        super().__init__()
        self.kind = kind
        self.num_prefix = num_prefix
        self.pool: nn.Module = nn.Identity()
        if kind in ("ep", "aim"):
            self.pool = EfficientProbing(width) if kind == "ep" else AttentionPooling(width)
        self.classifier = new_classifier(2 * width if kind == "gap_cls" else width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        first, patches = tokens[:, 0], tokens[:, self.num_prefix :]
        if self.kind == "cls":
            return self.classifier(first)
        if self.kind == "gap":
            return self.classifier(patches.mean(dim=1))
        if self.kind == "gap_cls":
            return self.classifier(torch.cat([first, patches.mean(dim=1)], dim=1))
        return self.classifier(self.pool(patches))


class PooledModel(PartInputs):
    """images (B, 3, H, W) -> logits (B, C). A CNN keeps its own pooling (gap). State keys: trunk._feature_blocks.*, heads.*."""

    def __init__(self, trunk: Trunk, *, kind: str, num_classes: int, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads: PoolingHead | MeanHead
        if isinstance(trunk, TokenTrunk):
            if not trunk.has_class_token and kind in ("cls", "gap_cls"):
                raise ConfigError(f"{KEY}={kind!r}: {trunk.adapter.name} has no class token. Use gap, ep or aim.")
            self.heads = PoolingHead(width, kind=kind, num_prefix=trunk.num_prefix, num_classes=num_classes)
        elif kind == "gap":
            self.heads = MeanHead(width, num_classes=num_classes)
        else:
            raise ConfigError(
                f"{KEY}={kind!r}: {NAME_KEY}={trunk.adapter.name!r} has no tokens; its own pooling is the only one. Use gap."
            )

    def query_parameters(self) -> list[nn.Parameter]:
        """The learned queries of the pooling (ep, aim)."""
        pool = self.heads.pool if isinstance(self.heads, PoolingHead) else None
        if isinstance(pool, EfficientProbing):
            return [pool.queries]
        return [pool.query] if isinstance(pool, AttentionPooling) else []

    def forward(self, images: Tensor) -> Tensor:
        return self.heads(
            self.trunk.tokens(images) if isinstance(self.trunk, TokenTrunk) else self.trunk.pooled(images)
        )
