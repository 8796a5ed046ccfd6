"""Machines of a network in one: network namespaces that hang on one switch, and commands started in them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.forks import Fork

HERE = Path(__file__).parent
PATIENCE_S = 400


def why_not() -> str:
    """Why this machine cannot make network namespaces; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if shutil.which("ip") is None:
        return "the command `ip` is not installed (Debian, Ubuntu: apt install iproute2)"
    name = f"try{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode == 0:
        tried = subprocess.run(
            ["ip", "-n", name, "link", "add", "br0", "type", "bridge"], capture_output=True, text=True
        )
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return tried.stderr.strip()


@dataclass
class Host:
    """A machine. Without `namespace` it is this one."""

    address: str = "127.0.0.1"
    namespace: str = ""
    commands: list[Fork] = field(default_factory=list)

    def start(self, workdir: Path, *overrides: str, env: dict[str, str] | None = None) -> Fork:
        """Start the command line with these arguments, in a process group of its own."""
        more = {"PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1", **(env or {})}
        command = Fork(overrides, cwd=workdir, env=more, namespace=self.namespace)
        self.commands.append(command)
        return command

    def end(self) -> None:
        """Kill what still runs."""
        for command in self.commands:
            if command.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(command.pid, signal.SIGKILL)
            command.communicate()


@contextlib.contextmanager
def network(count: int) -> Iterator[list[Host]]:
    """Hosts 10.77.0.1, 10.77.0.2, ... on one switch, which is a namespace of its own; nothing else can be reached."""
    prefix = f"vl{os.getpid()}"
    switch, names = f"{prefix}s", [f"{prefix}h{k}" for k in range(1, count + 1)]
    made = []
    try:
        for name in (switch, *names):
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for k, name in enumerate(names, 1):
            _ip("-n", name, "link", "add", "net0", "type", "veth", "peer", "name", f"port{k}", "netns", switch)
            _ip("-n", switch, "link", "set", f"port{k}", "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"10.77.0.{k}/24", "dev", "net0")
            _ip("-n", name, "link", "set", "net0", "up")
        yield [Host(f"10.77.0.{k}", name) for k, name in enumerate(names, 1)]
    finally:
        for name in made:
            _ip("netns", "delete", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def outcomes(commands: list[Fork]) -> list[tuple[int | None, str, str]]:
    """(exit code, stdout, stderr) of each command, when all have ended."""
    texts = [command.communicate(timeout=PATIENCE_S) for command in commands]
    return [(command.returncode, *text) for command, text in zip(commands, texts)]
