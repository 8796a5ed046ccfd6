"""Clustering against the reference vectors of the original tool (tests/data/clusterfit.*).

The original keeps the duplicates that its sampler pads with, writes labels in the order of its shards and draws its own
subset; we have one row per image in the order of the data, so its rows are compared through its recorded indices.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vissl_like.analysis.kmeans import KMeansResult, kmeans
from vissl_like.analysis.nearest import assign
from vissl_like.analysis.pca import fit_pca
from vissl_like.analysis.rows import ArrayRows, MappedRows, Rows, normalised

DATA = Path(__file__).parents[1] / "data"
ARRAYS = np.load(DATA / "clusterfit.npz", allow_pickle=False)
CASES = {case["name"]: case for case in json.loads((DATA / "clusterfit.json").read_text())["cases"]}
CLUSTERINGS = ["main", "pca", "limit"]


def array(case: str, what: str) -> np.ndarray:
    return ARRAYS[f"{case}__{what}"]


def label_file(case: str, split: str) -> np.ndarray:
    [name] = [
        name for name in ARRAYS.files if name.startswith(f"{case}__file_toy_{split}_") and name.endswith("_labels")
    ]
    return ARRAYS[name]


def run(case: str, backend: str) -> KMeansResult:
    options = CASES[case]
    rows = ArrayRows(array(case, "train_input"))
    return kmeans(rows, k=options["num_clusters"], iterations=options["num_iter"], seed=0, backend=backend)


def prepared(case: str, split: str) -> Rows:
    """The rows as our pipeline hands them to k-means: normalised, then projected by a PCA of the training rows."""
    rows = normalised(ArrayRows(array(case, f"{split}_features")))
    dim = CASES[case]["pca_dim"]
    if not dim:
        return rows
    return MappedRows(rows, fit_pca(normalised(ArrayRows(array(case, "train_features"))), dim, whiten=True), dim=dim)


def in_their_coordinates(case: str, rows: Rows, *, training: bool) -> Rows:
    """The rows with the original's signs and offset.

    Its PCA subtracts the mean twice from the rows it clusters and once from the rows it then assigns, so it assigns shifted
    rows. Ours subtracts it once from both.
    """
    if not CASES[case]["pca_dim"]:
        return rows
    ours, theirs = prepared(case, "train").read(0, 500), array(case, "train_input")
    offset = theirs.mean(0)
    signs = np.sign((ours * (theirs - offset)).sum(0))
    return MappedRows(rows, lambda block: (block * signs + training * offset).astype(np.float32))


@pytest.mark.parametrize("case", CLUSTERINGS)
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_centroids_and_objective(case: str, backend: str) -> None:
    from scipy.optimize import linear_sum_assignment

    result, centroids = run(case, backend), array(case, "centroids")
    distance = ((result.centroids[:, None] - centroids) ** 2).sum(2)
    ours, theirs = linear_sum_assignment(distance)
    np.testing.assert_allclose(result.centroids[ours], centroids[theirs], atol=1e-4)
    np.testing.assert_allclose(result.objective, array(case, "objective"), rtol=1e-4)
    if backend == "faiss":
        import faiss

        if faiss.__version__ == "1.15.1":
            np.testing.assert_array_equal(result.centroids, centroids)


@pytest.mark.parametrize("case", CLUSTERINGS)
def test_normalisation(case: str) -> None:
    expected = array(case, "train_input")
    if CASES[case]["data_limit"] >= 0:
        expected_rows = array(case, "sampled_indices")
        np.testing.assert_allclose(
            normalised(ArrayRows(array(case, "train_features"))).take(expected_rows), expected, atol=1e-6
        )
    elif not CASES[case]["pca_dim"]:
        np.testing.assert_allclose(prepared(case, "train").read(0, len(expected)), expected, atol=1e-6)


def test_pca_features_up_to_sign() -> None:
    rows = in_their_coordinates("pca", prepared("pca", "train"), training=True)
    np.testing.assert_allclose(rows.read(0, 500), array("pca", "train_input"), atol=1e-4)


@pytest.mark.parametrize("case", CLUSTERINGS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_and_distances_of_the_original_files(case: str, split: str) -> None:
    if split == "test" and not CASES[case]["n_test"]:
        pytest.skip("this case has no test split")
    indices = array(case, f"{split}_sample_indices")
    rows = in_their_coordinates(case, prepared(case, split), training=False)
    labels, distances = assign(rows, array(case, "centroids"))
    np.testing.assert_array_equal(labels[indices], label_file(case, split))
    np.testing.assert_allclose(distances[indices], array(case, f"{split}_distances"), rtol=1e-4, atol=1e-5)
    if split == "train":
        sizes = np.bincount(labels[indices], minlength=CASES[case]["num_clusters"])
        np.testing.assert_array_equal(sizes, array(case, "cluster_sizes"))


@pytest.mark.parametrize("case", CLUSTERINGS)
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_whole_chain_agrees_after_matching(case: str, backend: str) -> None:
    """Normalise, project, cluster and assign all by ourselves: at least 99 % of the rows together as in the original."""
    from scipy.optimize import linear_sum_assignment

    options = CASES[case]
    rows = prepared(case, "train")
    trained: Rows = ArrayRows(rows.take(array(case, "sampled_indices"))) if options["data_limit"] >= 0 else rows
    result = kmeans(trained, k=options["num_clusters"], iterations=options["num_iter"], seed=0, backend=backend)
    labels, _ = assign(rows, result.centroids)
    indices = array(case, "train_sample_indices")
    ours, theirs = labels[indices], label_file(case, "train")
    if options["pca_dim"]:  # the clusters that it found, not the shifted rows that it assigned to them
        theirs = assign(ArrayRows(array(case, "train_input")), array(case, "centroids"))[0][indices]
    table = np.zeros((options["num_clusters"], options["num_clusters"]), dtype=int)
    np.add.at(table, (ours, theirs), 1)
    a, b = linear_sum_assignment(-table)
    assert table[a, b].sum() / len(ours) >= 0.99


def test_every_case_is_covered() -> None:
    # shard_order records that the original sorts chunk10 before chunk2; our shards are numbered with five digits.
    assert set(CASES) == {*CLUSTERINGS, "shard_order"}
    ours = [f"shard_{number:05d}.npy" for number in (0, 1, 2, 10)]
    assert sorted(ours) == ours and sorted(CASES["shard_order"]["order"]) == CASES["shard_order"]["order"]
