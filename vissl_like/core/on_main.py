"""Long work of the main process alone (k-means by faiss, a probe), or of each by itself (its part of the features).

Whoever waits for others meanwhile does not run into a timeout.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from vissl_like.core import distributed
from vissl_like.errors import UserError, explained

T = TypeVar("T")

#: Seconds between two signs of life; far below any DISTRIBUTED.TIMEOUT_S.
PULSE_S = 5.0
_WORKING, _FINISHED = 0, 1


def on_main(work: Callable[[], T]) -> T:
    """The value of work(), which runs on rank 0 only, on every rank. A UserError that it raises, or that
    explains what it raises (a full disk), is raised everywhere.

    While it runs the ranks exchange a number every few seconds, so it may take longer than a collective operation may.
    `work` itself must not communicate.
    """
    if distributed.current().size == 1:
        return work()
    outcome: tuple[T | None, UserError | None] = (None, None)
    if distributed.is_main():
        with _pulse():
            try:
                outcome = (work(), None)
            except Exception as problem:
                known = problem if isinstance(problem, UserError) else explained(problem)
                if known is None:
                    raise
                outcome = (None, known)
    else:
        while int(distributed.all_reduce_sum(torch.tensor(_WORKING))) != _FINISHED:
            pass
    value, error = distributed.broadcast_object(outcome)
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


@contextlib.contextmanager
def apart(*, asked: Callable[[], bool] = lambda: False) -> Iterator[Callable[[], bool]]:
    """What every process does by itself, however much longer it takes one than another; at the end all are through.

    Yields whether one of them has been `asked` to stop: known to all within seconds, and at the end the same to all. The
    block must not communicate. An error in it goes on at once; the others learn of it when they miss this process.
    """
    size = distributed.current().size
    if size == 1:
        yield asked
        return
    finished, failed = threading.Event(), threading.Event()
    stopped, problems = threading.Event(), list[Exception]()

    def beat() -> None:
        through = 0
        try:
            while through < size and not failed.is_set():
                finished.wait(PULSE_S)
                mine = torch.tensor([finished.is_set(), asked()], dtype=torch.int64)
                through, requests = distributed.all_reduce_sum(mine).tolist()
                if requests:
                    stopped.set()
        except Exception as problem:
            problems.append(problem)

    thread = threading.Thread(target=beat, name="apart", daemon=True)
    thread.start()
    try:
        yield stopped.is_set
    except BaseException:
        failed.set()
        raise
    finished.set()
    thread.join()
    if problems:
        raise problems[0]


@contextlib.contextmanager
def _pulse() -> Iterator[None]:
    """Exchange signs of life in a thread; the last one says that the work is finished.

    If the work fails with something that is no UserError, no last sign is sent: the others wait until the launcher, which
    sees this process fail, ends them, and the cause that is reported is the true one.
    """
    finished = threading.Event()

    def beat() -> None:
        while not finished.wait(PULSE_S):
            distributed.all_reduce_sum(torch.tensor(_WORKING))

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
    distributed.all_reduce_sum(torch.tensor(_FINISHED))
