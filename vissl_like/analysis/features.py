"""Extracted features on disk: memory-mapped shards with a manifest, written block by block, by several processes.

Layout of a split's folder: `<layer>/shard_00000.npy ...`, `images.npy` (paths), `sizes.npy` (stamps of the images),
`labels.npy` (where the data set has labels) and, once all is there, `manifest.json`. Row k is row k of the data set.
While it grows, `partial.json` takes the manifest's place and `done.npy` has one byte per finished block, so that an
interrupted extraction goes on where it stopped.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vissl_like.analysis.npy_file import NpyFile
from vissl_like.analysis.rows import as_float32, as_stored, spans
from vissl_like.errors import DataError
from vissl_like.registry import suggest

MANIFEST = "manifest.json"
_PARTIAL = "partial.json"
_DONE = "done.npy"
_INVALID = "invalid.npy"
# Finished blocks are forced to the disk and then marked at this interval; a crash loses at most so much work.
_MARK_EVERY_S = 10.0


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
        self.state = json.loads((folder / _PARTIAL).read_text(encoding="utf-8"))
        self.blocks = spans(self.state["rows"], self.state["block_rows"])
        self._files: dict[Path, tuple[int, int]] = {}
        self._written: list[int] = []
        self._marked_at = time.monotonic()

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

        Finished blocks of an interrupted one are kept, except where a shard is missing or damaged. What belongs to another
        extraction is an error unless `overwrite`.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _disk_error(folder, error) from error
        wanted = _plan(subject, layers=layers, dtype=dtype, shard_rows=shard_rows, block_rows=block_rows)
        found = _read_json(folder / MANIFEST) or _read_json(folder / _PARTIAL)
        if found is not None and (different := _differences(found, wanted)):
            if not overwrite:
                raise DataError(
                    f"{folder}: holds features of another extraction; different: {', '.join(different)}. Choose another "
                    "EXTRACT_FEATURES.OUTPUT_DIR or RUN.DIR, or set RUN.OVERWRITE=true to extract anew."
                )
            _remove(folder, found)
            found = None
        done = _finished_blocks(folder, wanted, complete=bool(found and found.get("complete")))
        damaged = _create_shards(folder, wanted)
        for start, stop in damaged:
            done[start // block_rows : -(-stop // block_rows)] = 0
        if found is not None and found.get("complete") and done.all():
            return False
        _write_arrays(folder, subject)
        _save(folder / _DONE, done)
        if not (folder / _INVALID).exists():
            invalid = np.zeros(wanted["rows"], dtype=np.uint8)
            invalid[(found or {}).get("bad_rows", [])] = 1
            _save(folder / _INVALID, invalid)
        _write_json(folder / _PARTIAL, wanted)
        (folder / MANIFEST).unlink(missing_ok=True)
        return True

    def pending(self) -> list[int]:
        """Numbers of the blocks that are not written yet."""
        return np.flatnonzero(np.load(self.folder / _DONE, allow_pickle=False) == 0).tolist()

    def write(self, block: int, features: Mapping[str, np.ndarray], *, valid: np.ndarray | None = None) -> None:
        """Write one block: {layer: (b, ...)}. Rows that are not `valid` (b,) stand for unreadable images."""
        start, stop = self.blocks[block]
        for name, layer in self.state["layers"].items():
            array = self._stored(name, layer, features[name], start=start, stop=stop)
            for shard, (low, high) in enumerate(spans(self.state["rows"], self.state["shard_rows"])):
                first, last = max(start, low), min(stop, high)
                if first < last:
                    self._put(
                        self.folder / layer["shards"][shard], array[first - start : last - start], row=first - low
                    )
        if valid is not None:
            self._put(self.folder / _INVALID, (~valid).astype(np.uint8), row=start)
        self._written.append(block)
        if time.monotonic() - self._marked_at > _MARK_EVERY_S:
            self.flush()

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

    def _put(self, file: Path, array: np.ndarray, *, row: int) -> None:
        """Write rows in place. By pwrite, not through a map: a full disk is then an error and not a bus error."""
        handle, offset = self._open(file)
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
        position = offset + row * (len(data) // len(array))
        try:
            while data:
                count = os.pwrite(handle, data, position)
                data, position = data[count:], position + count
        except OSError as error:
            raise _disk_error(file, error) from error

    def _open(self, file: Path) -> tuple[int, int]:
        if file not in self._files:
            offset = np.load(file, mmap_mode="r", allow_pickle=False).offset
            self._files[file] = (os.open(file, os.O_RDWR), offset)
        return self._files[file]

    def flush(self) -> None:
        """Force what was written to the disk, then mark its blocks as done."""
        try:
            for handle, _ in self._files.values():
                os.fsync(handle)
        except OSError as error:
            raise _disk_error(self.folder, error) from error
        for block in self._written:
            self._put(self.folder / _DONE, np.ones(1, dtype=np.uint8), row=block)
        self._written.clear()
        self._marked_at = time.monotonic()

    def close(self) -> None:
        """Flush and close; on every process, before finish()."""
        self.flush()
        for handle, _ in self._files.values():
            os.close(handle)
        self._files.clear()

    @staticmethod
    def finish(folder: Path) -> dict[str, Any]:
        """Publish the manifest once all blocks are there; on the main process, after all writers are closed."""
        state = _read_json(folder / _PARTIAL)
        if state is None:
            raise DataError(f"{folder / _PARTIAL}: missing; was the folder changed during extraction? Extract again.")
        missing = np.flatnonzero(np.load(folder / _DONE, allow_pickle=False) == 0)
        if len(missing):
            raise DataError(
                f"{folder}: {len(missing)} blocks of rows were not written. Extract again; the others are kept."
            )
        bad = np.flatnonzero(np.load(folder / _INVALID, allow_pickle=False))
        manifest = {**state, "bad_rows": bad.tolist(), "complete": True}
        _write_json(folder / MANIFEST, manifest)
        for name in (_PARTIAL, _DONE, _INVALID):
            (folder / name).unlink(missing_ok=True)
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


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of what is not equal in two manifests."""
    names = [key for key in ("split", "rows", "layers", "shard_rows", "block_rows") if found.get(key) != wanted[key]]
    if found.get("dataset", {}).get("fingerprint") != wanted["dataset"]["fingerprint"]:
        names.append("dataset")
    before, now = found.get("identity", {}), wanted["identity"]
    return names + sorted(key for key in {*before, *now} if before.get(key) != now.get(key))


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


