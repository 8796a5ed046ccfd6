"""What the tests with forks rest on: nothing is left of runs, and no signal is lost while a process starts."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration import forks

HANGS = """
import multiprocessing, os, time

if __name__ == "__main__":
    with open("group", "w") as file:
        file.write(str(os.getpgrp()))
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(1000,))
    child.start()
    child.join()
"""
SIGNALLED = """
import multiprocessing, os, signal, time

if __name__ == "__main__":
    for _ in range(4):
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(10,))
        child.start()
        os.kill(child.pid, signal.SIGTERM)
        child.join()
        print(child.exitcode)
"""
ASKED = """
import os, signal, sys, time

signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(os.getpgrp(), flush=True)
time.sleep(1000)
"""


def test_nothing_is_left_of_a_run_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of what it has started nor of the processes that this is forked from."""
    (tmp_path / "program.py").write_text(HANGS)
    monkeypatch.setattr(forks, "PATIENCE_S", 5)
    with pytest.raises(TimeoutError):
        forks.run_ranks([], program=tmp_path / "program.py", cwd=tmp_path)
    assert_ends(int((tmp_path / "group").read_text()))


def assert_ends(group: int) -> None:
    """Wait until there is no process of this group."""
    deadline = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)


def test_a_signal_to_a_process_that_starts_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SIGNALLED)
    (done,) = forks.run_ranks([], program=tmp_path / "program.py", cwd=tmp_path)
    assert done.stdout.split() == ["-15"] * 4, done


def test_a_command_ends_with_what_it_stands_for(tmp_path: Path) -> None:
    """Asked, by the handler of that; killed, with it."""
    (tmp_path / "program.py").write_text(ASKED)
    forks.write_command(tmp_path / "command", program=tmp_path / "program.py")
    for number, code in ((signal.SIGTERM, 7), (signal.SIGKILL, -9)):
        with subprocess.Popen([tmp_path / "command"], stdout=subprocess.PIPE) as command:
            assert command.stdout is not None
            group = int(command.stdout.readline())
            command.send_signal(number)
            assert command.wait(timeout=60) == code
            assert_ends(group)
