"""A quick self-supervised warm-up: from an image with holes, the mean colours around each cell at three scales.

It gives a small trunk features of local appearance before parts are sought; no labels are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vissl_like.models.colour import SCALES
from vissl_like.tasks.request import TaskRequest

#: Share of the area that is hidden, and the side of a hole in pixels.
HOLE_SHARE, HOLE_PIXELS = 0.4, 8


class LocalColour(nn.Module):
    """Mean squared error of the colours of all cells; images have holes of 8 x 8 pixels in 40 % of their area."""

    draws_in_test = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def build(cls, model: nn.Module, request: TaskRequest) -> LocalColour:
        """The task of a run."""
        return cls(model)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The training step: {"loss": ()}."""
        return {"loss": self._loss(self.model, batch["data"])}

    training_step = forward

    def _loss(self, model: nn.Module, images: Tensor) -> Tensor:
        found = model(_with_holes(images))
        return F.mse_loss(found.float(), colours(images, tuple(found.shape[2:])))

    def predict(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The loss of a batch, ()."""
        return self._loss(model, batch["data"])

    def score(self, outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The loss itself is what the test measures."""
        return outputs

    def test_metrics(self, prefix: str) -> dict[str, float]:
        return {}

    def train_metrics(self, prefix: str) -> dict[str, float]:
        return {}

    def running_state(self) -> list[dict[str, Any]]:
        return []

    def load_running_state(self, states: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        pass


def colours(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean colours around each cell of the grid at every scale: (B, 3 * scales, h, w)."""
    cells = F.adaptive_avg_pool2d(images.float(), grid)
    around = [F.avg_pool2d(cells, side, stride=1, padding=side // 2, count_include_pad=False) for side in SCALES]
    return torch.cat(around, dim=1)


def _with_holes(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) with square holes filled with the image's mean colour."""
    batch, _, height, width = images.shape
    grid = (-(-height // HOLE_PIXELS), -(-width // HOLE_PIXELS))
    is_hole = (torch.rand(batch, 1, *grid, device=images.device) < HOLE_SHARE).float()
    large = F.interpolate(is_hole, scale_factor=HOLE_PIXELS, mode="nearest")[..., :height, :width]
    return torch.where(large > 0, images.mean(dim=(2, 3), keepdim=True), images)
