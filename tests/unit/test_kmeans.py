"""K-means and streaming assignment: exactness at any number of threads, shards and blocks, and clear refusals."""

from __future__ import annotations

import logging
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vissl_like.analysis import exact_sums, lloyd
from vissl_like.analysis import kmeans as module
from vissl_like.analysis.blocks import Blocks, Shard, block_rows
from vissl_like.analysis.exact_sums import ExactSums
from vissl_like.analysis.kmeans import kmeans
from vissl_like.analysis.nearest import Table, assign, assign_blocks
from vissl_like.analysis.rows import ArrayRows, MappedRows, SelectedRows, normalise
from vissl_like.analysis.seeding import clocks, initial_rows, plus_plus_rows
from vissl_like.errors import ConfigError, DataError


def blobs(n: int = 900, dim: int = 12, centres: int = 6, seed: int = 0, spread: float = 0.2) -> np.ndarray:
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(centres, dim))
    return (means[np.arange(n) % centres] + spread * generator.normal(size=(n, dim))).astype(np.float32)


CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("spherical", [False, True])
def test_finds_the_blobs(backend: str, spherical: bool) -> None:
    x = normalise(blobs())
    result = kmeans(ArrayRows(x), k=6, iterations=30, seed=1, redo=5, spherical=spherical, backend=backend, threads=1)
    labels, distances = assign(ArrayRows(x), result.centroids)
    truth = np.arange(len(x)) % 6
    assert all(len(np.unique(labels[truth == c])) == 1 for c in range(6))
    assert result.sizes.tolist() == [150] * 6 and result.num_empty == 0 and result.backend == backend
    assert result.objective == sorted(result.objective, reverse=True)
    np.testing.assert_allclose(distances.sum(), result.objective[-1], rtol=1e-3)
    if spherical:
        np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("spherical", [False, True])
def test_backends_start_from_the_same_rows_and_agree(spherical: bool) -> None:
    x = normalise(blobs(spread=1.0))
    results = [
        kmeans(ArrayRows(x), k=7, iterations=12, seed=5, redo=2, spherical=spherical, backend=name)
        for name in ("faiss", "torch")
    ]
    np.testing.assert_allclose(results[0].centroids, results[1].centroids, atol=1e-5)
    np.testing.assert_allclose(results[0].objective, results[1].objective, rtol=1e-5)


class SlowRows:
    """Rows that are not known to be in memory, as those of a file."""

    def __init__(self, array: np.ndarray) -> None:
        self.source = ArrayRows(array)
        self.dim, self.reads = self.source.dim, 0

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int) -> np.ndarray:
        self.reads += 1
        return self.source.read(start, stop)

    def take(self, indices: np.ndarray) -> np.ndarray:
        return self.source.take(indices)


def on_shards(work: Any, *, size: int) -> list[Any]:
    """work(shard) of `size` shards in threads that add up each other's tensors at a barrier, as processes would."""
    barrier, box, results = threading.Barrier(size), {}, {}

    def one(rank: int) -> None:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            box[rank] = tensor
            barrier.wait(60)
            order = range(size) if rank % 2 else reversed(range(size))
            total = sum((box[other] for other in order), torch.zeros_like(tensor))
            barrier.wait(60)
            return total

        results[rank] = work(Shard(rank, size, reduce))

    workers = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return [results[rank] for rank in range(size)]


@pytest.mark.parametrize("init", ["random", "kmeans++"])
@pytest.mark.parametrize("spherical", [False, True])
def test_result_is_the_same_bits_for_threads_and_shards(init: str, spherical: bool) -> None:
    x = ArrayRows(blobs(n=700, spread=1.0))
    run: dict[str, Any] = {"k": 9, "iterations": 15, "seed": 2, "init": init, "spherical": spherical, "block": 64}
    expected = kmeans(x, threads=1, **run)
    for found in [
        kmeans(x, threads=3, **run),
        *on_shards(lambda shard: kmeans(x, threads=1, shard=shard, **run), size=3),
        *on_shards(lambda shard: kmeans(x, threads=2, shard=shard, **run), size=14),  # some have no block
    ]:
        assert np.array_equal(found.centroids, expected.centroids)
        assert found.objective == expected.objective and np.array_equal(found.sizes, expected.sizes)


