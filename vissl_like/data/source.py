"""What an image source offers, and the two that are made of others: several in a row, and some rows of one.

A row's identity is its path: relative to the source's root where there is one, else absolute, or a made-up name such as
"mnist5k/train/17". Labels and features are tied to images by it.
"""

from __future__ import annotations

import array
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vissl_like.config.schema_data import Split, Stream, TrainSplit
from vissl_like.data.sharding import Sharding
from vissl_like.errors import DataError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class SourceRequest:
    """What a source is built from: entry `position` of the parallel lists of one split.

    `name` is its DATASET_NAMES entry, `path` its DATA_PATHS entry ("" where none is given or needed).
    """

    split: str
    position: int
    name: str
    path: str
    options: Split
    train_split: TrainSplit = field(default_factory=TrainSplit)
    download: bool = False
    stream: Stream = field(default_factory=Stream)

    def key(self, option: str) -> str:
        """The dotted key of an option of this split, for messages."""
        return f"config.DATA.{self.split}.{option}"


class Source(Protocol):
    """Images in a fixed order. A class in the registry also has `build(request: SourceRequest) -> Source`.

    A source of files may have `read(row) -> bytes | None` too: the encoded image, from which pixels are made faster
    than by `load`. It raises decode.Unreadable like that. A source of shards has `sharding` too (sharding.py): how its
    rows lie in them, None where they do not.
    """

    name: str
    root: str  # absolute folder that `paths` are relative to; "" where paths are no files or absolute
    class_names: list[str] | None

    @property
    def labels(self) -> np.ndarray | None:
        """Class of each row, int64 (N,), or None where the source knows none."""

    @property
    def paths(self) -> np.ndarray:
        """Identity of each row, unicode (N,)."""

    def __len__(self) -> int:
        """Number of rows."""

    def load(self, row: int) -> Image.Image:
        """The image as RGB. Raises decode.Unreadable with the reason."""

    def path(self, row: int) -> str:
        """Identity of one row."""

    def file(self, row: int) -> str | None:
        """Absolute file of one row (of a row in a shard: shard/member), or None where there is none."""

    def stamps(self) -> np.ndarray:
        """int64 (N,): changes when the image changes. File size in bytes (-1: no such file), or a checksum."""


def encoded_row(source: Source, row: int) -> bytes | None:
    """The encoded image of a row, or None where the source has decoded images only."""
    read = getattr(source, "read", None)
    return None if read is None else read(row)


def sharding_of(source: Source) -> Sharding | None:
    """How the rows of a source lie in shards, or None."""
    found: Sharding | None = getattr(source, "sharding", None)
    return found


