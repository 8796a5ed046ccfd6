"""The index of a large folder: used as long as it holds, noticed when it does not, mapped instead of copied."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vissl_like.config.schema_data import Data
from vissl_like.data import listing
from vissl_like.data.dataset import build_dataset
from vissl_like.data.folder import FolderSource
from vissl_like.data.listing import MappedPaths, cache_folder, list_folder
from vissl_like.data.loader import close_workers, eval_batches
from vissl_like.errors import DataError


@pytest.fixture(autouse=True)
def small_is_large_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "WORTH_ROWS", 3)
    monkeypatch.setattr(listing, "_SETTLED_S", -3600.0)  # the folders are as young as the test
    monkeypatch.setattr(listing, "keeps_times", lambda devices: True)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in ("b/2.png", "a/1.png", "a/deep/0.jpg", "a b/ä.jpg", "b/no image.txt"):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(file, "png")
    return root


def indexes() -> list[Path]:
    return sorted(cache_folder().glob("*")) if cache_folder().is_dir() else []


def is_from_index(root: Path) -> bool:
    """Whether the next look at the folder is spared. Looking opens folders, the index only asks for their times."""
    opened: list[str] = []
    original = listing.entries_of
    listing.entries_of = lambda folder: (opened.append(folder), original(folder))[1]  # type: ignore[assignment]
    try:
        list_folder(str(root))
    finally:
        listing.entries_of = original
    return not opened


def test_the_index_says_what_looking_says(images: Path) -> None:
    first, second = list_folder(str(images)), list_folder(str(images))
    assert len(indexes()) == 1 and is_from_index(images)
    for found in (first, second):
        assert isinstance(found.paths, MappedPaths)
        assert found.paths.array().tolist() == ["a/1.png", "a/deep/0.jpg", "a b/ä.jpg", "b/2.png"]
        assert found.class_names == ["a", "a b", "b"] and found.class_numbers.tolist() == [0, 0, 1, 2]
        assert not found.loose and found.paths[2] == "a b/ä.jpg"


def test_loose_images_make_no_classes(images: Path) -> None:
    Image.new("RGB", (1, 1)).save(images / "c.png")
    for _ in range(2):
        found = list_folder(str(images))
        assert found.class_names is None and found.class_numbers is None and found.loose == "c.png"
        assert len(found.paths) == 5
    assert is_from_index(images)


def tick() -> None:
    """Until the clock of the file system has moved on."""
    time.sleep(0.02)


CHANGES: dict[str, Callable[[Path], object]] = {
    "file added": lambda root: (root / "a" / "deep" / "new.png").touch(),
    "file removed": lambda root: (root / "b" / "2.png").unlink(),
    "file renamed": lambda root: (root / "b" / "2.png").rename(root / "b" / "3.png"),
    "folder added": lambda root: (root / "z").mkdir(),
    "folder renamed": lambda root: (root / "a b").rename(root / "c"),
    "folder replaced": lambda root: (
        (root / "b").rename(root.parent / "away"), (root / "b").mkdir(), (root / "b" / "9.png").touch(),
    ),
    "moved between folders": lambda root: (root / "b" / "2.png").rename(root / "a" / "2.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(images: Path, name: str) -> None:
    list_folder(str(images))
    assert is_from_index(images)
    tick()
    CHANGES[name](images)
    assert not is_from_index(images)
    expected = sorted(
        (file.relative_to(images) for file in images.rglob("*") if file.suffix in (".png", ".jpg")),
        key=lambda path: path.parts,
    )
    for _ in range(2):
        assert list_folder(str(images)).paths.array().tolist() == [path.as_posix() for path in expected]


def test_times_set_back_are_noticed(images: Path) -> None:
    """As rsync and tar do: the time of the last change of the entry itself cannot be set."""
    list_folder(str(images))
    before = (images / "b").stat()
    tick()
    (images / "b" / "new.png").touch()
    os.utime(images / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (images / "b").stat().st_mtime_ns == before.st_mtime_ns and not is_from_index(images)


def test_links(images: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.png").touch()
    (images / "link").symlink_to(other)
    (images / "later").symlink_to(tmp_path / "not yet there")
    (images / "circle").symlink_to(images)
    assert "link/x.png" in list_folder(str(images)).paths.array()
    assert is_from_index(images)
    tick()
    (tmp_path / "not yet there").mkdir()
    assert not is_from_index(images)
    assert is_from_index(images)
    tick()
    (other / "y.png").touch()
    assert "link/y.png" in list_folder(str(images)).paths.array()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "header"])
def test_damaged_indexes_are_not_used(images: Path, damage: str) -> None:
    expected = list_folder(str(images)).paths.array().tolist()
    (file,) = indexes()
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[:-3]
    elif damage == "flipped":
        content[-2] ^= 1
    elif damage == "empty":
        content = bytearray()
    elif damage == "text":
        content = bytearray(b"hello")
    else:
        content[20] = 0
    file.write_bytes(content)
    assert not is_from_index(images)
    assert list_folder(str(images)).paths.array().tolist() == expected and is_from_index(images)


def test_what_is_not_kept(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORTH_ROWS", 5), ("_SETTLED_S", 3600.0), ("keeps_times", lambda devices: False)):
        with monkeypatch.context() as patch:
            patch.setattr(listing, name, value)
            assert len(list_folder(str(images)).paths) == 4 and not indexes()
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert len(list_folder(str(images)).paths) == 4


def test_untrusted_file_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not listing.keeps_times({os.makedev(4094, 77)})
    proc = os.stat("/proc").st_dev if os.path.isdir("/proc") else 0
    assert not listing.keeps_times({proc})


def test_unused_indexes_are_forgotten(images: Path) -> None:
    list_folder(str(images))
    (old,) = indexes()
    os.utime(old, (0, 0))
    list_folder(str(images))  # used again
    assert indexes() == [old] and old.stat().st_mtime > 0
    os.utime(old, (0, 0))
    tick()
    (images / "b" / "new.png").touch()
    list_folder(str(images))
    assert len(indexes()) == 1 and indexes() != [old]


def _look(root: str, results: multiprocessing.Queue) -> None:
    for _ in range(20):
        results.put(list_folder(root).paths.array().tolist())


def test_many_writers_at_once(images: Path) -> None:
    """Each of them sees the whole list, whoever's index it finds."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_look, args=(str(images), results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = []
    for _ in range(80):
        found.append(results.get(timeout=60))
        for file in indexes()[:1]:
            file.unlink(missing_ok=True)
    for process in processes:
        process.join()
    expected = ["a/1.png", "a/deep/0.jpg", "a b/ä.jpg", "b/2.png"]
    assert all(paths == expected for paths in found)
    assert not [file for file in indexes() if file.name.endswith(".part")]


