"""Where images come from: folders, lists, packages; every file mode as RGB."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vissl_like.config.schema_data import Data, Split, TrainSplit
from vissl_like.data.dataset import build_dataset
from vissl_like.data.datasets import DIGITS_SPLITS, MNIST5K_SPLITS, DigitsSource, Mnist5kSource, stratified_split
from vissl_like.data.decode import Unreadable, read_image
from vissl_like.data.folder import FilelistSource, FolderSource, folder_classes
from vissl_like.data.source import ConcatSource, PathTable, SourceRequest, fingerprint
from vissl_like.data.synthetic import SyntheticSource
from vissl_like.errors import ConfigError, DataError, UserError


def request(split: str = "TRAIN", *, name: str = "", path: str = "", **options: object) -> SourceRequest:
    return SourceRequest(split, 0, name, path, Split(**options), TrainSplit())


# ------------------------------------------------------------------------------------------- one file
def saved(folder: Path, name: str, mode: str, value: object, **options: object) -> str:
    Image.new(mode, (3, 2), value).save(folder / name, **options)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "mode", "value", "expected"),
    [
        ("grey.png", "L", 77, (77, 77, 77)),
        ("bit.png", "1", 1, (255, 255, 255)),
        ("alpha.png", "RGBA", (9, 8, 7, 0), (9, 8, 7)),
        ("grey_alpha.png", "LA", (50, 10), (50, 50, 50)),
        ("deep.png", "I;16", 257 * 100, (100, 100, 100)),
        ("deep.tif", "I", 257 * 100, (100, 100, 100)),
        ("float.tif", "F", 0.2, (51, 51, 51)),
        ("rgb.bmp", "RGB", (1, 2, 3), (1, 2, 3)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, name: str, mode: str, value: object, expected: tuple[int, ...]) -> None:
    image = read_image(saved(tmp_path, name, mode, value))
    assert image.mode == "RGB" and image.size == (3, 2)
    assert image.getpixel((1, 1)) == expected


def test_palette_and_cmyk(tmp_path: Path) -> None:
    palette = Image.new("RGB", (4, 4), (200, 10, 30)).quantize(4)
    palette.save(tmp_path / "palette.png", transparency=b"\x00\xff")
    assert read_image(str(tmp_path / "palette.png")).getpixel((0, 0)) == (200, 10, 30)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red, green, blue = read_image(str(tmp_path / "cmyk.jpg")).getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


def test_the_camera_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees for display
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(str(tmp_path / "turned.jpg")).size == (30, 20)


def test_why_a_file_is_unreadable(tmp_path: Path) -> None:
    good = tmp_path / "good.jpg"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3)).astype(np.uint8)).save(good)
    (tmp_path / "short.jpg").write_bytes(good.read_bytes()[:900])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    # A PNG whose header promises what the data do not hold.
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(5))
    reasons = {}
    for name in ("short.jpg", "empty.jpg", "text.jpg", "broken.png", "absent.jpg"):
        with pytest.raises(Unreadable) as error:
            read_image(str(tmp_path / name))
        reasons[name] = str(error.value)
    assert "truncated" in reasons["short.jpg"]
    assert reasons["empty.jpg"] == "empty file"
    assert "not an image" in reasons["text.jpg"]
    assert reasons["absent.jpg"] == "no such file"
    assert reasons["broken.png"]


# --------------------------------------------------------------------------------------------- folders
def put(root: Path, *names: str, size: int = 4) -> Path:
    for number, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (number, 0, 0)).save(file)
    return root


def test_class_folders(tmp_path: Path) -> None:
    put(tmp_path, "dog/b.png", "dog/a.JPG", "cat/deep/er/x.png", "ant-lion/1.bmp", ".hidden/z.png", "dog/.DS.png")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "nothing").mkdir()
    source = FolderSource(tmp_path)
    assert list(source.paths) == ["ant-lion/1.bmp", "cat/deep/er/x.png", "dog/a.JPG", "dog/b.png"]
    assert source.class_names == ["ant-lion", "cat", "dog"] == folder_classes(tmp_path)
    assert source.labels is not None and source.labels.tolist() == [0, 1, 2, 2]
    assert source.load(3).getpixel((0, 0)) == (0, 0, 0)
    assert source.file(1) == str(tmp_path / "cat/deep/er/x.png")


def test_flat_folders_have_no_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "b.png", "a.png")
    source = FolderSource(tmp_path)
    assert list(source.paths) == ["a.png", "b.png"]
    assert source.labels is None and source.class_names is None and folder_classes(tmp_path) is None
    put(tmp_path, "sub/c.png")
    assert FolderSource(tmp_path).labels is None
    assert "'a.png' lies beside sub-folders" in caplog.text


def test_split_folders_are_not_guessed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "train/a.png", "val/b.png")
    assert FolderSource(tmp_path).class_names == ["train", "val"]
    assert "taken as classes" in caplog.text and "give" in caplog.text


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    put(tmp_path / "real", "a.png")
    put(tmp_path / "data", "dog/b.png")
    os.symlink(tmp_path / "real", tmp_path / "data" / "cat")
    os.symlink(tmp_path / "data", tmp_path / "data" / "dog" / "again")
    assert list(FolderSource(tmp_path / "data").paths) == ["cat/a.png", "dog/b.png"]


def test_folder_errors_name_the_cure(tmp_path: Path) -> None:
    put(tmp_path / "images", "a.png")
    with pytest.raises(DataError, match=r"no such folder.*Did you mean '.*images'"):
        FolderSource(tmp_path / "imagse", key="config.DATA.TRAIN.DATA_PATHS.0")
    with pytest.raises(DataError, match="disk_filelist"):
        FolderSource(tmp_path / "images" / "a.png")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"no image.*\.jpg"):
        FolderSource(tmp_path / "void")


# ----------------------------------------------------------------------------------------------- lists
def test_lists_as_npy_and_text(tmp_path: Path) -> None:
    put(tmp_path, "x/a.png", "x/b.png")
    np.save(tmp_path / "list.npy", np.array(["x/b.png", "x/a.png"]))
    (tmp_path / "list.txt").write_text("x/b.png\n\nx/a.png\n")
    for name in ("list.npy", "list.txt"):
        source = FilelistSource(tmp_path / name)
        assert list(source.paths) == ["x/b.png", "x/a.png"]
        assert source.root == str(tmp_path)
        assert source.load(0).getpixel((0, 0)) == (1, 0, 0)


def test_absolute_lists_and_prefixes(tmp_path: Path) -> None:
    put(tmp_path, "new/a.png")
    np.save(tmp_path / "list.npy", np.array(["/gone/a.png"]))
    source = FilelistSource(tmp_path / "list.npy", remove_prefix="/gone", new_prefix=f"{tmp_path}/new")
    assert source.root == "" and list(source.paths) == [f"{tmp_path}/new/a.png"]
    assert source.load(0).size == (4, 4)


def test_a_list_is_sent_to_workers_without_its_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "list.npy", np.array([f"{k:040d}.png" for k in range(2000)]))
    source = FilelistSource(tmp_path / "list.npy")
    text = pickle.dumps(source)
    assert len(text) < 2000
    assert pickle.loads(text).path(1999) == source.path(1999)


def test_list_errors(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array(["a", None], dtype=object), allow_pickle=True)
    np.save(tmp_path / "numbers.npy", np.arange(3))
    np.save(tmp_path / "none.npy", np.array([], dtype=str))
    (tmp_path / "bad.npy").write_text("no array")
    expected = {
        "objects.npy": "could run code",
        "numbers.npy": "not a list of paths",
        "none.npy": "empty",
        "bad.npy": "not a .npy file",
        "absent.npy": "no such file",
        "list.csv": "one path per line",
    }
    for name, text in expected.items():
        with pytest.raises(DataError, match=text):
            FilelistSource(tmp_path / name)


@given(st.lists(st.text(st.characters(exclude_characters="\0"), min_size=0, max_size=12)))
def test_path_table_keeps_strings(strings: list[str]) -> None:
    encodable = [text.encode("utf-8", "replace").decode("utf-8") for text in strings]
    table = PathTable(encodable)
    assert [table[row] for row in range(len(table))] == encodable


def test_path_table_is_small() -> None:
    table = PathTable(f"n{k % 1000:08d}/n{k % 1000:08d}_{k}.JPEG" for k in range(20_000))
    assert len(pickle.dumps(table)) < 20_000 * 40


# ---------------------------------------------------------------------------------------- several at once
def test_equal_names_in_two_folders_stay_apart(tmp_path: Path) -> None:
    put(tmp_path / "one", "dog/1.png")
    put(tmp_path / "two", "cat/1.png", "dog/1.png")
    both = ConcatSource([FolderSource(tmp_path / "one"), FolderSource(tmp_path / "two")])
    assert list(both.paths) == ["one/dog/1.png", "two/cat/1.png", "two/dog/1.png"]
    assert both.root == str(tmp_path)
    assert both.class_names == ["cat", "dog"]
    assert both.labels is not None and both.labels.tolist() == [1, 0, 1]
    assert both.load(2).getpixel((0, 0)) == (1, 0, 0)


def test_sources_that_number_classes_differently_do_not_mix(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png")
    unnamed = SyntheticSource(split="TRAIN", count=3, classes=2, side=8)
    unnamed.class_names = None
    with pytest.raises(DataError, match="name their classes"):
        _ = ConcatSource([FolderSource(tmp_path), unnamed]).labels


def test_fingerprint_follows_order_and_size(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    source = FolderSource(tmp_path)
    before = fingerprint(source.paths, source.stamps())
    assert before == fingerprint(list(source.paths), source.stamps())
    assert before != fingerprint(source.paths[::-1], source.stamps()[::-1])
    put(tmp_path, "b.png", size=40)
    assert before != fingerprint(source.paths, source.stamps())


# ---------------------------------------------------------------------------------------------- packages
@pytest.mark.parametrize(
    ("source", "splits", "side", "total"),
    [(Mnist5kSource, MNIST5K_SPLITS, 28, 5000), (DigitsSource, DIGITS_SPLITS, 8, 1797)],
)
def test_embedded_digits(source: type, splits: dict[str, int], side: int, total: int) -> None:
    seen = set()
    for split, count in splits.items():
        part = source.build(request(split))
        assert len(part) == count
        assert part.load(0).size == (side, side) and part.load(0).mode == "RGB"
        assert np.bincount(part.labels).min() >= 0.95 * count / 10
        # An image counts as the same if its pixels and class are.
        seen |= {(int(label), part.load(row).tobytes()) for row, label in enumerate(part.labels)}
    assert sum(splits.values()) == total
    assert len(seen) > 0.99 * total  # the splits are disjoint but for images that exist twice


def test_mnist5k_splits_are_exactly_stratified_and_fixed() -> None:
    train = Mnist5kSource.build(request("TRAIN"))
    assert np.bincount(train.labels).tolist() == [300] * 10
    assert train.path(17) == "mnist5k/train/17"
    assert fingerprint(train.paths, train.stamps()) == "50a67906c9edcba86515d78a353d457f"


def test_mnist5k_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from vissl_like.data import datasets

    datasets._read_mnist5k.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "vissl_like\[demo\]"'):
        Mnist5kSource.build(request())
    datasets._read_mnist5k.cache_clear()


@given(st.lists(st.integers(0, 4), min_size=10, max_size=80), st.integers(0, 3))
def test_stratified_split_is_a_partition(labels: list[int], seed: int) -> None:
    n = len(labels)
    sizes = {"a": n // 2, "b": n // 4, "c": n - n // 2 - n // 4}
    parts = stratified_split(np.array(labels), sizes=sizes, seed=seed)
    assert {name: len(rows) for name, rows in parts.items()} == sizes
    assert sorted(np.concatenate(list(parts.values()))) == list(range(n))


def test_synthetic_images_can_be_told_apart() -> None:
    train = SyntheticSource(split="TRAIN", count=24, classes=3, side=24)
    test = SyntheticSource(split="TEST", count=24, classes=3, side=24)
    assert train.load(5).tobytes() == train.load(5).tobytes() != test.load(5).tobytes()
    means = {
        source: [np.asarray(source.load(row), float).mean((0, 1)) for row in range(24)] for source in (train, test)
    }
    centres = [np.mean([means[train][row] for row in range(24) if row % 3 == k], 0) for k in range(3)]
    guesses = [int(np.argmin([np.linalg.norm(mean - centre) for centre in centres])) for mean in means[test]]
    assert np.mean(np.array(guesses) == test.labels) > 0.8


def write_mnist(root: Path, *, count: int = 6) -> None:
    """Files in the format that torchvision's MNIST reads."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        images = np.arange(count * 784, dtype=np.uint8).reshape(count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes()
        )
        labels = (np.arange(count) + (prefix == "t10k")).astype(np.uint8)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


