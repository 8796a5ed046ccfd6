"""Every command block of the documentation marked `bash runnable` runs as printed, on a tiny folder of images.

`vissl-like` and tools/run_distributed_engines.py, and the processes that they start, run in forks of a process that has
imported torch; other programs begin as they do for a reader.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.forks import write_command

ROOT = Path(__file__).resolve().parents[2]
TOOL = "tools/run_distributed_engines.py"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\S+)(?: +(\S+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the word after it, its text."""

    page: Path
    number: int
    language: str
    word: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.stem}-{self.number}"


def blocks(page: Path) -> list[Block]:
    found = FENCE.findall(page.read_text("utf-8"))
    return [Block(page, number, *parts) for number, parts in enumerate(found, 1)]


RUNNABLE = [block for page in PAGES for block in blocks(page) if (block.language, block.word) == ("bash", "runnable")]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as a reader has it: tools/, the command, the files of the pages, a few images and a weights file."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("tools", "vissl_like"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir()
    write_command(folder / "bin" / "vissl-like")
    write_command(folder / "bin" / "tool", program=ROOT / TOOL)
    other = f'[ "$1" = {TOOL} ] && shift && exec tool "$@"; exec "{sys.executable}" "$@"'
    command(folder / "bin" / "python", other)
    write_images(folder / "my_images")
    write_weights(folder / "resnet50.pth")
    for page in PAGES:
        for block in blocks(page):
            if block.word.startswith("file="):
                path = folder / block.word.removeprefix("file=")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text, encoding="utf-8")
    return folder


def command(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def write_images(folder: Path) -> None:
    random = np.random.default_rng(0)
    for row in range(8):
        path = folder / ("cats", "dogs")[row % 2] / f"{row:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (48, 56, 3), dtype=np.uint8)).save(path)


def write_weights(path: Path) -> None:
    import torch
    import torchvision

    torch.manual_seed(0)
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), path)


def test_the_pages_have_something_to_run() -> None:
    assert {block.page.stem for block in RUNNABLE} >= {"start", "clusterfit", "weights", "distributed", "extend"}


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_block_runs_as_printed(shop: Path, block: Block) -> None:
    environment = dict(os.environ, PATH=f"{shop / 'bin'}{os.pathsep}{os.environ['PATH']}", WANDB_MODE="offline")
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", "-e", "-c", block.text], cwd=shop, env=environment, capture_output=True, text=True, timeout=300
    )
    shown = f"{block.page.name}, block {block.number}:\n{block.text}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    assert done.returncode == 0, shown
    assert "Traceback" not in done.stderr, shown
