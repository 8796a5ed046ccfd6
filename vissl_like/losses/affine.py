"""Affine transformations for the equivariance loss: drawn once per batch, applied to images, undone on part maps.

Conventions of torchvision's `affine`: about the centre; angles clockwise in degrees; shifts in pixels to the right and
down; bilinear; zeros come in from outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T

from vissl_like.losses.parts import exact, full


@dataclass(frozen=True)
class Affine:
    """A turn by `angle` degrees and a scaling about the centre, then a shift in pixels of the image."""

    angle: float
    shift_x: float
    shift_y: float
    scale: float


def draw_affine(
    size: tuple[int, int],
    *,
    degrees: float,
    translate: tuple[float, float],
    scale: tuple[float, float],
    generator: torch.Generator | None = None,
) -> Affine:
    """Uniform draws for images of `size` (H, W): whole pixels up to translate (x, y) times the side.

    Without a generator from torch's global one, in the order angle, x, y, scale, as torchvision's RandomAffine.
    """
    height, width = size
    reach_x, reach_y = translate[0] * width, translate[1] * height

    def draw(low: float, high: float) -> float:
        return float(torch.empty(1).uniform_(low, high, generator=generator))

    return Affine(
        angle=draw(-degrees, degrees),
        shift_x=round(draw(-reach_x, reach_x)),
        shift_y=round(draw(-reach_y, reach_y)),
        scale=draw(*scale),
    )


def warp(images: Tensor, affine: Affine) -> Tensor:
    """Transformed images (B, C, H, W), in their own precision."""
    return _torchvision(images, affine, InterpolationMode.BILINEAR)


def warp_back(maps: Tensor, affine: Affine, *, image_size: tuple[int, int], method: str = "bilinear") -> Tensor:
    """Maps (B, K, h, w) of transformed images of `image_size` (H, W), put back to where they are in the images.

    bilinear: one resampling. nearest_two_step: as the original, first the shift (scaled by the ratio of widths in both
    directions), then turn and scale, both with the nearest neighbour.
    """
    maps = full(maps)
    if method == "nearest_two_step":
        x, y = shift_in_cells(affine, width=maps.shape[-1], image_width=image_size[1])
        shift = Affine(0.0, -x, -y, 1.0)
        turn = Affine(-affine.angle, 0.0, 0.0, 1 / affine.scale)
        return _torchvision(_torchvision(maps, shift, InterpolationMode.NEAREST), turn, InterpolationMode.NEAREST)
    grid = _targets(maps, affine, image_size).expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def shift_in_cells(affine: Affine, *, width: int, image_width: int) -> tuple[float, float]:
    """The shift (x, y) on maps of this width, by the ratio of the widths in both directions, as in the original."""
    ratio = width / image_width
    return affine.shift_x * ratio, affine.shift_y * ratio


def inside(maps: Tensor, affine: Affine, *, image_size: tuple[int, int]) -> Tensor:
    """(1, 1, h, w): 1 where a position of the maps is still in view after the transformation, else 0."""
    targets = _targets(full(maps), affine, image_size)
    return (targets.abs() <= 1).all(dim=-1)[:, None].to(targets.dtype)


def _targets(maps: Tensor, affine: Affine, size: tuple[int, int]) -> Tensor:
    """(1, h, w, 2): where the transformation puts each position (x, y), sides of the image running from -1 to 1."""
    height, width = size
    cos, sin = (affine.scale * f(math.radians(affine.angle)) for f in (math.cos, math.sin))
    rows = [
        [cos, -sin * height / width, 2 * affine.shift_x / width],
        [sin * width / height, cos, 2 * affine.shift_y / height],
    ]
    matrix = torch.tensor([rows], dtype=maps.dtype, device=maps.device)
    with exact(maps):  # coordinates in half precision would be off by pixels
        return F.affine_grid(matrix, [1, 1, *maps.shape[-2:]], align_corners=False)


def _torchvision(images: Tensor, affine: Affine, interpolation: InterpolationMode) -> Tensor:
    shift = [affine.shift_x, affine.shift_y]
    with exact(images):
        return T.affine(images, affine.angle, shift, affine.scale, [0.0, 0.0], interpolation=interpolation)
