"""Images and masks of objects: both move alike, for any number of workers, and what is wrong with them is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from vissl_like.config.schema_data import Data, Split
from vissl_like.core.rng import sample_scope
from vissl_like.data import toybirds
from vissl_like.data.dataset import build_dataset
from vissl_like.data.images import ImageDataset
from vissl_like.data.loader import close_workers, eval_batches, train_batches
from vissl_like.data.masks import ObjectMask
from vissl_like.data.transforms import CropOnMask
from vissl_like.data.views import build_views, check_transforms, transform_names
from vissl_like.errors import ConfigError, DataError

KEY = "config.DATA.TRAIN.TRANSFORMS"


def t(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, **arguments}


def blob(seed: int = 0, height: int = 60, width: int = 80) -> Image.Image:
    """A white object on black, not symmetric: where a pixel is above 127 is its mask."""
    chance = np.random.default_rng(seed)
    image = Image.new("L", (width, height))
    corners = [(chance.uniform(0.1, 0.9) * width, chance.uniform(0.1, 0.9) * height) for _ in range(4)]
    pen = ImageDraw.Draw(image)
    pen.polygon(corners, fill=255)
    pen.ellipse((2, 2, 20, 14), fill=255)
    return image.convert("RGB")


def threshold(data: torch.Tensor) -> torch.Tensor:
    """(3, H, W) of white and black -> bool (H, W)."""
    middle = 127 if data.dtype == torch.uint8 else 0.5
    return data.float().mean(0) > middle


def together(transforms: list[dict[str, Any]], seed: int, image: Image.Image | None = None, **options: Any) -> Any:
    image = image or blob(seed)
    views = build_views(transforms, key=KEY, with_masks=True, **options)
    with sample_scope(seed, 0, 0):
        return views.together(image, np.asarray(image.convert("L")) > 127)


# ------------------------------------------------------------------------------------------------------ both move alike
MOVING = [
    t("Resize", size=31),
    t("Resize", size=[90, 40], interpolation="bicubic"),
    t("Resize", size=None, max_size=33),
    t("RandomResize", min_size=20, max_size=70),
    t("RandomShortestSize", min_size=[20, 30]),
    t("ScaleJitter", target_size=[50, 50], scale_range=[0.5, 1.5]),
    t("RandomResizedCrop", size=24),
    t("RandomCrop", size=20, padding=7, fill=0),
    t("CenterCrop", size=[70, 30]),
    t("Pad", padding=9, padding_mode="reflect"),
    t("RandomZoomOut", p=1.0),
    t("RandomHorizontalFlip"),
    t("RandomVerticalFlip"),
    t("RandomRotation", degrees=90),
    t("RandomRotation", degrees=45, interpolation="bilinear", expand=True),
    t("RandomAffine", degrees=90, translate=[0.2, 0.2], scale=[0.8, 1.2]),
    t("RandomAffine", degrees=20, shear=15, interpolation="bilinear"),
    t("RandomPerspective", p=1.0, interpolation="nearest"),
    t("ElasticTransform", alpha=80.0, interpolation="nearest"),
    t("CropOnMask", size=[25, 19]),
    t("RandomApply", transforms=[t("RandomRotation", degrees=90), t("ImgPilPlanckianJitter", p=0.0)], p=0.7),
    t("RandomChoice", transforms=[t("Resize", size=30), t("CenterCrop", size=40)]),
    t("RandomOrder", transforms=[t("RandomHorizontalFlip"), t("CropOnMask", size=30)]),
    t("Compose", transforms=[t("Resize", size=40), t("ToTensor"), t("RandomCrop", size=20)]),
]


@pytest.mark.parametrize("entry", MOVING, ids=lambda entry: entry["name"])
def test_the_mask_stays_on_its_object(entry: dict[str, Any]) -> None:
    """A picture of white on black and its own threshold are still each other's threshold."""
    sizes = set()
    for seed in range(6):
        data, mask = together([entry], seed)
        assert mask.dtype == torch.bool and mask.shape == data.shape[1:]
        assert torch.equal(threshold(data), mask)
        sizes.add((tuple(data.shape), int(mask.sum())))
    assert len(sizes) > 1


def test_what_comes_in_from_outside_is_no_object() -> None:
    """Also where the image is filled with white."""
    data, mask = together([t("Pad", padding=5, fill=255)], 0)
    assert (
        threshold(data)[:5].all() and not mask[:5].any() and torch.equal(threshold(data)[5:-5, 5:-5], mask[5:-5, 5:-5])
    )
    turned = together([t("RandomAffine", degrees=[45, 45], fill=[255, 255, 255])], 0)
    assert threshold(turned[0])[0, 0] and not turned[1][0, 0]


