"""What a batch job runs on each node: the ordinary command, and what becomes of it when SLURM wants the node back.

submitit carries a NodeCommand to the node, calls it there, and calls its `checkpoint` on the signal that comes before a
time limit or a preemption. SLURM sends its signals to every process of a job, the command's own processes included.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vissl_like.errors import EXIT_DONE, EXIT_STOPPED
from vissl_like.launch.allocation import expand, port_for
from vissl_like.launch.folder import LAUNCH_FILE, read_json

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

_SHELL = 128
#: Exit codes of a command that was asked to stop: it saved, or the signal came before there was anything to save.
_STOPPED = (EXIT_STOPPED, _SHELL + signal.SIGTERM, _SHELL + signal.SIGUSR1)
_TAIL_BYTES = 2**16


@dataclass
class NodeCommand:
    """The command of one run on one node of a job; plain values only, since it travels to the node as a file.

    `argv` follows the program's name, `port` 0 stands for one that follows from the job's number, `patience_s` is how
    long the command may take to save, `before` what RUN.DIR said about its last start when the job was submitted.
    """

    argv: list[str]
    cwd: str
    run_dir: str
    num_nodes: int
    port: int
    patience_s: float
    before: str
    _process: subprocess.Popen[bytes] | None = dataclasses.field(default=None, init=False, repr=False)

    def __call__(self) -> None:
        """Run the command to its end. Exits with its exit code if it failed; a stopped one is queued again by SLURM."""
        from submitit import JobEnvironment
        from submitit.core.utils import UncompletedJobError

        place = JobEnvironment()
        log = Path(place.paths.stdout)
        begin = log.stat().st_size if log.exists() else 0
        signal.signal(signal.SIGTERM, self._hand_on)
        command = [sys.executable, "-m", "vissl_like.launch.main", *self.argv, *self._added(place)]
        _say(f"job {place.job_id}, node {place.global_rank} of {self.num_nodes} ({place.hostname}): starting")
        self._process = subprocess.Popen(command, cwd=self.cwd, stdin=subprocess.DEVNULL, preexec_fn=_deaf_to_submitit)
        try:
            code = _wait(self._process.pid)
            if code in _STOPPED and _is_preempted(place):
                signal.raise_signal(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"))  # submitit queues the job again
        except UncompletedJobError as error:  # raised by submitit where the signal met us
            _say(f"{str(error).rstrip('.')} (config.SLURM.MAX_REQUEUES). The same command, submitted again, goes on.")
            sys.exit(EXIT_STOPPED)
        except KeyboardInterrupt:
            self._hand_on(signal.SIGTERM)
            sys.exit(_wait(self._process.pid))
        assert code is not None
        _end(code, node=place.global_rank, log=log, begin=begin)

    def checkpoint(self) -> DelayedSubmission:
        """Let the command save and end; returns what the job runs when its turn comes again.

        A command that has ended by itself in the meantime ends the job instead.
        """
        from submitit import JobEnvironment
        from submitit.core.utils import DelayedSubmission

        self._hand_on(signal.SIGTERM)
        code = _wait(self._process.pid, seconds=self.patience_s) if self._process else EXIT_STOPPED
        if code is None:
            _say(f"the command did not end within {self.patience_s:g} s; what it saved before is used")
        elif code not in _STOPPED:
            place = JobEnvironment()
            _end(code, node=place.global_rank, log=Path(place.paths.stdout), begin=0)
            sys.exit(EXIT_DONE)
        _say("back into the queue; the run will go on from its last save")
        return DelayedSubmission(dataclasses.replace(self))

    def _added(self, place: Any) -> list[str]:
        """Overrides for this node, and for a run that this job has begun before."""
        added = []
        if self.num_nodes > 1:
            host = "localhost" if place.cluster == "local" else expand(os.environ["SLURM_STEP_NODELIST"])[0]
            added += [
                f"config.DISTRIBUTED.NUM_NODES={self.num_nodes}",
                f"config.DISTRIBUTED.ENDPOINT='{host}:{self.port or port_for(int(place.raw_job_id))}'",
                f"config.DISTRIBUTED.NODE_ID={place.global_rank}",
            ]
        if place.global_rank == 0 and started(Path(self.cwd, self.run_dir)) != self.before:
            added += ["config.RUN.OVERWRITE=false", "config.CHECKPOINT.AUTO_RESUME=true"]
        return added

    def _hand_on(self, number: int, frame: FrameType | None = None) -> None:
        if self._process is not None and _wait(self._process.pid, seconds=0) is None:
            os.kill(self._process.pid, signal.SIGTERM)


def started(run_dir: Path) -> str:
    """When a run was last started in this folder; "" for never."""
    return str(read_json(run_dir / LAUNCH_FILE).get("started", ""))


def state_of(job_id: str) -> str:
    """PENDING, RUNNING, ... of a job that SLURM still knows; "" if it does not, or if nobody can be asked."""
    command = ["squeue", "--noheader", "--jobs", job_id, "--format", "%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def _is_preempted(place: Any) -> bool:
    """Whether the signal that stopped the command came from SLURM's wish to run the job later: a cancelled job has ended."""
    return place.cluster == "slurm" and place.global_rank == 0 and state_of(place.raw_job_id) == "RUNNING"


def _deaf_to_submitit() -> None:
    """In the command and all its processes: SLURM sends them submitit's signal too, which would end them unsaved."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _wait(pid: int, *, seconds: float | None = None) -> int | None:
    """The exit code of a child as a shell gives it; None if it still runs after `seconds`.

    It leaves the child for others to wait for: a signal's handler does so while the code below it waits, too.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    while (ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)) is None:
        if deadline is not None and time.monotonic() >= deadline:
            return None
        time.sleep(0.1)
    return ended.si_status if ended.si_code == os.CLD_EXITED else _SHELL + ended.si_status


def _end(code: int, *, node: int, log: Path, begin: int) -> None:
    """Say how the command ended, and exit with its code where the job must not count as done."""
    if code == EXIT_DONE:
        _say("finished")
    elif code in _STOPPED and node:
        _say("stopped by a signal; the first node says what becomes of the job")
    elif code in _STOPPED:
        _say("stopped by a signal; the same command, submitted again, goes on from the last save")
        sys.exit(code)
    else:
        last = _last_error(log, begin)
        _say(f"the command ended with exit code {code}" + (f": {last}" if last else ""))
        sys.exit(code)


def _last_error(log: Path, begin: int) -> str:
    """The last line of this start's log that begins with `error:`."""
    try:
        with open(log, "rb") as file:
            file.seek(max(begin, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.startswith("error: ")), "")


def _say(text: str) -> None:
    print(f"[job] {text}", flush=True)