def test_an_index_that_another_process_removes_at_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = listing._write_index

    def write_and_lose(root: str, found: listing.Listing, watch: listing.Watch) -> str:
        file = write(root, found, watch)
        Path(file).unlink()
        return file

    monkeypatch.setattr(listing, "_write_index", write_and_lose)
    assert list_folder(str(images)).paths.array().tolist() == ["a/1.png", "a/deep/0.jpg", "a b/ä.jpg", "b/2.png"]


def test_a_worker_maps_the_file(images: Path, tmp_path: Path) -> None:
    source = FolderSource(images)
    sent = pickle.dumps(source._paths)
    assert len(sent) < 500 and b"deep" not in sent
    for row in range(4):
        assert pickle.loads(sent)[row] == source.path(row)
    for file in indexes():
        file.unlink()
    assert pickle.loads(sent).array().tolist() == source.paths.tolist()  # the folder is still the same
    (images / "b" / "new.png").touch()
    with pytest.raises(DataError, match=r"added or removed while the run was reading.*Start the same command again"):
        pickle.loads(sent)


def test_batches_through_workers(images: Path) -> None:
    options = {"DATA_SOURCES": ["disk_folder"], "DATA_PATHS": [str(images)]}
    dataset = build_dataset(Data(TRAIN=options), "TRAIN", seed=0)
    assert isinstance(dataset.source._paths, MappedPaths)
    rows = [batch["data"][:, 0, 0, 0] for batch in eval_batches(dataset, batch=2, workers=1, method="fork")]
    assert np.concatenate(rows).tolist() == [len(path) for path in dataset.paths]
    close_workers(dataset)


def test_names_that_are_not_unicode(images: Path) -> None:
    try:
        open(os.fsencode(images) + b"/a/\xff.png", "w").close()
    except OSError:
        pytest.skip("this file system takes only unicode names")
    expected = list_folder(str(images)).paths.array().tolist()
    assert is_from_index(images) and list_folder(str(images)).paths.array().tolist() == expected
