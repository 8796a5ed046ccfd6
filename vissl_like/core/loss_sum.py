"""The running sum of an epoch's losses, which costs a step next to nothing."""

from __future__ import annotations

import torch
from torch import Tensor

#: Losses that are kept before they are fetched from the device in one go.
_KEPT = 1000


class LossSum:
    """The sum of loss times rows, in double precision and in the order of the steps.

    When the losses are added up changes no bit of it, so a checkpoint in between does not, either.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._losses: list[Tensor] = []
        self._rows: list[float] = []

    def add(self, loss: Tensor, *, rows: float) -> None:
        """`loss` () of a micro-batch of this many rows, or of rows that count so much."""
        self._losses.append(loss.detach())
        self._rows.append(rows)
        if len(self._losses) >= _KEPT:
            self.value()

    def value(self) -> float:
        """The sum so far. Waits for the device."""
        if self._losses:
            for loss, rows in zip(torch.stack(self._losses).tolist(), self._rows):
                self._total += loss * rows
            self.start_at(self._total)
        return self._total

    def start_at(self, total: float) -> None:
        """Go on from this sum."""
        self._total, self._losses, self._rows = total, [], []
