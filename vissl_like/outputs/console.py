"""Progress on the terminal: a live bar where somebody watches, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

#: What a progress line shows of a record, in order: key, label, format.
FIELDS = (
    ("epoch", "epoch", "{:.2f}"),
    ("loss", "loss", "{:.4g}"),
    ("lr", "lr", "{:.3g}"),
    ("images_per_s", "images/s", "{:.0f}"),
)

#: Lines are at least this far apart, whatever LOG_FREQUENCY says.
LINES_APART_S = 1.0
#: The bar is redrawn at most this often, so that a step costs microseconds.
BAR_APART_S = 0.1


def progress(
    mode: str,
    *,
    total: int | None,
    title: str,
    unit: str = "step",
    log_frequency: int = 10,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Progress of `total` units (None: unknown) as RUN.PROGRESS says: auto, bar, lines or none."""
    stream = stream or sys.stderr
    if mode == "none":
        return Progress(total=total, clock=clock)
    if mode == "bar" or (mode == "auto" and stream.isatty()):
        return BarProgress(total=total, clock=clock, title=title, stream=stream)
    return LinesProgress(total=total, clock=clock, title=title, unit=unit, log_frequency=log_frequency, stream=stream)


class Progress:
    """Counts what is done; shows nothing. Base of the two that show it."""

    def __init__(self, *, total: int | None, clock: Callable[[], float]) -> None:
        self.total = total
        self.clock = clock
        self.newest: Mapping[str, Any] = {}
        self._first: tuple[int, float] | None = None

    def update(self, done: int, record: Mapping[str, Any] | None = None) -> None:
        """`done` units are finished; `record`, if there is a new one, may hold epoch, loss, lr and images_per_s."""
        self.newest = record or self.newest
        if self._first is None:
            self._first = (done, self.clock())

    def seconds_left(self, done: int) -> float | None:
        """Estimate from the pace since the first update; None before there is a pace or a total."""
        if self._first is None or self.total is None or done <= self._first[0]:
            return None
        pace = (self.clock() - self._first[1]) / (done - self._first[0])
        return max(0.0, (self.total - done) * pace)

    def close(self) -> None:
        """Leave the terminal as it was."""


class LinesProgress(Progress):
    """One line each LOG_FREQUENCY units, at most one a second, and always the last."""

    def __init__(
        self,
        *,
        total: int | None,
        clock: Callable[[], float],
        title: str,
        unit: str,
        log_frequency: int,
        stream: TextIO,
    ) -> None:
        super().__init__(total=total, clock=clock)
        self.title, self.unit, self.log_frequency, self.stream = title, unit, log_frequency, stream
        self._printed_at: float | None = None

    def update(self, done: int, record: Mapping[str, Any] | None = None) -> None:
        super().update(done, record)
        is_last = self.total is not None and done >= self.total
        if not is_last and (done % self.log_frequency or not self._is_time()):
            return
        self._printed_at = self.clock()
        count = f"{done}/{self.total}" if self.total else f"{done}"
        parts = [self.title, f"{self.unit} {count}", *shown(self.newest)]
        left = self.seconds_left(done)
        if left is not None and not is_last:
            parts.append(f"eta {duration(left)}")
        print("  ".join(part for part in parts if part), file=self.stream, flush=True)

    def _is_time(self) -> bool:
        return self._printed_at is None or self.clock() - self._printed_at >= LINES_APART_S


class BarProgress(Progress):
    """A live bar at the foot of the terminal (rich); what is printed meanwhile appears above it."""

    def __init__(self, *, total: int | None, clock: Callable[[], float], title: str, stream: TextIO) -> None:
        super().__init__(total=total, clock=clock)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._bar = RichProgress(*columns, console=Console(file=stream), auto_refresh=False)
        self._task = self._bar.add_task(title, total=total, numbers="")
        self._bar.start()
        self._drawn_at = float("-inf")

    def update(self, done: int, record: Mapping[str, Any] | None = None) -> None:
        super().update(done, record)
        now = self.clock()
        is_last = self.total is not None and done >= self.total
        if now - self._drawn_at < BAR_APART_S and not is_last:
            return
        self._drawn_at = now
        left = self.seconds_left(done)
        numbers = shown(self.newest) + ([f"eta {duration(left)}"] if left is not None and not is_last else [])
        self._bar.update(self._task, completed=done, numbers="  ".join(numbers))
        self._bar.refresh()

    def close(self) -> None:
        self._bar.stop()


def shown(record: Mapping[str, Any]) -> list[str]:
    """The known fields of a record as text, e.g. ["epoch 2.50", "loss 0.513", "1843 images/s"]."""
    parts = []
    for key, label, template in FIELDS:
        if isinstance(record.get(key), int | float):
            number = template.format(record[key])
            parts.append(f"{number} {label}" if label.endswith("/s") else f"{label} {number}")
    return parts


def duration(seconds: float) -> str:
    """Seconds as m:ss, h:mm:ss or 3 d 04 h."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02d} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
