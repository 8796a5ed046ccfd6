"""How well discovered parts agree with annotated ones: clusters at keypoints, keypoint regression, foreground overlap.

Letters: B images, K foreground parts, P annotated keypoints; maps (B, K+1, h, w) with the background last. What is
added up over images is whole numbers (or kept per image), so results do not depend on the number of processes.

Protocols of PDiscoFormer (ECCV 2024) and iFAM; numbers are percent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

#: A part is used by the regression where its map exceeds this somewhere.
ACTIVE = 0.5
PCK_RADIUS = 0.1


# -------------------------------------------------------------------------------------------- clusters at keypoints
def keypoint_table(maps: Tensor, keypoints: Tensor, *, size: tuple[int, int]) -> np.ndarray:
    """Counts int64 (K+1, P): how often the part at a visible keypoint is k.

    `maps` (B, K+1, h, w) are enlarged to `size` (H, W) bilinearly; `keypoints` (B, P, 3) are x, y in its pixels and
    whether visible; the pixel that a keypoint lies in is looked up.
    """
    large = F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False)
    found = large.argmax(dim=1)
    height, width = size
    columns = keypoints[..., 0].floor().long().clamp(0, width - 1)
    rows = keypoints[..., 1].floor().long().clamp(0, height - 1)
    images = torch.arange(len(maps), device=found.device)[:, None].expand_as(rows)
    visible = keypoints[..., 2] > 0
    number = torch.arange(keypoints.shape[1], device=found.device).expand_as(rows)
    return _table(found[images, rows, columns][visible], number[visible], shape=(maps.shape[1], keypoints.shape[1]))


def mask_table(maps: Tensor, part_masks: Tensor) -> np.ndarray:
    """Counts int64 (K+1, G+1) over all pixels of annotated masks (B, G, H, W); the last column is where none is > 0.1."""
    size = (part_masks.shape[-2], part_masks.shape[-1])
    found = F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False).argmax(dim=1)
    background = torch.full_like(part_masks[:, :1], 0.1, dtype=torch.float32)
    annotated = torch.cat([part_masks.float(), background], dim=1).argmax(dim=1)
    return _table(found.flatten(), annotated.flatten(), shape=(maps.shape[1], part_masks.shape[1] + 1))


def _table(found: Tensor, annotated: Tensor, *, shape: tuple[int, int]) -> np.ndarray:
    counts = torch.bincount(found * shape[1] + annotated, minlength=shape[0] * shape[1])
    return counts.reshape(shape).cpu().numpy()


def normalized_mutual_information(table: np.ndarray) -> float:
    """Mutual information over the arithmetic mean of the entropies of a table of counts, in percent."""
    counts = table.astype(np.float64)
    total = counts.sum()
    if total == 0:
        return float("nan")
    joint, rows, columns = counts / total, counts.sum(1) / total, counts.sum(0) / total
    filled = joint > 0
    information = float((joint[filled] * np.log(joint[filled] / np.outer(rows, columns)[filled])).sum())
    mean_entropy = (_entropy(rows) + _entropy(columns)) / 2
    return 100.0 * max(information, 0.0) / mean_entropy if mean_entropy > 0 else 100.0


def _entropy(shares: np.ndarray) -> float:
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())


def adjusted_rand_index(table: np.ndarray) -> float:
    """Pairs on which both agree, corrected for chance (Hubert and Arabie, 1985), in percent."""
    counts = [[int(value) for value in row] for row in table.tolist()]  # exact, however many pixels
    total = sum(map(sum, counts))
    pairs = sum(value * (value - 1) // 2 for row in counts for value in row)
    by_row = sum(value * (value - 1) // 2 for value in (sum(row) for row in counts))
    by_column = sum(value * (value - 1) // 2 for value in (sum(column) for column in zip(*counts)))
    all_pairs = total * (total - 1) // 2
    if all_pairs == 0:
        return 100.0 if total else float("nan")
    expected = by_row * by_column / all_pairs
    largest = (by_row + by_column) / 2
    return 100.0 if largest == expected else 100.0 * (pairs - expected) / (largest - expected)


# ---------------------------------------------------------------------------------------------- keypoint regression
@dataclass(frozen=True)
class Centres:
    """Where parts and keypoints are, in units of each image's box: float64 (N, K, 2) and (N, P, 2).

    `active` (N, K): whether the part appears; `visible` (N, P): whether the keypoint does.
    """

    parts: np.ndarray
    active: np.ndarray
    keypoints: np.ndarray
    visible: np.ndarray

    @staticmethod
    def join(parts: list[Centres]) -> Centres:
        """Those of several batches in a row."""
        names = ("parts", "active", "keypoints", "visible")
        return Centres(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def centres(maps: Tensor, keypoints: Tensor, boxes: Tensor, *, size: tuple[int, int]) -> Centres:
    """Centroids of the K foreground maps and the keypoints (B, P, 3), in units of the boxes (B, 4) x, y, width, height.

    Keypoints and boxes are in pixels of the model's input of `size` (H, W). A pixel of a map stands at its index times
    the ratio of the sizes, without a shift by half a pixel, as in the original protocol.
    """
    foreground = maps[:, :-1].double()
    height, width = foreground.shape[-2:]
    mass = foreground.sum(dim=(2, 3)).clamp_min(torch.finfo(torch.float32).tiny)
    device = foreground.device
    columns = torch.arange(width, device=device, dtype=torch.float64) * (size[1] / width)
    rows = torch.arange(height, device=device, dtype=torch.float64) * (size[0] / height)
    x = (foreground.sum(2) * columns).sum(-1) / mass
    y = (foreground.sum(3) * rows).sum(-1) / mass
    corner, extent = boxes[:, None, :2].double(), boxes[:, None, 2:].double()
    return Centres(
        parts=((torch.stack([x, y], dim=-1) - corner) / extent).cpu().numpy(),
        active=(foreground.amax(dim=(2, 3)) > ACTIVE).cpu().numpy(),
        keypoints=((keypoints[..., :2].double() - corner) / extent).cpu().numpy(),
        visible=(keypoints[..., 2] > 0).cpu().numpy(),
    )


def keypoint_regression(fit: Centres, test: Centres) -> dict[str, float]:
    """Errors of linear regressions from part centres to keypoints, fitted on one set and measured on another.

    keypoint_error: mean distance in percent of the box over all visible keypoints (lower is better); keypoint_pck: share
    in percent of those nearer than 0.1 of the box; keypoint_error_of_mean: what predicting each keypoint's mean gives.
    Keypoints that are visible in no image of `fit` are left out.
    """
    errors, floor = [], []
    for number in range(fit.keypoints.shape[1]):
        seen, asked = fit.visible[:, number], test.visible[:, number]
        if not seen.any() or not asked.any():
            continue
        wanted = test.keypoints[asked, number]
        found = _regress(fit, test, seen=seen, asked=asked, number=number)
        errors.append(np.linalg.norm(found - wanted, axis=1))
        floor.append(np.linalg.norm(fit.keypoints[seen, number].mean(0) - wanted, axis=1))
    if not errors:
        return dict.fromkeys(("keypoint_error", "keypoint_pck", "keypoint_error_of_mean"), float("nan"))
    all_errors = np.concatenate(errors)
    return {
        "keypoint_error": 100.0 * float(all_errors.mean()),
        "keypoint_pck": 100.0 * float((all_errors < PCK_RADIUS).mean()),
        "keypoint_error_of_mean": 100.0 * float(np.concatenate(floor).mean()),
    }


def _regress(fit: Centres, test: Centres, *, seen: np.ndarray, asked: np.ndarray, number: int) -> np.ndarray:
    """Predicted keypoints (n, 2). Coordinates are standardised, parts that do not appear stand at 0, no intercept."""

    def inputs(of: Centres, rows: np.ndarray) -> np.ndarray:
        scaled = (of.parts[rows].reshape(int(rows.sum()), -1) - mean) / scale
        return np.where(np.repeat(of.active[rows], 2, axis=1), scaled, 0.0)

    mean, scale = _mean_and_scale(fit.parts[seen].reshape(int(seen.sum()), -1))
    of_target, target_scale = _mean_and_scale(fit.keypoints[seen, number])
    wanted = (fit.keypoints[seen, number] - of_target) / target_scale
    line = np.linalg.lstsq(inputs(fit, seen), wanted, rcond=None)[0]
    return inputs(test, asked) @ line * target_scale + of_target


def _mean_and_scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every column; 1 where only rounding makes the values differ."""
    mean, variance, rounding = values.mean(0), values.var(0), len(values) * np.finfo(values.dtype).eps
    is_constant = variance <= rounding * variance + (rounding * mean) ** 2
    return mean, np.where(is_constant, 1.0, np.sqrt(variance))


