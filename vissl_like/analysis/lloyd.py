"""Lloyd's iterations on torch tensors, with the same bits at any number of processes, threads and blocks (exact_sums.py).

Letters: n rows, b of them in a block, D dimensions, K clusters, S (K, D) the sums of the rows of each cluster.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vissl_like.analysis.blocks import Blocks
from vissl_like.analysis.exact_sums import ExactSums
from vissl_like.analysis.nearest import Precision, Table, squared_lengths
from vissl_like.analysis.rows import one_thread, spans

logger = logging.getLogger(__name__)

# Centroids that are converted to float64 at a time.
_AT_ONCE = 128
# The two halves of a split cluster are moved apart by this share of their coordinates.
_SPLIT = 1.0 / 1024
_FAISS_SPLIT_SEED = 1234
#: Fast arithmetic is given up where it makes the objective worse by more than this.
LARGEST_LOSS = 1e-3


@dataclass(frozen=True)
class Found:
    """Where the iterations ended."""

    centroids: np.ndarray  # (K, D) float32
    objective: list[float]  # sum of squared distances at each iteration
    sizes: np.ndarray  # (K,) int64
    num_splits: int


class Lloyd:
    """Lloyd's iterations over the blocks of one process, in step with the others."""

    def __init__(
        self, blocks: Blocks, *, k: int, magnitude: float, spherical: bool = False, precision: Precision = "float32"
    ) -> None:
        self.blocks, self.k, self.spherical, self.precision = blocks, k, spherical, precision
        self.magnitude = magnitude

    def run(self, first: np.ndarray, *, iterations: int) -> Found:
        """From the rows `first` (K,) until nothing changes or `iterations` are done."""
        with one_thread():
            return self._run(self._start(first), iterations=iterations)

    def _start(self, first: np.ndarray) -> Tensor:
        rows, order = self.blocks.rows, np.argsort(first)
        centroids = np.empty((self.k, rows.dim), dtype=np.float32)
        centroids[order] = rows.take(first[order])
        tensor = torch.from_numpy(centroids).to(self.blocks.device)
        return unit(tensor) if self.spherical else tensor

    def _run(self, centroids: Tensor, *, iterations: int) -> Found:
        rows, reduce = self.blocks.rows, self.blocks.shard.reduce
        exact = ExactSums(self.k, rows.dim, rows=len(rows), magnitude=self.magnitude, device=centroids.device)
        objective: list[float] = []
        counts, splits = torch.zeros(self.k, dtype=torch.int64), 0
        for _ in range(iterations):
            self._assign(centroids, exact)
            sums, counts, squares = exact.total(reduce)
            objective.append(objective_of(centroids, sums, counts, squares=squares))
            moved, split = update(sums, counts, old=centroids)
            splits += split
            moved = unit(moved) if self.spherical else moved
            if torch.equal(moved, centroids):
                objective += objective[-1:] if len(objective) < iterations else []  # what one more would find
                break
            centroids = moved
        return Found(centroids.cpu().numpy(), objective, counts.cpu().numpy(), splits)

    def _assign(self, centroids: Tensor, exact: ExactSums) -> None:
        """Put every row of this process to its nearest centroid."""
        table = Table(centroids, spherical=self.spherical, precision=self.precision)

        def put(span: tuple[int, int], block: Tensor) -> float:
            labels = table.nearest(block)
            exact.put(span, block, labels)
            is_checked = span[0] == 0 and self.precision != "float32"
            return table.loss_of(labels, block) if is_checked else 0.0

        losses = torch.tensor([max(self.blocks.each(put), default=0.0)])
        if self.precision != "float32" and float(self.blocks.shard.reduce(losses)) > LARGEST_LOSS:
            logger.warning("CLUSTERFIT.PRECISION=%s makes the clusters worse; going on in float32", self.precision)
            self.precision = "float32"


def objective_of(centroids: Tensor, sums: Tensor, counts: Tensor, *, squares: float) -> float:
    """Sum of |x - c|^2 over all rows: sum |x|^2 + sum over clusters of (n_k c - 2 S_k).c, in float64."""
    total = squares
    for start, stop in spans(len(centroids), _AT_ONCE):
        c = centroids[start:stop].double()
        total += float(((counts[start:stop, None] * c - 2 * sums[start:stop]) * c).sum())
    return max(total, 0.0)


def update(sums: Tensor, counts: Tensor, *, old: Tensor) -> tuple[Tensor, int]:
    """Means of the clusters (K, D); an empty one gets half of another. Also returns the number of splits."""
    filled = counts > 0
    centroids = old.clone()
    for start, stop in spans(len(old), _AT_ONCE):
        means = sums[start:stop] / counts[start:stop, None].clamp_min(1)
        centroids[start:stop] = torch.where(filled[start:stop, None], means.float(), old[start:stop])
    splits = donors(counts.cpu().numpy())
    signs = torch.ones(old.shape[1], device=old.device)
    signs[::2], signs[1::2] = 1 + _SPLIT, 1 - _SPLIT
    for empty, donor in splits:
        centroids[empty] = centroids[donor] * signs
        centroids[donor] = centroids[donor] * (2 - signs)
    return centroids, len(splits)


def donors(counts: np.ndarray) -> list[tuple[int, int]]:
    """(empty cluster, cluster to be split for it): drawn by size with the random numbers of faiss, so that both agree.

    Cluster after cluster is accepted with the probability (size - 1) / (n - K), until one is.
    """
    k = len(counts)
    weights = counts.astype(np.float32)
    generator = np.random.MT19937()
    generator._legacy_seeding(_FAISS_SPLIT_SEED)
    found, numbers = [], np.empty(0, dtype=np.float32)
    for empty in np.flatnonzero(counts == 0):
        with np.errstate(divide="ignore", invalid="ignore"):
            chance = (weights - 1) / np.float32(counts.sum() - k)
        accepted = np.empty(0, dtype=np.int64)
        while not len(accepted):
            if len(numbers) < k:
                drawn = generator.random_raw(k).astype(np.float32) / np.float32(2**32 - 1)
                numbers = np.concatenate([numbers, drawn])
            accepted = np.flatnonzero(numbers[:k] < chance)
            numbers = numbers[(int(accepted[0]) + 1 if len(accepted) else k) :]
        donor = int(accepted[0])
        weights[empty] = weights[donor] / 2
        weights[donor] -= weights[empty]
        found.append((int(empty), donor))
    return found


def unit(centroids: Tensor) -> Tensor:
    """Each row divided by its length; rows of zeros stay."""
    lengths = squared_lengths(centroids).sqrt().float()
    return centroids / torch.where(lengths > 0, lengths, 1.0)[:, None]
