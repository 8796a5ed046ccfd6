"""Annotated data sets against the lists and coordinates that the original loaders gave for the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vissl_like.config.schema_data import TrainSplit
from vissl_like.data.annotations import Framing
from vissl_like.data.cub import WATERBIRDS, CubFolder, CubSource, WaterbirdsSource
from vissl_like.data.views import build_views

DATA = Path(__file__).parents[1] / "data"
RECORDED = np.load(DATA / "parts_data.npz")
ABOUT: dict[str, Any] = json.loads((DATA / "parts_data.json").read_text())
SIZE = 28


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the recorded loaders read."""
    root = tmp_path_factory.mktemp("cub")
    for name, text in ABOUT["files"].items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for number, line in enumerate(ABOUT["files"]["images.txt"].splitlines()):
        for folder in ("images", WATERBIRDS):
            file = root / folder / line.split()[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(RECORDED[f"img_{number}"]).save(file)
    return root


def source(root: Path, split: str, **options: Any) -> CubSource:
    folder = CubFolder(root)
    return CubSource(folder, folder.rows(split.upper(), TrainSplit(**options)), name="cub")


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("ratio", [1, 0.9])
def test_lists_in_file_order(root: Path, split: str, ratio: float) -> None:
    """The same images; the original counts classes anew within each subset, here a number means the same in all."""
    recorded = ABOUT["lists"][f"cub/{split}/ratio_{ratio}"]
    found = source(root, split, FRACTION=ratio, ORDER="file")
    assert found.paths.tolist() == [path for path, _ in recorded["items"]]
    assert found.labels is not None
    present, anew, counts = np.unique(found.labels, return_inverse=True, return_counts=True)
    assert anew.tolist() == [label for _, label in recorded["items"]]
    assert counts.tolist() == recorded["class_counts"] and len(counts) == recorded["num_classes"]
    ids = found.folder.class_ids[present].tolist()
    assert {str(number): value for number, value in enumerate(ids)} == recorded["new_to_original_label"]
    assert found.class_names == ["001.Class_1", "002.Class_2", "004.Class_4"]


@pytest.mark.parametrize("split", ["train", "val", "test", "worst_case", "best_case"])
def test_waterbirds(root: Path, split: str) -> None:
    subset = split if split.endswith("case") else ""
    found = WaterbirdsSource(root, split="TEST" if subset else split.upper(), subset=subset)
    recorded, counts = (ABOUT["lists"][f"waterbirds/{split}"][key] for key in ("items", "class_counts"))
    assert found.paths.tolist() == [item[0] for item in recorded]
    assert found.labels is not None and found.labels.tolist() == [item[1] for item in recorded]
    assert found.groups.tolist() == [2 * item[1] + item[2] for item in recorded]
    assert np.bincount(found.labels, minlength=2).tolist() == counts


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("crop", [False, True])
def test_keypoints_and_boxes(root: Path, split: str, crop: bool) -> None:
    """Twice: what is read a second time is not moved a second time."""
    images, framing = source(root, split), Framing(SIZE, crop=crop, crop_extent=False)
    name = f"parts/{split}/{'crop' if crop else 'nocrop'}"
    for _ in range(2):
        points, boxes = [], []
        for row in range(len(images)):
            width, height = Image.open(images.file(row)).size
            points.append(framing.keypoints(images.keypoints(row), height=height, width=width))
            boxes.append(framing.box(images.box(row), height=height, width=width))
            expected = [SIZE, SIZE] if crop else list(framing.resized(height, width))
            assert RECORDED[f"{name}/image_sizes"][row].tolist() == expected
        np.testing.assert_allclose(np.array(points), RECORDED[f"{name}/keypoints"][..., 1:], atol=1e-5)
        np.testing.assert_allclose(np.array(boxes), RECORDED[f"{name}/boxes"][:, 1:], atol=1e-5)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("crop", ["crop", "nocrop"])
def test_what_belongs_to_which_image_class_and_part(root: Path, split: str, crop: str) -> None:
    """Boxes name the line of train_test_split.txt, keypoints their part, labels the class among those of all images."""
    images = source(root, split)
    listed, names = (
        [line.split(maxsplit=1) for line in ABOUT["files"][name].splitlines()]
        for name in ("train_test_split.txt", "parts/parts.txt")
    )
    lines = RECORDED[f"parts/{split}/{crop}/boxes"][:, 0].astype(int)
    assert [images.folder.ids[row] for row in images.rows] == [listed[line][0] for line in lines]
    assert images.labels is not None and images.labels.tolist() == RECORDED[f"parts/{split}/{crop}/labels"].tolist()
    for parts in RECORDED[f"parts/{split}/{crop}/keypoints"][..., 0].astype(int):
        assert [dict(names)[str(part)] for part in parts] == images.keypoint_names


def test_cropped_boxes_stay_in_the_frame() -> None:
    framing = Framing(SIZE)
    assert framing.box(np.array([0.0, 0.0, 56.0, 28.0]), height=28, width=56).tolist() == [0, 0, 28, 28]
    outside = framing.box(np.array([50.0, 0.0, 5.0, 5.0]), height=28, width=56)
    assert outside[0] == 28 and outside[2] == 1


@pytest.mark.parametrize("number", [0, 3, 7])
def test_eval_transform(number: int) -> None:
    views = build_views(
        [
            {"name": "Resize", "size": SIZE},
            {"name": "CenterCrop", "size": SIZE},
            {"name": "ToTensor"},
            {"name": "Normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        ],
        key="TRANSFORMS",
    )
    data, _ = views(Image.fromarray(RECORDED[f"img_{number}"]))
    found = views.device_transform(data[None])[0].numpy()
    np.testing.assert_allclose(found, RECORDED[f"eval_transform/{number}"], atol=1e-5)


def test_stratified_split_keeps_every_class(root: Path) -> None:
    train, val = source(root, "train", FRACTION=0.6), source(root, "val", FRACTION=0.6)
    assert train.labels is not None and set(train.labels.tolist()) == {0, 1, 2}
    assert len(train) == 5 and len(val) == 4
    assert not set(train.paths.tolist()) & set(val.paths.tolist())
    assert source(root, "train", FRACTION=0.6).paths.tolist() == train.paths.tolist()
