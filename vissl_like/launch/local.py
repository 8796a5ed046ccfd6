"""Start a job: in this process, in several of this machine, or on several machines at once.

The configuration was composed and checked once; ranks read it from the run folder. On several machines every launcher
does the same up to the meeting at DISTRIBUTED.ENDPOINT; from there on the first one leads and the others follow it.
Processes that torchrun started are used as they are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vissl_like.config.components import load_plugins
from vissl_like.config.plan import Plan, make_plan, table
from vissl_like.config.saved import read_job
from vissl_like.config.schema import Job
from vissl_like.core.signals import SIGNALS, handled_by
from vissl_like.errors import ConfigError, DataError, Stopped, UserError
from vissl_like.launch import folder, logs, torchrun
from vissl_like.launch.allocation import cores_of_node, starter
from vissl_like.launch.endings import DONE, Ending, Interrupted, RunFailed
from vissl_like.launch.folder import LaunchInfo
from vissl_like.launch.inputs import check_inputs, check_transforms
from vissl_like.launch.machine import Processes, processes_for, started_by_torchrun, write_environment
from vissl_like.launch.rank import RUNS_IN_LAUNCHER, place_of, run_engine
from vissl_like.launch.ranks import run_ranks

if TYPE_CHECKING:
    from vissl_like.launch.nodes import Session

__all__ = ["Interrupted", "LaunchInfo", "RunFailed", "launch", "plan_for"]

log = logging.getLogger(__name__)


def launch(job: Job, run_dir: Path | str, info: LaunchInfo) -> dict[str, Any]:
    """Run a checked job in its folder and return its results. A finished run of the same job is not repeated.

    On several machines the outermost launch returns nothing on all but the first. Raises UserError for what the user can
    mend, Stopped after a signal and a save, RunFailed for a killed rank or a defect.
    """
    run_dir = Path(run_dir)
    job = folder.with_run_dir(job, run_dir)
    load_plugins(job.config.PLUGINS)
    processes = processes_for(job.config)
    job, plan = plan_for(job, processes)
    if job.config.DISTRIBUTED.NUM_NODES == 1 or started_by_torchrun():
        return _lead(job, plan, run_dir, info)
    return _launch_on_machines(job, plan, run_dir, info, processes)


def _launch_on_machines(job: Job, plan: Plan, run_dir: Path, info: LaunchInfo, processes: Processes) -> dict[str, Any]:
    from vissl_like.launch import nodes

    is_known = not nodes.is_meeting() and folder.is_run(run_dir) and not folder.holds_other(job, run_dir)
    if is_known and (results := _finished_before(job, run_dir)) is not None:
        return results  # every machine sees that by itself
    with _ended_by_signals(), nodes.meet(job.config.DISTRIBUTED, run_dir) as meeting:
        session = nodes.Session(meeting, job, processes, run_dir)
        if not meeting.is_first:
            return _follow(job, plan, session)
        with session.leading():
            results = _lead(job, plan, run_dir, info, session)
            session.conclude(Ending(DONE, results=results))
            return results


def _lead(job: Job, plan: Plan, run_dir: Path, info: LaunchInfo, session: Session | None = None) -> dict[str, Any]:
    """As the only or the first machine, the one that writes the run folder."""
    check_inputs(job)
    folder.check_reuse(job, plan, run_dir)
    if (results := _finished_before(job, run_dir)) is not None:
        return results
    _check_start(job)
    check_transforms(job)
    is_continued = folder.is_run(run_dir) and not job.config.RUN.OVERWRITE
    folder.make(run_dir)
    with folder.occupied(run_dir):
        folder.check_reuse(job, plan, run_dir)  # another run may have come and gone meanwhile
        folder.prepare(job, plan, run_dir, info)
        with logs.to_file(run_dir), _ended_by_signals():
            for note in info.notes:
                logs.to_file_only(note)
            _announce(job, plan, run_dir, is_continued=is_continued)
            return _run_to_the_end(job, plan, run_dir, session)


def _finished_before(job: Job, run_dir: Path) -> dict[str, Any] | None:
    results = folder.finished(job, run_dir) if folder.is_run(run_dir) else None
    if results is not None:
        log.info("%s: this run is finished; its results are in %s", run_dir, folder.RESULTS_FILE)
    return results


def _follow(job: Job, plan: Plan, session: Session) -> dict[str, Any]:
    """As another machine than the first: run what it says, write nothing."""
    run_dir = session.run_dir
    with session.following() as ending:
        if ending is None:
            _run(job, plan, run_dir, session)
        results = session.wait_for_end()
    if not session.is_outermost:
        return results
    log.info("done; the first machine has written the results to %s", run_dir)
    return {}


def _run_to_the_end(job: Job, plan: Plan, run_dir: Path, session: Session | None) -> dict[str, Any]:
    """Run, and write down results, manifest and report."""
    write_environment(run_dir)
    began = time.monotonic()
    if session is not None:
        session.offer()
    results = _run(job, plan, run_dir, session)
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
        cores=cores_of_node(),
        engine_name=job.engine_name,
    )
    if job.config.DISTRIBUTED != given:
        before = f"{given.NUM_NODES} x {given.NUM_PROC_PER_NODE}"
        now = f"{job.config.DISTRIBUTED.NUM_NODES} x {processes.local}"
        plan = plan.with_row("machines x processes", before, now, f"started by {starter()}")
    return job, plan


def _check_start(job: Job) -> None:
    """What can be composed, checked and planned, but not started like this."""
    if started_by_torchrun() and job.engine_name in RUNS_IN_LAUNCHER:
        raise ConfigError(
            f"engine_name={job.engine_name!r}: it starts processes itself; run it without torchrun, with "
            "config.DISTRIBUTED.NUM_PROC_PER_NODE."
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
def _run(job: Job, plan: Plan, run_dir: Path, session: Session | None) -> dict[str, Any]:
    if started_by_torchrun():
        torchrun.tell({"run_dir": str(run_dir.absolute())})
        return _run_here(job, run_dir)
    if job.engine_name in RUNS_IN_LAUNCHER or (session is None and plan.world_size == 1):
        return _run_here(job, run_dir, is_writer=session is None or session.is_first)
    if session is not None:
        from vissl_like.launch.rounds import run_together

        return run_together(session, plan)
    return run_ranks(plan, run_dir)


def _run_here(job: Job, run_dir: Path, *, is_writer: bool = True) -> dict[str, Any]:
    """In this process. A defect becomes RunFailed, its traceback goes into log.txt."""
    try:
        return run_engine(job, run_dir)
    except (UserError, Stopped, RunFailed, Interrupted):
        raise
    except Exception as error:
        if is_writer:
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


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end what has not begun to listen to them (a loop that can save) with a message."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with handled_by(end, *SIGNALS):
        yield
