"""Lloyd's iterations on torch tensors, whose sums are exact: the same bits at any number of processes, threads and blocks.

Letters: n rows, b of them in a block, D dimensions, K clusters, S (K, D) the sums of the rows of each cluster.

Exactness: each number is rounded once to a multiple of 2^(e - 52), with 2^e above n times the largest magnitude. No sum
of such numbers can leave the 53 bits of a double, so no addition rounds and their order does not count. For a million
rows the rounding is at most 2^-33 of the largest magnitude.
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vissl_like.analysis.blocks import Blocks
from vissl_like.analysis.nearest import Precision, Table, squared_lengths
from vissl_like.analysis.rows import one_thread, spans

logger = logging.getLogger(__name__)

# The two halves of a split cluster are moved apart by this share of their coordinates.
_SPLIT = 1.0 / 1024
_FAISS_SPLIT_SEED = 1234
# Elements that are converted to float64 at a time: 1 MB stays in the cache of a core.
_EXACT_AT_ONCE = 1 << 17
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
        self.n, self.dim = len(blocks.rows), blocks.rows.dim
        exponent = math.ceil(math.log2(max(self.n * magnitude, 1e-30))) + 1
        # Adding and subtracting 1.5 * 2^e rounds to a multiple of 2^(e - 52).
        self._rounding = 1.5 * 2.0**exponent
        self._square_scale = 2.0 ** math.floor(61 - math.log2(max(self.n * self.dim * magnitude**2, 1e-30)))
        self._squares: float | None = None  # sum of |x|^2 over all rows
        self._lock = threading.Lock()
        self._own = threading.local()

    def run(self, first: np.ndarray, *, iterations: int) -> Found:
        """From the rows `first` (K,) until nothing changes or `iterations` are done."""
        with one_thread():
            return self._run(self._start(first), iterations=iterations)

    def _start(self, first: np.ndarray) -> Tensor:
        order = np.argsort(first)
        centroids = np.empty((self.k, self.dim), dtype=np.float32)
        centroids[order] = self.blocks.rows.take(first[order])
        tensor = torch.from_numpy(centroids).to(self.blocks.device)
        return unit(tensor) if self.spherical else tensor

    def _run(self, centroids: Tensor, *, iterations: int) -> Found:
        objective: list[float] = []
        counts, splits = torch.zeros(self.k, dtype=torch.int64), 0
        for _ in range(iterations):
            sums, counts = self._pass(centroids)
            objective.append(self._objective(centroids, sums, counts))
            moved, split = update(sums, counts, old=centroids)
            splits += split
            moved = unit(moved) if self.spherical else moved
            if torch.equal(moved, centroids):
                objective += objective[-1:] if len(objective) < iterations else []  # what one more would find
                break
            centroids = moved
        return Found(centroids.cpu().numpy(), objective, counts.cpu().numpy(), splits)

    def _pass(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Assign every row once: exact sums (K, D) float64 and counts (K,) int64 of each cluster, over all processes."""
        table = Table(centroids, spherical=self.spherical, precision=self.precision)
        sums = torch.zeros(self.k, self.dim, dtype=torch.float64, device=centroids.device)
        counts = torch.zeros(self.k + 1, dtype=torch.int64, device=centroids.device)  # the last one: precision is not enough
        with_squares = self._squares is None

        def add(span: tuple[int, int], block: Tensor) -> Tensor | None:
            labels = table.nearest(block, out=self._scratch(len(block)))
            if span[0] == 0 and self.precision != "float32" and table.loss_of(labels, block) > LARGEST_LOSS:
                counts[-1] += 1
            squares = self._add_exactly(block, labels, sums, with_squares=with_squares)
            with self._lock:
                counts.index_add_(0, labels, torch.ones_like(labels))
            return squares

        squares = [value for value in self.blocks.each(add) if value is not None]
        reduce = self.blocks.shard.reduce
        if with_squares:
            total = sum(round(float(value) * self._square_scale) for value in squares)
            self._squares = int(reduce(torch.tensor([total]))) / self._square_scale
        sums, counts = reduce(sums), reduce(counts)
        if int(counts[-1]):
            logger.warning("CLUSTERFIT.PRECISION=%s makes the clusters worse; going on in float32", self.precision)
            self.precision = "float32"
        return sums, counts[:-1]

    def _add_exactly(self, block: Tensor, labels: Tensor, sums: Tensor, *, with_squares: bool) -> Tensor | None:
        """Add the rows to the sums of their clusters; returns the sum of their squares if it is wanted."""
        step = max(1, _EXACT_AT_ONCE // self.dim)
        squares = []
        for start, stop in spans(len(block), step if block.device.type == "cpu" else len(block)):
            exact = block[start:stop].double().add_(self._rounding).sub_(self._rounding)
            with self._lock:
                sums.index_add_(0, labels[start:stop], exact)
            if with_squares:
                squares.append(torch.dot(exact.flatten(), exact.flatten()))
        return torch.stack(squares).sum() if with_squares else None

    def _scratch(self, rows: int) -> Tensor | None:
        """Where scores go on a CPU, one place per thread: fresh memory for each block costs a tenth of the time."""
        if self.blocks.device.type != "cpu" or self.precision != "float32":
            return None
        if not hasattr(self._own, "scores") or len(self._own.scores) < rows:
            self._own.scores = torch.empty(rows, self.k)
        return self._own.scores  # type: ignore[no-any-return]

    def _objective(self, centroids: Tensor, sums: Tensor, counts: Tensor) -> float:
        """Sum of |x - c|^2 over all rows: sum |x|^2 + sum over clusters of (n_k c - 2 S_k).c, in float64."""
        assert self._squares is not None
        total = self._squares
        for start, stop in spans(self.k, 1024):
            c = centroids[start:stop].double()
            total += float(((counts[start:stop, None] * c - 2 * sums[start:stop]) * c).sum())
        return max(total, 0.0)


def update(sums: Tensor, counts: Tensor, *, old: Tensor) -> tuple[Tensor, int]:
    """Means of the clusters (K, D); an empty one gets half of another. Also returns the number of splits.

    Changes `sums` on the way.
    """
    filled = counts > 0
    means = sums.div_(counts.clamp_min(1)[:, None]).float()
    centroids = torch.where(filled[:, None], means, old)
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
    lengths = squared_lengths(centroids).sqrt()
    return (centroids / torch.where(lengths > 0, lengths, 1.0)[:, None]).float()
