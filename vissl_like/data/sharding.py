"""Rows that lie in shards: the order of an epoch that goes shard by shard, and which shards to fetch when."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vissl_like.data.shard_cache import Remote

#: Where nothing needs its place, a shard is released so many batches after its last use: other processes read it too.
_SLACK = 32


class Hints(NamedTuple):
    """What the loader of a batch may fetch ahead, and what is needed no more."""

    fetch: tuple[Remote, ...] = ()
    release: tuple[Remote, ...] = ()


@dataclass(frozen=True)
class Sharding:
    """The shard of each row, int32 (N,); each shard's remote part (None: a local file); shards mixed at a time (0: all)."""

    shard_of: np.ndarray
    remotes: tuple[Remote | None, ...]
    window: int

    @classmethod
    def join(cls, parts: Sequence[Sharding | int]) -> Sharding | None:
        """Of several sources in a row; an int is the number of rows of one without shards, which is spread over some."""
        shardings = [part for part in parts if isinstance(part, Sharding)]
        if not shardings:
            return None
        rows = sum(len(part.shard_of) for part in shardings)
        per_shard = max(1, rows // max(1, sum(len(part.remotes) for part in shardings)))
        known = [part if isinstance(part, Sharding) else _spread(part, per_shard) for part in parts]
        starts = np.cumsum([0, *(len(part.remotes) for part in known)])
        return cls(
            np.concatenate([part.shard_of + start for part, start in zip(known, starts)]).astype(np.int32),
            tuple(remote for part in known for remote in part.remotes),
            max(part.window for part in shardings),
        )

    def take(self, rows: np.ndarray) -> Sharding:
        """Of some rows."""
        return Sharding(self.shard_of[rows], self.remotes, self.window)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of the rows in an epoch, int64 (N,): a function of seed and epoch, whatever the number of processes.

        The shards are put in random order and taken `window` at a time; within each such window the rows of its shards
        follow each other as they do in the random order of all rows.
        """
        from vissl_like.core import rng  # needs torch, which what only lists images does without

        rows = rng.permutation(seed, epoch, len(self.shard_of))
        if self.window == 0:
            return rows
        place = np.empty(len(self.remotes), dtype=np.int64)
        place[rng.permutation(seed, epoch, len(self.remotes))] = np.arange(len(self.remotes))
        return rows[np.argsort((place // self.window)[self.shard_of[rows]], kind="stable")]

    def schedule(self, batches: Sequence[np.ndarray], *, lag: int = 1) -> list[Hints]:
        """Hints for each batch of rows, in order: shards are fetched as early as the room for them allows.

        When a batch is begun, all those are read that come `lag` or more before it; a slower loader process may be at any
        other, so a shard is not released earlier. Where the room is too small for that, the cache removes what was opened
        longest ago.
        """
        if not any(self.remotes):
            return [Hints()] * len(batches)
        first, last = self._uses(batches)
        fetch: list[list[Remote]] = [[] for _ in batches]
        release: list[list[Remote]] = [[] for _ in batches]
        held: list[tuple[int, int]] = []  # (when it may be released, shard) of what is fetched
        room, start = 0, 0
        remotes = {shard: remote for shard, remote in enumerate(self.remotes) if remote is not None}
        for shard in sorted(remotes.keys() & first.keys(), key=lambda shard: (first[shard], shard)):
            remote = remotes[shard]
            room += remote.size
            done: list[Remote] = []
            while room > remote.cache.limit and held and held[0][0] <= first[shard]:
                end, used = heapq.heappop(held)
                done.append(remotes[used])
                room, start = room - done[-1].size, max(start, end)
            if room > remote.cache.limit:
                start = first[shard]
            heapq.heappush(held, (last[shard] + lag, shard))
            fetch[start].append(remote)
            # Something has to make place now: what is done with, not what was fetched early and waits to be used.
            release[start].extend(done)
            if last[shard] + max(lag, _SLACK) < len(batches):
                release[last[shard] + max(lag, _SLACK)].append(remote)
        return [Hints(tuple(wanted), tuple(done)) for wanted, done in zip(fetch, release)]

    def _uses(self, batches: Sequence[np.ndarray]) -> tuple[dict[int, int], dict[int, int]]:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for number, rows in enumerate(batches):
            for shard in np.unique(self.shard_of[rows]).tolist():
                first.setdefault(shard, number)
                last[shard] = number
        return first, last


def _spread(rows: int, per_shard: int) -> Sharding:
    """Rows without shards, dealt to as many as they would fill: each holds a sample of all."""
    shards = max(1, -(-rows // per_shard))
    return Sharding(np.arange(rows, dtype=np.int64) % shards, (None,) * shards, 0)
