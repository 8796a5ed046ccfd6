"""One pass over annotated images: what part maps, whoever made them, are worth against keypoints, boxes and masks.

Maps come from a model, from chance (the floor) or from the annotations themselves (the oracle): all are measured by the
same code. K parts; maps (B, K+1, h, w) with the background last; S side of the framed images in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vissl_like.analysis import part_metrics
from vissl_like.analysis.part_metrics import Centres
from vissl_like.core import distributed, rng
from vissl_like.data.annotated import annotation
from vissl_like.data.annotations import Framing
from vissl_like.data.images import ImageDataset
from vissl_like.errors import ConfigError

#: What can be measured, and the annotations that it needs.
PROTOCOLS = {
    "keypoints": ("keypoints",),
    "regression": ("keypoints", "box"),
    "foreground": ("mask",),
    "part_masks": ("part_masks",),
}
#: Random maps are drawn on a grid of this many cells a side and enlarged.
_RANDOM_CELLS, _RANDOM_SHARPNESS = 4, 8.0


def framing_of(transforms: Sequence[Mapping[str, Any]], *, key: str) -> Framing:
    """The frame that TRANSFORMS put images into: Resize of the shorter side, then CenterCrop; else ConfigError."""
    steps = [step for step in transforms if step.get("name") not in ("ToTensor", "ImgToTensor", "Normalize")]
    names = [step.get("name") for step in steps]
    size = steps[0].get("size") if steps else None
    side = size[0] if isinstance(size, list) and len(size) == 1 else size
    if names == ["Resize"] and isinstance(side, int):
        return Framing(side, crop=False)
    if names == ["Resize", "CenterCrop"] and isinstance(side, int) and steps[1].get("size") == side:
        return Framing(side)
    if names == ["CenterCrop"] and isinstance(side, int):
        raise ConfigError(f"{key}: annotations are moved along with Resize and CenterCrop only; begin with Resize.")
    raise ConfigError(
        f"{key}={names}: keypoints, boxes and masks are moved along with Resize (one size: the shorter side) and "
        "CenterCrop of the same size only. Use these two, then ToTensor and Normalize."
    )


@dataclass
class Measured:
    """Counts and positions of the images of one rank; join() those of all before the values are computed."""

    rows: list[int] = field(default_factory=list)
    table: np.ndarray | int = 0
    mask_table: np.ndarray | int = 0
    centres: list[Centres] = field(default_factory=list)
    overlap: list[np.ndarray] = field(default_factory=list)

    def join(self) -> Measured:
        """All ranks together, in the order of rows. A collective call."""
        parts = distributed.all_gather_object(self)
        rows = [row for part in parts for row in part.rows]
        order = np.argsort(rows, kind="stable")
        joined = Measured(rows=[rows[i] for i in order])
        joined.table = sum(part.table for part in parts)
        joined.mask_table = sum(part.mask_table for part in parts)
        centres = [batch for part in parts for batch in part.centres]
        if centres:
            whole = Centres.join(centres)
            names = ("parts", "active", "keypoints", "visible")
            joined.centres = [Centres(*(getattr(whole, name)[order] for name in names))]
        overlap = [batch for part in parts for batch in part.overlap]
        if overlap:
            joined.overlap = [np.concatenate(overlap)[order]]
        return joined


def measure(
    found: Iterable[tuple[np.ndarray, Tensor]], dataset: ImageDataset, *, framing: Framing, protocols: Iterable[str]
) -> Measured:
    """Compare (rows (B,), maps (B, K+1, h, w)) with the annotations of the rows, on this rank."""
    result, wanted = Measured(), set(protocols)
    for rows, maps in found:
        sizes = [_size(dataset, int(row)) for row in rows]
        if wanted & {"keypoints", "regression"}:
            points = _framed_keypoints(dataset, rows, sizes, framing)
        if "keypoints" in wanted:
            result.table = result.table + part_metrics.keypoint_table(maps, points, size=_frame(sizes, framing))
        if "regression" in wanted:
            boxes = _stack(
                framing.box(annotation(dataset.source, "box", int(r)), height=h, width=w)
                for r, (h, w) in zip(rows, sizes)
            )
            result.centres.append(part_metrics.centres(maps, points, boxes, size=_frame(sizes, framing)))
        if "foreground" in wanted:
            masks = _framed_masks(dataset, rows, framing, "mask")
            result.overlap.append(part_metrics.overlap_counts(maps, masks[:, 0]))
        if "part_masks" in wanted:
            masks = _framed_masks(dataset, rows, framing, "part_masks")
            result.mask_table = result.mask_table + part_metrics.mask_table(maps, masks)
        result.rows += [int(row) for row in rows]
    return result


def _size(dataset: ImageDataset, row: int) -> tuple[int, int]:
    """Height and width of the original image."""
    from PIL import Image

    file = dataset.file(row)
    if file is None or file.endswith(".dcm"):
        width, height = dataset.image(row).size
        return height, width
    with Image.open(file) as image:
        return image.height, image.width


def _frame(sizes: list[tuple[int, int]], framing: Framing) -> tuple[int, int]:
    """Height and width of the framed images of a batch, which are all the same."""
    return (framing.size, framing.size) if framing.crop else framing.resized(*sizes[0])


def _stack(arrays: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(list(arrays)))


def _framed_keypoints(
    dataset: ImageDataset, rows: np.ndarray, sizes: list[tuple[int, int]], framing: Framing
) -> Tensor:
    return _stack(
        framing.keypoints(annotation(dataset.source, "keypoints", int(row)), height=height, width=width)
        for row, (height, width) in zip(rows, sizes)
    )


def _framed_masks(dataset: ImageDataset, rows: np.ndarray, framing: Framing, name: str) -> Tensor:
    """bool (B, G, S, S); a mask of the whole object has G = 1."""
    return torch.cat([frame_mask(annotation(dataset.source, name, int(row)), framing)[None] for row in rows])


def frame_mask(mask: np.ndarray, framing: Framing) -> Tensor:
    """bool (H, W) or (G, H, W) of an original image -> bool (G, S, S) in the frame, by the nearest neighbour."""
    layers = torch.from_numpy(np.atleast_3d(mask) if mask.ndim == 3 else mask[None]).float()
    height, width = layers.shape[1:]
    large = F.interpolate(layers[None], size=framing.resized(height, width), mode="nearest-exact")[0] > 0.5
    if not framing.crop:
        return large
    top, left = framing.offset(height, width)
    return large[:, top : top + framing.size, left : left + framing.size]


def values(measured: Measured, *, fit: Measured | None = None) -> dict[str, float]:
    """{measure: percent} of joined counts. `fit`: what the keypoint regression learns from."""
    found: dict[str, float] = {}
    if isinstance(measured.table, np.ndarray):
        found["nmi"] = part_metrics.normalized_mutual_information(measured.table)
        found["ari"] = part_metrics.adjusted_rand_index(measured.table)
    if isinstance(measured.mask_table, np.ndarray):
        found["pixel_nmi"] = part_metrics.normalized_mutual_information(measured.mask_table)
        found["pixel_ari"] = part_metrics.adjusted_rand_index(measured.mask_table)
    if measured.centres and fit is not None and fit.centres:
        found |= part_metrics.keypoint_regression(fit.centres[0], measured.centres[0])
    if measured.overlap:
        found |= part_metrics.foreground_overlap(measured.overlap[0])
    return found


# ---------------------------------------------------------------------------------------------------- floor and oracle
def random_maps(
    batches: Iterable[np.ndarray], *, num_parts: int, grid: tuple[int, int], seed: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Smooth random maps for each batch of rows, a function of (seed, row): what measures say of no knowledge at all."""
    for rows in batches:
        drawn = []
        for row in rows:
            generator = torch.Generator().manual_seed(rng.mix(seed, int(row)))
            coarse = torch.randn(1, num_parts + 1, _RANDOM_CELLS, _RANDOM_CELLS, generator=generator)
            fine = F.interpolate(coarse, size=grid, mode="bicubic", align_corners=False)
            drawn.append(torch.softmax(_RANDOM_SHARPNESS * fine, dim=1))
        yield rows, torch.cat(drawn)


def annotated_maps(
    batches: Iterable[np.ndarray], dataset: ImageDataset, *, framing: Framing
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """The annotated part masks themselves as maps: what a perfect segmentation would get."""
    for rows in batches:
        masks = _framed_masks(dataset, rows, framing, "part_masks").float()
        background = 1 - masks.amax(dim=1, keepdim=True)
        yield rows, torch.cat([masks, background], dim=1)
