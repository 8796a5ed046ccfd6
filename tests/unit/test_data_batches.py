"""Several rows at once are the same as one by one: every kind of file, damaged ones, any order in memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vissl_like.config.schema_data import Data
from vissl_like.core import rng
from vissl_like.data.dataset import build_dataset
from vissl_like.data.images import ImageDataset
from vissl_like.data.loader import close_workers, eval_batches
from vissl_like.data.views import build_views

COUNT = 40
CROP: list[dict[str, Any]] = [{"name": "RandomResizedCrop", "size": 12}, {"name": "RandomHorizontalFlip"}]
COLOUR: dict[str, Any] = {"name": "ColorJitter", "brightness": 0.4, "hue": 0.1}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """JPEGs of several kinds, PNGs and three damaged files, in two classes."""
    numbers = np.random.RandomState(0)
    root = tmp_path / "images"
    for row in range(COUNT):
        file = root / "ab"[row % 2] / f"{row:02d}.{('jpg', 'jpg', 'png', 'jpeg')[row % 4]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(numbers.randint(0, 256, (6, 8, 3)).astype(np.uint8))
        image = small.resize((40 + row, 30 + row), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 8
        options = {1: {"progressive": True}, 3: {"exif": exif}}.get(row % 4, {})
        (image.convert("L") if row % 5 == 0 else image).save(file, **options)
    for row, content in ((4, b""), (17, None), (26, b"text")):
        file = next(root.rglob(f"{row:02d}.*"))
        file.write_bytes(file.read_bytes()[:-300] if content is None else content)
    return root


def build(images: Path, transforms: list[dict[str, Any]], **options: Any) -> ImageDataset:
    split = {"DATA_SOURCES": ["disk_folder"], "DATA_PATHS": [str(images)], "TRANSFORMS": transforms}
    return build_dataset(Data(TRAIN=split, MAX_BAD_FRACTION=0.2, **options), "TRAIN", seed=9)


LISTS = {
    "one step": (CROP, {}),
    "one step, the rest on the device": ([*CROP, COLOUR], {"AUGMENT_ON_DEVICE": True}),
    "colour in the worker": ([*CROP, COLOUR], {}),
    "evaluation": ([{"name": "Resize", "size": 14}, {"name": "CenterCrop", "size": 12}], {}),
    "padded": ([{"name": "Resize", "size": 10}, {"name": "CenterCrop", "size": 12}], {}),
    "no fused step": ([{"name": "RandomCrop", "size": 12}], {}),
}


@pytest.mark.parametrize("name", LISTS)
def test_at_once_or_one_by_one(images: Path, name: str) -> None:
    transforms, options = LISTS[name]
    together, single = build(images, transforms, **options), build(images, transforms, **options)
    order = rng.permutation(1, 0, COUNT)
    for found, row in zip(together.samples(2, order), order):
        expected = single.sample(2, int(row))
        assert torch.equal(found.data, expected.data) and found.used == expected.used
        assert found.label == expected.label and found.bad == expected.bad
        assert np.array_equal(found.draws, expected.draws)
    bad = {row for sample in together.samples(0, range(COUNT)) for row in sample.bad}
    assert {Path(together.file(row)).stem for row in bad} == {"04", "17", "26"}


def test_pixels_are_those_of_pillow_whatever_replaced_what(images: Path) -> None:
    dataset, views = build(images, CROP), build_views(CROP, key="T")
    for row, found in enumerate(dataset.samples(0, range(COUNT))):
        with rng.sample_scope(9, 0, row):
            expected, _ = views(dataset.image(found.used))
        assert (found.data.int() - expected.int()).abs().double().mean() < 0.05


def test_batches_of_one_kind_and_mixed_ones(images: Path) -> None:
    """How a batch lies in memory is the loader's business; what the model gets is always the same."""
    dataset = build(images, CROP)
    pillow = dataset.device_transform(torch.stack([sample.data for sample in dataset.samples(0, range(COUNT))]))
    for workers in (0, 1):
        batches = list(eval_batches(dataset, batch=8, workers=workers, method="fork"))
        assert all(batch["data"].shape == (8, 3, 12, 12) for batch in batches)
        seen = [dataset.device_transform(batch["data"]) for batch in batches]
        assert all(images.is_contiguous() for images in seen) and torch.equal(torch.cat(seen), pillow)
    close_workers(dataset)


def test_global_generators_go_on(images: Path) -> None:
    """Without loader processes, reading must not disturb what the model draws."""
    dataset = build(images, CROP)

    def numbers() -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    undisturbed = [numbers() for _ in range(2)]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = numbers()
    dataset.samples(3, range(COUNT))
    assert [first, numbers()] == undisturbed


def test_seeding_torch_alone_gives_torchs_numbers() -> None:
    with rng.preserved():
        rng.seed_sample(3, 4, 5, only_torch=True)
        alone = torch.rand(3)
    with rng.sample_scope(3, 4, 5):
        assert torch.equal(torch.rand(3), alone)
