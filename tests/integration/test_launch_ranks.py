"""Several processes, signals and torchrun, by the real command."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.forks import Ended, Fork, places, run_ranks, write_command

HERE = Path(__file__).parent
TOOL = HERE.parents[1] / "tools/run_distributed_engines.py"
ENDINGS = ["engine_name=endings", "config.PLUGINS=[launch_plugin]", "config.RUN.REPORT=false", "config.RUN.DIR=a"]
TWO = "config.DISTRIBUTED.NUM_PROC_PER_NODE=2"
CPU = "config.MACHINE.DEVICE=cpu"
INTERRUPTED = "interrupted: nothing more was saved; start the same command again to go on."
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}


def run_afresh(workdir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, as a user starts it."""
    return subprocess.run(
        [sys.executable, *words], cwd=workdir, env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )


def finish(workdir: Path, *overrides: str) -> Ended:
    """A launch to its end."""
    (done,) = run_ranks([*ENDINGS, CPU, *overrides], cwd=workdir, env=ENVIRONMENT)
    return done


@pytest.fixture
def started() -> Iterator[list[Fork | subprocess.Popen[str]]]:
    """Commands that a test has started; what is left of them is ended afterwards."""
    commands: list[Fork | subprocess.Popen[str]] = []
    yield commands
    for one in commands:
        if one.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
        one.communicate()


def start(started: list[Fork | subprocess.Popen[str]], workdir: Path, *overrides: str) -> Fork:
    """Start a run and wait until all its ranks listen for signals (or sleep)."""
    command = Fork([*ENDINGS, CPU, *overrides], cwd=workdir, env=ENVIRONMENT)
    started.append(command)
    ranks = 2 if TWO in overrides else 1
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and command.poll() is None:
        lines = (workdir / "a/started.txt").read_text().splitlines() if (workdir / "a/started.txt").exists() else []
        if len(lines) == ranks and (workdir / "a/listening").exists():
            time.sleep(0.5)  # the other rank is about to listen
            return command
        time.sleep(0.1)
    raise AssertionError(f"did not start: {command.communicate()}")


def test_a_mistake_on_one_rank_reaches_the_terminal_as_itself(tmp_path: Path) -> None:
    done = finish(tmp_path, TWO, "config.RUN.NAME=mistake")
    assert done.returncode == 3
    assert done.stderr.strip().splitlines()[-1] == "error: config.DATA: these images are wrong."
    assert "Traceback" not in done.stderr and not (tmp_path / "a/manifest.json").exists()


