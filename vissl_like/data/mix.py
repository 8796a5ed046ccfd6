"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a training batch, as timm's Mixup draws and does it.

Image i is mixed with image B - 1 - i. Of a batch of odd size, which timm refuses, the middle image is its own partner.
Letters: B images, C classes, lambda the share of image i itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vissl_like.config.schema_data import Mix
from vissl_like.core import rng
from vissl_like.errors import ConfigError

#: (images (B, 3, H, W) float, labels (B,) int64) -> (mixed images, targets (B, C) float32).
Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Box = tuple[int, int, int, int]  # top, bottom, left, right


def make_mix(options: Mix, *, num_classes: int, smoothing: float = 0.0) -> Mixer | None:
    """What mixes a batch on its own device; None if nothing is to be mixed. `smoothing` (label smoothing) is in the targets.

    Draws from numpy's global generator, which rng.seed_step() seeds. Raises ConfigError.
    """
    limits = options.CUTMIX_MINMAX
    if limits and (len(limits) != 2 or not 0 <= limits[0] <= limits[1] <= 1):
        raise ConfigError(
            f"config.DATA.MIX.CUTMIX_MINMAX={limits}: the least and the largest share of a side, such as [0.2, 0.8]; "
            "[] for an area drawn by CUTMIX."
        )
    if not (options.MIXUP or options.CUTMIX or limits):
        return None
    return _Mixer(options, num_classes=num_classes, smoothing=smoothing)


class _Mixer:
    def __init__(self, options: Mix, *, num_classes: int, smoothing: float) -> None:
        self._options, self._num_classes, self._smoothing = options, num_classes, smoothing
        self._limits = options.CUTMIX_MINMAX
        self._cutmix = 1.0 if self._limits else options.CUTMIX

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        size = len(images)
        if self._options.MODE == "batch":
            shares, boxes = self._draw_once(size, images.shape[-2:])
        else:
            shares, boxes = self._draw_each(size, images.shape[-2:])
        own = torch.from_numpy(shares).to(images.device)
        targets = _smooth(labels, self._num_classes, self._smoothing)
        return _mixed(images, own, boxes), targets * own[:, None] + targets.flip(0) * (1 - own[:, None])

    def _draw_once(self, size: int, shape: torch.Size) -> tuple[np.ndarray, list[Box | None]]:
        """lambda (B,) float32 and the box of each image, None for mixup: the same for all."""
        chance = rng.global_numpy()
        if chance.rand() >= self._options.PROB:
            return np.ones(size, dtype=np.float32), [None] * size
        both = self._options.MIXUP > 0 and self._cutmix > 0
        cuts = chance.rand() < self._options.SWITCH_PROB if both else self._cutmix > 0
        alpha = self._cutmix if cuts else self._options.MIXUP
        share, box = float(chance.beta(alpha, alpha)), None
        if cuts and share < 1:
            box, share = self._box(share, shape)
        return np.full(size, share, dtype=np.float32), [box] * size

    def _draw_each(self, size: int, shape: torch.Size) -> tuple[np.ndarray, list[Box | None]]:
        """As _draw_once(), for each image or for each pair."""
        chance, options = rng.global_numpy(), self._options
        count = size // 2 if options.MODE == "pair" else size
        if options.MIXUP > 0 and self._cutmix > 0:
            cuts = chance.rand(count) < options.SWITCH_PROB
            by_cut = chance.beta(self._cutmix, self._cutmix, size=count)
            drawn = np.where(cuts, by_cut, chance.beta(options.MIXUP, options.MIXUP, size=count))
        else:
            alpha = self._cutmix or options.MIXUP
            cuts, drawn = np.full(count, self._cutmix > 0), chance.beta(alpha, alpha, size=count)
        shares = np.where(chance.rand(count) < options.PROB, drawn, 1).astype(np.float32)
        boxes: list[Box | None] = [None] * count
        for i in np.flatnonzero(cuts & (shares != 1)):
            boxes[i], shares[i] = self._box(float(shares[i]), shape)
        if options.MODE == "elem":
            return shares, boxes
        middle = size % 2  # it has no partner
        return (
            np.concatenate([shares, np.ones(middle, np.float32), shares[::-1]]),
            [*boxes, *[None] * middle, *boxes[::-1]],
        )

    def _box(self, share: float, shape: torch.Size) -> tuple[Box, float]:
        """The rectangle that comes from the other image, and the share of the pixels that are left."""
        chance, (height, width) = rng.global_numpy(), shape
        if self._limits:
            low, high = self._limits
            rows, columns = (chance.randint(int(side * low), max(int(side * high), int(side * low) + 1))
                             for side in (height, width))  # fmt: skip
            top, left = chance.randint(0, height - rows + 1), chance.randint(0, width - columns + 1)
            box = (top, top + rows, left, left + columns)
        else:
            rows, columns = (int(side * np.sqrt(1 - share)) for side in (height, width))
            y, x = chance.randint(0, height), chance.randint(0, width)
            box = (
                max(y - rows // 2, 0), min(y + (rows + 1) // 2, height),
                max(x - columns // 2, 0), min(x + (columns + 1) // 2, width),
            )  # fmt: skip
        top, bottom, left, right = box
        return box, 1 - (bottom - top) * (right - left) / (height * width)


def _mixed(images: Tensor, own: Tensor, boxes: list[Box | None]) -> Tensor:
    """Each image with its rectangle of the other one, or its share `own` (B,) of both."""
    others = images.flip(0)
    is_cut = torch.tensor([box is not None for box in boxes], device=images.device)
    share = torch.where(is_cut, 1, own).to(images.dtype).view(-1, 1, 1, 1)
    result = images * share + others * (1 - share)
    if boxes[0] is not None and boxes.count(boxes[0]) == len(boxes):
        top, bottom, left, right = boxes[0]
        result[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        return result
    for i, box in enumerate(boxes):
        if box is not None:
            top, bottom, left, right = box
            result[i, :, top:bottom, left:right] = others[i, :, top:bottom, left:right]
    return result


def _smooth(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """One-hot (B, C), float32, with `smoothing` of the weight spread over all classes."""
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / num_classes)
