"""A disk that is full, or fills up, at every place where a run writes; and other refusals of the system."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.forks import Ended
from tests.integration.stage_runs import start
from tests.integration.training_runs import assert_same_course, launch
from vissl_like.core import checkpoint

OPTIONS = ["config.OPTIMIZER.NUM_EPOCHS=3", "config.CHECKPOINT.KEEP=1"]
FILLING = "config.TASK.NAME=supervised_filling"
#: Left free when the disk is filled: enough for lines of text, too little for weights (0.3 MB and more).
LEFT_BYTES = 100_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB in memory. Mounting one takes rights that not everybody has."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - LEFT_BYTES))
    return ballast


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images in two classes."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(120):
        folder = root / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        pixels = generator.integers(0, 100, (20, 20, 3)) + 100 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that had room for everything."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    assert launch(run_dir, *OPTIONS).returncode == 0
    return run_dir


def options(images: Path, *more: str) -> list[str]:
    return [
        *("config.DATA.TRAIN.DATA_SOURCES=[counted_folder]", f"config.DATA.TRAIN.DATA_PATHS=[{images}]"),
        "config.DATA.TRAIN.TRANSFORMS=[{name: Resize, size: [24, 24]}, {name: ToTensor}]",
        *("config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=8", "config.DATA.NUM_DATALOADER_WORKERS=0"),
        *("config.MODEL.TRUNK.NAME=resnet_small", "config.EXTRACT_FEATURES.SHARD_ROWS=50", *more),
        *(
            "config.CLUSTERFIT.NUM_CLUSTERS=4",
            "config.CLUSTERFIT.NUM_ITER=4",
            "config.CLUSTERFIT.CLUSTER_BACKEND=torch",
        ),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*.npy"))}


def assert_clear(failed: Ended, *words: str) -> None:
    """Data error: the file, what is wrong and what to do; no traceback, no half results."""
    assert failed.returncode == 3, failed.stderr
    assert "Traceback" not in failed.stderr
    for word in (*words, "same command again"):
        assert word in failed.stderr, failed.stderr


LARGE = "config.MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP=[[res2,[Identity,[]]]]"
#: engine, its results, bytes left before the start (or None: the 100th image that is opened fills the disk), the message
STAGES = [
    ("extract_features", "features", 0, "the disk is full"),  # not even the first file
    ("extract_features", "features", 200_000, "shard_00000.npy: the disk is full"),
    ("extract_features", "features", None, "manifest.json: the disk is full"),
    ("extract_label_predictions", "predictions", None, "the disk is full"),
]


@pytest.mark.parametrize(("engine", "made", "left", "words"), STAGES)
def test_stages_on_a_full_disk(
    engine: str, made: str, left: int | None, words: str, images: Path, small_disk: Path, tmp_path: Path
) -> None:
    given = options(images, LARGE) if engine == "extract_features" else options(images)
    if left is not None:
        (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - left))
    full = {"FILL": "100", "FILL_DISK": str(small_disk)} if left is None else {}
    assert_clear(start(engine, small_disk / "run", *given, env=full), words, str(small_disk / "run"))
    (small_disk / "ballast").unlink()
    done = start(engine, small_disk / "run", *given)
    assert done.returncode == 0, done.stderr
    assert start(engine, tmp_path / "reference", *given).returncode == 0
    assert contents(small_disk / "run" / made) == contents(tmp_path / "reference" / made) != {}


def test_labels_on_a_full_disk(images: Path, small_disk: Path, tmp_path: Path) -> None:
    assert start("extract_features", tmp_path / "features", *options(images)).returncode == 0
    given = options(images, f"config.CLUSTERFIT.FEATURES.PATH={tmp_path / 'features' / 'features'}")
    output = f"config.CLUSTERFIT.OUTPUT_DIR={small_disk / 'labels'}"
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    assert_clear(start("cluster_features", tmp_path / "run", *given, output), "labels.npy: the disk is full")
    assert not list((small_disk / "labels").iterdir())  # no half file stays behind
    (small_disk / "ballast").unlink()
    done = start("cluster_features", tmp_path / "run", *given, output)
    assert done.returncode == 0, done.stderr
    assert start("cluster_features", tmp_path / "reference", *given).returncode == 0
    assert contents(small_disk / "labels") == contents(tmp_path / "reference" / "clusters") != {}


def test_a_full_disk_of_two_ranks(images: Path, small_disk: Path, tmp_path: Path) -> None:
    full = {"FILL": "40", "FILL_DISK": str(small_disk)}
    failed = start("extract_features", small_disk / "run", *options(images), ranks=2, env=full)
    assert_clear(failed, "manifest.json: the disk is full")
    (small_disk / "ballast").unlink()
    counted = tmp_path / "counted"
    counting = {"COUNTED": str(counted)}
    done = start("extract_features", small_disk / "run", *options(images), ranks=2, env=counting)
    assert done.returncode == 0, done.stderr
    assert set(counted.read_text().split()) == {"0"}  # everything was there but the manifest


@pytest.mark.parametrize("step", [1, 8, 18])
def test_a_disk_that_fills_up_in_training(step: int, small_disk: Path, reference: Path) -> None:
    run_dir, full = small_disk / "run", {"FILL_AFTER": str(step), "FILL_DISK": str(small_disk)}
    failed = launch(run_dir, *OPTIONS, "config.PLUGINS=[kill_plugin,failing_plugin]", FILLING, env=full)
    assert_clear(failed, str(run_dir))
    (small_disk / "ballast").unlink()
    done = launch(run_dir, *OPTIONS, "config.PLUGINS=[kill_plugin,failing_plugin]", FILLING)
    assert done.returncode == 0, done.stderr
    assert_same_course(run_dir, reference)


def test_a_read_only_disk(images: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for engine in ("extract_features", "train"):
        failed = start(engine, small_disk / "run", *options(images))
        assert_clear(failed, f"{small_disk / 'run'}: the file system is read-only")


def test_too_many_open_files(images: Path, tmp_path: Path) -> None:
    many = options(images, "config.EXTRACT_FEATURES.SHARD_ROWS=2")
    failed = start("extract_features", tmp_path / "run", *many, env={"OPEN_FILES": "18"})
    assert_clear(failed, ".npy: this process may open no more files", "ulimit -n")
    done = start("extract_features", tmp_path / "run", *many)
    assert done.returncode == 0, done.stderr


def test_out_of_memory(tmp_path: Path) -> None:
    plugins = "config.PLUGINS=[kill_plugin,failing_plugin]"
    failed = launch(tmp_path / "run", *OPTIONS, plugins, FILLING, env={"ALLOCATE_AFTER": "8"})
    assert failed.returncode == 2 and "Traceback" not in failed.stderr, failed.stderr
    assert "out of memory on this machine" in failed.stderr and "BATCHSIZE_PER_REPLICA" in failed.stderr
    assert "can't allocate memory" in (tmp_path / "run" / "log.txt").read_text()
    assert checkpoint.saved_steps(tmp_path / "run") == [6]


def test_full_disk_is_explained_and_harms_nothing(small_disk: Path, reference: Path) -> None:
    run_dir = small_disk / "run"
    killed = launch(run_dir, *OPTIONS, "config.CHECKPOINT.ASYNC=false", env={"KILL_AFTER": "8"})
    assert killed.returncode == -9, killed.stderr
    assert checkpoint.saved_steps(run_dir) == [6]

    ballast = fill(small_disk)
    failed = launch(run_dir, *OPTIONS)
    assert failed.returncode == 3, failed.stderr
    assert "no room to save a checkpoint" in failed.stderr and "older ones are intact" in failed.stderr
    assert "Traceback" not in failed.stderr
    saved = checkpoint.newest(run_dir)
    assert saved is not None and saved.step == 6
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["best", "last", "step_00000006"]

    ballast.unlink()
    done = launch(run_dir, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert_same_course(run_dir, reference)
