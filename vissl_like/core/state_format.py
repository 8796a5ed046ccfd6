"""Files of a checkpoint: nested Python state as JSON plus safetensors, written to the disk with a checksum.

The writer of safetensors is our own: it sends one tensor after the other to the file, takes the checksum on the way,
and reports a full disk as the OSError that it is. The files are those of the safetensors format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vissl_like.errors import WeightsError

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip

# Marks in the JSON of what JSON itself cannot say.
_TENSOR, _TUPLE, _PAIRS = "$tensor", "$tuple", "$pairs"
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Stored:
    """A tensor in files: `parts` are its consecutive rows. Parts of load_file() are windows, read when they are used."""

    parts: tuple[Tensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0]
        return (sum(len(part) for part in self.parts), *first.shape[1:]) if first.ndim else ()

    def whole(self) -> Tensor:
        """All of it, in memory of its own: an optimizer changes its state in place."""
        return self.parts[0].clone() if len(self.parts) == 1 else torch.cat(self.parts)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), in memory of their own. Other parts are not touched."""
        found, first = [], 0
        for part in self.parts:
            found.append(part[max(0, start - first) : max(0, stop - first)])
            first += len(part)
        return torch.cat(found)


def split_state(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Nested dicts, lists and tuples of numbers, texts, None and tensors -> (what JSON can hold, tensors by name)."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            parts = [(key, walk(item, f"{name}/{key}" if name else str(key))) for key, item in value.items()]
            is_plain = all(isinstance(key, str) and not key.startswith("$") for key, _ in parts)
            return dict(parts) if is_plain else {_PAIRS: [[walk(key, ""), item] for key, item in parts]}
        if isinstance(value, list | tuple):
            items = [walk(item, f"{name}/{i}") for i, item in enumerate(value)]
            return {_TUPLE: items} if isinstance(value, tuple) else items
        if value is None or isinstance(value, str | bool | int | float):
            return value
        kind = type(value).__name__
        raise TypeError(f"the training state holds {name or 'an entry'} of {kind}, which has no plain form")

    return walk(state, ""), tensors


def join_state(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of split_state()."""
    if isinstance(structure, list):
        return [join_state(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if _TENSOR in structure:
        return tensors[structure[_TENSOR]]
    if _TUPLE in structure:
        return tuple(join_state(item, tensors) for item in structure[_TUPLE])
    if _PAIRS in structure:
        return {join_state(key, tensors): join_state(item, tensors) for key, item in structure[_PAIRS]}
    return {key: join_state(item, tensors) for key, item in structure.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Stored]) -> dict[str, Any]:
    """Write a .safetensors file to the disk, one tensor after the other; returns its record for the manifest."""
    # Wide types first, so that each tensor starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise WeightsError(f"tensor {name!r} has the type {tensor.dtype}, which safetensors files cannot hold.")
        end = offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return _write(path, _file_parts(text, [tensors[name] for name in names]))


def _file_parts(header: bytes, tensors: Iterable[Tensor | Stored]) -> Iterator[Any]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        values = tensor.whole() if isinstance(tensor, Stored) else tensor.detach().cpu().contiguous()
        if values.numel():
            yield values.reshape(-1).view(torch.uint8).numpy().data


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write a JSON file to the disk; returns its record for the manifest."""
    return _write(path, [json.dumps(value, indent=1).encode()])


def _write(path: Path, parts: Iterable[Any]) -> dict[str, Any]:
    checksum, size = Crc32(), 0
    # Without a buffer: a process that is forked meanwhile would inherit what is in it, and write it once more.
    with path.open("wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            checksum.update(view)
            size += len(view)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return {"bytes": size, CHECKSUM: checksum.hexdigest()}


class Crc32:
    """zlib's sum with the face of hashlib: it finds accidents, which are what happens here, in a quarter of the time."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


#: The checksum that is written, and all that may be found in a manifest.
CHECKSUM = "crc32"
_CHECKSUMS: dict[str, Callable[[], Any]] = {"crc32": Crc32, "blake2b": partial(hashlib.blake2b, digest_size=16)}


def record_of(path: Path, *, kind: str = CHECKSUM) -> dict[str, Any]:
    """Size and checksum of a file as it lies on the disk; KeyError for an unknown kind."""
    checksum, size = _CHECKSUMS[kind](), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum.update(chunk)
            size += len(chunk)
    return {"bytes": size, kind: checksum.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Force the entries of a folder (new files, renames) to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
