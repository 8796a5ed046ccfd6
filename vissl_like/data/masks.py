"""An image and the mask of its object through one list of transforms: what moves pixels moves both, colours change in the
image alone.

A mask is moved as a black and white image would be, with the image's own interpolation, and cut at one half; so its edge
stays where the object's edge is. What comes in from outside of the image is no object.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from vissl_like.data.transforms import CropOnMask

_CONTAINERS = (v2.Compose, v2.RandomApply, v2.RandomChoice, v2.RandomOrder)
#: Transforms of torchvision that would warn of a mask, or make something else of it.
_FOR_IMAGES = (v2.RandomErasing, v2.ToPureTensor)


class ObjectMask(tv_tensors.Mask):
    """A mask, uint8 (1, H, W) of 0 and 255, as torchvision's transforms take it beside an image."""

    @classmethod
    def of(cls, mask: np.ndarray) -> ObjectMask:
        """From bool (H, W)."""
        return torch.from_numpy(np.asarray(mask, dtype=np.uint8)[None] * np.uint8(255)).as_subclass(cls)

    def is_object(self) -> torch.Tensor:
        """bool (H, W)."""
        return self.as_subclass(torch.Tensor)[0] > 127


def _move(functional: Callable[..., Any], mask: ObjectMask, *given: Any, **options: Any) -> ObjectMask:
    """What `functional` makes of the mask as a grey picture, with nothing around it."""
    if "fill" in options:
        options["fill"] = 0
    moved = functional(Image.fromarray(mask.as_subclass(torch.Tensor)[0].numpy()), *given, **options)
    return ObjectMask.of(np.asarray(moved) > 127)


# Those that interpolate or fill; crops and flips of torchvision's own masks are right for these, too.
for _functional in ("resize", "resized_crop", "rotate", "affine", "perspective", "elastic", "pad"):
    _function = getattr(v2.functional, _functional)
    v2.functional.register_kernel(_function, ObjectMask)(functools.partial(_move, _function))


class ImageOnly:
    """A transform that changes nothing but colours, or the type of the image."""

    def __init__(self, step: Callable[[Any], Any]) -> None:
        self._step = step

    def __call__(self, image: Any, mask: ObjectMask) -> tuple[Any, ObjectMask]:
        return self._step(image), mask


def joint(step: Any) -> Callable[[Any, ObjectMask], tuple[Any, ObjectMask]]:
    """A transform of images as one of (image, mask)."""
    if isinstance(step, _CONTAINERS):
        step.transforms = [joint(inner) for inner in step.transforms]
        return step
    takes_both = isinstance(step, CropOnMask | v2.Transform) and not isinstance(step, _FOR_IMAGES)
    return step if takes_both else ImageOnly(step)