def torchvision_data(name: str, path: str) -> Data:
    split = {"DATA_SOURCES": ["torchvision_dataset"], "DATASET_NAMES": [name], "DATA_PATHS": [path]}
    return Data(TRAIN=split, VAL=split, TEST=split)


def test_torchvision_by_class_name(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = torchvision_data("MNIST", str(tmp_path))
    train, test = build_dataset(data, "TRAIN", seed=0), build_dataset(data, "TEST", seed=0)
    assert train.labels is not None and train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert test.labels is not None and test.labels.tolist() == [1, 2, 3, 4, 5, 6]
    assert train.num_classes == 10 and train.class_names is not None and train.class_names[3] == "3 - three"
    assert train.image(0).mode == "RGB" and train.paths[1] == "MNIST/train/1"
    with pytest.raises(DataError, match="no VAL split"):
        build_dataset(data, "VAL", seed=0)


def test_torchvision_errors_name_the_cure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.DATA\.DOWNLOAD=true"):
        build_dataset(torchvision_data("CIFAR10", str(tmp_path)), "TRAIN", seed=0)
    with pytest.raises(ConfigError, match="did you mean 'CIFAR10'"):
        build_dataset(torchvision_data("CIFAR1O", str(tmp_path)), "TRAIN", seed=0)
    with pytest.raises(UserError, match="DATA_PATHS"):
        build_dataset(torchvision_data("CIFAR10", ""), "TRAIN", seed=0)
