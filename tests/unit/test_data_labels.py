"""Labels belong to images by path and fingerprint; whatever does not fit is an error that says why."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vissl_like.config.schema_data import Data
from vissl_like.data.dataset import build_dataset
from vissl_like.data.folder import FilelistSource, FolderSource
from vissl_like.data.images import ImageDataset
from vissl_like.data.labels import (
    Labels,
    _repeated,
    join_labels,
    multi_hot,
    parse_labels,
    read_labels,
    write_label_files,
)
from vissl_like.data.source import Source, SubsetSource, fingerprint, unicode_array
from vissl_like.data.synthetic import SyntheticSource
from vissl_like.errors import ConfigError, DataError


def make_images(root: Path, count: int = 5) -> Path:
    for number in range(count):
        folder = root / ("a", "b")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + number, 4), (number, 0, 0)).save(folder / f"{number}.png")
    return root


def label_of(source: Source, row: int) -> int:
    """A label that can be seen in the image: its red value plus ten."""
    return 10 + source.load(row).getpixel((0, 0))[0]


def write_for(
    source: Source,
    folder: Path,
    *,
    prefix: str = "in1k_train_res5_N16_D8",
    stamps: bool = True,
    order: list[int] | None = None,
) -> Path:
    rows = np.arange(len(source)) if order is None else np.array(order)
    return write_label_files(
        folder,
        prefix=prefix,
        labels=np.array([label_of(source, int(row)) for row in rows]),
        paths=source.paths[rows],
        root=source.root,
        fingerprint=fingerprint(source.paths[rows], source.stamps()[rows]),
        num_clusters=16,
        stamps=source.stamps()[rows] if stamps else None,
        centroids=np.zeros((16, 8), np.float32),
        extra={"layer": "res5"},
    )


def split(data_source: str, **options: object) -> Data:
    return Data(TRAIN={"DATA_SOURCES": [data_source], **options})


def check_alignment(dataset: ImageDataset) -> None:
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [label_of(dataset.source, row) for row in range(len(dataset))]


# -------------------------------------------------------------------------------------------- round trip
def test_files_and_manifest(tmp_path: Path) -> None:
    source = FolderSource(make_images(tmp_path / "images"))
    file = write_for(source, tmp_path / "out")
    assert file.name == "in1k_train_res5_N16_D8_labels.npy"
    assert {path.name.removeprefix("in1k_train_res5_N16_D8_") for path in (tmp_path / "out").iterdir()} == {
        "labels.npy", "images.npy", "sizes.npy", "centroids.npy", "manifest.json"
    }  # fmt: skip
    assert np.load(file).dtype == np.int64
    assert np.load(tmp_path / "out" / "in1k_train_res5_N16_D8_images.npy").tolist() == source.paths.tolist()
    manifest = json.loads((tmp_path / "out" / "in1k_train_res5_N16_D8_manifest.json").read_text())
    assert manifest["root"] == source.root and manifest["num_clusters"] == 16 and manifest["layer"] == "res5"
    assert manifest["complete"] is True
    labels = read_labels(file, source=source)
    assert labels.num_classes == 16 and labels.values.tolist() == [label_of(source, row) for row in range(5)]


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)), st.permutations(range(6)), st.integers(1, 6))
def test_any_order_of_labels_and_images_is_aligned(tmp_path_factory, written, listed, count) -> None:
    folder = tmp_path_factory.mktemp("order")
    source = FolderSource(make_images(folder / "images", 6))
    file = write_for(source, folder / "out", order=list(written))
    part = SubsetSource(source, np.array(listed[:count]))
    assert read_labels(file, source=part).values.tolist() == [label_of(part, row) for row in range(count)]


@pytest.mark.parametrize("stamps", [True, False])
def test_shuffled_label_file_in_a_dataset(tmp_path: Path, stamps: bool) -> None:
    source = FolderSource(make_images(tmp_path / "images"))
    file = write_for(source, tmp_path / "out", prefix="", order=[3, 1, 4, 0, 2], stamps=stamps)
    assert file.name == "labels.npy"
    dataset = build_dataset(
        split("disk_folder", DATA_PATHS=[str(tmp_path / "images")], LABEL_PATHS=[str(file)]),
        "TRAIN",
        seed=0,
        train=True,
    )
    check_alignment(dataset)
    assert dataset.num_classes == 16
    assert int(dataset[4]["label"]) == label_of(source, 4)


def test_images_come_with_the_labels_when_no_path_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource(make_images(tmp_path / "images"))
    write_for(source, tmp_path / "out", prefix="", order=[3, 1, 4])
    monkeypatch.chdir(tmp_path / "out")
    options = {
        "DATASET_NAMES": ["imagenet1k_clusters"],
        "LABEL_SOURCES": ["disk_filelist"],
        "LABEL_PATHS": ["labels.npy"],
    }
    dataset = build_dataset(split("disk_filelist", **options), "TRAIN", seed=0, train=True)
    assert dataset.paths.tolist() == source.paths[[3, 1, 4]].tolist()
    check_alignment(dataset)


def test_images_and_labels_given_as_the_original_program_wants_them(tmp_path: Path) -> None:
    source = FolderSource(make_images(tmp_path / "images"))
    file = write_for(source, tmp_path / "out", order=[2, 0, 1])
    images = str(file).replace("_labels.npy", "_images.npy")
    check_alignment(
        build_dataset(split("disk_filelist", DATA_PATHS=[images], LABEL_PATHS=[str(file)]), "TRAIN", seed=0)
    )


def test_a_moved_data_set_keeps_its_labels(tmp_path: Path) -> None:
    source = FolderSource(make_images(tmp_path / "images"))
    file = write_for(source, tmp_path / "out")
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    read_labels(file, source=FolderSource(tmp_path / "elsewhere"))


def test_another_root_of_the_same_files_is_matched_by_absolute_path(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    file = write_for(FolderSource(tmp_path), tmp_path / "out")
    inner = FolderSource(tmp_path / "images")
    assert read_labels(file, source=inner).values.tolist() == [label_of(inner, row) for row in range(5)]
    absolute = tmp_path / "absolute.txt"
    absolute.write_text("\n".join(inner.file(row) for row in (4, 0)))
    listed = FilelistSource(absolute)
    assert read_labels(file, source=listed).values.tolist() == [label_of(listed, row) for row in range(2)]


def test_embedded_images_are_matched_by_name(tmp_path: Path) -> None:
    source = SyntheticSource(split="TRAIN", count=6, classes=2, side=8)
    labels, names = np.arange(6)[::-1], source.paths[::-1]
    file = write_label_files(
        tmp_path, prefix="", labels=labels, paths=names, root="", num_clusters=6,
        fingerprint=fingerprint(names, source.stamps()[::-1]),
    )  # fmt: skip
    options = {"NUM_SYNTHETIC": 6, "SYNTHETIC_CLASSES": 2, "SYNTHETIC_SIZE": 8, "LABEL_PATHS": [str(file)]}
    dataset = build_dataset(split("synthetic", **options), "TRAIN", seed=0)
    assert dataset.labels is not None and dataset.labels.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="changed since"):
        build_dataset(split("synthetic", **{**options, "SYNTHETIC_SIZE": 9}), "TRAIN", seed=0)


# ------------------------------------------------------------------------------------------------ errors
def test_an_image_without_a_label(tmp_path: Path) -> None:
    source = FolderSource(make_images(tmp_path / "images"))
    file = write_for(source, tmp_path / "out", order=[0, 1, 2])
    with pytest.raises(DataError, match=r"2 of 5 images have no label there, the first is 'b/1\.png'"):
        read_labels(file, source=source)
    # The same base name elsewhere is another image.
    (tmp_path / "images" / "a" / "0.png").rename(tmp_path / "images" / "b" / "0.png")
    with pytest.raises(DataError, match=r"3 of 5.*'b/0\.png'"):
        read_labels(file, source=FolderSource(tmp_path / "images"))


@pytest.mark.parametrize("stamps", [True, False])
def test_changed_images(tmp_path: Path, stamps: bool) -> None:
    file = write_for(FolderSource(make_images(tmp_path / "images")), tmp_path / "out", stamps=stamps)
    Image.new("RGB", (200, 100)).save(tmp_path / "images" / "b" / "3.png")
    changed = FolderSource(tmp_path / "images")
    with pytest.raises(DataError, match="changed since they were labelled.*Label them again"):
        read_labels(file, source=changed)
    if stamps:
        with pytest.raises(DataError, match=r"1 of 5.*'b/3\.png'"):
            read_labels(file, source=changed)


def test_labelled_images_that_are_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_images(tmp_path / "images")
    file = write_for(FolderSource(root), tmp_path / "out", prefix="")
    (root / "b" / "1.png").unlink()
    gone = r"1 of 5 images are gone since they were labelled, the first is '.*b/1\.png'\. .*"
    options = {"LABEL_PATHS": [str(file)]}
    for more in ({"DATA_PATHS": [str(root)]}, {"DATA_PATHS": [str(root)], "DATA_LIMIT": 2}, {}):
        with pytest.raises(DataError, match=gone + "[lL]abel"):
            build_dataset(split("disk_folder", **options, **more), "TRAIN", seed=0)
    assert not caplog.messages


def test_labels_of_images_that_are_left_out_are_a_remark(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_images(tmp_path / "images")
    file = write_for(FolderSource(root), tmp_path / "out", prefix="")
    limited = build_dataset(
        split("disk_folder", DATA_PATHS=[str(root)], LABEL_PATHS=[str(file)], DATA_LIMIT=2), "TRAIN", seed=0
    )
    check_alignment(limited)
    assert len(limited) == 2 and not caplog.messages
    inner = build_dataset(split("disk_folder", DATA_PATHS=[str(root / "a")], LABEL_PATHS=[str(file)]), "TRAIN", seed=0)
    check_alignment(inner)
    assert "2 of the 5 images that it names are not among these 3, the first is 'b/1.png'" in caplog.messages[-1]
    caplog.clear()
    (root / "b" / "1.png").unlink()
    root.rename(tmp_path / "moved")  # where they lay, there is nothing
    read_labels(file, source=FolderSource(tmp_path / "moved"))
    assert "1 of the 5 images that it names" in caplog.messages[-1]


def test_duplicates_are_refused_when_written_and_when_read(tmp_path: Path) -> None:
    paths = np.array(["a.png", "b.png", "a.png"])
    with pytest.raises(DataError, match=r"named more than once, the first is 'a\.png'"):
        write_label_files(tmp_path, prefix="", labels=np.zeros(3), paths=paths, root="", fingerprint="", num_clusters=1)
    np.save(tmp_path / "x_labels.npy", np.zeros(3, int))
    np.save(tmp_path / "x_images.npy", paths)
    with pytest.raises(DataError, match="more than once"):
        read_labels(tmp_path / "x_labels.npy", source=SyntheticSource(split="TRAIN", count=3, classes=1, side=4))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab/é\U0001f600", max_size=4), max_size=40), st.booleans())
def test_duplicates_are_found_by_hashes(texts: list[str], is_reversed: bool) -> None:
    strings = unicode_array(texts)[:: -1 if is_reversed else 1]
    ordered = sorted(text.rstrip("\0") for text in texts)
    assert _repeated(strings).tolist() == [b for a, b in itertools.pairwise(ordered) if a == b]


def test_many_paths_are_written_without_a_copy_of_all(tmp_path: Path) -> None:
    """Mapped ones stay on the disk: they once became a list of Python strings, an array of it and a sorted copy."""
    count, width = 100_000, 100
    np.save(tmp_path / "paths.npy", np.array([f"{row:0{width}d}" for row in range(count)]))
    paths, labels = np.load(tmp_path / "paths.npy", mmap_mode="r"), np.zeros(count, np.int64)
    rest: dict[str, Any] = {"root": "", "fingerprint": "", "num_clusters": 1, "centroids": np.zeros((1, 2))}
    tracemalloc.start()
    write_label_files(tmp_path, prefix="x", labels=labels, paths=paths, also_plain=True, **rest)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < paths.nbytes / 2
    assert {
        file.name: file.read_bytes() for file in tmp_path.glob("x_*") if file.name in ("x_labels.npy", "x_images.npy")
    } == {f"x_{name}": (tmp_path / name).read_bytes() for name in ("labels.npy", "images.npy")}
    assert (tmp_path / "images.npy").read_bytes() == (tmp_path / "paths.npy").read_bytes()
    plain, named = (json.loads((tmp_path / f"{base}manifest.json").read_text()) for base in ("", "x_"))
    assert set(plain["files"]) == {"labels.npy", "images.npy"} and "x_centroids.npy" in named["files"]
    assert not (tmp_path / "centroids.npy").exists()


def test_a_bare_label_file_needs_a_word(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    np.save(tmp_path / "y.npy", np.arange(5, dtype=np.int32))
    options = {"DATA_PATHS": [str(tmp_path / "images")], "LABEL_PATHS": [str(tmp_path / "y.npy")]}
    with pytest.raises(DataError, match=r"y_images\.npy.*config\.DATA\.TRAIN\.LABEL_ALIGNMENT=position"):
        build_dataset(split("disk_folder", **options), "TRAIN", seed=0)
    dataset = build_dataset(split("disk_folder", **options, LABEL_ALIGNMENT="position"), "TRAIN", seed=0)
    assert (
        dataset.labels is not None and dataset.labels.tolist() == [0, 1, 2, 3, 4] and dataset.labels.dtype == np.int64
    )
    np.save(tmp_path / "y.npy", np.arange(4))
    with pytest.raises(DataError, match="4 labels for 5 images"):
        build_dataset(split("disk_folder", **options, LABEL_ALIGNMENT="position"), "TRAIN", seed=0)


def test_labels_and_list_of_different_length(tmp_path: Path) -> None:
    source = FolderSource(make_images(tmp_path / "images"))
    file = write_for(source, tmp_path / "out", prefix="")
    np.save(file, np.arange(4))
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(DataError, match="4 labels, but .* names 5 images"):
        read_labels(file, source=source)
    with pytest.raises(DataError, match="3 labels for 5 images"):
        write_label_files(
            tmp_path, prefix="", labels=np.zeros(3), paths=source.paths, root="", fingerprint="", num_clusters=1
        )


@pytest.mark.parametrize("name", ["labels.npy", "images.npy", "sizes.npy"])
@pytest.mark.parametrize("damage", ["removed", "truncated", "changed"])
def test_damaged_files_are_named_with_the_cure(tmp_path: Path, name: str, damage: str) -> None:
    source = FolderSource(make_images(tmp_path / "images"))
    file = write_for(source, tmp_path / "out", prefix="")
    damaged = tmp_path / "out" / name
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content[:-8] if damage == "truncated" else content)
    if damage == "removed":
        damaged.unlink()
    with pytest.raises(DataError, match=rf"out/{name}: (missing|\d+ bytes long, not|its content).*run the stage"):
        read_labels(file, source=source)
    if name == "images.npy":  # the list of the images itself
        with pytest.raises(DataError, match=rf"out/{name}: .*run the stage"):
            build_dataset(split("disk_folder", LABEL_PATHS=[str(file)]), "TRAIN", seed=0)
    write_for(source, tmp_path / "out", prefix="")
    assert len(read_labels(file, source=source).values) == 5


def test_a_torn_manifest_is_an_error(tmp_path: Path) -> None:
    source = FolderSource(make_images(tmp_path / "images"))
    file = write_for(source, tmp_path / "out", prefix="")
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text()[:50])
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
        read_labels(file, source=source)


def test_missing_and_unfinished_files(tmp_path: Path) -> None:
    source = FolderSource(make_images(tmp_path / "images"))
    options = {"DATA_PATHS": [str(tmp_path / "images")], "LABEL_PATHS": [str(tmp_path / "absent_labels.npy")]}
    with pytest.raises(DataError, match=r"LABEL_PATHS\.0=.*no such file"):
        build_dataset(split("disk_folder", **options), "TRAIN", seed=0)
    with pytest.raises(DataError, match="no such file"):
        build_dataset(split("disk_filelist", LABEL_PATHS=options["LABEL_PATHS"]), "TRAIN", seed=0)
    file = write_for(source, tmp_path / "out", prefix="")
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False}))
    with pytest.raises(DataError, match="has not finished"):
        read_labels(file, source=source)


# ------------------------------------------------------------------------------------------------- kinds
@pytest.mark.parametrize(
    ("array", "text"),
    [(np.array([0.5, 1]), "fractions"), (np.array([-2, 0]), "smallest label is -2"), (np.zeros((2, 2, 2), int), "shape"),
     (np.array([[0, 3]]), "multi-hot"), (np.array([1j]), "complex")],
)  # fmt: skip
def test_what_is_no_label(array: np.ndarray, text: str) -> None:
    with pytest.raises(DataError, match=text):
        parse_labels(array, file="f.npy", key="LABEL_PATHS")


def test_names_floats_and_columns() -> None:
    names = parse_labels(np.array(["b", "a", "b"]), file="f", key="k")
    assert names.values.tolist() == [1, 0, 1] and names.class_names == ["a", "b"]
    assert parse_labels(np.array([[2.0], [0.0]]), file="f", key="k").values.tolist() == [2, 0]
    hot = parse_labels(np.array([[1, 0, -1], [0, 1, 1]], np.int8), file="f", key="k")
    assert hot.num_classes == 3 and hot.values.shape == (2, 3)


def test_several_files_for_one_source_are_multi_labels(tmp_path: Path) -> None:
    source = FolderSource(make_images(tmp_path / "images", 3))
    for name, labels in (("one", [0, 2, 1]), ("two", [3, 2, -1])):
        np.save(tmp_path / f"{name}_labels.npy", np.array(labels))
        np.save(tmp_path / f"{name}_images.npy", source.paths)
    files = [[str(tmp_path / "one_labels.npy"), str(tmp_path / "two_labels.npy")]]
    dataset = build_dataset(split("disk_folder", DATA_PATHS=[source.root], LABEL_PATHS=files), "TRAIN", seed=0)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [[1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]]
    assert dataset[0]["label"].tolist() == [1, 0, 0, 1] and dataset.num_classes == 4


def test_label_files_of_several_sources(tmp_path: Path) -> None:
    roots = [make_images(tmp_path / name, count) for name, count in (("x", 4), ("y", 3))]
    files = [str(write_for(FolderSource(root), tmp_path / f"{root.name}_out")) for root in roots]
    options = {"DATA_SOURCES": ["disk_folder"] * 2, "DATA_PATHS": [str(root) for root in roots], "LABEL_PATHS": files}
    check_alignment(build_dataset(Data(TRAIN=options), "TRAIN", seed=0))
    # One file made from both at once serves both.
    both = build_dataset(Data(TRAIN={**options, "LABEL_PATHS": []}), "TRAIN", seed=0)
    joint = write_for(both.source, tmp_path / "both", order=[6, 5, 4, 3, 2, 1, 0])
    check_alignment(build_dataset(Data(TRAIN={**options, "LABEL_PATHS": [str(joint)]}), "TRAIN", seed=0))


def test_joining_labels_by_name() -> None:
    joined = join_labels([Labels(np.array([0, 1]), 2, ["dog", "elk"]), Labels(np.array([0, -1]), 1, ["cat"])])
    assert joined.class_names == ["cat", "dog", "elk"] and joined.values.tolist() == [1, 2, 0, -1]
    with pytest.raises(DataError, match="mix"):
        join_labels([Labels(np.array([0]), 1, ["cat"]), Labels(np.array([0]), 1)])
    with pytest.raises(DataError, match="mix"):
        multi_hot([Labels(np.array([0]), 1, ["cat"]), Labels(np.array([0]), 1)])


# ----------------------------------------------------------------------------------------- where from
def test_label_types(tmp_path: Path) -> None:
    paths = {"DATA_PATHS": [str(make_images(tmp_path / "images"))]}
    options = {**paths, "DATA_LIMIT": 3}
    by_row = build_dataset(split("disk_folder", **options, LABEL_TYPE="sample_index"), "TRAIN", seed=0)
    assert by_row.labels is not None and by_row.labels.tolist() == [0, 1, 2] and by_row.num_classes == 3
    zero = build_dataset(split("disk_folder", **options, LABEL_TYPE="zero"), "TRAIN", seed=0, train=True)
    assert zero.labels is not None and zero.labels.tolist() == [0, 0, 0] and zero.num_classes == 1
    own = build_dataset(split("disk_folder", **paths, LABEL_SOURCES=["disk_folder"]), "TRAIN", seed=0)
    assert own.labels is not None and own.labels.tolist() == [0, 0, 0, 1, 1] and own.class_names == ["a", "b"]
    written = write_for(own.source, tmp_path / "labels")
    for kind in ("sample_index", "zero"):  # they count only where nothing else says where labels come from
        told = split("disk_folder", **paths, LABEL_SOURCES=["disk_folder"], LABEL_TYPE=kind)
        assert build_dataset(told, "TRAIN", seed=0).class_names == ["a", "b"]
        check_alignment(
            build_dataset(split("disk_folder", **paths, LABEL_PATHS=[str(written)], LABEL_TYPE=kind), "TRAIN", seed=0)
        )


def test_a_folder_as_label_path_means_its_classes(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    options = {"DATA_PATHS": [str(tmp_path / "images")], "LABEL_SOURCES": ["disk_folder"]}
    same = build_dataset(split("disk_folder", **options, LABEL_PATHS=options["DATA_PATHS"]), "TRAIN", seed=0)
    assert same.class_names == ["a", "b"]
    with pytest.raises(ConfigError, match="folder of the images itself"):
        build_dataset(split("disk_folder", **options, LABEL_PATHS=[str(tmp_path)]), "TRAIN", seed=0)
    written = write_for(same.source, tmp_path / "out", prefix="").parent
    with pytest.raises(ConfigError, match=r"folder of a label stage. Give its file '.*/out/labels\.npy'"):
        build_dataset(split("disk_folder", LABEL_PATHS=[str(written)]), "TRAIN", seed=0)


def test_no_labels(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    options = {"DATA_PATHS": [str(tmp_path)]}
    dataset = build_dataset(split("disk_folder", **options), "TRAIN", seed=0)
    assert dataset.labels is None and dataset.num_classes is None and int(dataset[0]["label"]) == -1
    with pytest.raises(DataError, match="these images have no labels"):
        build_dataset(split("disk_folder", **options), "TRAIN", seed=0, train=True)
    with pytest.raises(DataError, match="knows no labels"):
        build_dataset(split("disk_folder", **options, LABEL_SOURCES=["disk_folder"]), "TRAIN", seed=0)


def test_label_sources_may_not_contradict_the_files(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    options = {"DATA_PATHS": [str(tmp_path / "images")]}
    with pytest.raises(ConfigError, match=r"LABEL_SOURCES\.0='disk_filelist': there is no label file"):
        build_dataset(split("disk_folder", **options, LABEL_SOURCES=["disk_filelist"]), "TRAIN", seed=0)
    np.save(tmp_path / "x.npy", np.zeros(5, dtype=np.int64))
    given = {"LABEL_PATHS": [str(tmp_path / "x.npy")], "LABEL_ALIGNMENT": "position"}
    with pytest.raises(ConfigError, match=r"LABEL_SOURCES\.0='disk_folder': labels by folder, but"):
        build_dataset(split("disk_folder", **options, **given, LABEL_SOURCES=["disk_folder"]), "TRAIN", seed=0)


def test_arguments_that_nothing_takes_are_refused(tmp_path: Path) -> None:
    make_images(tmp_path)
    options = {"DATA_PATHS": [str(tmp_path)], "COLLATE_FUNCTION_PARAMS": {"num_crops": 2}}
    with pytest.raises(ConfigError, match=r"COLLATE_FUNCTION_PARAMS=.*takes none"):
        build_dataset(split("disk_folder", **options), "TRAIN", seed=0)
