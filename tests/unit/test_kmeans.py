"""K-means, streaming assignment, PCA: exactness at any number of threads, shards and blocks, and clear refusals."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from vissl_like.analysis import kmeans as module
from vissl_like.analysis.kmeans import Shard, assign, block_rows, initial_rows, kmeans
from vissl_like.analysis.pca import fit_pca, standardised
from vissl_like.analysis.rows import ArrayRows, MappedRows, SelectedRows, each, normalise, normalised, share, spans
from vissl_like.errors import ConfigError, DataError


def blobs(n: int = 900, dim: int = 12, centres: int = 6, seed: int = 0, spread: float = 0.2) -> np.ndarray:
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(centres, dim))
    return (means[np.arange(n) % centres] + spread * generator.normal(size=(n, dim))).astype(np.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "block_rows", lambda k: 64)


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


def test_result_is_the_same_bits_for_threads_blocks_and_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    x = ArrayRows(blobs(n=700, spread=1.0))
    run = {"k": 9, "iterations": 15, "seed": 2, "backend": "torch"}
    expected = kmeans(x, threads=1, **run).centroids
    assert np.array_equal(expected, kmeans(x, threads=3, **run).centroids)
    assert np.array_equal(expected, _sharded(x, size=3, **run))
    monkeypatch.setattr(module, "_HOST_CACHE_BYTES", 0)
    assert np.array_equal(expected, kmeans(x, threads=2, **run).centroids)
    monkeypatch.setattr(module, "block_rows", lambda k: 100)
    assert np.array_equal(expected, kmeans(x, threads=1, **run).centroids)


def _sharded(rows: ArrayRows, *, size: int, **run: object) -> np.ndarray:
    """Runs `size` shards in threads that add up each other's tensors at a barrier, as processes would."""
    import threading

    barrier, box, centroids = threading.Barrier(size), {}, {}

    def shard(rank: int) -> None:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            box[rank] = tensor
            barrier.wait()
            total = sum(box[other] for other in range(size))
            barrier.wait()
            return total

        centroids[rank] = kmeans(rows, threads=1, shard=Shard(rank, size, reduce), **run).centroids  # type: ignore[arg-type]

    workers = [threading.Thread(target=shard, args=(rank,)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert all(np.array_equal(centroids[0], centroids[rank]) for rank in range(size))
    return centroids[0]


def test_empty_clusters_get_half_of_the_largest() -> None:
    x = np.repeat(np.array([[0.0, 0.0], [9.0, 9.0]], dtype=np.float32), 50, axis=0)
    x[:3] += np.float32(0.5)  # so that there is something to split
    result = kmeans(ArrayRows(x), k=4, iterations=10, seed=0, backend="torch")
    assert result.num_splits > 0
    assert np.isfinite(result.centroids).all()


def test_assignment_matches_brute_force_and_any_part() -> None:
    x, centroids = blobs(n=500), blobs(n=40, seed=3)
    labels, distances = assign(ArrayRows(x), centroids, threads=2)
    squared = ((x[:, None].astype(np.float64) - centroids) ** 2).sum(2)
    assert np.array_equal(labels, squared.argmin(1)) and labels.dtype == np.int64
    np.testing.assert_allclose(distances, squared.min(1), rtol=1e-5)
    part = assign(ArrayRows(x), centroids, part=(64, 500))
    assert np.array_equal(part[0], labels[64:]) and np.array_equal(part[1], distances[64:])


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
        kmeans(ArrayRows(x), k=3)


def test_faiss_that_is_missing_or_empty(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import sys
    from types import ModuleType

    monkeypatch.setitem(sys.modules, "faiss", ModuleType("faiss"))
    assert module.pick_backend("auto", device=torch.device("cpu")) == "torch"
    assert "overwrote each other" in caplog.text
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert module.pick_backend("auto", device=torch.device("cpu")) == "torch"
    with pytest.raises(ConfigError, match="pip install faiss-cpu"):
        module.pick_backend("faiss", device=torch.device("cpu"))


def test_initial_rows_are_different_and_seeded() -> None:
    rows = initial_rows(50, 50, seed=4)
    assert sorted(rows) == list(range(50))
    assert not np.array_equal(rows, initial_rows(50, 50, seed=4, attempt=1))
    assert np.array_equal(initial_rows(1000, 10, seed=4), initial_rows(1000, 10, seed=4))


def test_block_rows_keeps_scores_small() -> None:
    module_block_rows = block_rows  # the real one: the fixture replaces only the module's
    assert module_block_rows(1000) == 2048
    assert all(4 * module_block_rows(k) * k <= 1 << 27 for k in (1, 100, 16000, 500_000))


# ------------------------------------------------------------------------------------------------------- rows and PCA
def test_views_of_rows() -> None:
    x = blobs(n=50)
    rows = normalised(SelectedRows(ArrayRows(x), np.array([3, 7, 8, 30])))
    expected = x[[3, 7, 8, 30]] / (np.linalg.norm(x[[3, 7, 8, 30]], axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rows.read(0, 4), expected, rtol=1e-6)
    np.testing.assert_array_equal(rows.take(np.array([1, 3])), rows.read(0, 4)[[1, 3]])
    assert len(rows) == 4 and rows.dim == 12
    half = MappedRows(ArrayRows(x), lambda block: block[:, :6], dim=6)
    assert half.dim == 6 and half.read(2, 4).shape == (2, 6)


def test_spans_and_shares_cover_everything_once() -> None:
    assert spans(10, 4) == [(0, 4), (4, 8), (8, 10)] and spans(0, 4) == []
    for count in (0, 1, 7, 12):
        for size in (1, 2, 5):
            parts = [share(count, rank=rank, size=size) for rank in range(size)]
            assert [i for start, stop in parts for i in range(start, stop)] == list(range(count))


def test_each_keeps_order_and_restores_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = list(each(lambda i: (i, torch.get_num_threads()), range(20), threads=3))
        assert seen == [(i, 1) for i in range(20)]
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            list(each(lambda i: 1 // i, [2, 1, 0, 5], threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_pca_matches_the_singular_value_decomposition(threads: int) -> None:
    x = blobs(n=5000, spread=0.7).astype(np.float32)
    pca = fit_pca(ArrayRows(x), 4, threads=threads)
    centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs((pca.components * directions[:4]).sum(1)), 1, atol=1e-9)
    np.testing.assert_allclose(pca.variance, singular[:4] ** 2 / 4999, rtol=1e-9)
    assert pca.explained == pytest.approx((singular[:4] ** 2).sum() / (singular**2).sum())
    assert (pca.components[np.arange(4), np.abs(pca.components).argmax(1)] > 0).all()
    np.testing.assert_allclose(pca(x[:7]), centred[:7] @ pca.components.T, atol=1e-5)


def test_pca_bits_do_not_depend_on_threads() -> None:
    x = ArrayRows(blobs(n=9000, dim=16))
    assert np.array_equal(fit_pca(x, 5, threads=1).components, fit_pca(x, 5, threads=4).components)


def test_pca_of_too_many_dimensions_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"DIMENSIONALITY_REDUCTION=13: 900 rows of 12 dimensions"):
        fit_pca(ArrayRows(blobs()), 13, key="CLUSTERFIT.FEATURES.DIMENSIONALITY_REDUCTION")


def test_whitening_does_not_blow_up_directions_without_variance() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 3)) @ rng.normal(size=(3, 12))).astype(np.float16).astype(np.float32)
    x[:, 3:] = x[:, :1]  # three directions at most
    y = fit_pca(ArrayRows(x), 6, whiten=True)(x)
    np.testing.assert_allclose((y[:, :3] ** 2).sum(0), 1, rtol=1e-4)
    assert (y[:, 3:] == 0).all()


def test_standardised_rows() -> None:
    x = blobs(n=5000) * np.linspace(1, 50, 12, dtype=np.float32) + 1000
    x[:, 3] = 7
    rows = standardised(ArrayRows(x), threads=2)
    y = rows.read(0, 5000)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.delete(y.std(0), 3), 1, rtol=1e-4)
    assert (y[:, 3] == 0).all()
