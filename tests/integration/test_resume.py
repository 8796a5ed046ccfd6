"""A training that is killed, stopped or robbed of its newest checkpoint ends as the one that was left alone."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from tests.integration.training_runs import assert_same_course, launch, losses, records
from vissl_like.core import checkpoint

KILLS, EPOCHS = 20, 12


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed training of 3 epochs, 18 steps."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    done = launch(run_dir, "config.OPTIMIZER.NUM_EPOCHS=3", "config.CHECKPOINT.EVERY_STEPS=2")
    assert done.returncode == 0, done.stderr
    assert len(losses(run_dir)) == 18
    return run_dir


def test_killed_twenty_times_at_random_steps(tmp_path: Path) -> None:
    """Loader processes 2 and 0 alternate; kills also strike while a checkpoint is being written.

    A run that saves every other step has published a save when the next one begins, so six steps always get it on.
    """
    chance = random.Random(0)
    options = ["config.CHECKPOINT.EVERY_STEPS=2", f"config.OPTIMIZER.NUM_EPOCHS={EPOCHS}"]
    assert launch(tmp_path / "reference", *options).returncode == 0
    begun = []
    for number in range(KILLS):
        env = {"KILL_AFTER": str(chance.randint(1, 6)), "KILL_DELAY_S": str(chance.choice([0, 0, 0.005, 0.02]))}
        workers = f"config.DATA.NUM_DATALOADER_WORKERS={0 if number % 2 else 2}"
        killed = launch(tmp_path / "run", *options, workers, env=env)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        begun.append(len(losses(tmp_path / "run")))
    done = launch(tmp_path / "run", *options, "config.DATA.NUM_DATALOADER_WORKERS=2")
    assert done.returncode == 0, done.stderr
    assert begun[-1] > 10 and len(losses(tmp_path / "run")) == EPOCHS * 6, begun
    assert_same_course(tmp_path / "run", tmp_path / "reference")
    names = os.listdir(tmp_path / "run" / "checkpoints")
    assert not [name for name in names if name.startswith(".")], names


@pytest.mark.parametrize("harm", ["truncated", "deleted", "flipped"])
def test_torn_newest_checkpoint(tmp_path: Path, reference: Path, harm: str) -> None:
    run_dir = tmp_path / "run"
    options = ["config.OPTIMIZER.NUM_EPOCHS=3", "config.CHECKPOINT.EVERY_STEPS=2"]
    killed = launch(run_dir, *options, env={"KILL_AFTER": "9"})
    assert killed.returncode == -9, killed.stderr
    steps = checkpoint.saved_steps(run_dir)
    file = run_dir / "checkpoints" / checkpoint.step_name(steps[-1]) / "training.safetensors"
    if harm == "truncated":
        os.truncate(file, 100)
    elif harm == "deleted":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 64
        file.write_bytes(data)
    done = launch(run_dir, *options)
    assert done.returncode == 0, done.stderr
    assert f"{checkpoint.step_name(steps[-1])} is damaged" in done.stderr
    assert f"{checkpoint.step_name(steps[-1])} is damaged" in (run_dir / "log.txt").read_text()
    assert_same_course(run_dir, reference)


@pytest.mark.parametrize(("workers", "delay_s"), [(0, ""), (2, ""), (2, "0.5")])
def test_signal_to_everything_saves_and_resumes(tmp_path: Path, reference: Path, workers: int, delay_s: str) -> None:
    """A cluster sends SIGTERM to every process of a job, loader processes included, in no certain order."""
    run_dir = tmp_path / "run"
    options = ["config.OPTIMIZER.NUM_EPOCHS=3", f"config.DATA.NUM_DATALOADER_WORKERS={workers}"]
    stopped = launch(run_dir, *options, env={"SIGNAL_AFTER": "10", "SIGNAL_DELAY_S": delay_s or "0"})
    assert stopped.returncode == 75, stopped.stderr
    assert "SIGTERM" in stopped.stderr and "same command goes on" in stopped.stderr
    assert 10 <= checkpoint.saved_steps(run_dir)[-1] <= 13
    assert not (run_dir / "manifest.json").exists()
    done = launch(run_dir, *options)
    assert done.returncode == 0, done.stderr
    assert losses(run_dir) == losses(reference)
    assert [line for line in records(run_dir) if line["kind"] == "test"] == [
        line for line in records(reference) if line["kind"] == "test"
    ]


def test_finished_run_is_left_alone(reference: Path) -> None:
    before = (reference / "metrics.jsonl").read_bytes()
    done = launch(reference, "config.OPTIMIZER.NUM_EPOCHS=3", "config.CHECKPOINT.EVERY_STEPS=2")
    assert done.returncode == 0, done.stderr
    assert (reference / "metrics.jsonl").read_bytes() == before