COLOUR = [
    t("ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    t("GaussianBlur", kernel_size=5),
    t("RandomGrayscale", p=1.0),
    t("RandomPhotometricDistort", p=1.0),
    t("ImgPilColorDistortion", strength=1.0),
    t("ImgPilGaussianBlur", p=1.0),
    t("ImgPilPlanckianJitter", p=1.0),
    t("ImgPilRandomSolarize", prob=1.0),
    t("ImgPilRandomColorJitter"),
    t("RandomApply", transforms=[t("ImgPilGaussianBlur", p=1.0)], p=1.0),
]


@pytest.mark.parametrize("entry", COLOUR, ids=lambda entry: entry["name"])
def test_colours_change_in_the_image_alone(entry: dict[str, Any]) -> None:
    image = blob()
    data, mask = together([entry], 3, image)
    assert torch.equal(mask, torch.from_numpy(np.asarray(image.convert("L")) > 127))
    views = build_views([entry], key=KEY)
    with sample_scope(3, 0, 0):
        assert torch.equal(views(image)[0], data)


@pytest.mark.filterwarnings("error")
def test_tensors_take_their_mask_along() -> None:
    ends = [t("ToTensor"), t("RandomErasing", p=1.0, value=0.0), t("Normalize", mean=[0.5] * 3, std=[0.5] * 3)]
    image = blob()
    plain = torch.from_numpy(np.asarray(image.convert("L")) > 127)
    assert torch.equal(together(ends, 0, image)[1], plain)
    data, mask = together(
        [t("ToImage"), t("RandomHorizontalFlip", p=1.0), t("ToDtype", dtype="float32", scale=True)], 0
    )
    assert data.dtype == torch.float32 and torch.equal(threshold(data), mask) and torch.equal(mask, plain.flip(1))


REFUSED = {
    "AugMix": {}, "AutoAugment": {}, "ImgPilResizeLargerSide": {"size": 9}, "ImgRotatePil": {}, "MNISTImgPil2RGB": {},
    "RandAugment": {}, "TimmTrain": {"size": 9}, "TrivialAugmentWide": {}, "VisslAutoAugment": {},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_part_them_is_refused(name: str) -> None:
    for entry in (t(name, **REFUSED[name]), t("RandomApply", transforms=[t(name, **REFUSED[name])])):
        with pytest.raises(ConfigError, match=rf"name='{name}': it would move the image but not its mask.* Use \w+"):
            build_views([entry], key=KEY, with_masks=True)
    assert not check_transforms([t(name, **REFUSED[name])], KEY)


def test_every_transform_is_moving_colour_or_refused() -> None:
    """None is left of which nobody knows what it does to a mask."""
    known = {entry["name"] for entry in [*MOVING, *COLOUR]} | set(REFUSED)
    types = {"ToTensor", "ImgToTensor", "ImgPilToRawTensor", "ImgPil2LabTensor", "ToImage", "PILToTensor", "ToPILImage"}
    types |= {"ToPureTensor", "ToDtype", "ConvertImageDtype", "Normalize", "Identity", "RandomErasing"}
    colour = {
        "Grayscale",
        "RGB",
        "GaussianNoise",
        "JPEG",
        "RandomAdjustSharpness",
        "RandomAutocontrast",
        "RandomEqualize",
    }
    colour |= {"RandomInvert", "RandomPosterize", "RandomSolarize", "RandomChannelPermutation"}
    assert set(transform_names()) <= known | types | colour


# ----------------------------------------------------------------------------------------------------------- CropOnMask
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 9))
def test_a_crop_holds_some_of_the_mask(seed: int, height: int, width: int) -> None:
    """One pixel of the mask is enough, and every crop with it is as likely as any other."""
    chance = np.random.default_rng(seed)
    mask = np.zeros((12, 9), dtype=bool)
    mask[chance.integers(12), chance.integers(9)] = True
    crop = CropOnMask([height, width])
    with sample_scope(seed, 0, 0):
        _, found = crop(torch.zeros(3, 12, 9), ObjectMask.of(mask))
    assert found.is_object().shape == (height, width) and found.is_object().sum() == 1
    wanted = [[mask[y : y + height, x : x + width].any() for x in range(10 - width)] for y in range(13 - height)]
    assert np.array_equal(crop._holding(mask), wanted)


def test_crops_without_an_object_are_anywhere() -> None:
    places = set()
    image = torch.arange(16.0).reshape(1, 4, 4)
    for seed in range(80):
        with sample_scope(seed, 0, 0):
            cropped, mask = CropOnMask(2)(image, ObjectMask.of(np.zeros((4, 4), dtype=bool)))
        places.add(cropped[0, 0, 0].item())
        assert not mask.is_object().any()
    assert len(places) == 9


