"""Losses of classifiers: sums over the outputs of several heads against one target. B images, K classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vissl_like.config.schema_model import Loss
from vissl_like.errors import ConfigError, DataError

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
    of half precision are raised to float32 first. A batch in which no target counts has loss 0.
    """
    losses = []
    for output in _as_list(outputs):
        logits = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        if normalize_output:
            logits = F.normalize(logits, dim=1)
        if temperature != 1.0:
            logits = logits / temperature
        if target.ndim == 2:
            losses.append(F.cross_entropy(logits, target.to(logits.dtype), label_smoothing=label_smoothing))
            continue
        counts = check_targets(target, num_classes=logits.shape[1], ignore_index=ignore_index)
        scale = _class_weights(weight, logits)
        entropy = partial(F.cross_entropy, logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing)
        if counts and scale is None:
            losses.append(entropy())
        else:
            losses.append(entropy(weight=scale, reduction="sum") / _count(target, scale, ignore_index=ignore_index))
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def _class_weights(weight: Sequence[float] | None, logits: Tensor) -> Tensor | None:
    if weight is None:
        return None
    if len(weight) != logits.shape[1]:
        raise ConfigError(
            f"config.LOSS.CROSS_ENTROPY.WEIGHT has {len(weight)} numbers, but the head has {logits.shape[1]} outputs. "
            "Give one for each class."
        )
    return torch.as_tensor(weight, dtype=logits.dtype, device=logits.device)


def _count(target: Tensor, scale: Tensor | None, *, ignore_index: int) -> Tensor:
    """What a sum over targets is divided by to give their mean; never 0, so that a batch without targets gives 0."""
    known = target != ignore_index
    if scale is None:
        return known.sum().clamp(min=1)
    count = scale[torch.where(known, target, 0)].mul(known).sum()
    return torch.where(count > 0, count, 1.0)


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


def row_weights(labels: np.ndarray, *, loss: Loss) -> np.ndarray:
    """How much each row counts in the mean that the configured loss is: labels int64 (B,) or (B, K) -> float64 (B,).

    Batches weighted by the sum over their rows give the mean over all rows, however these are divided into batches. Losses
    that are no mean over rows (reductions of bce_logits) and those of others count each row as one.
    """
    if loss.NAME == "cross_entropy" and labels.ndim == 1:
        known = labels != loss.CROSS_ENTROPY.IGNORE_INDEX
        weight = loss.CROSS_ENTROPY.WEIGHT
        return known * (np.take(weight, np.where(known, labels, 0), mode="clip") if weight else 1.0)
    if loss.NAME == "bce_logits" and labels.ndim == 2 and loss.BCE_LOGITS.REDUCTION == "mean":
        return (labels != UNKNOWN).sum(1).astype(np.float64)
    return np.ones(len(labels))


def check_targets(target: Tensor, *, num_classes: int, ignore_index: int = UNKNOWN) -> bool:
    """Raise DataError if a class number does not fit the head. Returns whether it is sure that some target counts.

    Looks at tensors on the CPU only: on a GPU it would make every step wait, and the task knows the largest label.
    """
    if target.device.type != "cpu" or not target.numel():
        return False
    lowest, highest = (int(value) for value in torch.aminmax(target))
    if lowest >= 0 and highest < num_classes and not lowest == highest == ignore_index:
        return True
    wanted = target[target != ignore_index]
    if not wanted.numel():
        return False
    check_largest(int(wanted.max()), num_classes=num_classes)
    if int(wanted.min()) < 0:
        raise DataError(
            f"a label is {int(wanted.min())}, which means that the image has none, but the loss leaves out "
            f"config.LOSS.CROSS_ENTROPY.IGNORE_INDEX={ignore_index} alone. Set that to {int(wanted.min())}, or label all "
            "images."
        )
    return True


def check_largest(label: int, *, num_classes: int) -> None:
    """Raise DataError if this label does not fit the head."""
    if label >= num_classes:
        raise DataError(
            f"a label is {label}, but the head has {num_classes} outputs (labels 0 to {num_classes - 1}). "
            "Give the head more outputs (config.MODEL.HEAD.PARAMS dims; `auto` infers them) or mend the labels."
        )


def _as_list(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs
