"""Peak memory of extraction and clustering: 200,000 rows of 2,048 float32 numbers (1.6 GB), 1,000 clusters.

    python benchmarks/memory.py                 writes 1.7 GB to the folder for temporary files, and removes it
    python benchmarks/memory.py --rows 20000    smaller
    python benchmarks/memory.py --ranks 2       several processes
    python benchmarks/memory.py --path-length 60    files with names of so many characters, instead of none

Two runs of the program itself: drawn images of 16 x 16 pixels through a histogram of 2,048 grey values, then k-means on
what they give. Peak memory is that of the largest process of a run, as the system counts it: with the pages of libraries
and of mapped files, and with about 100 MB that PyTorch's libraries touch when a process ends. What a run of few rows takes,
mostly libraries, is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _rounds import verdict
from PIL import Image

TOOL = Path(__file__).resolve().parents[1] / "tools" / "run_distributed_engines.py"
DIM, CLUSTERS, ITERATIONS = 2048, 1000, 2
SIDE, IMAGES = 16, 4096
GOAL_MB = 1024


def files(folder: Path, *, rows: int, path_length: int) -> Path:
    """A folder of so many names, links to some thousand images."""
    images, names = folder / "drawn", folder / "images"
    if names.is_dir():
        return names
    images.mkdir()
    names.mkdir()
    draw = np.random.default_rng(0)
    for number in range(min(rows, IMAGES)):
        Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(images / f"{number}.bmp")
    for row in range(rows):
        (names / f"{row:0{path_length - len('.bmp')}}.bmp").symlink_to(images / f"{row % IMAGES}.bmp")
    return names


def recipe(folder: Path, *, rows: int, ranks: int, path_length: int) -> dict[str, object]:
    """The configuration of both runs; a page of JSON is a page of YAML."""
    source: dict[str, object] = {"DATA_SOURCES": ["synthetic"], "NUM_SYNTHETIC": rows, "SYNTHETIC_SIZE": SIDE}
    if path_length:
        images = files(folder, rows=rows, path_length=path_length)
        source = {"DATA_SOURCES": ["disk_folder"], "DATA_PATHS": [str(images)]}
    split = {
        **source,
        "DATASET_NAMES": ["drawn"],
        "BATCHSIZE_PER_REPLICA": 256,
        "TRANSFORMS": [{"name": "ToTensor"}],
    }
    frozen = {"EVAL_MODE_ON": True, "FREEZE_TRUNK_AND_HEAD": True, "EXTRACT_TRUNK_FEATURES_ONLY": True}
    return {
        "DATA": {"TRAIN": split, "NUM_DATALOADER_WORKERS": 0},
        "MODEL": {
            "TRUNK": {"NAME": "grey_histogram", "OPTIONS": {"bins": DIM}},
            "FEATURE_EVAL_SETTINGS": frozen,
        },
        "EXTRACT_FEATURES": {"OUTPUT_DIR": str(folder / "features"), "DTYPE": "float32"},
        "CLUSTERFIT": {
            "NUM_CLUSTERS": CLUSTERS,
            "NUM_ITER": ITERATIONS,
            "CLUSTER_BACKEND": "torch",
            "FEATURES": {"PATH": str(folder / "features"), "TEST_PARTITION": ""},
        },
        "DISTRIBUTED": {"NUM_PROC_PER_NODE": ranks},
        "RUN": {"PROGRESS": "none"},
    }


def run(engine: str, name: str, folder: Path, **arguments: int) -> tuple[float, float]:
    """Peak MB of the largest process of a run, and its seconds."""
    pages = folder / "configs" / "config"
    pages.mkdir(parents=True, exist_ok=True)
    page = {"engine_name": engine, "config": recipe(folder, **arguments)}
    (pages / f"{name}.yaml").write_text(f"# @package _global_\n{json.dumps(page)}\n")
    command = [sys.executable, str(TOOL), f"config={name}", f"config.RUN.DIR={folder / name}"]
    began = time.perf_counter()
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}  # lists of files
    process = subprocess.Popen(command, cwd=folder, env=environment)
    _, status, usage = os.wait4(process.pid, 0)  # of the process and of all that it waited for
    if status:
        raise SystemExit(f"{engine} failed")
    return usage.ru_maxrss / 1024, time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    """Both runs, on few rows and on many."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--ranks", type=int, default=1, help="processes")
    parser.add_argument(
        "--path-length",
        type=int,
        default=0,
        metavar="N",
        help="characters of a file's name, 16 to 255; default no files",
    )
    arguments = parser.parse_args(argv)
    if arguments.path_length and not 16 <= arguments.path_length <= 255:
        parser.error("--path-length: 16 to 255")
    same = {"ranks": arguments.ranks, "path_length": arguments.path_length}
    print(f"{'peak MB of a process':<24}{'1,000 rows':>12}{f'{arguments.rows:,} rows':>16}{'seconds':>10}", flush=True)
    lines = []
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as full:
        for engine in ("extract_features", "cluster_features"):
            least, _ = run(engine, engine, Path(empty), rows=1000, **same)
            most, seconds = run(engine, engine, Path(full), rows=arguments.rows, **same)
            lines.append(
                f"{engine:<24}{least:12.0f}{most:16.0f}{seconds:10.0f}   goal <= {GOAL_MB}: {verdict(most <= GOAL_MB)}"
            )
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
