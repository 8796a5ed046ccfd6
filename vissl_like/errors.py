"""What can go wrong for a user, and the exit code each of these ends with.

Everything that is the user's to mend is a UserError: the terminal shows its message, never a traceback.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback

EXIT_DONE = 0
EXIT_DEFECT = 1
EXIT_CONFIGURATION = 2
EXIT_DATA = 3
EXIT_STOPPED = 75


class UserError(Exception):
    """A mistake that the user can mend. The message names the key or file, the value, what is allowed and the cure."""

    exit_code = EXIT_CONFIGURATION


class ConfigError(UserError):
    """The configuration is wrong. Several problems are reported at once, one per line."""

    exit_code = EXIT_CONFIGURATION


class DataError(UserError):
    """Images, labels, features or a stage's folder are missing, damaged or do not belong together."""

    exit_code = EXIT_DATA


class WeightsError(UserError):
    """A weights file or checkpoint is missing, unsafe, damaged or does not fit the model."""

    exit_code = EXIT_DATA


class Stopped(Exception):
    """The run was stopped by a signal after it had saved; starting it again goes on from there."""

    exit_code = EXIT_STOPPED


# ---------------------------------------------------------------------------------------------- the system says no
_AGAIN = "then start the same command again: what is finished is kept."
_FULL = f"Free some space there, or choose another folder; {_AGAIN}"
_RIGHTS = f"Give yourself the right to write there, or choose another folder; {_AGAIN}"
_NETWORK = f"See to the file system (often a network drive); {_AGAIN}"
#: errno -> what it means here, and the cure.
_REFUSALS = {
    errno.ENOSPC: ("the disk is full", _FULL),
    errno.EDQUOT: ("your quota on this disk is used up", _FULL),
    errno.EFBIG: ("the file system does not take files of this size", _FULL),
    errno.EROFS: ("the file system is read-only", _RIGHTS),
    errno.EACCES: ("no permission", _RIGHTS),
    errno.EPERM: ("not permitted", _RIGHTS),
    errno.EMFILE: (
        "this process may open no more files",
        f"Raise the limit (ulimit -n 65536) or lower config.DATA.NUM_DATALOADER_WORKERS; {_AGAIN}",
    ),
    errno.ENFILE: ("this machine may open no more files", f"Close other programs; {_AGAIN}"),
    errno.EIO: ("the disk reports an error", _NETWORK),
    errno.ESTALE: ("the file system has lost this file", _NETWORK),
}
_OUT_OF_MEMORY = (
    "out of memory on {where} ({reason}). Smaller batches need less: config.DATA.TRAIN.BATCHSIZE_PER_REPLICA (and TEST), with "
    "config.OPTIMIZER.ACCUMULATE_STEPS raised by the same factor for the same steps. So do config.MACHINE.PRECISION=bf16, "
    "fewer processes (config.DISTRIBUTED.NUM_PROC_PER_NODE) or loader workers, and smaller images (TRANSFORMS)."
)


def explained(error: BaseException, *, place: str | os.PathLike[str] = "") -> UserError | None:
    """What the system's refusal means for the user: a full or read-only disk, missing rights, too many open files, no memory.

    None for every other error. `place`: the file or folder it is about, where the error itself does not say so.
    """
    number = _errno_of(error)
    if number == errno.ENOMEM or _is_out_of_memory(error):
        on_gpu = "CUDA" in str(error) or "HIP" in str(error)
        where = "the GPU" if on_gpu else "this machine"
        return ConfigError(_OUT_OF_MEMORY.format(where=where, reason=_first_line(error)))
    if number is None:
        return None
    filename = getattr(error, "filename", None)
    file = os.fsdecode(filename) if isinstance(filename, str | bytes | os.PathLike) else os.fspath(place)
    start = f"{file}: " if file else ""
    if number in _REFUSALS:
        what, cure = _REFUSALS[number]
        return DataError(f"{start}{what} ({os.strerror(number)}). {cure}")
    if not file or isinstance(error, ConnectionError | TimeoutError | ChildProcessError | ProcessLookupError):
        return None
    return DataError(f"{start}cannot be read or written ({os.strerror(number)}). Mend that; {_AGAIN}")


def _errno_of(error: BaseException) -> int | None:
    """The system's number of an error; PyTorch and numpy only quote its words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if isinstance(error, OSError) and "requested and" in text and text.endswith("written"):  # numpy, a full disk
        return errno.ENOSPC
    if isinstance(error, RuntimeError):
        return next((number for number in _REFUSALS if f"{os.strerror(number)} ({number})" in text), None)
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    known = "DefaultCPUAllocator: can't allocate memory" in text or "CUDA out of memory" in text
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or known


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(". ") if lines else type(error).__name__


def show_error(error: Exception) -> int:
    """Print an error to the terminal; returns the exit code. Only defects outside of a run show a traceback."""
    if getattr(error, "exit_code", None) is None:
        error = explained(error) or error
    code: int | None = getattr(error, "exit_code", None)
    if code is None:
        traceback.print_exception(error)
        print(f"error: {type(error).__name__}: {error}. This is a defect of the program.", file=sys.stderr)
        return EXIT_DEFECT
    prefix = "" if isinstance(error, Stopped) else "error: "
    print(f"{prefix}{error}", file=sys.stderr)
    return code
