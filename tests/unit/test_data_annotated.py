"""Annotated data sets: what is read, and what a damaged file says."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vissl_like.config.schema_data import Data, Split, TrainSplit
from vissl_like.data import toybirds
from vissl_like.data.annotated import ImageFiles, annotation, groups_of, refuse_missing_annotations
from vissl_like.data.cub import CubFolder, CubSource, WaterbirdsSource
from vissl_like.data.dataset import build_dataset
from vissl_like.data.folders import ImageNetSubsetSource, ImageNetV2Source, MetaShiftSource, imagenet_synsets
from vissl_like.data.part_sets import FlowersSource, PartImageNetSource, TurtleReidSource
from vissl_like.data.source import ConcatSource, SourceRequest, SubsetSource
from vissl_like.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toybirds") / "birds"
    toybirds.make_folder(folder, lambda target: toybirds.write_cub(target, train=24, test=8))
    return folder


@pytest.fixture
def cub(drawn: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(drawn, tmp_path / "cub"))


def request(path: Path, split: str = "TRAIN", **options: Any) -> SourceRequest:
    return SourceRequest(split, 0, "", str(path), Split(**options), TrainSplit())


#: Files of a CUB folder whose lines begin with the id of an image.
OF_IMAGES = (
    *("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt"),
    "parts/part_locs.txt",
)


# ----------------------------------------------------------------------------------------------------------- toy birds
def test_toy_birds_are_drawn_alike_every_time(drawn: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    toybirds.write_cub(again, train=24, test=8)
    names = sorted(str(file.relative_to(again)) for file in again.rglob("*.*") if file.is_file())
    assert len(names) == 7 + 3 * 32
    assert all((again / name).read_bytes() == (drawn / name).read_bytes() for name in names)


def test_toy_birds_are_a_cub_folder(drawn: Path) -> None:
    folder = CubFolder(drawn)
    assert len(folder.class_names) == 8 and folder.keypoint_names == list(toybirds.KEYPOINTS)
    images = CubSource(folder, folder.rows("TRAIN", TrainSplit()), name="toybirds")
    assert images.labels is not None and np.bincount(images.labels).tolist() == [3] * 8
    for row in range(len(images)):
        mask = annotation(images, "mask", row)
        x, y, width, height = images.box(row)
        rows, columns = np.nonzero(mask)
        assert (x, x + width) == (columns.min(), columns.max() + 1) and (y, y + height) == (rows.min(), rows.max() + 1)
        points = images.keypoints(row)
        assert 10 <= points[:, 2].sum() <= 12  # three are on the other side
        inside = mask[points[:, 1].astype(int).clip(0, 71), points[:, 0].astype(int).clip(0, 71)]
        assert inside[points[:, 2] > 0].mean() > 0.8


def test_backgrounds_agree_with_the_class_as_often_as_asked(tmp_path: Path) -> None:
    toybirds.write_waterbirds(tmp_path, counts=(50, 8, 8))
    train, test = (WaterbirdsSource(tmp_path, split=split) for split in ("TRAIN", "TEST"))
    assert np.bincount(train.groups, minlength=4).tolist() == [24, 1, 1, 24]  # 0.98 of 25, rounded
    assert np.bincount(test.groups, minlength=4).tolist() == [2, 2, 2, 2]
    found = groups_of(SubsetSource(test, np.array([0, 1])))
    assert found is not None and found[0].tolist() == test.groups[:2].tolist()
    for subset, groups in (("worst_case", (2, 1)), ("best_case", (3, 0))):  # waterbirds first, as in the original
        chosen = WaterbirdsSource(tmp_path, split="TEST", subset=subset)
        expected = [path for group in groups for path, own in zip(test.paths, test.groups) if own == group]
        assert chosen.paths.tolist() == expected and len(expected) == 4
        assert chosen.labels is not None and chosen.labels.tolist() == [1, 1, 0, 0]
    assert annotation(test, "mask", 0).any()


def test_toybirds_are_drawn_where_they_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toybirds.write_cub, "__kwdefaults__", {"seed": 0, "train": 16, "test": 8, "size": 24})
    data = Data(
        TRAIN=Split(DATA_SOURCES=["toybirds"], DATA_PATHS=[str(tmp_path / "birds")]),
        TEST=Split(DATA_SOURCES=["toybirds"], DATA_PATHS=[str(tmp_path / "birds")]),
    )
    assert len(build_dataset(data, "TRAIN", seed=0)) == 16 and len(build_dataset(data, "TEST", seed=0)) == 8
    (tmp_path / "birds" / toybirds.DONE).write_text("0\n")
    with pytest.raises(DataError, match="these birds are of version '0'"):
        build_dataset(data, "TRAIN", seed=0)
    (tmp_path / "birds" / toybirds.DONE).unlink()
    with pytest.raises(DataError, match="holds something else"):
        build_dataset(data, "TRAIN", seed=0)


# ----------------------------------------------------------------------------------------------------- several in a row
def test_annotations_of_several_sources(drawn: Path, tmp_path: Path) -> None:
    """Rows of two CUB folders in a row, and a limited choice of them, are those of the folder that they come from."""
    other = tmp_path / "other"
    toybirds.make_folder(other, lambda target: toybirds.write_cub(target, seed=5, train=8, test=8))
    options = {"DATA_SOURCES": ["cub", "cub"], "DATA_PATHS": [str(drawn), str(other)], "BATCHSIZE_PER_REPLICA": 4}
    both = build_dataset(Data(TRAIN=Split(**options)), "TRAIN", seed=0, with_masks=True)
    alone = [
        build_dataset(Data(TRAIN=Split(DATA_SOURCES=["cub"], DATA_PATHS=[str(f)])), "TRAIN", seed=0)
        for f in (drawn, other)
    ]
    assert len(both) == 24 + 8
    chosen = np.array([30, 2, 24, 23])
    for name in ("keypoints", "box", "mask", "part_masks"):
        for row in (0, 23, 24, 31):
            part, inner = (alone[0], row) if row < 24 else (alone[1], row - 24)
            expected = annotation(part.source, name, inner)
            assert np.array_equal(annotation(both.source, name, row), expected)
        subset = SubsetSource(both.source, chosen)
        assert all(
            np.array_equal(annotation(subset, name, i), annotation(both.source, name, row))
            for i, row in enumerate(chosen)
        )
    assert (both[24]["mask"].numpy() == annotation(alone[1].source, "mask", 0)).all()
    refuse_missing_annotations(both.source, ["keypoints", "mask"], key="KEY", protocol="p")
    gone = Path(both.source.parts[1].mask_file(3))
    gone.unlink()
    with pytest.raises(DataError, match=re.escape(str(gone))):
        build_dataset(Data(TRAIN=Split(**options)), "TRAIN", seed=0, with_masks=True)


def test_sources_that_do_not_fit_each_other(drawn: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save((tmp_path / "a").mkdir() or tmp_path / "a" / "0.png")
    plain = Split(DATA_SOURCES=["cub", "disk_folder"], DATA_PATHS=[str(drawn), str(tmp_path)])
    with pytest.raises(DataError, match="have no mask"):
        build_dataset(Data(TRAIN=plain), "TRAIN", seed=0, with_masks=True)
    mixed = build_dataset(Data(TRAIN=plain), "TRAIN", seed=0)
    with pytest.raises(ConfigError, match=r"KEY: disk_folder has no keypoints, which regression of"):
        refuse_missing_annotations(mixed.source, ["keypoints"], key="KEY", protocol="regression")
    cub = tmp_path / "cub"
    shutil.copytree(drawn, cub)
    change(cub / "parts" / "parts.txt", 2, "2 bill")
    options = {"DATA_SOURCES": ["cub", "cub"], "DATA_PATHS": [str(drawn), str(cub)]}
    renamed = build_dataset(Data(TRAIN=Split(**options)), "TRAIN", seed=0)
    with pytest.raises(ConfigError, match="keypoints of cub are others than those of cub"):
        refuse_missing_annotations(renamed.source, ["keypoints"], key="KEY", protocol="keypoints")


def test_groups_of_several_sources(tmp_path: Path) -> None:
    for kind in ("cat", "dog"):
        for split, count in (("train", 3), ("test", 2)):
            for i in range(count):
                file = tmp_path / split / kind / f"{kind}(sofa)" / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (i, 0, 0)).save(file)
    one, two = (MetaShiftSource(tmp_path, folder=folder) for folder in ("train", "test"))
    found = groups_of(SubsetSource(ConcatSource([one, two]), np.array([9, 0, 3])))
    assert found is not None and found[0].tolist() == [1, 0, 1] and found[1] == ("cat", "dog")
    assert groups_of(ConcatSource([one, ImageFiles(tmp_path, ["a"], np.zeros(1), name="x", class_names=None)])) is None


# ------------------------------------------------------------------------------------------------------- damaged files
def change(file: Path, line: int, text: str | None) -> None:
    lines = file.read_text().splitlines()
    lines[line - 1 : line] = [] if text is None else [text]
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("name", "line", "text", "message"),
    [
        ("image_class_labels.txt", 3, "3 one", r"image_class_labels.txt, line 3: class_id is 'one', .* whole number"),
        (
            "image_class_labels.txt",
            3,
            None,
            r"image_class_labels.txt: has no line for image_id 3, .*images.txt, line 3 lists",
        ),
        ("image_class_labels.txt", 3, "99 1", r"has no line for image_id 3"),
        ("image_class_labels.txt", 3, "2 1", r"line 3: image_id 2 stands there a second time; the first is in line 2"),
        ("train_test_split.txt", 5, "5 2", r"train_test_split.txt, line 5: is_train is 2, not 1 \(train\) or 0"),
        ("train_test_split.txt", 5, "5", r"line 5: '5' has 1 fields; expected <image_id> <is_train>"),
        ("images.txt", 4, "4 001.Gone/a.png", r"images.txt, line 4: .*001.Gone/a.png is not there"),
        ("bounding_boxes.txt", 2, "2 1.0 nan 3 4", r"bounding_boxes.txt, line 2: y is 'nan', which is not a number"),
        (
            "parts/part_locs.txt",
            7,
            None,
            r"part_locs.txt: has no line for part 7 of image 1, which .*images.txt, line 1 lists",
        ),
        ("parts/part_locs.txt", 7, "1 77 3 3 1", r"part_locs.txt, line 7: part_id 77 is not in parts.txt"),
        ("parts/part_locs.txt", 7, "77 7 3 3 1", r"part_locs.txt, line 7: image_id 77 is not in images.txt"),
        ("parts/part_locs.txt", 7, "1 6 3 3 1", r"part_locs.txt, line 7: part 6 of image 1 stands there a second"),
        ("classes.txt", 2, None, r"classes.txt: has no line for class_id 2"),
        ("classes.txt", 2, "1 x", r"classes.txt, line 2: class_id 1 stands there a second time"),
        ("parts/parts.txt", 2, "1 x", r"parts.txt, line 2: part_id 1 stands there a second time"),
        ("images.txt", 2, "1 001.Plain_Toybird/a.png", r"images.txt, line 2: image_id 1 stands there a second time"),
        (
            "image_class_labels.txt",
            3,
            f"3 {10**30}",
            r"image_class_labels.txt, line 3: class_id is '10+', .* too large",
        ),
        ("image_class_labels.txt", 3, "3 1_0", r"image_class_labels.txt, line 3: class_id is '1_0', .* whole number"),
        (
            "bounding_boxes.txt",
            2,
            "2 1.0 1.0 0 4",
            r"bounding_boxes.txt, line 2: width and height of a box must be above",
        ),
    ],
)
def test_a_damaged_file_names_its_line(cub: Path, name: str, line: int, text: str | None, message: str) -> None:
    change(cub / name, line, text)
    with pytest.raises(DataError, match=message):
        folder = CubFolder(cub)
        source = CubSource(folder, np.arange(len(folder.paths)), name="cub")
        source.box(0), source.keypoints(0)


@pytest.mark.parametrize("name", ["images.txt", "train_test_split.txt"])
def test_a_missing_or_empty_file(cub: Path, name: str) -> None:
    (cub / name).write_text("\n")
    with pytest.raises(DataError, match=f"{name}: is empty"):
        CubFolder(cub)
    (cub / name).unlink()
    with pytest.raises(DataError, match=f"{name}: cannot be read .*No such file"):
        CubFolder(cub)


def test_an_empty_val_split_says_how_to_get_one(cub: Path) -> None:
    with pytest.raises(ConfigError, match=r"TRAIN_SPLIT.FRACTION=1.0: leaves no image for VAL"):
        CubSource.build(request(cub, "VAL"))
    with pytest.raises(DataError, match="no such folder"):
        CubSource.build(request(cub / "nowhere"))


def test_a_folder_without_test_images_is_said(cub: Path) -> None:
    file = cub / "train_test_split.txt"
    ids = [line.split()[0] for line in file.read_text().splitlines()]
    for value, split, message in ((1, "TEST", "no test images"), (0, "TRAIN", "no training images")):
        file.write_text("".join(f"{image} {value}\n" for image in ids))
        with pytest.raises(DataError, match=f"train_test_split.txt: has {message}"):
            CubSource.build(request(cub, split))


def test_a_mark_of_utf_8_before_the_first_id_is_no_part_of_it(cub: Path) -> None:
    file = cub / "images.txt"
    ids = CubFolder(cub).ids
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert CubFolder(cub).ids == ids


def test_nabirds_ids_are_words_and_class_numbers_have_gaps(cub: Path) -> None:
    """The lines of every file in an order of its own; images come in that of train_test_split.txt."""
    before = CubFolder(cub)
    points, boxes = before.keypoints, before.boxes
    random = np.random.default_rng(0)
    for name in OF_IMAGES:
        lines = [f"id-{line}" for line in (cub / name).read_text().splitlines()]
        (cub / name).write_text("\n".join(lines[i] for i in random.permutation(len(lines))) + "\n")
    labels = cub / "image_class_labels.txt"
    labels.write_text("\n".join(f"{w[0]} {int(w[1]) * 10}" for w in map(str.split, labels.read_text().splitlines())))
    (cub / "classes.txt").write_text("\n".join(f"{10 * k} class {k}" for k in range(1, 9)))
    folder = CubFolder(cub)
    assert folder.class_names == [f"class {k}" for k in range(1, 9)]
    listed = [line.split() for line in (cub / "train_test_split.txt").read_text().splitlines()]
    train = [image for image, is_train in listed if is_train == "1"]
    wanted = {"TRAIN": train[:18], "VAL": train[18:], "TEST": [image for image, flag in listed if flag == "0"]}
    assert train != sorted(train, key=folder.ids.index)
    for split, ids in wanted.items():
        source = CubSource(folder, folder.rows(split, TrainSplit(FRACTION=0.75, ORDER="file")), name="nabirds")
        assert [folder.ids[row] for row in source.rows] == ids
        for row, image in enumerate(ids):
            old = before.ids.index(image.removeprefix("id-"))
            assert source.path(row) == f"images/{before.paths[old]}"
            assert source.labels is not None and source.labels[row] == before.labels[old]
            assert np.array_equal(source.keypoints(row), points[old])
            assert np.array_equal(source.box(row), boxes[old])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("y", "2", "y is '2', not one of 0, 1"),
        ("split", "x", "split is 'x'"),
        ("img_filename", "no.png", "is not there"),
    ],
)
def test_damaged_metadata_names_its_line(tmp_path: Path, column: str, value: str, message: str) -> None:
    toybirds.write_waterbirds(tmp_path, counts=(4, 4, 4), size=24)
    file = tmp_path / toybirds.WATERBIRDS / "metadata.csv"
    records = list(csv.DictReader(file.open()))
    records[2][column] = value
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    with pytest.raises(DataError, match=rf"metadata.csv, line 4: .*{message}"):
        WaterbirdsSource(tmp_path, split="TRAIN")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"Toybird_0_0001", b"Toyb\xefrd_0_0001", "metadata.csv: is not text in UTF-8 .* Save it as UTF-8"),
        (b",place,", b",plaice,", "metadata.csv, line 1: no column 'place'"),
        (b"\r\n2,", b"\r\n\r\n2\r\n2,", "metadata.csv, line 4: the line ends before its img_filename"),
    ],
)
def test_metadata_that_is_no_table(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    toybirds.write_waterbirds(tmp_path, counts=(2, 0, 0), size=24)
    file = tmp_path / toybirds.WATERBIRDS / "metadata.csv"
    with pytest.raises(DataError, match=r"has no image of TEST \(split 2\) of worst_case"):
        WaterbirdsSource(tmp_path, split="TEST", subset="worst_case")
    file.write_bytes(file.read_bytes().replace(old, new))
    with pytest.raises(DataError, match=message):
        WaterbirdsSource(tmp_path, split="TRAIN")


# --------------------------------------------------------------------------------------------------------- other folders
def save(file: Path, colour: tuple[int, int, int] = (200, 10, 10), size: tuple[int, int] = (12, 10)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


def test_meta_shift(tmp_path: Path) -> None:
    for name in ("train/cat/cat(bed)/a.jpg", "train/dog/dog(bike)/b.jpg", "test/cat/cat(shelf)/c.jpg"):
        save(tmp_path / name)
    save(tmp_path / "masks" / "cat" / "cat(bed)" / "a.png", (255, 255, 255))
    train = MetaShiftSource(tmp_path, folder="train", mask_folder="masks")
    assert train.labels is not None and train.labels.tolist() == [0, 1] and train.group_names == ("cat", "dog")
    assert annotation(train, "mask", 0).all()
    assert len(MetaShiftSource.build(request(tmp_path, "TEST"))) == 1
    shutil.rmtree(tmp_path / "test" / "cat")
    save(tmp_path / "test" / "dog" / "dog(shelf)" / "d.jpg")
    both = {"DATA_SOURCES": ["meta_shift"], "DATA_PATHS": [str(tmp_path)]}
    test = build_dataset(Data(TRAIN=Split(**both), TEST=Split(**both)), "TEST", seed=0)
    assert test[0]["label"] == 1 and test.class_names == ["cat", "dog"]  # as in TRAIN


def test_imagenet_v2_counts_its_folders_as_numbers(tmp_path: Path) -> None:
    root, train = tmp_path / "v2", tmp_path / "train"
    for name in ("0", "2", "10"):
        save(root / name / "a.jpeg")
    labels = ImageNetV2Source(root).labels
    assert labels is not None and sorted(labels.tolist()) == [0, 2, 10]
    for synset in imagenet_synsets()[:4]:
        save(train / synset / "a.jpeg")
    data = Data(
        TRAIN=Split(DATA_SOURCES=["disk_folder"], DATA_PATHS=[str(train)]),
        TEST=Split(DATA_SOURCES=["imagenet_v2"], DATA_PATHS=[str(root)]),
    )
    test = build_dataset(data, "TEST", seed=0)
    found = {test.source.path(row).split("/")[0]: int(test[row]["label"]) for row in range(3)}
    assert found["0"] == 0 and found["2"] == 2  # the classes of ImageNet, whatever their folders are called
    save(root / "1000" / "a.jpeg")
    with pytest.raises(DataError, match="no class 1000"):
        ImageNetV2Source(root)
    save(root / "cat" / "a.jpeg")
    with pytest.raises(DataError, match="'cat'"):
        ImageNetV2Source(root)


def test_imagenet_subsets_know_their_classes(tmp_path: Path) -> None:
    synsets = imagenet_synsets()
    known = imagenet_synsets("imagenet_a_synsets.txt")
    save(tmp_path / known[3] / "a.jpg")
    source = ImageNetSubsetSource(tmp_path, which="a")
    assert source.labels is not None and synsets[source.labels[0]] == known[3]
    assert source.known_classes.sum() == 200 and source.known_classes[source.labels[0]]
    save(tmp_path / "n00000000" / "a.jpg")
    with pytest.raises(DataError, match="n00000000"):
        ImageNetSubsetSource(tmp_path, which="a")


def test_part_imagenet(tmp_path: Path) -> None:
    save(tmp_path / "n01440764_1.JPEG")
    save(tmp_path / "n01443537_2.JPEG")
    content = {
        "images": [
            {"id": 7, "file_name": "n01443537_2.JPEG", "height": 10, "width": 12},
            {"id": 3, "file_name": "n01440764_1.JPEG", "height": 10, "width": 12},
            {"id": 9, "file_name": "n01440764_9.JPEG", "height": 10, "width": 12},
        ],
        "categories": [{"id": 5, "name": "Fish Fin"}, {"id": 2, "name": "Fish Head"}],
        "annotations": [
            {"id": 0, "image_id": 3, "category_id": 2, "area": 9, "segmentation": [[1, 2, 4, 5]], "bbox": [1, 2, 4, 3]},
            {"id": 1, "image_id": 3, "category_id": 5, "area": 9, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]},
            {"id": 2, "image_id": 7, "category_id": 5, "area": 0, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]},
            {"id": 3, "image_id": 7, "category_id": 5, "area": 9, "iscrowd": 1, "segmentation": []},
        ],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    source = PartImageNetSource.build(request(tmp_path))
    assert source.part_names == ["Fish Head", "Fish Fin"] and source.class_names == ["n01440764", "n01443537"]
    assert source.paths.tolist() == ["n01440764_1.JPEG", "n01443537_2.JPEG"]
    head, fin = source.part_masks(0)
    assert np.argwhere(head).tolist() == [[r, c] for r in range(2, 5) for c in range(1, 5)]  # its bbox
    assert fin.sum() == 16 and fin[:4, :4].all()
    assert not source.part_masks(1).any() and source.mask(0).sum() == (head | fin).sum()
    damaged = content | {"annotations": [{**content["annotations"][0], "id": 44, "bbox": [1, 2, 4]}]}
    (tmp_path / "val.json").write_text(json.dumps(damaged))
    with pytest.raises(DataError, match=r"val.json: annotation 44 has a polygon of four numbers, .*bbox \[1, 2, 4\]"):
        PartImageNetSource.build(request(tmp_path, "VAL")).part_masks(0)
    # a test without fish of the first kind
    fish = content | {"images": content["images"][:1], "annotations": content["annotations"][2:]}
    (tmp_path / "test.json").write_text(json.dumps(fish))
    both = {"DATA_SOURCES": ["part_imagenet"], "DATA_PATHS": [str(tmp_path)]}
    test = build_dataset(Data(TRAIN=Split(**both), TEST=Split(**both)), "TEST", seed=0)
    assert len(test) == 1 and test[0]["label"] == 1
    del content["categories"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="a list 'categories'"):
        PartImageNetSource.build(request(tmp_path))


def test_flowers(tmp_path: Path) -> None:
    from scipy.io import savemat

    base = tmp_path / "flowers-102"
    for number in (1, 2, 3):
        save(base / "jpg" / f"image_{number:05d}.jpg")
    segmented = np.zeros((20, 20, 3), dtype=np.uint8)
    segmented[..., 2] = 255
    segmented[5:15, 5:15] = (200, 40, 40)
    (base / "segmim").mkdir()
    Image.fromarray(segmented).save(base / "segmim" / "segmim_00002.jpg", quality=100, subsampling=0)
    savemat(base / "setid.mat", {"trnid": [[2]], "valid": [[1]], "tstid": [[3]]})
    savemat(base / "imagelabels.mat", {"labels": [[5, 7, 9]]})
    source = FlowersSource.build(request(tmp_path))
    assert source.labels is not None and source.labels.tolist() == [6] and len(source.class_names or []) == 9
    assert 80 <= source.mask(0).sum() <= 120
    (base / "jpg" / "image_00002.jpg").unlink()
    with pytest.raises(DataError, match="image_00002.jpg: is not there"):
        FlowersSource.build(request(tmp_path))


def test_turtles(tmp_path: Path) -> None:
    rows = "identity,file_name,split_closed,split_open\nB,b.jpg,train,test\nA,a.jpg,train,train\nB,c.jpg,test,test\n"
    (tmp_path / "metadata_base.csv").write_text(rows)
    train = TurtleReidSource.build(request(tmp_path))
    assert train.labels is not None and train.labels.tolist() == [1, 0]
    assert len(TurtleReidSource(tmp_path, split="TEST", column="split_open")) == 2
    with pytest.raises(DataError, match="split_closed_random"):
        TurtleReidSource(tmp_path, split="TEST", column="split_closed_random")
