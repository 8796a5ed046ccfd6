"""The rows that k-means starts from: drawn at random, or by k-means++ (Arthur and Vassilvitskii 2007).

Letters: n rows, D dimensions, K clusters, m candidates, a rows chosen in one round.

k-means++ draws one row after the other with probability proportional to its squared distance w to those already chosen.
Here each row has a clock that rings after an exponentially distributed amount of w * time, and the row whose clock rings
first is the one drawn; an exponential clock does not remember, so this is the same draw, and w may change in between.
Since w only falls, a clock rings no earlier than it would with the w of now. So one pass over all rows finds the m that
may ring next, and all that ring before any other row could are drawn among these m in memory: many rows per pass
instead of one. Distances are float64; clocks depend on the row alone, so the result depends on no number of processes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vissl_like.analysis.blocks import Blocks
from vissl_like.analysis.rows import one_thread
from vissl_like.core import rng

logger = logging.getLogger(__name__)

# The seed that faiss uses when none is given; our seed 0 is this one.
_FAISS_SEED = 1234
_REDO_STRIDE = 15486557
# What a number is drawn for.
_CLOCK, _REST = 11, 12
_CANDIDATES = 1024
# Rows closer than this share of their squared lengths are the same row: what is left is rounding.
_SAME = 1e-12


def faiss_seed(seed: int, attempt: int) -> int:
    """Fits a C int; `attempt` counts as faiss counts its own repetitions."""
    return (_FAISS_SEED + seed + attempt * _REDO_STRIDE) % ((1 << 31) - 2)


def initial_rows(n: int, k: int, *, seed: int, attempt: int = 0) -> np.ndarray:
    """K different rows of n: those that faiss starts from for its seed 1234 + `seed` (Mersenne twister, Fisher-Yates)."""
    generator = np.random.MT19937()
    generator._legacy_seeding(faiss_seed(seed, attempt) + 1)
    moved: dict[int, int] = {}
    chosen = np.empty(k, dtype=np.int64)
    for i in range(k):
        j = i + int(generator.random_raw()) % (n - i)
        chosen[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    return chosen


def clocks(start: int, stop: int, *, seed: int, attempt: int = 0) -> np.ndarray:
    """-log of a uniform number for each of the rows start..stop, float64: a function of seed, attempt and row."""
    first = start // 4  # a step of the counter gives four numbers
    generator = np.random.Philox(key=rng.mix(_CLOCK, seed, attempt), counter=first)
    raw = generator.random_raw(stop - 4 * first)[start - 4 * first :]
    return -np.log(((raw >> np.uint64(11)) + 0.5) * 2.0**-53)


@dataclass
class _Round:
    """Rows drawn in one round, in order, and the time from each draw to the one before."""

    rows: np.ndarray  # (a,)
    points: Tensor  # (a, D) float64
    times: np.ndarray  # (a,)


def plus_plus_rows(blocks: Blocks, k: int, *, seed: int, attempt: int = 0) -> np.ndarray:
    """K rows drawn by k-means++, int64 (K,), in the order they were drawn. Every process of the shard calls it.

    Where fewer than K rows differ, the rest are other rows at random. Takes K products of all rows, as one iteration of
    Lloyd but in float64, and 16 bytes per row.
    """
    with one_thread():
        state = _Clocks(blocks, seed=seed, attempt=attempt)
        drawn = [state.first()]
        count = 1
        while count < k:
            found = state.next(drawn[-1], limit=k - count)
            if found is None:
                break
            drawn.append(found)
            count += len(found.rows)
    logger.info("k-means++: %d rows drawn in %d passes", count, len(drawn))
    return _filled(np.concatenate([one.rows for one in drawn]), len(blocks.rows), k=k, seed=seed, attempt=attempt)


def _filled(chosen: np.ndarray, n: int, *, k: int, seed: int, attempt: int) -> np.ndarray:
    """`chosen`, and other rows up to K of them."""
    if len(chosen) == k:
        return chosen
    order = rng.permutation(rng.mix(_REST, seed), attempt, n)
    return np.concatenate([chosen, order[~np.isin(order, chosen)][: k - len(chosen)]])


class _Clocks:
    """What is left on the clock of each row of this process, and its squared distance to the chosen rows."""

    def __init__(self, blocks: Blocks, *, seed: int, attempt: int) -> None:
        self.blocks = blocks
        self.left = {span: clocks(*span, seed=seed, attempt=attempt) for span in blocks.spans}
        self.weights = {span: np.full(span[1] - span[0], np.inf) for span in blocks.spans}

    def first(self) -> _Round:
        """Every row has the weight 1."""
        bounds, rows, _, _ = self._soonest({span: (left, np.ones_like(left)) for span, left in self.left.items()}, 1)
        return _Round(rows, self._points(rows), bounds[:1])

    def next(self, before: _Round, *, limit: int) -> _Round | None:
        """Let the time of the round before pass, then draw up to `limit` rows; None if all rows are among the chosen."""
        for _ in self.blocks.each(lambda span, block: self._advance(span, block, before)):
            pass
        bounds, rows, left, weights = self._soonest(
            {s: (self.left[s], self.weights[s]) for s in self.left}, _CANDIDATES + 1
        )
        real = int(np.isfinite(bounds).sum())
        if not real:
            return None
        horizon = bounds[_CANDIDATES] if real > _CANDIDATES else np.inf
        order = np.argsort(rows[: min(real, _CANDIDATES)])  # by row: the lowest of equals is drawn, files read forwards
        rows, left, weights = rows[order], left[order], weights[order]
        points = self._points(rows)
        chosen, times = _ring(points, left, weights, horizon=horizon, limit=limit)
        return _Round(rows[chosen], points[chosen], times)

    def _points(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.blocks.rows.take(rows)).to(self.blocks.device).double()

    def _advance(self, span: tuple[int, int], block: Tensor, drawn: _Round) -> None:
        """Rows of a block: the clock runs with the weight of each moment, and the weight becomes that of the end."""
        x = block.double()
        products = torch.mm(drawn.points, x.T)  # (a, b)
        lengths = drawn.points.square().sum(1)[:, None] + x.square().sum(1)
        distances = lengths - 2 * products
        distances = torch.where(distances > _SAME * lengths, distances, 0.0).cpu().numpy()
        weights = self.weights[span]
        np.minimum(distances[0], weights, out=distances[0])
        steps = np.minimum.accumulate(distances, axis=0)
        begin = np.where(np.isinf(weights), 1.0, weights)  # before the first draw all weighed 1
        passed = begin * drawn.times[0] + (drawn.times[1:, None] * steps[:-1]).sum(0)
        self.left[span] = np.maximum(self.left[span] - passed, 0.0)
        self.weights[span] = steps[-1].copy()

    def _soonest(
        self, state: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]], count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The `count` rows of all processes that may ring first: bounds, rows, what is left, weights; inf fills up."""
        best = np.full((4, 0), np.inf)
        for (start, _), (left, weights) in state.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                bounds = np.where(weights > 0, left / weights, np.inf)
            near = np.argsort(bounds, kind="stable")[:count]
            table = np.stack([bounds[near], (start + near).astype(np.float64), left[near], weights[near]])
            best = _lowest(np.concatenate([best, table], axis=1), count)
        padded = np.full((4, count), np.inf)
        padded[:, : best.shape[1]] = best
        gathered = self.blocks.shard.gather(torch.from_numpy(np.nan_to_num(padded, posinf=np.finfo(np.float64).max)))
        table = _lowest(np.concatenate(list(gathered.numpy()), axis=1), count)
        bounds = np.where(table[0] < np.finfo(np.float64).max, table[0], np.inf)
        return bounds, np.where(np.isinf(bounds), -1, table[1]).astype(np.int64), table[2], table[3]


def _lowest(table: np.ndarray, count: int) -> np.ndarray:
    """The columns with the lowest (first, second) row, in order."""
    return table[:, np.lexsort((table[1], table[0]))[:count]]


def _ring(
    points: Tensor, left: np.ndarray, weights: np.ndarray, *, horizon: float, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the candidates (m, D) ring one after the other before the horizon, and the times in between; at least one."""
    chosen: list[int] = []
    times: list[float] = []
    left, weights = left.copy(), weights.copy()
    lengths = points.square().sum(1)
    while len(chosen) < limit:
        with np.errstate(divide="ignore", invalid="ignore"):
            bounds = np.where(weights > 0, left / weights, np.inf)
        row = int(bounds.argmin())
        time = float(bounds[row])
        if not np.isfinite(time) or (chosen and time > horizon):
            break
        horizon -= time
        left = np.maximum(left - weights * time, 0.0)
        distances = (points - points[row]).square_().sum(1)
        distances = torch.where(distances > _SAME * (lengths + lengths[row]), distances, 0.0)
        weights = np.minimum(weights, distances.cpu().numpy())
        chosen.append(row)
        times.append(time)
    return np.array(chosen, dtype=np.int64), np.array(times)
