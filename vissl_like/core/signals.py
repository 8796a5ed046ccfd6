"""Being asked to stop: SIGTERM and SIGUSR1 (cluster managers, preemption) become a flag that the loop reads."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


_was_asked = False


def end_unless_asked(number: int, frame: FrameType | None) -> None:
    """Handler for a process that may be asked twice: die as usual, but not once a request is being answered."""
    if not _was_asked:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def is_being_answered() -> None:
    """Say that this process stops because another one was asked to: the signal that still comes must not end it."""
    global _was_asked
    _was_asked = True


class StopRequest:
    """Whether a signal has come, and which."""

    def __init__(self) -> None:
        self.name = ""

    @property
    def requested(self) -> bool:
        return bool(self.name)


def comes_soon(asked: Callable[[], bool], *, within_s: float = 2.0) -> bool:
    """Whether a request has come or does so now: a signal to the whole group may end the loader's processes first."""
    deadline = time.monotonic() + within_s
    while not asked() and time.monotonic() < deadline:
        time.sleep(0.05)
    return asked()


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Give signals to a handler; the former handlers are back afterwards.

    Python handles signals in the main thread only: elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}
    for number in numbers:
        before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextlib.contextmanager
def listen() -> Iterator[StopRequest]:
    """Note the signals instead of dying from them (in the main thread)."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        global _was_asked
        _was_asked = True
        request.name = signal.Signals(number).name

    with handled_by(note, *SIGNALS):
        yield request
