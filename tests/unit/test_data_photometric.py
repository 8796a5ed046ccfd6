"""Augmentation on batches: torchvision's arithmetic, torchvision's random numbers, and each image for itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vissl_like.config.plan import make_plan
from vissl_like.config.schema import Config
from vissl_like.config.schema_data import Data
from vissl_like.core import rng
from vissl_like.core.evaluation import Arithmetic
from vissl_like.data import photometric
from vissl_like.data.dataset import build_dataset
from vissl_like.data.loader import close_workers, eval_batches, train_batches
from vissl_like.data.views import Views, build_views

KEY = "config.DATA.TRAIN.TRANSFORMS"
LEVEL = 1 / 255


def t(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, **arguments}


JITTER = t("ColorJitter", brightness=0.4, contrast=[0.5, 1.6], saturation=0.8, hue=0.3)
BLUR = t("RandomApply", transforms=[t("GaussianBlur", kernel_size=[5, 9], sigma=[0.1, 2.0])], p=0.6)
LISTS: dict[str, list[dict[str, Any]]] = {
    "jitter": [JITTER],
    "hue alone": [t("ColorJitter", hue=0.5)],
    "contrast alone": [t("ColorJitter", contrast=[1.4, 1.4])],
    "grey": [t("RandomGrayscale", p=0.5)],
    "solarize": [t("RandomSolarize", threshold=100, p=0.5)],
    "blur": [BLUR],
    "blur at once": [t("GaussianBlur", kernel_size=7)],
    "sometimes jitter, then flip": [t("RandomApply", transforms=[JITTER], p=0.5), t("RandomHorizontalFlip")],
    "all": [
        t("RandomApply", transforms=[JITTER], p=0.8),
        t("RandomGrayscale", p=0.2),
        BLUR,
        t("RandomSolarize", threshold=128, p=0.2),
        t("RandomHorizontalFlip"),
    ],
}


def batch(count: int = 12, side: int = 24) -> torch.Tensor:
    """uint8 images with smooth parts, grey parts, black and white."""
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (count, 3, side, side)).astype(np.uint8)
    images[:, :, :8] = images[:, :1, :8]
    images[:, :, 8:12, :12], images[:, :, 8:12, 12:] = 0, 255
    return torch.from_numpy(images)


def on_device(transforms: list[dict[str, Any]], **options: Any) -> Views:
    return build_views([*transforms, t("ToTensor")], key=KEY, augment_on_device=True, **options)


def drawn(views: Views, count: int, seed: int = 0) -> torch.Tensor:
    """The numbers of `count` images."""
    rows = []
    for row in range(count):
        with rng.sample_scope(seed, 0, row):
            rows.append(views.draw())
    return torch.from_numpy(np.stack(rows))


def library(transforms: list[dict[str, Any]]) -> v2.Transform:
    """The same list, made of torchvision's own objects, for floats."""
    steps = [step for _, step in build_views(transforms, key=KEY).steps]
    for step in steps:
        if isinstance(step, v2.RandomSolarize):
            step.threshold /= 255
    return v2.Compose(steps)


# ------------------------------------------------------------------------------------------------ arithmetic
@pytest.mark.parametrize("name", LISTS)
def test_equals_torchvision_on_floats_with_the_same_seed(name: str) -> None:
    views, reference, images = on_device(LISTS[name]), library(LISTS[name]), batch()
    assert views.steps == []
    found = views.device_transform(images, drawn(views, len(images)))
    worst, changed = 0.0, 0
    for row, image in enumerate(images):
        with rng.sample_scope(0, 0, row):
            expected = reference(image.float() / 255)
        difference = (found[row] - expected).abs()
        changed += int(not torch.equal(expected, image.float() / 255))
        # A pixel that lies at the threshold to a few bits may fall on either side of it.
        assert (difference > 1e-4).double().mean() < 0.002
        worst = max(worst, difference.quantile(0.998).item())
    assert worst < 1e-4 < LEVEL and changed > 2


