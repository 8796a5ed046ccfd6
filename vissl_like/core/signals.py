"""Being asked to stop: SIGTERM and SIGUSR1 (cluster managers, preemption) become a flag that the loop reads."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


_was_asked = False


def end_unless_asked(number: int, frame: FrameType | None) -> None:
    """Handler for a process that may be asked twice: die as usual, but not once a request is being answered."""
    if not _was_asked:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


class StopRequest:
    """Whether a signal has come, and which."""

    def __init__(self) -> None:
        self.name = ""

    @property
    def requested(self) -> bool:
        return bool(self.name)


@contextlib.contextmanager
def listen() -> Iterator[StopRequest]:
    """Note the signals instead of dying from them; the former handlers are back afterwards.

    A signal to the whole process group ends the loader's processes as well. PyTorch would raise an error for that in the
    middle of whatever is going on, so from the request on the end of a child is no event.

    Python handles signals in the main thread only: elsewhere nothing is noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        global _was_asked
        _was_asked = True
        request.name = signal.Signals(number).name
        before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))

    before: dict[signal.Signals, Any] = {}
    for asked in SIGNALS:
        before[asked] = signal.signal(asked, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
