"""TRANSFORMS: names and arguments are checked without data; pixels equal the library's or a closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import v2

from vissl_like.core.rng import sample_scope
from vissl_like.data.transforms import OWN_TRANSFORMS
from vissl_like.data.views import (
    DeviceTransform,
    TransformFailed,
    Views,
    build_views,
    check_transforms,
    transform_names,
)
from vissl_like.errors import ConfigError

KEY = "config.DATA.TRAIN.TRANSFORMS"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def noise(height: int = 37, width: int = 53, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8))


def t(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, **arguments}


def pixels(*transforms: dict[str, Any], image: Image.Image | None = None, seed: int = 0) -> torch.Tensor:
    """What the worker hands over."""
    with sample_scope(seed, 0, 0):
        return build_views(list(transforms), key=KEY)(image or noise())[0]


def finished(
    *transforms: dict[str, Any], image: Image.Image | None = None, seed: int = 0, **options: Any
) -> torch.Tensor:
    """What the model sees of one image (C, H, W)."""
    views = build_views(list(transforms), key=KEY, **options)
    with sample_scope(seed, 0, 0):
        data = views(image or noise())[0]
    return views.device_transform(data[None])[0]


# ---------------------------------------------------------------------------------------- equal to torchvision
def test_evaluation_list_equals_torchvision_v1() -> None:
    names = [t("Resize", size=24), t("CenterCrop", size=16), t("ToTensor"), t("Normalize", mean=MEAN, std=STD)]
    expected = v1.Compose([v1.Resize(24), v1.CenterCrop(16), v1.ToTensor(), v1.Normalize(MEAN, STD)])(noise())
    assert torch.equal(finished(*names), expected)
    assert pixels(*names).dtype == torch.uint8


CLUSTERFIT_LIST = [
    t("RandomResizedCrop", size=16),
    t("ColorJitter", brightness=[0.6, 1.4], contrast=[0.6, 1.4], saturation=[0.6, 1.4], hue=[-0.2, 0.2]),
    t("RandomHorizontalFlip"),
]


@pytest.mark.parametrize("seed", range(4))
def test_clusterfit_training_list_equals_torchvision_v2(seed: int) -> None:
    reference = v2.Compose(
        [
            v2.RandomResizedCrop(16),
            v2.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.2, 0.2)),
            v2.RandomHorizontalFlip(),
        ]
    )
    with sample_scope(seed, 0, 0):
        expected = v1.functional.pil_to_tensor(reference(noise()))
    assert torch.equal(pixels(*CLUSTERFIT_LIST, seed=seed), expected)


@pytest.mark.parametrize(
    ("entry", "reference"),
    [
        (t("Grayscale", num_output_channels=3), v2.Grayscale(3)),
        (t("RandomGrayscale", p=1.0), v2.RandomGrayscale(1.0)),
        (t("RandomRotation", degrees=30, interpolation="bilinear"), v2.RandomRotation(30, v1.InterpolationMode.BILINEAR)),
        (t("RandomAffine", degrees=10, translate=[0.1, 0.1], scale=[0.8, 1.2]), v2.RandomAffine(10, (0.1, 0.1), (0.8, 1.2))),
        (t("RandomCrop", size=20, padding=4), v2.RandomCrop(20, padding=4)),
        (t("RandomVerticalFlip", p=1), v2.RandomVerticalFlip(1)),
        (t("Resize", size=[11, 13], interpolation=3), v2.Resize((11, 13), v1.InterpolationMode.BICUBIC)),
        (t("RandAugment", magnitude=7), v2.RandAugment(2, 7)),
        (t("AutoAugment", policy="cifar10"), v2.AutoAugment(v1.AutoAugmentPolicy.CIFAR10)),
        (t("TrivialAugmentWide"), v2.TrivialAugmentWide()),
        (t("GaussianBlur", kernel_size=5), v2.GaussianBlur(5)),
        (t("RandomSolarize", threshold=128, p=1.0), v2.RandomSolarize(128, 1.0)),
        (t("RandomApply", transforms=[t("ColorJitter", hue=0.3)], p=1.0), v2.RandomApply([v2.ColorJitter(hue=0.3)], 1.0)),
        (t("ImgPilColorDistortion", strength=0.5),
         v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)])),
        (t("ImgPilRandomColorJitter", strength=1, prob=1.0), v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 1.0)),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_named_transform_equals_the_library(entry: dict[str, Any], reference: Any) -> None:
    for seed in range(3):
        with sample_scope(seed, 0, 0):
            expected = v1.functional.pil_to_tensor(reference(noise()))
        assert torch.equal(pixels(entry, seed=seed), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_timms_policy_takes_its_own_words(interpolation: str) -> None:
    entry = {"name": "TimmTrain", "size": 12, "interpolation": interpolation}
    data, _ = build_views([entry, {"name": "ToTensor"}], key="KEY")(Image.new("RGB", (30, 20), (9, 99, 200)))
    assert data.shape == (3, 12, 12)


def test_random_erasing_stays_behind_the_normalisation() -> None:
    names = [t("ToTensor"), t("Normalize", mean=MEAN, std=STD), t("RandomErasing", p=1.0, value=0.0)]
    found = pixels(*names)
    assert found.dtype == torch.float32
    plain = v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])(noise())
    erased = (found == 0).all(0)
    assert 0 < erased.sum() < erased.numel()
    assert torch.equal(found[:, ~erased], plain[:, ~erased])
    assert torch.equal(finished(*names), found)


# ----------------------------------------------------------------------------------------------- closed forms
def test_raw_tensor_keeps_the_range() -> None:
    expected = torch.from_numpy(np.array(noise())).permute(2, 0, 1).float()
    assert torch.equal(finished(t("ImgPilToRawTensor")), expected)
    scaled = finished(t("ImgPilToRawTensor"), t("Normalize", mean=[10.0] * 3, std=[2.0] * 3))
    assert torch.equal(scaled, (expected - 10) / 2)


def test_tensor_names_mean_the_same() -> None:
    expected = v1.ToTensor()(noise())
    for names in (
        [],
        [t("ToTensor")],
        [t("ImgToTensor")],
        [t("ToImage")],
        [t("ToImage"), t("ToDtype", dtype="float32", scale=True)],
    ):
        assert torch.allclose(finished(*names), expected, rtol=0, atol=1e-7)
    assert torch.equal(finished(), expected)


def test_to_tensor_in_the_middle_equals_to_tensor_at_the_end() -> None:
    assert torch.equal(pixels(t("ToTensor"), t("RandomErasing", p=0.0)), v1.ToTensor()(noise()))


def test_gaussian_blur() -> None:
    assert torch.equal(pixels(t("ImgPilGaussianBlur", p=0.0)), pixels())
    fixed = pixels(t("ImgPilGaussianBlur", p=1.0, radius_min=1.5, radius_max=1.5))
    assert torch.equal(fixed, v1.functional.pil_to_tensor(noise().filter(ImageFilter.GaussianBlur(1.5))))
    blurred = sum(not torch.equal(pixels(t("ImgPilGaussianBlur", p=0.5), seed=seed), pixels()) for seed in range(60))
    assert 15 < blurred < 45


def test_solarize() -> None:
    assert torch.equal(
        pixels(t("ImgPilRandomSolarize", prob=1.0)), v1.functional.pil_to_tensor(ImageOps.solarize(noise()))
    )
    assert torch.equal(pixels(t("ImgPilRandomSolarize", prob=0.0)), pixels())


@pytest.mark.parametrize(
    ("size", "expected"), [((40, 10), (20, 5)), ((10, 40), (5, 20)), ((8, 8), (20, 20)), ((500, 1), (20, 1))]
)
def test_larger_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = noise(size[1], size[0])
    found = pixels(t("ImgPilResizeLargerSide", size=20), image=image)
    assert torch.equal(found, v1.functional.pil_to_tensor(image.resize(expected, Image.Resampling.BILINEAR)))


def test_mnist_is_pasted_into_a_black_square() -> None:
    digit = Image.new("L", (3, 3), 200)
    found = pixels(t("MNISTImgPil2RGB", size=8, box=[1, 2]), image=digit)
    expected = torch.zeros(3, 8, 8, dtype=torch.uint8)
    expected[:, 2:5, 1:4] = 200
    assert torch.equal(found, expected)
    assert pixels(t("MNISTImgPil2RGB", size=7), image=digit)[0].nonzero().min(0).values.tolist() == [2, 2]


def test_lab_equals_scikit_image() -> None:
    color = pytest.importorskip("skimage.color")
    lab = pixels(t("ImgPil2LabTensor"))
    np.testing.assert_allclose(lab.permute(1, 2, 0), color.rgb2lab(np.asarray(noise())), atol=2e-3)
    white = pixels(t("ImgPil2LabTensor"), image=Image.new("RGB", (1, 1), "white"))
    np.testing.assert_allclose(white.flatten(), [100, 0, 0], atol=0.01)


def test_input_type() -> None:
    names = [t("ToTensor"), t("Normalize", mean=MEAN, std=STD)]
    # The model turns the channels (test_models_vision_model.py); a second turn here would undo it.
    assert torch.equal(finished(*names, input_type="bgr"), finished(*names))
    lab = [t("ImgPil2LabTensor"), t("Normalize", mean=[50.0, 0, 0], std=[50.0, 1, 1])]
    lightness = finished(*lab, input_type="lab")
    assert torch.equal(lightness, finished(*lab)) and lightness.shape == (3, 37, 53)
    assert "ImgPil2LabTensor" in check_transforms(names, KEY, input_type="lab")[0]


@pytest.mark.parametrize("name", ["RandAugment", "VisslAutoAugment"])
def test_magnitude_noise(name: str) -> None:
    # Many seeds: some draw 0 bits for posterize, which Pillow 13 refuses.
    first = [pixels(t(name, magnitude_std=3), seed=seed) for seed in range(120)]
    assert all(torch.equal(found, pixels(t(name, magnitude_std=3), seed=seed)) for seed, found in enumerate(first[:9]))
    assert len({found.numpy().tobytes() for found in first}) > 60


# ------------------------------------------------------------------------------------------------ device
def test_device_transform_does_not_touch_its_input() -> None:
    transform = DeviceTransform(mean=[0.5], std=[0.25])
    batch = torch.arange(48, dtype=torch.uint8).view(2, 3, 2, 4) * 5
    before = batch.clone()
    found = transform(batch)
    assert torch.equal(batch, before) and found.dtype == torch.float32
    assert torch.equal(found, (before.float() / 255 - 0.5) / 0.25)
    ready = torch.rand(2, 3, 2, 4)
    assert torch.equal(transform(ready), ready)
    assert not transform.state_dict()


# ------------------------------------------------------------------------------------------- wrong lists
@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (t("RandomResizedCropp", size=3), "did you mean 'RandomResizedCrop'"),
        (t("imgrotatepil"), r"no such transform; did you mean 'ImgRotatePil'"),
        (t("Xyzzy"), r"no such transform\. `list transforms`"),
        (t("Resize", sze=3), r"\.0\.sze: unknown argument; did you mean 'size'"),
        (t("Resize"), "needs the argument 'size'. Resize takes size, interpolation, max_size, antialias"),
        (t("PILToTensor", x=1), "takes no arguments"),
        (t("ColorJitter", brightness=-1), "does not take these values"),
        (t("RandomHorizontalFlip", p=3), "does not take these values"),
        (t("Resize", size=3, interpolation="bilinaer"), "does not take these values"),
        (t("Lambda", lambd="x"), "needs a Python function"),
        (t("MixUp"), "mixes the images of a batch"),
        (t("Normalize", mean=MEAN, std=STD), "put ToTensor before it"),
        (t("RandomErasing"), "put ToTensor before it"),
        (t("ImgRotatePil", num_rotations_per_img=4), "only 1 is allowed"),
        (t("ImgPilGaussianBlur", p=2), "between 0 and 1"),
        (t("ImgPilGaussianBlur", p=1, radius_min=3), "radius_min <= radius_max"),
        (t("ToTensor", indices=[1]), "number 0"),
        ({"size": 3}, "a transform is {name: NAME"),
        ("ToTensor", "a transform is {name: NAME"),
        (t("RandomApply", transforms=[t("Resize", size=3), t("Resice", size=3)]), r"\.0\.transforms\.1\.name='Resice'"),
        (t("RandomApply", transforms=[t("ToTensor")]), "may not turn images into tensors"),
        (t("Compose", transforms=[t("ImgRotatePil")]), "gives the label cannot stand inside"),
        (t("ToDtype", dtype="float33"), "dtype"),
        (t("AutoAugment", policy="x"), "does not take these values"),
        (t("VisslAutoAugment", policy_name="x"), "one of v0"),
    ],
    ids=str,
)  # fmt: skip
def test_one_wrong_entry(entry: Any, text: str) -> None:
    problems = check_transforms([entry], KEY)
    assert len(problems) == 1
    with pytest.raises(ConfigError, match=text):
        build_views([entry], key=KEY)
    assert problems[0].startswith(KEY + ".0")


@pytest.mark.parametrize(
    "names",
    [
        ["ToTensor", "ImgRotatePil"],
        ["ToTensor", "ToTensor"],
        ["ToTensor", "ImgPilColorDistortion"],
        ["ToImage", "Normalize"],
    ],
)
def test_wrong_order(names: list[str]) -> None:
    arguments = {"ImgPilColorDistortion": {"strength": 1}, "Normalize": {"mean": MEAN, "std": STD}}
    problems = check_transforms([t(name, **arguments.get(name, {})) for name in names], KEY)
    assert len(problems) == 1 and problems[0].startswith(f"{KEY}.1")


def test_normalize_numbers() -> None:
    for mean, std, text in (([0.5], [0.5, 0.5], "same length"), ([0.5], [0.0], "above 0"), (0.5, 0.5, "lists")):
        assert text in check_transforms([t("ToTensor"), t("Normalize", mean=mean, std=std)], KEY)[0]


def test_all_problems_at_once() -> None:
    wrong = [t("Resiz", size=3), t("CenterCrop", szie=3), t("ToTensor"), t("Normalise", mean=MEAN, std=STD)]
    assert [problem.split(": ")[0] for problem in check_transforms(wrong, KEY)] == [
        f"{KEY}.0.name='Resiz'", f"{KEY}.1.szie", f"{KEY}.3.name='Normalise'"
    ]  # fmt: skip
    assert len(check_transforms([t("ImgRotatePil"), t("ImgRotatePil")], KEY)) == 1


def test_compose_may_make_tensors_and_indices_are_tolerated() -> None:
    inner = [t("Resize", size=[8, 8], indices=[0]), t("ToTensor")]
    assert check_transforms([t("Compose", transforms=inner), t("Normalize", mean=MEAN, std=STD)], KEY) == []
    assert pixels(t("Compose", transforms=inner)).shape == (3, 8, 8)


def test_every_offered_name_is_known_and_makeable() -> None:
    names = transform_names()
    assert set(OWN_TRANSFORMS) <= set(names) and {"Resize", "ElasticTransform", "RandomErasing"} <= set(names)
    assert not {"Lambda", "CutMix", "SanitizeBoundingBoxes", "Transform"} & set(names)
    without_arguments = [
        name for name in names if not any("needs the argument" in p for p in check_transforms([t(name)], KEY))
    ]
    assert len(without_arguments) > 25


def test_a_transform_that_fails_is_named() -> None:
    views = build_views([t("RandomCrop", size=100)], key=KEY)
    with pytest.raises(TransformFailed, match="RandomCrop: ValueError"):
        views(noise())


def test_an_empty_list_is_an_implied_to_tensor() -> None:
    data, label = Views()(noise())
    assert data.dtype == torch.uint8 and data.is_contiguous() and label is None
