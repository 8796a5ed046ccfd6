"""How long a save holds up training: ours in the background and at once, torch.save, and the copy alone as the limit.

    python benchmarks/checkpoint.py                  a ViT-B and its AdamW state, 1 GB
    python benchmarks/checkpoint.py --scale 0.1      a tenth of it
    python benchmarks/checkpoint.py --device gpu     the state lies on a GPU

Wall seconds for which the caller waits; a save in the background is finished before the next variant begins. The variants
take turns in shuffled order, and the ratios of a round are compared, since the speed of a shared disk drifts. torch.save
is measured as it is, which may leave the file in the memory of the system, and with fsync, as ours are; what it left there
is written before the next variant begins. The first save in the background, which has to ask the system for its memory,
is reported apart, and so is a training loop of matrix products: its speed while files are written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _rounds import in_words, ratios, turns, verdict
from torch import Tensor

from vissl_like.core.saving import Saver

GOAL = 0.35
OURS, PEERS = "ours, in the background", ("torch.save", "torch.save and fsync")
State = dict[str, Any]


def make_state(*, scale: float, device: torch.device) -> State:
    """Tensors of the shapes of ViT-B/16 and of two averages of each; `scale` shortens the list of blocks."""
    width, blocks = 768, max(1, round(12 * scale))
    shapes = {"pos_embed": (1, 197, width), "patch_embed.weight": (width, 3, 16, 16), "head.weight": (1000, width)}
    for i in range(blocks):
        for name, rows, columns in (("qkv", 3, 1), ("proj", 1, 1), ("fc1", 4, 1), ("fc2", 1, 4)):
            shapes[f"blocks.{i}.{name}.weight"] = (rows * width, columns * width)  # type: ignore[assignment]
            shapes[f"blocks.{i}.{name}.bias"] = (rows * width,)  # type: ignore[assignment]
    weights = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    moments = {
        name: {"exp_avg": w * 0.1, "exp_avg_sq": w * w, "step": torch.tensor(7.0)} for name, w in weights.items()
    }
    return {"model_state": weights, "training_state": {"step": 7, "optimizer": moments}}


def tensors_of(state: Any) -> list[Tensor]:
    """Every tensor of a nested state."""
    if isinstance(state, Tensor):
        return [state]
    return [tensor for value in state.values() for tensor in tensors_of(value)] if isinstance(state, dict) else []


def to_disk(file: Path) -> None:
    """What the system still has in memory of a file."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def in_memory(state: State) -> None:
    """The limit: new host memory, and a copy to it."""
    copies = [tensor.to("cpu", copy=True) for tensor in tensors_of(state)]
    del copies


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(state: State, folder: Path, *, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of waiting for each variant and round."""
    background = Saver(folder / "background", keep=1)
    at_once = Saver(folder / "at_once", keep=1, in_background=False)
    step, usual = 0, folder / "state.pth"

    def save(saver: Saver) -> None:
        nonlocal step
        step += 1
        saver.save(step=step, **state)

    def and_fsync() -> None:
        torch.save(state, usual)
        to_disk(usual)

    variants: dict[str, Callable[[], None]] = {
        "torch.save": lambda: torch.save(state, usual),
        "torch.save and fsync": and_fsync,
        OURS: lambda: save(background),
        "ours, at once": lambda: save(at_once),
        "clone in memory (limit)": lambda: in_memory(state),
    }
    began = time.perf_counter()
    variants[OURS]()
    print(f"first save in the background: waited {time.perf_counter() - began:.2f} s, which includes getting memory")
    background.finish()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _, name in turns(variants, rounds=rounds):
        synchronise(device)
        began = time.perf_counter()
        variants[name]()
        seconds[name].append(time.perf_counter() - began)
        background.finish()
        if name in PEERS:
            to_disk(usual)
    began = time.perf_counter()
    variants[OURS]()
    background.finish()
    print(f"until it is published: {time.perf_counter() - began:.2f} s")
    print("a loop of products while files are written, x its speed otherwise:", slowed(background, save, device=device))
    for saver in (background, at_once):
        saver.close()
    return seconds


def slowed(saver: Saver, save: Callable[[Saver], None], *, device: torch.device) -> str:
    """Speed of small products (many calls from Python) during a save, against that between two saves."""
    a = torch.randn(128, 128, device=device)

    def speed(until: Callable[[], bool]) -> float:
        began, count = time.perf_counter(), 0
        while not until() or count < 100:
            a @ a
            count += 1
        synchronise(device)
        return count / (time.perf_counter() - began)

    save(saver)
    during = speed(lambda: saver.is_finished())
    saver.finish()
    deadline = time.perf_counter() + 1.0
    return f"{during / speed(lambda: time.perf_counter() > deadline):.2f}"


def show(seconds: dict[str, list[float]]) -> None:
    """A line for each variant, and the goal against torch.save as it is and with fsync."""
    print(f"{'':<28}{'waits, s':>9}" + "".join(f"   {f'x {peer} (quartiles)':<34}" for peer in PEERS).rstrip())
    for name, values in seconds.items():
        of_peers = "".join(f"   {in_words(ratios(seconds, name, peer), digits=3):<34}" for peer in PEERS)
        print(f"{name:<28}{statistics.median(values):9.3f}{of_peers}".rstrip())
    for peer in PEERS:
        found = ratios(seconds, OURS, peer)
        print(f"goal: <= {GOAL} x {peer}: {in_words(found, digits=3)}, {verdict(statistics.median(found) <= GOAL)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the twelve blocks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the one of temporary files")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if arguments.device == "gpu" else "cpu")
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=arguments.folder))
    try:
        state = make_state(scale=arguments.scale, device=device)
        size = sum(tensor.nbytes for tensor in tensors_of(state)) / 1e6
        print(f"{size:.0f} MB in {len(tensors_of(state))} tensors on the {arguments.device}, disk of {folder}")
        show(measure(state, folder, rounds=arguments.rounds, device=device))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
