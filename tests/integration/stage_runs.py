"""Runs of any engine with the arguments of the command line, by one or several ranks, which may be killed on the way.

Each rank is a fork of a process that has imported torch once (fork_server.py), in the environment that torchrun gives.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.integration.training_runs import ROOT, Ended

QUIET = ["config.PLUGINS=[failing_plugin]", "config.RUN.REPORT=false", "config.RUN.PROGRESS=none"]


def start(
    engine: str,
    run_dir: Path,
    *overrides: str,
    env: Mapping[str, str] | None = None,
    ranks: int = 1,
    kill_after_s: Sequence[float] = (),
) -> Ended:
    """Run an engine to its end; the exit code and output are those of the first rank. `kill_after_s`: when each
    rank is killed with all processes that it has started.
    """
    argv = [f"engine_name={engine}", *QUIET, *overrides, f"config.RUN.DIR={run_dir}"]
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(ranks):
            request: dict[str, Any] = {name: os.path.join(folder, f"{name}{rank}") for name in ("stdout", "stderr")}
            request |= {"kill_after_s": kill_after_s[rank]} if kill_after_s else {}
            request |= {"argv": argv, "env": {**_place(rank, ranks), **(env or {})}}
            process = _server(rank)
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        codes = [int(_server(rank).stdout.readline()) for rank in range(ranks)]  # type: ignore[union-attr]
        text = [Path(folder, f"{name}0").read_text(errors="replace") for name in ("stdout", "stderr")]
        return Ended(codes[0], *text)


_ports: list[int] = []


def _place(rank: int, ranks: int) -> dict[str, str]:
    """What torchrun would tell this rank."""
    if ranks == 1:
        return {}
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            _ports.append(free.getsockname()[1])
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return {
        **size,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_ports[-1]),
    }


@functools.cache
def _server(rank: int) -> subprocess.Popen[str]:
    """Ends when its stdin is closed, with this process."""
    paths = f"{ROOT}{os.pathsep}{Path(__file__).parent}"
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
