"""Writing features: our writer, which can be continued at any block, against one raw file; both forced to the disk.

    python benchmarks/features.py                       60,000 x 1,024 float32 (246 MB) and float16
    python benchmarks/features.py --folder /data        on another disk

The variants take turns in shuffled order and the ratios of a round are compared, since the speed of a shared disk drifts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from _rounds import in_words, ratios, turns, verdict

from vissl_like.analysis.features import FeatureWriter, Subject

BLOCK, SHARD = 256, 65536
KINDS = ("float32", "float16")
Write = Callable[[Path], None]


def subject_of(rows: int) -> Subject:
    """What is told about the images; not measured."""
    paths, none = np.array([f"{row:08d}.jpg" for row in range(rows)]), np.zeros(rows, dtype=np.int64)
    return Subject("TRAIN", paths, none, none, "", "drawn", "", None, {})


def ours(folder: Path, subject: Subject, blocks: list[np.ndarray], kind: str) -> None:
    """What an extraction does with the features of its batches: space reserved, rows checked, converted, written, marked."""
    layers = {"trunk": blocks[0].shape[1:]}
    FeatureWriter.prepare(folder, subject, layers=layers, dtype=kind, shard_rows=SHARD, block_rows=BLOCK)
    writer = FeatureWriter(folder)
    for number, block in enumerate(blocks):
        writer.write(number, {"trunk": block})
    writer.close()
    FeatureWriter.finish(folder)


def raw(folder: Path, blocks: list[np.ndarray], kind: str) -> None:
    """The limit: convert, and write the bytes one after the other."""
    folder.mkdir()
    with (folder / "raw").open("wb") as stream:
        for block in blocks:
            stream.write(torch.from_numpy(block).to(getattr(torch, kind)).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def compare(base: Path, blocks: list[np.ndarray], kind: str, *, rounds: int) -> None:
    """MB/s of both and their ratio."""
    subject = subject_of(sum(map(len, blocks)))
    variants: dict[str, Write] = {
        "ours": lambda folder: ours(folder, subject, blocks, kind),
        "raw file": lambda folder: raw(folder, blocks, kind),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    folder = base / "written"
    for number, name in turns(variants, rounds=rounds + 1):
        began = time.perf_counter()
        variants[name](folder)
        if number:  # the first round warms up
            seconds[name].append(time.perf_counter() - began)
        shutil.rmtree(folder)
    size = sum(map(np.size, blocks)) * np.dtype(kind).itemsize / 1e6
    for name, values in seconds.items():
        print(f"{kind:<9}{name:<10}{size / statistics.median(values):8.0f} MB/s of {size:.0f} MB")
    found = ratios(seconds, "raw file", "ours")
    print(f"goal: {kind} ours >= 0.75 x raw file: {in_words(found)}, {verdict(statistics.median(found) >= 0.75)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Both kinds of numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", default=None, help="where to write; else the folder for temporary files")
    arguments = parser.parse_args(argv)
    draw = np.random.default_rng(0)
    sizes = [min(BLOCK, arguments.rows - start) for start in range(0, arguments.rows, BLOCK)]
    blocks = [draw.standard_normal((size, arguments.dim), dtype=np.float32) for size in sizes]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for kind in KINDS:
            compare(Path(folder), blocks, kind, rounds=arguments.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