def test_close_to_the_same_list_on_pil_images() -> None:
    """Those round to whole levels after each operation."""
    transforms = [t("ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4), t("RandomGrayscale", p=0.3)]
    views, images = on_device(transforms), batch()
    found = views.device_transform(images, drawn(views, len(images)))
    reference = build_views(transforms, key=KEY)
    for row, image in enumerate(images):
        with rng.sample_scope(0, 0, row):
            expected, _ = reference(F.to_pil_image(image))
        assert (found[row] * 255 - expected.float()).abs().mean() < 1.5


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.9])
def test_each_factor(operation: str, factor: float) -> None:
    views, images = on_device([t("ColorJitter", **{operation: [factor, factor]})]), batch(3)
    expected = getattr(F, f"adjust_{operation}")(images.float() / 255, factor)
    assert (views.device_transform(images, drawn(views, 3)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shift", [-0.5, -0.21, 0.0, 0.07, 0.5])
def test_hue(shift: float) -> None:
    images = batch(4).float() / 255
    found = photometric.shift_hue(images, torch.full((4, 1, 1), shift))
    assert (found - F.adjust_hue(images, shift)).abs().max() < 1e-5


@pytest.mark.parametrize("radius", [0.0, 0.4, 1.0, 1.7, 3.0])
def test_blur_equals_pillow(radius: float) -> None:
    image = F.to_pil_image(batch(1, 40)[0]).resize((60, 50), Image.Resampling.BICUBIC)
    views = on_device([t("ImgPilGaussianBlur", p=1.0, radius_min=radius, radius_max=radius)])
    found = views.device_transform(F.pil_to_tensor(image)[None], drawn(views, 1))[0] * 255
    expected = F.pil_to_tensor(image.filter(ImageFilter.GaussianBlur(radius))).float()
    # Pillow rounds after each of its six passes.
    assert (found - expected).abs().max() < 3 and (found - expected).abs().mean() < 0.7


def test_our_own_names() -> None:
    images = batch(20)
    for transforms in (
        [t("ImgPilColorDistortion", strength=0.5)],
        [t("ImgPilRandomColorJitter", strength=0.5, prob=0.7)],
        [t("ImgPilRandomSolarize", prob=0.5)],
        [t("ImgPilGaussianBlur", p=0.5), t("ImgPilRandomSolarize", prob=0.2)],
    ):
        views, reference = on_device(transforms), build_views(transforms, key=KEY)
        found = views.device_transform(images, drawn(views, 20))
        for row, image in enumerate(images):
            with rng.sample_scope(0, 0, row):
                expected, _ = reference(F.to_pil_image(image))
            difference = (found[row] * 255 - expected.float()).abs()
            assert difference.median() <= 2 and (difference > 6).float().mean() < 0.1


def test_grey_images() -> None:
    views = on_device([t("Grayscale"), JITTER, t("RandomGrayscale", p=1.0)])
    assert [name for name, _ in views.steps] == ["Grayscale"]
    images, reference = batch(6)[:, :1], library([JITTER, t("RandomGrayscale", p=1.0)])
    found = views.device_transform(images, drawn(views, 6))
    for row, image in enumerate(images):
        with rng.sample_scope(0, 0, row):
            assert (found[row] - reference(image.float() / 255)).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------- each image for itself
@pytest.mark.parametrize("name", LISTS)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    views, images = on_device(LISTS[name]), batch(9, 21)
    draws = drawn(views, 9, seed=3)
    whole = views.device_transform(images, draws)
    order = torch.tensor([4, 0, 8, 7])
    assert torch.equal(views.device_transform(images[order], draws[order]), whole[order])
    alone = [views.device_transform(images[row : row + 1], draws[row : row + 1])[0] for row in range(9)]
    assert torch.equal(torch.stack(alone), whole)
    assert torch.equal(images, batch(9, 21))


def test_zeros_leave_an_image_as_it_is() -> None:
    for transforms in LISTS.values():
        views, images = on_device(transforms), batch(3)
        width = sum(step.width for step in views.device_transform.augment)
        assert torch.equal(views.device_transform(images, torch.zeros(3, width)), images.float() / 255)


# ------------------------------------------------------------------------------------------- what is moved
def names(transforms: list[dict[str, Any]]) -> tuple[list[str], int]:
    views = build_views(transforms, key=KEY, augment_on_device=True)
    return [name for name, _ in views.steps], len(views.device_transform.augment)


def test_what_moves_to_the_device() -> None:
    crop, flip, tensor = t("RandomResizedCrop", size=16), t("RandomHorizontalFlip"), t("ToTensor")
    normalize = t("Normalize", mean=[0.5] * 3, std=[0.25] * 3)
    assert names([crop, flip, JITTER, BLUR, tensor, normalize]) == (["RandomResizedCrop", "RandomHorizontalFlip"], 2)
    assert names([crop, JITTER, flip, tensor]) == (["RandomResizedCrop"], 2)
    assert names([crop, flip, JITTER]) == (["RandomResizedCrop", "RandomHorizontalFlip"], 1)
    assert names([crop, flip, tensor]) == (["RandomResizedCrop", "RandomHorizontalFlip"], 0)
    assert names([JITTER, crop, tensor]) == (["ColorJitter", "RandomResizedCrop"], 0)
    assert names([crop, JITTER, t("RandAugment"), tensor])[1] == 0
    assert names([crop, t("RandomApply", transforms=[t("RandomRotation", degrees=3)]), tensor])[1] == 0
    assert names([crop, JITTER, tensor, t("RandomErasing")])[1] == 0
    assert names([crop, t("ToImage"), JITTER])[1] == 0
    assert len(build_views([crop, JITTER, tensor], key=KEY).device_transform.augment) == 0


def test_the_rest_of_the_tail_follows() -> None:
    images = batch(4)
    for tail, expected in (
        ([t("ToTensor"), t("Normalize", mean=[0.5] * 3, std=[0.2] * 3)], lambda x: (x - 0.5) / 0.2),
        ([t("ImgPilToRawTensor")], lambda x: x * 255),
    ):
        views = build_views([JITTER, *tail], key=KEY, augment_on_device=True)
        plain = on_device([JITTER])
        draws = drawn(views, 4)
        assert torch.allclose(views.device_transform(images, draws), expected(plain.device_transform(images, draws)))


def test_forgotten_numbers_are_an_error() -> None:
    with pytest.raises(ValueError, match="draws"):
        on_device([JITTER]).device_transform(batch(2))


# ------------------------------------------------------------------------------------------------ in a data set
def data(root: Path, *, augment: Any = True) -> Data:
    transforms = [t("RandomResizedCrop", size=16), t("RandomHorizontalFlip"), JITTER, BLUR, t("ToTensor")]
    options = {"DATA_SOURCES": ["disk_folder"], "DATA_PATHS": [str(root)], "TRANSFORMS": transforms}
    return Data(TRAIN=options, AUGMENT_ON_DEVICE=augment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for row, image in enumerate(batch(18, 30)):
        file = tmp_path / f"class_{row % 3}" / f"{row:02d}.jpg"
        file.parent.mkdir(exist_ok=True)
        F.to_pil_image(image).save(file, quality=95)
    return tmp_path


def epoch_of(folder: Path, *, workers: int = 0, size: int = 1, first_step: int = 0, epoch: int = 1) -> dict[int, Any]:
    """row -> the finished image, over all ranks."""
    seen: dict[int, Any] = {}
    for rank in range(size):
        dataset = build_dataset(data(folder), "TRAIN", seed=5)
        batches = train_batches(
            dataset, seed=5, epoch=epoch, first_step=first_step, batch_per_rank=6 // size, rank=rank, size=size,
            workers=workers, method="fork",
        )  # fmt: skip
        for one in batches:
            assert one["draws"].dtype == torch.float32 and len(one["draws"]) == len(one["data"])
            moved = Arithmetic().to_device(one, dataset.device_transform)
            assert "draws" not in moved
            seen.update(zip(one["index"].tolist(), moved["data"]))
        close_workers(dataset)
    return seen


def test_same_images_with_any_workers_ranks_and_after_a_resume(folder: Path) -> None:
    alone = epoch_of(folder)
    assert len(alone) == 18
    for other in (epoch_of(folder, workers=2), epoch_of(folder, size=2), epoch_of(folder, size=3, workers=1)):
        assert all(torch.equal(other[row], image) for row, image in alone.items())
    rest = epoch_of(folder, first_step=2)
    assert len(rest) == 6 and all(torch.equal(image, alone[row]) for row, image in rest.items())
    assert not any(torch.equal(image, alone[row]) for row, image in epoch_of(folder, epoch=2).items())


def test_the_crop_is_the_same_with_and_without(folder: Path) -> None:
    """The same numbers are drawn in the same order; only where they are used differs."""
    with_device, without = (build_dataset(data(folder, augment=flag), "TRAIN", seed=0) for flag in (True, False))
    for row in range(6):
        one, other = with_device[row], without[row]
        finished = with_device.device_transform(one["data"][None], one["draws"][None])[0]
        difference = (finished - without.device_transform(other["data"][None])[0]).abs()
        assert difference.mean() < 6 * LEVEL
        assert "draws" not in other


def test_default_is_the_worker_on_a_cpu(folder: Path) -> None:
    dataset = build_dataset(data(folder, augment="auto"), "TRAIN", seed=0)
    assert not dataset.device_transform.augment
    assert all("draws" not in one for one in eval_batches(dataset, batch=9))
    rows = {
        device: make_plan(Config(), num_processes=1, device=device, num_train=None).rows for device in ("cpu", "gpu")
    }
    keys = {device: [row.key for row in found] for device, found in rows.items()}
    assert "DATA.AUGMENT_ON_DEVICE" in keys["gpu"] and "DATA.AUGMENT_ON_DEVICE" not in keys["cpu"]


def test_the_dataset_can_be_copied_to_a_worker(folder: Path) -> None:
    dataset = build_dataset(data(folder), "TRAIN", seed=0)
    again = copy.deepcopy(dataset)
    assert torch.equal(again[3]["draws"], dataset[3]["draws"])
