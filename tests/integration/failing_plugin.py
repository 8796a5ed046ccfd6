"""A plugin for tests: what goes wrong in the world around a run, at a chosen moment.

The source `counted_folder` is disk_folder, but writes each row that it opens into the file COUNTED. FILL=n has the n-th
image opened fill the disk of the folder FILL_DISK to the last byte; FILL_AFTER=n has the n-th step of the task
`supervised_filling` do so, and ALLOCATE_AFTER=n ask for more memory than there is. OPEN_FILES=n: the process may open no
more files.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vissl_like import registry
from vissl_like.analysis import features
from vissl_like.data.folder import FolderSource
from vissl_like.tasks.supervised import Supervised

# Blocks are marked as finished often, so that there is something to lose between two marks. But each mark closes the
# files: where there are to be too many of them, none is made.
features._MARK_EVERY_S = 3600 if "OPEN_FILES" in os.environ else 0.03


class CountedFolder(FolderSource):
    """A folder that keeps a record of what is read from it."""

    opened = 0

    def read(self, row: int) -> bytes:
        CountedFolder.opened += 1
        if str(CountedFolder.opened) == os.environ.get("FILL"):
            fill(Path(os.environ["FILL_DISK"]))
        with contextlib.suppress(KeyError), open(os.environ["COUNTED"], "a") as file:
            file.write(f"{row}\n")
        return super().read(row)


class Filling(Supervised):
    """Supervised, until the disk or the memory is full."""

    steps = 0

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        Filling.steps += 1
        if str(Filling.steps) == os.environ.get("FILL_AFTER"):
            fill(Path(os.environ["FILL_DISK"]))
        if str(Filling.steps) == os.environ.get("ALLOCATE_AFTER"):
            torch.empty(1 << 50, dtype=torch.uint8)
        return super().forward(batch)


def fill(disk: Path) -> None:
    """Leave not one byte."""
    with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


registry.add("task", "supervised_filling", "failing_plugin:Filling")
registry.add("data_source", "counted_folder", "failing_plugin:CountedFolder")
if "OPEN_FILES" in os.environ:
    limit = int(os.environ["OPEN_FILES"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
