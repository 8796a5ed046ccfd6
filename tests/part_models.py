"""Small part models for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vissl_like.config.schema_model import Model
from vissl_like.models.part_zoo import build_part_model

VIT = {
    "NAME": "timm/vit_tiny_patch16_224",
    "OPTIONS": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 2, "no_embed_class": True},
}
STEM = {"NAME": "conv_stem", "OPTIONS": {"width": 16, "stem": [8, 16]}}
HF = {
    "NAME": "hf/dinov2",
    "OPTIONS": {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 4, "image_size": 16},
}


def section(trunk: dict[str, Any], **parts: Any) -> Model:
    return Model.model_validate({"TRUNK": trunk, "PARTS": {"NUM_PARTS": 3} | parts})


def build(kind: str, trunk: dict[str, Any], *, size: int | tuple[int, int] = 16, **parts: Any) -> Any:
    torch.manual_seed(0)
    return build_part_model(kind, section(trunk, **parts), num_classes=5, image_size=size)


def images(count: int = 2, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))
