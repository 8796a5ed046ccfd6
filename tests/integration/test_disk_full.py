"""A disk that fills up while a checkpoint is being saved."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.training_runs import assert_same_course, launch
from vissl_like.core import checkpoint

OPTIONS = ["config.OPTIMIZER.NUM_EPOCHS=3", "config.CHECKPOINT.KEEP=1"]
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


def test_full_disk_is_explained_and_harms_nothing(small_disk: Path, tmp_path: Path) -> None:
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
    assert launch(tmp_path / "reference", *OPTIONS).returncode == 0
    assert_same_course(run_dir, tmp_path / "reference")
