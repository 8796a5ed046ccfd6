"""The nearest centroid of each row, for any number of rows.

Letters: b rows of a block, D dimensions, K centroids.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vissl_like.analysis.blocks import ALONE, Blocks, Shard, block_rows, not_finite_message, threads_for
from vissl_like.analysis.rows import Rows, not_finite, original_row, spans
from vissl_like.config.plan import usable_cores
from vissl_like.errors import DataError

# Centroids or rows that a CPU converts or subtracts at a time.
_AT_ONCE = 128

#: Arithmetic of the products of rows and centroids.
Precision = Literal["float32", "tf32", "bfloat16"]


class Table:
    """Centroids on a device, ready to score blocks: x.c - |c|^2 / 2 (or x.c), which is largest for the nearest."""

    def __init__(self, centroids: Tensor, *, spherical: bool = False, precision: Precision = "float32") -> None:
        self.centroids, self.precision = centroids, precision
        self._own = threading.local()
        half = squared_lengths(centroids) / 2
        self.offset = torch.zeros_like(half).float() if spherical else -half.float()

    def nearest(self, block: Tensor) -> Tensor:
        """(b, D) -> index (b,) of the nearest centroid; the lowest index of equals."""
        if block.device.type != "cpu":
            return self._scores(block, precision=self.precision).argmax(1)
        if self.precision == "bfloat16":
            return torch.from_numpy(self._scores(block, precision="bfloat16").numpy().argmax(1))
        return torch.from_numpy(self._nearest_by_numpy(block.numpy()))

    def _nearest_by_numpy(self, block: np.ndarray) -> np.ndarray:
        """On a CPU: numpy finds the largest of a row several times as fast as PyTorch, and its OpenBLAS multiplies on some
        processors a quarter faster than PyTorch's MKL."""
        labels = np.empty(len(block), dtype=np.int64)
        scores = np.matmul(block, self.centroids.numpy().T, out=self._space(len(block)))
        offset = self.offset.numpy()
        for start, stop in spans(len(block), _AT_ONCE):  # a part stays in the cache for both
            part = np.add(scores[start:stop], offset, out=scores[start:stop])
            part.argmax(1, out=labels[start:stop])
        return labels

    def _space(self, rows: int) -> np.ndarray:
        """Memory of this thread for scores: fresh memory for each block costs a tenth of the time."""
        if not hasattr(self._own, "scores") or len(self._own.scores) < rows:
            self._own.scores = np.empty((rows, len(self.centroids)), dtype=np.float32)
        return self._own.scores[:rows]  # type: ignore[no-any-return]

    def loss_of(self, labels: Tensor, block: Tensor) -> float:
        """How much larger the sum of squared distances of a block is with these labels than with those of float32."""
        exact = self._scores(block, precision="float32").argmax(1)
        with_labels, best = (self.squared_distances(block, chosen).sum() for chosen in (labels, exact))
        return float(with_labels / best.clamp_min(1e-30)) - 1

    def squared_distances(self, block: Tensor, labels: Tensor) -> Tensor:
        """|x - c|^2 (b,) of each row and its centroid; not from the score, which loses digits for rows close to it."""
        step = len(block) if block.is_cuda else _AT_ONCE
        parts = [(block[i:j] - self.centroids[labels[i:j]]).square_().sum(1) for i, j in spans(len(block), step)]
        return torch.cat(parts)

    def _scores(self, block: Tensor, *, precision: Precision) -> Tensor:
        if precision == "bfloat16":
            rows, centroids = block.bfloat16(), self.centroids.bfloat16().T
            if block.is_cuda:  # sums and scores stay float32
                return torch.mm(rows, centroids, out_dtype=torch.float32).add_(self.offset)
            return (rows @ centroids).float().add_(self.offset)
        with _tf32() if precision == "tf32" and block.is_cuda else contextlib.nullcontext():
            return torch.addmm(self.offset, block, self.centroids.T)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def squared_lengths(centroids: Tensor) -> Tensor:
    """|c|^2 in float64, (K, D) -> (K,), without a copy of all of them in float64."""
    parts = [centroids[start:stop].double().square_().sum(1) for start, stop in spans(len(centroids), _AT_ONCE)]
    return torch.cat(parts)


def assign_blocks(
    rows: Rows,
    centroids: np.ndarray,
    *,
    shard: Shard = ALONE,
    device: torch.device | None = None,
    threads: int = 0,
    block: int | None = None,
    what: str = "features",
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first row, labels (b,) int64, squared distances (b,) float32) for each block of this shard, in order.

    Holds a few blocks at a time. Raises DataError for a row that is not finite. The bits depend on no number of shards or
    threads.
    """
    device = device or torch.device("cpu")
    k, dim = centroids.shape
    size = block or block_rows(k, dim, device=device)
    used = threads_for(threads or usable_cores(), k=k, dim=dim, block=size)
    blocks = Blocks(rows, size=size, device=device, threads=used, shard=shard, keep=False)
    table = Table(torch.from_numpy(np.ascontiguousarray(centroids)).to(device))

    def find(span: tuple[int, int], x: Tensor) -> tuple[int, np.ndarray, np.ndarray]:
        labels = table.nearest(x)
        distances = table.squared_distances(x, labels)
        if not bool(torch.isfinite(distances).all()):
            bad = not_finite(x.cpu().numpy(), start=span[0])
            raise DataError(not_finite_message(what, original_row(rows, bad)))
        return span[0], labels.cpu().numpy(), distances.cpu().numpy()

    return blocks.each(find)


def assign(rows: Rows, centroids: np.ndarray, *, threads: int = 0, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """All of assign_blocks() in memory: labels (n,) int64, squared distances (n,) float32."""
    labels = np.empty(len(rows), dtype=np.int64)
    distances = np.empty(len(rows), dtype=np.float32)
    for start, found, squared in assign_blocks(rows, centroids, threads=threads, **options):  # type: ignore[arg-type]
        labels[start : start + len(found)] = found
        distances[start : start + len(found)] = squared
    return labels, distances
