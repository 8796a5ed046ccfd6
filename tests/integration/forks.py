"""Runs of the command line as forks of one process that has imported torch: see fork_server.py."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Seconds after which a run counts as hanging.
PATIENCE_S = 300


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

    If one takes longer than PATIENCE_S, or the test is interrupted, all are killed.

    `program`: a Python file in place of the command line. `kill_after_s`: when each rank is killed, with all processes
    that it has started.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as connections:  # without one a run is killed
        outputs = [[Path(folder, f"{name}{rank}") for name in ("stdout", "stderr")] for rank in range(ranks)]
        clients = []
        for rank, place in enumerate(places(ranks)):
            request: dict[str, Any] = {
                "argv": list(argv),
                "cwd": str(cwd),
                "env": {**os.environ, **place, **(env or {})},
            }
            request |= {"program": str(program)} if program else {}
            request |= {"kill_after_s": kill_after_s[rank]} if kill_after_s else {}
            with open(os.devnull) as stdin, open(outputs[rank][0], "wb") as out, open(outputs[rank][1], "wb") as error:
                client = _send(request, [stdin.fileno(), out.fileno(), error.fileno()])
                clients.append(connections.enter_context(client))
        codes = [_receive(client) for client in clients]
        texts = [[file.read_text(errors="replace") for file in files] for files in outputs]
    return [Ended(code, *text) for code, text in zip(codes, texts)]


class Fork:
    """The command line in a fork that goes on beside the test, in a process group of its own: used as a Popen is.

    As a context manager it is killed in the end, with its group, if it still runs. `namespace`: the network that it runs in.
    """

    def __init__(
        self, argv: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None, namespace: str = ""
    ) -> None:
        request: dict[str, Any] = {"argv": list(argv), "cwd": str(cwd), "env": {**os.environ, **(env or {})}}
        request |= {"namespace": namespace} if namespace else {}
        (out, its_out), (error, its_error) = os.pipe(), os.pipe()
        with open(os.devnull) as stdin:
            self._client = _send(request, [stdin.fileno(), its_out, its_error])
        os.close(its_out)
        os.close(its_error)
        self.stdout, self.stderr = os.fdopen(out, errors="replace"), os.fdopen(error, errors="replace")
        self._answer = self._client.makefile()
        self.pid = int(self._answer.readline())
        self.returncode: int | None = None
        self._said: tuple[str, str] | None = None

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self.communicate()

    def poll(self) -> int | None:
        """The exit code if it has ended."""
        if self.returncode is None and select.select([self._client], [], [], 0)[0]:
            self.returncode = int(self._answer.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def communicate(self, timeout: float = PATIENCE_S) -> tuple[str, str]:
        """What it, and all that it has started, write to the end; whatever still runs after `timeout` is killed."""
        if self._said is None:
            with self.stdout, self.stderr, self._client, self._answer, ThreadPoolExecutor(2) as pool:
                try:
                    streams = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
                    self._said = (streams[0].result(timeout), streams[1].result(timeout))
                    select.select([self._client], [], [], timeout)
                    assert self.poll() is not None
                except BaseException:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self.pid, signal.SIGKILL)
                    raise
        return self._said


def write_command(path: Path, *, program: Path | None = None) -> None:
    """Write a command that runs in a fork what it is given, where it is called. `program`: as of run_ranks.

    It hands SIGINT and SIGTERM on to the fork, which ends with it.
    """
    further = {"program": str(program)} if program else {}
    path.write_text(f"#!{sys.executable} -IS\n{_COMMAND.format(socket=str(_server()), further=further)}")
    path.chmod(0o755)


_COMMAND = """import contextlib, ctypes, json, os, signal, socket, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
request = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ), **{further!r}}}
socket.send_fds(server, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
answer = server.makefile()
pid = int(answer.readline())
def hand_on(number, frame):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
for number in signal.SIGINT, signal.SIGTERM:
    signal.signal(number, hand_on)
code = int(answer.readline())
sys.exit(code if code >= 0 else 128 - code)
"""


def _send(request: dict[str, Any], streams: list[int]) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(PATIENCE_S)
    client.connect(str(_server()))
    socket.send_fds(client, [json.dumps(request).encode() + b"\n"], streams)
    return client


def _receive(client: socket.socket) -> int:
    with client.makefile() as answer:
        answer.readline()  # its process id
        return int(answer.readline())


def places(ranks: int) -> list[dict[str, str]]:
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
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # as main.py does before torch
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
