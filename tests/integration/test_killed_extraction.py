"""An extraction that is killed again and again: nothing wrong is ever used, nothing finished is computed again."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.stage_runs import start
from vissl_like.analysis.features import FeatureStore
from vissl_like.errors import DataError

IMAGES, BATCH = 300, 2
KILLS = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def options(images: Path) -> list[str]:
    return [
        "config.DATA.TRAIN.DATA_SOURCES=[counted_folder]",
        f"config.DATA.TRAIN.DATA_PATHS=[{images}]",
        "config.DATA.TRAIN.TRANSFORMS=[{name: Resize, size: [24, 24]}, {name: ToTensor}]",
        f"config.DATA.TRAIN.BATCHSIZE_PER_REPLICA={BATCH}",
        "config.MODEL.TRUNK.NAME=resnet_small",
        "config.EXTRACT_FEATURES.SHARD_ROWS=70",
        "config.MULTI_PROCESSING_METHOD=fork",
        "config.MACHINE.NUM_THREADS=1",
    ]


def finished_rows(run_dir: Path) -> set[int]:
    """Rows of the blocks that are marked as done."""
    folder = run_dir / "features" / "TRAIN"
    if (folder / "manifest.json").exists():
        return set(range(IMAGES))
    if not (folder / "done.npy").exists() or not (folder / "partial.json").exists():
        return set()
    blocks = np.flatnonzero(np.load(folder / "done.npy"))
    return {row for block in blocks for row in range(block * BATCH, min(IMAGES, (block + 1) * BATCH))}


def read_rows(counted: Path) -> list[int]:
    return [int(line) for line in counted.read_text().split()] if counted.exists() else []


def contents(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "features"
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_twenty_kills_at_random_moments(images: Path, tmp_path: Path) -> None:
    start("extract_features", tmp_path / "warm", *options(images))
    began = time.monotonic()
    assert start("extract_features", tmp_path / "reference", *options(images)).returncode == 0
    whole_s, reference = time.monotonic() - began, contents(tmp_path / "reference")
    run_dir, draw = tmp_path / "run", random.Random(0)
    kills, recomputed, rounds = 0, 0, 1
    while kills < KILLS:
        workers, ranks = (0, 2)[kills % 2], (1, 2)[kills % 4 == 3]
        done, counted = finished_rows(run_dir), tmp_path / f"counted_{kills}_{rounds}"
        moment = draw.uniform(0.1 * whole_s, whole_s)
        ended = start(
            "extract_features", run_dir, *options(images), f"config.DATA.NUM_DATALOADER_WORKERS={workers}",
            env={"COUNTED": str(counted)}, ranks=ranks, kill_after_s=[moment + 0.05 * rank for rank in range(ranks)],
        )  # fmt: skip
        again = set(read_rows(counted)) & done
        assert again <= {0}, "the first image says what shape the features have; no other is read again"
        if ended.returncode == 0:  # it was quicker than its killer
            assert contents(run_dir) == reference
            shutil.rmtree(run_dir)
            rounds += 1
            continue
        assert ended.returncode == -9, ended.stderr
        kills += 1
        recomputed += len(set(read_rows(counted)) - finished_rows(run_dir))
        if (run_dir / "features" / "TRAIN" / "manifest.json").exists():
            assert FeatureStore.open(run_dir / "features", "TRAIN").read(0, IMAGES).any(axis=1).all()
        else:
            with pytest.raises(DataError, match=r"interrupted. Run it again|no extracted features of split TRAIN"):
                FeatureStore.open(run_dir / "features", "TRAIN")
    done = start("extract_features", run_dir, *options(images))
    assert done.returncode == 0, done.stderr
    assert contents(run_dir) == reference
    print(f"{kills} kills in {rounds} rounds; rows read and lost: {recomputed}")
