"""Rows of one .npy file, read at their place in it and not through a map.

Mapped pages count as memory of the process that touched them, so a process that maps a large file seems to hold it; and
a file that was cut short, or a disk that fails, ends a mapping process by a signal. Here both are errors with a name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vissl_like.errors import DataError
from vissl_like.files import refusals_explained

#: Files that are open at a time for writing; the system allows a process 1,024 by default.
_OPEN_FILES = 32


class NpyFile:
    """An array (n, ...) in a file. Opened anew by each call: any number of files, from any number of threads."""

    def __init__(self, file: Path) -> None:
        array = np.load(file, mmap_mode="r", allow_pickle=False)  # only its header is looked at
        self.file, self.shape, self.dtype = file, array.shape, array.dtype
        self._offset = int(array.offset)
        self.row_bytes = int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize

    @classmethod
    def create(cls, file: Path, shape: tuple[int, ...], dtype: np.dtype) -> NpyFile:
        """A new file of zeros. Raises DataError where the disk has no room for it."""
        create_array(file, shape=shape, dtype=dtype)
        return cls(file)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop, as stored."""
        result = np.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        with self._open() as stream:
            self._fill(stream, result, row=start)
        return result

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The rows of these ascending indices, as stored; neighbours are read together."""
        result = np.empty((len(indices), *self.shape[1:]), dtype=self.dtype)
        with self._open() as stream:
            for first, last in _runs(indices):
                self._fill(stream, result[first:last], row=int(indices[first]))
        return result

    def write(self, start: int, array: np.ndarray) -> None:
        """Put rows in place, from row `start` on."""
        with refusals_explained(_final(self.file)), open(self.file, "r+b") as stream:
            stream.seek(self._offset + start * self.row_bytes)
            stream.write(np.ascontiguousarray(array, dtype=self.dtype).reshape(-1).view(np.uint8).data)

    def _open(self) -> BinaryIO:
        try:
            return open(self.file, "rb", buffering=0)  # type: ignore[return-value]
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read ({error}). Make it again.") from error

    def _fill(self, stream: BinaryIO, target: np.ndarray, *, row: int) -> None:
        if not target.nbytes:
            return
        place = target.reshape(-1).view(np.uint8).data
        try:
            stream.seek(self._offset + row * self.row_bytes)
            while place:
                count = stream.readinto(place)  # type: ignore[attr-defined]
                if not count:
                    raise DataError(
                        f"{self.file}: ends before row {row + len(target) - 1}; it was cut short. Make it again."
                    )
                place = place[count:]
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read ({error}). Make it again.") from error


class OpenArrays:
    """Arrays (n, ...) in files that rows are written into, kept open until they are forced to the disk. For one thread."""

    def __init__(self, folder: Path) -> None:
        """`folder`: what a message names where the system names no file."""
        self.num_bytes = 0
        """Written since the last force()."""
        self._folder = folder
        self._files: dict[Path, tuple[int, int]] = {}

    def put(self, file: Path, array: np.ndarray, *, row: int) -> None:
        """Write rows in place. By pwrite, not through a map: a full disk is then an error and not a bus error."""
        handle, offset = self._open(file)
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
        position = offset + row * (len(data) // len(array))
        self.num_bytes += len(data)
        with refusals_explained(file):
            while data:
                count = os.pwrite(handle, data, position)
                data, position = data[count:], position + count

    def force(self) -> None:
        """Force the files to the disk and close them."""
        self.num_bytes = 0
        with refusals_explained(self._folder):
            while self._files:
                _, (handle, _) = self._files.popitem()
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)

    def _open(self, file: Path) -> tuple[int, int]:
        if file not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self.force()
            with refusals_explained(file):
                offset = np.load(file, mmap_mode="r", allow_pickle=False).offset
                self._files[file] = (os.open(file, os.O_RDWR), offset)
        return self._files[file]


def _final(file: Path) -> Path:
    """The name that a file has when it is finished."""
    return file.with_name(file.name.removesuffix(".part"))


def create_array(file: Path, *, shape: tuple[int, ...], dtype: str | np.dtype) -> None:
    """A .npy file of zeros. Its space is reserved now: a full disk is an error before anything is computed."""
    with refusals_explained(_final(file)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        try:
            with file.open("wb") as stream:
                header = {
                    "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                    "fortran_order": False,
                    "shape": shape,
                }
                np.lib.format.write_array_header_1_0(stream, header)
                stream.flush()
                size = stream.tell() + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
                os.truncate(stream.fileno(), size)
                if hasattr(os, "posix_fallocate") and size:
                    os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            file.unlink(missing_ok=True)  # half a reservation helps nobody
            error.filename = None  # the message names the file that was to be made
            raise


def _runs(indices: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where consecutive numbers stand in ascending ones: (first, last) of each run."""
    if len(indices):
        breaks = np.flatnonzero(np.diff(indices) != 1) + 1
        yield from zip([0, *breaks.tolist()], [*breaks.tolist(), len(indices)], strict=True)
