"""K-means by our own Lloyd iterations on torch tensors or by faiss.

Letters: n rows, D dimensions, K clusters. Both backends start from the same rows for the same seed and read the same
sample, so they can be compared. Our own runs on CPU or GPU, streams its rows, is shared by any number of processes, and
its bits depend on no number of them (lloyd.py); faiss needs the sample in the memory of one process.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from vissl_like.analysis.blocks import ALONE, Blocks, Shard, block_rows, not_finite_message, threads_for
from vissl_like.analysis.lloyd import Lloyd
from vissl_like.analysis.nearest import Precision, assign
from vissl_like.analysis.rows import ArrayRows, Rows, SelectedRows, not_finite, original_row
from vissl_like.analysis.seeding import faiss_seed, initial_rows, plus_plus_rows
from vissl_like.config.plan import usable_cores
from vissl_like.core import distributed, rng
from vissl_like.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

#: How the first centroids are chosen.
Init = Literal["random", "kmeans++"]

#: Fewer rows per cluster than this give poor centroids.
MIN_POINTS_PER_CENTROID = 39


@dataclass(frozen=True)
class KMeansResult:
    """Centroids and how they were found. `objective` is the sum of squared distances at each iteration."""

    centroids: np.ndarray  # (K, D) float32
    objective: list[float]
    sizes: np.ndarray  # (K,) int64, rows of the training sample per cluster
    num_empty: int  # clusters without a row of the sample at the end
    num_splits: int  # empty clusters that were given half of the largest one, over all iterations
    backend: str
    num_points: int  # rows of the training sample
    seconds: float


def faiss_module() -> ModuleType | None:
    """faiss if it works here, else None. The only place that imports it.

    An installation over another (faiss-cpu and faiss-gpu share a folder) can leave an empty package behind, so what was
    imported is looked at.
    """
    try:
        import faiss
    except ImportError:
        return None
    if not hasattr(faiss, "Kmeans") or not hasattr(faiss, "knn"):
        logger.warning(
            "faiss is installed but empty: faiss-cpu and faiss-gpu overwrote each other. Cure: "
            "pip uninstall faiss-cpu faiss-gpu, then install one of them. Using torch."
        )
        return None
    return faiss  # type: ignore[no-any-return]


def pick_backend(name: str) -> str:
    """`torch` or `faiss` for auto, torch or faiss. Auto is torch: its result depends on nothing that is installed."""
    if name == "faiss" and faiss_module() is None:
        raise ConfigError(
            "config.CLUSTERFIT.CLUSTER_BACKEND='faiss': faiss cannot be used here. pip install faiss-cpu, or use torch."
        )
    return "torch" if name == "auto" else name


@dataclass(frozen=True)
class Plan:
    """How to cluster. `threads` is at least 1; `block`: rows per block, chosen by K and D if None."""

    k: int
    iterations: int
    seed: int
    redo: int
    spherical: bool
    init: Init
    precision: Precision
    device: torch.device
    threads: int
    shard: Shard
    cache_bytes: int
    block: int | None
    what: str

    def blocks(self, rows: Rows) -> Blocks:
        """The rows cut for Lloyd's iterations."""
        size = self.block or block_rows(self.k, rows.dim, device=self.device)
        return Blocks(
            rows,
            size=size,
            device=self.device,
            threads=threads_for(self.threads, k=self.k, dim=rows.dim, block=size),
            shard=self.shard,
            cache_bytes=self.cache_bytes,
        )

    def first_rows(self, blocks: Blocks, attempt: int) -> np.ndarray:
        """The rows (K,) that an attempt starts from."""
        if self.init == "kmeans++":
            return plus_plus_rows(blocks, self.k, seed=self.seed, attempt=attempt)
        return initial_rows(len(blocks.rows), self.k, seed=self.seed, attempt=attempt)