def _create_shards(folder: Path, wanted: dict[str, Any]) -> list[tuple[int, int]]:
    """Make every shard that is missing or damaged, at its full size. Returns the row spans of those."""
    made = []
    for layer in wanted["layers"].values():
        for file, (start, stop) in zip(layer["shards"], spans(wanted["rows"], wanted["shard_rows"]), strict=True):
            shape = (stop - start, *layer["shape"])
            if _shard_problem(folder / file, shape=shape, dtype=layer["dtype"]):
                _create_shard(folder / file, shape=shape, dtype=layer["dtype"])
                made.append((start, stop))
    return made


def _create_shard(file: Path, *, shape: tuple[int, ...], dtype: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        file.unlink(missing_ok=True)
        np.lib.format.open_memmap(file, mode="w+", dtype=np.dtype(dtype), shape=shape).flush()
        if hasattr(os, "posix_fallocate"):  # reserve the space now: an error here costs no computing
            with file.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
    except OSError as error:
        raise _disk_error(file, error) from error


def _shard_problem(file: Path, *, shape: tuple[int, ...], dtype: str) -> str:
    """What is wrong with a shard file, or the empty string."""
    if not file.is_file():
        return "missing"
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return f"truncated or damaged ({file.stat().st_size} bytes)"
    if array.shape != shape or array.dtype != np.dtype(dtype):
        return f"of shape {array.shape} {array.dtype}, not {shape} {dtype}"
    expected = array.offset + array.nbytes
    return "" if file.stat().st_size == expected else f"{file.stat().st_size} bytes long, not {expected}"


def _disk_error(file: Path, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"{file}: the disk is full. Free space or choose another EXTRACT_FEATURES.OUTPUT_DIR; "
            "started again, the extraction goes on where it stopped."
        )
    return DataError(f"{file}: cannot be written ({error}).")


def _remove(folder: Path, found: dict[str, Any]) -> None:
    """Take away what an earlier extraction wrote here, and nothing else."""
    for layer in found.get("layers", {}):
        shutil.rmtree(folder / layer_folder(layer), ignore_errors=True)
    for name in (MANIFEST, _PARTIAL, _DONE, _INVALID, "images.npy", "sizes.npy", "labels.npy"):
        (folder / name).unlink(missing_ok=True)


def _write_arrays(folder: Path, subject: Subject) -> None:
    _save(folder / "images.npy", subject.paths)
    _save(folder / "sizes.npy", subject.stamps)
    if subject.labels is not None:
        _save(folder / "labels.npy", subject.labels)


def _save(file: Path, array: np.ndarray) -> None:
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        os.replace(part, file)
    except OSError as error:
        raise _disk_error(file, error) from error


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, file)


