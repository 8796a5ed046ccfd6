"""The work of `data shrink` on some images: smaller copies, as files or as a webdataset shard.

Each file is written beside its final name and renamed, so none is ever torn.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from PIL import Image

from vissl_like.data.decode import Encoded, Unreadable, read_bytes, reason_of
from vissl_like.data.shard_index import Members, scan
from vissl_like.errors import DataError
from vissl_like.files import beside

#: How the names of unfinished files end.
PART = ".part"
_JPEG = (".jpg", ".jpeg")
#: What other files become, without loss. GIF and PGM cannot hold every RGB image: PNG under the same name, since readers
#: go by content.
_LOSSLESS = {".png": "PNG", ".bmp": "BMP", ".ppm": "PPM", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"}
_ORIENTATION = 0x0112
_REDUCTIONS = (8, 4, 2)
#: Bytes of an image and its time of change in nanoseconds.
_Stamp = tuple[int, int]
#: Clocks of some file systems go in steps of two seconds.
_SAME_TIME_NS = 2_000_000_000


@dataclass(frozen=True)
class Settings:
    """What the copies depend on; written to DST/shrink.json. `images`: digest of the paths, for shards."""

    source: str
    short_side: int
    quality: int
    format: str = "folder"
    shard_size: int = 0
    images: str = ""
    is_mixed: bool = False


@dataclass
class Outcome:
    """What became of some images. `bad`: path -> reason."""

    shrunk: int = 0
    copied: int = 0
    kept: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    bad: dict[str, str] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return self.shrunk + self.copied + self.kept + len(self.bad)

    def add(self, other: Outcome) -> None:
        """Take over the counts of another part."""
        for name in ("shrunk", "copied", "kept", "bytes_before", "bytes_after"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad.update(other.bad)


# -------------------------------------------------------------------------------------------- one image
def shrink_image(data: bytes, name: str, *, short_side: int, quality: int) -> tuple[bytes, bool]:
    """(file content, whether it was made smaller). Images that are small already stay as they are. Raises Unreadable.

    `name` decides the format: JPEG stays JPEG, everything else is stored without loss.
    """
    encoded = Encoded(data)
    if min(encoded.size) <= short_side:
        encoded.pixels()  # it must be readable all the same
        return data, False
    image, stream = _resized(encoded, short_side), io.BytesIO()
    suffix = os.path.splitext(name)[1].lower()
    if suffix in _JPEG:
        image.save(stream, "JPEG", quality=quality, subsampling="4:2:0", exif=_orientation(data))
    else:
        kind = _LOSSLESS.get(suffix, "PNG")
        image.save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return stream.getvalue(), True


def _resized(encoded: Encoded, short_side: int) -> Image.Image:
    """Bilinear, antialiased. A large JPEG is decoded at part of its size where it still has twice the pixels."""
    width, height = encoded.size
    scale = short_side / min(width, height)
    reduce = next((factor for factor in _REDUCTIONS if 1 / scale >= 2 * factor), 1)
    pixels = encoded.pixels(reduce=reduce)
    if pixels.shape[:2] == (height, width):
        reduce = 1
    size = round(width * scale), round(height * scale)
    box = (0, 0, width / reduce, height / reduce)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, box=box)


def _orientation(source: bytes) -> Image.Exif:
    """The tag that turns a photo, without other metadata: pixels stay as stored, viewers still turn them."""
    kept = Image.Exif()
    if b"Exif\0\0" in source[: 1 << 17]:
        with contextlib.suppress(Exception):  # damaged metadata is not worth a photo
            value = Image.open(io.BytesIO(source)).getexif().get(_ORIENTATION, 1)
            if value in range(2, 9):
                kept[_ORIENTATION] = value
    return kept


# ---------------------------------------------------------------------------------------------- folders
def shrink_files(source: str, target: str, paths: Sequence[str], settings: Settings) -> Outcome:
    """Write the copies of some images that are not there yet."""
    outcome = Outcome()
    for path in paths:
        origin, copy = os.path.join(source, path), os.path.join(target, path)
        if _is_done(origin, copy):
            outcome.kept += 1
            continue
        try:
            _, time_ns = _stamp_of(origin)
            data = read_bytes(origin)
            content, is_smaller = shrink_image(data, path, short_side=settings.short_side, quality=settings.quality)
        except Unreadable as reason:
            outcome.bad[path] = str(reason)
            continue
        with writing(copy):
            write_file(copy, content, time_ns=time_ns)
        _count(outcome, data, content, is_smaller)
    return outcome


def _count(outcome: Outcome, data: bytes, content: bytes, is_smaller: bool) -> None:
    outcome.shrunk += is_smaller
    outcome.copied += not is_smaller
    outcome.bytes_before += len(data)
    outcome.bytes_after += len(content)


def _stamp_of(file: str) -> _Stamp:
    """What a new version of an image is recognised by. Raises what read_bytes() raises."""
    try:
        state = os.stat(file)
    except OSError as error:
        raise reason_of(error, file) from error
    return state.st_size, state.st_mtime_ns


def _is_done(origin: str, copy: str) -> bool:
    try:
        there, source = os.stat(copy), os.stat(origin)
    except OSError:
        return False
    return there.st_size > 0 and abs(there.st_mtime_ns - source.st_mtime_ns) < _SAME_TIME_NS


def write_file(file: str, content: bytes, *, time_ns: int | None = None) -> None:
    """Write a file under its final name, with this time of change. Raises OSError."""
    folder = os.path.dirname(file)
    os.makedirs(folder, exist_ok=True)
    part = os.path.join(folder, f".{os.getpid()}{PART}")
    try:
        with open(part, "wb") as stream:
            stream.write(content)
        if time_ns is not None:
            os.utime(part, ns=(time_ns, time_ns))
        os.replace(part, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


@contextlib.contextmanager
def writing(file: str) -> Iterator[None]:
    """An OSError within becomes the DataError that the user sees."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{file}: cannot be written ({error.strerror or error}). What was written before is complete; start the same "
            "command again once there is room."
        ) from error


