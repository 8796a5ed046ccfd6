"""How well clusters and classes agree: NMI, adjusted Rand index and purity, exact, in percent.

Letters: n samples, C classes, K clusters, n_ck samples of class c in cluster k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Contingency:
    """The table n_ck: its cells that are not empty, and its margins."""

    cells: np.ndarray  # (m,) samples of each pair that occurs
    row: np.ndarray  # (m,) class of the pair
    column: np.ndarray  # (m,) cluster of the pair
    classes: np.ndarray  # (C,) samples of each class
    clusters: np.ndarray  # (K,) samples of each cluster


def contingency(classes: np.ndarray, clusters: np.ndarray) -> Contingency:
    """classes (n,), clusters (n,): any integers."""
    _, c = np.unique(classes, return_inverse=True)
    _, k = np.unique(clusters, return_inverse=True)
    width = int(k.max(initial=0)) + 1
    pairs, cells = np.unique(c.astype(np.int64) * width + k, return_counts=True)
    return Contingency(cells, pairs // width, pairs % width, np.bincount(c), np.bincount(k))


def agreement(classes: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """{"nmi", "ari", "purity"} in percent; samples whose class is negative (unknown) do not count.

    nmi: mutual information over the mean of both entropies. ari: Hubert and Arabie 1985, may be below 0. purity: share of
    samples that belong to the most frequent class of their cluster. Empty if no class is known.
    """
    known = classes >= 0
    if not known.any():
        return {}
    table = contingency(classes[known], clusters[known])
    return {"nmi": 100 * _nmi(table), "ari": 100 * _ari(table), "purity": 100 * _purity(table)}


def _nmi(table: Contingency) -> float:
    n = float(table.cells.sum())
    joint, p, q = table.cells / n, table.classes / n, table.clusters / n
    information = math.fsum(joint * (np.log(joint) - np.log(p[table.row]) - np.log(q[table.column])))
    mean_entropy = -(math.fsum(p * np.log(p)) + math.fsum(q * np.log(q))) / 2
    # One class and one cluster: there is nothing to tell apart, and it is told apart perfectly.
    return min(max(information / mean_entropy, 0.0), 1.0) if mean_entropy > 0 else 1.0


def _pairs(counts: np.ndarray) -> int:
    """The number of pairs of samples in the same cell. In Python integers: their products exceed 63 bits."""
    return sum(int(count) * (int(count) - 1) // 2 for count in counts)


def _ari(table: Contingency) -> float:
    together, same_class, same_cluster = map(_pairs, (table.cells, table.classes, table.clusters))
    total = _pairs(np.array([table.cells.sum()]))
    by_chance = same_class * same_cluster / total if total else 0.0
    most = (same_class + same_cluster) / 2
    return (together - by_chance) / (most - by_chance) if most != by_chance else 1.0


def _purity(table: Contingency) -> float:
    largest = np.zeros(len(table.clusters), dtype=np.int64)
    np.maximum.at(largest, table.column, table.cells)
    return float(largest.sum() / table.cells.sum())
