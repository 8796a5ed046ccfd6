"""A plugin for tests: the task `supervised_mortal` is `supervised`, but its process may die at a chosen step.

KILL_AFTER=n kills -9 in the n-th step of this process, KILL_DELAY_S seconds later (so that it may strike while a
checkpoint is being written). SIGNAL_AFTER=n has SIGTERM sent to the whole process group instead, as clusters do;
with SIGNAL_DELAY_S it reaches the loader's processes that many seconds before this one. KILL_WHILE_SAVING=s kills -9 as
soon as the save of a step from s on has begun to be written, and before it is published; WATCHED is the run folder.
KILL_LAUNCHER_AFTER=n kills -9 the launcher that started this process, and leaves this one to find that out.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vissl_like import registry
from vissl_like.tasks.supervised import Supervised


class Mortal(Supervised):
    """Supervised, until it is killed."""

    steps = 0

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        Mortal.steps += 1
        if str(Mortal.steps) == os.environ.get("KILL_AFTER"):
            threading.Thread(target=die, args=[float(os.environ.get("KILL_DELAY_S", "0"))], daemon=True).start()
        if str(Mortal.steps) == os.environ.get("KILL_LAUNCHER_AFTER"):
            os.kill(os.getppid(), signal.SIGKILL)
        if str(Mortal.steps) == os.environ.get("SIGNAL_AFTER"):
            signal_to_all(float(os.environ.get("SIGNAL_DELAY_S", "0")))
        return super().forward(batch)


def signal_to_all(delay_s: float) -> None:
    """By another process: PyTorch's loaders treat a signal from their parent otherwise."""
    if not delay_s:
        sent = subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"], start_new_session=True)
        # The signal of another rank may strike this messenger before it has left the group; it has struck all, then.
        if sent.returncode not in (0, -signal.SIGTERM):
            raise RuntimeError(f"kill ended with {sent.returncode}")
        return
    children = " ".join(str(child.pid) for child in multiprocessing.active_children())
    commands = f"kill -TERM {children}; sleep {delay_s}; kill -TERM {os.getpid()}"
    subprocess.Popen(["sh", "-c", commands], start_new_session=True)
    time.sleep(delay_s / 2)  # long enough for the system to say that they have ended


def die_while_saving(folder: Path, first_step: int) -> None:
    while True:
        for entry in folder.glob(".saving-*"):
            if int(entry.name.split("-")[1]) >= first_step and any(file.stat().st_size for file in entry.glob("*")):
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.0002)


def die(delay_s: float) -> None:
    time.sleep(delay_s)
    os.kill(os.getpid(), signal.SIGKILL)


if "KILL_WHILE_SAVING" in os.environ:
    watched = Path(os.environ["WATCHED"]) / "checkpoints"
    first_step = int(os.environ["KILL_WHILE_SAVING"])
    threading.Thread(target=die_while_saving, args=[watched, first_step], daemon=True).start()

registry.add("task", "supervised_mortal", "kill_plugin:Mortal")
