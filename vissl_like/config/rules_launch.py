"""What the types cannot say about config.SLURM: a batch job that sbatch can read, and one place for every option."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from vissl_like.config.schema import Config
from vissl_like.config.schema_launch import Slurm

_KEY = "config.SLURM"
_TEXTS = ("NAME", "COMMENT", "PARTITION", "ACCOUNT", "QOS", "CONSTRAINT", "LOG_FOLDER")
#: Options of sbatch that follow from others; set twice they would contradict each other.
_OWNED = {
    "nodes": "config.DISTRIBUTED.NUM_NODES",
    "ntasks": "config.DISTRIBUTED.NUM_NODES (one task per node starts the processes there)",
    "ntasks_per_node": "config.DISTRIBUTED.NUM_PROC_PER_NODE (one task per node starts the processes there)",
    "cpus_per_task": "config.SLURM.NUM_CPU_PER_PROC",
    "time": "config.SLURM.TIME_HOURS and TIME_MINUTES",
    "signal": "config.SLURM.SIGNAL_DELAY_S",
    "job_name": "config.SLURM.NAME",
    "output": "config.SLURM.LOG_FOLDER",
    "error": "config.SLURM.LOG_FOLDER",
    "array": "a sweep (-m): each of its points is a job",
}


def slurm_problems(config: Config) -> Iterator[tuple[str, str]]:
    """(key, text) of every option of config.SLURM that no batch job can have."""
    options = config.SLURM
    for name in _TEXTS:
        value = getattr(options, name)
        if not value.isprintable():
            yield f"{_KEY}.{name}", f"{_KEY}.{name}={value!r}: must be one line of printable characters."
    minutes = minutes_of(options)
    if minutes * 60 <= options.SIGNAL_DELAY_S:
        key = f"{_KEY}.TIME_MINUTES"
        yield (
            key,
            f"{key}={options.TIME_MINUTES}: the time limit of {minutes} min (with {_KEY}.TIME_HOURS={options.TIME_HOURS}) "
            f"must be longer than {_KEY}.SIGNAL_DELAY_S={options.SIGNAL_DELAY_S}, in which the run saves.",
        )
    for name, value in options.ADDITIONAL_PARAMETERS.items():
        key = f"{_KEY}.ADDITIONAL_PARAMETERS.{name}"
        owner = _OWNED.get(name.replace("-", "_"))
        if owner:
            yield key, f"{key}={value!r}: this follows from {owner}."
        elif not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]+", name):
            yield key, f"{key}: must be the long name of an option of sbatch, without dashes before it."
        elif not _is_written_plainly(value):
            yield key, f"{key}={value!r}: must be one line of text, a number, true (an option without value) or a list."


def minutes_of(options: Slurm) -> int:
    """The time limit in minutes."""
    return options.TIME_HOURS * 60 + options.TIME_MINUTES


def _is_written_plainly(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str | int) and _is_written_plainly(item) for item in value)
    return value is not False and isinstance(value, str | int | float) and str(value).isprintable()