def test_a_defect_on_one_rank_names_its_place(tmp_path: Path) -> None:
    done = finish(tmp_path, TWO, "config.RUN.NAME=defect")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ZeroDivisionError on rank 1: oops (") and "launch_plugin.py:" in last
    assert "Traceback" not in done.stderr and "ZeroDivisionError: oops" in (tmp_path / "a/log.txt").read_text()


def test_a_killed_rank_ends_the_run_with_its_cause_and_the_run_goes_on(tmp_path: Path) -> None:
    done = finish(tmp_path, TWO, "config.RUN.NAME=killed")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: rank 1 was killed by signal 9 (SIGKILL)") and "to resume" in last
    (tmp_path / "a/started.txt").unlink()
    again = run_afresh(tmp_path, str(TOOL), *ENDINGS, CPU, TWO)
    assert again.returncode == 0 and "continuing endings in a" in again.stderr
    assert "results: loss=0.5, ranks=2" in again.stdout
    assert json.loads((tmp_path / "a/results.json").read_text())["ranks"] == 2
    who = [line.split(",")[0] for line in (tmp_path / "a/started.txt").read_text().splitlines()]
    assert sorted(who) == ["0 of 2", "1 of 2"]
    assert not (tmp_path / "a/.errors").exists()
    assert json.loads((tmp_path / "a/manifest.json").read_text())["complete"]


def test_a_signal_is_handed_on_and_the_ranks_save(started: list[Fork | subprocess.Popen[str]], tmp_path: Path) -> None:
    """SIGTERM; SIGUSR1: test_nodes."""
    command = start(started, tmp_path, TWO, "config.RUN.NAME=stop")
    command.send_signal(signal.SIGTERM)
    _, error = command.communicate(timeout=60)
    assert command.returncode == 75
    assert error.strip().splitlines()[-1] == "stopped by SIGTERM after step 1."


def test_a_signal_before_anything_can_be_saved(started: list[Fork | subprocess.Popen[str]], tmp_path: Path) -> None:
    command = start(started, tmp_path, TWO, "config.RUN.NAME=deaf")
    command.send_signal(signal.SIGTERM)
    _, error = command.communicate(timeout=60)
    assert command.returncode == 128 + signal.SIGTERM
    assert "ended by SIGTERM while starting" in error and "Traceback" not in error


@pytest.mark.parametrize("processes", [TWO, "config.DISTRIBUTED.NUM_PROC_PER_NODE=1"])
def test_a_signal_while_the_run_starts_is_not_lost(
    started: list[Fork | subprocess.Popen[str]], tmp_path: Path, processes: str
) -> None:
    command = subprocess.Popen(
        [sys.executable, str(TOOL), *ENDINGS, "config.MACHINE.DEVICE=cpu", "config.RUN.NAME=deaf", processes],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started.append(command)
    assert command.stderr is not None
    for line in command.stderr:
        if line.startswith("starting endings"):
            break
    command.send_signal(signal.SIGTERM)
    _, error = command.communicate(timeout=100)
    assert command.returncode == 128 + signal.SIGTERM
    assert "ended by SIGTERM while starting: nothing new was saved" in error and "Traceback" not in error


def test_ctrl_c_saves_where_the_loop_listens(started: list[Fork | subprocess.Popen[str]], tmp_path: Path) -> None:
    command = start(started, tmp_path, "config.RUN.NAME=stop")
    command.send_signal(signal.SIGINT)
    _, error = command.communicate(timeout=60)
    assert command.returncode == 75 and "press Ctrl-C again" in error
    assert error.strip().splitlines()[-1] == "stopped by SIGINT (Ctrl-C) after step 1."


@pytest.mark.parametrize(
    ("processes", "to_all"), [(TWO, True), ("config.DISTRIBUTED.NUM_PROC_PER_NODE=1", False)], ids=["terminal", "one"]
)
def test_ctrl_c_again_after_the_save_is_a_stop_all_the_same(
    started: list[Fork | subprocess.Popen[str]], tmp_path: Path, processes: str, to_all: bool
) -> None:
    """A terminal sends Ctrl-C to every process."""
    command = start(started, tmp_path, processes, "config.RUN.NAME='slow stop'")
    press = functools.partial(os.killpg if to_all else os.kill, command.pid, signal.SIGINT)
    press()
    deadline = time.monotonic() + 60
    while "0" not in ((tmp_path / "a/saved").read_text() if (tmp_path / "a/saved").exists() else ""):
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.02)
    while command.poll() is None:  # to the very end
        with contextlib.suppress(ProcessLookupError):
            press()
        time.sleep(0.05)
    _, error = command.communicate(timeout=60)
    assert command.returncode == 75, error
    assert error.strip().splitlines()[-1] == "stopped by SIGINT (Ctrl-C) after step 1." and "Traceback" not in error


def test_ctrl_c_elsewhere_ends_the_run(started: list[Fork | subprocess.Popen[str]], tmp_path: Path) -> None:
    command = start(started, tmp_path, "config.RUN.NAME=deaf")
    command.send_signal(signal.SIGINT)
    _, error = command.communicate(timeout=60)
    assert command.returncode == 130 and "interrupted" in error and "Traceback" not in error


#: The command as torchrun starts it: two processes, the agent's store.
TORCHRUN = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def torchrun(workdir: Path, *overrides: str) -> Ended:
    """torchrun and what it starts, as forks."""
    write_command(workdir / "tool", program=TOOL)
    program = importlib.util.find_spec("torch.distributed.run")
    assert program is not None and program.origin is not None
    words = [*TORCHRUN, "--no-python", str(workdir / "tool"), *ENDINGS, *overrides]
    (done,) = run_ranks(words, cwd=workdir, env=ENVIRONMENT, program=Path(program.origin))
    return done


def test_an_environment_of_torchrun_is_recognised(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", *TORCHRUN, str(TOOL), *ENDINGS]
    done = run_afresh(tmp_path, *command, "config.DISTRIBUTED.NUM_PROC_PER_NODE=5")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a/results.json").read_text())["ranks"] == 2
    plan = json.loads((tmp_path / "a/plan.json").read_text())
    assert plan["values"]["world_size"] == 2
    assert {"key": "machines x processes", "given": "1 x 5", "used": "1 x 2", "reason": "started by torchrun"} in plan[
        "rows"
    ]
    again = torchrun(tmp_path)
    assert again.returncode == 0 and again.stderr.count("this run is finished") == 1


def test_a_wrong_configuration_ends_all_processes_of_torchrun(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "config.SEED_VALU=1")
    assert done.returncode != 0
    assert done.stderr.count("unknown key config.SEED_VALU; did you mean config.SEED_VALUE?") == 1
    assert not (tmp_path / "a").exists()
    assert not processes_in(tmp_path)


def processes_in(folder: Path) -> list[str]:
    """Ids of the processes that work in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            if (process / "cwd").readlink() == folder.resolve():
                found.append(process.name)
    return found


def test_processes_that_torchrun_did_not_start_meet_without_its_store(tmp_path: Path) -> None:
    """RANK, WORLD_SIZE, MASTER_ADDR ... set by a scheduler: the first process serves the store."""
    done = run_ranks([*ENDINGS, CPU], ranks=2, cwd=tmp_path)
    assert [rank.returncode for rank in done] == [0, 0], done
    assert json.loads((tmp_path / "a/results.json").read_text())["ranks"] == 2
    again = run_ranks([*ENDINGS, CPU], ranks=2, cwd=tmp_path)
    assert [rank.returncode for rank in again] == [0, 0] and "this run is finished" in again[0].stderr
    wrong = run_ranks([*ENDINGS, CPU, "config.SEED_VALU=1"], ranks=2, cwd=tmp_path)
    assert [rank.returncode for rank in wrong] == [2, 2] and "Traceback" not in wrong[1].stderr


def test_the_first_process_does_not_wait_for_long_where_another_never_comes(
    started: list[Fork | subprocess.Popen[str]], tmp_path: Path
) -> None:
    """It serves the store, so it stays until the others know that there is nothing to run; Ctrl-C ends that."""
    wrong = [*ENDINGS, CPU, "config.SEED_VALU=1"]
    first = Fork(wrong, cwd=tmp_path, env={**ENVIRONMENT, **places(2)[0]})
    started.append(first)
    said = list(itertools.takewhile(lambda line: "waiting at most 30 s for 1 of 2 processes" not in line, first.stderr))
    assert "unknown key config.SEED_VALU" in "".join(said)
    first.send_signal(signal.SIGINT)
    _, error = first.communicate()
    assert first.returncode == 130 and error.splitlines() == [INTERRUPTED]


def test_ctrl_c_while_composing_waits_for_nobody(started: list[Fork | subprocess.Popen[str]], tmp_path: Path) -> None:
    interrupted = {**ENVIRONMENT, **places(2)[0], "INTERRUPT_WHILE_COMPOSING": "1"}
    first = Fork([*ENDINGS, CPU], cwd=tmp_path, env=interrupted)
    started.append(first)
    _, error = first.communicate(timeout=100)
    assert first.returncode == 130 and error.splitlines() == [INTERRUPTED]
