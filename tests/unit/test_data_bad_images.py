"""Unreadable images: replaced the same way everywhere, listed once, an error above the limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from vissl_like.config.schema_data import Data
from vissl_like.data.badimages import add_to_list
from vissl_like.data.dataset import build_dataset
from vissl_like.data.images import ImageDataset
from vissl_like.data.loader import close_workers, eval_batches, train_batches
from vissl_like.errors import DataError

COUNT = 20
BAD = {3: "truncated", 8: "empty file", 13: "not an image"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for row in range(COUNT):
        file = tmp_path / "images" / ("a", "b")[row % 2] / f"{row:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (row, 0, 0)).save(file)
    root = tmp_path / "images"
    jpeg = root / "b" / "03.png"
    Image.radial_gradient("L").save(jpeg, format="jpeg")
    jpeg.write_bytes(jpeg.read_bytes()[:700])
    (root / "a" / "08.png").write_bytes(b"")
    (root / "b" / "13.png").write_text("not pixels")
    return root


def build(images: Path, *, limit: float = 0.5, run_dir: Path | None = None) -> ImageDataset:
    # A list in the order of the numbers, so that row k is image k.
    listing = images / "list.txt"
    listing.write_text("\n".join(f"{('a', 'b')[row % 2]}/{row:02d}.png" for row in range(COUNT)))
    options = {"DATA_SOURCES": ["disk_filelist"], "DATA_PATHS": [str(listing)], "LABEL_TYPE": "sample_index"}
    return build_dataset(Data(TRAIN=options, MAX_BAD_FRACTION=limit), "TRAIN", seed=4, run_dir=run_dir)


def test_replacement_and_its_label(images: Path) -> None:
    dataset = build(images)
    for row in range(COUNT):
        sample = dataset[row]
        seen = int(sample["data"][0, 0, 0])
        assert sample["valid"] == (row not in BAD) and sample["index"] == row
        assert int(sample["label"]) == seen and seen not in BAD
        assert (seen == row) == (row not in BAD)
    assert set(dataset.bad) == set(BAD)
    assert all(BAD[row] in reason for row, reason in dataset.bad.items())


def test_replacement_does_not_depend_on_workers_ranks_or_history(images: Path) -> None:
    def seen(workers: int, size: int, *, epoch: int = 0) -> dict[int, int]:
        found: dict[int, int] = {}
        for rank in range(size):
            dataset = build(images)
            options = {"seed": 4, "batch_per_rank": 5, "rank": rank, "size": size, "workers": workers, "method": "fork"}
            for batch in train_batches(dataset, epoch=epoch, **options):
                found.update(zip(batch["index"].tolist(), batch["data"][:, 0, 0, 0].tolist()))
                assert batch["valid"].tolist() == [row not in BAD for row in batch["index"].tolist()]
            assert set(dataset.bad) <= set(BAD)
            close_workers(dataset)
        return found

    alone = seen(0, 1)
    assert len(alone) == COUNT and alone == seen(2, 1) == seen(1, 2) == seen(0, 4)
    assert alone == seen(0, 1, epoch=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_reported_in_evaluation_and_listed_once(
    images: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = build(images)
    valid = torch.cat([batch["valid"] for batch in eval_batches(dataset, batch=6, workers=workers, method="fork")])
    assert (~valid).nonzero().flatten().tolist() == sorted(BAD)
    file = dataset.write_bad_images(tmp_path)
    assert file == tmp_path / "bad_images.txt"
    first = file.read_text()
    dataset.write_bad_images(tmp_path)
    said = (
        f"config.DATA.TRAIN: {len(BAD)} of {COUNT} images cannot be read, others stand in for them; {file} lists them"
    )
    assert [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()] == [said]
    lines = first.splitlines()
    assert file.read_text() == first and lines[0].startswith("#") and len(lines) == 1 + len(BAD)
    assert f"TRAIN\t{images}/a/08.png\tempty file" in lines
    close_workers(dataset)


def test_nothing_bad_writes_nothing(images: Path, tmp_path: Path) -> None:
    dataset = build(images)
    assert dataset[0]["valid"] and dataset.write_bad_images(tmp_path) is None
    assert not (tmp_path / "bad_images.txt").exists()


def test_splits_share_the_list(tmp_path: Path) -> None:
    add_to_list(tmp_path, split="TEST", bad={"/x/a\tb.png": "odd"})
    add_to_list(tmp_path, split="TRAIN", bad={"/x/a.png": "worse"})
    add_to_list(tmp_path, split="TRAIN", bad={"/x/a.png": "worse"})
    assert (tmp_path / "bad_images.txt").read_text().splitlines()[1:] == [
        "TEST\t/x/a\tb.png\todd", "TRAIN\t/x/a.png\tworse"
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_are_an_error_at_once(images: Path, tmp_path: Path, workers: int) -> None:
    dataset = build(images, limit=0.1, run_dir=tmp_path)
    with pytest.raises(DataError, match=r"at least 3 of 20 images.*MAX_BAD_FRACTION=0.1") as error:
        list(eval_batches(dataset, batch=4, workers=workers, method="fork"))
    assert "bad_images.txt" in str(error.value) and "Original Traceback" not in str(error.value)
    assert (tmp_path / "bad_images.txt").read_text().count("\n") == 4
    close_workers(dataset)


def test_the_allowed_share_is_allowed(images: Path) -> None:
    assert len(list(eval_batches(build(images, limit=0.15), batch=4))) == 5


def test_a_missing_file_is_a_bad_image(images: Path) -> None:
    dataset = build(images)
    (images / "a" / "00.png").unlink()
    assert not dataset[0]["valid"] and dataset.bad[0] == "no such file"


def test_nothing_readable_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("")
    options = {"DATA_SOURCES": ["disk_folder"], "DATA_PATHS": [str(tmp_path)]}
    dataset = build_dataset(Data(TRAIN=options, MAX_BAD_FRACTION=1), "TRAIN", seed=0)
    with pytest.raises(DataError, match=r"images were tried, none can be read; the first is .*a\.png: empty file"):
        dataset[0]
    with pytest.raises(DataError, match=r"a\.png: empty file"):
        dataset.image(0)
