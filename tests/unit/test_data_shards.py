"""Tar shards: which ones a path names, what lies in them, what is refused, and that the library reads the same."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vissl_like.config.schema_data import Data, Split, Stream
from vissl_like.data.dataset import build_dataset
from vissl_like.data.folder import FolderSource
from vissl_like.data.shard_names import expand_braces, shards_of, short_names, shown
from vissl_like.data.shrink import shrink
from vissl_like.data.source import ConcatSource, SourceRequest, SubsetSource
from vissl_like.data.streams import ShardSource
from vissl_like.errors import ConfigError, DataError, UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vissl_like" / "shards"


def png(seed: int, side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (side, side, 3)).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(file: Path, members: Iterable[tuple[str, bytes]], *, format: int = tarfile.PAX_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=format) as shard:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
    return file


def make_old(*files: Path) -> None:
    """Files that were changed a moment ago are listed anew each time."""
    for file in files:
        os.utime(file, (1e9, 1e9))


def samples(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    return [
        part
        for row in range(start, start + count)
        for part in ((f"{row:04d}.png", png(row)), (f"{row:04d}.cls", str(row % 3).encode()))
    ]


def source(path: Path | str, split: str = "TRAIN", **options: Any) -> ShardSource:
    return ShardSource.build(SourceRequest(split, 0, "", str(path), Split(), stream=Stream(**options)))


# ---------------------------------------------------------------------------------------- which shards
BRACES = st.recursive(
    st.text("ab/.-", max_size=3)
    | st.builds("{{{}..{}}}".format, st.integers(-3, 12), st.integers(-3, 12))
    | st.builds("{{{:03d}..{:03d}}}".format, st.integers(0, 12), st.integers(0, 12)),
    lambda inner: (
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}")
        | st.lists(inner, min_size=2, max_size=3).map("".join)
    ),
    max_leaves=6,
)


@given(BRACES)
@settings(max_examples=60, deadline=None)
def test_braces_as_the_library_expands_them(text: str) -> None:
    braceexpand = pytest.importorskip("braceexpand")
    assert list(expand_braces(text)) == list(braceexpand.braceexpand(text))


def test_what_a_path_names(tmp_path: Path) -> None:
    for name in ("b-01.tar", "b-00.tar", "a.tar", ".hidden.tar", "x/y.tar"):
        write_tar(tmp_path / name, [])

    def found(path: str) -> list[str]:
        return [os.path.relpath(place, tmp_path) for place in shards_of(path, key="K")]

    assert found(str(tmp_path)) == ["a.tar", "b-00.tar", "b-01.tar"]
    assert found(f"{tmp_path}/b-{{00..01}}.tar") == ["b-00.tar", "b-01.tar"]
    assert found(f"{tmp_path}/b-*.tar::{tmp_path}/x") == ["b-00.tar", "b-01.tar", "x/y.tar"]
    assert found(f"file://{tmp_path}/a.tar") == ["a.tar"]
    urls = "https://u:secret@host/data/s-{9..10}.tar?token=1"
    assert [shown(url) for url in shards_of(urls, key="K")] == [f"https://host/data/s-{k}.tar" for k in (9, 10)]
    assert short_names(shards_of(urls, key="K")) == ["s-9.tar", "s-10.tar"]
    assert short_names(["/d/a/s.tar", "/d/b/s.tar"]) == ["a/s.tar", "b/s.tar"]


@pytest.mark.parametrize(
    ("path", "text", "kind"),
    [
        ("", "give the folder", ConfigError),
        ("b-{00..02}.tar", r"b-02.tar \(1 of 3 are missing\); did you mean .*b-0[01].tar\?", DataError),
        ("nothing/a.tar", "there is no folder", DataError),
        ("c*.tar", "no file matches", DataError),
        ("empty", "disk_folder", DataError),
        ("x", "There are some in '.*x/in'", DataError),
        ("b-00.tar::b-00.tar", "more than once", ConfigError),
        ("htp://host/a.tar", "htp: is no scheme", ConfigError),
        ("pipe:cat b-00.tar", "VISSL_LIKE_PIPES=1", ConfigError),
    ],
)
def test_paths_that_name_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, text: str, kind: type[UserError]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("b-00.tar", "b-01.tar", "x/in/y.tar"):
        write_tar(tmp_path / name, [])
    with pytest.raises(kind, match=text):
        shards_of(path, key="config.DATA.TRAIN.DATA_PATHS.0")


# ---------------------------------------------------------------------------------- what lies in a shard
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_library_reads_the_same_samples(tmp_path: Path, format: int) -> None:
    """Keys with folders and dots, upper case, several members, members that are no part of a sample, long names."""
    wds = pytest.importorskip("webdataset")
    long = "n" * 60 if format == tarfile.USTAR_FORMAT else "ñ" * 150
    names = ["a/b/0001", "0001", f"deep/{long}", "z/0002"]
    members = [
        part
        for row, key in enumerate(names)
        for part in ((f"{key}.txt", b"a text"), (f"{key}.v2.PNG", png(row)), (f"{key}.cls", str(row).encode()))
    ]
    extra = [("__meta__/x.png", png(9)), ("README", b"no dot"), (".hidden.png", png(8))]
    file = write_tar(tmp_path / "a.tar", [*extra, *members], format=format)
    ours = source(file)
    theirs = list(wds.WebDataset(str(file), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == names
    assert [ours.read(row) for row in range(len(ours))] == [sample["v2.png"] for sample in theirs]
    assert ours.labels is not None and ours.labels.tolist() == [int(sample["cls"]) for sample in theirs]
    assert ours.paths.tolist() == [f"a.tar/{key}.v2.PNG" for key in names]
    assert ours.file(2) == f"{file}/{names[2]}.v2.PNG"


def test_shards_of_the_librarys_writer(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(f"{tmp_path}/s-%03d.tar", maxcount=4, verbose=0) as sink:
        for row in range(10):
            sink.write({"__key__": f"k{row}", "webp" if row % 2 else "png": png(row), "json": {"label": row}})
    ours = source(tmp_path)
    assert len(ours) == 10 and ours.labels is not None and ours.labels.tolist() == list(range(10))
    assert [ours.read(row) for row in range(10)] == [png(row) for row in range(10)]
    assert ours.path(9) == "s-002.tar/k9.webp"


def folder_of_images(root: Path, per_class: int = 5) -> Path:
    for c, name in enumerate(("ant", "bee", "cat")):
        for i in range(per_class):
            file = root / name / ("x" if i % 2 else "y") / f"{i // 2}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(100 * c + i))
    return root


def test_shards_of_data_shrink_are_the_folder(tmp_path: Path) -> None:
    """Identity, order, classes, sizes and bytes, so that labels and features fit both."""
    folder = FolderSource(folder_of_images(tmp_path / "images"))
    shrink(str(tmp_path / "images"), str(tmp_path / "shards"), format="webdataset", shard_size=4)
    ours = source(tmp_path / "shards")
    assert ours.paths.tolist() == folder.paths.tolist() and ours.class_names == folder.class_names
    assert np.array_equal(ours.labels, folder.labels) and np.array_equal(ours.stamps(), folder.stamps())
    assert [ours.read(row) for row in range(15)] == [folder.read(row) for row in range(15)]
    assert np.array_equal(np.asarray(ours.load(7)), np.asarray(folder.load(7)))
    part = SubsetSource(ours, np.array([14, 3]))
    assert part.path(0) == folder.path(14) and part.read(1) == folder.read(3)
    both = ConcatSource([folder, ours])
    assert both.read(15 + 7) == folder.read(7) and len(set(both.paths.tolist())) == 30


def test_mixed_shards_hold_a_sample_of_all(tmp_path: Path) -> None:
    """The same images in an order of their own, and labels by path fit."""
    folder = FolderSource(folder_of_images(tmp_path / "images"))
    options: dict[str, Any] = {"format": "webdataset", "shard_size": 5, "is_mixed": True}
    shrink(str(tmp_path / "images"), str(tmp_path / "shards"), **options)
    ours = source(tmp_path / "shards")
    rows = [folder.paths.tolist().index(path) for path in ours.paths.tolist()]
    assert sorted(rows) == list(range(15)) and rows != sorted(rows)
    assert [ours.read(row) for row in range(15)] == [folder.read(row) for row in rows]
    assert ours.labels is not None and ours.labels.tolist() == folder.labels[rows].tolist()  # type: ignore[index]
    assert all(len(set(ours.labels[start : start + 5].tolist())) > 1 for start in (0, 5, 10))
    (tmp_path / "shards" / "shard-000001.tar").unlink()
    shrink(str(tmp_path / "images"), str(tmp_path / "shards"), **options)  # a later start goes on with the same
    assert source(tmp_path / "shards").paths.tolist() == ours.paths.tolist()
    with pytest.raises(ConfigError, match="is_mixed was True"):
        shrink(str(tmp_path / "images"), str(tmp_path / "shards"), **{**options, "is_mixed": False})


def test_classes_by_name_and_by_option(tmp_path: Path) -> None:
    def about(row: int) -> bytes:
        return json.dumps({"kind": ["cat", "ant", "7"][row], "label": row + 5}).encode()

    parts = [
        (f"{row}.{kind}", content)
        for row in range(3)
        for kind, content in (
            ("jpg", png(row)),
            ("mask.png", b""),
            ("json", about(row)),
            ("txt", b" t%d\n" % (2 - row)),
        )
    ]
    file = write_tar(tmp_path / "a.tar", parts)
    options = {"IMAGE_MEMBER": "jpg"}
    expected = {
        "": ([5, 6, 7], None),
        "json.kind": ([2, 1, 0], ["7", "ant", "cat"]),
        "txt": ([2, 1, 0], ["t0", "t1", "t2"]),
        "cls": (None, None),
    }
    for member, (labels, names) in expected.items():
        found = source(file, LABEL_MEMBER=member, **options)
        assert (None if found.labels is None else found.labels.tolist()) == labels and found.class_names == names


def test_names_of_one_shard_are_names_in_all(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.png", png(0)), ("0.cls", b"10"), ("1.png", png(1)), ("1.cls", b"-1")])
    write_tar(tmp_path / "1.tar", [("2.png", png(2)), ("2.cls", b"bee"), ("3.png", png(3))])
    found = source(tmp_path)
    assert found.labels is not None and found.labels.tolist() == [0, -1, 1, -1] and found.class_names == ["10", "bee"]


def test_classes_of_val_are_numbered_as_in_train(tmp_path: Path) -> None:
    """shards.json names them, or the names in the shards do, even if VAL lacks one."""
    folder_of_images(tmp_path / "images")
    shrink(str(tmp_path / "images"), str(tmp_path / "train"), format="webdataset")
    write_tar(tmp_path / "val" / "0.tar", [("0.png", png(0)), ("0.cls", b"cat"), ("1.png", png(1)), ("1.cls", b"bee")])

    def labels(train: Path) -> list[int]:
        part = {"DATA_SOURCES": ["webdataset"], "TRANSFORMS": [{"name": "ToTensor"}]}
        data = Data(TRAIN={**part, "DATA_PATHS": [str(train)]}, VAL={**part, "DATA_PATHS": [str(tmp_path / "val")]})
        return build_dataset(data, "VAL", seed=0).labels.tolist()  # type: ignore[union-attr]

    assert labels(tmp_path / "train") == [2, 1]
    texts = [("0.png", png(0)), ("0.cls", b"cat"), ("1.png", png(1)), ("1.cls", b"ant"), ("2.png", png(2))]
    write_tar(tmp_path / "named" / "0.tar", [*texts, ("2.cls", b"bee")])
    assert labels(tmp_path / "named") == [2, 1]


def test_labels_from_label_files_by_path(tmp_path: Path) -> None:
    write_tar(tmp_path / "s" / "0.tar", samples(4))
    np.save(tmp_path / "my_images.npy", np.array([f"0.tar/{row:04d}.png" for row in (3, 1, 0, 2)]))
    np.save(tmp_path / "my_labels.npy", np.array([30, 10, 0, 20]))
    split = {"DATA_SOURCES": ["webdataset"], "DATA_PATHS": [str(tmp_path / "s")]}
    data = Data(TRAIN={**split, "LABEL_PATHS": [str(tmp_path / "my_labels.npy")], "TRANSFORMS": [{"name": "ToTensor"}]})
    assert build_dataset(data, "TRAIN", seed=0, train=True).labels.tolist() == [0, 10, 20, 30]  # type: ignore[union-attr]


def test_other_processes_take_the_name_of_the_list(tmp_path: Path, cache: Path) -> None:
    file = write_tar(tmp_path / "0.tar", samples(400))
    make_old(file)
    os.utime(file, (1e9, 1e9))
    found = source(file)
    fresh = pickle.loads(pickle.dumps(found))
    assert fresh.read(399) == found.read(399) == png(399) and fresh.path(7) == "0.tar/0007.png"
    assert len(pickle.dumps(found)) < 60_000  # listed in memory: this shard changed (its ctime) a moment ago


def test_the_list_is_kept_and_made_anew_when_the_shard_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vissl_like.data.streams._SETTLED_S", -1.0)
    file = write_tar(tmp_path / "0.tar", samples(400))
    assert len(pickle.dumps(source(file))) < 5_000
    (index,) = cache.glob("*.index")
    before = index.stat().st_ino
    assert source(file).path(5) == "0.tar/0005.png" and index.stat().st_ino == before
    write_tar(file, samples(30, start=10))
    found = source(file)
    assert len(found) == 30 and index.stat().st_ino != before
    index.write_bytes(index.read_bytes()[:-200])  # torn by a crash of the machine
    assert source(file).read(29) == png(39)
    index.write_bytes(b"VLSHARD1" + bytes(50))
    assert source(file).read(29) == png(39)
    assert len(source(file, LABEL_MEMBER="txt")) == 30 and len(list(cache.glob("*.index"))) == 2
    index.unlink()
    (tmp_path / "source").write_bytes(pickle.dumps(found))
    read = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')).read(0)"
    other = subprocess.run([sys.executable, "-c", read, tmp_path / "source"], capture_output=True, text=True)
    assert "this list of a shard's samples is gone or was replaced. Start the same command again." in other.stderr


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_tar(tmp_path / "s" / "0.tar", samples(3))
    assert len(source(tmp_path / "s")) == 3
    with pytest.raises(DataError, match="CACHE_DIR"):
        source(tmp_path / "s", CACHE_DIR=str(tmp_path / "file"))


# ------------------------------------------------------------------------------------------ what is refused
def refused(tmp_path: Path, members: list[tuple[str, bytes]], text: str, **options: Any) -> None:
    file = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(DataError, match=text) as caught:
        source(file, **options)
    assert str(file) in str(caught.value)


def test_samples_that_make_no_sense(tmp_path: Path) -> None:
    good = samples(1)
    refused(
        tmp_path, [*good, ("a.pyd", pickle.dumps(1))], r"'a\.pyd' at byte \d+ is pickled: .* Store classes as \.cls"
    )
    refused(tmp_path, [*good, ("a.meta.pickle", b"")], "is pickled")
    refused(tmp_path, [*good, *good], "is there twice")
    refused(tmp_path, [*good, ("b.png", png(1)), *good], "belongs to a sample that came before")
    refused(tmp_path, [("a.jpg", png(0)), ("a.mask.png", png(1))], r"IMAGE_MEMBER=jpg")
    refused(tmp_path, [("a.jpg", png(0)), ("a.cls", b"1.5 and 2"), ("a.json", b"{")], "is no JSON")
    refused(tmp_path, [("a.jpg", png(0)), ("a.cls", b"-2")], "gives the class -2")
    refused(tmp_path, [("a.jpg", png(0)), ("a.cls", b"\xff")], "is no text")
    refused(tmp_path, [("a.jpg", png(0)), ("a.json", b'{"label": [1, 2]}')], r"gives the class '\[1, 2\]'")
    refused(tmp_path, [("a.txt", b"x"), ("b.txt", b"y")], "2 samples, but none has an image, for example 'a'")
    refused(tmp_path, [], "no samples")
    refused(tmp_path, good, "none has an image", IMAGE_MEMBER="jpg")


def test_samples_without_image_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_tar(tmp_path / "a.tar", [*samples(2), ("lost.cls", b"1")])
    with caplog.at_level(logging.WARNING):
        assert len(source(file)) == 2
    assert "1 samples have no image" in caplog.text and "'lost'" in caplog.text


@pytest.mark.parametrize("cut", ["in_header", "in_data", "between", "end_mark", "empty"])
def test_cut_off_shards(tmp_path: Path, cut: str) -> None:
    """At any byte: a tar file without its end mark is not whole."""
    file = write_tar(tmp_path / "a.tar", samples(3))
    with tarfile.open(file) as shard:
        last = shard.getmembers()[-2]
    at = {"in_header": last.offset + 100, "in_data": last.offset_data + 10, "between": last.offset, "empty": 0}
    with tarfile.open(file) as shard:
        shard.getmembers()
        at["end_mark"] = shard.offset
    os.truncate(file, at[cut])
    with pytest.raises(DataError, match=r"(cut off.*byte|cut off at its start).*again") as caught:
        source(file)
    assert str(file) in str(caught.value)


def test_damaged_joined_and_compressed_shards(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", samples(3))
    whole = file.read_bytes()
    with tarfile.open(file) as shard:
        third = shard.getmembers()[2].offset
    file.write_bytes(whole[:third] + b"\xaa" * 300 + whole[third + 300 :])
    with pytest.raises(DataError, match=f"damaged at byte {third}"):
        source(file)
    file.write_bytes(whole + whole)
    with pytest.raises(DataError, match="joined by cat"):
        source(file)
    file.write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match="compressed by gzip"):
        source(file)
    file.write_bytes(b"<html>" + b"x" * 2000)
    with pytest.raises(DataError, match="not a tar file"):
        source(file)


def test_shards_json_knows_what_belongs_to_it(tmp_path: Path) -> None:
    folder_of_images(tmp_path / "images")
    shrink(str(tmp_path / "images"), str(tmp_path / "shards"), format="webdataset", shard_size=6)
    last = tmp_path / "shards" / "shard-000002.tar"
    write_tar(last, samples(2))
    with pytest.raises(DataError, match=r"shard-000002.tar: holds 2 images, but shards.json beside it tells of 3"):
        source(tmp_path / "shards")
    last.unlink()
    with pytest.raises(DataError, match=r"shard-000002.tar: no such shard, .* \(1 of 3 are missing\)"):
        source(tmp_path / "shards")
    (tmp_path / "shards" / "shards.json").write_text("{")
    with pytest.raises(DataError, match="not a readable shards.json"):
        source(tmp_path / "shards")


def test_a_shard_that_changes_while_it_is_read(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", samples(5))
    found = source(file)
    assert found.read(0) == png(0)
    os.truncate(file, 4000)  # the file is open already
    with pytest.raises(DataError, match=r"a.tar: ends at byte 4000, before or within '000\d.png'"):
        found.read(4)
    with pytest.raises(DataError, match="changed while the run was reading"):
        pickle.loads(pickle.dumps(found)).read(4)
    file.unlink()
    with pytest.raises(DataError, match="cannot be opened any more"):
        pickle.loads(pickle.dumps(found)).read(4)


def test_bad_images_in_good_shards_are_counted_like_bad_files(tmp_path: Path) -> None:
    parts = [*samples(19), ("0019.png", b"not an image"), ("0019.cls", b"1")]
    write_tar(tmp_path / "a.tar", parts)
    split = {"DATA_SOURCES": ["webdataset"], "DATA_PATHS": [str(tmp_path)], "TRANSFORMS": [{"name": "ToTensor"}]}
    dataset = build_dataset(Data(TRAIN=split, MAX_BAD_FRACTION=0.05), "TRAIN", seed=0)
    assert dataset[19]["valid"] is False and dataset.bad == {19: "not an image, or of an unknown format"}
    dataset.write_bad_images(tmp_path)
    assert f"{tmp_path}/a.tar/0019.png\tnot an image" in (tmp_path / "bad_images.txt").read_text()
    strict = build_dataset(Data(TRAIN=split, MAX_BAD_FRACTION=0.04), "TRAIN", seed=0)
    with pytest.raises(DataError, match="at least 1 of 20 images cannot be read"):
        strict[19]


def test_a_name_with_a_typing_error() -> None:
    data = Data(TRAIN={"DATA_SOURCES": ["web_dataset"], "DATA_PATHS": ["x"]})
    with pytest.raises(ConfigError, match="did you mean 'webdataset'"):
        build_dataset(data, "TRAIN", seed=0)
