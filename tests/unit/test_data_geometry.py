"""The fused crop, resize and flip: the same random numbers as torchvision, the same pixels as Pillow."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from vissl_like.core.rng import sample_scope
from vissl_like.data.decode import Encoded
from vissl_like.data.geometry import resized
from vissl_like.data.views import Views, build_views

KEY = "config.DATA.TRAIN.TRANSFORMS"
#: Allowed mean difference to Pillow, of 255; what is promised is 0.1.
CLOSE = 0.03


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth shapes with grain, like a photograph."""
    rng = np.random.RandomState(seed)
    small = Image.fromarray(rng.randint(0, 256, (9, 12, 3)).astype(np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 5, smooth.shape), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> Encoded:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return Encoded(stream.getvalue())


def t(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, **arguments}


def both(views: Views, file: Encoded, seed: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """(fused, step by step on PIL, and the next random number after each)."""
    image = file.image()
    with sample_scope(seed, 1, 2):
        fused, _ = views(file)
        after_fused = torch.rand(1).item()
    with sample_scope(seed, 1, 2):
        plain, _ = views(image)
        after_plain = torch.rand(1).item()
    return fused, plain, after_fused, after_plain


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape and one.dtype == other.dtype == torch.uint8
    return (one.int() - other.int()).abs().double().mean().item()


LISTS = {
    "random crop": [t("RandomResizedCrop", size=48)],
    "random crop and flip": [t("RandomResizedCrop", size=[40, 56]), t("RandomHorizontalFlip"), t("ToTensor")],
    "small crops": [
        t("RandomResizedCrop", size=32, scale=[0.01, 0.05], ratio=[0.3, 3]),
        t("RandomHorizontalFlip", p=1),
    ],
    "bicubic": [t("RandomResizedCrop", size=48, interpolation="bicubic"), t("RandomHorizontalFlip")],
    "Pillow's number": [t("RandomResizedCrop", size=48, interpolation=3)],
    "evaluation": [t("Resize", size=64), t("CenterCrop", size=48), t("ToTensor")],
    "evaluation, odd": [t("Resize", size=61), t("CenterCrop", size=[44, 37]), t("RandomHorizontalFlip")],
    "fixed size": [t("Resize", size=[33, 47]), t("RandomHorizontalFlip", p=1.0)],
    "then colour": [t("RandomResizedCrop", size=48), t("ColorJitter", hue=0.1), t("RandomHorizontalFlip")],
    "enlarged": [t("RandomResizedCrop", size=300), t("RandomHorizontalFlip")],
}


@pytest.mark.parametrize("name", LISTS)
def test_equals_pillow_with_the_same_random_numbers(name: str) -> None:
    views = build_views(LISTS[name], key=KEY)
    assert views.fused is not None
    flips = 0
    for seed in range(8):
        height, width = [(150, 200), (201, 133), (75, 75), (98, 307)][seed % 4]
        fused, plain, after_fused, after_plain = both(views, encoded(photo(height, width, seed)), seed)
        assert after_fused == after_plain  # the same numbers were drawn
        # Hue turns differences of one into more on grey pixels.
        assert difference(fused, plain) <= (0.3 if name == "then colour" else CLOSE)
        flips += int(difference(fused, plain.flip(-1)) > difference(fused, plain))
    assert flips == 8


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.one_of(st.integers(1, 70), st.tuples(st.integers(1, 70), st.integers(1, 70))),
    kind=st.sampled_from(["RandomResizedCrop", "Resize"]),
    mode=st.sampled_from(["bilinear", "bicubic"]),
    seed=st.integers(0, 1000),
)
def test_any_size(height: int, width: int, size: Any, kind: str, mode: str, seed: int) -> None:
    size = size if isinstance(size, int) else list(size)
    if kind == "Resize" and isinstance(size, int) and size * max(height, width) / min(height, width) > 2000:
        return
    views = build_views([t(kind, size=size, interpolation=mode), t("RandomHorizontalFlip")], key=KEY)
    fused, plain, after_fused, after_plain = both(views, encoded(photo(height, width, seed), "PNG"), seed)
    assert after_fused == after_plain
    roundings = difference(fused, plain) * fused.numel()
    assert roundings <= max(2, 0.25 * fused.numel())  # a tiny image is a few roundings
    assert int((fused.int() - plain.int()).abs().max()) <= 2


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), size=st.integers(1, 600))
def test_sizes_are_torchvisions(height: int, width: int, size: int) -> None:
    expected = v2.functional.resize(torch.empty(3, height, width, device="meta"), [size]).shape[-2:]
    assert resized(height, width, size=[size]) == tuple(expected)


