"""Every row once, the same rows per step whatever the number of ranks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vissl_like.data.order import (
    counted_weight,
    eval_range,
    micro_batch_weight,
    micro_batches,
    steps_per_epoch,
    unused_rows,
)

counts = st.integers(1, 400)
batches = st.integers(1, 17)
accumulations = st.integers(1, 4)
sizes = st.integers(1, 6)


def taken(n: int, *, step: int, b: int, accumulate: int, size: int) -> list[tuple[int, int]]:
    """All micro-batches of a step, over ranks in order."""
    return [
        part
        for rank in range(size)
        for part in micro_batches(n, step=step, batch_per_rank=b, accumulate=accumulate, rank=rank, size=size)
    ]


@given(counts, batches, accumulations, sizes, st.booleans())
def test_steps_take_each_position_once(n: int, b: int, accumulate: int, size: int, drop_last: bool) -> None:
    steps = steps_per_epoch(n, b, accumulate, size, drop_last)
    position = 0
    for step in range(steps):
        for start, stop in taken(n, step=step, b=b, accumulate=accumulate, size=size):
            assert start == position and 1 <= stop - start <= b
            position = stop
    assert n - position == unused_rows(n, b, accumulate, size, drop_last)
    # Only a rest that cannot give every micro-batch a row is left out, unless asked for.
    assert n - position < (b * accumulate * size if drop_last else accumulate * size)


@given(counts, batches, accumulations, sizes)
def test_a_short_step_is_split_evenly(n: int, b: int, accumulate: int, size: int) -> None:
    last = steps_per_epoch(n, b, accumulate, size, False) - 1
    if last >= 0:
        lengths = [stop - start for start, stop in taken(n, step=last, b=b, accumulate=accumulate, size=size)]
        assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 300), st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2)]))
def test_rows_of_a_full_step_do_not_depend_on_ranks(n: int, layout: tuple[int, int]) -> None:
    size, accumulate = layout
    b = 8 // (size * accumulate)
    for step in range(n // 8):
        parts = taken(n, step=step, b=b, accumulate=accumulate, size=size)
        assert (parts[0][0], parts[-1][1]) == (8 * step, 8 * step + 8)


@given(counts, batches, accumulations, sizes)
def test_weights_turn_means_into_the_mean_over_rows(n: int, b: int, accumulate: int, size: int) -> None:
    for step in range(steps_per_epoch(n, b, accumulate, size, False)):
        parts = taken(n, step=step, b=b, accumulate=accumulate, size=size)
        values = [float(row * row % 13) for row in range(n)]
        shape = {"batch_per_rank": b, "accumulate": accumulate, "size": size}
        weighted = [
            micro_batch_weight(n, step=step, rows=stop - start, **shape) * sum(values[start:stop]) / (stop - start)
            for start, stop in parts
        ]
        rows = values[parts[0][0] : parts[-1][1]]
        assert sum(weighted) / len(weighted) == pytest.approx(sum(rows) / len(rows), rel=1e-12)


@given(counts, batches, accumulations, sizes)
def test_rows_that_count_differently_are_weighted_so(n: int, b: int, accumulate: int, size: int) -> None:
    values = [float(row * row % 13) for row in range(n)]
    counted = [(0.0, 0.0, 2.0, 0.5)[row * row % 7 % 4] for row in range(n)]
    before = [0.0, *itertools.accumulate(counted)]
    for step in range(steps_per_epoch(n, b, accumulate, size, False)):
        parts = taken(n, step=step, b=b, accumulate=accumulate, size=size)
        shape = {"batch_per_rank": b, "accumulate": accumulate, "size": size}
        weighted = []
        for start, stop in parts:
            of_part = sum(counted[start:stop])
            mean = sum(v * c for v, c in zip(values[start:stop], counted[start:stop])) / (of_part or 1.0)
            weighted.append(counted_weight(before, step=step, start=start, stop=stop, **shape) * mean)
        step_rows = slice(parts[0][0], parts[-1][1])
        total = sum(v * c for v, c in zip(values[step_rows], counted[step_rows]))
        assert sum(weighted) / len(weighted) == pytest.approx(total / (sum(counted[step_rows]) or 1.0), rel=1e-12)


@given(st.integers(0, 500), st.integers(1, 40), st.integers(1, 9))
def test_evaluation_covers_each_row_once_in_whole_batches(n: int, batch: int, size: int) -> None:
    position = 0
    for rank in range(size):
        start, stop = eval_range(n, batch, rank, size)
        assert start == position <= stop
        assert start % batch == 0 or start == n
        assert stop % batch == 0 or stop == n
        position = stop
    assert position == n


@pytest.mark.parametrize(
    ("n", "b", "accumulate", "size", "drop_last", "steps"),
    [(3000, 64, 1, 1, False, 47), (3000, 64, 1, 1, True, 46), (130, 64, 1, 2, False, 2), (129, 64, 1, 2, False, 1),
     (5, 64, 1, 1, False, 1), (5, 64, 1, 1, True, 0), (1, 64, 1, 2, False, 0), (12, 2, 3, 2, False, 1)],
)  # fmt: skip
def test_steps_by_hand(n: int, b: int, accumulate: int, size: int, drop_last: bool, steps: int) -> None:
    assert steps_per_epoch(n, b, accumulate, size, drop_last) == steps
