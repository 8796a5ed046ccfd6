"""Small real trainings, launched with the arguments of the command line, and how to compare two of them."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
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


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    returncode: int
    stdout: str
    stderr: str


def launch(run_dir: Path, *overrides: str, env: dict[str, str] | None = None, ranks: int = 1) -> Ended:
    """Run SMALL with these overrides, to its end; `env`: further environment variables (see kill_plugin).

    With several ranks, they are started as torchrun does; the result is that of the first one that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        argv = [*SMALL, *overrides, f"config.RUN.DIR={run_dir}"]
        output = [
            {name: os.path.join(folder, f"{name}{rank}") for name in ("stdout", "stderr")} for rank in range(ranks)
        ]
        for rank, environment in enumerate(_environments(ranks)):
            process = _server(rank)
            assert process.stdin is not None
            request = {"argv": argv, "env": {**environment, **(env or {})}, **output[rank]}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        codes = [int(_server(rank).stdout.readline()) for rank in range(ranks)]  # type: ignore[union-attr]
        number = next((rank for rank, code in enumerate(codes) if code), 0)
        text = {name: Path(file).read_text(errors="replace") for name, file in output[number].items()}
        return Ended(codes[number], text["stdout"], text["stderr"])


def _environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**place, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@functools.cache
def _server(number: int) -> subprocess.Popen[str]:
    """A process that runs are forked from; it ends when its stdin is closed, with this process."""
    paths = f"{ROOT}{os.pathsep}{Path(__file__).parent}"
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


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