class PathTable:
    """Many strings in two arrays: no Python object per row, so worker processes take a plain copy of the bytes."""

    def __init__(self, strings: Iterable[str]) -> None:
        content, ends = bytearray(), array.array("q")
        for text in strings:
            content += text.encode("utf-8", "surrogateescape")
            ends.append(len(content))
        self._bytes = np.frombuffer(content, np.uint8)
        self._ends = np.frombuffer(ends, np.int64)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All strings in a row, uint8, and where each of them ends, int64 (N,)."""
        return self._bytes, self._ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> str:
        start = int(self._ends[row - 1]) if row else 0
        return self._bytes[start : int(self._ends[row])].tobytes().decode("utf-8", "surrogateescape")

    def array(self) -> np.ndarray:
        """All of them, unicode (N,)."""
        return unicode_array(self[row] for row in range(len(self)))


def unicode_array(strings: Iterable[str]) -> np.ndarray:
    """Unicode (N,), also when there is no string at all. What is such an array stays as it is, and mapped if it is."""
    if isinstance(strings, np.ndarray) and strings.dtype.kind == "U":
        return strings
    found = list(strings)
    return np.array(found, dtype=np.str_) if found else np.empty(0, dtype="U1")


def file_sizes(files: Iterable[str]) -> np.ndarray:
    """Bytes of each file, int64 (N,); -1 for one that is not there."""
    return np.fromiter((_file_size(file) for file in files), dtype=np.int64)


def _file_size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


def fingerprint(paths: Sequence[str] | np.ndarray, stamps: np.ndarray) -> str:
    """Hash of the ordered paths and stamps: 32 hex digits of SHA-256."""
    digest = hashlib.sha256()
    for path, stamp in zip(paths, stamps.tolist()):
        digest.update(f"{path}\0{stamp}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


class ConcatSource:
    """Several sources one after the other.

    Folders and file lists get one common root, so that equal relative paths in two of them stay apart.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.parts = list(sources)
        self.name = "+".join(part.name for part in self.parts)
        self._starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self.root = self._common_root()
        self.class_names = self._common_classes()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, row: int) -> tuple[Source, int]:
        """The source of a row, and the number that the row has there."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.parts[part], row - int(self._starts[part])

    def _common_root(self) -> str:
        """Deepest folder above all roots; "" if some rows are no files or no folder but the system's root is shared."""
        roots = [part.root for part in self.parts]
        if not all(roots):
            return ""
        try:
            common = os.path.commonpath(roots)
        except ValueError:  # different drives
            return ""
        return "" if os.path.dirname(common) == common else common

    def _common_classes(self) -> list[str] | None:
        if any(part.labels is None for part in self.parts):
            return None
        named = [part.class_names for part in self.parts]
        if any(names is None for names in named):
            return None
        return sorted({name for names in named for name in names or []})

    @property
    def labels(self) -> np.ndarray | None:
        """By class name where all sources have names, as given where none has. None if some source has no labels."""
        if any(part.labels is None for part in self.parts):
            return None
        if self.class_names is None and any(part.class_names for part in self.parts):
            named = [part.name for part in self.parts if part.class_names]
            raise DataError(
                f"data sources {[part.name for part in self.parts]}: only {named} name their classes, so the labels of "
                "the others cannot be matched to them. Give LABEL_PATHS, or LABEL_TYPE=zero if labels are not needed."
            )
        return np.concatenate([_renumbered(part, self.class_names) for part in self.parts])

    @property
    def paths(self) -> np.ndarray:
        return unicode_array(self.path(row) for row in range(len(self)))

    def load(self, row: int) -> Image.Image:
        part, inner = self.locate(row)
        return part.load(inner)

    def read(self, row: int) -> bytes | None:
        part, inner = self.locate(row)
        return encoded_row(part, inner)

    def path(self, row: int) -> str:
        part, inner = self.locate(row)
        file = part.file(inner)
        if file is None:
            return part.path(inner)
        return os.path.relpath(file, self.root).replace(os.sep, "/") if self.root else file

    def file(self, row: int) -> str | None:
        part, inner = self.locate(row)
        return part.file(inner)

    def stamps(self) -> np.ndarray:
        return np.concatenate([part.stamps() for part in self.parts])

    @property
    def sharding(self) -> Sharding | None:
        return Sharding.join([sharding_of(part) or len(part) for part in self.parts])


def _renumbered(part: Source, class_names: list[str] | None) -> np.ndarray:
    assert part.labels is not None
    if class_names is None:
        return part.labels
    new = np.array([class_names.index(name) for name in part.class_names or []], dtype=np.int64)
    return np.where(part.labels >= 0, new[np.maximum(part.labels, 0)], part.labels) if len(new) else part.labels


class SubsetSource:
    """Some rows of a source, in the given order. Paths keep their identity; rows are counted anew."""

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        self.whole = source
        self.rows = np.asarray(rows, dtype=np.int64)
        self.name, self.root, self.class_names = source.name, source.root, source.class_names

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> np.ndarray | None:
        labels = self.whole.labels
        return None if labels is None else labels[self.rows]

    @property
    def paths(self) -> np.ndarray:
        return self.whole.paths[self.rows]

    def locate(self, row: int) -> tuple[Source, int]:
        """The source of a row, and the number that the row has there."""
        return self.whole, int(self.rows[row])

    def load(self, row: int) -> Image.Image:
        return self.whole.load(int(self.rows[row]))

    def read(self, row: int) -> bytes | None:
        return encoded_row(self.whole, int(self.rows[row]))

    def path(self, row: int) -> str:
        return self.whole.path(int(self.rows[row]))

    def file(self, row: int) -> str | None:
        return self.whole.file(int(self.rows[row]))

    def stamps(self) -> np.ndarray:
        return self.whole.stamps()[self.rows]

    @property
    def sharding(self) -> Sharding | None:
        whole = sharding_of(self.whole)
        return None if whole is None else whole.take(self.rows)
