"""Extracted features on disk: memory-mapped shards with a manifest, written block by block, by several processes.

Layout of a split's folder: `<layer>/shard_00000.npy ...` with a checksum per row in `<layer>/sums.npy`, `images.npy`
(paths), `sizes.npy` (stamps of the images), `labels.npy` (where the data set has labels) and, once all is there,
`manifest.json`. Row k is row k of the data set. While it grows, `partial.json` takes the manifest's place and `done.npy`
has one byte per finished block, so that an interrupted extraction goes on where it stopped. Nothing is used that is not
what was written: shards are checked for their size when they are opened, rows for their checksum when they are first read.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vissl_like.analysis.npy_file import NpyFile, OpenArrays, create_array
from vissl_like.analysis.rows import as_float32, as_stored, spans
from vissl_like.analysis.shards import array_problem, lost_blocks, lost_files, row_sums, sums_file
from vissl_like.errors import DataError
from vissl_like.files import damage, read_json, record_of, refusals_explained, write_array, write_json
from vissl_like.registry import suggest

MANIFEST = "manifest.json"
_PARTIAL = "partial.json"
_DONE = "done.npy"
_INVALID = "invalid.npy"
_ARRAYS = ("images.npy", "sizes.npy", "labels.npy")
# Finished blocks are forced to the disk and then marked at this interval, or after so many bytes; a crash loses at most
# twice so much work.
_MARK_EVERY_S = 10.0
_FLUSH_BYTES = 64 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """Whose features these are. The identity says what must be equal for two extractions to be the same."""

    split: str
    paths: np.ndarray  # unicode (n,)
    stamps: np.ndarray  # int64 (n,), as the source gives them
    labels: np.ndarray | None  # (n,) or (n, C)
    root: str
    name: str
    fingerprint: str
    class_names: list[str] | None
    identity: dict[str, Any]


class FeatureWriter:
    """Writes blocks of rows into shards. prepare() once, on the main process; then one writer per process; then finish()."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        state = read_json(folder / _PARTIAL)
        if state is None:
            raise DataError(f"{folder / _PARTIAL}: missing; was the folder changed during extraction? Extract again.")
        self.state = state
        self.blocks = spans(self.state["rows"], self.state["block_rows"])
        self._files = OpenArrays(folder)
        self._written: list[int] = []
        self._flushed_at = time.monotonic()
        self._flushing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="features")

    @staticmethod
    def prepare(
        folder: Path,
        subject: Subject,
        *,
        layers: Mapping[str, tuple[int, ...]],
        dtype: str,
        shard_rows: int,
        block_rows: int,
        overwrite: bool = False,
    ) -> bool:
        """Make the folder ready for writers; returns False if the very same extraction is already complete there.

        Finished blocks of an interrupted one are kept, except where their files are missing or cut off; rows are compared
        with their checksums when they are read, not here. What belongs to another extraction is an error unless
        `overwrite`. A block is a batch of the model, which may decide about the last bit of a feature: a complete extraction
        is taken with the blocks that it has, an interrupted one goes on with them.
        """
        with refusals_explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        wanted = _plan(subject, layers=layers, dtype=dtype, shard_rows=shard_rows, block_rows=block_rows)
        found = read_json(folder / MANIFEST) or read_json(folder / _PARTIAL)
        if found is not None and found.get("complete") and found.get("block_rows") != block_rows:
            wanted["block_rows"] = int(found["block_rows"])
        if found is not None and (different := _differences(found, wanted, folder)):
            if not overwrite:
                raise DataError(_refusal(folder, found, different))
            _remove(folder, found)
            found = None
        is_complete = bool(found and found.get("complete"))
        done = _finished_blocks(folder, wanted, complete=is_complete)
        arrays = _damaged_arrays(folder, found or {}) if is_complete else []
        lost = lost_files(folder, wanted)
        done[lost_blocks(folder, wanted, lost=lost, suspects=arrays)] = 0
        if is_complete and done.all() and not arrays:
            _remove_marks(folder)
            return False
        _write_arrays(folder, subject)
        write_array(folder / _DONE, done)
        if not (folder / _INVALID).exists():
            invalid = np.zeros(wanted["rows"], dtype=np.uint8)
            invalid[(found or {}).get("bad_rows", [])] = 1
            write_array(folder / _INVALID, invalid)
        write_json(folder / _PARTIAL, wanted)
        (folder / MANIFEST).unlink(missing_ok=True)
        for name, form in lost.items():  # only now: zeros are never there while something says that they are features
            create_array(folder / name, **form)
        if done.any():
            logger.info("%s: %d of %d blocks of rows are there already", folder, int(done.sum()), len(done))
        return True

    def pending(self) -> list[int]:
        """Numbers of the blocks that are not written yet."""
        return np.flatnonzero(np.load(self.folder / _DONE, allow_pickle=False) == 0).tolist()

    def write(self, block: int, features: Mapping[str, np.ndarray], *, valid: np.ndarray | None = None) -> None:
        """Write one block: {layer: (b, ...)}. Rows that are not `valid` (b,) stand for unreadable images."""
        (start, stop), shard_rows = self.blocks[block], self.state["shard_rows"]
        for name, layer in self.state["layers"].items():
            array = self._stored(name, layer, features[name], start=start, stop=stop)
            self._files.put(self.folder / sums_file(layer), row_sums(array), row=start)
            for shard in range(start // shard_rows, -(-stop // shard_rows)):
                low = shard * shard_rows
                first, last = max(start, low), min(stop, low + shard_rows)
                self._files.put(
                    self.folder / layer["shards"][shard], array[first - start : last - start], row=first - low
                )
        if valid is not None:
            self._files.put(self.folder / _INVALID, (~valid).astype(np.uint8), row=start)
        self._written.append(block)
        if self._files.num_bytes > _FLUSH_BYTES or time.monotonic() - self._flushed_at > _MARK_EVERY_S:
            self._begin_flush()

    def _stored(self, name: str, layer: dict[str, Any], array: np.ndarray, *, start: int, stop: int) -> np.ndarray:
        if tuple(array.shape) != (stop - start, *layer["shape"]):
            raise DataError(
                f"layer {name!r}: features of rows {start}..{stop - 1} have shape {tuple(array.shape)}, but the first image's "
                f"have {tuple(layer['shape'])}. All images must have one size: add Resize and CenterCrop to the TRANSFORMS."
            )
        stored, is_finite = as_stored(array, layer["dtype"])
        if not is_finite:
            row = start + int(np.flatnonzero(~np.isfinite(stored).reshape(len(stored), -1).all(axis=1))[0])
            cure = (
                "They overflow float16: set EXTRACT_FEATURES.DTYPE=float32."
                if np.isfinite(array).all()
                else "Look at the weights of the model and at that image."
            )
            raise DataError(f"layer {name!r}: the features of row {row} hold NaN or infinity. {cure}")
        return stored

    def flush(self) -> None:
        """Force what was written to the disk, then mark its blocks as done."""
        self._begin_flush()
        self._end_flush()

    def close(self) -> None:
        """Flush and close; on every process, before finish()."""
        try:
            self.flush()
        finally:
            self._thread.shutdown()

    def _begin_flush(self) -> None:
        """Let a thread do it, while the next blocks are made and written. What went wrong in it before is raised now."""
        self._end_flush()
        files, blocks = self._files, self._written
        self._files, self._written = OpenArrays(self.folder), []
        self._flushed_at = time.monotonic()
        self._flushing = self._thread.submit(self._force, files, blocks)

    def _end_flush(self) -> None:
        flushing, self._flushing = self._flushing, None
        if flushing is not None:
            flushing.result()

    def _force(self, files: OpenArrays, blocks: list[int]) -> None:
        files.force()
        for block in blocks:
            files.put(self.folder / _DONE, np.ones(1, dtype=np.uint8), row=block)
        files.force()

    @staticmethod
    def finish(folder: Path) -> dict[str, Any]:
        """Publish the manifest once all blocks are there; on the main process, after all writers are closed."""
        state = read_json(folder / _PARTIAL)
        if state is None:
            raise DataError(f"{folder / _PARTIAL}: missing; was the folder changed during extraction? Extract again.")
        missing = np.flatnonzero(np.load(folder / _DONE, allow_pickle=False) == 0)
        if len(missing):
            raise DataError(
                f"{folder}: {len(missing)} blocks of rows were not written. Extract again; the others are kept."
            )
        bad = np.flatnonzero(np.load(folder / _INVALID, allow_pickle=False))
        files = [folder / name for name in _ARRAYS] + [folder / sums_file(layer) for layer in state["layers"].values()]
        records = {file.relative_to(folder).as_posix(): record_of(file) for file in files if file.exists()}
        manifest = {**state, "bad_rows": bad.tolist(), "files": records, "complete": True}
        write_json(folder / MANIFEST, manifest)
        _remove_marks(folder)
        return manifest


def layer_folder(name: str) -> str:
    """A folder name for a layer: its name with other characters than letters, digits, `.`, `-` and `_` replaced."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".") or "layer"


def _plan(
    subject: Subject, *, layers: Mapping[str, tuple[int, ...]], dtype: str, shard_rows: int, block_rows: int
) -> dict[str, Any]:
    """The manifest as it will be, without `bad_rows` and `complete`."""
    rows = len(subject.paths)
    count = len(spans(rows, shard_rows))
    described = {
        name: {
            "shape": list(shape),
            "dim": int(np.prod(shape, dtype=np.int64)),
            "dtype": dtype,
            "shards": [f"{layer_folder(name)}/shard_{shard:05d}.npy" for shard in range(count)],
        }
        for name, shape in layers.items()
    }
    return {
        "kind": "features",
        "split": subject.split,
        "rows": rows,
        "layers": described,
        "shard_rows": shard_rows,
        "block_rows": block_rows,
        "dataset": {
            "name": subject.name,
            "root": subject.root,
            "fingerprint": subject.fingerprint,
            "class_names": subject.class_names,
        },
        "identity": subject.identity,
    }


def _differences(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> list[str]:
    """Names of what is not equal in two manifests."""
    names = [key for key in ("split", "rows", "layers", "shard_rows") if found.get(key) != wanted[key]]
    if found.get("block_rows") != wanted["block_rows"] and _has_begun(folder):
        names.append("block_rows")
    if found.get("dataset", {}).get("fingerprint") != wanted["dataset"]["fingerprint"]:
        names.append("dataset")
    before, now = found.get("identity", {}), wanted["identity"]
    return names + sorted(key for key in {*before, *now} if before.get(key) != now.get(key))


def _has_begun(folder: Path) -> bool:
    """Whether some block of an interrupted extraction is marked as done."""
    try:
        return bool(np.load(folder / _DONE, allow_pickle=False).any())
    except (OSError, ValueError, EOFError):
        return False


def _refusal(folder: Path, found: dict[str, Any], different: list[str]) -> str:
    if different == ["block_rows"]:
        return (
            f"{folder}: holds an interrupted extraction in batches of {found['block_rows']} images. Set "
            f"config.DATA.{found['split']}.BATCHSIZE_PER_REPLICA={found['block_rows']} to go on with it, or "
            "RUN.OVERWRITE=true to extract anew."
        )
    return (
        f"{folder}: holds features of another extraction; different: {', '.join(different)}. Choose another "
        "EXTRACT_FEATURES.OUTPUT_DIR or RUN.DIR, or set RUN.OVERWRITE=true to extract anew."
    )


def _finished_blocks(folder: Path, wanted: dict[str, Any], *, complete: bool) -> np.ndarray:
    """One byte per block, 1 where it was written before."""
    count = len(spans(wanted["rows"], wanted["block_rows"]))
    if complete:
        return np.ones(count, dtype=np.uint8)
    try:
        done = np.load(folder / _DONE, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        done = np.zeros(count, dtype=np.uint8)
    same = done.shape == (count,) and (folder / _PARTIAL).exists() and (folder / _INVALID).exists()
    return np.array(done) if same else np.zeros(count, dtype=np.uint8)


def _damaged_arrays(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Names of the small files that are not as a finished extraction left them."""
    records = manifest.get("files") or {MANIFEST: {}}
    return [name for name, record in records.items() if damage(folder / name, record)]


def _remove_marks(folder: Path) -> None:
    """What only an extraction that is going on needs."""
    for name in (_PARTIAL, _DONE, _INVALID):
        (folder / name).unlink(missing_ok=True)


def _remove(folder: Path, found: dict[str, Any]) -> None:
    """Take away what an earlier extraction wrote here, and nothing else."""
    (folder / MANIFEST).unlink(missing_ok=True)
    _remove_marks(folder)
    for layer in found.get("layers", {}):
        shutil.rmtree(folder / layer_folder(layer), ignore_errors=True)
    for name in _ARRAYS:
        (folder / name).unlink(missing_ok=True)


def _write_arrays(folder: Path, subject: Subject) -> None:
    write_array(folder / "images.npy", subject.paths)
    write_array(folder / "sizes.npy", subject.stamps)
    if subject.labels is not None:
        write_array(folder / "labels.npy", subject.labels)


class FeatureStore:
    """Finished features of one layer and split, read from the files in float32 rows (n, dim); maps are flattened."""

    def __init__(self, folder: Path, manifest: dict[str, Any], layer: str) -> None:
        self.folder, self.manifest, self.layer = folder, manifest, layer
        described = manifest["layers"][layer]
        self.rows, self.dim = int(manifest["rows"]), int(described["dim"])
        self.shape, self.dtype = tuple(described["shape"]), described["dtype"]
        self.shard_rows = int(manifest["shard_rows"])
        self._shards = [self._map(file, number) for number, file in enumerate(described["shards"])]
        self._sums = NpyFile(self._whole(sums_file(described)))
        self._is_checked = np.zeros(self.rows, dtype=bool)

    @classmethod
    def open(cls, folder: Path, split: str, layer: str = "") -> FeatureStore:
        """The features below `folder`. Raises DataError for missing, unfinished or damaged ones. "" is the only layer."""
        manifest = read_manifest(folder, split)
        layers = list(manifest["layers"])
        if not layer and len(layers) == 1:
            layer = layers[0]
        if layer not in layers:
            what = f"has no such layer{suggest(layer, layers) or '.'}" if layer else "has several layers; name one."
            raise DataError(
                f"config.CLUSTERFIT.FEATURES.LAYER_NAME={layer!r}: {folder / split} {what} Extracted: {', '.join(layers)}."
            )
        store = cls(folder / split, manifest, layer)
        store.refuse_incomplete()
        return store

    def refuse_incomplete(self) -> None:
        """Raise DataError if a small file is missing or cut off: they are read last, after the long work."""
        for name in self.manifest.get("files", {}):
            self._whole(name, with_content=False)

    def _map(self, file: str, number: int) -> NpyFile:
        start = number * self.shard_rows
        shape = (min(self.shard_rows, self.rows - start), *self.shape)
        problem = array_problem(self.folder / file, shape=shape, dtype=self.dtype)
        if problem:
            raise DataError(
                f"{self.folder / file}: {problem}. Run the extraction again with the same configuration; "
                "it makes only what is missing."
            )
        return NpyFile(self.folder / file)

    def _array(self, name: str, *, mmap: bool = False) -> np.ndarray:
        return np.load(self._whole(name), mmap_mode="r" if mmap else None, allow_pickle=False)

    def _whole(self, name: str, *, with_content: bool = True) -> Path:
        """A file beside the shards, if it is as the extraction left it (or at least has its size)."""
        file = self.folder / name
        problem = damage(file, self.manifest.get("files", {}).get(name, {}), with_content=with_content)
        if problem:
            raise DataError(
                f"{file}: {problem}. Remove it and run the extraction again with the same configuration; it makes only what "
                "is missing."
            )
        return file

    def _check(self, stored: np.ndarray, rows: np.ndarray) -> None:
        """Raise DataError if these rows (b, ...), as stored, do not have their checksums; each row is checked once."""
        if self._is_checked[rows].all():
            return
        changed = rows[row_sums(stored) != self._sums.take(rows)]
        if len(changed):
            shard = self.folder / self.manifest["layers"][self.layer]["shards"][int(changed[0]) // self.shard_rows]
            raise DataError(
                f"{shard}: {len(changed)} of {len(rows)} rows, the first is row {int(changed[0])} of {self.manifest['split']}, "
                "are not what was written (another checksum). Remove this file and run the extraction again with the same "
                "configuration; it makes only what is missing."
            )
        self._is_checked[rows] = True

    def __len__(self) -> int:
        return self.rows

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop as float32 (stop - start, dim)."""
        result = np.empty((stop - start, self.dim), dtype=np.float32)
        for number in range(start // self.shard_rows, -(-stop // self.shard_rows)):
            low = number * self.shard_rows
            first, last = max(start, low), min(stop, low + self.shard_rows)
            part = self._shards[number].read(first - low, last - low)
            self._check(part, np.arange(first, last))
            result[first - start : last - start] = as_float32(part.reshape(last - first, self.dim))
        return result

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The rows of these ascending indices as float32 (len(indices), dim)."""
        result = np.empty((len(indices), self.dim), dtype=np.float32)
        numbers = indices // self.shard_rows
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            part = self._shards[number].take(indices[here] - number * self.shard_rows)
            self._check(part, indices[here])
            result[here] = as_float32(part.reshape(len(here), self.dim))
        return result

    @property
    def paths(self) -> np.ndarray:
        """Identity of each row, unicode (n,), mapped."""
        return self._array("images.npy", mmap=True)

    @property
    def stamps(self) -> np.ndarray:
        """Stamps of the images when they were read, int64 (n,), mapped."""
        return self._array("sizes.npy", mmap=True)

    @property
    def labels(self) -> np.ndarray | None:
        """The data set's labels, (n,) or (n, C), or None. Rows of unreadable images have -1."""
        if "labels.npy" not in self.manifest.get("files", {}):
            return None
        labels = self._array("labels.npy")
        labels[self.manifest["bad_rows"]] = -1
        return labels

    @property
    def fingerprint(self) -> str:
        """Of the images that these features belong to."""
        return str(self.manifest["dataset"]["fingerprint"])


def read_manifest(folder: Path, split: str, *, key: str = "CLUSTERFIT.FEATURES.PATH") -> dict[str, Any]:
    """The manifest of a split's finished features. Raises DataError with the cure."""
    manifest = read_json(folder / split / MANIFEST)
    if manifest is None or manifest.get("kind") != "features":
        if (folder / split / _PARTIAL).exists():
            raise DataError(
                f"{folder / split}: the extraction was interrupted. Run it again with the same configuration to finish it."
            )
        there = ", ".join(sorted(file.parent.name for file in folder.glob(f"*/{MANIFEST}"))) or "none"
        near = next(
            (place for place in (folder / "features", folder.parent) if (place / split / MANIFEST).exists()), None
        )
        cure = (
            f"They are in {str(near)!r}."
            if near
            else "Extract them first (engine extract_features), or correct the path."
        )
        raise DataError(
            f"config.{key}={str(folder)!r}: no extracted features of split {split} there (found: {there}). {cure}"
        )
    return manifest
