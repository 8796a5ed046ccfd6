"""Sums of rows per cluster whose bits depend on no order: not of blocks, threads or processes, nor on how often rows moved.

Letters: n rows, b of a block, D dimensions, K clusters, S (K, D) the sums.

Each number is rounded once to a multiple of 2^(e - 52), with 2^e at least twice n times the largest magnitude. No sum of
such numbers can leave the 53 bits of a double, so no addition rounds. For a million rows the rounding is at most 2^-32
of the largest magnitude. Since subtraction is exact as well, a row that changes its cluster is taken out of one sum and put
into the other, and a row that stays costs nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from vissl_like.analysis.rows import spans

# Elements that are converted to float64 at a time: 1 MB stays in the cache of a core.
_AT_ONCE = 1 << 17
# Rows of a process whose clusters are remembered (64 MB); those of further ones are added up anew in each pass.
_REMEMBERED_ROWS = 1 << 24

Span = tuple[int, int]


class ExactSums:
    """S and the number of rows of each cluster, over the blocks of one process."""

    def __init__(self, k: int, dim: int, *, rows: int, magnitude: float, device: torch.device) -> None:
        """rows, magnitude: how many there are over all processes, and the largest |x| of them."""
        self.k, self.dim = k, dim
        largest = max(rows * magnitude, 1e-250)
        # Adding and subtracting 1.5 * 2^e rounds to a multiple of 2^(e - 52).
        self._rounding = 1.5 * 2.0 ** (math.ceil(math.log2(largest)) + 1)
        self._square_scale = 2.0 ** math.floor(61 - math.log2(max(largest * magnitude * dim, 1e-250)))
        self._sums = torch.zeros(k, dim, dtype=torch.float64, device=device)
        self._fresh: Tensor | None = None  # sums of the blocks that are not remembered
        self._counts = torch.zeros(k, dtype=torch.int64, device=device)
        self._clusters: dict[Span, Tensor] = {}
        self._room = _REMEMBERED_ROWS
        self._squares = 0
        self._is_first = True
        self._lock = threading.Lock()
        self._own = threading.local()

    def put(self, span: Span, block: Tensor, labels: Tensor) -> None:
        """The rows of a block (b, D) are now in these clusters (b,). Each block once per pass, from any thread."""
        before = self._clusters.get(span)
        if before is not None:
            moved = torch.nonzero(labels != before).flatten()
            if len(moved):
                self._add(block[moved], labels[moved], self._sums, taken_from=before[moved])
        else:
            self._add(block, labels, self._target(span))
        with self._lock:
            if before is not None or span in self._clusters:
                # In place: small tensors that are made anew in each pass, between others, leave holes in memory.
                self._clusters[span] = labels.int() if before is None else before.copy_(labels)
            self._counts.index_add_(0, labels, torch.ones_like(labels))

    def total(self, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, float]:
        """S float64 (K, D), the counts int64 (K,) and the sum of all |x|^2, over all processes. Ends a pass."""
        sums = self._sums if self._fresh is None else self._sums + self._fresh
        counts = reduce(self._counts.clone())
        squares = int(reduce(torch.tensor([self._squares]))) / self._square_scale
        self._counts.zero_()
        self._is_first = False
        if self._fresh is not None:
            self._fresh.zero_()
        return reduce(sums), counts, squares

    def _target(self, span: Span) -> Tensor:
        """Where a block goes that was not put before: to what is kept, while there is room to remember it."""
        with self._lock:
            size = span[1] - span[0]
            if self._is_first and size <= self._room:
                self._room -= size
                self._clusters[span] = torch.empty(0)
                return self._sums
            if self._fresh is None:
                self._fresh = torch.zeros_like(self._sums)
            return self._fresh

    def _add(self, rows: Tensor, labels: Tensor, sums: Tensor, *, taken_from: Tensor | None = None) -> None:
        for start, stop in spans(len(rows), max(1, _AT_ONCE // self.dim) if rows.device.type == "cpu" else len(rows)):
            exact = self._space(stop - start, rows.device).copy_(rows[start:stop])
            exact.add_(self._rounding).sub_(self._rounding)
            squares = (
                round(float(torch.dot(exact.flatten(), exact.flatten())) * self._square_scale) if self._is_first else 0
            )
            with self._lock:
                self._squares += squares
                sums.index_add_(0, labels[start:stop], exact)
                if taken_from is not None:
                    sums.index_add_(0, taken_from[start:stop].long(), exact, alpha=-1)

    def _space(self, rows: int, device: torch.device) -> Tensor:
        """Memory of this thread that is used again: fresh memory for each block costs as much as the sums."""
        space = getattr(self._own, "space", None)
        if space is None or len(space) < rows:
            space = self._own.space = torch.empty(rows, self.dim, dtype=torch.float64, device=device)
        return space[:rows]
