"""Long work of the main process alone: k-means by faiss, a probe. The others wait without running into a timeout."""

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
