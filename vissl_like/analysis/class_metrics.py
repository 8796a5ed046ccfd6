"""Accuracy of a classifier as part discovery reports it: micro and macro, per class, per group, and AUROC.

What is added up is whole numbers, and for AUROC the scores of each row, so nothing depends on the number of processes.
C classes, N rows. All values are percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vissl_like.core import distributed

#: Accuracies of single classes are reported up to this many.
FEW_CLASSES = 5
#: Scores are kept for AUROC up to this many numbers (rows times classes) on a process: 80 MB.
MOST_SCORES = 20_000_000


@dataclass(frozen=True)
class TestFacts:
    """What is known of a test split beyond its labels.

    `groups` (N,) int64 with `group_names`: whose accuracies are compared. `group_shares` (G,): their shares of the
    training images, or None. `known_classes` (C,) bool: the only ones that may be predicted, or None for all.
    """

    groups: np.ndarray | None = None
    group_names: tuple[str, ...] = ()
    group_shares: np.ndarray | None = None
    known_classes: np.ndarray | None = None


class ClassMetrics:
    """Counts predictions and sums them up: update() for each batch, flatten() at the end, on every rank."""

    def __init__(
        self,
        num_classes: int,
        *,
        facts: TestFacts | None = None,
        class_names: Sequence[str] = (),
        with_auroc: bool = True,
    ) -> None:
        self.num_classes, self.class_names = num_classes, list(class_names)
        self.facts = facts or TestFacts()
        self.with_auroc = with_auroc
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.total = torch.zeros(self.num_classes, dtype=torch.int64)
        self.top_1 = torch.zeros(self.num_classes, dtype=torch.int64)
        self.top_5 = torch.zeros(self.num_classes, dtype=torch.int64)
        self.by_group = torch.zeros(len(self.facts.group_names), 2, dtype=torch.int64)  # all, right
        self._scores: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_scores = 0

    def update(self, logits: Tensor, labels: Tensor, *, rows: Tensor | None = None) -> None:
        """Count logits (B, C) for labels (B,); `rows` (B,) of the data set are needed for groups."""
        logits = logits.detach().float()
        if self.facts.known_classes is not None:
            unknown = ~torch.from_numpy(self.facts.known_classes).to(logits.device)
            logits = logits.masked_fill(unknown, float("-inf"))
        best = logits.topk(min(5, self.num_classes), dim=1).indices
        hits = best == labels[:, None]
        kinds = labels.cpu()
        self.total += torch.bincount(kinds, minlength=self.num_classes)
        self.top_1 += torch.bincount(kinds[hits[:, 0].cpu()], minlength=self.num_classes)
        self.top_5 += torch.bincount(kinds[hits.any(dim=1).cpu()], minlength=self.num_classes)
        if self.facts.groups is not None and rows is not None:
            groups = torch.from_numpy(self.facts.groups)[rows.cpu()]
            count = len(self.by_group)
            right = groups[hits[:, 0].cpu()]
            self.by_group += torch.stack([torch.bincount(g, minlength=count) for g in (groups, right)], dim=1)
        self._keep_scores(logits, kinds, rows)

    def _keep_scores(self, logits: Tensor, labels: Tensor, rows: Tensor | None) -> None:
        if not self.with_auroc or rows is None:
            return
        self._num_scores += logits.numel()
        if self._num_scores > MOST_SCORES:
            self.with_auroc, self._scores = False, []
            return
        scores = logits.softmax(dim=1)
        kept = scores[:, 1:] if self.num_classes == 2 else scores
        self._scores.append((rows.cpu().numpy(), labels.numpy(), kept.cpu().numpy()))

    def state(self) -> dict[str, Tensor]:
        """The counts of this rank, for a checkpoint in the middle of an epoch."""
        return {name: getattr(self, name).clone() for name in ("total", "top_1", "top_5")}

    def add_state(self, state: dict[str, Any]) -> None:
        """Go on from counts that state() gave."""
        for name, counts in state.items():
            getattr(self, name).add_(counts)

    def flatten(self, prefix: str, *, suffix: str = "") -> dict[str, float]:
        """{prefix_measure+suffix: percent} over all ranks. A collective call."""
        total, top_1, top_5 = (distributed.all_reduce_sum(counts) for counts in (self.total, self.top_1, self.top_5))
        found = {"top_1": _percent(top_1.sum(), total.sum()), "macro_top_1": _macro(top_1, total)}
        if self.num_classes > FEW_CLASSES:
            found |= {"top_5": _percent(top_5.sum(), total.sum()), "macro_top_5": _macro(top_5, total)}
        else:
            found |= {f"top_1_of_{self._name(k)}": _percent(top_1[k], total[k]) for k in range(self.num_classes)}
        found |= self._of_groups()
        found |= self._auroc()
        return {f"{prefix}_{name}{suffix}": value for name, value in found.items()}

    def _name(self, number: int) -> str:
        return _word(self.class_names[number]) if number < len(self.class_names) else str(number)

    def _of_groups(self) -> dict[str, float]:
        if self.facts.groups is None:
            return {}
        counts = distributed.all_reduce_sum(self.by_group)
        accuracy = [_percent(right, every) for every, right in counts.tolist()]
        found = {f"top_1_of_{_word(name)}": value for name, value in zip(self.facts.group_names, accuracy)}
        found["worst_group"] = min((value for value in accuracy if value == value), default=float("nan"))
        shares = self.facts.group_shares
        if shares is not None and not np.isnan(np.array(accuracy)[shares > 0]).any():
            found["top_1_weighted"] = float(np.nansum(np.array(accuracy) * shares))
        return found

    def _auroc(self) -> dict[str, float]:
        if not all(distributed.all_gather_object(self.with_auroc)):
            return {}
        parts = [part for of_rank in distributed.all_gather_object(self._scores) for part in of_rank]
        if not parts:
            return {}
        rows, labels, scores = (np.concatenate(column) for column in zip(*parts))
        order = np.argsort(rows, kind="stable")
        return {"auroc": auroc(labels[order], scores[order])}


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve in percent: of class 1 for scores (N, 1), else the mean over classes, one against all.

    Classes without positives or negatives are left out; nan if none is left.
    """
    from sklearn.metrics import roc_auc_score

    if scores.shape[1] == 1:
        truths = [(labels == 1, scores[:, 0])]
    else:
        truths = [(labels == kind, scores[:, kind]) for kind in range(scores.shape[1])]
    areas = [roc_auc_score(truth, score) for truth, score in truths if 0 < truth.sum() < len(truth)]
    return 100.0 * float(np.mean(areas)) if areas else float("nan")


def _percent(part: Any, whole: Any) -> float:
    return 100.0 * int(part) / int(whole) if int(whole) else float("nan")


def _macro(right: Tensor, total: Tensor) -> float:
    """Mean over the classes that occur."""
    seen = total > 0
    return 100.0 * float((right[seen].double() / total[seen].double()).mean()) if bool(seen.any()) else float("nan")


def _word(name: str) -> str:
    return name.strip().lower().replace(" ", "_")