# ------------------------------------------------------------------------------------------------------- foreground
def overlap_counts(maps: Tensor, masks: Tensor) -> np.ndarray:
    """int64 (B, 4): pixels that are foreground in both, found only, annotated only, in neither.

    `masks` (B, H, W) bool; maps are enlarged to their size (bilinear, corners aligned); found: the background is not
    the largest.
    """
    size = (masks.shape[-2], masks.shape[-1])
    large = F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=True)
    found, annotated = large.argmax(dim=1) != maps.shape[1] - 1, masks.bool()
    pairs = (found & annotated, found & ~annotated, ~found & annotated, ~found & ~annotated)
    return torch.stack([pair.sum(dim=(1, 2)) for pair in pairs], dim=1).cpu().numpy()


def foreground_overlap(counts: np.ndarray) -> dict[str, float]:
    """IoU of foreground and background and Dice over all pixels, and the mean IoU per image, from counts (N, 4)."""
    both, found, annotated, neither = (int(value) for value in counts.sum(0))
    per_image = [_ratio(row[0], row[0] + row[1] + row[2]) for row in counts.tolist()]
    return {
        "foreground_iou": _ratio(both, both + found + annotated),
        "background_iou": _ratio(neither, neither + found + annotated),
        "foreground_dice": _ratio(2 * both, 2 * both + found + annotated),
        "foreground_iou_per_image": _mean([value for value in per_image if value == value]),
    }


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _ratio(part: int, whole: int) -> float:
    return 100.0 * part / whole if whole else float("nan")


