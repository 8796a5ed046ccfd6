"""ImageNet-9 on tiny folders with a classifier whose every answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vissl_like.analysis.backgrounds import Backgrounds
from vissl_like.analysis.extraction import Loading
from vissl_like.config.schema import Config
from vissl_like.data.imagenet9 import ImageNet9Source, read_class_map
from vissl_like.errors import ConfigError, DataError

CLASSES = ("00_dog", "01_bird", "02_wheeled vehicle", *(f"{k:02}_kind{k}" for k in range(3, 9)))
SIDE = 8
TRANSFORMS = [{"name": "ToTensor"}, {"name": "Normalize", "mean": [0.5] * 3, "std": [0.5] * 3}]


class Reader(torch.nn.Module):
    """Reads the class from the red of the middle, and takes the next one where the corner is green enough."""

    def __init__(self, num_classes: int, *, step: int = 1) -> None:
        super().__init__()
        self.num_classes, self.step = num_classes, step

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = ((images * 0.5 + 0.5) * 255).round()
        number = (pixels[:, 0, SIDE // 2, SIDE // 2] / 20).long()
        fooled = pixels[:, 1, 0, 0] > 100
        return torch.nn.functional.one_hot((number * self.step + fooled) % self.num_classes, self.num_classes).float()


def picture(file: Path, kind: int, *, green: int) -> None:
    """The object, red as its class, in the middle; everything else as green as given."""
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[..., 1] = green
    pixels[2:6, 2:6] = (20 * kind + 5, 0, 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images a class. Green grounds: of `mixed_same` in class 0, of `mixed_rand` in two images of classes 0 to 3."""
    for k, name in enumerate(CLASSES):
        for i in range(3):
            for variant, is_green in {
                "original": False,
                "mixed_same": k == 0,
                "mixed_rand": k < 4 and i < 2,
            }.items():
                picture(tmp_path / variant / "val" / name / f"{i}.png", k, green=200 if is_green else 0)
            if i < 2:  # the object of the third image is not known
                mask = np.zeros((SIDE, SIDE), dtype=bool)
                mask[2:6, 2:6] = True
                mask[0, 0] = k in (5, 6) and i == 0  # this one covers the corner that misleads
                file = tmp_path / "fg_mask" / "val" / name / f"{i}.npy"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, mask)
            picture(tmp_path / "only_bg_t" / "val" / name / f"{i}.png", 7, green=150 if (k, i) == (8, 2) else 10)
    return tmp_path


def backgrounds(folder: Path, model: torch.nn.Module, *, batch: int = 4, **options: Any) -> Backgrounds:
    test = {"TRANSFORMS": TRANSFORMS, "BATCHSIZE_PER_REPLICA": batch}
    config = Config.model_validate(
        {"DATA": {"TEST": test}, "EVALUATE_PARTS": {"BACKGROUNDS": {"PATH": str(folder), **options}}}
    )
    return Backgrounds(model, lambda model, images: {"": model(images)}, config, Loading(threads=2))


def test_accuracies_and_the_gap(folder: Path) -> None:
    found = backgrounds(folder, Reader(9)).accuracies()
    same, random = 100 * 24 / 27, 100 * 19 / 27
    assert found == pytest.approx(
        {"in9_original": 100.0, "in9_mixed_same": same, "in9_mixed_rand": random, "bg_gap": same - random}
    )


def test_classes_of_imagenet_are_mapped_to_nine(folder: Path) -> None:
    """Of 27 classes, 3k and 3k+1 are the k-th of nine except that 1 is none: a misled model errs in class 0 alone."""
    content = {str(c): c // 3 if c % 3 < 2 and c != 1 else -1 for c in range(27)}
    (folder / "in_to_in9.json").write_text(json.dumps(content))
    found = backgrounds(folder, Reader(27, step=3), VARIANTS=["mixed_same", "mixed_rand", "original"]).accuracies()
    same, random = 100 * 24 / 27, 100 * 25 / 27
    assert found == pytest.approx(
        {"in9_original": 100.0, "in9_mixed_same": same, "in9_mixed_rand": random, "bg_gap": same - random}
    )


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_one_background_that_misleads_is_enough(folder: Path, batch: int) -> None:
    """The corner of one image in classes 5 and 6 belongs to the object: 2 of 18 images with masks stand."""
    found = backgrounds(folder, Reader(9), batch=batch).challenge()
    assert found.pop("background_challenge") == pytest.approx(100 * 2 / 18)
    assert found["background_challenge_of_wheeled_vehicle"] == 0 and len(found) == 9
    assert found["background_challenge_of_kind5"] == found["background_challenge_of_kind6"] == 50


def test_harmless_backgrounds_leave_all_standing(folder: Path) -> None:
    found = backgrounds(folder, Reader(9), ONLY_BACKGROUNDS="original").challenge()
    assert found["background_challenge"] == 100 and set(found.values()) == {100.0}


def test_what_is_missing_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"BACKGROUNDS.PATH is not given"):
        backgrounds(folder, Reader(9), PATH="").accuracies()
    with pytest.raises(DataError, match="no such folder"):
        backgrounds(folder, Reader(9), VARIANTS=["mixed_next"]).accuracies()
    with pytest.raises(DataError, match=r"in_to_in9.json: cannot be read \(No such file.*scripts of the"):
        backgrounds(folder, Reader(10)).accuracies()
    (folder / "in_to_in9.json").write_text(json.dumps({str(c): 0 for c in range(11)}))
    with pytest.raises(ConfigError, match="maps 11 classes, but the model has 10"):
        backgrounds(folder, Reader(10)).accuracies()
    (folder / "original" / "val" / CLASSES[3]).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="each of the 9 classes, found 8"):
        ImageNet9Source(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": 1,\n "1" 2}', "line 2: is not JSON"),
        ('{"0": 1, "2": 2}', "keys 0, 1, 2"),
        ('{"0": 1, "1": 9}', "class 1 is 9; expected 0 to 8"),
        ('{"0": true}', "class 0 is True"),
        ("[1, 2]", "expected an object"),
    ],
)
def test_damaged_class_maps(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_class_map(tmp_path / "map.json")


def test_damaged_masks(folder: Path) -> None:
    source = ImageNet9Source(folder)
    assert source.rows_with_masks().tolist() == [3 * k + i for k in range(9) for i in (0, 1)]
    file = folder / "fg_mask" / "val" / CLASSES[0] / "0.npy"
    np.save(file, np.ones((SIDE, SIDE, 3)))
    assert source.mask(0).shape == (SIDE, SIDE)
    np.save(file, np.ones(SIDE))
    with pytest.raises(DataError, match=r"expected a mask \(height, width\)"):
        source.mask(0)
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        source.mask(0)
    np.save(file, np.ones((SIDE, SIDE + 1)))
    with pytest.raises(DataError, match="A mask must fit its image"):
        backgrounds(folder, Reader(9)).challenge()
