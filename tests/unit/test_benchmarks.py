"""What the numbers of benchmarks rest on: the parts that flags choose, and as much work for the peers as for ours."""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a benchmark as its folder does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # they set these for their own process

    def imported(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return imported


def test_flags_choose_parts_and_none_is_all(load, capsys: pytest.CaptureFixture[str]) -> None:
    rounds, ran = load("_rounds"), []
    parts = {name: (lambda name=name: ran.append(name)) for name in ("speed", "memory")}
    rounds.run_parts(parts, argparse.Namespace(speed=False, memory=True))
    assert ran == ["memory"]
    assert "-- memory: 0 s" in capsys.readouterr().out
    rounds.run_parts(parts, argparse.Namespace(speed=None, memory=False))
    assert ran == ["memory", "speed", "memory"]


def test_peers_of_kmeans_assign_as_often_as_ours_and_leave_the_rows_alone(load) -> None:
    """The objective is that of the last assignment: one assignment more or less would show in it."""
    benchmark = load("kmeans")
    x = benchmark.clustered(2000, 8)
    before = x.copy()
    objective = {}
    for name, variant in benchmark.variants(20, 3).items():
        objective[name] = variant.run(variant.prepare(x))
    np.testing.assert_array_equal(x, before)
    for peer in ("faiss", "scikit-learn"):
        assert objective[peer] == pytest.approx(objective["ours"], rel=1e-5)
    whole = benchmark.ours(x, k=20, iterations=4).objective
    assert whole[2] == objective["ours"] and whole[3] < 0.999 * whole[2]


def test_the_parts_of_kmeans_are_timed_in_each_block(load, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts how often it is looked at: each call that is timed takes one."""
    benchmark = load("kmeans")
    x = benchmark.clustered(5000, 16)
    blocks = -(-len(x) // benchmark.block_rows(30, 16, device=benchmark.CPU))
    assert blocks > 1
    monkeypatch.setattr(benchmark.time, "process_time", itertools.count().__next__)
    assert benchmark.in_parts(x, k=30, iterations=2) == {
        benchmark.READING: 2 * blocks,
        benchmark.PRODUCTS: 2 * blocks,
        benchmark.SEARCH: 0,  # what it takes beyond the products
        benchmark.SUMS: 2 * blocks,
        benchmark.REST: 1 + 2 * 4,
    }
