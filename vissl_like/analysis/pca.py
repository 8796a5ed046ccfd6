"""Standardisation and PCA of rows too many for memory, exact: two passes of float64 sums in a fixed order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from vissl_like.analysis.rows import BLOCK_ROWS, MappedRows, Rows, each, one_thread, spans
from vissl_like.errors import ConfigError, DataError


@dataclass(frozen=True)
class Standardiser:
    """x -> (x - mean) / deviation; a dimension that never varies becomes zero."""

    mean: np.ndarray  # (D,) float64
    deviation: np.ndarray  # (D,) float64

    def __call__(self, block: np.ndarray) -> np.ndarray:
        return ((block - self.mean) / self.deviation).astype(np.float32)


@dataclass(frozen=True)
class Pca:
    """x -> (x - mean) @ components.T * scale, onto the directions of largest variance."""

    mean: np.ndarray  # (D,) float64
    components: np.ndarray  # (d, D) float64, orthonormal; the largest entry of each is positive
    scale: np.ndarray  # (d,) float64: 1, or 1 / singular value where the result is whitened
    variance: np.ndarray  # (d,) float64, of the projected rows before scaling (divided by n - 1)
    explained: float  # share of the whole variance that the d directions hold

    def __call__(self, block: np.ndarray) -> np.ndarray:
        centred = torch.from_numpy(block - self.mean)
        with one_thread():
            projected = centred @ torch.from_numpy(self.components).T
        return (projected.numpy() * self.scale).astype(np.float32)


def fit_standardiser(rows: Rows, *, threads: int = 1) -> Standardiser:
    """Mean and (population) deviation of each dimension."""
    mean = _mean(rows, threads=threads)

    def squares(span: tuple[int, int]) -> np.ndarray:
        return ((rows.read(*span) - mean) ** 2).sum(axis=0)

    total = _ordered_sum(squares, len(rows), threads=threads)
    deviation = np.sqrt(total / max(len(rows), 1))
    return Standardiser(mean, np.where(deviation > 0, deviation, 1.0))


def standardised(rows: Rows, *, threads: int = 1) -> MappedRows:
    """The rows with mean 0 and deviation 1 in each dimension."""
    return MappedRows(rows, fit_standardiser(rows, threads=threads))


def check_components(dim: int, rows: Rows, *, key: str = "dim") -> None:
    """Raise ConfigError if rows of this number and width have fewer principal components."""
    limit = min(rows.dim, len(rows))
    if dim > limit:
        raise ConfigError(
            f"config.{key}={dim}: {len(rows)} rows of {rows.dim} dimensions have at most {limit} principal components. "
            f"Use at most {limit}."
        )


def fit_pca(rows: Rows, dim: int, *, whiten: bool = False, key: str = "dim", threads: int = 1) -> Pca:
    """The first `dim` principal components, from an eigen-decomposition of the covariance matrix in float64.

    `whiten` divides each projection by its singular value, which makes all of them equally long over the rows (squares add
    up to 1), as VISSL does. It subtracts the mean twice, a shift that changes no distance; we subtract it once.
    """
    check_components(dim, rows, key=key)
    mean = _mean(rows, threads=threads)

    def products(span: tuple[int, int]) -> np.ndarray:
        centred = torch.from_numpy(rows.read(*span) - mean)
        return (centred.T @ centred).numpy()

    # Each waiting block holds a whole D x D matrix: at most 1 GB of them.
    side_by_side = max(1, min(threads, 2**30 // (16 * rows.dim**2)))
    covariance = _ordered_sum(products, len(rows), threads=side_by_side) / max(len(rows) - 1, 1)
    with one_thread():
        values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
    values_d = values.numpy()[::-1][:dim].clip(min=0.0)
    components = vectors.numpy().T[::-1][:dim]
    # An eigenvector has no sign of its own; without this choice it would differ between machines.
    largest = np.abs(components).argmax(axis=1)
    signs = np.where(components[np.arange(dim), largest] < 0, -1.0, 1.0)
    whole = float(values.clamp_min(0).sum())
    explained = float(values_d.sum() / whole) if whole else 0.0
    lengths = np.sqrt(values_d * max(len(rows) - 1, 1))
    # Directions without variance are rounding noise; dividing it by its own length would make it as long as the others.
    is_real = values_d > float(values[-1]) * max(rows.dim, len(rows)) * np.finfo(np.float64).eps
    scale = 1 / np.where(is_real, lengths, np.inf) if whiten else np.ones(dim)
    return Pca(mean, components * signs[:, None], scale, values_d, explained)


def _mean(rows: Rows, *, threads: int) -> np.ndarray:
    def total(span: tuple[int, int]) -> np.ndarray:
        return rows.read(*span).sum(axis=0, dtype=np.float64)

    return _ordered_sum(total, len(rows), threads=threads) / max(len(rows), 1)


def _ordered_sum(function: Callable[[tuple[int, int]], np.ndarray], count: int, *, threads: int) -> np.ndarray:
    """The sum of an array per block, added in the order of the blocks whatever the number of threads."""
    total: np.ndarray | None = None
    for part in each(function, spans(count, BLOCK_ROWS), threads=threads):
        total = part if total is None else total + part
    if total is None:
        raise DataError("config.CLUSTERFIT.FEATURES: there are no rows to take the mean of. Give more images.")
    return total
