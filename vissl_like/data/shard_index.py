"""What lies where in a tar file of samples: one pass over its headers, kept in a small file that processes map.

Samples follow the webdataset convention: members in a row whose names agree up to the first dot of the file name are one
sample, and what comes after that dot says what they are (a/000017.jpg, a/000017.cls). Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import mmap
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from vissl_like.data.decode import IMAGE_EXTENSIONS
from vissl_like.errors import DataError
from vissl_like.files import beside

_MAGIC = b"VLSHARD1"
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_PICKLED = ("pyd", "pickle", "pkl", "pth")
_PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
#: Added to the name of a shard: its published index.
PUBLISHED = ".index"
_END_BYTES = 1 << 20
_BLOCK = 512
#: Columns of the table.
_OFFSET, _SIZE, _LABEL, _NAME_END, _PATH_END, _PATH_HASH, _COLUMNS = range(7)


@dataclass(frozen=True)
class Members:
    """Which members of a sample are its image and its class: an extension, json.FIELD, or "" for the usual ones."""

    image: str = ""
    label: str = ""


@dataclass(frozen=True)
class Facts:
    """What is known of a shard beside its rows.

    stamp: what it is recognised by. digest: of the whole content, where that was fetched. label_names: what the label
    numbers stand for, None where the shard has numbers. without_image: how many samples have none, and the first of them.
    has_paths: every JSON member tells a path. token: of the rows.
    """

    rows: int = 0
    size: int = 0
    stamp: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    label_names: list[str] | None = None
    without_image: int = 0
    first_without: str = ""
    has_paths: bool = False
    token: str = ""


class _Arrays(NamedTuple):
    table: np.ndarray  # int64 (N, 6)
    names: np.ndarray  # uint8: all member names in a row
    paths: np.ndarray  # uint8: all paths of the JSON members in a row


class Index:
    """The samples of one shard that have an image, in the order of the file. A copy for another process is a file name."""

    def __init__(self, facts: Facts, arrays: _Arrays | None, *, file: str = "") -> None:
        self.facts, self._file, self._in_memory = facts, file, arrays

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_in_memory": None if self._file else self._in_memory}

    def __len__(self) -> int:
        return self.facts.rows

    @property
    def _arrays(self) -> _Arrays:
        return _map_again(self._file, self.facts.token) if self._in_memory is None else self._in_memory

    def place(self, row: int) -> tuple[int, int]:
        """Where the image lies in the shard: offset and size in bytes."""
        entry = self._arrays.table[row]
        return int(entry[_OFFSET]), int(entry[_SIZE])

    def name(self, row: int) -> str:
        """Name of the image's member."""
        return self._text(row, _NAME_END, self._arrays.names)

    def path(self, row: int) -> str:
        """What the sample's JSON member calls its path; "" where it has none."""
        return self._text(row, _PATH_END, self._arrays.paths)

    def _text(self, row: int, column: int, texts: np.ndarray) -> str:
        table = self._arrays.table
        start = int(table[row - 1, column]) if row else 0
        return texts[start : int(table[row, column])].tobytes().decode("utf-8", "surrogateescape")

    def known_by(self, stamp: dict[str, Any]) -> Index:
        """The same rows of a shard that is recognised by something else."""
        return Index(replace(self.facts, stamp=stamp), self._arrays)

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each image, int64 (N,)."""
        return self._arrays.table[:, _SIZE]

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, int64 (N,), -1 for none: a number, or the place in facts.label_names."""
        return self._arrays.table[:, _LABEL]

    @property
    def path_hashes(self) -> np.ndarray:
        """int64 (N,): equal where path() is."""
        return self._arrays.table[:, _PATH_HASH]


# -------------------------------------------------------------------------------------------- scanning
def scan(stream: IO[bytes], *, shown: str, members: Members, stamp: dict[str, Any], digest: str = "") -> Index:
    """The index of an open tar file, by one pass over it. `shown`: its name in messages.

    Raises DataError for a file that is cut off, damaged, compressed or no tar file, and for samples that make no sense.
    """
    samples = _Samples(shown, members)
    stream.seek(0)
    with _opened(stream, shown) as tar:
        while (entry := _next(tar, shown)) is not None:
            tar.members = []  # type: ignore[attr-defined]  # so that memory does not grow with the shard
            samples.add(entry, stream)
        samples.close(stream)
        _refuse_bad_end(stream, tar.offset, shown=shown)
    return samples.index(Facts(size=os.fstat(stream.fileno()).st_size, stamp=stamp, digest=digest))


@contextlib.contextmanager
def _opened(stream: IO[bytes], shown: str) -> Iterator[tarfile.TarFile]:
    try:
        tar = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115
    except (tarfile.TarError, EOFError) as error:
        stream.seek(0)
        kind = _PACKED.get(stream.read(2))
        if kind:
            raise DataError(
                f"{shown}: compressed by {kind}, so no sample can be read without all before it. Unpack the shard; images "
                "are compressed themselves, so it will hardly be larger."
            ) from error
        raise DataError(
            f"{shown}: not a tar file, or cut off at its start ({error}). Write this shard again."
        ) from error
    with tar:
        yield tar


