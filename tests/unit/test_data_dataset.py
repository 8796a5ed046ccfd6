"""Splits as datasets: catalog, parallel lists, DATA_LIMIT, class numbers over splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vissl_like.config.schema_data import Data, Split
from vissl_like.data.dataset import build_dataset, is_used
from vissl_like.data.limit import limited_rows
from vissl_like.errors import ConfigError, DataError


def put(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(root / name)
    return root


def folder(path: Path, **options: Any) -> dict[str, Any]:
    return {"DATA_SOURCES": ["disk_folder"], "DATA_PATHS": [str(path)], **options}


# ----------------------------------------------------------------------------------------------- catalog
@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    put(tmp_path / "birds" / "train", "owl/1.png", "tit/2.png")
    put(tmp_path / "birds" / "val", "tit/3.png")
    np.save(tmp_path / "list_images.npy", np.array([str(tmp_path / "birds/train/tit/2.png")]))
    np.save(tmp_path / "list_labels.npy", np.array([7]))
    entries = {
        "birds_folder": {"train": ["birds/train", "birds/train"], "val": ["birds/val", "birds/val"]},
        "birds_list": {"train": ["list_images.npy", "list_labels.npy"]},
    }
    file = tmp_path / "my_catalog.json"
    file.write_text(json.dumps(entries))
    return file


def by_name(name: str, source: str = "disk_folder") -> dict[str, Any]:
    return {"DATA_SOURCES": [source], "DATASET_NAMES": [name]}


def test_catalog_by_option(catalog: Path) -> None:
    data = Data(CATALOG=str(catalog), TRAIN=by_name("birds_folder"), TEST=by_name("birds_folder"))
    train, test = build_dataset(data, "TRAIN", seed=0, train=True), build_dataset(data, "TEST", seed=0)
    assert train.paths.tolist() == ["owl/1.png", "tit/2.png"] and train.name == "birds_folder"
    assert test.paths.tolist() == ["tit/3.png"]
    listed = build_dataset(Data(CATALOG=str(catalog), TRAIN=by_name("birds_list", "disk_filelist")), "TRAIN", seed=0)
    assert listed.labels is not None and listed.labels.tolist() == [7]


def test_catalog_by_environment_and_by_place(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(TRAIN=by_name("birds_folder"))
    monkeypatch.setenv("VISSL_DATASET_CATALOG_PATH", str(catalog))
    assert len(build_dataset(data, "TRAIN", seed=0)) == 2
    monkeypatch.delenv("VISSL_DATASET_CATALOG_PATH")
    monkeypatch.chdir(catalog.parent)
    with pytest.raises(DataError, match=r"there is no catalog.*config\.DATA\.TRAIN\.DATA_PATHS"):
        build_dataset(data, "TRAIN", seed=0)
    catalog.rename(catalog.with_name("dataset_catalog.json"))
    assert len(build_dataset(data, "TRAIN", seed=0)) == 2


def test_catalog_errors(catalog: Path) -> None:
    def build(name: str, split: str = "TRAIN") -> None:
        build_dataset(Data(CATALOG=str(catalog), **{split: by_name(name)}), split, seed=0)

    with pytest.raises(DataError, match=r"did you mean 'birds_folder'.*Known: birds_folder, birds_list.*DATA_PATHS"):
        build("bird_folder")
    with pytest.raises(DataError, match=r"has \['train'\] of it, not 'test'"):
        build("birds_list", "TEST")
    catalog.write_text("[]")
    with pytest.raises(DataError, match="a catalog is"):
        build("birds_list")
    catalog.write_text("{")
    with pytest.raises(DataError, match="not a readable JSON catalog"):
        build("birds_list")
    catalog.unlink()
    with pytest.raises(DataError, match="config.DATA.CATALOG=.*no such file"):
        build("birds_list")


# --------------------------------------------------------------------------------------------------- lists
def test_lists_are_parallel() -> None:
    wrong = {"DATA_SOURCES": ["disk_folder", "sintetic"], "DATASET_NAMES": ["a"], "DATA_PATHS": ["a", "b", "c"],
             "LABEL_SOURCES": ["disk_fodler", "disk_folder"]}  # fmt: skip
    with pytest.raises(ConfigError) as error:
        build_dataset(Data(TRAIN=wrong), "TRAIN", seed=0)
    text = str(error.value)
    assert "config.DATA.TRAIN.DATASET_NAMES has 1 entries but DATA_SOURCES has 2" in text
    assert "config.DATA.TRAIN.DATA_PATHS has 3 entries" in text
    assert "did you mean 'synthetic'" in text and "did you mean 'disk_folder'" in text


def test_an_unused_split() -> None:
    assert not is_used(Data(), "VAL") and is_used(Data(VAL={"DATA_SOURCES": ["synthetic"]}), "VAL")
    with pytest.raises(ConfigError, match=r"config\.DATA\.VAL\.DATA_SOURCES is empty"):
        build_dataset(Data(), "VAL", seed=0)
    with pytest.raises(ConfigError, match=r"add DATA_SOURCES=\[disk_folder\]"):
        build_dataset(Data(TRAIN={"DATA_PATHS": ["x"]}), "TRAIN", seed=0)


def test_transforms_are_checked_before_images_are_looked_for() -> None:
    with pytest.raises(ConfigError, match=r"config\.DATA\.TRAIN\.TRANSFORMS\.0"):
        build_dataset(Data(TRAIN=folder(Path("/nowhere"), TRANSFORMS=[{"name": "Resiz"}])), "TRAIN", seed=0)


def test_several_sources_are_one_dataset(tmp_path: Path) -> None:
    put(tmp_path / "x", "cat/1.png", "elk/2.png")
    put(tmp_path / "y", "dog/1.png")
    options = {"DATA_SOURCES": ["disk_folder"] * 2, "DATA_PATHS": [str(tmp_path / "x"), str(tmp_path / "y")]}
    dataset = build_dataset(Data(TRAIN=options), "TRAIN", seed=0, train=True)
    assert dataset.labels is not None and dataset.labels.tolist() == [0, 2, 1]
    assert dataset.class_names == ["cat", "dog", "elk"] and dataset.num_classes == 3
    assert dataset.file(2) == str(tmp_path / "y" / "dog" / "1.png")


# ---------------------------------------------------------------------------------------------- class numbers
def test_test_classes_are_numbered_as_in_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "train", "ant/1.png", "bee/1.png", "cat/1.png")
    put(tmp_path / "test", "cat/1.png", "ant/1.png")
    data = Data(TRAIN=folder(tmp_path / "train"), TEST=folder(tmp_path / "test"))
    test = build_dataset(data, "TEST", seed=0)
    assert test.labels is not None and test.labels.tolist() == [0, 2] and test.num_classes == 3
    put(tmp_path / "test", "ape/1.png")
    test = build_dataset(data, "TEST", seed=0)
    assert test.labels is not None and test.labels.tolist() == [0, 3, 2]
    assert test.class_names == ["ant", "bee", "cat", "ape"] and "not in TRAIN" in caplog.text


def test_named_label_files_agree_over_splits(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png")
    files = {}
    for split, names in (("train", ["b", "c"]), ("test", ["c", "c"])):
        files[split] = str(tmp_path / f"{split}_labels.npy")
        np.save(files[split], np.array(names))
        np.save(tmp_path / f"{split}_images.npy", np.array(["1.png", "2.png"]))
    data = Data(
        TRAIN=folder(tmp_path, LABEL_PATHS=[files["train"]]), TEST=folder(tmp_path, LABEL_PATHS=[files["test"]])
    )
    test = build_dataset(data, "TEST", seed=0)
    assert test.labels is not None and test.labels.tolist() == [1, 1]


# ---------------------------------------------------------------------------------------------- DATA_LIMIT
def limited(
    n: int, limit: int, *, seed: int = 0, balanced: bool = False, skip: int = 0, labels: Any = None
) -> list[int]:
    sampling = {"SEED": seed, "IS_BALANCED": balanced, "SKIP_NUM_SAMPLES": skip}
    options = Split(DATA_LIMIT=limit, DATA_LIMIT_SAMPLING=sampling)
    rows = limited_rows(n, options=options, labels=labels, key="config.DATA.TRAIN")
    return list(range(n)) if rows is None else rows.tolist()


@given(st.integers(1, 60), st.integers(1, 80), st.integers(0, 5))
def test_limit_takes_distinct_rows_in_order(n: int, limit: int, seed: int) -> None:
    rows = limited(n, limit, seed=seed)
    assert len(rows) == min(n, limit) and rows == sorted(set(rows)) and set(rows) <= set(range(n))
    assert rows == limited(n, limit, seed=seed)


@given(st.integers(2, 60), st.data())
def test_skipping_makes_disjoint_subsets(n: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, n - 1))
    assert not set(limited(n, first)) & set(limited(n, n, skip=first))
    assert len(limited(n, n, skip=first)) == n - first


@given(st.integers(2, 5), st.integers(3, 8), st.integers(0, 3))
def test_balanced_limit(classes: int, each: int, seed: int) -> None:
    labels = np.random.RandomState(seed).permutation(np.repeat(np.arange(classes), each + 2))
    rows = limited(len(labels), classes * each, balanced=True, labels=labels, seed=seed)
    assert np.bincount(labels[rows]).tolist() == [each] * classes
    rest = limited(len(labels), classes * 2, balanced=True, labels=labels, seed=seed, skip=classes * each)
    assert not set(rows) & set(rest) and np.bincount(labels[rest]).tolist() == [2] * classes


@given(st.integers(2, 5), st.integers(0, 30), st.integers(5, 30), st.integers(0, 3))
def test_a_balanced_limit_is_met_exactly_and_skipping_is_disjoint(
    classes: int, skip: int, limit: int, seed: int
) -> None:
    labels = np.random.RandomState(seed).permutation(np.repeat(np.arange(classes), 31))
    options: dict[str, Any] = {"balanced": True, "labels": labels, "seed": seed}
    rows = limited(len(labels), limit, skip=skip, **options)
    counts = np.bincount(labels[rows], minlength=classes)
    assert len(rows) == limit and counts.max() - counts.min() <= 1
    if skip >= classes:
        before = limited(len(labels), skip, **options)
        assert sorted({*before, *rows}) == limited(len(labels), skip + limit, **options)


def test_limit_errors() -> None:
    with pytest.raises(ConfigError, match="leaves no image"):
        limited(5, 0)
    with pytest.raises(DataError, match="leaves none of the 5"):
        limited(5, 2, skip=5)
    with pytest.raises(DataError, match="needs one class per image"):
        limited(5, 2, balanced=True)
    with pytest.raises(DataError, match="less than one image for each of the 3"):
        limited(3, 2, balanced=True, labels=np.array([0, 1, 2]))
    with pytest.raises(DataError, match="takes 2 images of class 1 .*but it has 1"):
        limited(4, 4, balanced=True, labels=np.array([0, 0, 0, 1]))


def test_limited_dataset_keeps_identities_and_the_class_count(tmp_path: Path) -> None:
    put(tmp_path, *(f"{name}/{k}.png" for name in "abcd" for k in range(5)))
    dataset = build_dataset(Data(TRAIN=folder(tmp_path, DATA_LIMIT=3)), "TRAIN", seed=0)
    whole = build_dataset(Data(TRAIN=folder(tmp_path)), "TRAIN", seed=0)
    assert len(dataset) == 3 and dataset.num_classes == 4 and dataset.labels is not None
    for row in range(3):
        original = whole.paths.tolist().index(dataset.paths[row])
        assert dataset.labels[row] == whole.labels[original]
        assert torch.equal(dataset[row]["data"], whole[original]["data"]) and dataset[row]["index"] == row
    assert dataset.fingerprint != whole.fingerprint
    sampling = {"IS_BALANCED": True, "SEED": 3}
    balanced = build_dataset(Data(TRAIN=folder(tmp_path, DATA_LIMIT=9, DATA_LIMIT_SAMPLING=sampling)), "TRAIN", seed=0)
    assert np.bincount(balanced.labels).tolist() == [3, 2, 2, 2]


def test_labels_of_a_part_are_enough_for_that_part(tmp_path: Path) -> None:
    put(tmp_path, *(f"{k}.png" for k in range(6)))
    limit = {"DATA_LIMIT": 3}
    part = build_dataset(Data(TRAIN=folder(tmp_path, **limit)), "TRAIN", seed=0)
    np.save(tmp_path / "labels.npy", np.array([2, 1, 0]))
    np.save(tmp_path / "images.npy", part.paths[::-1])
    options = {"LABEL_PATHS": [str(tmp_path / "labels.npy")]}
    assert build_dataset(Data(TRAIN=folder(tmp_path, **limit, **options)), "TRAIN", seed=0).labels.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="3 of 6 images have no label"):
        build_dataset(Data(TRAIN=folder(tmp_path, **options)), "TRAIN", seed=0)
    np.save(tmp_path / "y.npy", np.arange(6))
    by_position = {"LABEL_PATHS": [str(tmp_path / "y.npy")], "LABEL_ALIGNMENT": "position"}
    found = build_dataset(Data(TRAIN=folder(tmp_path, **limit, **by_position)), "TRAIN", seed=0)
    assert found.labels.tolist() == [int(path[0]) for path in part.paths]


# -------------------------------------------------------------------------------------------------- samples
def test_a_sample_is_a_function_of_seed_epoch_and_row() -> None:
    options = {"DATA_SOURCES": ["synthetic"], "TRANSFORMS": [{"name": "RandomResizedCrop", "size": 16}]}
    first, again, other = (build_dataset(Data(TRAIN=options), "TRAIN", seed=seed) for seed in (0, 0, 1))
    torch.manual_seed(5)
    sample = first[(2, 7)]["data"]
    noise = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(noise, torch.rand(3))  # loading leaves the global generators as they were
    again[(0, 1)]
    assert torch.equal(sample, again[(2, 7)]["data"])
    assert not torch.equal(sample, other[(2, 7)]["data"])
    assert not torch.equal(sample, first[(3, 7)]["data"])
    assert torch.equal(first[7]["data"], first[(0, 7)]["data"])
    with pytest.raises(IndexError):
        first[64]


def test_a_transform_that_fails_names_the_image(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    dataset = build_dataset(
        Data(TRAIN=folder(tmp_path, TRANSFORMS=[{"name": "RandomCrop", "size": 9}])), "TRAIN", seed=0
    )
    with pytest.raises(DataError, match=r"a\.png \(4x4\): config\.DATA\.TRAIN\.TRANSFORMS: RandomCrop"):
        dataset[0]
