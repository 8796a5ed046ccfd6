"""The images below a folder; for a large one the list is kept in a file that all processes map into memory.

Such a file is an index in the user's cache folder, never beside the images. It is used as long as every folder it was
made from still has the times and the identity it had: adding, removing or renaming an entry changes those of its folder.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import logging
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vissl_like.data.decode import IMAGE_EXTENSIONS
from vissl_like.data.source import PathTable
from vissl_like.errors import DataError
from vissl_like.files import beside

_log = logging.getLogger(__name__)

#: Smaller folders are listed anew each time: that is quick, and copies of the list are small.
WORTH_ROWS = 20_000
_MAGIC = b"VLINDEX1"
#: A folder changed this recently could change again without a new time (coarse clocks), so its list is not kept.
_SETTLED_S = 3.0
_UNUSED_DAYS = 30
#: File systems that change a folder's times with its entries. Many that run in user space (object stores) do not.
_TRUSTED = ("ext2 ext3 ext4 xfs btrfs zfs f2fs tmpfs overlay nfs nfs4 lustre gpfs beegfs beegfs_nodev ceph").split()


@dataclass(frozen=True)
class Listing:
    """Images below a folder, sorted by path component, with forward slashes.

    The classes are the first folder level, numbered in order; None if some image lies directly in the folder. `loose`:
    such an image where others lie deeper, else "".
    """

    paths: PathTable
    class_names: list[str] | None
    class_numbers: np.ndarray | None
    loose: str = ""


def list_folder(root: str) -> Listing:
    """The listing of an absolute folder: from the index where there is one that still holds, else by looking."""
    found = _read_index(root)
    if found is not None:
        return found
    began = time.time()
    watch = Watch()
    listing = _listing_of(images_below(root, watch=watch))
    if len(listing.paths) < WORTH_ROWS or not _has_settled(watch, began) or not keeps_times(watch.devices):
        return listing
    try:
        return _opened(_write_index(root, listing, watch)) or listing
    except OSError as error:  # it cannot be written, or another process has removed it already
        _log.debug("the list of %s is not kept: %s", root, error)
        return listing


def _listing_of(paths: Iterable[str]) -> Listing:
    numbers = array.array("q")
    names: dict[str, int] = {}
    loose: list[str] = []

    def watched() -> Iterator[str]:
        for path in paths:
            first, slash, _ = path.partition("/")
            if slash:
                numbers.append(names.setdefault(first, len(names)))
            elif not loose:
                loose.append(path)
            yield path

    table = PathTable(watched())
    if loose or not names:
        return Listing(table, None, None, loose[0] if loose and names else "")
    return Listing(table, list(names), np.frombuffer(numbers, dtype=np.int64))


# ------------------------------------------------------------------------------------------------ looking
@dataclass
class Watch:
    """What a listing depends on: path, device, inode and times of each folder, and links that lead to no folder."""

    folders: list[tuple[str, int, int, int, int]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)

    @property
    def devices(self) -> set[int]:
        return {device for _, device, *_ in self.folders}


def entries_of(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted by name, without names that start with a dot."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def is_image(name: str) -> bool:
    """Whether this is the name of an image file."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def images_below(
    root: str, *, below: str = "", above: frozenset[tuple[int, int]] = frozenset(), watch: Watch | None = None
) -> Iterator[str]:
    """Relative paths with forward slashes. `above`: the folders we came through, so that a circle of links ends."""
    folder = os.path.join(root, below)
    state = os.stat(folder)  # before looking: what changes while we look makes the index stale
    here = (state.st_dev, state.st_ino)
    if watch is not None:
        watch.folders.append((below, *here, state.st_mtime_ns, state.st_ctime_ns))
    if here in above:
        return
    for entry in entries_of(folder):
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            yield from images_below(root, below=path, above=above | {here}, watch=watch)
        elif is_image(entry.name):
            yield path
        elif watch is not None and entry.is_symlink():
            watch.links.append(path)


def _has_settled(watch: Watch, now: float) -> bool:
    latest = max(max(modified, changed) for *_, modified, changed in watch.folders)
    return latest / 1e9 < now - _SETTLED_S


def keeps_times(devices: set[int]) -> bool:
    """Whether the times of folders there can be trusted to change with their entries: by the kind of file system (Linux)."""
    kinds: dict[str, str] = {}
    with contextlib.suppress(OSError, IndexError), open("/proc/self/mountinfo", encoding="utf-8") as table:
        for line in table:
            kinds[line.split(" ", 3)[2]] = line.partition(" - ")[2].split(" ", 1)[0]
    return all(kinds.get(f"{os.major(device)}:{os.minor(device)}") in _TRUSTED for device in devices)


def _still_holds(root: str, header: dict[str, Any]) -> bool:
    for below, *then in header["folders"]:
        state = os.stat(os.path.join(root, below))
        if [state.st_dev, state.st_ino, state.st_mtime_ns, state.st_ctime_ns] != then:
            return False
    return not any(os.path.isdir(os.path.join(root, path)) for path in header["links"])


