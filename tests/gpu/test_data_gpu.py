"""Colour and blur on a GPU: the same as on the CPU, and each image for itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vissl_like.core import rng
from vissl_like.data.views import Views, build_views

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TRANSFORMS: list[dict[str, Any]] = [
    {"name": "ImgPilColorDistortion", "strength": 1.0},
    {"name": "RandomApply", "transforms": [{"name": "GaussianBlur", "kernel_size": 9}], "p": 0.5},
    {"name": "ImgPilGaussianBlur", "p": 0.5},
    {"name": "RandomSolarize", "threshold": 128, "p": 0.2},
    {"name": "RandomHorizontalFlip"},
    {"name": "ToTensor"},
    {"name": "Normalize", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
]


def example(count: int = 32) -> tuple[Views, torch.Tensor, torch.Tensor]:
    """Views, images and their numbers."""
    views = build_views(TRANSFORMS, key="T", augment_on_device=True)
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (count, 3, 48, 40)).astype(np.uint8))
    rows = []
    for row in range(count):
        with rng.sample_scope(0, 0, row):
            rows.append(views.draw())
    return views, images, torch.from_numpy(np.stack(rows))


def test_equals_the_cpu() -> None:
    views, images, draws = example()
    on_cpu = views.device_transform(images, draws)
    for batch in (images.cuda(), images.cuda().contiguous(memory_format=torch.channels_last)):
        with torch.autocast("cuda", dtype=torch.bfloat16):  # must not reach the arithmetic of pixels
            found = views.device_transform(batch, draws)
        assert found.dtype == torch.float32 and found.is_contiguous()
        # A pixel at the threshold of solarisation may fall on either side of it.
        assert ((found.cpu() - on_cpu).abs() > 1e-3).double().mean() < 1e-3


def test_an_image_does_not_depend_on_its_batch() -> None:
    views, images, draws = example()
    whole = views.device_transform(images.cuda(), draws)
    for rows in ([3], [31, 0, 7], list(range(16, 32))):
        assert torch.equal(views.device_transform(images[rows].cuda(), draws[rows]), whole[rows])
