"""Randomness as a function of coordinates."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vissl_like.core import rng


def draw() -> tuple[float, float, float, float]:
    return torch.rand(()).item(), np.random.rand(), random.random(), np.random.randn()


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def test_known_values_never_change() -> None:
    """A change of these numbers makes every run that is resumed another one."""
    assert rng._splitmix64(0) == 0xE220A8397B1DCDAF  # the published first output of splitmix64 for seed 0
    assert rng.mix(0) == 313702574736366215
    assert rng.mix(1, 2, 3) == 7493403859839354821
    assert rng.permutation(0, 0, 8).tolist() == [6, 2, 4, 5, 1, 0, 3, 7]


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=5))
def test_mix_is_63_bits_and_depends_on_order(numbers: list[int]) -> None:
    value = rng.mix(*numbers)
    assert 0 <= value < 2**63 and value == rng.mix(*numbers)
    if numbers != numbers[::-1]:
        assert value != rng.mix(*numbers[::-1])
    assert value != rng.mix(*numbers, 0)


def test_neighbouring_coordinates_share_no_bits() -> None:
    values = np.array([rng.mix(0, epoch, row) for epoch in range(30) for row in range(30)], dtype=np.uint64)
    assert len(set(values.tolist())) == 900
    bits = ((values[:, None] >> np.arange(63, dtype=np.uint64)) & np.uint64(1)).mean(0)
    assert (abs(bits - 0.5) < 5 * 0.5 / 30).all()


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 200))
def test_permutation_has_every_row_once(seed: int, epoch: int, n: int) -> None:
    order = rng.permutation(seed, epoch, n)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(n))


@given(st.integers(0, 2**31), st.integers(0, 400), st.integers(0, 450), st.integers(1, 70))
def test_a_sample_is_the_begin_of_the_permutation_however_it_is_read(seed: int, n: int, count: int, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rng, "_HASHED_AT_ONCE", step)
        found = rng.sample(seed, 0, n, count=count)
    assert np.array_equal(found, np.sort(rng.permutation(seed, 0, n)[:count]))


def test_permutations_of_epochs_are_unrelated() -> None:
    n = 2000
    orders = [rng.permutation(seed, epoch, n) for seed in (0, 1) for epoch in range(3)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)
            assert (a == b).sum() < 10


def test_sample_scope_fixes_all_generators_and_restores_them() -> None:
    seed_all(1)
    undisturbed = (torch.rand(()).item(), np.random.rand(), random.random())
    seed_all(1)
    with rng.sample_scope(0, 3, 7):
        first = draw()
    assert (torch.rand(()).item(), np.random.rand(), random.random()) == undisturbed
    with rng.sample_scope(0, 3, 7):
        assert draw() == first


@pytest.mark.parametrize("other", [(1, 3, 7, 0), (0, 4, 7, 0), (0, 3, 8, 0), (0, 3, 7, 1)])
def test_each_coordinate_of_a_sample_counts(other: tuple[int, int, int, int]) -> None:
    with rng.sample_scope(0, 3, 7, 0):
        first = draw()
    with rng.sample_scope(*other):
        assert all(a != b for a, b in zip(draw(), first))


def test_scopes_nest() -> None:
    with rng.sample_scope(0, 0, 1):
        draw()
        expected = draw()[:3]
    with rng.sample_scope(0, 0, 1):
        draw()
        with rng.sample_scope(0, 0, 2):
            draw()
        assert draw()[:3] == expected


def test_scope_restores_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), rng.sample_scope(0, 0, 0):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_and_ranks_draw_different_noise() -> None:
    seen = set()
    for coordinates in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
        rng.seed_step(*coordinates)
        first = draw()
        rng.seed_step(*coordinates)
        assert draw() == first
        seen.add(first)
    assert len(seen) == 4


@pytest.mark.parametrize("coordinates", [(0, 0, 0), (7, 123456, 3), (2**40, 1, 0), (7, 123456, 4)])
def test_seed_of_a_step_is_the_mix_of_its_coordinates(coordinates: tuple[int, int, int]) -> None:
    rng.seed_step(*coordinates)
    found = draw()
    rng._seed_globals(rng.mix(rng._STEP, *coordinates))
    assert found == draw()


def test_purposes_do_not_share_numbers() -> None:
    rng.seed_step(0, 0, 0)
    step = draw()
    with rng.sample_scope(0, 0, 0):
        assert draw() != step
    rng.seed_model(0)
    assert draw() != step
