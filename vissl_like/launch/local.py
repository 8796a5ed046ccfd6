"""Start a job on this machine: in this process, in several, or as one of the processes that torchrun started.

The configuration was composed and checked once; ranks read it from the run folder. Several local processes are started
through torch elastic's in-process API. Machines beyond this one join where torchrun starts the processes: that is the
one place that knows about them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from vissl_like.config.components import load_plugins
from vissl_like.config.plan import Plan, make_plan, table
from vissl_like.config.saved import read_job
from vissl_like.config.schema import Job
from vissl_like.errors import ConfigError, DataError, Stopped, UserError
from vissl_like.launch import folder, logs, torchrun
from vissl_like.launch.folder import LaunchInfo
from vissl_like.launch.inputs import check_inputs, check_transforms
from vissl_like.launch.machine import Processes, processes_for, started_by_torchrun, write_environment
from vissl_like.launch.rank import (
    ERRORS_DIR,
    RUNS_IN_LAUNCHER,
    STOPPED,
    RunFailed,
    as_exception,
    left_words,
    place_of,
    run_engine,
    run_rank,
)

__all__ = ["Interrupted", "LaunchInfo", "RunFailed", "launch", "plan_for"]

log = logging.getLogger(__name__)

#: Seconds that ranks have to end after one of them failed, before they are killed.
_GRACE_S = 10


class Interrupted(Exception):
    """A signal ended the run while it started. The exit code is the shell's: 128 + number of the signal."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"ended by {name} while starting: nothing new was saved; what was saved before is kept.")
        self.exit_code = 128 + number


def launch(job: Job, run_dir: Path | str, info: LaunchInfo) -> dict[str, Any]:
    """Run a checked job in its folder and return its results. A finished run of the same job is not repeated.

    Raises UserError for what the user can mend, Stopped after a signal and a save, RunFailed for a killed rank or a defect.
    """
    run_dir = Path(run_dir)
    job = folder.with_run_dir(job, run_dir)
    load_plugins(job.config.PLUGINS)
    check_inputs(job)
    processes = processes_for(job.config)
    job, plan = plan_for(job, processes)
    folder.check_reuse(job, plan, run_dir)
    results = folder.finished(job, run_dir) if folder.is_run(run_dir) else None
    if results is not None:
        log.info("%s: this run is finished; its results are in %s", run_dir, folder.RESULTS_FILE)
        return results
    _check_start(job, processes)
    check_transforms(job)
    is_continued = folder.is_run(run_dir) and not job.config.RUN.OVERWRITE
    folder.make(run_dir)
    with folder.occupied(run_dir):
        folder.prepare(job, plan, run_dir, info)
        with logs.to_file(run_dir), _ended_by_signals():
            for note in info.notes:
                logs.to_file_only(note)
            _announce(job, plan, run_dir, is_continued=is_continued)
            return _run_to_the_end(job, plan, run_dir)


def _run_to_the_end(job: Job, plan: Plan, run_dir: Path) -> dict[str, Any]:
    """Run, and write down results, manifest and report."""
    write_environment(run_dir)
    began = time.monotonic()
    results = _run(job, plan, run_dir)
    seconds = time.monotonic() - began
    try:
        folder.complete(job, plan, run_dir, results=results, seconds=seconds)
    except OSError as error:
        raise DataError(f"{run_dir}: the results cannot be written ({error}). Mend that and start again.") from error
    _write_report(job, run_dir)
    log.info("finished in %.1f s: %s", seconds, run_dir)
    return results


