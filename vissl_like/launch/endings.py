"""The ways in which processes of a run end, as exceptions and as what machines and processes tell each other. Free of torch."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from vissl_like import errors
from vissl_like.core import signals
from vissl_like.errors import Stopped, UserError

DONE, MISTAKE, STOPPED, DEFECT, KILLED, LOST = "done", "mistake", "stopped", "defect", "killed", "lost"

#: What decides where several processes ended differently: the first of these. The later ones may follow from it.
GRAVITY = (MISTAKE, STOPPED, KILLED, DEFECT, LOST, DONE)


class RunFailed(Exception):
    """A rank was killed or met a defect. The message says what is known; the log file holds the traceback."""

    exit_code = errors.EXIT_DEFECT
    traceback = ""


class Killed(RunFailed):
    """A process was killed. `cause` says which; the run can go on from its last save."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"{cause}; start the same command again to resume.")
        self.cause = cause


class Lost(Killed):
    """Another process does not answer any more; why that is, only its own machine can know."""

    def __init__(self, cause: str, traceback: str = "") -> None:
        super().__init__(cause)
        self.traceback = traceback


class Interrupted(Exception):
    """A signal ended the run while it started. The exit code is the shell's: 128 + number of the signal."""

    def __init__(self, number: int) -> None:
        name = signals.name_of(number)
        super().__init__(f"ended by {name} while starting: nothing new was saved; what was saved before is kept.")
        self.exit_code = 128 + number


def show_interrupt() -> int:
    """Say what a KeyboardInterrupt in this process means, and return the exit code: 75 if everything was saved before."""
    said = signals.saved()
    print(said or "interrupted: nothing more was saved; start the same command again to go on.", file=sys.stderr)
    return errors.EXIT_STOPPED if said else 128 + signal.SIGINT


@dataclass(frozen=True)
class Ending:
    """How a launch, or the processes of one machine, ended. `kind` is one of GRAVITY."""

    kind: str
    message: str = ""
    exit_code: int = errors.EXIT_DONE
    error: str = ""
    """Name of the class of a mistake."""
    traceback: str = ""
    results: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, error: BaseException) -> Ending:
        """The ending that an exception stands for."""
        code = getattr(error, "exit_code", errors.EXIT_DEFECT)
        if isinstance(error, UserError):
            return cls(MISTAKE, str(error), code, error=type(error).__name__)
        if isinstance(error, Stopped | Interrupted):
            return cls(STOPPED, str(error), code)
        if isinstance(error, KeyboardInterrupt):
            return cls(STOPPED, "ended by Ctrl-C: nothing more was saved.", 128 + signal.SIGINT)
        if isinstance(error, Killed):
            kind = LOST if isinstance(error, Lost) else KILLED
            return cls(kind, error.cause, code, traceback=error.traceback)
        return cls(DEFECT, str(error), code, traceback=getattr(error, "traceback", ""))

    @property
    def exception(self) -> Exception:
        """The exception that shows this ending."""
        if self.kind == MISTAKE:
            return mistake(self.error, self.message, exit_code=self.exit_code)
        if self.kind == STOPPED:
            stopped = Stopped(self.message)
            stopped.exit_code = self.exit_code  # type: ignore[misc]
            return stopped
        if self.kind in (KILLED, LOST):
            return Killed(self.message)
        failed = RunFailed(self.message)
        failed.traceback = self.traceback
        return failed

    def to_json(self) -> str:
        """As text, for the other machines."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str | bytes) -> Ending:
        """What another machine said."""
        return cls(**json.loads(text))


def mistake(name: str, message: str, *, exit_code: int) -> UserError:
    """A UserError by the name of its class, as another process raised it."""
    kind = getattr(errors, name, UserError)
    error: UserError = kind(message) if issubclass(kind, UserError) else UserError(message)
    error.exit_code = exit_code
    return error
