"""Small real trainings, launched with the arguments of the command line, and how to compare two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.integration.forks import Ended, run_ranks

TIMES = ("images_per_s", "data_wait_share")

#: 48 images, 6 steps an epoch, random crops, dropout in the head, momentum, an average of the weights.
SMALL = [
    "config=debug/supervised_synthetic",
    "config.PLUGINS=[kill_plugin]",
    "config.TASK.NAME=supervised_mortal",
    "config.DATA.TRAIN.NUM_SYNTHETIC=48",
    "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=8",
    "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[auto,32,auto],use_dropout:true}]]",
    "config.MODEL.EMA.ENABLED=true",
    "config.MULTI_PROCESSING_METHOD=fork",
    "config.RUN.REPORT=false",
    "config.RUN.PROGRESS=none",
]


def launch(run_dir: Path, *overrides: str, env: dict[str, str] | None = None, ranks: int = 1) -> Ended:
    """Run SMALL with these overrides, to its end; `env`: further environment variables (see kill_plugin).

    With several ranks, they are started as torchrun does; the result is that of the first one that failed.
    """
    ended = run_ranks([*SMALL, *overrides, f"config.RUN.DIR={run_dir}"], ranks=ranks, env=env)
    return next((one for one in ended if one.returncode), ended[0])


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def losses(run_dir: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in records(run_dir) if line["kind"] == "train"]


def results(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "results.json").read_text())


def assert_same_course(run_dir: Path, reference: Path) -> None:
    """Every recorded number and every bit of the final weights are equal."""
    assert records(run_dir) == records(reference)
    for name in ("model.safetensors", "ema.safetensors"):
        ours, theirs = (folder / "checkpoints" / "last" / name for folder in (run_dir, reference))
        assert load_file(ours).keys() == load_file(theirs).keys()
        assert ours.read_bytes() == theirs.read_bytes()