def plan_for(job: Job, processes: Processes, num_train: int | None = None) -> tuple[Job, Plan]:
    """The job with the processes that it really has, and its plan with a row about every value that was inferred."""
    given = job.config.DISTRIBUTED
    if started_by_torchrun():
        nodes = max(1, processes.world // processes.local)
        distributed = given.model_copy(update={"NUM_NODES": nodes, "NUM_PROC_PER_NODE": processes.local})
        job = job.model_copy(update={"config": job.config.model_copy(update={"DISTRIBUTED": distributed})})
    plan = make_plan(
        job.config,
        num_processes=processes.world,
        device=processes.device,
        num_train=num_train,
        engine_name=job.engine_name,
    )
    if job.config.DISTRIBUTED != given:
        before = f"{given.NUM_NODES} x {given.NUM_PROC_PER_NODE}"
        now = f"{job.config.DISTRIBUTED.NUM_NODES} x {processes.local}"
        plan = plan.with_row("machines x processes", before, now, "started by torchrun")
    return job, plan


def _check_start(job: Job, processes: Processes) -> None:
    """What can be composed, checked and planned, but not started like this."""
    options = job.config.DISTRIBUTED
    if started_by_torchrun() and job.engine_name in RUNS_IN_LAUNCHER:
        raise ConfigError(
            f"engine_name={job.engine_name!r}: it starts processes itself; run it without torchrun, with "
            "config.DISTRIBUTED.NUM_PROC_PER_NODE."
        )
    if options.NUM_NODES > 1 and not started_by_torchrun():
        endpoint = options.ENDPOINT or "HOST:PORT"
        need = "" if options.ENDPOINT else "a common config.DISTRIBUTED.ENDPOINT=HOST:PORT and "
        raise ConfigError(
            f"config.DISTRIBUTED.NUM_NODES={options.NUM_NODES}: several machines need {need}the same command on each of "
            f"them by torchrun: torchrun --nnodes {options.NUM_NODES} --nproc-per-node {processes.local} --rdzv-backend "
            f"c10d --rdzv-endpoint {endpoint} tools/run_distributed_engines.py ... (config.RUN.DRY_RUN=true works here)."
        )


def _announce(job: Job, plan: Plan, run_dir: Path, *, is_continued: bool) -> None:
    log.info("%s %s in %s", "continuing" if is_continued else "starting", job.engine_name, run_dir)
    if plan.rows and job.engine_name not in RUNS_IN_LAUNCHER:
        log.info("%s", table(plan))
    for warning in plan.warnings:
        log.warning("%s", warning)


def _write_report(job: Job, run_dir: Path) -> None:
    if not job.config.RUN.REPORT:
        return
    from vissl_like.outputs.report import write_report

    try:
        write_report(run_dir)
    except Exception as error:  # the results are safe; a page that fails must not make the run one
        logs.write_traceback(run_dir, traceback.format_exc())
        log.warning("report.html could not be written: %s: %s (%s)", type(error).__name__, error, place_of(error))


# ----------------------------------------------------------------------------------------------------------- processes
def _run(job: Job, plan: Plan, run_dir: Path) -> dict[str, Any]:
    if started_by_torchrun():
        torchrun.tell({"run_dir": str(run_dir.absolute())})
        return _run_here(job, run_dir)
    if plan.world_size == 1 or job.engine_name in RUNS_IN_LAUNCHER:
        return _run_here(job, run_dir)
    return _run_ranks(job, plan, run_dir)


def _run_here(job: Job, run_dir: Path) -> dict[str, Any]:
    """In this process. A defect becomes RunFailed, its traceback goes into log.txt."""
    try:
        return run_engine(job, run_dir)
    except (UserError, Stopped, RunFailed, Interrupted):
        raise
    except Exception as error:
        logs.write_traceback(run_dir, traceback.format_exc())
        raise RunFailed(
            f"{type(error).__name__}: {error} ({place_of(error)}). This is a defect of the program; the traceback is in "
            f"{run_dir / logs.LOG_FILE}."
        ) from error


def follow() -> None:
    """What a process other than the first does under torchrun: wait for the run folder, then run there."""
    message = torchrun.hear()
    if "exit_code" in message:  # the first one says why
        raise SystemExit(message["exit_code"])
    run_dir = Path(message["run_dir"])
    job = read_job(run_dir)
    logs.to_console(verbose=job.config.VERBOSE, rank=int(os.environ["RANK"]))
    _run_here(job, run_dir)


def _run_ranks(job: Job, plan: Plan, run_dir: Path) -> dict[str, Any]:
    """In processes of their own, by torch elastic. The first cause of a failure is what is raised."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    errors_dir = run_dir / ERRORS_DIR
    errors_dir.mkdir(exist_ok=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=plan.world_size,
        logs_specs=DefaultLogsSpecs(log_dir=str(errors_dir)),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.2,
        **_if_known(LaunchConfig, signals_to_handle="SIGHUP,SIGQUIT", shutdown_timeout=_GRACE_S),
    )
    with _environment_of_ranks(plan), _forwarded_signals() as received:
        try:
            return _results_of(elastic_launch(config, run_rank)(str(run_dir)))
        except ChildFailedError as error:
            raise _cause(error, run_dir, received) from None
        except SignalException as error:
            raise _signal_cause(run_dir, int(error.sigval)) from None
        finally:
            shutil.rmtree(errors_dir, ignore_errors=True)


def _if_known(kind: Any, **options: Any) -> dict[str, Any]:
    """Those options that this version of PyTorch's dataclass has."""
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in options.items() if name in known}