def _next(tar: tarfile.TarFile, shown: str) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(
            f"{shown}: cut off or damaged near byte {tar.offset} ({error}). Copy or write this shard again."
        ) from error


def _refuse_bad_end(stream: IO[bytes], end: int, *, shown: str) -> None:
    """A tar file ends with zeros: something else is damage, and nothing at all means that the rest is lost."""
    stream.seek(end)
    rest = stream.read(_END_BYTES)
    if len(rest) < _BLOCK:
        raise DataError(
            f"{shown}: cut off at byte {end + len(rest)}: the mark at the end of a tar file is missing. Copy or write this "
            "shard again."
        )
    if rest.strip(b"\0"):
        is_joined = not rest[:_BLOCK].strip(b"\0")
        what = "more data after its end mark (joined by cat? use tar --concatenate)" if is_joined else "damaged"
        raise DataError(f"{shown}: {what} at byte {end}. Copy or write this shard again.")


class _Samples:
    """Members as they come, put together to samples."""

    def __init__(self, shown: str, members: Members) -> None:
        self._shown, self._members = shown, members
        self._key: str | None = None
        self._parts: dict[str, tarfile.TarInfo] = {}
        self._seen: set[str] = set()
        self._rows: list[tuple[int, ...]] = []
        self._labels: list[int | str | None] = []
        self._names, self._paths = bytearray(), bytearray()
        self._without_image, self._first_without = 0, ""
        self._has_paths = True

    def add(self, entry: tarfile.TarInfo, stream: IO[bytes]) -> None:
        """The next member of the file."""
        found = _NAME.fullmatch(entry.name)
        if not entry.isreg() or found is None or _META.match(entry.name):
            return
        key, extension = found.group(1), found.group(2).lower()
        if entry.issparse():
            raise self._wrong(entry, "is stored as a sparse file. Write this shard without --sparse")
        if extension.rpartition(".")[2] in _PICKLED:
            raise self._wrong(entry, "is pickled: reading it could run code. Store classes as .cls or .json")
        if key != self._key:
            self.close(stream)
            self._key, self._parts = key, {}
            if key in self._seen:
                raise self._wrong(entry, "belongs to a sample that came before: each key may stand in one place only")
            self._seen.add(key)
        if extension in self._parts:
            raise self._wrong(entry, "is there twice")
        self._parts[extension] = entry

    def _wrong(self, entry: tarfile.TarInfo, what: str) -> DataError:
        return DataError(f"{self._shown}: {entry.name!r} at byte {entry.offset} {what}.")

    def close(self, stream: IO[bytes]) -> None:
        """The sample is complete."""
        if not self._parts:
            return
        image = self._image()
        if image is None:
            self._without_image += 1
            self._first_without = self._first_without or str(self._key)
            return
        about = self._about(stream)
        path = about.get("path", "")
        self._has_paths &= isinstance(path, str) and path != ""
        text = path.encode("utf-8", "surrogateescape") if isinstance(path, str) else b""
        self._paths += text
        self._names += image.name.encode("utf-8", "surrogateescape")
        self._labels.append(self._label(about, stream))
        code = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
        self._rows.append((image.offset_data, image.size, -1, len(self._names), len(self._paths), code))

    def _image(self) -> tarfile.TarInfo | None:
        if self._members.image:
            return self._parts.get(self._members.image.lower())
        found = [name for name in self._parts if f".{name.rpartition('.')[2]}" in IMAGE_EXTENSIONS]
        if len(found) > 1:
            raise self._wrong(
                self._parts[found[1]],
                f"is a further image of its sample, which has {', '.join(sorted(found))}. Say which one is meant: "
                f"config.DATA.STREAM.IMAGE_MEMBER={found[0]}",
            )
        return self._parts[found[0]] if found else None

    def _text(self, extension: str, stream: IO[bytes]) -> str:
        entry = self._parts[extension]
        stream.seek(entry.offset_data)
        try:
            return stream.read(entry.size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong(entry, f"is no text ({error})") from error

    def _about(self, stream: IO[bytes]) -> dict[str, Any]:
        if "json" not in self._parts:
            return {}
        try:
            found = json.loads(self._text("json", stream))
        except ValueError as error:
            raise self._wrong(self._parts["json"], f"is no JSON ({error})") from error
        return found if isinstance(found, dict) else {}

    def _label(self, about: dict[str, Any], stream: IO[bytes]) -> int | str | None:
        wanted = self._members.label
        member, _, name = wanted.partition(".")
        if not wanted:
            member, name = ("cls", "") if "cls" in self._parts else ("json", "label")
        if member == "json":
            return self._class(about.get(name), self._parts.get("json"))
        member = wanted.lower() or member
        return self._class(self._text(member, stream).strip(), self._parts[member]) if member in self._parts else None

    def _class(self, value: Any, entry: tarfile.TarInfo | None) -> int | str | None:
        """A class from what stands in a member: a whole number from 0, -1 or nothing for none, or a name."""
        if value is None or value == "" or entry is None:
            return None
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self._wrong(entry, f"gives the class {str(value)[:80]!r}: one whole number or name is needed")
        if isinstance(value, int) and not -1 <= value < 1 << 62:
            raise self._wrong(entry, f"gives the class {value}: classes count from 0; -1 means none")
        return value

    def index(self, facts: Facts) -> Index:
        """What was found."""
        table = np.array(self._rows, dtype=np.int64).reshape(-1, _COLUMNS)
        names: list[str] | None = None
        if any(isinstance(label, str) for label in self._labels):
            texts = [None if label in (None, -1) else str(label) for label in self._labels]
            names = sorted({text for text in texts if text is not None})
            number = {name: k for k, name in enumerate(names)}
            table[:, _LABEL] = [-1 if text is None else number[text] for text in texts]
        elif self._labels:
            table[:, _LABEL] = [-1 if label is None else label for label in self._labels]
        arrays = _Arrays(table, *(np.frombuffer(bytes(texts), np.uint8) for texts in (self._names, self._paths)))
        known = {
            **asdict(facts),
            "rows": len(table),
            "label_names": names,
            "without_image": self._without_image,
            "first_without": self._first_without,
            "has_paths": self._has_paths,
            "token": _token_of(arrays),
        }
        return Index(Facts(**known), arrays)


# -------------------------------------------------------------------------------------------- keeping
def stamp_of(state: os.stat_result) -> dict[str, Any]:
    """What a local shard is recognised by."""
    return {"size": state.st_size, "mtime": state.st_mtime_ns, "ctime": state.st_ctime_ns, "inode": state.st_ino}


def publish(file: str) -> Index:
    """The index of a local shard, written beside it for those who will fetch the shard. Raises DataError, OSError."""
    target, there = file + PUBLISHED, None
    if os.path.exists(target) and os.stat(target).st_mtime_ns > os.stat(file).st_mtime_ns:
        with open(target, "rb") as stream:
            there = parse_index(stream.read(), members=Members())
    if there is not None and there.facts.size == os.stat(file).st_size:
        return there
    with open(file, "rb") as stream:
        digest = new_digest()
        while piece := stream.read(1 << 20):
            digest.update(piece)
        index = scan(stream, shown=file, members=Members(), stamp={}, digest=digest.hexdigest())
    return write_index(index, target, members=Members())


def new_digest() -> Any:
    """The hash that tells the content of a shard."""
    return hashlib.blake2b(digest_size=16)


def _token_of(arrays: _Arrays) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for values in arrays:
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def write_index(index: Index, file: str, *, members: Members) -> Index:
    """Write an index under its final name in one rename; returns it as it is mapped from there. Raises OSError."""
    arrays = index._arrays
    header = {"facts": asdict(index.facts), "members": asdict(members), "bytes": [values.nbytes for values in arrays]}
    text = json.dumps(header).encode()
    text = text.ljust(len(text) + -len(text) % 8)
    with beside(Path(file), shared=True) as stream:
        for piece in (_MAGIC, len(text).to_bytes(8, "little"), text, *(values.tobytes() for values in arrays)):
            stream.write(piece)
    return Index(index.facts, None, file=file)


def read_index(file: str, *, members: Members, stamp: dict[str, Any]) -> Index | None:
    """The index in a file, if there is one, whole, of these members, and the shard is still what it was."""
    # A file of another version or torn by a crash of the machine: all the same, not used.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = _checked(_map(file), members)
        if found is not None and found.facts.stamp == stamp:
            os.utime(file)
            return Index(found.facts, None, file=file)
    return None


def parse_index(content: bytes, *, members: Members) -> Index | None:
    """The index that was published beside a shard, if it is one of these members."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return _checked(_parse(content), members)
    return None


def _checked(found: tuple[dict[str, Any], _Arrays], members: Members) -> Index | None:
    header, arrays = found
    facts = Facts(**header["facts"])
    is_whole = _token_of(arrays) == facts.token and facts.rows == len(arrays.table)
    return Index(facts, arrays) if is_whole and header["members"] == asdict(members) else None


def _map(file: str) -> tuple[dict[str, Any], _Arrays]:
    with open(file, "rb") as stream:
        return _parse(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def _parse(content: bytes | mmap.mmap) -> tuple[dict[str, Any], _Arrays]:
    if content[:8] != _MAGIC:
        raise ValueError("not an index")
    offset = 16 + int.from_bytes(content[8:16], "little")
    header = json.loads(content[16:offset])
    found = []
    for count in header["bytes"]:
        found.append(np.frombuffer(content, np.uint8, count=count, offset=offset))
        offset += count
    return header, _Arrays(found[0].view(np.int64).reshape(-1, _COLUMNS), found[1], found[2])


@functools.lru_cache(maxsize=8192)  # one mapping each; the system allows 65,530
def _map_again(file: str, token: str) -> _Arrays:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        header, arrays = _map(file)
        if header["facts"]["token"] == token:
            return arrays
    raise DataError(f"{file}: this list of a shard's samples is gone or was replaced. Start the same command again.")
