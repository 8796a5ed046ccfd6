"""Small real trainings, launched as a user would, and how to compare two of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ENTRY = ROOT / "tools" / "run_distributed_engines.py"
TIMES = ("images_per_s", "data_wait_share")

#: 48 images, 6 steps an epoch, random crops, dropout in the head, momentum, an average of the weights.
SMALL = [
    "config=debug/supervised_synthetic",
    "config.PLUGINS=[kill_plugin]",
    "config.TASK.NAME=supervised_mortal",
    "config.DATA.TRAIN.NUM_SYNTHETIC=48",
    "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=8",
    'config.MODEL.HEAD.PARAMS=[["mlp",{"dims":[auto,32,auto],"use_dropout":true}]]',
    "config.MODEL.EMA.ENABLED=true",
    "config.MULTI_PROCESSING_METHOD=fork",
    "config.RUN.REPORT=false",
    "config.RUN.PROGRESS=none",
]


def environment(**more: str) -> dict[str, str]:
    """What a run sees: this tree, the plugin, one thread, no test settings of an outer run."""
    paths = f"{ROOT}{os.pathsep}{Path(__file__).parent}"
    kept = {key: value for key, value in os.environ.items() if key not in ("KILL_AFTER", "SIGNAL_AFTER")}
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"} | more


def launch(run_dir: Path, *overrides: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run SMALL with these overrides to its end, in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ENTRY), *SMALL, *overrides, f"config.RUN.DIR={run_dir}"],
        cwd=ROOT,
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in records(run_dir) if line["kind"] == "train"]


def assert_same_course(run_dir: Path, reference: Path) -> None:
    """Every recorded number and every bit of the final weights are equal."""
    assert records(run_dir) == records(reference)
    for name in ("model.safetensors", "ema.safetensors"):
        ours, theirs = (folder / "checkpoints" / "last" / name for folder in (run_dir, reference))
        assert load_file(ours).keys() == load_file(theirs).keys()
        assert ours.read_bytes() == theirs.read_bytes()
