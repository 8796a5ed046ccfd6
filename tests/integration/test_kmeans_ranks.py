"""Clustering of features that fill many blocks, by real processes: the same files at 1, 2 and 3 of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.test_engines import run_ranks
from vissl_like.analysis.features import FeatureWriter, Subject
from vissl_like.config.schema import Job
from vissl_like.registry import resolve

ROWS, DIM = 9000, 16
#: What is run; each reads the same features.
KINDS: dict[str, dict[str, Any]] = {
    "random": {},
    "plus_plus": {"INIT": "kmeans++", "NUM_REDO": 2, "SPHERICAL": True, "CACHE_MB": 0},
    "sampled": {"MAX_POINTS_PER_CENTROID": 300, "NORMALIZE": False},
}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float16 rows in several shards, written as an extraction does."""
    folder = tmp_path_factory.mktemp("features")
    draw = np.random.default_rng(0)
    x = draw.normal(size=(ROWS, DIM)) + 2 * draw.normal(size=(30, DIM))[draw.integers(0, 30, ROWS)]
    paths = np.array([f"{row:05d}.png" for row in range(ROWS)])
    stamps = np.zeros(ROWS, dtype=np.int64)
    subject = Subject("TRAIN", paths, stamps, np.arange(ROWS) % 7, str(folder), "toy", "f", None, {"weights": "none"})
    FeatureWriter.prepare(
        folder / "TRAIN", subject, layers={"trunk": (DIM,)}, dtype="float16", shard_rows=3500, block_rows=1000
    )
    writer = FeatureWriter(folder / "TRAIN")
    for block in writer.pending():
        writer.write(block, {"trunk": x[slice(*writer.blocks[block])]})
    writer.close()
    FeatureWriter.finish(folder / "TRAIN")
    return folder


def jobs(features: Path, folder: Path) -> list[tuple[Job, Path]]:
    found = []
    for name, options in KINDS.items():
        (folder / name).mkdir(parents=True)
        cluster = {"NUM_CLUSTERS": 20, "NUM_ITER": 6, "FEATURES": {"PATH": str(features)}, **options}
        config = {"CLUSTERFIT": cluster, "RUN": {"PROGRESS": "none"}, "MACHINE": {"NUM_THREADS": 2}}
        found.append((Job.model_validate({"engine_name": "cluster_features", "config": config}), folder / name))
    return found


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if (file.is_file() and file.suffix in (".npy", ".npz", ".part")) or file.name == "manifest.json"
    }


@pytest.fixture(scope="module")
def alone(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for job, run_dir in jobs(features, folder):
        results = resolve("engine", job.engine_name, key="engine_name")(job, run_dir)
        (run_dir / "results.json").write_text(json.dumps(results))
    return folder


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_change_no_bit(features: Path, alone: Path, tmp_path: Path, ranks: int) -> None:
    todo = jobs(features, tmp_path)
    assert run_ranks(todo, tmp_path, ranks=ranks) == [0] * ranks
    for name in KINDS:
        assert files_of(tmp_path / name) == files_of(alone / name)
        ours, theirs = (json.loads((base / name / "results.json").read_text()) for base in (tmp_path, alone))
        assert ours == theirs


def test_labels_and_distances_are_those_of_the_centroids(features: Path, alone: Path) -> None:
    folder = alone / "sampled" / "clusters"
    prefix = f"toy_train_trunk_N20_D{DIM}"
    labels, distances, centroids = (
        np.load(folder / f"{prefix}_{name}.npy") for name in ("labels", "distances", "centroids")
    )
    x = np.concatenate([np.load(file) for file in sorted((features / "TRAIN" / "trunk").glob("shard_*.npy"))])
    squared = ((x[:, None].astype(np.float64) - centroids) ** 2).sum(2)
    assert labels.dtype == np.int64 and labels.shape == (ROWS,) and distances.dtype == np.float32
    assert (labels == squared.argmin(1)).mean() > 0.999
    np.testing.assert_allclose(distances, squared.min(1), rtol=1e-4)
    assert not list(folder.glob("*.part"))
    described = json.loads((folder / "kmeans.json").read_text())
    assert described["rows_trained_on"] == 6000 and sum(described["sizes"]) == ROWS
