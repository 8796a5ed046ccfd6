"""Runs of any engine with the arguments of the command line, by one or several ranks, which may be killed on the way.

Each rank is a fork of a process that has imported torch once (fork_server.py), in the environment that torchrun gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.integration.forks import Ended, run_ranks

QUIET = ["config.PLUGINS=[failing_plugin]", "config.RUN.REPORT=false", "config.RUN.PROGRESS=none"]


def start(
    engine: str,
    run_dir: Path,
    *overrides: str,
    env: Mapping[str, str] | None = None,
    ranks: int = 1,
    kill_after_s: Sequence[float] = (),
) -> Ended:
    """Run an engine to its end; the exit code and output are those of the first rank. `kill_after_s`: when each
    rank is killed with all processes that it has started.
    """
    argv = [f"engine_name={engine}", *QUIET, *overrides, f"config.RUN.DIR={run_dir}"]
    return run_ranks(argv, ranks=ranks, env=env, kill_after_s=kill_after_s)[0]
