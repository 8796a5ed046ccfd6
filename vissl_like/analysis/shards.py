"""Shards of features on disk: .npy files of fixed size, and a checksum of every row in a file beside them.

A shard that is cut off is noticed by its size, one whose bytes have changed when its rows are read. `manifest` is that of
a split's features (features.py): names below its folder, their rows, shapes and types.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vissl_like.analysis.npy_file import NpyFile
from vissl_like.analysis.rows import spans

#: Beside the shards of a layer: uint64 (rows,), 0 for a row that is not written yet.
_SUMS = "sums.npy"
#: Rows that are checked at once.
_CHECK_BYTES = 1 << 24


def array_problem(file: Path, *, shape: tuple[int, ...], dtype: str) -> str:
    """What is wrong with the form of a .npy file, or the empty string."""
    if not file.is_file():
        return "missing"
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return f"truncated or damaged ({file.stat().st_size} bytes)"
    if array.shape != shape or array.dtype != np.dtype(dtype):
        return f"of shape {array.shape} {array.dtype}, not {shape} {dtype}"
    expected = array.offset + array.nbytes  # type: ignore[attr-defined]
    return "" if file.stat().st_size == expected else f"{file.stat().st_size} bytes long, not {expected}"


def row_sums(rows: np.ndarray) -> np.ndarray:
    """A checksum of each row (n, ...) as it is stored -> uint64 (n,), not 0 for a row of zeros.

    The words of each eighth of a row added, the eighths weighted by odd numbers, modulo 2^64: several times as quick as
    writing the row, and any change of one word changes it. It is meant against damage, not against intent.
    """
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1)
    row_bytes = flat.shape[1] * flat.itemsize
    words = flat.view(next(kind for size, kind in _WORDS if row_bytes % size == 0)).astype(np.uint64, copy=False)
    starts, weights = _parts(words.shape[1])
    return np.add.reduceat(words, starts, axis=1) @ weights + np.uint64(1)


_WORDS = ((8, np.uint64), (4, np.uint32), (2, np.uint16), (1, np.uint8))


@functools.lru_cache(maxsize=8)
def _parts(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the eighths of a row of so many words begin, and their weights."""
    starts = np.arange(0, count, -(-count // 8))
    return starts, np.arange(1, 2 * len(starts), 2, dtype=np.uint64)


def changed_rows(shard: NpyFile, sums: np.ndarray) -> np.ndarray:
    """Ascending rows of a shard (n, ...) that do not have their checksums (n,)."""
    size = max(1, _CHECK_BYTES // max(1, shard.row_bytes))
    parts = [
        start + np.flatnonzero(row_sums(shard.read(start, stop)) != sums[start:stop])
        for start, stop in spans(len(shard), size)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


# ------------------------------------------------------------------------------------------------- what of it is lost
def sums_file(layer: dict[str, Any]) -> str:
    """The name of a layer's checksums."""
    return PurePosixPath(layer["shards"][0]).with_name(_SUMS).as_posix()


def lost_files(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape and type of each shard and file of checksums that is missing, cut off or no such array; by name."""
    return {name: form for name, form, _ in _files(manifest) if array_problem(folder / name, **form)}


def lost_blocks(
    folder: Path, manifest: dict[str, Any], *, lost: Collection[str], suspects: Collection[str]
) -> np.ndarray:
    """Ascending numbers of the blocks with rows in `lost` files, and of those that do not fit to checksums in `suspects`.

    Only for these are rows read: that takes as long as reading the layer.
    """
    size = manifest["block_rows"]
    found = [np.arange(start // size, -(-stop // size)) for name, _, (start, stop) in _files(manifest) if name in lost]
    for layer in manifest["layers"].values():
        name = sums_file(layer)
        if name not in suspects or name in lost:
            continue
        sums = NpyFile(folder / name)
        for shard, (start, stop) in zip(layer["shards"], spans(len(sums), manifest["shard_rows"]), strict=True):
            if shard not in lost:
                found.append((start + changed_rows(NpyFile(folder / shard), sums.read(start, stop))) // size)
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *found]))


def _files(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], tuple[int, int]]]:
    """(name, its shape and type, rows start..stop that it is about) of each file of checksums and each shard."""
    rows = manifest["rows"]
    for layer in manifest["layers"].values():
        yield sums_file(layer), {"shape": (rows,), "dtype": "uint64"}, (0, rows)
        for name, (start, stop) in zip(layer["shards"], spans(rows, manifest["shard_rows"]), strict=True):
            yield name, {"shape": (stop - start, *layer["shape"]), "dtype": layer["dtype"]}, (start, stop)
