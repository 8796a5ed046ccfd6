"""A plugin for tests: the task `supervised_mortal` is `supervised`, but its process may die at a chosen step.

KILL_AFTER=n kills -9 in the n-th step of this process, KILL_DELAY_S seconds later (so that it may strike while a
checkpoint is being written). SIGNAL_AFTER=n has SIGTERM sent to the whole process group instead, as clusters do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
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
        if str(Mortal.steps) == os.environ.get("SIGNAL_AFTER"):
            # By another process: PyTorch's loaders treat a signal from their parent otherwise.
            subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)
        return super().forward(batch)


def die(delay_s: float) -> None:
    time.sleep(delay_s)
    os.kill(os.getpid(), signal.SIGKILL)


registry.add("task", "supervised_mortal", "kill_plugin:Mortal")