def _signal_cause(run_dir: Path, number: int) -> Exception:
    """After a signal that elastic handled itself: whether the ranks could save."""
    stops = [word for word in left_words(run_dir) if word.kind == Stopped.__name__]
    return Stopped(stops[0].message) if stops else Interrupted(number)


def _results_of(returned: dict[int, dict[str, Any]]) -> dict[str, Any]:
    if any(STOPPED in results for results in returned.values()):
        raise Stopped(next(results[STOPPED] for results in returned.values() if STOPPED in results))
    return returned[0]


def _cause(error: Any, run_dir: Path, received: list[int]) -> Exception:
    """The first cause among what ranks wrote down and how they died: a mistake, a kill, a defect, in this order.

    When a rank is killed the others fail, too, because it no longer answers: what they say is a consequence.
    """
    words = left_words(run_dir)
    mistakes = [word for word in words if not word.place and word.kind != Stopped.__name__]
    if mistakes:
        return as_exception(mistakes[0])
    killed = [
        (rank, -failure.exitcode)
        for rank, failure in sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        if failure.exitcode < 0
    ]
    if received:
        return _signal_cause(run_dir, received[0])
    for rank, number in killed:
        if number != signal.SIGTERM or not words:
            name = signal.Signals(number).name
            hint = " (often the system, out of memory)" if number == signal.SIGKILL else ""
            return RunFailed(
                f"rank {rank} was killed by signal {number} ({name}){hint}; start the same command again to resume."
            )
    defects = [word for word in words if word.place]
    if defects:
        return as_exception(defects[0])
    first = error.get_first_failure()[1]
    return RunFailed(f"rank {error.get_first_failure()[0]} ended with exit code {first.exitcode} and said nothing.")


@contextlib.contextmanager
def _environment_of_ranks(plan: Plan) -> Iterator[None]:
    """Threads for libraries that read OMP_NUM_THREADS at import; and no complaint about semaphores of killed ranks."""
    quiet = [os.environ.get("PYTHONWARNINGS", ""), "ignore:resource_tracker:UserWarning"]
    ours = {"OMP_NUM_THREADS": str(plan.num_threads), "PYTHONWARNINGS": ",".join(filter(None, quiet))}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end what has not begun to listen to them (a loop that can save) with a message."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _forwarded_signals() -> Iterator[list[int]]:
    """Hand SIGTERM and SIGUSR1 on to the ranks, and Ctrl-C as SIGTERM; the numbers received are in the list."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def forward(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)
        children = multiprocessing.active_children()
        if not children:  # too early to hand it on, and nobody would ask again
            raise Interrupted(number)
        for child in children:
            if child.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM if number == signal.SIGINT else number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
