"""Engines that end in the ways a run can end; named by config.PLUGINS of the launch tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from vissl_like import registry
from vissl_like.config.schema import Job

if "INTERRUPT_WHILE_COMPOSING" in os.environ:
    signal.raise_signal(signal.SIGINT)
registry.add("engine", "endings", "launch_plugin:run")


def run(job: Job, run_dir: Path) -> dict[str, Any]:
    """RUN.NAME says how the last rank ends."""
    from vissl_like.core import distributed, signals
    from vissl_like.errors import DataError, Stopped

    world = distributed.current()
    with open(run_dir / "started.txt", "a") as file:
        file.write(f"{world.rank} of {world.size}, pid {os.getpid()}\n")
    ending, is_last = job.config.RUN.NAME, world.rank == world.size - 1
    if ending == "mistake" and is_last:
        raise DataError("config.DATA: these images are wrong.")
    if ending == "defect" and is_last:
        raise ZeroDivisionError("oops")
    if ending == "killed" and is_last:
        os.kill(os.getpid(), signal.SIGKILL)
    if ending in ("stop", "slow stop"):
        with signals.listen() as request:
            with open(run_dir / "listening", "a") as file:
                file.write(f"{world.rank}\n")
            deadline = time.monotonic() + 60
            while not request.requested and time.monotonic() < deadline:
                time.sleep(0.05)
        if ending == "slow stop":  # a run whose last words take long
            stopped = signals.stopped(f"stopped by {request.name} after step 1.")
            with open(run_dir / "saved", "a") as file:
                file.write(f"{world.rank}\n")
            time.sleep(2)
            raise stopped
        raise Stopped(f"stopped by {request.name} after step 1.")
    if ending == "deaf":
        (run_dir / "listening").touch()
        time.sleep(60)
    distributed.barrier()
    ranks = distributed.all_gather_object(world.rank)
    # Forks of the tests have it from the start: this looks at the ranks of test_a_killed_rank_..., which start afresh.
    is_rank = multiprocessing.current_process().name != "MainProcess" and world.size > 1
    if is_rank and "spawning" not in sys.modules and "hydra" in sys.modules:
        raise AssertionError("a rank composes nothing and needs no Hydra")
    return {"ranks": len(ranks), "seed": job.config.SEED_VALUE, "loss": 0.5}