# ----------------------------------------------------------------------------------------------- shards
def shrink_shard(source: str, file: str, rows: Sequence[tuple[int, str, int | None]], settings: Settings) -> Outcome:
    """Write one tar file of (row, path, class): ROW.jpg, ROW.cls with the class number, ROW.json with path and class.

    A shard that is there stays if it is whole and would become the same again. ROW.json also has size and time of the
    original, by which a new version of it is recognised.
    """
    there = _stamps_in(file)
    kept = None if there is None else _seen_again(source, rows, there, settings=settings)
    if kept is not None:
        return kept
    outcome = Outcome()
    with (
        writing(file),
        beside(Path(file), shared=True) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as shard,
    ):
        for row, path, label in rows:
            _add_to_shard(shard, source, row, path, label, settings=settings, outcome=outcome)
    return outcome


def _stamps_in(file: str) -> dict[int, _Stamp] | None:
    """The rows that a shard holds, with the stamps of their originals; None where there is no such shard or it is damaged."""
    try:
        with open(file, "rb") as stream:
            # Looked at first, since tarfile takes a cut between members for the end.
            scan(stream, shown=file, members=Members(), stamp={})
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:") as shard:
                told = {entry.name: shard.extractfile(entry) for entry in shard if entry.name.endswith(".json")}
                return {int(name.split(".")[0]): _stamp_in(content) for name, content in told.items()}
    except (OSError, tarfile.TarError, ValueError, DataError):
        return None


def _stamp_in(told: IO[bytes] | None) -> _Stamp:
    about = json.load(told) if told else {}
    return about.get("source_bytes", -1), about.get("source_mtime_ns", -1)


def _seen_again(
    source: str, rows: Sequence[tuple[int, str, int | None]], there: dict[int, _Stamp], *, settings: Settings
) -> Outcome | None:
    """The outcome of a shard that was written before; None where it would be another now.

    That is where an original was replaced since, or can be read now that could not be read then.
    """
    outcome = Outcome(kept=len(there))
    for row, path, _ in rows:
        origin = os.path.join(source, path)
        try:
            if row not in there:
                shrink_image(read_bytes(origin), path, short_side=settings.short_side, quality=settings.quality)
            is_same = row in there and _is_of_one(_stamp_of(origin), there[row])
        except Unreadable as reason:
            is_same = row not in there
            outcome.bad[path] = str(reason)
        if not is_same:
            return None
    return outcome


def _is_of_one(stamp: _Stamp, other: _Stamp) -> bool:
    """Whether two stamps can be those of the same image."""
    return stamp[0] == other[0] and abs(stamp[1] - other[1]) < _SAME_TIME_NS


def _add_to_shard(
    shard: tarfile.TarFile,
    source: str,
    row: int,
    path: str,
    label: int | None,
    *,
    settings: Settings,
    outcome: Outcome,
) -> None:
    origin = os.path.join(source, path)
    try:
        size, time_ns = _stamp_of(origin)
        data = read_bytes(origin)
        content, is_smaller = shrink_image(data, path, short_side=settings.short_side, quality=settings.quality)
    except Unreadable as reason:
        outcome.bad[path] = str(reason)
        return
    about: dict[str, object] = {"path": path, "source_bytes": size, "source_mtime_ns": time_ns}
    if label is not None:
        about["label"] = label
    members = {os.path.splitext(path)[1].lower().lstrip("."): content}
    if label is not None:
        members["cls"] = str(label).encode()
    members["json"] = json.dumps(about).encode()
    for suffix, text in members.items():
        entry = tarfile.TarInfo(f"{row:09d}.{suffix}")
        entry.size, entry.mode = len(text), 0o644
        shard.addfile(entry, io.BytesIO(text))
    _count(outcome, data, content, is_smaller)
