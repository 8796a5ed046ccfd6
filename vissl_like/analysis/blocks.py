"""The fixed blocks of rows that one of several processes works on, and what makes their results one result."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vissl_like.analysis.rows import ArrayRows, Rows, each, not_finite, original_row, share, spans
from vissl_like.errors import DataError

Result = TypeVar("Result")

#: Memory of the matrices that several threads work on at once.
_WORK_BYTES = 1 << 29
#: Threads that read rows ahead of a GPU.
_READERS = 2


@dataclass(frozen=True)
class Shard:
    """Which part of the blocks this process takes, and how a tensor is added to those of the others."""

    rank: int = 0
    size: int = 1
    reduce: Callable[[Tensor], Tensor] = lambda total: total

    def gather(self, values: Tensor) -> Tensor:
        """values (m, ...) of each process -> (size, m, ...), by adding up tables that are zero elsewhere."""
        table = values.new_zeros((self.size, *values.shape))
        table[self.rank] = values
        return self.reduce(table)


ALONE = Shard()


class Blocks:
    """Blocks of rows as float32 tensors on a device; those that fit into `cache_bytes`, or into a GPU, are kept.

    `keep` false: there is no next pass, so none is.
    A block has the same rows whoever computes it: `size` depends on no number of processes or threads.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        size: int,
        device: torch.device,
        threads: int = 1,
        shard: Shard = ALONE,
        cache_bytes: int = 0,
        keep: bool = True,
    ) -> None:
        self.rows, self.device, self.shard = rows, device, shard
        every = spans(len(rows), size)
        first, last = share(len(every), rank=shard.rank, size=shard.size)
        self.spans = every[first:last]
        self.threads = threads
        self._cache: dict[tuple[int, int], Tensor] = {}
        self._room = _room(rows, device, cache_bytes=cache_bytes) if keep else 0
        self._lock = threading.Lock()

    def each(self, function: Callable[[tuple[int, int], Tensor], Result]) -> Iterator[Result]:
        """function(span, block (b, D)) of each block, in order. Several at once on a CPU; on a GPU only reading is."""
        if self.device.type == "cuda":
            loaded = each(lambda span: (span, self.load(span)), self.spans, threads=_READERS)
            yield from (function(span, block) for span, block in loaded)
        else:
            yield from each(lambda span: function(span, self.load(span)), self.spans, threads=self.threads)

    def load(self, span: tuple[int, int]) -> Tensor:
        """Rows start..stop; not to be changed."""
        block = self._cache.get(span)
        if block is not None:
            return block
        block = torch.from_numpy(self.rows.read(*span)).to(self.device)
        with self._lock:
            if block.nbytes <= self._room:
                self._room -= block.nbytes
                self._cache[span] = block
        return block

    def largest_magnitude(self, *, what: str) -> float:
        """The largest |x| of all rows of all processes. Raises DataError, everywhere, if one is not finite."""

        def look(span: tuple[int, int], block: Tensor) -> tuple[float, int]:
            low, high = (float(value) for value in torch.aminmax(block))
            found = max(-low, high)
            return (found, -1) if np.isfinite(found) else (0.0, not_finite(block.cpu().numpy(), start=span[0]))

        found = list(self.each(look))
        bad = next((row for _, row in found if row >= 0), -1)
        mine = torch.tensor([max((value for value, _ in found), default=0.0), bad], dtype=torch.float64)
        table = self.shard.gather(mine)
        bad_rows = [int(row) for row in table[:, 1] if row >= 0]
        if bad_rows:
            raise DataError(not_finite_message(what, original_row(self.rows, bad_rows[0])))
        return float(table[:, 0].max())


def not_finite_message(what: str, row: int) -> str:
    """What a user is told about a row that holds NaN or infinity."""
    return (
        f"{what}: row {row} holds NaN or infinity. Look at that image and at the weights of the model; "
        "features that overflow float16 need EXTRACT_FEATURES.DTYPE=float32. Then extract again."
    )


def block_rows(k: int, dim: int, *, device: torch.device) -> int:
    """Rows per block for K clusters of D dimensions: a power of two such that rows and scores take at most 48 MB (GPU: 1 GB).

    The same on every machine with such a device.
    """
    size, room = (16384, 1 << 30) if device.type == "cuda" else (2048, 48 << 20)
    while size > 64 and size * _row_bytes(k, dim) > room:
        size //= 2
    return size


def threads_for(threads: int, *, k: int, dim: int, block: int) -> int:
    """As many blocks at once as keep what they work on below 512 MB."""
    return max(1, min(threads, _WORK_BYTES // (block * _row_bytes(k, dim))))


def _row_bytes(k: int, dim: int) -> int:
    """Of one row, its copy while it is prepared, and its scores."""
    return 4 * (k + 2 * dim)


def _room(rows: Rows, device: torch.device, *, cache_bytes: int) -> int:
    """Bytes of blocks that may be kept: much of a GPU that is free; an array in memory needs no copy in memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(0.6 * free)
    return 0 if isinstance(rows, ArrayRows) else cache_bytes
