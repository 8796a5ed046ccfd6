"""`data shrink`: small copies under the same paths, resumable, never torn."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vissl_like.data.decode import read_image
from vissl_like.data.folder import FolderSource
from vissl_like.data.shrink import in_bytes, shrink
from vissl_like.data.shrink_files import shrink_image
from vissl_like.data.tools import main
from vissl_like.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.RandomState(seed)
    small = Image.fromarray(rng.randint(0, 256, (5, 7, 3)).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker" * 50
    for name, size, options in (
        ("a/wide.jpg", (300, 100), {}),
        ("a/tall.JPEG", (90, 400), {"exif": exif}),
        ("a/small.jpg", (50, 40), {"quality": 30}),
        ("b c/deep/ä.png", (120, 130), {}),
        ("b c/one.webp", (140, 100), {}),
        ("b c/moving.gif", (100, 100), {}),
    ):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        photo(*size).save(file, **options)
        os.utime(file, (1_000_000_000, 1_000_000_000 + len(name)))
    (root / "a" / "notes.txt").write_text("not an image")
    return root


def add_bad(images: Path) -> None:
    (images / "a" / "wide copy.jpg").write_bytes((images / "a" / "wide.jpg").read_bytes()[:1500])
    (images / "a" / "empty.png").write_bytes(b"")


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    source = FolderSource(folder)
    return {source.path(row): source.load(row).size for row in range(len(source))}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --------------------------------------------------------------------------------------------- the copies
def test_sizes_paths_and_times(images: Path, tmp_path: Path) -> None:
    found = shrink(str(images), str(tmp_path / "copy"), short_side=64, quality=90)
    assert (found.shrunk, found.copied, found.kept, found.bad) == (5, 1, 0, {})
    assert sizes(tmp_path / "copy") == {
        "a/wide.jpg": (192, 64), "a/tall.JPEG": (64, 284), "a/small.jpg": (50, 40), "b c/deep/ä.png": (64, 69),
        "b c/one.webp": (90, 64), "b c/moving.gif": (64, 64),
    }  # fmt: skip
    assert (tmp_path / "copy/a/small.jpg").read_bytes() == (images / "a/small.jpg").read_bytes()
    for path in sizes(images):
        assert abs((tmp_path / "copy" / path).stat().st_mtime - (images / path).stat().st_mtime) < 0.01
    assert not (tmp_path / "copy/a/notes.txt").exists()
    before, after = FolderSource(images), FolderSource(tmp_path / "copy")
    assert before.paths.tolist() == after.paths.tolist() and before.class_names == after.class_names


def test_pixels(images: Path, tmp_path: Path) -> None:
    shrink(str(images), str(tmp_path / "copy"), short_side=64, quality=90)
    for path, allowed in (("a/wide.jpg", 3.0), ("b c/deep/ä.png", 0.1), ("b c/one.webp", 0.1), ("b c/moving.gif", 0.1)):
        copy = read_image(str(tmp_path / "copy" / path))
        expected = read_image(str(images / path)).resize(copy.size, Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(copy, dtype=float) - np.asarray(expected)).mean() < allowed


def test_orientation_is_kept_and_nothing_else(images: Path, tmp_path: Path) -> None:
    shrink(str(images), str(tmp_path / "copy"), short_side=64)
    with Image.open(tmp_path / "copy/a/tall.JPEG") as copy:
        assert dict(copy.getexif()) == {0x0112: 6}
    with Image.open(tmp_path / "copy/a/wide.jpg") as copy:
        assert not copy.getexif()


def test_quality() -> None:
    stream = io.BytesIO()
    photo(400, 300).save(stream, "JPEG", quality=95)
    lengths = [len(shrink_image(stream.getvalue(), "x.jpg", short_side=200, quality=q)[0]) for q in (20, 60, 95)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[2]


# ---------------------------------------------------------------------------------------------- going on
def test_started_again_it_goes_on(images: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shrink(str(images), str(copy), short_side=64)
    whole = contents(copy)
    (copy / "a/wide.jpg").unlink()
    (copy / "b c/one.webp").write_bytes(b"")  # after a crash of the machine
    (copy / "a/.123.part").write_bytes(b"half a fi")
    photo(300, 300, seed=1).save(images / "b c/moving.gif")  # a new version, with a new time
    found = shrink(str(images), str(copy), short_side=64)
    assert (found.shrunk, found.copied, found.kept) == (3, 0, 3)
    now = contents(copy)
    assert set(now) == set(whole)
    assert {path for path in now if now[path] != whole[path]} == {"b c/moving.gif"}
    assert shrink(str(images), str(copy), short_side=64).kept == 6


def test_workers_change_nothing(images: Path, tmp_path: Path) -> None:
    add_bad(images)
    seen: list[tuple[int, int]] = []
    shrink(str(images), str(tmp_path / "one"), short_side=64)
    found = shrink(
        str(images), str(tmp_path / "two"), short_side=64, workers=1, progress=lambda *counts: seen.append(counts)
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert found.images == 8 and seen[-1] == (8, 8)


def test_bad_images_are_listed(images: Path, tmp_path: Path) -> None:
    add_bad(images)
    for _ in range(2):
        found = shrink(str(images), str(tmp_path / "copy"), short_side=64)
        assert set(found.bad) == {"a/wide copy.jpg", "a/empty.png"} and found.bad["a/empty.png"] == "empty file"
        lines = (tmp_path / "copy/bad_images.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == ["a/empty.png", "a/wide copy.jpg"] and "truncated" in lines[1]
    (images / "a/empty.png").unlink()
    (images / "a/wide copy.jpg").unlink()
    shrink(str(images), str(tmp_path / "copy"), short_side=64)
    assert not (tmp_path / "copy/bad_images.txt").exists()


PROGRAM = "import sys; from vissl_like.data.tools import main; sys.exit(main(sys.argv[1:]))"


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *(str(word) for word in words)]


def test_killed_at_any_moment(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for row in range(80):
        photo(300, 200, seed=row).save(root / f"{row:03d}.jpg", quality=95)
    shrink(str(root), str(tmp_path / "whole"), short_side=100)
    words = command("shrink", root, tmp_path / "copy", "--short-side", 100, "--workers", 0)
    killed = 0
    for _ in range(2):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        before = len(list((tmp_path / "copy").glob("*.jpg")))
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "copy").glob("*.jpg"))) > before + 20:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        killed += process.wait() == -signal.SIGKILL
        for file in (tmp_path / "copy").glob("*.jpg"):
            assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
    assert killed
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    assert contents(tmp_path / "copy") == contents(tmp_path / "whole")


def test_no_room(images: Path, tmp_path: Path) -> None:
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); {PROGRAM}"
    words = [sys.executable, "-c", limited, "shrink", str(images), str(tmp_path / "copy"), "--workers", "0"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "cannot be written (File too large)" in done.stderr
    assert "start the same command again" in done.stderr
    assert not list((tmp_path / "copy").rglob("*.part"))


# ------------------------------------------------------------------------------------------------- shards
def read_shards(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as shard:
            found.update((member.name, shard.extractfile(member).read()) for member in shard.getmembers())
    return found


def cut_between_members(file: Path, *, first_lost: int) -> None:
    """As a full disk or a killed copy may leave a shard: to tarfile it looks whole."""
    with tarfile.open(file) as shard:
        end = shard.getmembers()[first_lost].offset
    os.truncate(file, end)
    with tarfile.open(file) as shard:
        assert len(shard.getmembers()) == first_lost


def test_shards(images: Path, tmp_path: Path) -> None:
    add_bad(images)
    options = {"short_side": 64, "format": "webdataset", "shard_size": 3}
    found = shrink(str(images), str(tmp_path / "shards"), **options)
    assert (found.shrunk, found.copied, len(found.bad)) == (5, 1, 2)
    shrink(str(images), str(tmp_path / "files"), short_side=64)
    members, source = read_shards(tmp_path / "shards"), FolderSource(images)
    for row in range(len(source)):
        path, suffix = source.path(row), Path(source.path(row)).suffix.lower()
        assert (f"{row:09d}{suffix}" in members) == (path not in found.bad)
        if path not in found.bad:
            assert members[f"{row:09d}{suffix}"] == (tmp_path / "files" / path).read_bytes()
            assert int(members[f"{row:09d}.cls"]) == source.labels[row]
            about, original = json.loads(members[f"{row:09d}.json"]), (images / path).stat()
            assert (about["path"], about["label"]) == (path, source.labels[row])
            assert (about["source_bytes"], about["source_mtime_ns"]) == (original.st_size, original.st_mtime_ns)
    about = json.loads((tmp_path / "shards/shards.json").read_text())
    assert about["images"] == 6 == sum(shard["images"] for shard in about["shards"]) and len(about["shards"]) == 3
    assert about["class_names"] == ["a", "b c"]
    whole = contents(tmp_path / "shards")
    (tmp_path / "shards/shard-000001.tar").unlink()
    (tmp_path / "shards/shard-000002.tar").write_bytes(whole["shard-000002.tar"][:700])
    again = shrink(str(images), str(tmp_path / "shards"), **options)
    assert again.bad == found.bad and contents(tmp_path / "shards") == whole
    cut_between_members(tmp_path / "shards/shard-000001.tar", first_lost=3)
    again = shrink(str(images), str(tmp_path / "shards"), **options)
    assert again.bad == found.bad and contents(tmp_path / "shards") == whole
    assert (again.kept, again.shrunk + again.copied) == (4, 2)
    photo(80, 80).save(images / "a/new.jpg")
    with pytest.raises(ConfigError, match="images was"):
        shrink(str(images), str(tmp_path / "shards"), **options)


def test_shards_follow_their_originals(images: Path, tmp_path: Path) -> None:
    """A new version of an image, with its size or its time, and one that can be read now: their shards are written anew."""
    add_bad(images)
    options = {"short_side": 64, "format": "webdataset", "shard_size": 3}
    shards = tmp_path / "shards"
    shrink(str(images), str(shards), **options)
    names = {json.loads(text)["path"]: name for name, text in read_shards(shards).items() if name.endswith(".json")}
    before = contents(shards)
    assert shrink(str(images), str(shards), **options).kept == 6 and contents(shards) == before

    photo(100, 300, seed=5).save(images / "a/wide.jpg")
    os.utime(images / "a/wide.jpg", (1_000_000_000, 1_000_000_000 + len("a/wide.jpg")))  # the time of the first version
    (images / "a/wide copy.jpg").write_bytes((images / "a/wide.jpg").read_bytes())  # restored
    now = (images / "b c/moving.gif").stat()
    os.utime(images / "b c/moving.gif", ns=(now.st_atime_ns, now.st_mtime_ns + 5_000_000_000))
    found = shrink(str(images), str(shards), **options)
    assert set(found.bad) == {"a/empty.png"} and (tmp_path / "shards/bad_images.txt").read_text().count("\n") == 1
    after = read_shards(shards)
    with Image.open(io.BytesIO(after[names["a/wide.jpg"].replace(".json", ".jpg")])) as image:
        assert image.size == (64, 192)
    told = [json.loads(text) for name, text in after.items() if name.endswith(".json")]
    assert {about["path"]: about["source_mtime_ns"] for about in told} == {
        path: (images / path).stat().st_mtime_ns for path in [*names, "a/wide copy.jpg"]
    }
    assert shrink(str(images), str(shards), **options).kept == 7


# --------------------------------------------------------------------------------------------- wrong calls
def test_folders_that_do_not_fit(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        shrink(str(tmp_path / "nowhere"), str(tmp_path / "copy"))
    for inside in (images, images / "a" / "copy"):
        with pytest.raises(ConfigError, match="lies in SRC"):
            shrink(str(images), str(inside))
    with pytest.raises(ConfigError, match="is not empty and was not made by this command"):
        shrink(str(images / "a"), str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in this folder"):
        shrink(str(tmp_path / "empty"), str(tmp_path / "copy"))
    shrink(str(images), str(tmp_path / "copy"), short_side=64)
    with pytest.raises(ConfigError, match="short_side was 64, is 65"):
        shrink(str(images), str(tmp_path / "copy"), short_side=65)


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_text("x")
    with pytest.raises(DataError, match="none of 1 images can be read"):
        shrink(str(tmp_path / "images"), str(tmp_path / "copy"))


def test_command_line(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_bad(images)
    copy = tmp_path / "copy"
    assert main(["shrink", str(images), str(copy), "--short-side", "64", "--quality", "80", "--workers", "0"]) == 0
    said = capsys.readouterr()
    assert "5 images made smaller, 1 small ones copied, 0 there already" in said.out and "2 cannot be read" in said.out
    assert "8/8" in said.err and re.search(r"there already, \d+\.\d kB became \d+\.\d kB\.", said.out)
    for words, text in (
        (["shrink"], "required"),
        (["shrink", "x"], "DST"),
        (["shrnk", "x", "y"], "shrnk"),
        (["shrink", "x", "y", "--quality", "101"], "from 1 to 100"),
        (["shrink", "x", "y", "--short-side", "-3"], "from 1 up"),
        (["shrink", "x", "y", "--fast"], "unrecognized"),
    ):
        with pytest.raises(ConfigError, match=text):
            main(words)


def test_help_is_quick() -> None:
    program = f"import sys\ntry:\n    {PROGRAM}\nfinally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program, "shrink", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    usage = " ".join(done.stdout.partition("\n\n")[0].split())
    assert (
        usage.startswith("usage: vissl-like data shrink [-h]") and usage.endswith("SRC DST") and "{shrink}" not in usage
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (2_345_678, "2.3 MB"), (7e9, "7.0 GB")],
)
def test_sizes_in_words(size: int, text: str) -> None:
    assert in_bytes(size) == text