# ------------------------------------------------------------------------------------------- part-logit thresholds
class LogitHistogram:
    """The raw part logits of the tokens of each part, in bins that are equally fine at every magnitude.

    A bin holds the floats that share sign, exponent and the first 11 bits of the fraction (bits=20), so a quantile is
    right to 1 part in 2048, whatever the number of tokens; memory is 8 MB per part and histograms of several processes
    add up.
    """

    def __init__(self, num_parts: int, *, bits: int = 20) -> None:
        self._bits = bits
        self.counts = np.zeros((num_parts, 1 << bits), dtype=np.int64)

    def add(self, part_dot: Tensor, maps: Tensor, *, own: bool = True) -> None:
        """Count a batch: `part_dot` and `maps` (B, K+1, h, w); a token belongs to its largest map. own=False: the others."""
        owner = maps.argmax(dim=1)
        for part in range(len(self.counts)):
            values = part_dot[:, part][(owner == part) == own].float().cpu().numpy()
            self.counts[part] += np.bincount(self._bins(values), minlength=self.counts.shape[1])

    def _bins(self, values: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(values).view(np.uint32)
        ordered = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))  # rises with the value
        return (ordered >> (32 - self._bits)).astype(np.int64)

    def _edges(self, numbers: np.ndarray) -> np.ndarray:
        """The smallest value of these bins."""
        ordered = numbers.astype(np.uint32) << np.uint32(32 - self._bits)
        return (
            np.where(ordered >> 31 == 1, ordered & np.uint32(0x7FFFFFFF), ~ordered).astype(np.uint32).view(np.float32)
        )

    def quantile(self, part: int, q: float) -> float:
        """The logit below which a share q of the part's tokens lies; -inf for a part that has none."""
        total = int(self.counts[part].sum())
        if total == 0:
            return float("-inf")
        number = int(np.searchsorted(np.cumsum(self.counts[part]), max(1, int(np.ceil(q * total)))))
        return float(self._edges(np.array([number]))[0])

    def spread(self, part: int) -> tuple[float, float]:
        """The smallest and the largest value, to the width of a bin; (0, 0) where there are none."""
        used = np.flatnonzero(self.counts[part])
        return tuple(self._edges(used[[0, -1]]).tolist()) if len(used) else (0.0, 0.0)

    def coarse(self, part: int, edges: np.ndarray) -> list[int]:
        """Counts between neighbouring edges, for a figure."""
        used = np.flatnonzero(self.counts[part])
        values = np.clip(self._edges(used), edges[0], edges[-1])
        return [int(count) for count in np.histogram(values, edges, weights=self.counts[part][used])[0]]
