"""What can go wrong for a user, and the exit code each of these ends with.

Everything that is the user's to mend is a UserError: the terminal shows its message, never a traceback.
"""

from __future__ import annotations

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


def show_error(error: Exception) -> int:
    """Print an error to the terminal; returns the exit code. Only defects outside of a run show a traceback."""
    code: int | None = getattr(error, "exit_code", None)
    if code is None:
        traceback.print_exception(error)
        print(f"error: {type(error).__name__}: {error}. This is a defect of the program.", file=sys.stderr)
        return EXIT_DEFECT
    prefix = "" if isinstance(error, Stopped) else "error: "
    print(f"{prefix}{error}", file=sys.stderr)
    return code