class FeatureStore:
    """Finished features of one layer and split, read from the files in float32 rows (n, dim); maps are flattened."""

    def __init__(self, folder: Path, manifest: dict[str, Any], layer: str) -> None:
        self.folder, self.manifest, self.layer = folder, manifest, layer
        described = manifest["layers"][layer]
        self.rows, self.dim = int(manifest["rows"]), int(described["dim"])
        self.shape, self.dtype = tuple(described["shape"]), described["dtype"]
        self.shard_rows = int(manifest["shard_rows"])
        self._shards = [self._map(file, number) for number, file in enumerate(described["shards"])]

    @classmethod
    def open(cls, folder: Path, split: str, layer: str = "") -> FeatureStore:
        """The features below `folder`. Raises DataError for missing, unfinished or damaged ones. "" is the only layer."""
        manifest = read_manifest(folder, split)
        layers = list(manifest["layers"])
        if not layer and len(layers) == 1:
            layer = layers[0]
        if layer not in layers:
            hint = suggest(layer, layers) if layer else ""
            raise DataError(
                f"config.CLUSTERFIT.FEATURES.LAYER_NAME={layer!r}: {folder / split} has no such layer{hint or '.'} "
                f"Extracted: {', '.join(layers)}."
            )
        return cls(folder / split, manifest, layer)

    def _map(self, file: str, number: int) -> NpyFile:
        start = number * self.shard_rows
        shape = (min(self.shard_rows, self.rows - start), *self.shape)
        problem = _shard_problem(self.folder / file, shape=shape, dtype=self.dtype)
        if problem:
            raise DataError(
                f"{self.folder / file}: {problem}. Run the extraction again with the same configuration; "
                "it makes only what is missing."
            )
        return NpyFile(self.folder / file)

    def __len__(self) -> int:
        return self.rows

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop as float32 (stop - start, dim)."""
        result = np.empty((stop - start, self.dim), dtype=np.float32)
        for number in range(start // self.shard_rows, -(-stop // self.shard_rows)):
            low = number * self.shard_rows
            first, last = max(start, low), min(stop, low + self.shard_rows)
            part = self._shards[number].read(first - low, last - low)
            result[first - start : last - start] = as_float32(part.reshape(last - first, self.dim))
        return result

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The rows of these ascending indices as float32 (len(indices), dim)."""
        result = np.empty((len(indices), self.dim), dtype=np.float32)
        numbers = indices // self.shard_rows
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            part = self._shards[number].take(indices[here] - number * self.shard_rows)
            result[here] = as_float32(part.reshape(len(here), self.dim))
        return result

    @property
    def paths(self) -> np.ndarray:
        """Identity of each row, unicode (n,)."""
        return np.load(self.folder / "images.npy", allow_pickle=False)

    @property
    def stamps(self) -> np.ndarray:
        """Stamps of the images when they were read, int64 (n,)."""
        return np.load(self.folder / "sizes.npy", allow_pickle=False)

    @property
    def labels(self) -> np.ndarray | None:
        """The data set's labels, (n,) or (n, C), or None. Rows of unreadable images have -1."""
        if not (self.folder / "labels.npy").is_file():
            return None
        labels = np.load(self.folder / "labels.npy", allow_pickle=False)
        labels[self.manifest["bad_rows"]] = -1
        return labels

    @property
    def fingerprint(self) -> str:
        """Of the images that these features belong to."""
        return str(self.manifest["dataset"]["fingerprint"])


def read_manifest(folder: Path, split: str, *, key: str = "CLUSTERFIT.FEATURES.PATH") -> dict[str, Any]:
    """The manifest of a split's finished features. Raises DataError with the cure."""
    manifest = _read_json(folder / split / MANIFEST)
    if manifest is None or manifest.get("kind") != "features":
        if (folder / split / _PARTIAL).exists():
            raise DataError(
                f"{folder / split}: the extraction was interrupted. Run it again with the same configuration to finish it."
            )
        there = ", ".join(sorted(file.parent.name for file in folder.glob(f"*/{MANIFEST}"))) or "none"
        raise DataError(
            f"config.{key}={str(folder)!r}: no extracted features of split {split} there (found: {there}). "
            "Extract them first (engine extract_features), or correct the path."
        )
    return manifest