@pytest.mark.parametrize("kind", ["grey", "CMYK", "PNG", "palette", "alpha", "progressive", "keep_rgb"])
def test_every_kind_of_file(kind: str) -> None:
    image = photo(90, 120)
    files = {
        "grey": lambda: encoded(image.convert("L")),
        "CMYK": lambda: encoded(image.convert("CMYK")),
        "PNG": lambda: encoded(image, "PNG"),
        "palette": lambda: encoded(image.convert("P"), "GIF"),
        "alpha": lambda: encoded(image.convert("RGBA"), "WEBP", lossless=True),
        "progressive": lambda: encoded(image, progressive=True, subsampling="4:4:4"),
        "keep_rgb": lambda: encoded(image, keep_rgb=True),
    }
    views = build_views(LISTS["random crop and flip"], key=KEY)
    fused, plain, *_ = both(views, files[kind](), 3)
    assert difference(fused, plain) <= CLOSE


@pytest.mark.parametrize(
    "transforms",
    [
        [t("RandomHorizontalFlip"), t("RandomResizedCrop", size=8)],
        [t("RandomResizedCrop", size=8, interpolation="nearest")],
        [t("Resize", size=8, max_size=20)],
        [t("RandomCrop", size=8)],
        [t("ImgPilResizeLargerSide", size=8)],
        [t("ToTensor")],
        [],
    ],
    ids=str,
)
def test_other_lists_are_not_touched(transforms: list[dict[str, Any]]) -> None:
    views = build_views(transforms, key=KEY)
    assert views.fused is None
    fused, plain, *_ = both(views, encoded(photo(40, 50)), 0)
    assert torch.equal(fused, plain)


def test_center_crop_of_a_smaller_image_is_padded() -> None:
    views = build_views([t("Resize", size=20), t("CenterCrop", size=[24, 20]), t("RandomHorizontalFlip")], key=KEY)
    for seed in range(4):
        fused, plain, after_fused, after_plain = both(views, encoded(photo(40, 50)), seed)
        assert torch.equal(fused, plain) and after_fused == after_plain
        assert int(fused[:, 0].max()) == 0


# ---------------------------------------------------------------------------------------------- reduced JPEGs
def test_reduced_decoding_changes_little() -> None:
    file = encoded(photo(601, 803), quality=90)
    for transforms in (
        [t("Resize", size=100), t("CenterCrop", size=88)],
        [t("RandomResizedCrop", size=40, scale=[0.3, 1.0]), t("RandomHorizontalFlip")],
    ):
        whole, reduced = (build_views(transforms, key=KEY, use_reduced=flag) for flag in (False, True))
        for seed in range(4):
            with sample_scope(seed, 0, 0):
                expected, _ = whole(file)
            with sample_scope(seed, 0, 0):
                found, _ = reduced(file)
            assert 0 < difference(found, expected) < 1.0
            assert difference(found, expected) < difference(found, expected.flip(-1)) / 5


def test_reduced_decoding_needs_room_and_a_jpeg() -> None:
    transforms = [t("Resize", size=[100, 100])]
    whole, reduced = (build_views(transforms, key=KEY, use_reduced=flag) for flag in (False, True))
    for file in (encoded(photo(390, 500)), encoded(photo(500, 600), "PNG")):
        assert torch.equal(whole(file)[0], reduced(file)[0])
    assert not torch.equal(*(views(encoded(photo(401, 400)))[0] for views in (whole, reduced)))


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_reduced_pixels_are_means_of_blocks(reduce: int) -> None:
    image = photo(64, 96)
    found = encoded(image, quality=98, subsampling="4:4:4").pixels(reduce=reduce)
    blocks = np.asarray(image, dtype=np.float64).reshape(64 // reduce, reduce, 96 // reduce, reduce, 3).mean((1, 3))
    assert found.shape == blocks.shape and np.abs(found - blocks).mean() < 3