@pytest.mark.parametrize("remembered", [0, 200])
def test_neither_caching_nor_forgetting_changes_a_bit(monkeypatch: pytest.MonkeyPatch, remembered: int) -> None:
    x = blobs(n=700, spread=1.0)
    run: dict[str, Any] = {"k": 9, "iterations": 6, "seed": 2, "block": 64, "threads": 1}
    expected = kmeans(ArrayRows(x), **run)
    rows = {cached: SlowRows(x) for cached in (0, 4 * 64 * 12 * 5, 1 << 20)}
    for cached, source in rows.items():
        assert np.array_equal(kmeans(source, cache_bytes=cached, **run).centroids, expected.centroids)
    reads = [source.reads for source in rows.values()]
    assert reads == [7 * 11, 11 + 6 * 6, 11]
    once = Blocks(SlowRows(x), size=64, device=CPU, cache_bytes=1 << 20, keep=False)
    assert len([*once.each(lambda span, block: None), *once.each(lambda span, block: None)]) == 22 == once.rows.reads
    monkeypatch.setattr(exact_sums, "_REMEMBERED_ROWS", remembered)
    again = kmeans(ArrayRows(x), **run)
    assert np.array_equal(again.centroids, expected.centroids) and again.objective == expected.objective


def test_half_precision_rows_give_what_their_values_give() -> None:
    x = blobs(n=600, spread=1.0).astype(np.float16)
    run: dict[str, Any] = {"k": 6, "iterations": 8, "block": 64}
    found, expected = kmeans(ArrayRows(x), **run), kmeans(ArrayRows(x.astype(np.float32)), **run)
    assert np.array_equal(found.centroids, expected.centroids) and found.objective == expected.objective


@settings(max_examples=40, deadline=None)
@given(data=st.data(), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]))
def test_sums_do_not_depend_on_order_or_history(data: st.DataObject, scale: float) -> None:
    n, dim, k = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x = torch.from_numpy((scale * draw.normal(size=(n, dim)) * 10.0 ** draw.integers(-6, 1, (n, 1))).astype(np.float32))
    labels = torch.from_numpy(draw.integers(0, k, n))
    run: dict[str, Any] = {"rows": n, "magnitude": float(x.abs().max()), "device": CPU}
    whole = ExactSums(k, dim, **run)
    whole.put((0, n), x, labels)
    sums, counts, squares = whole.total(lambda total: total)
    pieces = ExactSums(k, dim, **run)
    parts = [(i, min(i + 7, n)) for i in range(0, n, 7)]
    for chosen in (torch.from_numpy(draw.integers(0, k, n)), labels):  # first elsewhere, then here
        for i in draw.permutation(len(parts)):
            pieces.put(parts[i], x[slice(*parts[i])], chosen[slice(*parts[i])])
        again = pieces.total(lambda total: total)
    assert torch.equal(again[0], sums) and torch.equal(again[1], counts)
    exact = np.zeros((k, dim))
    np.add.at(exact, labels.numpy(), x.numpy().astype(np.float64))
    np.testing.assert_allclose(sums.numpy(), exact, atol=n * n * run["magnitude"] * 2.0**-50)
    np.testing.assert_allclose(squares, float((x.double() ** 2).sum()), rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12), spherical=st.booleans())
def test_objective_falls_and_is_that_of_the_assignment(seed: int, k: int, spherical: bool) -> None:
    x = blobs(n=150, dim=5, seed=seed, spread=0.8)
    x = normalise(x) if spherical else x
    results = [
        kmeans(ArrayRows(x), k=k, iterations=t, seed=seed, spherical=spherical, block=64, threads=1) for t in (4, 5)
    ]
    objective = results[1].objective
    if not results[1].num_splits:
        assert all(later <= before * (1 + 1e-6) for before, later in pairwise(objective))
    if len(objective) == 5:  # the centroids after 4 iterations are those of the fifth objective
        _, distances = assign(ArrayRows(x), results[0].centroids)
        np.testing.assert_allclose(objective[4], distances.sum(dtype=np.float64), rtol=1e-4, atol=1e-5)
    assert results[1].sizes.sum() == 150


def test_empty_clusters_get_half_of_another() -> None:
    x = np.repeat(np.array([[0.0, 0.0], [9.0, 9.0]], dtype=np.float32), 50, axis=0)
    x[:3] += np.float32(0.5)  # so that there is something to split
    result = kmeans(ArrayRows(x), k=4, iterations=10, seed=0, backend="torch")
    assert result.num_splits > 0
    assert np.isfinite(result.centroids).all()


def test_empty_clusters_are_split_as_faiss_does() -> None:
    means = np.random.default_rng(3).normal(size=(50, 16)).astype(np.float32)
    x = np.repeat(means, 30, axis=0) + np.random.default_rng(4).normal(size=(1500, 16)).astype(np.float32) * 0.05
    for seed in range(4):
        ours, theirs = (kmeans(ArrayRows(x), k=110, iterations=6, seed=seed, backend=b) for b in ("torch", "faiss"))
        assert ours.num_splits == theirs.num_splits
        np.testing.assert_allclose(ours.objective, theirs.objective, rtol=1e-4)
    assert ours.num_splits > 0
    assert lloyd.donors(np.array([5, 0, 0])) == [(1, 0), (2, 0)]


