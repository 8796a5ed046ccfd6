"""Randomness as a function of coordinates: no generator has a state that a checkpoint would have to keep.

The order of an epoch, the augmentation of one view of one sample and the noise of one step each follow from a seed and
their coordinates, so neither the number of workers nor the place of an interruption can change them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import Iterator

import numpy as np
import torch
from numpy.random import mtrand

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

# What a number is drawn for: the same coordinates must not give the same numbers for two purposes.
_ORDER, _SAMPLE, _STEP, _MODEL = 1, 2, 3, 4
# Rows that sample() looks at together.
_HASHED_AT_ONCE = 1 << 20

#: What numpy draws from within sample_scope().
_scoped_numpy = np.random.MT19937(0)


def _splitmix64(value: int) -> int:
    """One output of splitmix64 (Steele, Lea, Flood 2014): an input bit changes each output bit half of the time."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix(*numbers: int) -> int:
    """One 63-bit number from several, the order of which counts; the same on every machine and Python."""
    state = len(numbers)
    for number in numbers:
        state = _splitmix64(state ^ _splitmix64(int(number) & _MASK))
    return state >> 1


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n rows in an epoch, int64 (n,).

    The rows are sorted by a hash of (seed, epoch, row), not drawn from a numpy generator, whose streams may change from
    one numpy to the next.
    """
    return np.argsort(_hashes(seed, epoch, 0, n), kind="stable").astype(np.int64)


def sample(seed: int, epoch: int, n: int, *, count: int) -> np.ndarray:
    """The first `count` rows of permutation(), int64 (count,), in ascending order; memory for them alone, not for n rows."""
    hashes, rows = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    step = max(count, _HASHED_AT_ONCE)
    for start in range(0, n, step):
        stop = min(start + step, n)
        hashes = np.concatenate([hashes, _hashes(seed, epoch, start, stop)])
        rows = np.concatenate([rows, np.arange(start, stop)])
        if len(rows) > count:
            lowest = np.argpartition(hashes, count)[:count]
            hashes, rows = hashes[lowest], rows[lowest]
    return np.sort(rows)


def _hashes(seed: int, epoch: int, start: int, stop: int) -> np.ndarray:
    """A number for each of the rows start..stop, uint64, different for all rows: every step can be undone."""
    key = np.uint64(mix(_ORDER, seed, epoch))
    with np.errstate(over="ignore"):
        value = (np.arange(start, stop, dtype=np.uint64) ^ key) * np.uint64(_GOLDEN) + np.uint64(_GOLDEN)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def _seed_globals(seed: int) -> None:
    """Seed the CPU generators that library transforms draw from."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Whatever is seeded and drawn within, the global CPU generators of torch, numpy and Python go on as before afterwards.

    Without loader processes, the noise of the model must not depend on the loading of images. (numpy's second, kept value
    of a pair of normal numbers is lost.)
    """
    before_torch, before_python = torch.get_rng_state(), random.getstate()
    # Numpy gets another generator for the time being: copying its state out and in takes 0.1 ms.
    before_numpy = mtrand.get_bit_generator()
    mtrand.set_bit_generator(np.random.MT19937(0) if before_numpy is _scoped_numpy else _scoped_numpy)
    try:
        yield
    finally:
        torch.set_rng_state(before_torch)
        mtrand.set_bit_generator(before_numpy)
        random.setstate(before_python)


def seed_sample(seed: int, epoch: int, sample_id: int, view: int = 0, *, only_torch: bool = False) -> None:
    """Make the global CPU generators, or just torch's, a function of the coordinates; only within preserved()."""
    value = mix(_SAMPLE, seed, epoch, sample_id, view)
    if only_torch:
        torch.default_generator.manual_seed(value)
    else:
        _seed_globals(value)


@contextlib.contextmanager
def sample_scope(seed: int, epoch: int, sample_id: int, view: int = 0) -> Iterator[None]:
    """Within it the global CPU generators of torch, numpy and Python are a function of the coordinates."""
    with preserved():
        seed_sample(seed, epoch, sample_id, view)
        yield


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what the model draws in a step (dropout, masks, augmentation on the device) on the CPU and this rank's GPU.

    Not torch.manual_seed(): as long as no GPU is in use it keeps a stack trace of each call, which takes 0.1 ms.
    """
    state, last = _step_constants(seed, rank)
    value = _splitmix64(_splitmix64(state ^ _splitmix64(step)) ^ last) >> 1  # mix(_STEP, seed, step, rank)
    _seed_globals(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)


@functools.lru_cache(maxsize=1)
def _step_constants(seed: int, rank: int) -> tuple[int, int]:
    """What mix(_STEP, seed, step, rank) computes before and after the step: most of it, and the same in every step."""
    state = 4  # how many numbers are mixed
    for number in (_STEP, seed):
        state = _splitmix64(state ^ _splitmix64(number & _MASK))
    return state, _splitmix64(rank & _MASK)


def global_numpy() -> np.random.RandomState:
    """numpy's global generator, a function of the step within a step."""
    generator: np.random.RandomState = mtrand._rand
    return generator


def seed_model(seed: int) -> None:
    """Seed the initialisation of a model."""
    _seed_globals(mix(_MODEL, seed))


def set_determinism(wanted: bool) -> None:
    """Use only kernels that give the same bits each time (GPU; slower). To be called before the GPU is first used."""
    if not wanted:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
