"""Rows of features, read in fixed blocks: what clustering and evaluation work on, however many there are.

A source of rows has a length, a `dim`, and gives float32 blocks. Results must not depend on the number of processes or
threads, and two facts of CPU arithmetic shape this file: a matrix product or convolution may differ in its last bits
with the number of threads *inside* it, and not with the number of independent blocks computed side by side. So the
blocks are the same for everyone, each is computed by one thread, and several of them at once.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Rows per block where nothing else decides.
BLOCK_ROWS = 2048


class Rows(Protocol):
    """n rows of `dim` float32 numbers."""

    dim: int

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop, (stop - start, dim) float32; not to be changed."""
        ...

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The rows of these ascending indices, (len(indices), dim) float32; not to be changed."""
        ...


class ArrayRows:
    """An array (n, dim) as rows."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dim = int(array.shape[1])

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> np.ndarray:
        return as_float32(self.array[start:stop])

    def take(self, indices: np.ndarray) -> np.ndarray:
        return as_float32(self.array[indices])


class MappedRows:
    """Rows with a function of blocks (b, dim) -> (b, dim') applied when they are read; never held as a whole."""

    def __init__(self, rows: Rows, function: Callable[[np.ndarray], np.ndarray], *, dim: int | None = None) -> None:
        self.rows = rows
        self.function = function
        self.dim = rows.dim if dim is None else dim

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.function(self.rows.read(start, stop))

    def take(self, indices: np.ndarray) -> np.ndarray:
        return self.function(self.rows.take(indices))


class SelectedRows:
    """The rows of some ascending indices, as rows 0, 1, ..."""

    def __init__(self, rows: Rows, indices: np.ndarray) -> None:
        self.rows = rows
        self.indices = indices
        self.dim = rows.dim

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.rows.take(self.indices[start:stop])

    def take(self, indices: np.ndarray) -> np.ndarray:
        return self.rows.take(self.indices[indices])


def normalised(rows: Rows) -> MappedRows:
    """Each row divided by its length + 1e-5."""
    return MappedRows(rows, normalise)


def normalise(block: np.ndarray) -> np.ndarray:
    """x / (||x||_2 + 1e-5) for each row of (b, dim)."""
    return block / (np.linalg.norm(block, axis=1, keepdims=True) + np.float32(1e-5))


def unit(block: np.ndarray) -> np.ndarray:
    """x / ||x||_2 for each row of (b, dim); rows of zeros stay as they are."""
    lengths = np.linalg.norm(block, axis=1, keepdims=True)
    return block / np.where(lengths > 0, lengths, np.float32(1))


def resident(rows: Rows, *, limit_bytes: int = 1 << 30) -> Rows:
    """The rows in memory if they take at most `limit_bytes`, so that they are not made again in each pass."""
    if 4 * len(rows) * rows.dim > limit_bytes or isinstance(rows, ArrayRows):
        return rows
    array = np.empty((len(rows), rows.dim), dtype=np.float32)
    for start, stop in spans(len(rows), BLOCK_ROWS):
        array[start:stop] = rows.read(start, stop)
    return ArrayRows(array)


def spans(count: int, size: int) -> list[tuple[int, int]]:
    """0..count cut into (start, stop) of `size`; the last may be shorter."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def share(count: int, *, rank: int, size: int) -> tuple[int, int]:
    """The contiguous part of `count` things that one of `size` processes takes."""
    return count * rank // size, count * (rank + 1) // size


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Operations of PyTorch and numpy inside run in one thread, so that their bits do not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _libraries().limit(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def _limit_this_thread() -> None:
    """For a thread that lives no longer than one_thread(): some libraries keep a number for each thread that calls them."""
    torch.set_num_threads(1)
    _libraries().limit(limits=1, user_api="blas")


@functools.cache
def _libraries() -> Any:
    """The libraries behind numpy. Looking for them takes some milliseconds."""
    from threadpoolctl import ThreadpoolController  # a part of scikit-learn

    return ThreadpoolController()


def each(function: Callable[[Item], Result], items: Iterable[Item], *, threads: int) -> Iterator[Result]:
    """The results in the order of the items; `threads` of them are computed at once, each by one thread.

    At most two items per thread wait, so memory stays bounded. Until the end of the iteration PyTorch runs with one
    thread per operation in the caller too.
    """
    with one_thread():
        if threads <= 1:
            yield from map(function, items)
            return
        pool = ThreadPoolExecutor(threads, initializer=_limit_this_thread)
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def not_finite(block: np.ndarray, *, start: int) -> int:
    """The number of the first row of a block (b, dim) that holds NaN or infinity; the block begins with row `start`."""
    return start + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])


def original_row(rows: Rows, row: int) -> int:
    """The number that a row has in the source of these rows."""
    if isinstance(rows, SelectedRows):
        return original_row(rows.rows, int(rows.indices[row]))
    return original_row(rows.rows, row) if isinstance(rows, MappedRows) else row


def as_float32(array: np.ndarray) -> np.ndarray:
    """The array in float32. PyTorch converts float16 many times faster than numpy."""
    if array.dtype == np.float16:
        return torch.from_numpy(np.ascontiguousarray(array)).float().numpy()
    return array.astype(np.float32, copy=False)


def as_stored(array: np.ndarray, kind: str) -> tuple[np.ndarray, bool]:
    """The array as float32 or float16, contiguous, and whether all of it is finite then.

    By PyTorch: numpy takes ten times as long to convert to float16, and longer to look for what is not finite.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    wanted = torch.float16 if kind == "float16" else torch.float32
    # No number is larger than the root of the sum of all squares, and this sum is one quick pass: mostly it is enough.
    is_finite = float(torch.dot(tensor.view(-1), tensor.view(-1))) <= torch.finfo(wanted).max ** 2
    if not is_finite:
        extremes = torch.stack(torch.aminmax(tensor)).to(wanted)  # NaN if there is one
        is_finite = bool(torch.isfinite(extremes).all())
    return tensor.to(wanted).numpy(), is_finite
