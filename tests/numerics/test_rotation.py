"""ImgRotatePil against recorded outputs of VISSL's transform (facebookresearch/vissl 09270ed)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vissl_like.config.schema_data import Data
from vissl_like.data.dataset import build_dataset
from vissl_like.data.transforms import ImgRotatePil
from vissl_like.data.views import build_views

VECTORS = np.load(Path(__file__).resolve().parents[1] / "data" / "vissl_losses.npz", allow_pickle=False)


def rotated_by(image: Image.Image, label: int, *, num_angles: int = 4) -> np.ndarray:
    """The transform's output for one label: drawn again and again until that label comes up."""
    rotate = ImgRotatePil(num_angles=num_angles)
    torch.manual_seed(0)
    for _ in range(200):
        turned, drawn = rotate(image)
        if drawn == label:
            return np.asarray(turned)
    raise AssertionError(f"label {label} never came up")


@pytest.mark.parametrize("shape", ["square", "landscape"])
@pytest.mark.parametrize("label", range(4))
def test_pixels_of_each_label(shape: str, label: int) -> None:
    image = Image.fromarray(VECTORS[f"rot_{shape}__image"])
    np.testing.assert_array_equal(rotated_by(image, label), VECTORS[f"rot_{shape}__by_label"][label])


@pytest.mark.parametrize("label", range(4))
def test_label_k_turns_counter_clockwise(label: int) -> None:
    pixels = VECTORS["rot_square__image"]
    np.testing.assert_array_equal(rotated_by(Image.fromarray(pixels), label), np.rot90(pixels, label))


@pytest.mark.parametrize("num_angles", [4, 8])
def test_stream_of_labels(num_angles: int) -> None:
    rotate = ImgRotatePil(num_angles=num_angles)
    image = Image.new("RGB", (4, 4))
    torch.manual_seed(1000 + num_angles)
    drawn = [rotate(image)[1] for _ in range(64)]
    np.testing.assert_array_equal(drawn, VECTORS[f"rot_labels_{num_angles}"])


def test_eight_angles_keep_the_canvas() -> None:
    image = Image.fromarray(VECTORS["rot_landscape__image"])
    assert {rotated_by(image, label, num_angles=8).shape for label in range(8)} == {(5, 8, 3)}
    np.testing.assert_array_equal(rotated_by(image, 6, num_angles=8), VECTORS["rot_landscape__by_label"][3])


def test_the_label_of_the_sample_is_replaced_and_the_class_count_follows() -> None:
    data = Data(TRAIN={"DATA_SOURCES": ["synthetic"], "TRANSFORMS": [{"name": "ImgRotatePil"}], "SYNTHETIC_CLASSES": 7})
    dataset = build_dataset(data, "TRAIN", seed=0, train=True)
    assert dataset.num_classes == 4
    assert dataset.class_names == ["0", "90", "180", "270"]
    for row in range(8):
        sample = dataset[row]
        upright = np.asarray(dataset.image(row))
        np.testing.assert_array_equal(sample["data"].permute(1, 2, 0).numpy(), np.rot90(upright, int(sample["label"])))


def test_an_image_without_label_gets_one() -> None:
    _, label = build_views([{"name": "ImgRotatePil"}], key="T")(Image.new("RGB", (4, 4)))
    assert label in range(4)
