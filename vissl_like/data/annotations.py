"""Keypoints and boxes in the pixels of the model's input, after a resize of the shorter side and a centre crop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Framing:
    """How an evaluation shows an image: its shorter side becomes `size`, then the middle `size` x `size` is kept."""

    size: int
    crop: bool = True
    #: Whether the crop also cuts off the width and height of boxes; the original program left those as they were.
    crop_extent: bool = True

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize."""
        short, long = min(height, width), max(height, width)
        other = int(self.size * long / short)
        return (self.size, other) if height <= width else (other, self.size)

    def offset(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns cut off at the top and at the left."""
        if not self.crop:
            return 0, 0
        new = self.resized(height, width)
        return round((new[0] - self.size) / 2.0), round((new[1] - self.size) / 2.0)

    def keypoints(self, points: np.ndarray, *, height: int, width: int) -> np.ndarray:
        """(P, 3) x, y, visible of an image of this height and width -> float64 (P, 3) in the framed one.

        A keypoint that the crop cuts off is not visible; its coordinates are those of the nearest point of the frame.
        """
        moved = np.array(points, dtype=np.float64)
        visible = moved[:, 2] > 0
        factor = self.size / min(height, width)
        top, left = self.offset(height, width)
        moved[:, 0] = moved[:, 0] * factor - left
        moved[:, 1] = moved[:, 1] * factor - top
        if self.crop:
            visible &= ((moved[:, :2] >= 0) & (moved[:, :2] <= self.size)).all(axis=1)
            moved[:, :2] = moved[:, :2].clip(0, self.size)
        moved[:, 2] = visible
        return moved

    def box(self, box: np.ndarray, *, height: int, width: int) -> np.ndarray:
        """(4,) x, y, width, height -> float64 (4,) in the framed image, cut off where the crop cuts."""
        factor = self.size / min(height, width)
        top, left = self.offset(height, width)
        start = np.asarray(box[:2], dtype=np.float64) * factor - (left, top)
        extent = np.asarray(box[2:], dtype=np.float64) * factor
        if self.crop:
            end = (start + extent).clip(0, self.size)
            start = start.clip(0, self.size)
            extent = np.maximum(end - start, 1.0) if self.crop_extent else extent
        return np.concatenate([start, extent])
