"""Tar shards of the webdataset convention as a source: local files read in place, others fetched whole to a cache.

A list of what lies where (shard_index.py) makes any row of any shard readable by itself. So counts are exact, and the
order of an epoch and the place where it goes on are functions of seed, epoch and step, as with any other source.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import io
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from PIL import Image

from vissl_like.config.schema_data import Stream
from vissl_like.core import distributed
from vissl_like.data import fetch, shard_names
from vissl_like.data.decode import read_image
from vissl_like.data.shard_cache import Cache, Remote, writable
from vissl_like.data.shard_index import Index, Members, parse_index, read_index, scan, stamp_of, write_index
from vissl_like.data.shard_names import is_url, shown
from vissl_like.data.sharding import Sharding
from vissl_like.data.source import SourceRequest, unicode_array
from vissl_like.errors import ConfigError, DataError

_log = logging.getLogger(__name__)
#: A file changed this recently could change again without a new time (coarse clocks), so its list is not kept.
_SETTLED_S = 3.0
_REPORT_EVERY_S = 10.0
_CONNECTIONS = 4
_OPEN_FILES = 64


@dataclass(frozen=True)
class Shard:
    """One shard: its file or URL, what it holds, and how to have it here if it is not a local file."""

    place: str
    index: Index
    remote: Remote | None = None

    def open(self) -> int:
        """A file descriptor of its content. Raises DataError if it is gone or was changed since it was listed."""
        if self.remote is not None:
            return self.remote.open()
        try:
            found = os.open(self.place, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.place}: this shard cannot be opened any more ({error.strerror}).") from error
        if stamp_of(os.fstat(found)) != self.index.facts.stamp:
            os.close(found)
            raise DataError(
                f"{self.place}: this shard changed while the run was reading. Start the same command again."
            )
        return found


class ShardSource:
    """Samples of tar shards (webdataset): a folder of them, files, patterns or URLs, in the order of names and files.

    A row's identity is the path that its JSON member tells, where all of them tell different ones (`data shrink` writes
    that of the original image), else shard/member. Classes come from .cls or .json members, their names from shards.json.
    """

    root = ""

    def __init__(self, shards: Sequence[Shard], *, name: str, window: int, class_names: list[str] | None) -> None:
        self.name, self._shards, self._window = name, list(shards), window
        self._starts = np.cumsum([0, *(len(shard.index) for shard in shards)])
        self._short = shard_names.short_names([shard.place for shard in shards])
        self.labels, self.class_names = _labels_of(self._shards, class_names)
        self._uses_paths = _tell_paths(self._shards)
        self._open: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def build(cls, request: SourceRequest) -> ShardSource:
        key = f"{request.key('DATA_PATHS')}.{request.position}"
        places = shard_names.shards_of(request.path, key=key)
        cache = _cache_of(places, request.stream)
        shards = open_shards(places, cache=cache, members=_members_of(request.stream))
        about = _about(places, cache.patience)
        _check(shards, about, key=key)
        window = _window_of(shards, request.stream)
        return cls(shards, name=request.name or "webdataset", window=window, class_names=about.class_names)

    def __getstate__(self) -> dict[str, Any]:
        # Files are opened by each process itself; labels go with the dataset.
        return {**self.__dict__, "_open": OrderedDict(), "labels": None}

    def __del__(self) -> None:
        for number in list(getattr(self, "_open", ())):
            self._close(number)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, row: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return number, row - int(self._starts[number])

    @property
    def paths(self) -> np.ndarray:
        return unicode_array(self.path(row) for row in range(len(self)))

    def path(self, row: int) -> str:
        number, inner = self._locate(row)
        index = self._shards[number].index
        return index.path(inner) if self._uses_paths else f"{self._short[number]}/{index.name(inner)}"

    def file(self, row: int) -> str:
        """Shard and member: what is opened, and the identity among several sources."""
        number, inner = self._locate(row)
        shard = self._shards[number]
        return f"{shown(shard.place)}/{shard.index.name(inner)}"

    def stamps(self) -> np.ndarray:
        return np.concatenate([shard.index.sizes for shard in self._shards]).astype(np.int64)

    @property
    def sharding(self) -> Sharding:
        """How rows lie in shards."""
        shard_of = np.repeat(np.arange(len(self._shards), dtype=np.int32), np.diff(self._starts))
        return Sharding(shard_of, tuple(shard.remote for shard in self._shards), self._window)

    # ---------------------------------------------------------------------------------------- reading
    def load(self, row: int) -> Image.Image:
        return read_image(io.BytesIO(self.read(row)))

    def read(self, row: int) -> bytes:
        number, inner = self._locate(row)
        shard = self._shards[number]
        offset, size = shard.index.place(inner)
        try:
            descriptor = self._descriptor(number)
            data = _read_at(descriptor, offset, size)
            end = os.fstat(descriptor).st_size if len(data) < size else 0
        except OSError as error:
            raise DataError(f"{shown(shard.place)}: cannot be read at byte {offset} ({error.strerror}).") from error
        if len(data) < size:
            raise DataError(
                f"{shown(shard.place)}: ends at byte {end}, before or within {shard.index.name(inner)!r}: it was cut "
                "off while the run was reading. Copy or write this shard again, then start the same command."
            )
        return data

    def _descriptor(self, number: int) -> int:
        found = self._open.get(number)
        if found is not None:
            self._open.move_to_end(number)
            return found
        # An evicted shard takes room as long as it is open, so fetched ones are closed sooner.
        most = _OPEN_FILES if self._shards[number].remote is None else max(2, self._window)
        while len(self._open) >= most:
            self._close(next(iter(self._open)))
        self._open[number] = self._shards[number].open()
        return self._open[number]

    def _close(self, number: int) -> None:
        with contextlib.suppress(OSError):
            os.close(self._open.pop(number))


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size:  # one call gives at most 2 GB, and less over some networks
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


# ------------------------------------------------------------------------------------------- opening
def _members_of(stream: Stream) -> Members:
    return Members(stream.IMAGE_MEMBER, stream.LABEL_MEMBER)


def _cache_of(places: Sequence[str], stream: Stream) -> Cache:
    """The cache folder. Local shards can do without one (a home that is read-only): then nothing is kept."""
    patience = fetch.Patience(stream.RETRIES, stream.TIMEOUT_S)
    try:
        folder = writable(stream.CACHE_DIR)
    except DataError:
        if stream.CACHE_DIR or any(map(is_url, places)):
            raise
        folder = ""
    return Cache(folder, int(stream.CACHE_GB * 1e9), patience)


def open_shards(places: Sequence[str], *, cache: Cache, members: Members) -> list[Shard]:
    """The shards with the lists of their samples, which are made where they are not kept already.

    Processes of one machine begin at different places and leave to each other what one of them is at.
    """
    if cache.folder:
        cache.forget_unused()
    here, count = distributed.current(), len(places)
    begin = count * here.local_rank // max(1, here.local_size)
    opener = _Opener(cache, members, count)
    found: dict[str, Shard] = {}
    for wait in (False, True):
        todo = [places[(begin + k) % count] for k in range(count)]
        todo = [place for place in todo if place not in found]
        found.update(opener.open_all(todo, wait=wait))
    return [found[place] for place in places]


class _Opener:
    """Opens shards, several URLs at once, and says now and then how far it is."""

    def __init__(self, cache: Cache, members: Members, count: int) -> None:
        self._cache, self._members, self._count = cache, members, count
        self._done, self._said = 0, time.monotonic()

    def open_all(self, places: Sequence[str], *, wait: bool) -> dict[str, Shard]:
        """The shards; without `wait` only those that no other process is at."""
        found: dict[str, Shard] = {}
        with concurrent.futures.ThreadPoolExecutor(_CONNECTIONS) as pool:
            calls = [pool.submit(self._remote, place, wait) for place in places if is_url(place)]
            try:
                opened = [self._local(place, wait) for place in places if not is_url(place)]
                for shard in (*opened, *(call.result() for call in calls)):
                    if shard is not None:
                        found[shard.place] = shard
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _local(self, place: str, wait: bool) -> Shard | None:
        began, stamp = time.time(), stamp_of(os.stat(place))
        is_settled = max(stamp["mtime"], stamp["ctime"]) / 1e9 < began - _SETTLED_S
        if not self._cache.folder or not is_settled:
            return Shard(place, self._scan_file(place, stamp))
        index = self._kept(place, stamp)
        if index is None:
            with self._cache.lock(place, wait=wait) as is_mine:
                if not is_mine:
                    return None
                index = self._kept(place, stamp) or self._keep(place, self._scan_file(place, stamp))
        return Shard(place, index)

    def _remote(self, url: str, wait: bool) -> Shard | None:
        stamp = fetch.state_of(url, patience=self._cache.patience)
        index = self._kept(url, stamp)
        if index is None:
            with self._cache.lock(url, wait=wait) as is_mine:
                if not is_mine:
                    return None
                index = self._kept(url, stamp)
                if index is None:
                    found = self._published(url, stamp)
                    if found is None:
                        found = self._cache.fetch(url, check=functools.partial(self._scan, url, stamp))
                    index = self._keep(url, found)
        return Shard(url, index, Remote(url, index.facts.size, index.facts.digest, self._cache))

    def _published(self, url: str, stamp: dict[str, Any]) -> Index | None:
        """The index beside a shard, where there is one that fits; then the shard itself is fetched when it is needed."""
        place = shard_names.index_place(url)
        content = fetch.read_small(place, patience=self._cache.patience) if place else None
        index = parse_index(content, members=self._members) if content else None
        if index is None or not index.facts.digest or index.facts.size != stamp.get("size", index.facts.size):
            return None
        return index.known_by(stamp)

    def _scan_file(self, place: str, stamp: dict[str, Any]) -> Index:
        with open(place, "rb") as stream:
            return self._scan(place, stamp, stream)

    def _scan(self, place: str, stamp: dict[str, Any], stream: IO[bytes], digest: str = "") -> Index:
        self._done += 1
        if time.monotonic() - self._said > _REPORT_EVERY_S:
            self._said = time.monotonic()
            _log.info("listed the samples of %d shards (of %d); now %s", self._done - 1, self._count, shown(place))
        return scan(stream, shown=shown(place), members=self._members, stamp=stamp, digest=digest)

    def _index_file(self, place: str) -> str:
        return self._cache.index_file(place, variant=repr(self._members))

    def _kept(self, place: str, stamp: dict[str, Any]) -> Index | None:
        return read_index(self._index_file(place), members=self._members, stamp=stamp)

    def _keep(self, place: str, index: Index) -> Index:
        try:
            return write_index(index, self._index_file(place), members=self._members)
        except OSError as error:
            if not is_url(place):
                return index
            raise DataError(
                f"config.DATA.STREAM.CACHE_DIR={self._cache.folder!r}: the list of a shard's samples cannot be kept there "
                f"({error.strerror}). Name a folder with more room."
            ) from error


def _about(places: Sequence[str], patience: fetch.Patience) -> shard_names.About:
    """What the shards.json beside the shards says, if there is one."""
    beside = dict.fromkeys(shard_names.about_place(place) for place in places)
    found: list[shard_names.About] = []
    for place in beside:
        text = _read_if_there(place, patience)
        if text is not None:
            found.append(shard_names.parse_about(text, where=shown(place)))
    if len(beside) == 1 and found:
        return found[0]
    names = {tuple(about.class_names or ()) for about in found}
    return shard_names.About(found[0].class_names if len(found) == len(beside) and len(names) == 1 else None)


def _read_if_there(place: str, patience: fetch.Patience) -> bytes | None:
    if is_url(place):
        return fetch.read_small(place, patience=patience)
    if not os.path.isfile(place):
        return None
    with open(place, "rb") as stream:
        return stream.read()


def shard_classes(request: SourceRequest) -> list[str] | None:
    """The class names that ShardSource finds, where shards.json tells them without listing any shard."""
    places = shard_names.shards_of(request.path, key=f"{request.key('DATA_PATHS')}.{request.position}")
    told = _about(places, _cache_of(places, request.stream).patience).class_names
    return ShardSource.build(request).class_names if told is None else told


# ------------------------------------------------------------------------------------------- checking
def _check(shards: Sequence[Shard], about: shard_names.About, *, key: str) -> None:
    """Refuse shards without images, or other ones than shards.json tells; say what is left out."""
    without = sum(shard.index.facts.without_image for shard in shards)
    first = next((shard for shard in shards if shard.index.facts.without_image), None)
    example = f"{first.index.facts.first_without!r} in {shown(first.place)}" if first else ""
    if not sum(len(shard.index) for shard in shards):
        what = f"{without} samples, but none has an image, for example {example}" if without else "no samples"
        names = shown(shards[0].place) + (f" and {len(shards) - 1} more" if len(shards) > 1 else "")
        raise DataError(f"{key}: {names}: {what}. config.DATA.STREAM.IMAGE_MEMBER names the member.")
    if without:
        _log.warning("%s: %d samples have no image and are left out, for example %s.", key, without, example)
    for shard in shards:
        told = about.images.get(os.path.basename(shown(shard.place)))
        if told is not None and told != len(shard.index):
            raise DataError(
                f"{shown(shard.place)}: holds {len(shard.index)} images, but {shard_names.ABOUT_FILE} beside it tells of "
                f"{told}. Copy or write this shard again."
            )
    _refuse_missing(shards, about)


def _refuse_missing(shards: Sequence[Shard], about: shard_names.About) -> None:
    """A whole folder is meant where no pattern chose some of its shards; braces may choose."""
    names = {os.path.basename(shown(shard.place)) for shard in shards}
    missing = [name for name in about.images if name not in names]
    if missing and not any(is_url(shard.place) for shard in shards):
        folder = os.path.dirname(shards[0].place)
        lost = [name for name in missing if not os.path.exists(os.path.join(folder, name))]
        if lost:
            raise DataError(
                f"{os.path.join(folder, lost[0])}: no such shard, but {shard_names.ABOUT_FILE} beside it tells of it "
                f"({len(lost)} of {len(about.images)} are missing). Copy the rest, or write the shards again."
            )


def _window_of(shards: Sequence[Shard], stream: Stream) -> int:
    """Shards mixed at a time; 0: the images of all."""
    sizes = sorted((shard.remote.size for shard in shards if shard.remote is not None), reverse=True)
    by_shard = bool(sizes) if stream.SHUFFLE == "auto" else stream.SHUFFLE == "shards"
    window = stream.SHUFFLE_SHARDS if by_shard else 0
    needed = sum(sizes[: 2 * window] if by_shard else sizes)
    if needed > stream.CACHE_GB * 1e9:
        kind = f"two times SHUFFLE_SHARDS={window} shards" if by_shard else "all shards (SHUFFLE=images)"
        cure = "lower SHUFFLE_SHARDS or raise the limit" if by_shard else "raise the limit, or set SHUFFLE=shards"
        raise ConfigError(
            f"config.DATA.STREAM.CACHE_GB={stream.CACHE_GB:g}: {kind} take {needed / 1e9:.3g} GB, and less room would have "
            f"them fetched again and again; {cure}."
        )
    return window


def _tell_paths(shards: Sequence[Shard]) -> bool:
    """Whether the JSON members tell a path for every image, all different."""
    if not all(shard.index.facts.has_paths for shard in shards if len(shard.index)):
        return False
    hashes = np.concatenate([shard.index.path_hashes for shard in shards])
    return len(np.unique(hashes)) == len(hashes)


def _labels_of(shards: Sequence[Shard], class_names: list[str] | None) -> tuple[np.ndarray | None, list[str] | None]:
    """Class of each row, int64 (N,), and names of the classes, where there are any."""
    texts = any(shard.index.facts.label_names is not None for shard in shards)
    if texts:
        return _named_labels(shards)
    labels = np.concatenate([shard.index.labels for shard in shards])
    without = int((labels < 0).sum())
    if without == len(labels):
        return None, None
    if without:
        row = int(np.flatnonzero(labels < 0)[0])
        _log.warning("%d of %d samples have no class; the first is number %d.", without, len(labels), row)
    if class_names is not None and labels.max() >= len(class_names):
        raise DataError(
            f"{shown(shards[0].place)}: classes go up to {labels.max()}, but {shard_names.ABOUT_FILE} beside the shards "
            f"names {len(class_names)}. They do not belong together; take {shard_names.ABOUT_FILE} away, or mend it."
        )
    return labels, class_names


def _named_labels(shards: Sequence[Shard]) -> tuple[np.ndarray, list[str]]:
    """Classes that are names in some shard are names in all."""

    found: list[tuple[list[str | None], np.ndarray]] = []
    for shard in shards:
        names, (used, places) = shard.index.facts.label_names, np.unique(shard.index.labels, return_inverse=True)
        texts = [None if k < 0 else str(k) if names is None else names[k] for k in used.tolist()]
        found.append((texts, places))
    known = sorted({text for texts, _ in found for text in texts if text is not None})
    number: dict[str | None, int] = {None: -1, **{name: k for k, name in enumerate(known)}}
    parts = [np.array([number[text] for text in texts], dtype=np.int64)[places] for texts, places in found]
    return np.concatenate(parts), known
