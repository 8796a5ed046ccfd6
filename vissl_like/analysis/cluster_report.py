"""What the report page needs to draw clusters: sizes, some images of some clusters, a 2-D projection. Self-contained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vissl_like.analysis.features import FeatureStore
from vissl_like.analysis.rows import Rows, one_thread
from vissl_like.core import rng
from vissl_like.data.images import ImageDataset
from vissl_like.errors import DataError

LARGEST, RANDOM, MEMBERS = 6, 6, 10
THUMBNAIL = 64
MAX_POINTS = 2000
# What a seeded choice is made for, so that two choices of the same seed differ.
_CLUSTERS, _IMAGES, _POINTS = 1, 2, 3
# Directions that the projection is found among, and how often they are improved.
_SUBSPACE, _ITERATIONS = 8, 30


def write_report_data(
    file: Path,
    store: FeatureStore,
    labels: np.ndarray,
    *,
    k: int,
    dataset: ImageDataset | None,
    rows: Rows,
    seed: int,
) -> None:
    """Write report.npz: sizes (K,), montage_images (M, S, S, 3) uint8, montage_cluster (M,), projection (N, 2),
    projection_label (N,) (-1: unknown), projection_cluster (N,).

    Without a data set to take images from, M is 0.
    """
    images, clusters = montage(dataset, labels, k=k, seed=seed)
    points = np.sort(rng.permutation(seed, _POINTS, len(labels))[:MAX_POINTS])
    classes = store.labels
    is_single = classes is not None and classes.ndim == 1
    np.savez_compressed(
        file,
        sizes=np.bincount(labels, minlength=k),
        montage_images=images,
        montage_cluster=clusters,
        projection=project(rows.take(points)),
        projection_label=classes[points] if classes is not None and is_single else np.full(len(points), -1),
        projection_cluster=labels[points],
    )


def project(points: np.ndarray) -> np.ndarray:
    """The first two principal components of (N, D) -> (N, 2) float32; missing ones are zero.

    By subspace iteration: for a picture that is exact enough, and it takes no D x D matrix and no copies of one.
    """
    centred = torch.from_numpy(points - points.mean(axis=0, keepdims=True))
    width = min(_SUBSPACE, *points.shape)
    start = np.random.RandomState(0).standard_normal((points.shape[1], width)).astype(np.float32)
    with one_thread():
        basis = torch.linalg.qr(torch.from_numpy(start)).Q
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
        projected = centred @ basis  # (N, width)
        values, vectors = torch.linalg.eigh(projected.T @ projected)
        largest = values.argsort(descending=True)[:2]
        directions = basis @ vectors[:, largest]  # (D, 2)
        # A direction has no sign of its own: its largest entry is positive, and zero stands for one without variance.
        peaks = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        is_real = values[largest] > 1e-6 * values.max()
        flat = np.zeros((len(points), 2), dtype=np.float32)
        flat[:, : len(largest)] = (centred @ directions * peaks.sign() * is_real).numpy()
    return flat


def montage(dataset: ImageDataset | None, labels: np.ndarray, *, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails (M, S, S, 3) of up to ten members of the largest clusters and of some others, and their clusters (M,)."""
    images, clusters = [], []
    for cluster in shown_clusters(labels, k=k, seed=seed) if dataset is not None else []:
        members = np.flatnonzero(labels == cluster)
        chosen = np.sort(members[rng.permutation(seed, _IMAGES, len(members))[:MEMBERS]])
        for row in chosen:
            try:
                images.append(thumbnail(dataset.image(int(row))))  # type: ignore[union-attr]
            except DataError:  # an unreadable image, listed in bad_images.txt
                continue
            clusters.append(cluster)
    stacked = np.stack(images) if images else np.zeros((0, THUMBNAIL, THUMBNAIL, 3), dtype=np.uint8)
    return stacked, np.array(clusters, dtype=np.int64)


def shown_clusters(labels: np.ndarray, *, k: int, seed: int) -> list[int]:
    """The largest clusters, then some random others, all with members."""
    sizes = np.bincount(labels, minlength=k)
    by_size = [int(cluster) for cluster in np.argsort(-sizes, kind="stable") if sizes[cluster]]
    others = by_size[LARGEST:]
    drawn = [others[i] for i in rng.permutation(seed, _CLUSTERS, len(others))[:RANDOM]]
    return by_size[:LARGEST] + sorted(drawn)


def thumbnail(image: Image.Image) -> np.ndarray:
    """The central square as (S, S, 3) uint8; small images keep their pixels as squares."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    method = Image.Resampling.BICUBIC if side >= THUMBNAIL else Image.Resampling.NEAREST
    return np.asarray(square.resize((THUMBNAIL, THUMBNAIL), method))
