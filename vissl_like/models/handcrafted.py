"""Trunks without parameters: controls that go through the same evaluation as networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Luma weights of ITU-R BT.601, as Pillow's conversion to grey.
GREY = (0.299, 0.587, 0.114)


class RawPixels(nn.Module):
    """images (B, C, H, W) -> (B, C*H*W), the pixels themselves; `size` resizes to a square of that side first."""

    def __init__(self, *, size: int | None = None, in_channels: int = 3) -> None:
        super().__init__()
        if size is not None and size < 1:
            raise ValueError(f"size={size} must be at least 1 pixel")
        self.size = size
        self.in_channels = in_channels

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            side = (self.size, self.size)
            images = functional.interpolate(images, size=side, mode="bilinear", align_corners=False, antialias=True)
        return torch.flatten(images, 1)


class GreyHistogram(nn.Module):
    """images (B, C, H, W) -> (B, bins), the share of pixels in each interval of grey.

    `range` holds the grey values of the outer borders, in the units of the images: (0, 1) without Normalize. What lies
    outside counts in the outer bins.
    """

    def __init__(self, *, bins: int = 16, range: Sequence[float] = (0.0, 1.0), in_channels: int = 3) -> None:
        super().__init__()
        if bins < 1 or len(range) != 2 or not range[0] < range[1]:
            raise ValueError(f"bins={bins} must be at least 1 and range={list(range)} two rising numbers")
        self.bins = bins
        self.low, self.high = float(range[0]), float(range[1])
        self.in_channels = in_channels

    def forward(self, images: Tensor) -> Tensor:
        channels = images.shape[1]
        weights = GREY if channels == 3 else (1.0 / channels,) * channels
        grey = sum(weight * images[:, c] for c, weight in enumerate(weights))  # (B, H, W)
        place = (torch.as_tensor(grey).flatten(1) - self.low) / (self.high - self.low) * self.bins
        index = place.floor().clamp(0, self.bins - 1).long()
        # Counts in float32 whatever the images are: half precision cannot count beyond 256.
        counts = torch.zeros(len(images), self.bins, device=images.device)
        counts = counts.scatter_add(1, index, torch.ones_like(index, dtype=counts.dtype))
        return counts / index.shape[1]
