"""Two ways to decode a file: the same pixels, and the same verdict on damaged ones with the same reason."""

from __future__ import annotations

import errno
import functools
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vissl_like.data.decode import Encoded, Unreadable, read_bytes, read_image, reason_of
from vissl_like.data.medical import read_dicom
from vissl_like.errors import DataError


def photo(width: int = 61, height: int = 45) -> Image.Image:
    rng = np.random.RandomState(0)
    small = Image.fromarray(rng.randint(0, 256, (7, 9, 3)).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@functools.lru_cache(maxsize=1)
def files() -> dict[str, bytes]:
    image, exif = photo(), Image.Exif()
    exif[0x0112], exif[0x0128], exif[0x011A] = 6, 2, 72.0
    return {
        "4:2:0": saved(image, subsampling="4:2:0"),
        "4:2:2": saved(image, subsampling="4:2:2", quality=95),
        "4:4:4": saved(image, subsampling="4:4:4"),
        "progressive": saved(image, progressive=True),
        "restarts": saved(image, restart_marker_blocks=2),
        "rotated by EXIF": saved(image, exif=exif, comment=b"a comment", dpi=(72, 72)),
        "RGB inside": saved(image, keep_rgb=True),
        "grey": saved(image.convert("L")),
        "CMYK": saved(image.convert("CMYK")),
        "several": saved(image, "MPO", save_all=True, append_images=[image.rotate(90)]),
        "one pixel": saved(photo(1, 1)),
        "PNG": saved(image, "PNG"),
        "16 bits": saved(Image.fromarray((np.arange(2000, dtype=np.uint16) * 30).reshape(40, 50)), "PNG"),
    }


def pillow(data: bytes) -> np.ndarray | str:
    """Pixels, or the reason why there are none."""
    if not data:
        return "empty file"  # which Pillow sees of a file, not of a stream
    try:
        return np.asarray(read_image(io.BytesIO(data)))
    except Unreadable as reason:
        return str(reason)


def fast(data: bytes) -> np.ndarray | str:
    try:
        return Encoded(data).pixels()
    except Unreadable as reason:
        return str(reason)


@pytest.mark.parametrize("name", files())
def test_same_pixels(name: str) -> None:
    data = files()[name]
    encoded = Encoded(data)
    found = encoded.pixels()
    assert found.flags.writeable and found.dtype == np.uint8
    assert np.array_equal(found, pillow(data)) and np.array_equal(np.asarray(Encoded(data).image()), found)
    assert encoded.size == (found.shape[1], found.shape[0])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(files())))
def test_same_verdict_on_damaged_files(data: st.DataObject, name: str) -> None:
    """Cut off, overwritten, with bytes missing or too many: what Pillow can save is saved, what it refuses is refused."""
    content = bytearray(files()[name])
    position = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(400, len(content) - 1)))
    damage = data.draw(st.sampled_from(["cut", "overwrite", "insert", "remove", "append"]))
    noise = data.draw(st.binary(min_size=1, max_size=4))
    if damage == "cut":
        del content[position:]
    elif damage == "overwrite":
        content[position : position + len(noise)] = noise
    elif damage == "insert":
        content[position:position] = noise
    elif damage == "remove":
        del content[position : position + len(noise)]
    else:
        content += noise
    expected, found = pillow(bytes(content)), fast(bytes(content))
    assert np.array_equal(found, expected) if isinstance(expected, np.ndarray) else found == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not pixels", "not an image"),
        (files()["4:2:0"][:200], "Truncated"),
        (files()["4:2:0"][:900], "truncated"),
        (files()["progressive"][:-200], "truncated"),
        (files()["PNG"][:-200], "truncated"),
    ],
    ids=["empty", "text", "no header", "cut", "cut in a later scan", "cut PNG"],
)
def test_reasons(data: bytes, reason: str) -> None:
    assert reason in str(fast(data)) and fast(data) == pillow(data)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read: Linux")
@pytest.mark.parametrize("read", [read_bytes, read_image, read_dicom])
def test_a_fault_of_the_storage_is_no_bad_image(read: Callable[[str], Any]) -> None:
    """Reading /proc/self/mem at its start is an input/output error, as of a disk that fails."""
    with pytest.raises(DataError, match=r"^/proc/self/mem: cannot be read \(Input/output error\)[.] Mend the storage"):
        read("/proc/self/mem")


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "ENOMEM", "ENOTCONN", "EHOSTDOWN", "EMFILE", "ENFILE"])
def test_faults_of_the_machine(name: str) -> None:
    number = getattr(errno, name)
    assert isinstance(reason_of(OSError(number, os.strerror(number)), "a.jpg"), DataError)


def test_a_few_wrong_bytes_are_tolerated_as_in_pillow() -> None:
    data = bytearray(files()["4:2:0"])
    data[-300:-296] = b"\xff\xd9\x00\x00"
    clean = files()["4:2:0"][:-2] + b"\x00\x00\x00" + files()["4:2:0"][-2:]
    for content in (bytes(data), clean):
        expected, found = pillow(content), fast(content)
        assert isinstance(expected, str) == isinstance(found, str)
        assert isinstance(expected, str) or np.array_equal(expected, found)


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "DecompressionBombError" in str(fast(files()["4:2:0"]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(fast(files()["4:2:0"]), np.ndarray)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    with pytest.raises(Unreadable, match="no such file"):
        read_bytes(str(file))
    file.write_bytes(files()["grey"])
    assert read_bytes(str(file)) == files()["grey"]
    with pytest.raises(Unreadable, match="Is a directory"):
        read_bytes(str(tmp_path))


def test_orientation_is_not_applied() -> None:
    assert Encoded(files()["rotated by EXIF"]).size == photo().size
