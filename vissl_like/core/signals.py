"""Being asked to stop: SIGTERM and SIGUSR1 (cluster managers, preemption) become a flag that the loop reads."""

from __future__ import annotations

import atexit
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from vissl_like.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_was_asked = False
_saved = ""
_listening: StopRequest | None = None


def name_of(number: int) -> str:
    """A signal as messages name it."""
    return "SIGINT (Ctrl-C)" if number == signal.SIGINT else signal.Signals(number).name


def end_unless_asked(number: int, frame: FrameType | None) -> None:
    """Handler for a process that may be asked twice: die as usual, but not once a request is being answered."""
    if not _was_asked:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def interrupt_unless_saved(number: int, frame: FrameType | None) -> None:
    """Handler of Ctrl-C: as usual, but not once everything is on the disk."""
    if not _saved:
        raise KeyboardInterrupt


def guard_interrupts() -> None:
    """Give Ctrl-C to interrupt_unless_saved() for the rest of this process, unless somebody else has taken or ignored it."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt_unless_saved)
        atexit.register(_end_in_peace)


def _end_in_peace() -> None:
    """Python gives its handlers back before the libraries have ended, and Ctrl-C would then kill the process."""
    if _saved:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def ask(number: int) -> bool:
    """Ask whoever listens in this process to stop, as the SIGNALS do; False if nobody does."""
    global _was_asked
    if _listening is None:
        return False
    _was_asked = True
    _listening.name = _listening.name or name_of(number)
    return True


def stopped(message: str) -> Stopped:
    """The end after a request, once everything is on the disk: a signal that still comes must not make it another one."""
    global _was_asked, _saved
    _was_asked, _saved = True, message
    return Stopped(message)


def saved() -> str:
    """What stopped() was told in this process, since somebody listened last; else empty."""
    return _saved


class StopRequest:
    """Whether a signal has come, and which was the first."""

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
    global _listening, _saved
    former, request = _listening, StopRequest()
    _listening, _saved = request, ""

    def note(number: int, frame: FrameType | None) -> None:
        ask(number)

    try:
        with handled_by(note, *SIGNALS):
            yield request
    finally:
        _listening = former