def test_crop_on_mask_needs_masks_and_room() -> None:
    with pytest.raises(ConfigError, match=r"TRANSFORMS\.0.name='CropOnMask': there are no masks.* Use RandomCrop"):
        build_views([t("CropOnMask", size=3)], key=KEY)
    with pytest.raises(ConfigError, match="size=0"):
        build_views([t("CropOnMask", size=0)], key=KEY, with_masks=True)
    with pytest.raises(Exception, match="a crop of 70x70 of an image of 60x80; Resize it first"):
        together([t("CropOnMask", size=70)], 0)


# ----------------------------------------------------------------------------------------------------- through the loader
LIST = [
    t("Resize", size=40),
    t("CropOnMask", size=32),
    t("RandomHorizontalFlip"),
    t("RandomAffine", degrees=90, translate=[0.2, 0.2], scale=[0.8, 1.2]),
    t("ToTensor"),
]


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    """A folder in the form of CUB whose images are white on black."""
    toybirds.write_cub(tmp_path, train=16, test=8, size=24)
    for number, file in enumerate(sorted((tmp_path / "images").rglob("*.png"))):
        image = blob(number)
        image.save(file)
        image.convert("L").save(tmp_path / "segmentations" / file.relative_to(tmp_path / "images"))
    return tmp_path


def dataset(folder: Path, *, transforms: list[dict[str, Any]] = LIST, **options: Any) -> ImageDataset:
    split = Split(DATA_SOURCES=["cub"], DATA_PATHS=[str(folder)], TRANSFORMS=transforms, **options)
    return build_dataset(Data(TRAIN=split, MAX_BAD_FRACTION=0.5), "TRAIN", seed=4, with_masks=True)


def test_batches_carry_masks_whatever_the_number_of_workers(blobs: Path) -> None:
    """Also where an image is unreadable: its replacement brings its own mask."""
    images = dataset(blobs)
    Path(str(images.file(3))).write_bytes(b"no image")
    shape = {"seed": 4, "epoch": 2, "batch_per_rank": 5}
    here = list(train_batches(images, **shape))
    there = list(train_batches(images, workers=2, **shape))
    tested = list(eval_batches(images, batch=6, workers=2))
    close_workers(images)
    for one, other in zip(here, there, strict=True):
        assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert sum(int((~batch["valid"]).sum()) for batch in here) == 1
    for batch in (*here, *tested):
        assert batch["mask"].dtype == torch.bool and batch["mask"].shape == (len(batch["index"]), 32, 32)
        assert all(torch.equal(threshold(data), mask) for data, mask in zip(batch["data"], batch["mask"]))
    again = images[2, int(here[0]["index"][0])]
    assert torch.equal(again["mask"], here[0]["mask"][0])


def test_colours_on_the_device_leave_masks_where_they_are(blobs: Path) -> None:
    options = Data(
        TRAIN=Split(
            DATA_SOURCES=["cub"],
            DATA_PATHS=[str(blobs)],
            TRANSFORMS=[t("RandomResizedCrop", size=20), t("ImgPilGaussianBlur", p=1.0), t("ToTensor")],
        ),
        AUGMENT_ON_DEVICE=True,
    )
    batch = next(iter(eval_batches(build_dataset(options, "TRAIN", seed=0, with_masks=True), batch=4)))
    assert batch["draws"].shape[0] == 4
    assert all(torch.equal(threshold(data), mask) for data, mask in zip(batch["data"], batch["mask"]))


def test_wrong_masks_are_named(blobs: Path) -> None:
    images = dataset(blobs)
    first = images.source.mask_file(0)  # type: ignore[attr-defined]
    Image.new("L", (7, 5)).save(first)
    with pytest.raises(DataError, match=r"80x60 pixels, its mask 7x5. .*MASK_SUB_PATH"):
        images[0]
    Path(first).write_bytes(b"no image")
    with pytest.raises(DataError, match=f"{Path(first).name}: this mask cannot be read"):
        next(iter(eval_batches(images, batch=2)))
    Path(first).unlink()
    with pytest.raises(
        DataError, match=rf"{Path(first).name}: this mask is not there\. Every image needs one; set .*MASK"
    ):
        dataset(blobs)
    with pytest.raises(DataError, match="nor are 15 more"):
        dataset(blobs, MASK_SUB_PATH="elsewhere")
    plain = Split(DATA_SOURCES=["synthetic"], TRANSFORMS=[t("Resize", size=8)])
    with pytest.raises(DataError, match="have no mask"):
        build_dataset(Data(TRAIN=plain), "TRAIN", seed=0, with_masks=True)
