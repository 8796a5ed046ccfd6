"""Where log lines go: all of them to RUN.DIR/log.txt, short ones to the terminal. Free of torch."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

LOG_FILE = "log.txt"
OURS = "vissl_like"
_SHOWN = "is_shown"

#: Loggers of libraries that print what we say in our own words.
_TOO_LOUD = ("torch.distributed.elastic", "torch.distributed.run", "torch.multiprocessing")


class Console(logging.Handler):
    """Short lines on stderr; tracebacks stay in the log file."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        if getattr(record, _SHOWN, False):
            return
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        with contextlib.suppress(ValueError, OSError):  # the terminal is gone
            print(f"{self.prefix}{level}{record.getMessage()}", file=sys.stderr, flush=True)


class LogFile(logging.FileHandler):
    """log.txt: time, level, place, text and tracebacks."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / LOG_FILE, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is reported by whoever writes something that matters."""

    def close(self) -> None:
        """Close the file, whatever can still be written."""
        with contextlib.suppress(OSError):
            super().close()


def to_console(*, verbose: bool = False, rank: int = 0) -> None:
    """Send log lines to the terminal, once per process; ranks other than the first send warnings only."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, Console)]:
        root.removeHandler(handler)
    console = Console(prefix=f"[rank {rank}] " if rank else "")
    console.setLevel(logging.WARNING if rank else logging.INFO)
    root.addHandler(console)
    logging.getLogger(OURS).setLevel(logging.DEBUG if verbose else logging.INFO)
    quieten_libraries()


def quieten_libraries() -> None:
    """Silence the loggers of libraries that print what we say in our own words; some reset their level when imported."""
    for name in [*_TOO_LOUD, *logging.root.manager.loggerDict]:
        if name.startswith(_TOO_LOUD):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def to_file(run_dir: Path) -> Iterator[None]:
    """Write log lines to RUN.DIR/log.txt as well while the block runs."""
    file = LogFile(run_dir)
    root = logging.getLogger()
    root.addHandler(file)
    try:
        yield
    finally:
        root.removeHandler(file)
        file.close()


def write_traceback(run_dir: Path, text: str) -> None:
    """Append a traceback to RUN.DIR/log.txt, from any process, if there is room for it."""
    with (
        contextlib.suppress(OSError),
        open(run_dir / LOG_FILE, "a", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(text.rstrip() + "\n")


def to_file_only(message: str) -> None:
    """A warning for log.txt that the terminal has shown before there was a log.txt."""
    logging.getLogger(OURS).warning("%s", message, extra={_SHOWN: True})