# -------------------------------------------------------------------------------------------------- index
class MappedPaths(PathTable):
    """The paths in an index file. A copy for another process is the file's name."""

    def __init__(self, file: str, *, root: str, digest: str, content: np.ndarray, ends: np.ndarray) -> None:
        self._file, self._root, self._digest = file, root, digest
        self._bytes, self._ends = content, ends

    def __getstate__(self) -> dict[str, str]:
        return {"_file": self._file, "_root": self._root, "_digest": self._digest}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)
        with contextlib.suppress(OSError, ValueError, KeyError):
            header, arrays = _map(self._file)
            if header["digest"] == self._digest:
                self._bytes, self._ends = arrays["bytes"], arrays["ends"]
                return
        self._look_again()

    def _look_again(self) -> None:
        """Somebody has emptied the cache folder meanwhile."""
        table = PathTable(images_below(self._root))
        if digest_of(table) != self._digest:
            raise DataError(
                f"{self._root}: images were added or removed while the run was reading, and its list of them "
                f"({self._file}) is gone. Start the same command again."
            )
        self._bytes, self._ends = table.arrays()


def cache_folder() -> Path:
    """Where indexes are kept: XDG_CACHE_HOME/vissl_like/listings, by default in ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~")) / ".cache"
    return base / "vissl_like" / "listings"


def digest_of(table: PathTable) -> str:
    """Hash of all paths in order."""
    digest = hashlib.blake2b(digest_size=16)
    for values in table.arrays():
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _stem(root: str) -> str:
    return hashlib.blake2b(root.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def _read_index(root: str) -> Listing | None:
    """The listing from an index that still holds."""
    try:
        candidates = sorted(cache_folder().glob(f"{_stem(root)}.*.index"))
    except OSError:
        return None
    for file in candidates:
        # A file of another version, torn by a crash of the machine, or of a folder that is gone: all the same, not used.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            header, _ = _map(str(file))
            is_same = header["root"] == root and header["extensions"] == list(IMAGE_EXTENSIONS)
            devices = {device for _, device, *_ in header["folders"]}
            if is_same and keeps_times(devices) and _still_holds(root, header):
                found = _opened(str(file))
                if found is not None:
                    os.utime(file)
                    return found
    return None


def _opened(file: str) -> Listing | None:
    """The listing in an index file, its content checked."""
    header, arrays = _map(file)
    paths = MappedPaths(
        file, root=header["root"], digest=header["digest"], content=arrays["bytes"], ends=arrays["ends"]
    )
    if digest_of(paths) != header["digest"]:
        return None
    names = header["class_names"]
    numbers = None if names is None else np.array(arrays["numbers"])
    return Listing(paths, names, numbers, header["loose"])


def _map(file: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of an index file. Raises OSError, ValueError or KeyError for anything else."""
    with open(file, "rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if content[:8] != _MAGIC:
        raise ValueError("not an index")
    length = int.from_bytes(content[8:16], "little")
    header = json.loads(content[16 : 16 + length])
    kinds = {"bytes": np.uint8, "ends": np.int64, "numbers": np.int64}
    arrays = {
        name: np.frombuffer(content, kinds[name], count=count, offset=offset)
        for name, (offset, count) in header["arrays"].items()
    }
    return header, arrays


def _write_index(root: str, listing: Listing, watch: Watch) -> str:
    """Write the index of a folder under its final name in one rename; returns that name. Raises OSError."""
    content, ends = listing.paths.arrays()
    numbers = np.empty(0, np.int64) if listing.class_numbers is None else listing.class_numbers
    digest = digest_of(listing.paths)
    header: dict[str, Any] = {
        "root": root,
        "extensions": list(IMAGE_EXTENSIONS),
        "folders": watch.folders,
        "links": watch.links,
        "class_names": listing.class_names,
        "loose": listing.loose,
        "digest": digest,
    }
    parts = {"ends": ends, "numbers": numbers, "bytes": content}
    room = len(json.dumps(header)) + 200  # for the places of the arrays
    room += -room % 8
    offset, places = 16 + room, {}
    for name, values in parts.items():
        places[name] = (offset, len(values))
        offset += values.nbytes  # the bytes come last, so that numbers start at multiples of 8
    text = json.dumps({**header, "arrays": places}).encode().ljust(room)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = folder / f"{_stem(root)}.{digest[:16]}.index"
    # The times may differ for equal paths, so an older file of this name is replaced; who has mapped it, keeps it.
    with beside(file, shared=True) as stream:
        for piece in (_MAGIC, len(text).to_bytes(8, "little"), text, *(values.tobytes() for values in parts.values())):
            stream.write(piece)
    _forget_unused(folder)
    return str(file)


def _forget_unused(folder: Path) -> None:
    """Remove what nobody has used for a month."""
    limit = time.time() - _UNUSED_DAYS * 86400
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < limit:
                file.unlink()
