"""Initial prototypes by clustering the features of the images: a background that is found at borders, parts elsewhere.

Labels play no role. T tokens, D width, K parts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from vissl_like.analysis.kmeans import kmeans
from vissl_like.analysis.rows import ArrayRows

log = logging.getLogger(__name__)

#: Clusters of border tokens, and the share of inner tokens (those farthest from all of them) that parts are made of.
BORDER_CLUSTERS, FOREGROUND_SHARE = 8, 0.3
_ITERATIONS = 25


def find_prototypes(maps: Iterable[Tensor], *, num_parts: int, seed: int, restarts: int = 1) -> Tensor:
    """Feature maps (B, D, h, w) of some batches -> prototypes (K+1, D), the background last.

    The background is the mean of the border tokens. Parts are the k-means centroids of the inner tokens that look least
    like any cluster of border tokens. Of `restarts` the one with the lowest objective is taken. Deterministic.
    """
    border, inner = _tokens(maps)
    around = _centroids(border, BORDER_CLUSTERS, seed=seed)
    distance = _nearest(inner, around)
    count = max(num_parts, round(FOREGROUND_SHARE * len(inner)))
    foreground = inner[np.sort(np.argsort(-distance, kind="stable")[:count])]
    parts = _centroids(foreground, num_parts, seed=seed, restarts=restarts)
    log.info("prototypes: k-means on %d of %d inner tokens, %d border tokens", len(foreground), len(inner), len(border))
    return torch.from_numpy(np.concatenate([parts, border.mean(axis=0, keepdims=True)]).astype(np.float32))


def _tokens(maps: Iterable[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Border tokens and inner tokens, float32 (T, D) each."""
    border, inner = [], []
    for batch in maps:
        channels_last = batch.detach().float().cpu().permute(0, 2, 3, 1)
        height, width = channels_last.shape[1:3]
        is_border = torch.ones(height, width, dtype=torch.bool)
        is_border[1:-1, 1:-1] = False
        border.append(channels_last[:, is_border].flatten(0, 1).numpy())
        inner.append(channels_last[:, ~is_border].flatten(0, 1).numpy())
    return np.concatenate(border), np.concatenate(inner)


def _centroids(points: np.ndarray, k: int, *, seed: int, restarts: int = 1) -> np.ndarray:
    rows = ArrayRows(np.ascontiguousarray(points))
    found = kmeans(
        rows, k=k, iterations=_ITERATIONS, seed=seed, redo=restarts, backend="torch", max_points_per_centroid=0,
        what="tokens",
    )  # fmt: skip
    return found.centroids


def _nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distance of each point (T, D) to the nearest centroid."""
    scores = points @ centroids.T
    lengths = np.square(points).sum(axis=1)
    return (lengths[:, None] - 2 * scores + np.square(centroids).sum(axis=1)).min(axis=1)