def test_equal_distances_go_to_the_lowest_cluster() -> None:
    centroids = np.array([[1, 0], [1, 0], [-1, 0], [1, 0]], dtype=np.float32)
    labels, _ = assign(ArrayRows(np.array([[0, 5], [2, 0], [-3, 1]], dtype=np.float32)), centroids)
    assert labels.tolist() == [0, 0, 2]


def test_assignment_matches_brute_force_in_any_shard() -> None:
    x, centroids = blobs(n=500), blobs(n=40, seed=3)
    labels, distances = assign(ArrayRows(x), centroids, threads=2, block=64)
    squared = ((x[:, None].astype(np.float64) - centroids) ** 2).sum(2)
    assert np.array_equal(labels, squared.argmin(1)) and labels.dtype == np.int64
    np.testing.assert_allclose(distances, squared.min(1), rtol=1e-5)
    for rank in range(3):
        for start, part, squares in assign_blocks(ArrayRows(x), centroids, shard=Shard(rank, 3), block=64):
            assert np.array_equal(part, labels[start : start + 64])
            assert np.array_equal(squares, distances[start : start + 64])


def test_rows_that_are_not_finite_get_no_label() -> None:
    x = blobs()
    x[321, 4] = np.nan
    with pytest.raises(DataError, match="TEST: row 321 holds NaN or infinity"):
        list(assign_blocks(ArrayRows(x), blobs(n=3), what="TEST"))


# ---------------------------------------------------------------------------------------------------------- k-means++
def drawn_one_by_one(x: np.ndarray, k: int, *, seed: int) -> list[int]:
    """k-means++ by the same clocks, one row after the other, all distances in float64."""
    points, left, weights = x.astype(np.float64), clocks(0, len(x), seed=seed), np.ones(len(x))
    chosen: list[int] = []
    while len(chosen) < k and (weights > 0).any():
        with np.errstate(divide="ignore", invalid="ignore"):
            bounds = np.where(weights > 0, left / weights, np.inf)
        row = int(bounds.argmin())
        left = left - weights * bounds[row]
        distances = ((points - points[row]) ** 2).sum(1)
        weights = np.minimum(weights, distances) if chosen else distances
        chosen.append(row)
    return chosen


def plus_plus(x: np.ndarray, k: int, *, seed: int, **options: Any) -> np.ndarray:
    return plus_plus_rows(Blocks(ArrayRows(x), size=64, device=CPU, **options), k, seed=seed)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(2, 1500), share=st.floats(0.01, 1), candidates=st.sampled_from([3, 1024])
)
def test_plus_plus_draws_what_one_by_one_draws(seed: int, n: int, share: float, candidates: int) -> None:
    from vissl_like.analysis import seeding

    before, seeding._CANDIDATES = seeding._CANDIDATES, candidates
    try:
        x, k = blobs(n=n, dim=4, centres=20, seed=seed), max(1, min(int(share * n), 60))
        assert plus_plus(x, k, seed=seed).tolist() == drawn_one_by_one(x, k, seed=seed)
    finally:
        seeding._CANDIDATES = before


def test_plus_plus_takes_no_row_twice_and_equal_rows_only_if_it_must() -> None:
    x = np.repeat(blobs(n=30, dim=8), 20, axis=0)
    chosen = plus_plus(x, 30, seed=1)
    assert len(np.unique(x[chosen], axis=0)) == 30
    more = plus_plus(x, 45, seed=1)
    assert more[:30].tolist() == chosen.tolist() and len(set(more)) == 45


def test_plus_plus_draws_with_the_squared_distance() -> None:
    x = np.array([[0.0], [1.0], [3.0]], dtype=np.float32)  # after 0: 1 with 1/10, 2 with 9/10
    drawn = [plus_plus(x, 2, seed=seed).tolist() for seed in range(600)]
    first = np.bincount([rows[0] for rows in drawn], minlength=3) / 600
    np.testing.assert_allclose(first, 1 / 3, atol=0.08)
    after_0 = [rows[1] for rows in drawn if rows[0] == 0]
    assert np.mean([row == 2 for row in after_0]) == pytest.approx(0.9, abs=0.08)


def test_clocks_belong_to_rows() -> None:
    assert np.array_equal(clocks(0, 100, seed=5)[37:90], clocks(37, 90, seed=5))
    assert not np.array_equal(clocks(0, 10, seed=5), clocks(0, 10, seed=5, attempt=1))
    assert clocks(0, 100_000, seed=1).mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_plus_plus_starts_better_than_random(backend: str) -> None:
    x = ArrayRows(blobs(n=2000, centres=40, spread=0.05))
    first = {
        init: np.mean(
            [kmeans(x, k=40, iterations=1, seed=s, init=init, backend=backend).objective[0] for s in range(3)]  # type: ignore[arg-type]
        )
        for init in ("random", "kmeans++")
    }
    assert first["kmeans++"] < 0.5 * first["random"]


