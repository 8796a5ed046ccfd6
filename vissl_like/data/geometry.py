"""Crop, resize and flip in one step on uint8: what a list of transforms begins with, without a PIL image in between.

The result equals that of Pillow (crop, antialiased resize, flip) but for a rounding now and then: torch's kernel keeps 16
bits of each weight where Pillow keeps 22. Random numbers are drawn by torchvision's own transforms in their own order, so the
same seed gives the same crop.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vissl_like.data.decode import Encoded

#: Factors by which a JPEG can be made smaller while it is decoded.
_REDUCTIONS = (8, 4, 2)
#: A reduced JPEG still has at least this many pixels for each one of the result, in each direction.
HEADROOM = 2

#: What torch.nn.functional.interpolate(..., antialias=True) calls; these take the place of the result.
_KERNELS = {"bilinear": torch.ops.aten._upsample_bilinear2d_aa, "bicubic": torch.ops.aten._upsample_bicubic2d_aa}

_ONE = torch.empty(1)


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Placement(NamedTuple):
    """What is done to one image: `source` of it is resized to `size`, `window` of that is kept, and mirrored if `flip`."""

    source: Box
    size: tuple[int, int]
    window: Box
    flip: bool


class FusedGeometry:
    """RandomResizedCrop or Resize, then CenterCrop and RandomHorizontalFlip if given, as one step on an encoded image."""

    def __init__(self, transforms: Sequence[Any], *, mode: str, use_reduced: bool) -> None:
        """`transforms`: the torchvision.transforms.v2 objects that this replaces. `mode`: bilinear or bicubic.

        `use_reduced`: decode a large JPEG at 1/2, 1/4 or 1/8 of its size where HEADROOM is left.
        """
        names = {type(transform).__name__: transform for transform in transforms}
        self._random_crop, self._resize = names.get("RandomResizedCrop"), names.get("Resize")
        self._center, self._flip = names.get("CenterCrop"), names.get("RandomHorizontalFlip")
        self._mode, self._use_reduced = mode, use_reduced
        last = self._center or self._random_crop or self._resize
        #: Height and width of every result; None where they follow from the image.
        self.size: tuple[int, int] | None = tuple(last.size) if last is not None and len(last.size) == 2 else None
        self.num_replaced = len(transforms)

    def __call__(self, encoded: Encoded) -> torch.Tensor | None:
        """place() and apply() in one; None where only the transforms themselves know what to do."""
        width, height = encoded.size
        placement = self.place(height, width)
        return None if placement is None else self.apply(encoded, placement)

    def apply(self, encoded: Encoded, placement: Placement, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 (3, H, W), in memory as (H, W, 3); written to `out` (H, W, 3) if given. Raises decode.Unreadable."""
        width, height = encoded.size
        source, kept = placement.source, placement.window
        is_final = not placement.flip and placement.size == (kept.height, kept.width)
        reduce = _reduction(placement) if self._use_reduced else 1
        pixels = encoded.pixels(reduce=reduce)
        if reduce > 1 and pixels.shape[:2] != (height, width):
            found = _resize_reduced(pixels, placement, reduce=reduce, mode=self._mode)
        else:
            part = pixels[source.top : source.top + source.height, source.left : source.left + source.width]
            found = resize(part, placement.size, mode=self._mode, out=out if is_final else None)
        found = found[..., kept.top : kept.top + kept.height, kept.left : kept.left + kept.width]
        found = found.flip(-1) if placement.flip else found
        if out is None:
            return found.contiguous(memory_format=torch.channels_last)[0]
        if found.data_ptr() != out.data_ptr():
            out.copy_(found[0].permute(1, 2, 0))
        return out.permute(2, 0, 1)

    def place(self, height: int, width: int) -> Placement | None:
        """Where one image of this size goes; None where only the transforms know it, then nothing was drawn.

        Draws from torch's global generator what the transforms would draw.
        """
        if self._random_crop is not None:
            size = tuple(self._random_crop.size)
            source = Box(**self._random_crop.make_params([_ONE.expand(3, height, width)]))
        else:
            assert self._resize is not None
            size = resized(height, width, size=self._resize.size)
            source = Box(0, 0, height, width)
        window = Box(0, 0, *size)
        if self._center is not None:
            wanted = tuple(self._center.size)
            if wanted[0] > size[0] or wanted[1] > size[1]:
                return None  # torchvision pads with black
            # Python's round(), as in torchvision: halves go to the even number.
            top, left = (round((side - part) / 2.0) for side, part in zip(size, wanted))
            window = Box(top, left, *wanted)
        flip = self._flip is not None and bool(torch.rand(1) < self._flip.p)
        return Placement(source, size, window, flip)


