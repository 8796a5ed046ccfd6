"""One process of a run: joins the others, runs the engine, says how it ended. It reads config.yaml and never composes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from vissl_like import errors, registry
from vissl_like.config.components import load_plugins
from vissl_like.config.plan import PLAN_FILE
from vissl_like.config.saved import read_job
from vissl_like.config.schema import Job
from vissl_like.core import signals
from vissl_like.core.signals import SIGNALS, end_unless_asked, handled_by
from vissl_like.errors import Stopped, UserError
from vissl_like.launch import logs
from vissl_like.launch.endings import Lost, RunFailed, mistake

log = logging.getLogger(__name__)

#: Sub-folder of the run folder in which ranks leave the reason of their end; removed when the launcher has read it.
ERRORS_DIR = ".errors"
STOPPED = "stopped"
_WORD_BYTES = 1 << 15
#: torch elastic tells of one process that it finds dead: that is to be the one that was killed, not one that missed it.
_LAST_MOMENTS_S = 1.0
#: Engines that launch others and need no processes of their own.
RUNS_IN_LAUNCHER = ("pipeline",)


@dataclass(frozen=True)
class RankError:
    """Why a rank ended. `kind` is the class name; `place` is file:line of a defect."""

    rank: int
    kind: str
    message: str
    exit_code: int
    place: str
    time: float
    is_lost: bool = False
    """Whether it ended because another process does not answer."""
    traceback: str = ""


def run_rank(run_dir: str, words_dir: str) -> dict[str, Any]:
    """Run the engine of a run folder in a process of its own, one of those that the environment describes.

    Returns the engine's results, or {"stopped": message} if a signal ended it after saving. Any other end is written
    down for the launcher in `words_dir` and raised.
    """
    folder = Path(run_dir)
    rank = int(os.environ.get("RANK", "0"))
    for number in SIGNALS:  # one signal to all and one from the launcher are two: the second must not end the save
        signal.signal(number, end_unless_asked)
    signals.guard_interrupts()
    try:
        job = read_job(folder)
        logs.to_console(verbose=job.config.VERBOSE, rank=rank)
        with logs.to_file(folder) if rank == 0 else contextlib.nullcontext():
            results = run_engine(job, folder)
        return results if rank == 0 else {}
    except Stopped as stop:
        _leave_word(Path(words_dir), rank, stop)
        return {STOPPED: str(stop)}
    except Exception as error:
        if _leave_word(Path(words_dir), rank, error).is_lost:
            time.sleep(_LAST_MOMENTS_S)
        raise


def run_engine(job: Job, run_dir: Path) -> dict[str, Any]:
    """Join the other processes, run the engine, leave them again. A full disk or memory is a UserError."""
    load_plugins(job.config.PLUGINS)
    engine = registry.resolve("engine", job.engine_name, key="engine_name")
    run = engine if job.engine_name in RUNS_IN_LAUNCHER else partial(_run_with_others, engine)
    try:
        with _room_for_last_words(run_dir):
            return run(job, run_dir)
    except Exception as error:
        known = None if hasattr(error, "exit_code") else errors.explained(error, place=run_dir)
        if known is None:
            raise
        logs.write_traceback(run_dir, "".join(traceback.format_exception(error)))
        raise known from error


@contextlib.contextmanager
def _room_for_last_words(run_dir: Path) -> Iterator[None]:
    """Some bytes that are given back at the end, so that a process can say that the disk is full when it is."""
    file = run_dir / f".room_{os.environ.get('RANK', '0')}"
    with contextlib.suppress(OSError):
        file.write_bytes(bytes(_WORD_BYTES))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def _run_with_others(engine: Callable[[Job, Path], dict[str, Any]], job: Job, run_dir: Path) -> dict[str, Any]:
    import torch

    from vissl_like.core import distributed

    values = json.loads((run_dir / PLAN_FILE).read_text(encoding="utf-8"))["values"]
    options = job.config.DISTRIBUTED
    distributed.start(device=values["device"], backend=options.BACKEND, timeout_s=options.TIMEOUT_S)
    torch.set_num_threads(values["num_threads"])
    with _interrupt_is_a_request():
        results = engine(job, run_dir)
    distributed.shutdown()
    return results


@contextlib.contextmanager
def _interrupt_is_a_request() -> Iterator[None]:
    """Ctrl-C asks the loop to save and stop where the loop listens; a second one stops at once unless all is saved."""
    launcher, has_machines = os.getppid(), int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    asked = False

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if has_machines and os.getppid() != launcher:  # torch says so when the launcher was killed
            os._exit(errors.EXIT_DEFECT)  # the ranks of other machines start anew as soon as this machine is back
        if signals.saved():
            return
        if asked or not signals.ask(number):
            raise KeyboardInterrupt
        asked = True
        log.info("stopping at the next step; press Ctrl-C again to stop at once without saving")

    with handled_by(interrupted, signal.SIGINT):
        yield


# ------------------------------------------------------------------------------------------------------- how it ended
def _leave_word(words_dir: Path, rank: int, error: Exception) -> RankError:
    """Write words_dir/rank_K.json, and return it. The launcher puts the traceback of a defect into log.txt."""
    from vissl_like.core import distributed

    is_defect = not isinstance(error, UserError | Stopped)
    word = RankError(
        rank=rank,
        kind=type(error).__name__,
        message=str(error),
        exit_code=getattr(error, "exit_code", errors.EXIT_DEFECT),
        place=place_of(error) if is_defect else "",
        time=time.time(),
        is_lost=is_defect and distributed.is_lost_connection(error),
        traceback=f"rank {rank}:\n{''.join(traceback.format_exception(error))}" if is_defect else "",
    )
    with contextlib.suppress(OSError):  # a full disk must not hide the first error
        words_dir.mkdir(exist_ok=True)
        (words_dir / f"rank_{rank}.json").write_text(json.dumps(asdict(word)), encoding="utf-8")
    return word


def place_of(error: BaseException) -> str:
    """file:line of the innermost line of a traceback that belongs to no installed library, else of the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_library(frame.filename)] or frames
    if not own:
        return "?"
    name = own[-1].filename
    start = name.rfind(f"{os.sep}vissl_like{os.sep}")
    return f"{name[start + 1 :] if start >= 0 else name}:{own[-1].lineno}"


def _is_library(file: str) -> bool:
    is_ours = f"{os.sep}vissl_like{os.sep}" in file
    return not is_ours and ("site-packages" in file or file.startswith(("<", os.path.dirname(os.__file__))))


def left_words(words_dir: Path) -> list[RankError]:
    """What the ranks wrote down, the first to fail first."""
    found = []
    for file in words_dir.glob("rank_*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # written in the moment of death
            found.append(RankError(**json.loads(file.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda word: word.time)


def as_exception(word: RankError) -> Exception:
    """The error of a rank as it is to be shown: a mistake of the user as itself, anything else as RunFailed."""
    if not word.place:
        return mistake(word.kind, word.message, exit_code=word.exit_code)
    if word.is_lost:
        return Lost(f"rank {word.rank} lost the connection to another process", word.traceback)
    failed = RunFailed(f"{word.kind} on rank {word.rank}: {word.message} ({word.place}). The traceback is in log.txt.")
    failed.traceback = word.traceback
    return failed
