"""Gradient clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vissl_like.config.schema_model import GradClip
from vissl_like.core.parallel import whole


def clip_gradients(parameters: Sequence[nn.Parameter], options: GradClip) -> Tensor | None:
    """Scale all gradients so that their common norm is at most MAX_NORM. Returns the norm before, () on the device."""
    if not options.USE_GRAD_CLIP:
        return None
    return whole(torch.nn.utils.clip_grad_norm_(parameters, options.MAX_NORM, norm_type=options.NORM_TYPE))