def find_fused(transforms: Sequence[Any], *, use_reduced: bool = False) -> FusedGeometry | None:
    """The fused form of the transforms that a list begins with; None where it begins with others."""
    if not transforms:
        return None
    from torchvision.transforms import v2

    if type(transforms[0]) not in (v2.RandomResizedCrop, v2.Resize):
        return None
    first = transforms[0]
    mode = _mode_of(first)
    if mode is None or getattr(first, "max_size", None) is not None:
        return None
    count = 1
    if isinstance(first, v2.Resize) and count < len(transforms) and type(transforms[count]) is v2.CenterCrop:
        count += 1
    if count < len(transforms) and type(transforms[count]) is v2.RandomHorizontalFlip:
        count += 1
    return FusedGeometry(transforms[:count], mode=mode, use_reduced=use_reduced)


def _mode_of(transform: Any) -> str | None:
    """How torch calls this transform's interpolation; None for those that it cannot do as Pillow does."""
    given = transform.interpolation
    word = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}.get(given, given)
    word = getattr(word, "value", word)
    return word if word in ("bilinear", "bicubic") else None


def resized(height: int, width: int, *, size: Sequence[int]) -> tuple[int, int]:
    """Height and width that torchvision's Resize gives: `size` is both, or the shorter side (fractions cut off)."""
    if len(size) == 2:
        return size[0], size[1]
    short, long = min(height, width), max(height, width)
    new_long = int(size[0] * long / short)
    return (new_long, size[0]) if width <= height else (size[0], new_long)


def resize(pixels: np.ndarray, size: tuple[int, int], *, mode: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 (H, W, 3) -> uint8 (1, 3, *size), in memory (H, W, 3) as well, antialiased like Pillow.

    `out` (*size, 3) is written to if there is anything to compute.
    """
    height, width = pixels.shape[:2]
    passes = [size]
    if height > size[0] and height - size[0] > 2 * (width - size[1]) and _has_vertical_first():
        passes = [(size[0], width), size]
    # torch would copy a part of an image into planes, and its answer back: dearer than the resize itself.
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    kernel = _KERNELS[mode].out
    for target in passes:
        if image.shape[-2:] != target:
            made = torch.empty((*target, 3), dtype=torch.uint8) if out is None or target != size else out
            image = kernel(image, target, False, None, None, out=made.permute(2, 0, 1)[None])
    return image


@functools.lru_cache(maxsize=1)
def _has_vertical_first() -> bool:
    """Whether Pillow resizes tall images along y first, as it does from version 13 on; torch always begins with x.

    Between the two directions values are rounded to 8 bits, so the order is seen in the last bit of many pixels.
    """
    noise = np.random.default_rng(0).integers(0, 256, (64, 16, 3), dtype=np.uint8)
    image, how = Image.fromarray(noise), Image.Resampling.BILINEAR
    in_one, by_hand = image.resize((12, 16), how), image.resize((16, 16), how).resize((12, 16), how)
    return bool(np.array_equal(np.asarray(in_one), np.asarray(by_hand)))


def _reduction(placement: Placement) -> int:
    source, size = placement.source, placement.size
    room = min(source.height / size[0], source.width / size[1])
    return next((factor for factor in _REDUCTIONS if room >= HEADROOM * factor), 1)


def _resize_reduced(pixels: np.ndarray, placement: Placement, *, reduce: int, mode: str) -> torch.Tensor:
    """As resize() of the source box, whose edges may lie inside a pixel of the reduced image: Pillow can do that."""
    box = placement.source
    top, left, bottom, right = (
        side / reduce for side in (box.top, box.left, box.top + box.height, box.left + box.width)
    )
    rows = slice(int(top), int(np.ceil(bottom)))
    columns = slice(int(left), int(np.ceil(right)))
    part = pixels[rows, columns]
    if all(side.is_integer() for side in (top, left, bottom, right)):
        return resize(part, placement.size, mode=mode)
    inner = (left - columns.start, top - rows.start, right - columns.start, bottom - rows.start)
    how = Image.Resampling.BILINEAR if mode == "bilinear" else Image.Resampling.BICUBIC
    height, width = placement.size
    found = np.array(Image.fromarray(part).resize((width, height), how, box=inner))
    return torch.from_numpy(found).permute(2, 0, 1)[None]