def kmeans(
    rows: Rows,
    *,
    k: int,
    iterations: int = 50,
    seed: int = 0,
    redo: int = 1,
    spherical: bool = False,
    init: Init = "random",
    precision: Precision = "float32",
    backend: str = "auto",
    max_points_per_centroid: int = 256,
    device: torch.device | None = None,
    threads: int = 0,
    shard: Shard = ALONE,
    cache_bytes: int = 0,
    block: int | None = None,
    what: str = "features",
) -> KMeansResult:
    """K centroids of the rows, from at most K * `max_points_per_centroid` of them (0: all).

    `spherical` renormalises centroids to length 1 after each iteration and assigns by the dot product. Of `redo` runs from
    different rows the one with the lowest objective is kept. `threads` 0: all cores. `cache_bytes`: rows kept in host
    memory between the iterations; the others are read again. `shard` and `precision` only with torch.
    """
    started = time.perf_counter()
    chosen = pick_backend(backend)
    if k > len(rows):
        raise DataError(
            f"config.CLUSTERFIT.NUM_CLUSTERS={k}: {what} have only {len(rows)} rows. "
            f"Use at most {len(rows)} clusters, or more images."
        )
    if len(rows) < k * MIN_POINTS_PER_CENTROID and distributed.is_main():
        logger.warning(
            "%d rows for %d clusters: fewer than %d rows per cluster give poor centroids",
            len(rows), k, MIN_POINTS_PER_CENTROID,
        )  # fmt: skip
    plan = Plan(
        k=k, iterations=iterations, seed=seed, redo=redo, spherical=spherical, init=init, precision=precision,
        device=device or torch.device("cpu"), threads=threads or usable_cores(), shard=shard, cache_bytes=cache_bytes,
        block=block, what=what,
    )  # fmt: skip
    sample = _sample(rows, k=k, seed=seed, max_points_per_centroid=max_points_per_centroid)
    result = (_by_faiss if chosen == "faiss" else _by_torch)(sample, plan)
    return replace(result, seconds=time.perf_counter() - started)


def _sample(rows: Rows, *, k: int, seed: int, max_points_per_centroid: int) -> Rows:
    """The rows that are trained on, in ascending order so that files are read forwards."""
    limit = k * max_points_per_centroid
    if not limit or len(rows) <= limit:
        return rows
    logger.info("k-means trains on %d of %d rows (%d per cluster)", limit, len(rows), max_points_per_centroid)
    return SelectedRows(rows, rng.sample(seed, 0, len(rows), count=limit))


# ----------------------------------------------------------------------------------------------------------------- torch
def _by_torch(rows: Rows, plan: Plan) -> KMeansResult:
    blocks = plan.blocks(rows)
    magnitude = blocks.largest_magnitude(what=plan.what)
    lloyd = Lloyd(blocks, k=plan.k, magnitude=magnitude, spherical=plan.spherical, precision=plan.precision)
    runs = (lloyd.run(plan.first_rows(blocks, attempt), iterations=plan.iterations) for attempt in range(plan.redo))
    best = min(runs, key=lambda run: run.objective[-1])
    empty = int((best.sizes == 0).sum())
    return KMeansResult(best.centroids, best.objective, best.sizes, empty, best.num_splits, "torch", len(rows), 0.0)


# ----------------------------------------------------------------------------------------------------------------- faiss
def _by_faiss(rows: Rows, plan: Plan) -> KMeansResult:
    """faiss.Kmeans on the whole sample in memory; in one process."""
    faiss = faiss_module()
    assert faiss is not None
    points = rows.read(0, len(rows))
    if not np.isfinite(points).all():
        raise DataError(not_finite_message(plan.what, original_row(rows, not_finite(points, start=0))))
    on_gpu = plan.device.type == "cuda" and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(plan.threads)
    try:
        # One run per attempt instead of nredo, which mixes the objectives of several runs.
        runs = [_faiss_run(faiss, points, plan, attempt=attempt, gpu=on_gpu) for attempt in range(plan.redo)]
    finally:
        faiss.omp_set_num_threads(before)
    found, objective = min(runs, key=lambda run: run[1][-1])
    labels, _ = assign(ArrayRows(points), found.centroids, threads=plan.threads)
    sizes = np.bincount(labels, minlength=plan.k)
    splits = sum(int(step["nsplit"]) for step in found.iteration_stats)
    return KMeansResult(
        np.array(found.centroids, dtype=np.float32), objective, sizes, int((sizes == 0).sum()), splits,
        "faiss-gpu" if on_gpu else "faiss", len(rows), 0.0,
    )  # fmt: skip


def _faiss_run(
    faiss: ModuleType, points: np.ndarray, plan: Plan, *, attempt: int, gpu: bool
) -> tuple[Any, list[float]]:
    """One run of faiss.Kmeans and its objective at each iteration."""
    found = faiss.Kmeans(
        points.shape[1], plan.k, niter=plan.iterations, nredo=1, seed=faiss_seed(plan.seed, attempt),
        spherical=plan.spherical, gpu=gpu, max_points_per_centroid=len(points), min_points_per_centroid=1,
    )  # fmt: skip
    first = None  # its own choice by its seed, which are our initial_rows()
    if plan.init == "kmeans++":
        first = points[plan.first_rows(replace(plan, shard=ALONE).blocks(ArrayRows(points)), attempt)]
    found.train(points, init_centroids=first)
    objective = np.asarray(found.obj, dtype=np.float64)
    if plan.spherical:  # faiss adds up dot products; the squared distance to a unit centroid is |x|^2 + 1 - 2 x.c
        squares = float(np.einsum("nd,nd->", points, points, dtype=np.float64))
        objective = squares + len(points) - 2 * objective
    return found, [float(value) for value in objective]
