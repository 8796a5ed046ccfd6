"""A folder of this machine for fetched shards and for lists of what shards hold; its processes share the work.

Fetched shards take up to a given room; the one that was used longest ago makes place for the next. A process that reads
an evicted shard keeps it open; one that needs it later fetches it again, so only speed depends on the room.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from vissl_like.data.fetch import Patience, download
from vissl_like.data.shard_names import shown
from vissl_like.errors import DataError

T = TypeVar("T")

_log = logging.getLogger(__name__)
_UNUSED_DAYS = 30
_TRIES = 5
#: An unfinished file to which nobody has written for so long belongs to a process that was killed.
_ABANDONED_S = 3600.0


def default_folder() -> str:
    """XDG_CACHE_HOME/vissl_like/shards, by default in ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = given if os.path.isabs(given) else os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "vissl_like", "shards")


@dataclass(frozen=True)
class Cache:
    """The folder, and how much of it shards may take in bytes."""

    folder: str
    limit: int = 50 * 2**30
    patience: Patience = field(default_factory=Patience)

    def forget_unused(self) -> None:
        """Remove what nobody has used for a month."""
        oldest = time.time() - _UNUSED_DAYS * 86400
        for entry in os.scandir(self.folder):
            with contextlib.suppress(OSError):
                if entry.stat().st_mtime < oldest and not _is_released(entry):
                    os.unlink(entry.path)

    def index_file(self, place: str, *, variant: str) -> str:
        """Where the list of a shard's samples is kept; `variant`: what else it depends on."""
        return os.path.join(self.folder, f"{_key(place)}-{_key(variant)[:6]}.index")

    def index_pattern(self, place: str) -> str:
        """All lists of a shard's samples."""
        return os.path.join(self.folder, f"{_key(place)}-*.index")

    @contextlib.contextmanager
    def lock(self, place: str, *, wait: bool = True) -> Iterator[bool]:
        """Alone with a shard among the processes and threads of this machine; False if another has it and `wait` is not
        set. Raises OSError."""
        with open(os.path.join(self.folder, f"{_key(place)}.lock"), "ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError as error:  # a file system without locks: work may be done twice, nothing worse
                _log.debug("%s: no locks there (%s)", self.folder, error)
            os.utime(stream.fileno())  # not by name: who empties the folder takes away this file, too
            yield True  # closing the file gives the lock back

    def fetch(self, url: str, *, check: Callable[[IO[bytes], str], T]) -> T:
        """Fetch a shard, within lock(); returns what check(its open file, digest) gives. If that raises, nothing is kept."""
        part = os.path.join(self.folder, f"{_key(url)}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            with open(part, "w+b") as stream:

                def reserve(size: int) -> None:
                    self.make_room(size, besides=part)
                    os.truncate(part, size)  # so that others count it; nothing is written yet

                size, found = download(url, stream, patience=self.patience, reserve=reserve)
                stream.truncate(size)
                stream.flush()
                os.fsync(stream.fileno())
                result = check(stream, found)
            file = self.content_file(url, found)
            os.replace(part, file)
        except OSError as error:
            raise self._cannot_write(error, url) from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(part)
        self.make_room(size, besides=file)
        return result

    def content_file(self, url: str, digest: str) -> str:
        """Where a fetched shard lies."""
        return os.path.join(self.folder, f"{_key(url)}-{digest[:12]}.tar")

    def _cannot_write(self, error: OSError, url: str) -> DataError:
        return DataError(
            f"config.DATA.STREAM.CACHE_DIR={self.folder!r}: {shown(url)} cannot be kept there ({error.strerror or error}). "
            "Name a folder with more room, or lower config.DATA.STREAM.CACHE_GB."
        )

    def make_room(self, size: int, *, besides: str = "") -> None:
        """Remove shards until `size` more bytes fit: those first that a run is done with, then by time of last use."""
        with self.lock("room"):
            kept = _files_of_shards(self.folder)
            total = size + sum(occupied for _, occupied, path in kept if path != besides)
            for used, occupied, path in sorted(kept):
                if total <= self.limit:
                    return
                is_being_written = path.endswith(".part") and used > time.time() - _ABANDONED_S
                if path != besides and not is_being_written:
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                    total -= occupied


def _files_of_shards(folder: str) -> list[tuple[float, int, str]]:
    """(time of last use, bytes, path) of fetched shards and unfinished ones."""
    found = []
    for entry in os.scandir(folder):
        if entry.name.endswith((".tar", ".part")):
            with contextlib.suppress(OSError):
                found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
    return found


def _key(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def _is_released(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(".tar") and entry.stat().st_mtime == 0


@dataclass(frozen=True)
class Remote:
    """A shard behind a URL whose content is known: enough to have it here. Sent to worker processes."""

    url: str
    size: int
    digest: str
    cache: Cache

    @property
    def file(self) -> str:
        """Where it lies once it is here."""
        return self.cache.content_file(self.url, self.digest)

    def open(self) -> int:
        """A file descriptor of the content, fetched if it is not here. Raises DataError."""
        if _ahead is not None:
            _ahead.forget(self)
        for _ in range(_TRIES):
            self.bring()
            with contextlib.suppress(FileNotFoundError):  # evicted in between
                return os.open(self.file, os.O_RDONLY)
        raise DataError(
            f"config.DATA.STREAM.CACHE_GB: shards are removed from {self.cache.folder} faster than they are read, since "
            "several runs share it. Raise the limit, or give each run a config.DATA.STREAM.CACHE_DIR of its own."
        )

    def bring(self, *, wait: bool = True) -> None:
        """Fetch it if it is not here; with wait=False leave it to another process that is at it."""
        if self._touch():
            return
        with self.cache.lock(self.url, wait=wait) as is_mine:
            if is_mine and not self._touch():
                self.cache.fetch(self.url, check=self._refuse_other)

    def _refuse_other(self, stream: IO[bytes], digest: str) -> None:
        if digest != self.digest:
            raise DataError(
                f"{shown(self.url)}: is not what it was when its samples were listed, so their number and place are no "
                f"longer known. Remove {self.cache.index_pattern(self.url)} and, if there is one, the .index beside the shard, "
                "then start the same command again."
            )

    def _touch(self) -> bool:
        try:
            if os.stat(self.file).st_size == self.size:
                os.utime(self.file)
                return True
        except OSError:
            pass
        return False

    def release(self) -> None:
        """This run needs it no more for now: it is the first to make place."""
        with contextlib.suppress(OSError):
            os.utime(self.file, (0, 0))


# ------------------------------------------------------------------------------------------ ahead of use
_FETCHERS = 4


class _Ahead:
    """Threads of this process that fetch what will be needed soon."""

    def __init__(self) -> None:
        self.pid, self._wanted = os.getpid(), queue.SimpleQueue[Remote]()
        self._waiting: set[str] = set()
        for _ in range(_FETCHERS):
            threading.Thread(target=self._work, daemon=True).start()

    def want(self, remote: Remote) -> None:
        """Fetch it when there is time."""
        self._waiting.add(remote.url)
        self._wanted.put(remote)

    def forget(self, remote: Remote) -> None:
        """Its reader is there already. If it were fetched after the reader is done with it, it would be for nothing."""
        self._waiting.discard(remote.url)

    def _work(self) -> None:
        while True:
            remote = self._wanted.get()
            if remote.url not in self._waiting:
                continue
            self.forget(remote)
            # Whoever reads the shard meets the same fault once more, and reports it.
            with contextlib.suppress(DataError, OSError):
                remote.bring(wait=False)


_ahead: _Ahead | None = None


def fetch_ahead(shards: Iterable[Remote]) -> None:
    """Begin to fetch these shards, in this order, while the caller goes on."""
    global _ahead
    for remote in shards:
        if _ahead is None or _ahead.pid != os.getpid():  # threads do not survive a fork
            _ahead = _Ahead()
        _ahead.want(remote)


def writable(folder: str) -> str:
    """The absolute folder for a cache. Raises DataError if nothing can be written there."""
    path = os.path.abspath(os.path.expanduser(folder or default_folder()))
    try:
        Path(path).mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "no right to write there")
    except OSError as error:
        raise DataError(
            f"config.DATA.STREAM.CACHE_DIR={folder!r}: {path} cannot be used ({error.strerror}). Name another folder."
        ) from error
    return path
