"""K-means by faiss, or by our own Lloyd iterations on torch tensors, and the assignment of rows to centroids.

Letters: n rows, D dimensions, K clusters. Both backends start from the same rows for the same seed and read the same
sample, so they can be compared. Our own runs on CPU or GPU, streams its rows, and can be shared by several processes:
its sums are integers (fixed point), so they are exact and the result does not depend on how many processes, threads or
blocks added them up.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from vissl_like.analysis.rows import ArrayRows, Rows, SelectedRows, each, largest_magnitude, share, spans
from vissl_like.config.plan import usable_cores
from vissl_like.core import rng
from vissl_like.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

#: Fewer rows per cluster than this give poor centroids.
MIN_POINTS_PER_CENTROID = 39

# The seed that faiss uses when none is given; our seed 0 is this one.
_FAISS_SEED = 1234
_REDO_STRIDE = 15486557
# The two halves of a split cluster are moved apart by this share of their coordinates.
_SPLIT = 1.0 / 1024
_HOST_CACHE_BYTES = 1 << 30


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


@dataclass(frozen=True)
class Shard:
    """Which part of the blocks this process takes, and how its integer sums are added to those of the others."""

    rank: int = 0
    size: int = 1
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda total: total


ALONE = Shard()


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


def pick_backend(name: str, *, device: torch.device) -> str:
    """`faiss` or `torch` for auto, faiss or torch: faiss on a CPU where it works, else torch."""
    if name == "auto":
        return "faiss" if device.type == "cpu" and faiss_module() else "torch"
    if name == "faiss" and faiss_module() is None:
        raise ConfigError(
            "config.CLUSTERFIT.CLUSTER_BACKEND='faiss': faiss cannot be used here. pip install faiss-cpu, or use torch."
        )
    return name


def kmeans(
    rows: Rows,
    *,
    k: int,
    iterations: int = 50,
    seed: int = 0,
    redo: int = 1,
    spherical: bool = False,
    backend: str = "auto",
    max_points_per_centroid: int = 256,
    device: torch.device | None = None,
    threads: int = 0,
    shard: Shard = ALONE,
    what: str = "features",
) -> KMeansResult:
    """K centroids of the rows, from at most K * `max_points_per_centroid` of them (0: all).

    `spherical` renormalises centroids to length 1 after each iteration and assigns by the dot product. Of `redo` runs from
    different rows the one with the lowest objective is kept. `threads` 0: all cores. `shard` only with torch.
    """
    started = time.perf_counter()
    device = device or torch.device("cpu")
    threads = threads or usable_cores()
    chosen = pick_backend(backend, device=device)
    if k > len(rows):
        raise DataError(
            f"config.CLUSTERFIT.NUM_CLUSTERS={k}: {what} have only {len(rows)} rows. "
            f"Use at most {len(rows)} clusters, or more images."
        )
    if len(rows) < k * MIN_POINTS_PER_CENTROID:
        logger.warning(
            "%d rows for %d clusters: fewer than %d rows per cluster give poor centroids",
            len(rows), k, MIN_POINTS_PER_CENTROID,
        )  # fmt: skip
    magnitude = largest_magnitude(rows, what=what, threads=threads)
    sample = _sample(rows, k=k, seed=seed, max_points_per_centroid=max_points_per_centroid)
    run = _by_faiss if chosen == "faiss" else _by_torch
    result = run(
        sample, k=k, iterations=iterations, seed=seed, redo=redo, spherical=spherical, magnitude=magnitude,
        device=device, threads=threads, shard=shard,
    )  # fmt: skip
    return _timed(result, time.perf_counter() - started)


def _timed(result: KMeansResult, seconds: float) -> KMeansResult:
    return KMeansResult(**{**result.__dict__, "seconds": seconds})


def _sample(rows: Rows, *, k: int, seed: int, max_points_per_centroid: int) -> Rows:
    """The rows that are trained on, in ascending order so that files are read forwards."""
    limit = k * max_points_per_centroid
    if not limit or len(rows) <= limit:
        return rows
    logger.info("k-means trains on %d of %d rows (%d per cluster)", limit, len(rows), max_points_per_centroid)
    return SelectedRows(rows, np.sort(rng.permutation(seed, 0, len(rows))[:limit]))


def initial_rows(n: int, k: int, *, seed: int, attempt: int = 0) -> np.ndarray:
    """K different rows of n: those that faiss starts from for its seed 1234 + `seed` (Mersenne twister, Fisher-Yates)."""
    generator = np.random.MT19937()
    generator._legacy_seeding(_faiss_seed(seed, attempt) + 1)
    moved: dict[int, int] = {}
    chosen = np.empty(k, dtype=np.int64)
    for i in range(k):
        j = i + int(generator.random_raw()) % (n - i)
        chosen[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    return chosen


def _faiss_seed(seed: int, attempt: int) -> int:
    """Fits a C int; `attempt` counts as faiss counts its own repetitions."""
    return (_FAISS_SEED + seed + attempt * _REDO_STRIDE) % ((1 << 31) - 2)


def _by_faiss(
    rows: Rows, *, k: int, iterations: int, seed: int, redo: int, spherical: bool, magnitude: float,
    device: torch.device, threads: int, shard: Shard,
) -> KMeansResult:  # fmt: skip
    """faiss.Kmeans on the whole sample in memory; in one process."""
    faiss = faiss_module()
    assert faiss is not None
    points = rows.read(0, len(rows))
    on_gpu = device.type == "cuda" and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        # One run per attempt instead of nredo, which mixes the objectives of several runs.
        runs = [
            _faiss_run(faiss, points, k=k, iterations=iterations, seed=seed, attempt=i, spherical=spherical, gpu=on_gpu)
            for i in range(redo)
        ]
    finally:
        faiss.omp_set_num_threads(before)
    found, objective = min(runs, key=lambda run: run[1][-1])
    labels, _ = assign(ArrayRows(points), found.centroids, threads=threads)
    sizes = np.bincount(labels, minlength=k)
    splits = sum(int(step["nsplit"]) for step in found.iteration_stats)
    return KMeansResult(
        np.array(found.centroids, dtype=np.float32), objective, sizes, int((sizes == 0).sum()), splits,
        "faiss-gpu" if on_gpu else "faiss", len(rows), 0.0,
    )  # fmt: skip


def _faiss_run(
    faiss: ModuleType,
    points: np.ndarray,
    *,
    k: int,
    iterations: int,
    seed: int,
    attempt: int,
    spherical: bool,
    gpu: bool,
) -> tuple[Any, list[float]]:
    """One run of faiss.Kmeans and its objective at each iteration."""
    found = faiss.Kmeans(
        points.shape[1], k, niter=iterations, nredo=1, seed=_faiss_seed(seed, attempt), spherical=spherical,
        gpu=gpu, max_points_per_centroid=len(points), min_points_per_centroid=1,
    )  # fmt: skip
    found.train(points)
    objective = np.asarray(found.obj, dtype=np.float64)
    if spherical:  # faiss adds up dot products; the squared distance to a unit centroid is |x|^2 + 1 - 2 x.c
        objective = float((points.astype(np.float64) ** 2).sum()) + len(points) - 2 * objective
    return found, [float(value) for value in objective]


def _by_torch(
    rows: Rows, *, k: int, iterations: int, seed: int, redo: int, spherical: bool, magnitude: float,
    device: torch.device, threads: int, shard: Shard,
) -> KMeansResult:  # fmt: skip
    lloyd = _Lloyd(rows, k=k, spherical=spherical, magnitude=magnitude, device=device, threads=threads, shard=shard)
    best: KMeansResult | None = None
    for attempt in range(redo):
        result = lloyd.run(initial_rows(len(rows), k, seed=seed, attempt=attempt), iterations=iterations)
        if best is None or result.objective[-1] < best.objective[-1]:
            best = result
    assert best is not None
    return best


class _Lloyd:
    """Lloyd iterations over fixed blocks. All that passes between blocks and processes is integers."""

    def __init__(
        self, rows: Rows, *, k: int, spherical: bool, magnitude: float, device: torch.device, threads: int, shard: Shard
    ) -> None:
        self.rows, self.k, self.spherical, self.device, self.shard = rows, k, spherical, device, shard
        size = block_rows(k)
        blocks = spans(len(rows), size)
        start, stop = share(len(blocks), rank=shard.rank, size=shard.size)
        self.blocks = blocks[start:stop]
        self.threads = 1 if device.type == "cuda" else _threads_for(threads, k=k, block=size)
        # Fixed point with as many bits as the sum over all rows leaves free in 62.
        self.scale = 2.0 ** math.floor(61 - math.log2(max(len(rows) * magnitude, 1e-30)))
        farthest = 4 * magnitude**2 * rows.dim + 2
        self.distance_scale = 2.0 ** math.floor(61 - math.log2(len(rows) * farthest))
        self.cache: dict[tuple[int, int], torch.Tensor] = {}
        self.caching = 4 * rows.dim * sum(stop - start for start, stop in self.blocks) <= _cache_bytes(device)
        self.lock = threading.Lock()

    def run(self, first: np.ndarray, *, iterations: int) -> KMeansResult:
        order = np.argsort(first)
        centroids = np.empty((self.k, self.rows.dim), dtype=np.float32)
        centroids[order] = self.rows.take(first[order])
        if self.spherical:
            centroids = _unit(centroids)
        objective: list[float] = []
        totals: list[int] = []
        counts, splits = np.zeros(self.k, dtype=np.int64), 0
        for _ in range(iterations):
            sums, counts, total = self._pass(centroids)
            totals.append(total)
            objective.append(total / self.distance_scale)
            centroids, split = _update(sums, counts, scale=self.scale, old=centroids)
            splits += split
            if self.spherical:
                centroids = _unit(centroids)
            if len(totals) > 1 and totals[-1] == totals[-2]:
                break
        empty = int((counts == 0).sum())
        return KMeansResult(centroids, objective, counts, empty, splits, "torch", len(self.rows), 0.0)

    def _pass(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Assign every row once: sums (K, D) and counts (K,) int64 per cluster, and the scaled objective."""
        table = _Table(centroids, device=self.device, spherical=self.spherical)
        sums = torch.zeros(self.k, self.rows.dim, dtype=torch.int64, device=self.device)
        counts = torch.zeros(self.k, dtype=torch.int64, device=self.device)

        def add(span: tuple[int, int]) -> int:
            block = self._load(span)
            labels, scores = table.nearest(block)
            lengths = block.double().square().sum(1)
            distance = (lengths + self.spherical - 2 * scores.double()).clamp_min(0).sum()
            fixed = (block.double() * self.scale).round_().long()
            with self.lock:
                sums.index_add_(0, labels, fixed)
                counts.index_add_(0, labels, torch.ones_like(labels))
            return round(float(distance) * self.distance_scale)

        total = sum(each(add, self.blocks, threads=self.threads))
        sums = self.shard.reduce(sums.cpu())
        counts = self.shard.reduce(counts.cpu())
        reduced = self.shard.reduce(torch.tensor([total]))
        return sums.numpy(), counts.numpy(), int(reduced)

    def _load(self, span: tuple[int, int]) -> torch.Tensor:
        block = self.cache.get(span)
        if block is None:
            block = torch.from_numpy(self.rows.read(*span)).to(self.device)
            if self.caching:
                self.cache[span] = block
        return block


