"""A plugin for tests: the task `supervised_patient` is `supervised`, but waits at a step until it is asked to stop.

It does so in its fifth step as long as PATIENT_FOLDER holds a file `wait`, and leaves a file `waiting` there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vissl_like import registry
from vissl_like.core import signals
from vissl_like.tasks.supervised import Supervised


class Patient(Supervised):
    """Supervised, with time for a signal."""

    steps = 0

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        Patient.steps += 1
        folder = Path(os.environ["PATIENT_FOLDER"])
        if Patient.steps == 5 and (folder / "wait").exists():
            (folder / "waiting").touch()
            deadline = time.monotonic() + 120
            while not signals._was_asked and time.monotonic() < deadline:
                time.sleep(0.02)
        return super().forward(batch)


registry.add("task", "supervised_patient", "slurm_plugin:Patient")
