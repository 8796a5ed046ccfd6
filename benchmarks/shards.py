"""Tar shards as a source: reading samples, listing them, and fetching them from a server.

    python benchmarks/shards.py              both of these
    python benchmarks/shards.py --read       reads (CPU time per image): ours in order and shuffled, files of a folder, the
                                             webdataset library; the limit: the shards read from end to end
    python benchmarks/shards.py --fetch      a pass from an HTTP server of this machine (wall time): ours with an empty
                                             cache, the library through curl; the limit: the bytes alone

What is read are encoded images with their classes, nothing is decoded. The variants take turns in shuffled order in one
process on files in the page cache, and the ratios of a round are compared, since the speed of a shared machine drifts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import webdataset as wds
from _rounds import quartiles, ratios, run_parts, turns
from jpeg import write_photos

from vissl_like.config.schema_data import Split, Stream
from vissl_like.core import rng
from vissl_like.data.folder import FolderSource
from vissl_like.data.shrink import shrink
from vissl_like.data.source import SourceRequest
from vissl_like.data.streams import ShardSource

PHOTOS, PER_SHARD = 2000, 250
Call = Callable[[], int]


def opened(path: str, cache: Path) -> ShardSource:
    """The shards, with a cache folder of their own."""
    stream = Stream(CACHE_DIR=str(cache), SHUFFLE_SHARDS=2)
    return ShardSource.build(SourceRequest("TRAIN", 0, "", path, Split(), stream=stream))


def read_rows(source: ShardSource | FolderSource, rows: np.ndarray) -> int:
    """Bytes of these images."""
    return sum(len(source.read(int(row))) for row in rows)


def read_by_library(urls: list[str]) -> int:
    """Bytes of all images, as the library gives them with their classes."""
    samples = wds.WebDataset(urls, shardshuffle=False).to_tuple("jpg", "cls")
    return sum(len(image) for image, _ in samples)


def read_whole(files: list[str]) -> int:
    """Read the shards and do nothing with them."""
    total = 0
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while piece := stream.read(1 << 20):
                total += len(piece)
    return total


def compare(calls: dict[str, Call], *, base: str, rounds: int, clock: Callable[[], float], images: int) -> None:
    """Time per image of each call, and how many times that of `base` it is: median, and quartiles over the rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number, name in turns(calls, rounds=rounds + 1):
        start = clock()
        calls[name]()
        if number:  # the first round warms the caches
            times[name].append(clock() - start)
    for name, spent in times.items():
        low, middle, high = quartiles(ratios(times, name, base))
        each = statistics.median(spent) / images * 1e6
        print(f"  {name:<40}{each:8.1f} us   x {middle:.2f}  ({low:.2f} to {high:.2f})")


def reads(folder: Path, rounds: int) -> None:
    """CPU time of a read, and of the list."""
    shards, images = opened(str(folder / "shards"), folder / "cache"), FolderSource(folder / "images")
    files = [str(file) for file in sorted((folder / "shards").glob("*.tar"))]
    in_order, shuffled = np.arange(len(shards)), rng.permutation(0, 0, len(shards))
    calls: dict[str, Call] = {
        "shards, shuffled": lambda: read_rows(shards, shuffled),
        "shards, in order": lambda: read_rows(shards, in_order),
        "files of a folder, shuffled": lambda: read_rows(images, shuffled),
        "webdataset library, in order": lambda: read_by_library(files),
        "limit: shards from end to end": lambda: read_whole(files),
    }
    print(f"{len(shards)} images of {sum(map(os.path.getsize, files)) / len(shards) / 1000:.0f} kB, CPU time of each:")
    compare(calls, base="files of a folder, shuffled", rounds=rounds, clock=time.process_time, images=len(shards))
    for name, cache in (("first time", folder / "new"), ("kept", folder / "new")):
        start = time.process_time()
        opened(str(folder / "shards"), cache)
        print(f"  listing, {name}: {(time.process_time() - start) / len(shards) * 1e6:.1f} us of CPU time per image")


def fetches(folder: Path, rounds: int) -> None:
    """Wall time of a pass from a server."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "http.server",
        "0",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(folder / "shards"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        base = f"http://127.0.0.1:{server.stdout.readline().split('port ')[1].split(' ')[0]}"
        count = PHOTOS // PER_SHARD
        urls = [f"{base}/shard-{number:06d}.tar" for number in range(count)]

        def ours() -> int:
            shutil.rmtree(folder / "fetched", ignore_errors=True)
            found = opened(f"{base}/shard-{{000000..{count - 1:06d}}}.tar", folder / "fetched")
            return read_rows(found, found.sharding.order(0, 0))

        def alone() -> int:
            return sum(len(urllib.request.urlopen(url).read()) for url in urls)

        calls = {"ours, empty cache, shuffled": ours, "library, in order": lambda: read_by_library(urls)}
        calls["limit: the bytes alone"] = alone
        print("A pass from a server of this machine, wall time per image:")
        compare(calls, base="limit: the bytes alone", rounds=rounds, clock=time.perf_counter, images=PHOTOS)
        server.kill()


def main() -> None:
    """Make the photos and their shards, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", action="store_true")
    parser.add_argument("--fetch", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "images", count=PHOTOS, size=(500, 375))
        source, target = str(folder / "images"), str(folder / "shards")
        shrink(source, target, short_side=500, format="webdataset", shard_size=PER_SHARD)
        time.sleep(4)  # lists of shards that are just being written are not kept
        run_parts({"read": lambda: reads(folder, given.rounds), "fetch": lambda: fetches(folder, given.rounds)}, given)


if __name__ == "__main__":
    main()
