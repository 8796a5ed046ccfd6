"""Pictures of part maps: colours, what is drawn and when, the way back to pixels, and maps that are not finite."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vissl_like.config.schema_data import Data, Split
from vissl_like.config.schema_parts import PartMaps
from vissl_like.data.dataset import build_dataset
from vissl_like.errors import DataError
from vissl_like.outputs.part_figures import (
    HEAT_SIDE,
    SIDE,
    Pixels,
    draw_part_maps,
    finite,
    is_drawn,
    overlay,
    part_colour,
    save_part_maps,
)


def corners(parts: int = 4, side: int = 4) -> torch.Tensor:
    """(1, parts + 1, side, side): part k fills the k-th quarter; what no part fills is background."""
    maps = torch.zeros(1, parts + 1, side, side)
    half = side // 2
    for k in range(4):
        top, left = k // 2 * half, k % 2 * half
        maps[0, k if k < parts else parts, top : top + half, left : left + half] = 1
    return maps


# ------------------------------------------------------------------------------------------------------------- overlays
def test_an_overlay_mixes_colour_and_grey_and_leaves_the_background() -> None:
    chance = np.random.default_rng(0)
    picture = chance.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    found = overlay(picture, corners(parts=3)[0].numpy())
    assert np.array_equal(found[2:, 2:], picture[2:, 2:])
    for k, (rows, columns) in enumerate(
        [(slice(0, 2), slice(0, 2)), (slice(0, 2), slice(2, 4)), (slice(2, 4), slice(0, 2))]
    ):
        grey = picture[rows, columns].mean(axis=2, keepdims=True)
        assert np.abs(found[rows, columns] - (grey + np.array(part_colour(k))) / 2).max() <= 0.5


def test_colours_are_far_apart() -> None:
    colours = np.array([part_colour(part) for part in range(60)])
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 1000 * np.eye(60)
    assert len({tuple(colour) for colour in colours.tolist()}) == 60
    assert distance[:16, :16].min() > 50


@pytest.mark.parametrize("heat_maps", [False, True])
def test_a_sheet_shows_every_part_where_it_is(heat_maps: bool) -> None:
    """Images are white: the colour in the middle of each quarter is half the part's and half white."""
    images, side = np.full((2, 8, 8, 3), 255, dtype=np.uint8), HEAT_SIDE if heat_maps else SIDE
    sheet = np.asarray(draw_part_maps(images, corners(parts=3).expand(2, -1, -1, -1), rows=[5, 7], heat_maps=heat_maps))
    top, left = (14 + 22 if heat_maps else 14), 14 + side + 3
    quarter = side // 8
    for k, (y, x) in enumerate([(0, 0), (0, 1), (1, 0)]):
        pixel = sheet[top + y * side // 2 + quarter, left + x * side // 2 + quarter]
        assert np.abs(pixel - (255 + np.array(part_colour(k))) / 2).max() <= 1
        if heat_maps:
            tile = sheet[top:, left + (k + 1) * (side + 3) :]
            assert np.abs(tile[y * side // 2 + quarter, x * side // 2 + quarter] - part_colour(k)).max() <= 1
            assert tile[side - quarter, side - quarter].tolist() == [89, 89, 89]  # 0.35 of white
    assert sheet[top + side - quarter, left + side - quarter].tolist() == [255, 255, 255]


# ------------------------------------------------------------------------------------------------------- maps not finite
def test_infinite_and_missing_values() -> None:
    inf, nan = torch.inf, torch.nan
    cells = torch.tensor(
        [[0.2, 0.3, 0.5], [inf, 0.1, 0.2], [-inf, 0.4, 0.6], [-inf, -inf, inf], [nan, 0.9, 0.1], [nan, inf, 0.0]]
    )
    expected = [[0.2, 0.3, 0.5], [1, 0, 0], [0, 0.4, 0.6], [0, 0, 1], [0, 0, 1], [0, 0, 1]]
    found = finite(cells.T[None, :, None])
    torch.testing.assert_close(found[0, :, 0].T, torch.tensor(expected))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_one_bad_cell_changes_no_other(seed: int, value: float) -> None:
    maps = torch.softmax(torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(seed)), dim=1)
    bad = maps.clone()
    bad[1, seed % 4, 2, 3] = value
    found = finite(bad)
    assert found.isfinite().all()
    found[1, :, 2, 3] = maps[1, :, 2, 3]
    assert torch.equal(found, maps)


# ----------------------------------------------------------------------------------------------------------------- when
def test_when_maps_are_drawn() -> None:
    options = PartMaps(SAVING_PROB=0.05, EVERY_EPOCHS=10)
    where = {"seed": 3, "num_epochs": 28}
    epochs = [epoch for epoch in range(29) if is_drawn(options, epoch=epoch, batch=0, **where)]
    assert epochs == [0, 1, 10, 20, 28]
    drawn = {
        (epoch, batch)
        for epoch in (1, 10)
        for batch in range(4000)
        if is_drawn(options, epoch=epoch, batch=batch, **where)
    }
    counts = [sum(epoch == given for given, _ in drawn) for epoch in (1, 10)]
    assert all(150 <= count <= 250 for count in counts)  # 200 expected, deviation 14
    assert {batch for epoch, batch in drawn if epoch == 1} != {batch for epoch, batch in drawn if epoch == 10}
    assert not any(is_drawn(PartMaps(SAVING_PROB=0), epoch=1, batch=batch, **where) for batch in range(50))
    assert all(is_drawn(PartMaps(SAVING_PROB=1), epoch=1, batch=batch, **where) for batch in range(50))


# ------------------------------------------------------------------------------------------------------- back to pixels
NORMALIZE = {"name": "Normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
RAW = {"name": "Normalize", "mean": [120.0, 110.0, 100.0], "std": [60.0, 61.0, 62.0]}


@pytest.mark.parametrize(
    "tail",
    [
        [],
        [{"name": "ToTensor"}],
        [{"name": "ToTensor"}, NORMALIZE],
        [{"name": "ToTensor"}, NORMALIZE, {"name": "RandomErasing", "p": 0.0}],
        [{"name": "ImgPilToRawTensor"}, RAW],
    ],
    ids=len,
)
def test_pixels_come_back_through_the_splits_own_transforms(tail: list[dict[str, object]]) -> None:
    transforms = [{"name": "Resize", "size": 20}, *tail]
    data = Data(TEST=Split(DATA_SOURCES=["synthetic"], NUM_SYNTHETIC=4, TRANSFORMS=transforms))
    images = build_dataset(data, "TEST", seed=0)
    samples = torch.stack([images[row]["data"] for row in range(4)])
    seen = images.device_transform(samples)
    found = Pixels.of(transforms)(seen)
    assert found.dtype == np.uint8 and found.shape == (4, 20, 20, 3) and found.std() > 10
    plain = build_dataset(
        data.model_copy(update={"TEST": data.TEST.model_copy(update={"TRANSFORMS": transforms[:1]})}), "TEST", seed=0
    )
    expected = torch.stack([plain[row]["data"] for row in range(4)]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, expected)
    assert np.array_equal(Pixels.of(transforms)(torch.from_numpy(expected).permute(0, 3, 1, 2)), expected)


def test_grey_lab_and_broken_images() -> None:
    assert Pixels()(torch.full((1, 1, 2, 2), 0.5)).tolist() == [[[[128] * 3] * 2] * 2]
    lab = Pixels.of([{"name": "ImgPil2LabTensor"}])
    assert lab(torch.tensor([100.0, 20.0, -20.0]).view(1, 3, 1, 1)).tolist() == [[[[255, 255, 255]]]]
    assert Pixels()(torch.tensor([torch.nan, 9.0, -9.0]).view(1, 3, 1, 1)).tolist() == [[[[0, 255, 0]]]]


# ----------------------------------------------------------------------------------------------------------------- files
def test_files_of_a_batch(tmp_path: Path) -> None:
    images = np.zeros((5, 16, 16, 3), dtype=np.uint8)
    maps = corners(parts=3).expand(5, -1, -1, -1).to(torch.bfloat16)
    file = save_part_maps(tmp_path, images, maps, rows=range(40, 45), epoch=10, batch=8, options=PartMaps(MAX_IMAGES=2))
    assert sorted(path.name for path in (tmp_path / "part_maps").iterdir()) == ["0010_00008.jpg", "0010_00008.json"]
    about = json.loads(file.with_suffix(".json").read_text())
    assert about == {"epoch": 10, "batch": 8, "rows": [40, 41], "num_parts": 3, "area": [0.25] * 4}
    with Image.open(file) as picture:
        width = picture.width
    again = save_part_maps(tmp_path, images, maps, rows=range(40, 45), epoch=10, batch=8, options=PartMaps())
    with Image.open(again) as picture:
        assert again == file and picture.width > width and picture.format == "JPEG"


@pytest.mark.parametrize(
    ("parts", "grid", "size"), [(1, (1, 1), (9, 9)), (30, (3, 5), (300, 500)), (4, (40, 2), (20, 1))]
)
def test_any_shape_is_drawn(tmp_path: Path, parts: int, grid: tuple[int, int], size: tuple[int, int]) -> None:
    maps = torch.softmax(torch.randn(1, parts + 1, *grid, generator=torch.Generator().manual_seed(0)), dim=1)
    images = np.full((1, *size, 3), 90, dtype=np.uint8)
    for heat_maps in (False, True):
        options = PartMaps(HEAT_MAPS=heat_maps)
        with Image.open(save_part_maps(tmp_path, images, maps, rows=[0], epoch=0, batch=0, options=options)) as picture:
            assert 40 < picture.width < 6000 and 40 < picture.height < 1000
            assert np.asarray(picture).std() > 5


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "part_maps").write_text("in the way")
    with pytest.raises(DataError, match="0001_00000.jpg: the part maps cannot be written"):
        save_part_maps(
            tmp_path, np.zeros((1, 4, 4, 3), np.uint8), corners(), rows=[0], epoch=1, batch=0, options=PartMaps()
        )
