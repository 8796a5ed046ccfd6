"""-m: a run for each point of a grid, one after the other, each in a process and a folder of its own.

RUN.DIR/sweep.jsonl holds one line per attempt: overrides, status, exit code, run folder, metrics. A sweep that is started
again skips the points that are finished; a point that fails does not stop the others. With config.SLURM.USE_SLURM each
point becomes a batch job; started again, what is finished, waits or runs is not submitted again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import multiprocessing
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from vissl_like.config.check import Loaded, at_points, load_sweep
from vissl_like.config.schema import Config
from vissl_like.core.signals import SIGNALS, guard_interrupts, handled_by, stopped
from vissl_like.errors import (
    EXIT_CONFIGURATION,
    EXIT_DATA,
    EXIT_DEFECT,
    EXIT_DONE,
    EXIT_STOPPED,
    ConfigError,
    UserError,
    show_error,
)
from vissl_like.launch import folder, slurm
from vissl_like.launch.allocation import adopt, are_ranks
from vissl_like.launch.contents import check_contents
from vissl_like.launch.endings import show_interrupt
from vissl_like.launch.endpoint import is_writer
from vissl_like.launch.inputs import check_inputs
from vissl_like.launch.machine import started_by_torchrun
from vissl_like.launch.ranks import hand_on
from vissl_like.launch.start import start

LEDGER = "sweep.jsonl"

#: Exit codes from harmless to grave; codes that are not here (killed, interrupted) are the gravest.
_GRAVITY = (EXIT_DONE, EXIT_STOPPED, EXIT_DATA, EXIT_CONFIGURATION, EXIT_DEFECT)
_LONGEST_NAME = 100
_ONE_POINT = "no key has several values, so this is a sweep of one run. Several: config.SEED_VALUE=1,2,3."


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    loaded: Loaded
    run_dir: Path
    varied: tuple[str, ...]
    """The overrides in which it differs from other points."""

    @property
    def label(self) -> str:
        """What varies, in messages."""
        return " ".join(self.varied) or "the only point"


def run_sweep(overrides: list[str], *, config_dirs: list[str]) -> int:
    """Compose and check all points, then run them; returns the gravest exit code."""
    if started_by_torchrun() or are_ranks():
        raise ConfigError(
            "-m: a sweep starts processes itself; run it without torchrun, or by srun with one task per node."
        )
    points = make_points(_adopted(load_sweep(overrides, config_dirs=config_dirs)))
    for note in dict.fromkeys(note for point in points for note in point.loaded.notes):
        print(f"warning: {note}", file=sys.stderr)
    _check(points)
    if len(points) == 1:
        print(f"warning: -m: {_ONE_POINT} Its folder: {points[0].run_dir}.", file=sys.stderr)
    if _is_dry(points[0].loaded.job.config):
        for point in points:
            print(f"{point.label} -> {point.run_dir}")
        return _run_point(points[0], config_dirs)
    ledger = points[0].run_dir.parent / LEDGER
    ledger.parent.mkdir(parents=True, exist_ok=True)
    print(f"sweep of {len(points)} run{'s' * (len(points) > 1)} in {ledger.parent}", file=sys.stderr)
    lines: list[dict[str, Any]] = []
    with _signals() as received:
        for number, point in enumerate(points, 1):
            print(f"run {number} of {len(points)}: {point.label}", file=sys.stderr)
            lines.append(_run_and_record(point, ledger, config_dirs))
            if received:
                said = "stopped: the other runs of the sweep were not started."
                print(said, file=sys.stderr)
                if lines[-1]["exit"] == EXIT_STOPPED:
                    stopped(said)  # from here on another Ctrl-C changes nothing
                break
    print(_summary(points, lines))
    return max((line["exit"] for line in lines), key=_gravity)


def _check(points: list[Point]) -> None:
    """What each point reads and asks for; a DataError or WeightsError says which points it is about."""
    problems: dict[str, list[int]] = {}
    kinds: list[type[UserError]] = []
    for number, point in enumerate(points):
        job = folder.with_run_dir(point.loaded.job, point.run_dir)
        try:
            check_inputs(job)
            check_contents(job, point.run_dir)
            if slurm.is_wanted(job.config):
                slurm.requested(job.config)
        except UserError as error:
            kinds.append(type(error))
            problems.setdefault(str(error), []).append(number)
    if problems:
        raise kinds[0]("\n".join(at_points(problems, [point.loaded.overrides for point in points])))


def _adopted(loaded: list[Loaded]) -> list[Loaded]:
    """The points with what a SLURM allocation says about machines; what was inferred is said once."""
    adopted = [adopt(one.job) for one in loaded]
    for note in dict.fromkeys(note for _, notes in adopted for note in notes):
        print(note, file=sys.stderr)
    return [dataclasses.replace(one, job=job) for one, (job, _) in zip(loaded, adopted)]


def _is_dry(config: Config) -> bool:
    return config.RUN.DRY_RUN or config.SLURM.DRY_RUN


def _gravity(code: int) -> int:
    return _GRAVITY.index(code) if code in _GRAVITY else len(_GRAVITY)


def make_points(loaded: list[Loaded]) -> list[Point]:
    """Points with their folders: RUN.DIR/<what varies>."""
    everywhere = set.intersection(*(set(one.overrides) for one in loaded))
    recipes = {one.recipe for one in loaded}
    varied = [tuple(text for text in one.overrides if text not in everywhere) for one in loaded]
    names = [_folder_name(texts) for texts in varied]
    points = []
    for one, texts, name in zip(loaded, varied, names):
        same_recipe = one.recipe if len(recipes) == 1 else "sweep"
        base = folder.default_dir(one.job, same_recipe)
        is_taken = names.count(name) > 1  # a/b and a_b
        points.append(Point(one, base / (f"{name}_{_digest(' '.join(texts))}" if is_taken else name), texts))
    return points


def _folder_name(varied: tuple[str, ...]) -> str:
    """A folder name that says what varies and needs no quoting in an override."""
    short = [text.lstrip("+").removeprefix("config.").replace("=", "-") for text in varied]
    name = re.sub(r"[^\w.+-]+", "_", "__".join(short)).strip("_.") or "only"
    return f"{name[:_LONGEST_NAME]}_{_digest(name)}" if len(name) > _LONGEST_NAME else name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _run_and_record(point: Point, ledger: Path, config_dirs: list[str]) -> dict[str, Any]:
    """Run or submit a point; returns its line, which is in the ledger unless the point was finished before."""
    started = datetime.datetime.now(datetime.timezone.utc)
    was_finished = bool(folder.read_json(point.run_dir / folder.MANIFEST_FILE).get("complete"))
    line: dict[str, Any] = {
        "overrides": list(point.loaded.overrides),
        "status": "done",
        "exit": EXIT_DONE,
        "run_dir": str(point.run_dir),
    }
    if was_finished and _is_recorded(point, ledger):
        same = folder.read_json(point.run_dir / folder.LAUNCH_FILE).get("overrides") == list(point.loaded.overrides)
        if same and not point.loaded.job.config.RUN.OVERWRITE:
            print(f"finished before: {point.run_dir}", file=sys.stderr)
            return line
    is_batch_job = slurm.is_wanted(point.loaded.job.config)
    if is_batch_job:
        line |= _submit_point(point, config_dirs)
        if _is_recorded(point, ledger, status=line["status"], job_id=line.get("job_id")):
            return line
    else:
        code = _in_process(point, config_dirs)
        line |= {"status": {EXIT_DONE: "done", EXIT_STOPPED: "stopped"}.get(code, "failed"), "exit": code}
    line |= {
        "metrics": folder.read_json(point.run_dir / folder.RESULTS_FILE) if line["status"] == "done" else {},
        "started": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.datetime.now(datetime.timezone.utc) - started).total_seconds(), 1),
    }
    if is_batch_job or is_writer(point.loaded.job.config.DISTRIBUTED):
        with open(ledger, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return line


def _submit_point(point: Point, config_dirs: list[str]) -> dict[str, Any]:
    """Submit a point as a batch job: what the ledger says about it. `job_id` also is that of a job that lives already."""
    loaded = point.loaded
    info = folder.LaunchInfo(loaded.recipe, list(loaded.presets), list(loaded.overrides), list(config_dirs))
    try:
        submission = slurm.submit(loaded.job, point.run_dir, info)
    except UserError as error:
        return {"status": "failed", "exit": show_error(error)}
    print(slurm.describe(submission, point.run_dir), file=sys.stderr)
    if submission.state == slurm.FINISHED:
        return {}
    return {"status": slurm.SUBMITTED, "job_id": submission.job_id}


def _is_recorded(point: Point, ledger: Path, *, status: str = "done", job_id: str | None = None) -> bool:
    looked_for = (str(point.run_dir), status, job_id)
    return looked_for in [(line.get("run_dir"), line.get("status"), line.get("job_id")) for line in read(ledger)]


def read(ledger: Path) -> list[dict[str, Any]]:
    """The lines of a ledger; a torn last line is left out."""
    lines = []
    for text in ledger.read_text(encoding="utf-8").splitlines() if ledger.is_file() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def _in_process(point: Point, config_dirs: list[str]) -> int:
    """Run a point in a process of its own, so that nothing of one run reaches the next and a crash ends only one."""
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(point, config_dirs))
    process.start()
    while process.is_alive():
        process.join(timeout=0.5)
    code = process.exitcode
    assert code is not None
    return code if code >= 0 else 128 - code


def _child(point: Point, config_dirs: list[str]) -> None:
    guard_interrupts()
    sys.exit(_run_point(point, config_dirs))


def _run_point(point: Point, config_dirs: list[str]) -> int:
    try:
        return start(point.loaded, config_dirs=config_dirs, run_dir=str(point.run_dir))
    except KeyboardInterrupt:
        return show_interrupt()
    except UserError as error:
        named = type(error)(f"{point.label}: {error}")
        named.exit_code = error.exit_code
        return show_error(named if point.varied else error)
    except Exception as error:
        return show_error(error)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Hand SIGTERM and SIGUSR1 on to the running point; any of them, or Ctrl-C, ends the sweep after it.

    A second Ctrl-C is for the running point alone, which decides whether it can still save.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received and not multiprocessing.active_children():
            raise KeyboardInterrupt
        received.append(number)
        if number != signal.SIGINT:  # the terminal sends Ctrl-C to the child itself
            hand_on(number)

    with handled_by(forward, *SIGNALS, signal.SIGINT):
        yield received


def _summary(points: list[Point], lines: list[dict[str, Any]]) -> str:
    """One line per point: what varied, how it ended, its first metrics."""
    rows = []
    for point, line in zip(points, lines):
        number = line.get("job_id") or (line["exit"] if line["status"] == "failed" else "")
        word = f"{line['status']} ({number})" if number else line["status"]
        results = folder.read_json(point.run_dir / folder.RESULTS_FILE) if line["status"] == "done" else {}
        numbers = [f"{key}={value:.4g}" for key, value in results.items() if isinstance(value, int | float)][:4]
        rows.append(f"{point.label:<50} {word:<12} {' '.join(numbers)}".rstrip())
    return "\n".join(rows)
