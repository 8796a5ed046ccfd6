"""Sharded training against DDP and one process: the same course, also over restarts, kills and other numbers of processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.training_runs import assert_same_course, launch, losses, records
from tests.integration.vit_runs import launch_vit
from vissl_like.core import checkpoint

FSDP = "config.DISTRIBUTED.STRATEGY=fsdp"
RECOMPUTE = "config.MODEL.ACTIVATION_CHECKPOINTING.USE_ACTIVATION_CHECKPOINTING=true"
COMPILED = ["config.MACHINE.COMPILE=blocks", "config.MACHINE.COMPILE_BACKEND=aot_eager"]
#: No noise in the model, which would be another one on each rank. Three test batches: one rank has two of them.
QUIET = [
    "config.MODEL.TRUNK.OPTIONS.drop_path_rate=0",
    "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[auto,auto]}]]",
    "config.DATA.TEST.NUM_SYNTHETIC=40",
]


def weights(run_dir: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / "last" / f"{name}.safetensors")


def measured(run_dir: Path) -> list[float]:
    lines = [line for line in records(run_dir) if line["kind"] == "test"]
    return [line[key] for line in lines for key in ("test_loss", "test_ema_loss")]


def assert_close(run_dir: Path, reference: Path, *, tolerance: float) -> None:
    assert losses(run_dir) == pytest.approx(losses(reference), rel=tolerance)
    assert measured(run_dir) == pytest.approx(measured(reference), rel=tolerance)
    for name in ("model", "ema"):
        ours, theirs = weights(run_dir, name), weights(reference, name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=10 * tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed training by one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    done = launch_vit(run_dir, *QUIET)
    assert done.returncode == 0, done.stderr
    assert len(losses(run_dir)) == 12
    return run_dir


def test_sharded_equals_ddp_and_one_process(tmp_path: Path) -> None:
    """By SGD: Adam makes steps of full size from gradients that are rounding errors. The sharded one accumulates, too."""
    sgd = [*QUIET, "config.OPTIMIZER.NAME=sgd", "config.OPTIMIZER.PARAM_SCHEDULERS.LR.START_VALUE=0.02"]
    halves = ["config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=2", "config.OPTIMIZER.ACCUMULATE_STEPS=2"]
    for name, options, ranks in (("one", [], 1), ("ddp", [], 2), ("fsdp", [FSDP, *halves], 2)):
        done = launch_vit(tmp_path / name, *sgd, *options, ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "fsdp", tmp_path / "ddp", tolerance=1e-4)
    assert_close(tmp_path / "fsdp", tmp_path / "one", tolerance=1e-4)
    files = set(os.listdir(tmp_path / "fsdp" / "checkpoints" / "last"))
    assert {"training.rank_00000.safetensors", "training.rank_00001.safetensors", "model.safetensors"} <= files
    assert not [name for name in files if name.startswith("weights.")]


def test_processes_and_strategy_change_on_the_way(tmp_path: Path, alone: Path) -> None:
    """Sharded over two, one process, DDP, sharded again; AdamW, so that its state is taken apart and joined."""
    run_dir = tmp_path / "run"
    for options, ranks in (([FSDP], 2), ([], 1), ([], 2)):
        stopped = launch_vit(run_dir, *QUIET, *options, ranks=ranks, env={"SIGNAL_AFTER": "2"})
        assert stopped.returncode == 75, stopped.stderr
    done = launch_vit(run_dir, *QUIET, FSDP, ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(run_dir) == pytest.approx(losses(alone), rel=2e-3)
    assert measured(run_dir) == pytest.approx(measured(alone), rel=2e-3)


def test_killed_while_saving(tmp_path: Path) -> None:
    """With all noise: whatever strikes a rank while files are written, the course is that of an undisturbed training."""
    assert launch_vit(tmp_path / "reference", FSDP, ranks=2).returncode == 0
    run_dir = tmp_path / "run"
    for step in (4, 8):
        killed = launch_vit(run_dir, FSDP, ranks=2, env={"KILL_WHILE_SAVING": str(step), "WATCHED": str(run_dir)})
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert list((run_dir / "checkpoints").glob(".saving-*"))
        saved = checkpoint.newest(run_dir)
        assert saved is not None and saved.step >= step - 2
    done = launch_vit(run_dir, FSDP, ranks=2)
    assert done.returncode == 0, done.stderr
    assert_same_course(run_dir, tmp_path / "reference")
    part = run_dir / "checkpoints" / "last" / "training.rank_00001.safetensors"
    os.truncate(part, part.stat().st_size - 1)
    saved = checkpoint.newest(run_dir)
    assert saved is not None and saved.step < 12


def test_ddp_killed_while_saving_goes_on_with_one_process(tmp_path: Path, alone: Path) -> None:
    run_dir = tmp_path / "run"
    env = {"KILL_WHILE_SAVING": "6", "WATCHED": str(run_dir)}
    killed = launch_vit(run_dir, *QUIET, ranks=2, env=env)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = launch_vit(run_dir, *QUIET)
    assert done.returncode == 0, done.stderr
    assert losses(run_dir) == pytest.approx(losses(alone), rel=2e-3)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (["config.MACHINE.PRECISION=bf16"], 0.03),
        (["config.MACHINE.PRECISION=fp16"], 0.01),
        (["config.MODEL.FEATURE_EVAL_SETTINGS.FREEZE_TRUNK_ONLY=true"], 1e-4),
        (["config.OPTIMIZER.NAME=lars"], 1e-3),
    ],
    ids=lambda value: value[0].rpartition(".")[2] if isinstance(value, list) else "",
)
def test_sharded_in_half_precision_frozen_or_by_lars(tmp_path: Path, options: list[str], tolerance: float) -> None:
    short = [*QUIET, "config.OPTIMIZER.NUM_EPOCHS=1", *options]
    recompute = [] if "lars" in options[0] else [RECOMPUTE]
    for name, more in (("ddp", []), ("fsdp", [FSDP, *recompute])):
        done = launch_vit(tmp_path / name, *short, *more, ranks=2)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ddp"), rel=tolerance)
    assert measured(tmp_path / "fsdp") == pytest.approx(measured(tmp_path / "ddp"), rel=tolerance)


def test_sharded_resnet_with_batch_normalisation(tmp_path: Path) -> None:
    """Statistics of rank 0 are saved and tested, as with DDP."""
    small = [
        "config.OPTIMIZER.NUM_EPOCHS=1",
        "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=4",
        "config.DATA.TEST.NUM_SYNTHETIC=40",
    ]
    quiet = "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[auto,auto]}]]"
    for name, options in (("ddp", []), ("fsdp", [FSDP, RECOMPUTE])):
        done = launch(tmp_path / name, *small, quiet, *options, ranks=2)
        assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "fsdp", tmp_path / "ddp", tolerance=1e-4)


def test_recomputed_compiled_and_sharded_at_once(tmp_path: Path) -> None:
    """With dropout and stochastic depth: what is computed again draws the same numbers."""
    short = ["config.OPTIMIZER.NUM_EPOCHS=1", "config.TEST_MODEL=false"]  # a test is another program
    for name, options in (("plain", []), ("all", [FSDP, RECOMPUTE, *COMPILED])):
        done = launch_vit(tmp_path / name, *short, *options, ranks=2)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "all") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    assert weights(tmp_path / "all").keys() == weights(tmp_path / "plain").keys()
