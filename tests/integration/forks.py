"""Runs of the command line as forks of one process that has imported torch: see fork_server.py."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Seconds after which a run counts as hanging.
PATIENCE_S = 600


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    returncode: int
    stdout: str
    stderr: str


def run_ranks(
    argv: Sequence[str],
    *,
    ranks: int = 1,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    program: Path | None = None,
    kill_after_s: Sequence[float] = (),
) -> list[Ended]:
    """Run the command as so many ranks, started as torchrun does, to their ends. `env`: further variables.

    `program`: a Python file in place of the command line. `kill_after_s`: when each rank is killed, with all processes
    that it has started.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[Path(folder, f"{name}{rank}") for name in ("stdout", "stderr")] for rank in range(ranks)]
        clients = []
        for rank, place in enumerate(_places(ranks)):
            request: dict[str, Any] = {
                "argv": list(argv),
                "cwd": str(cwd),
                "env": {**os.environ, **place, **(env or {})},
            }
            request |= {"program": str(program)} if program else {}
            request |= {"kill_after_s": kill_after_s[rank]} if kill_after_s else {}
            with open(os.devnull) as stdin, open(outputs[rank][0], "wb") as out, open(outputs[rank][1], "wb") as error:
                clients.append(_send(request, [stdin.fileno(), out.fileno(), error.fileno()]))
        codes = [_receive(client) for client in clients]
        texts = [[file.read_text(errors="replace") for file in files] for files in outputs]
    return [Ended(code, *text) for code, text in zip(codes, texts)]


def write_command(path: Path, *, program: Path | None = None) -> None:
    """Write a command that runs in a fork what it is given, where it is called. `program`: as of run_ranks."""
    further = {"program": str(program)} if program else {}
    path.write_text(f"#!{sys.executable} -IS\n{_COMMAND.format(socket=str(_server()), further=further)}")
    path.chmod(0o755)


_COMMAND = """import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
request = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ), **{further!r}}}
socket.send_fds(server, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
code = int(server.makefile().readline())
sys.exit(code if code >= 0 else 128 - code)
"""


def _send(request: dict[str, Any], streams: list[int]) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(PATIENCE_S)
    client.connect(str(_server()))
    socket.send_fds(client, [json.dumps(request).encode() + b"\n"], streams)
    return client


def _receive(client: socket.socket) -> int:
    with client, client.makefile() as answer:
        return int(answer.readline())


def _places(ranks: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**place, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@functools.cache
def _server() -> Path:
    """The socket of the process that runs are forked from; it ends with this process."""
    folder = tempfile.mkdtemp(prefix="forks_")
    path = Path(folder, "socket")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, str(HERE / "fork_server.py"), str(path)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.communicate)
    return path
