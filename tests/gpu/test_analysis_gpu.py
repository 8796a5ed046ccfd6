"""K-means, nearest neighbours and extraction on a GPU: reproducible there, and as on the CPU up to rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vissl_like.analysis.blocks import Blocks
from vissl_like.analysis.evaluators import knn_ranking
from vissl_like.analysis.extraction import Loading, extract
from vissl_like.analysis.features import FeatureStore
from vissl_like.analysis.kmeans import kmeans, pick_backend
from vissl_like.analysis.nearest import assign, assign_blocks
from vissl_like.analysis.rows import ArrayRows, normalise
from vissl_like.analysis.seeding import plus_plus_rows
from vissl_like.config.schema import Job
from vissl_like.core import distributed, rng
from vissl_like.data.dataset import build_dataset
from vissl_like.models.zoo import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda", 0)


def rows(n: int, seed: int) -> np.ndarray:
    means = np.random.default_rng(7).normal(size=(20, 32))
    noise = np.random.default_rng(seed).normal(size=(n, 32))
    return normalise((means[np.arange(n) % 20] + 0.5 * noise).astype(np.float32))


def test_kmeans_is_reproducible_and_as_good_as_on_the_cpu() -> None:
    x = ArrayRows(rows(20_000, 0))
    run = {"k": 50, "iterations": 15, "seed": 1, "max_points_per_centroid": 0}
    first, second = (kmeans(x, backend="auto", device=GPU, **run) for _ in range(2))  # type: ignore[arg-type]
    on_cpu = kmeans(x, backend="torch", **run)  # type: ignore[arg-type]
    assert first.backend == "torch" == pick_backend("auto")
    assert np.array_equal(first.centroids, second.centroids)
    np.testing.assert_allclose(first.objective[-1], on_cpu.objective[-1], rtol=1e-3)
    labels, distances = assign(x, on_cpu.centroids, device=GPU)
    expected, expected_distances = assign(x, on_cpu.centroids)
    assert (labels == expected).mean() > 0.999
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-3, atol=1e-5)


def test_assignment_keeps_no_rows() -> None:
    x, centroids = ArrayRows(rows(200_000, 0)), rows(50, 1)  # 26 MB
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    assert sum(len(labels) for _, labels, _ in assign_blocks(x, centroids, device=GPU, block=1024)) == len(x)
    assert torch.cuda.max_memory_allocated(GPU) - before < 10e6


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_fast_kmeans_is_as_good(precision: str) -> None:
    x = ArrayRows(rows(20_000, 0))
    run = {"k": 50, "iterations": 10, "seed": 1, "max_points_per_centroid": 0, "device": GPU}
    fast, exact = kmeans(x, precision=precision, **run), kmeans(x, **run)  # type: ignore[arg-type]
    np.testing.assert_allclose(fast.objective[-1], exact.objective[-1], rtol=2e-2)  # another local optimum, perhaps
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"


def test_sums_on_a_gpu_are_exact_whatever_the_blocks() -> None:
    x = rows(9_000, 2)
    first = kmeans(ArrayRows(x), k=7, iterations=1, device=GPU, block=64, max_points_per_centroid=0)
    again = kmeans(ArrayRows(x), k=7, iterations=1, device=GPU, block=4096, max_points_per_centroid=0)
    # One iteration from the same rows: the same labels but for ties within rounding, and so nearly the same sums.
    np.testing.assert_allclose(first.centroids, again.centroids, atol=1e-3)
    np.testing.assert_allclose(first.objective, again.objective, rtol=1e-5)


def test_plus_plus_draws_the_same_rows_as_on_the_cpu() -> None:
    x = ArrayRows(rows(5_000, 3))
    drawn = [plus_plus_rows(Blocks(x, size=1024, device=device), 40, seed=5) for device in (GPU, torch.device("cpu"))]
    assert np.array_equal(*drawn)


def test_knn_agrees_with_the_cpu() -> None:
    bank, queries = ArrayRows(rows(40_000, 0)), ArrayRows(rows(700, 1))
    run = {"topk": [5, 100], "sigma": 0.1, "num_classes": 20}
    labels = np.arange(40_000) % 20
    on_gpu, on_cpu = (knn_ranking(bank, labels, queries, device=device, **run) for device in (GPU, None))  # type: ignore[arg-type]
    for k in (5, 100):
        assert (on_gpu[k][:, 0] == on_cpu[k][:, 0]).mean() > 0.995


def test_extraction_agrees_with_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = {
        "DATA_SOURCES": ["synthetic"],
        "NUM_SYNTHETIC": 50,
        "BATCHSIZE_PER_REPLICA": 8,
        "TRANSFORMS": [{"name": "ToTensor"}],
    }
    config = Job.model_validate(
        {"config": {"DATA": {"TRAIN": split}, "MODEL": {"TRUNK": {"NAME": "resnet_small"}}}}
    ).config
    rng.seed_model(0)
    model = build_model(config.MODEL, num_classes=None, with_heads=False)
    found = []
    for device in (torch.device("cpu"), GPU):
        world = distributed.World(rank=0, size=1, local_rank=0, local_size=1, device=device)
        monkeypatch.setattr(distributed, "_world", world)
        dataset = build_dataset(config.DATA, "TRAIN", seed=0)
        folder = tmp_path / device.type
        extract(
            model.to(device),
            dataset,
            folder,
            options=config.EXTRACT_FEATURES,
            batch=8,
            identity={},
            loading=Loading(threads=2),
        )
        found.append(FeatureStore.open(folder, "TRAIN").read(0, 50))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-2, atol=1e-3)


def test_the_benchmark_of_extraction_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
    import extract as benchmark

    assert benchmark.main(["--tiny"]) == 0
    assert capsys.readouterr().out.count(" images/s") == 3
