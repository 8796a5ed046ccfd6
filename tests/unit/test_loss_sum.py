"""The running sum of losses: exact, and the same whenever it is looked at."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vissl_like.core.loss_sum import LossSum

STEPS = st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.integers(1, 64)), max_size=30)


@given(steps=STEPS, looks=st.sets(st.integers(0, 30)))
@settings(max_examples=60, deadline=None)
def test_it_does_not_matter_when_one_looks(steps: list[tuple[float, int]], looks: set[int]) -> None:
    total, expected = LossSum(), 0.0
    for number, (loss, rows) in enumerate(steps):
        total.add(torch.tensor(loss), rows=rows)
        expected += loss * rows
        if number in looks:
            assert total.value() == expected
            total.start_at(total.value())  # as a resumed run does
    assert total.value() == expected


def test_many_losses_are_not_kept() -> None:
    total = LossSum()
    for _ in range(2500):
        total.add(torch.tensor(0.5, requires_grad=True), rows=2)
    assert len(total._losses) == 500
    assert total.value() == 2500.0
