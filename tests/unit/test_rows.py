"""Rows of arrays and files, standardisation and PCA: what clustering and evaluation read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from vissl_like.analysis.cluster_report import project
from vissl_like.analysis.npy_file import NpyFile
from vissl_like.analysis.pca import fit_pca, standardised
from vissl_like.analysis.rows import ArrayRows, MappedRows, SelectedRows, each, normalised, one_thread, share, spans
from vissl_like.errors import ConfigError, DataError


def blobs(n: int = 900, dim: int = 12, centres: int = 6, seed: int = 0, spread: float = 0.2) -> np.ndarray:
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(centres, dim))
    return (means[np.arange(n) % centres] + spread * generator.normal(size=(n, dim))).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("kind", ["float16", "float32", "int64"])
def test_rows_of_a_file(tmp_path: Path, kind: str) -> None:
    array = (100 * blobs(n=40)).astype(kind).reshape(40, 3, 4)
    np.save(tmp_path / "a.npy", array)
    file = NpyFile(tmp_path / "a.npy")
    assert len(file) == 40 and file.shape == (40, 3, 4) and file.dtype == array.dtype
    assert np.array_equal(file.read(3, 17), array[3:17]) and file.read(5, 5).shape == (0, 3, 4)
    for chosen in ([], [0], [39], [1, 2, 3, 9, 11, 12, 39]):
        indices = np.array(chosen, dtype=np.int64)
        assert np.array_equal(file.take(indices), array[indices])
    made = NpyFile.create(tmp_path / "b.npy", array.shape, array.dtype)
    assert not np.load(tmp_path / "b.npy").any()
    made.write(20, array[20:])
    made.write(0, array[:20])
    assert (tmp_path / "b.npy").read_bytes() == (tmp_path / "a.npy").read_bytes()


def test_a_file_that_was_cut_short_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", blobs(n=40))
    file = NpyFile(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-10])
    assert file.read(0, 39).shape == (39, 12)
    with pytest.raises(DataError, match=r"a\.npy: ends before row 39; it was cut short"):
        file.read(30, 40)
    (tmp_path / "a.npy").unlink()
    with pytest.raises(DataError, match=r"a\.npy: cannot be read"):
        file.take(np.array([1]))
    np.save(tmp_path / "a.npy", blobs(n=40))
    with pytest.raises(DataError, match=r"a\.npy: cannot be read or written"):
        NpyFile.create(tmp_path / "a.npy" / "b.npy", (3,), np.dtype("int64"))


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


def test_projection_for_the_report_is_that_of_the_pca() -> None:
    x = blobs(n=400, dim=40, spread=0.3)
    np.testing.assert_allclose(project(x), fit_pca(ArrayRows(x), 2)(x), atol=2e-3)
    line = np.arange(9, dtype=np.float32)[:, None] * np.array([[3, 4, 0]], dtype=np.float32)
    np.testing.assert_allclose(project(line), np.stack([5 * np.arange(-4, 5), np.zeros(9)], axis=1), atol=1e-4)
    assert not project(np.ones((1, 5), dtype=np.float32)).any() and project(line[:, :1]).shape == (9, 2)


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


def test_products_of_numpy_run_in_one_thread_too_and_in_many_again_afterwards() -> None:
    def blas_threads(item: int = 0) -> int:
        (library,) = (one for one in threadpool_info() if one["user_api"] == "blas" and "numpy" in one["filepath"])
        return int(library["num_threads"])

    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        with one_thread():
            assert blas_threads() == 1
        assert set(each(blas_threads, range(6), threads=3)) == set(each(blas_threads, range(6), threads=1)) == {1}
        assert blas_threads() == before == 2