def _update(sums: np.ndarray, counts: np.ndarray, *, scale: float, old: np.ndarray) -> tuple[np.ndarray, int]:
    """Means of the clusters; an empty one gets half of the largest. Returns centroids (K, D) and the number of splits."""
    filled = counts > 0
    centroids = old.copy()
    centroids[filled] = (sums[filled] / (counts[filled, None] * scale)).astype(np.float32)
    weights = counts.copy()
    for empty in np.flatnonzero(~filled):
        donor = int(weights.argmax())
        signs = np.where(np.arange(old.shape[1]) % 2 == 0, 1 + _SPLIT, 1 - _SPLIT).astype(np.float32)
        centroids[empty] = centroids[donor] * signs
        centroids[donor] = centroids[donor] * (2 - signs)
        weights[empty] = weights[donor] // 2
        weights[donor] -= weights[empty]
    return centroids, int((~filled).sum())


def _unit(centroids: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(centroids.astype(np.float64), axis=1, keepdims=True)
    return (centroids / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


class _Table:
    """Centroids on a device, ready to score blocks: x.c - |c|^2 / 2 (or x.c), which is largest for the nearest."""

    def __init__(self, centroids: np.ndarray, *, device: torch.device, spherical: bool = False) -> None:
        self.centroids = torch.from_numpy(np.ascontiguousarray(centroids)).to(device)
        half = np.square(centroids.astype(np.float64)).sum(1) / 2
        self.offset = torch.from_numpy(np.zeros_like(half) if spherical else -half).float().to(device)

    def nearest(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, D) -> index (b,) and score (b,) of the nearest centroid; the lowest index of equals."""
        scores = torch.addmm(self.offset, block, self.centroids.T)
        if scores.device.type == "cpu":  # numpy finds the largest of a row several times faster than torch
            labels = torch.from_numpy(scores.numpy().argmax(1))
        else:
            labels = scores.argmax(1)
        return labels, scores.gather(1, labels[:, None])[:, 0]


def assign(
    rows: Rows,
    centroids: np.ndarray,
    *,
    part: tuple[int, int] | None = None,
    device: torch.device | None = None,
    threads: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each row (of rows `part` only): labels (n,) int64, squared distances (n,) float32.

    Streams fixed blocks. A `part` that starts at a multiple of `block_rows(K)` gives the same bits as the whole.
    """
    device = device or torch.device("cpu")
    table = _Table(centroids, device=device)
    size = block_rows(len(centroids))
    start, stop = part or (0, len(rows))
    labels = np.empty(stop - start, dtype=np.int64)
    distances = np.empty(stop - start, dtype=np.float32)

    def block(span: tuple[int, int]) -> None:
        x = torch.from_numpy(rows.read(start + span[0], start + span[1])).to(device)
        nearest, _ = table.nearest(x)
        labels[slice(*span)] = nearest.cpu().numpy()
        # Not from the score, which loses digits to cancellation for rows close to their centroid.
        distances[slice(*span)] = (x - table.centroids[nearest]).square().sum(1).cpu().numpy()

    used = 1 if device.type == "cuda" else _threads_for(threads or usable_cores(), k=len(centroids), block=size)
    for _ in each(block, spans(stop - start, size), threads=used):
        pass
    return labels, distances


def block_rows(k: int) -> int:
    """Rows per block for K clusters: a power of two such that the scores take at most 128 MB. The same everywhere."""
    size = 2048
    while size > 64 and size * k > 1 << 25:
        size //= 2
    return size


def _threads_for(threads: int, *, k: int, block: int) -> int:
    """As many blocks at once as keep their scores below 1 GB."""
    return max(1, min(threads, (1 << 28) // (block * k)))


def _cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _HOST_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(0.6 * free)