# ---------------------------------------------------------------------------------------------------------- precision
def test_precision_that_is_good_enough_is_used_and_else_given_up(caplog: pytest.LogCaptureFixture) -> None:
    easy, hard = blobs(n=600), blobs(n=600, spread=0.001) + 100  # far from the origin digits are lost
    run: dict[str, Any] = {"k": 6, "iterations": 6, "seed": 1, "precision": "bfloat16"}
    found = kmeans(ArrayRows(easy), **run)
    assert "float32" not in caplog.text
    exact = kmeans(ArrayRows(easy), **{**run, "precision": "float32"})
    np.testing.assert_allclose(found.objective[-1], exact.objective[-1], rtol=0.01)
    kmeans(ArrayRows(hard), **run)
    assert "PRECISION=bfloat16 makes the clusters worse; going on in float32" in caplog.text


def test_loss_of_labels() -> None:
    table = Table(torch.tensor([[0.0], [10.0]]))
    rows = torch.tensor([[1.0], [9.0]])
    assert table.loss_of(torch.tensor([0, 1]), rows) == 0
    assert table.loss_of(torch.tensor([0, 0]), rows) == pytest.approx(82 / 2 - 1)


# ---------------------------------------------------------------------------------------------------------- refusals
def test_subsample_is_seeded_ordered_and_sized(caplog: pytest.LogCaptureFixture) -> None:
    x = ArrayRows(blobs(n=600))
    caplog.set_level(logging.INFO)
    results = [
        kmeans(x, k=4, iterations=5, seed=seed, max_points_per_centroid=20, backend="torch") for seed in (1, 1, 2)
    ]
    assert [result.num_points for result in results] == [80, 80, 80]
    assert np.array_equal(results[0].centroids, results[1].centroids)
    assert not np.array_equal(results[0].centroids, results[2].centroids)
    assert "trains on 80 of 600 rows" in caplog.text
    assert kmeans(x, k=4, iterations=2, max_points_per_centroid=0, backend="torch").num_points == 600


def test_few_points_per_centroid_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    kmeans(ArrayRows(blobs(n=100)), k=5, iterations=2, backend="torch")
    assert "fewer than 39 rows per cluster" in caplog.text


def test_more_clusters_than_rows_is_an_error() -> None:
    with pytest.raises(DataError, match=r"NUM_CLUSTERS=20: features have only 10 rows\. Use at most 10"):
        kmeans(ArrayRows(blobs(n=10)), k=20)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_an_error_that_names_the_row(bad: float) -> None:
    x = blobs()
    x[321, 4] = bad
    with pytest.raises(DataError, match="row 321 holds NaN or infinity"):
        kmeans(ArrayRows(x), k=3, max_points_per_centroid=0)
    for backend in ("torch", "faiss"):
        part = SelectedRows(MappedRows(ArrayRows(x), np.copy), np.arange(300, 500))
        with pytest.raises(DataError, match="row 321 holds NaN or infinity"):
            kmeans(part, k=3, backend=backend, max_points_per_centroid=0)
    messages = on_shards(lambda shard: _message_of(lambda: kmeans(ArrayRows(x), k=5, shard=shard, block=64)), size=3)
    assert len(set(messages)) == 1 and "row 321" in messages[0]  # all stop, not only the one that reads this row


def _message_of(work: Any) -> str:
    with pytest.raises(DataError) as caught:
        work()
    return str(caught.value)


def test_faiss_that_is_missing_or_empty(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import sys
    from types import ModuleType

    monkeypatch.setitem(sys.modules, "faiss", ModuleType("faiss"))
    with pytest.raises(ConfigError, match="pip install faiss-cpu"):
        module.pick_backend("faiss")
    assert "overwrote each other" in caplog.text
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match="pip install faiss-cpu"):
        module.pick_backend("faiss")
    assert module.pick_backend("auto") == "torch"


def test_initial_rows_are_different_and_seeded() -> None:
    rows = initial_rows(50, 50, seed=4)
    assert sorted(rows) == list(range(50))
    assert not np.array_equal(rows, initial_rows(50, 50, seed=4, attempt=1))
    assert np.array_equal(initial_rows(1000, 10, seed=4), initial_rows(1000, 10, seed=4))


def test_block_rows_keep_scores_small() -> None:
    assert block_rows(1000, 256, device=CPU) == 2048
    sizes = [(k, dim) for k in (1, 100, 16000, 150_000) for dim in (2, 256, 2048)]
    assert all(4 * block_rows(k, dim, device=CPU) * (k + 2 * dim) <= 48 << 20 for k, dim in sizes)
