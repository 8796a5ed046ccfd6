"""What is measured on the outputs of the heads: top-k accuracy, precision and recall at k, mean average precision.

Letters: B samples of a batch, C classes, H heads. All state is integer counts (or, for average precision, the scores
themselves), summed over processes exactly, so a value does not depend on the number of processes. Values are percent, also
mAP. The one exception is AP, the list of the classes' own precisions behind it: it is in [0, 1], as VISSL gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from vissl_like.config.schema_model import Loss, Meters
from vissl_like.core import distributed
from vissl_like.errors import ConfigError, DataError

#: Short names in flat metric keys.
_SHORT = {
    "accuracy_list_meter": "",
    "precision_at_k_list_meter": "precision_",
    "recall_at_k_list_meter": "recall_",
    "mean_ap_list_meter": "",
}

# The rank of a class that no logit speaks for.
_LAST = 1 << 40


class Meter(Protocol):
    """One measurement of every head."""

    name: str

    def reset(self) -> None: ...

    def update(self, outputs: Sequence[torch.Tensor], target: torch.Tensor) -> None: ...

    def compute(self) -> dict[str, list[Any]]:
        """{measure: value per head}. A collective call: every process must make it."""
        ...


class AccuracyMeter:
    """Share of samples whose class is among the k highest logits. Targets (B,) int64; negative ones do not count, nor those
    that the loss leaves out (`ignore_index`).

    A sample's rank is the number of classes with a higher logit, or an equal one and a lower index. So ties are decided
    the same way everywhere; a logit that is not a number is wrong.
    """

    name = "accuracy_list_meter"

    def __init__(self, *, topk: Sequence[int], num_heads: int, ignore_index: int = -1) -> None:
        self.topk, self.num_heads, self.ignore_index = list(topk), num_heads, ignore_index
        self.reset()

    def reset(self) -> None:
        self.correct = torch.zeros(len(self.topk), self.num_heads, dtype=torch.int64)
        self.total = torch.zeros(self.num_heads, dtype=torch.int64)

    def update(self, outputs: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        if target.dim() != 1:
            raise DataError(
                f"accuracy_list_meter: targets of shape {tuple(target.shape)}, but it needs one class per image. "
                "For multi-label targets set METERS.NAMES to mean_ap_list_meter or precision_at_k_list_meter."
            )
        refuse_larger_k(self.name, self.topk, [logits.shape[1] for logits in outputs])
        self.correct, self.total = self.correct.to(target.device), self.total.to(target.device)
        known = (target >= 0) & (target != self.ignore_index)
        for head, logits in enumerate(outputs):
            rank = class_rank(logits.detach(), target)
            for row, k in enumerate(self.topk):
                self.correct[row, head] += ((rank < k) & known).sum()
            self.total[head] += known.sum()

    def compute(self) -> dict[str, list[Any]]:
        correct = distributed.all_reduce_sum(self.correct.cpu()).tolist()
        total = distributed.all_reduce_sum(self.total.cpu()).tolist()
        return {
            f"top_{k}": [percent(hits, count) for hits, count in zip(correct[row], total, strict=True)]
            for row, k in enumerate(self.topk)
        }


def class_rank(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The place (0 = first) of each sample's class among its logits. (B, C), (B,) -> (B,) int64."""
    own = logits.gather(1, target.clamp(0, logits.shape[1] - 1)[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < target[:, None]
    rank = ((logits > own) | ((logits == own) & before)).sum(1)
    return torch.where(own[:, 0].isnan() | (target >= logits.shape[1]), _LAST, rank)


def refuse_larger_k(name: str, topk: Sequence[int], widths: Sequence[int]) -> None:
    """Raise ConfigError if a k is more than the classes that some head tells apart: all of them would always be hits."""
    if max(topk, default=0) > min(widths, default=max(topk, default=0)):
        raise ConfigError(
            f"config.METERS.{name.upper()}.TOPK_VALUES={list(topk)}: there are only {min(widths)} classes, so the "
            f"{max(topk)} best are all of them. Use values up to {min(widths)}."
        )


def percent(part: int, whole: int) -> float:
    """100 part / whole; not a number if there is nothing."""
    return 100.0 * part / whole if whole else float("nan")


class RetrievalAtK:
    """Multi-label precision (hits / (k B)) or recall (hits / labels) of the k highest logits.

    Targets (B, C) with 1 for the classes of an image; other values count as none.
    """

    def __init__(self, name: str, *, topk: Sequence[int], num_heads: int) -> None:
        self.name, self.topk, self.num_heads = name, list(topk), num_heads
        self.reset()

    def reset(self) -> None:
        self.hits = torch.zeros(len(self.topk), self.num_heads, dtype=torch.int64)
        self.samples = torch.zeros((), dtype=torch.int64)
        self.labels = torch.zeros((), dtype=torch.int64)

    def update(self, outputs: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        positive = _multi_hot(target, self.name) == 1
        refuse_larger_k(self.name, self.topk, [logits.shape[1] for logits in outputs])
        device = target.device
        self.hits, self.samples, self.labels = (x.to(device) for x in (self.hits, self.samples, self.labels))
        for head, logits in enumerate(outputs):
            order = logits.detach().sort(dim=1, descending=True, stable=True).indices
            ranked = positive.gather(1, order).cumsum(1)
            for row, k in enumerate(self.topk):
                self.hits[row, head] += ranked[:, k - 1].sum()
        self.samples += len(positive)
        self.labels += positive.sum()

    def compute(self) -> dict[str, list[Any]]:
        hits = distributed.all_reduce_sum(self.hits.cpu()).tolist()
        samples = int(distributed.all_reduce_sum(self.samples.cpu()))
        labels = int(distributed.all_reduce_sum(self.labels.cpu()))
        precision = self.name == "precision_at_k_list_meter"
        return {
            f"top_{k}": [percent(count, k * samples if precision else labels) for count in hits[row]]
            for row, k in enumerate(self.topk)
        }


class MeanApMeter:
    """Average precision per class and its mean over the classes that occur. Targets (B, C): 1, 0, or -1 = ignored."""

    name = "mean_ap_list_meter"

    def __init__(self, *, num_heads: int) -> None:
        self.num_heads = num_heads
        self.reset()

    def reset(self) -> None:
        self.scores: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []

    def update(self, outputs: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        self.scores.append(torch.stack([logits.detach().float() for logits in outputs], dim=1).cpu().numpy())
        self.targets.append(_multi_hot(target, self.name).to(torch.int8).cpu().numpy())

    def compute(self) -> dict[str, list[Any]]:
        parts = distributed.all_gather_object((self.scores, self.targets))
        scores = [block for part, _ in parts for block in part]
        targets = [block for _, part in parts for block in part]
        if not scores:
            return {"mAP": [float("nan")] * self.num_heads, "AP": [[]] * self.num_heads}
        all_scores, all_targets = np.concatenate(scores), np.concatenate(targets)  # (n, H, C), (n, C)
        ap = [_ap_per_class(all_scores[:, head], all_targets) for head in range(self.num_heads)]
        return {"mAP": [_mean_of_known(values) for values in ap], "AP": ap}


def _ap_per_class(scores: np.ndarray, targets: np.ndarray) -> list[float]:
    result = []
    for c in range(targets.shape[1]):
        kept = targets[:, c] >= 0
        result.append(average_precision(scores[kept, c], targets[kept, c])[2])
    return result


def _mean_of_known(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return 100.0 * float(np.mean(known)) if known else float("nan")


def average_precision(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Precision and recall at the score of each sample, best score first, and the interpolated average precision in [0, 1].

    scores (n,), labels (n,) with 1 for positives. The precision at a recall is the highest at that recall or a later one
    (Pascal VOC 2010). Samples of equal score share one threshold, so their order does not matter. Without positives the
    average is not a number.
    """
    order = np.argsort(-scores, kind="stable")
    positive = labels[order] == 1
    ranked = scores[order]
    last = np.searchsorted(-ranked, -ranked, side="right")  # how many samples have this score or a better one
    hits = np.concatenate([[0], np.cumsum(positive)])[last]
    precision = hits / np.maximum(last, 1)
    recall = hits / max(int(positive.sum()), 1)
    if not positive.any():
        return precision, recall, float("nan")
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return precision, recall, float(envelope[positive].mean())


def _multi_hot(target: torch.Tensor, name: str) -> torch.Tensor:
    if target.dim() != 2:
        raise DataError(
            f"{name}: targets of shape {tuple(target.shape)}, but it needs one number per image and class. "
            "For one class per image set METERS.NAMES=[accuracy_list_meter]."
        )
    return target


class MeterGroup:
    """All meters of a phase."""

    def __init__(self, meters: list[tuple[Meter, list[str]]], *, num_heads: int) -> None:
        self.meters, self.num_heads = meters, num_heads

    def reset(self) -> None:
        for meter, _ in self.meters:
            meter.reset()

    def update(
        self, outputs: Sequence[torch.Tensor], target: torch.Tensor, *, valid: torch.Tensor | None = None
    ) -> None:
        """Count a batch: outputs H x (B, C), target (B,) or (B, C). Rows that are not `valid` (B,) are left out."""
        if len(outputs) != self.num_heads:
            raise ConfigError(f"config.METERS: {self.num_heads} heads are measured, but the model gave {len(outputs)}.")
        if valid is not None and not bool(valid.all()):
            outputs, target = [logits[valid] for logits in outputs], target[valid]
        for meter, _ in self.meters:
            meter.update(outputs, target)

    def compute(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{meter: {measure: {head name: value, or values if the name repeats}}}. A collective call."""
        result: dict[str, dict[str, dict[str, Any]]] = {}
        for meter, names in self.meters:
            shown = names or [str(head) for head in range(self.num_heads)]
            result[meter.name] = {measure: _by_name(shown, values) for measure, values in meter.compute().items()}
        return result

    def flatten(self, prefix: str) -> dict[str, float]:
        """{"test_top_1": value}; with several or named heads "test_top_1_<name>". A collective call."""
        flat: dict[str, float] = {}
        for meter, names in self.meters:
            suffixes = _suffixes(names, num_heads=self.num_heads)
            for measure, values in meter.compute().items():
                if measure == "AP":
                    continue
                for suffix, value in zip(suffixes, values, strict=True):
                    flat[f"{prefix}_{_SHORT[meter.name]}{measure}{suffix}"] = value
        return flat


def _by_name(names: list[str], values: list[Any]) -> dict[str, Any]:
    grouped: dict[str, list[Any]] = {}
    for name, value in zip(names, values, strict=True):
        grouped.setdefault(name, []).append(value)
    return {name: found if names.count(name) > 1 else found[0] for name, found in grouped.items()}


def _suffixes(names: list[str], *, num_heads: int) -> list[str]:
    if not names:
        return [""] if num_heads == 1 else [f"_{head}" for head in range(num_heads)]
    return [f"_{name}_{i}" if names.count(name) > 1 else f"_{name}" for i, name in enumerate(names)]


def ignored_target(loss: Loss) -> int:
    """The target that the configured loss leaves out; -1 where it has no say in this."""
    return loss.CROSS_ENTROPY.IGNORE_INDEX if loss.NAME == "cross_entropy" else -1


def build_meters(meters: Meters, *, num_heads: int, ignore_index: int = -1, widths: Sequence[int] = ()) -> MeterGroup:
    """The meters of METERS.NAMES for a model with this many heads.

    ignore_index: targets that the loss leaves out; accuracy leaves them out, too. widths: classes of each head, where they
    are known, to refuse a larger k now.
    """
    built: list[tuple[Meter, list[str]]] = []
    for name in meters.NAMES:
        options = getattr(meters, name.upper())
        if options.METER_NAMES and len(options.METER_NAMES) != num_heads:
            raise ConfigError(
                f"config.METERS.{name.upper()}.METER_NAMES={options.METER_NAMES}: {num_heads} heads are measured. "
                "Give one name per head, or none."
            )
        refuse_larger_k(name, getattr(options, "TOPK_VALUES", []), widths)
        built.append((_build(name, options, num_heads=num_heads, ignore_index=ignore_index), options.METER_NAMES))
    return MeterGroup(built, num_heads=num_heads)


def _build(name: str, options: Any, *, num_heads: int, ignore_index: int) -> Meter:
    if name == "mean_ap_list_meter":
        return MeanApMeter(num_heads=num_heads)
    if any(k < 1 for k in options.TOPK_VALUES):
        raise ConfigError(f"config.METERS.{name.upper()}.TOPK_VALUES={options.TOPK_VALUES}: each must be 1 or more.")
    if name == "accuracy_list_meter":
        return AccuracyMeter(topk=options.TOPK_VALUES, num_heads=num_heads, ignore_index=ignore_index)
    return RetrievalAtK(name, topk=options.TOPK_VALUES, num_heads=num_heads)
