"""Losses of classifiers: sums over the outputs of several heads against one target. B images, K classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vissl_like.errors import DataError

#: A target of this value says nothing about its class (multi-label).
UNKNOWN = -1


def cross_entropy(
    outputs: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    temperature: float = 1.0,
    normalize_output: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -1,
    weight: Sequence[float] | None = None,
) -> Tensor:
    """Sum over outputs (B, K) of the mean cross-entropy against target (B,) int64 or (B, K) shares of classes -> scalar.

    As VISSL's cross_entropy_multiple_output_single_target: `ignore_index` and `weight` do not apply to shares. Outputs
    of half precision are raised to float32 first.
    """
    losses = []
    for output in _as_list(outputs):
        logits = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        if normalize_output:
            logits = F.normalize(logits, dim=1)
        logits = logits / temperature
        if target.ndim == 2:
            losses.append(F.cross_entropy(logits, target.to(logits.dtype), label_smoothing=label_smoothing))
            continue
        check_targets(target, num_classes=logits.shape[1])
        scale = None if weight is None else torch.as_tensor(weight, dtype=logits.dtype, device=logits.device)
        losses.append(
            F.cross_entropy(logits, target, weight=scale, ignore_index=ignore_index, label_smoothing=label_smoothing)
        )
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def bce_logits(outputs: Tensor | Sequence[Tensor], target: Tensor, *, reduction: str = "mean") -> Tensor:
    """Sum over outputs (B, K) of the binary cross-entropy against target (B, K) of 0, 1 and -1 (unknown) -> scalar.

    Reduction `none` is VISSL's: the mean over the images known for each class, summed over classes. `mean` and `sum`
    are over all known entries.
    """
    total = torch.zeros((), device=target.device)
    known = target != UNKNOWN
    for output in _as_list(outputs):
        if output.shape != target.shape:
            raise DataError(
                f"LOSS.NAME='bce_logits': the head gives {tuple(output.shape)}, the labels are {tuple(target.shape)}. "
                "Multi-label targets need one column per class."
            )
        logits = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        each = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none") * known
        if reduction == "none":
            total = total + (each / known.sum(0).clamp(min=1)).sum()
        elif reduction == "sum":
            total = total + each.sum()
        else:
            total = total + each.sum() / known.sum().clamp(min=1)
    return total


def check_targets(target: Tensor, *, num_classes: int) -> None:
    """Raise DataError if a class number does not fit the head.

    Looks at tensors on the CPU only: on a GPU it would make every step wait, and the task knows the largest label.
    """
    if target.device.type == "cpu" and target.numel():
        check_largest(int(target.max()), num_classes=num_classes)


def check_largest(label: int, *, num_classes: int) -> None:
    """Raise DataError if this label does not fit the head."""
    if label >= num_classes:
        raise DataError(
            f"a label is {label}, but the head has {num_classes} outputs (labels 0 to {num_classes - 1}). "
            "Give the head more outputs (config.MODEL.HEAD.PARAMS dims; `auto` infers them) or mend the labels."
        )


def _as_list(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs
