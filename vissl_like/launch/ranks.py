"""The processes of this machine: started by torch elastic, handed signals, and asked why they ended."""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import os
import shutil
import signal
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from vissl_like.config.plan import Plan
from vissl_like.core import signals
from vissl_like.core.signals import SIGNALS, handled_by, name_of
from vissl_like.errors import Stopped
from vissl_like.launch import logs
from vissl_like.launch.endings import Interrupted, Killed, RunFailed
from vissl_like.launch.rank import ERRORS_DIR, STOPPED, RankError, as_exception, left_words, run_rank

#: Seconds that ranks have to end after one of them failed, before they are killed.
GRACE_S = 10
#: Signals that torch elastic handles; those that the ranks can answer are handed on instead.
SIGNALS_TO_ELASTIC = "SIGHUP,SIGQUIT"


def run_ranks(plan: Plan, run_dir: Path) -> dict[str, Any]:
    """Run the engine in processes of this machine alone. The first cause of a failure is what is raised."""
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
        **if_known(LaunchConfig, signals_to_handle=SIGNALS_TO_ELASTIC, shutdown_timeout=GRACE_S),
    )
    with environment_of_ranks(plan), forwarded_signals() as received:
        try:
            return results_of(elastic_launch(config, run_rank)(str(run_dir), str(errors_dir)), received)
        except ChildFailedError as error:
            cause = cause_of(error.failures, left_words(errors_dir), received)
            logs.write_traceback(run_dir, getattr(cause, "traceback", ""))
            raise cause from None
        except SignalException as error:
            raise signal_cause(left_words(errors_dir), [int(error.sigval)]) from None
        except KeyboardInterrupt:  # Ctrl-C for the second time: too late if the main rank has saved
            words = left_words(errors_dir)
            if not is_saved(words):
                raise
            raise signal_cause(words, received) from None
        except Exception:  # PyTorch fails to read what a process that was stopped while it started has left
            if not received:
                raise
            raise signal_cause(left_words(errors_dir), received) from None
        finally:
            shutil.rmtree(errors_dir, ignore_errors=True)


def if_known(kind: Any, **options: Any) -> dict[str, Any]:
    """Those options that this version of PyTorch's class has."""
    known = inspect.signature(kind).parameters
    return {name: value for name, value in options.items() if name in known}


def results_of(returned: Mapping[int, dict[str, Any]], received: list[int]) -> dict[str, Any]:
    """The results of rank 0 (empty on a machine that has not got it). Raises Stopped if a rank stopped after saving."""
    if any(STOPPED in results for results in returned.values()):
        said: str = next(results[STOPPED] for results in returned.values() if STOPPED in results)
        raise signals.stopped(_as_it_came(said, received))
    return returned.get(0, {})


def is_saved(words: list[RankError]) -> bool:
    """Whether the main rank has stopped after saving."""
    return any(word.rank == 0 for word in _stops(words))


def _stops(words: list[RankError]) -> list[RankError]:
    """What those ranks said that stopped after saving."""
    return [word for word in words if word.kind == Stopped.__name__]


def signal_cause(words: list[RankError], received: list[int]) -> Exception:
    """After a signal: whether the ranks could save."""
    said = _stops(words)
    return signals.stopped(_as_it_came(said[0].message, received)) if said else Interrupted(received[0])


def _as_it_came(message: str, received: list[int]) -> str:
    """The ranks' message with the signal that the launcher got: Ctrl-C is handed on to them as SIGTERM."""
    is_other = received[:1] == [signal.SIGINT]
    return message.replace("SIGTERM", name_of(signal.SIGINT), 1) if is_other else message


def cause_of(failures: Mapping[int, Any], words: list[RankError], received: list[int]) -> Exception:
    """The first cause among what ranks wrote down and how they died: a mistake, a kill, a defect, in this order.

    When a rank is killed the others fail, too, because it no longer answers: what they say is a consequence.
    `failures`: torch elastic's, by rank; `received`: the signals that the launcher got.
    """
    mistakes = [word for word in words if not word.place and word.kind != Stopped.__name__]
    if mistakes:
        return as_exception(mistakes[0])
    in_time = sorted(failures.items(), key=lambda item: item[1].timestamp)
    killed = [(rank, -failure.exitcode) for rank, failure in in_time if failure.exitcode < 0]
    if received:
        return signal_cause(words, received)
    for rank, number in killed:
        if number != signal.SIGTERM or not words:
            name = signal.Signals(number).name
            hint = " (often the system, out of memory)" if number == signal.SIGKILL else ""
            return Killed(f"rank {rank} was killed by signal {number} ({name}){hint}")
    defects = sorted((word for word in words if word.place), key=lambda word: word.is_lost)
    if defects:
        return as_exception(defects[0])
    rank, first = in_time[0]
    return RunFailed(f"rank {rank} ended with exit code {first.exitcode} and said nothing.")


@contextlib.contextmanager
def environment_of_ranks(plan: Plan, **more: str) -> Iterator[None]:
    """Threads for libraries that read OMP_NUM_THREADS at import; and no complaint about semaphores of killed ranks.

    `more`: variables that are set where the user's environment does not have them.
    """
    quiet = [os.environ.get("PYTHONWARNINGS", ""), "ignore:resource_tracker:UserWarning"]
    ours = {"OMP_NUM_THREADS": str(plan.num_threads), "PYTHONWARNINGS": ",".join(filter(None, quiet))}
    ours |= {name: value for name, value in more.items() if name not in os.environ}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def hand_on(number: int) -> bool:
    """Send a signal to the processes that this one has started; False if there are none yet."""
    children = multiprocessing.active_children()
    for child in children:
        if child.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM if number == signal.SIGINT else number)
    return bool(children)


@contextlib.contextmanager
def forwarded_signals() -> Iterator[list[int]]:
    """Hand SIGTERM and SIGUSR1 on to the ranks, and Ctrl-C as SIGTERM; the numbers received are in the list.

    A second Ctrl-C is a KeyboardInterrupt, which ends the ranks; further ones must not disturb that.
    """
    received: list[int] = []
    is_ending = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal is_ending
        if is_ending:
            return
        if number == signal.SIGINT and received:
            is_ending = True
            raise KeyboardInterrupt
        received.append(number)
        if not hand_on(number):  # too early to hand it on, and nobody would ask again
            raise Interrupted(number)

    with handled_by(forward, *SIGNALS, signal.SIGINT):
        yield received
