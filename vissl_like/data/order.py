"""Which rows each step, rank and micro-batch takes: pure arithmetic, shared by the plan, the loader and the tests.

Letters: n rows, B rows of a global step = batch_per_rank * accumulate * size. Free of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def steps_per_epoch(n: int, batch_per_rank: int, accumulate: int, size: int, drop_last: bool) -> int:
    """Optimizer steps that one pass over n rows makes.

    The last step may be short. It is left out if asked for (`drop_last`), and also when it has fewer rows than there
    are micro-batches (accumulate * size), since each of them needs at least one.
    """
    slots = accumulate * size
    full, rest = divmod(n, batch_per_rank * slots)
    return full + int(not drop_last and rest >= slots)


def unused_rows(n: int, batch_per_rank: int, accumulate: int, size: int, drop_last: bool) -> int:
    """Rows at the end of each epoch's order that no step takes."""
    steps = steps_per_epoch(n, batch_per_rank, accumulate, size, drop_last)
    return max(0, n - steps * batch_per_rank * accumulate * size)


def micro_batches(
    n: int, *, step: int, batch_per_rank: int, accumulate: int, rank: int, size: int
) -> list[tuple[int, int]]:
    """(start, stop) positions, in the epoch's order, of each micro-batch of one rank in one step.

    Step s takes positions [s*B, (s+1)*B). Each rank takes one contiguous run of them, each of its micro-batches a
    contiguous part of that run. A short last step is split as evenly as possible: sizes differ by one at most.
    """
    slots = accumulate * size
    first = step * batch_per_rank * slots
    rows = min(batch_per_rank * slots, n - first)
    share, rest = divmod(rows, slots)

    def start(slot: int) -> int:
        return first + slot * share + min(slot, rest)

    return [(start(slot), start(slot + 1)) for slot in range(rank * accumulate, (rank + 1) * accumulate)]


def micro_batch_weight(n: int, *, step: int, rows: int, batch_per_rank: int, accumulate: int, size: int) -> float:
    """Factor for a micro-batch's mean loss; with it the mean over micro-batches and ranks is that over the step's rows.

    1.0 except in a short last step.
    """
    slots = accumulate * size
    in_step = min(batch_per_rank * slots, n - step * batch_per_rank * slots)
    return rows * slots / in_step


def counted_weight(
    before: Sequence[float] | np.ndarray,
    *,
    step: int,
    start: int,
    stop: int,
    batch_per_rank: int,
    accumulate: int,
    size: int,
) -> float:
    """micro_batch_weight() of the positions start to stop where rows do not all count alike in the mean.

    `before`: what the rows before each position of the epoch's order count, (n + 1,).
    """
    slots = accumulate * size
    first = step * batch_per_rank * slots
    in_step = before[min(first + batch_per_rank * slots, len(before) - 1)] - before[first]
    return (before[stop] - before[start]) * slots / in_step if in_step > 0 else 0.0


def eval_range(n: int, batch: int, rank: int, size: int) -> tuple[int, int]:
    """(start, stop) rows that one rank evaluates: a contiguous run of whole batches; every row belongs to one rank.

    Batch k is rows [k*batch, (k+1)*batch) whatever the number of ranks, so that results do not depend on it.
    """
    batches = -(-n // batch)
    first, last = batches * rank // size, batches * (rank + 1) // size
    return min(n, first * batch), min(n, last * batch)
