"""What the training loop costs per iteration: ours, a bare PyTorch loop, and Lightning, on the same batches.

    python benchmarks/loop.py                     a tiny MLP: next to nothing but the loop
    python benchmarks/loop.py --model vit         a ViT-tiny of depth 4; resnet: a ResNet-18
    python benchmarks/loop.py --peers none        without Lightning
    python benchmarks/loop.py --runs 5            five processes one after the other: how far their medians differ

Batches of two 32x32 images come from a plain torch DataLoader in the same process. One thread, fp32, SGD with momentum,
CPU milliseconds per iteration; the variants take turns in shuffled order, and the ratios of a round are compared, since
the speed of a shared machine drifts. Ours runs as by default: it seeds each step, counts top-1 of the training batches,
checks every loss for being finite, and listens for signals; the others do nothing of this. "Logged" is a line in a file for
each step and a progress bar. Lightning: pip install lightning
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from _rounds import in_words, ratios, turns, verdict
from torch import Tensor, nn

from vissl_like.analysis.meters import build_meters
from vissl_like.config.schema import Loggers, Run
from vissl_like.config.schema_model import FeatureEval, Loss, Meters, Optimizer, Schedule
from vissl_like.core.loop import Feed, Options, Training
from vissl_like.models.pooling import pooled_features
from vissl_like.models.trunk import Adapter, Trunk
from vissl_like.models.vision_model import VisionModel
from vissl_like.optim.groups import build_optimizer, make_groups
from vissl_like.optim.schedules import Rates
from vissl_like.outputs.writers import Writers
from vissl_like.tasks.supervised import Supervised

BATCH, SIDE, CLASSES = 2, 32, 10
LR, MOMENTUM, DECAY = 1e-4, 0.9, 1e-4
#: Iterations before the clock starts.
WARM_UP = 20
#: Runs some iterations and returns the CPU seconds of each.
Variant = Callable[[int], float]


class Images(torch.utils.data.Dataset):
    """Random images in memory."""

    def __init__(self, count: int) -> None:
        numbers = torch.Generator().manual_seed(0)
        self._images = torch.randn(count, 3, SIDE, SIDE, generator=numbers)
        self._labels = torch.randint(0, CLASSES, (count,), generator=numbers).tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self._images[row], self._labels[row]


class Clocked:
    """The batches of a DataLoader, and a clock that runs from the end of the warm-up to finish()."""

    def __init__(self, steps: int) -> None:
        self.loader = torch.utils.data.DataLoader(Images((steps + WARM_UP) * BATCH), batch_size=BATCH)
        self._began = self._seconds = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for number, batch in enumerate(self.loader):
            if number == WARM_UP:
                self._began = time.process_time()
            yield batch

    def finish(self) -> None:
        """The last iteration is over, and what belongs to the end of the epoch."""
        self._seconds = time.process_time() - self._began

    def per_iteration(self) -> float:
        """CPU seconds."""
        return self._seconds / (len(self) - WARM_UP)


# -------------------------------------------------------------------------------------------------------------- models
def mlp() -> tuple[nn.Module, int]:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 64), nn.ReLU()), 64


def vit() -> tuple[nn.Module, int]:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=SIDE, patch_size=4, depth=4, num_classes=0), 192


def resnet() -> tuple[nn.Module, int]:
    import torchvision

    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    return network, 512


#: Name on the command line -> the network up to its features, and their width.
MODELS: dict[str, Callable[[], tuple[nn.Module, int]]] = {"mlp": mlp, "vit": vit, "resnet": resnet}


def network(name: str) -> tuple[nn.Module, nn.Module]:
    """The trunk and the head, with the same weights each time."""
    torch.manual_seed(0)
    trunk, width = MODELS[name]()
    return trunk, nn.Linear(width, CLASSES)


# ------------------------------------------------------------------------------------------------------------ variants
def bare(name: str, *, is_fused: bool = False) -> Variant:
    """What one would write by hand; the optimizer as PyTorch chooses it on a CPU, or with its fused step, as ours."""
    model = nn.Sequential(*network(name)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY, fused=is_fused)

    def run(steps: int) -> float:
        batches = Clocked(steps)
        for images, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        batches.finish()
        return batches.per_iteration()

    return run


def ours(name: str, *, is_logged: bool) -> Variant:
    """The loop of the engine `train`, with what it does by default; without saves and tests."""
    trunk, head = network(name)
    model = VisionModel(
        Trunk(trunk, Adapter(name)), nn.ModuleList([head]), pooled=pooled_features([]), settings=FeatureEval()
    )

    def run(steps: int) -> float:
        batches = Clocked(steps)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            record = Writers(
                Path(folder),
                loggers=Loggers(),
                run=Run(PROGRESS="bar" if is_logged else "none"),
                engine="train",
                log_frequency=1 if is_logged else 1_000_000,
                total_steps=len(batches),
            )
            training = our_training(model, batches, record, Path(folder), log_every=1 if is_logged else 1_000_000)
            training.run_epoch()
            batches.finish()
            record.close()
        return batches.per_iteration()

    return run


def our_training(model: VisionModel, batches: Clocked, record: Writers, folder: Path, *, log_every: int) -> Training:
    options = Optimizer(NAME="sgd", MOMENTUM=MOMENTUM, WEIGHT_DECAY=DECAY)
    groups = make_groups(model, options)
    index, weight = torch.arange(BATCH), torch.tensor(1.0)

    def feed(epoch: int, first_step: int, in_process: bool) -> Iterator[dict[str, Any]]:
        for images, labels in batches:
            yield {"data": images, "label": labels, "index": index, "weight": weight}

    train_meters, test_meters = (build_meters(Meters(), num_heads=1) for _ in range(2))
    return Training(
        task=Supervised(
            model, loss=Loss(), train_meters=train_meters, test_meters=test_meters, largest_label=CLASSES - 1
        ),
        optimizer=build_optimizer(groups, options),
        groups=groups,
        rates=Rates(
            lr=Schedule(NAME="cosine", START_VALUE=LR, UPDATE_INTERVAL="step"),
            steps_per_epoch=len(batches),
            num_epochs=2,
        ),
        feed=Feed(train=feed, to_input=lambda images: images),
        options=Options(seed=0, num_epochs=2, steps_per_epoch=len(batches), log_every=log_every, save_every_epochs=0),
        run_dir=folder,
        record=record,
    )


def with_lightning(name: str, *, is_logged: bool) -> Variant:
    """A LightningModule of the same parts; logged: two values per step into a CSV file and a progress bar."""
    import logging
    import warnings

    import lightning
    from lightning.pytorch.loggers import CSVLogger

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    class Module(lightning.LightningModule):
        batches: Clocked

        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(*network(name))

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            outputs = self.network(batch[0])
            loss = F.cross_entropy(outputs, batch[1])
            if is_logged:
                accuracy = (outputs.argmax(1) == batch[1]).float().mean()
                self.log_dict({"loss": loss, "accuracy": accuracy}, prog_bar=True)
            return loss

        def on_train_epoch_end(self) -> None:
            self.batches.finish()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)

    module = Module()

    def run(steps: int) -> float:
        batches = Clocked(steps)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            trainer = lightning.Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=1,
                logger=CSVLogger(folder) if is_logged else False,
                log_every_n_steps=1,
                enable_progress_bar=is_logged,
                enable_checkpointing=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            module.batches = batches
            trainer.fit(module, batches)
        return batches.per_iteration()

    return run


# ----------------------------------------------------------------------------------------------------------- measuring
def measured(variants: dict[str, Variant], *, rounds: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds per iteration of each variant, one number for each round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _, name in turns(variants, rounds=rounds):
        seconds[name].append(variants[name](steps))
    return seconds


#: (ours, the other, the largest share of it).
Goal = tuple[str, str, float]


def show(seconds: dict[str, list[float]], goals: Sequence[Goal]) -> None:
    """A line for each variant, and one for each goal."""
    print(f"{'':<22}{'CPU ms':>8}   x bare (quartiles)")
    for name, values in seconds.items():
        of_bare = in_words(ratios(seconds, name, "bare"))
        print(f"{name:<22}{1000 * statistics.median(values):8.3f}   {of_bare}")
    for one, other, limit in goals:
        if other not in seconds:
            continue
        found = ratios(seconds, one, other)
        print(f"goal: {one} <= {limit:g} x {other}: {in_words(found)}, {verdict(statistics.median(found) <= limit)}")


def several(runs: int, argv: Sequence[str]) -> None:
    """The same in processes of their own: the median that each found for a goal, and how many of them reach it."""
    found: dict[str, list[float]] = {}
    for _ in range(runs):
        command = [sys.executable, str(Path(__file__).resolve()), *argv, "--runs", "1", "--as-json"]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        for name, ratio in json.loads(lines[-1]).items():
            found.setdefault(name, []).append(ratio)
    for one, other, limit in GOALS:
        values = found.get(f"{one} / {other}")
        if values:
            reached = sum(value <= limit for value in values)
            each = " ".join(f"{value:.2f}" for value in values)
            print(f"goal: {one} <= {limit:g} x {other}: reached by {reached} of {runs} runs: {each}")


GOALS: tuple[Goal, ...] = (
    ("ours", "bare", 1.15),
    ("ours", "lightning", 0.65),
    ("ours, logged", "lightning, logged", 0.5),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the loops."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", choices=list(MODELS), default="mlp")
    parser.add_argument("--peers", choices=["all", "none"], default="all", help="none: without Lightning")
    parser.add_argument("--steps", type=int, help="iterations of a turn")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--runs", type=int, default=1, help="processes, one after the other; for the tiny MLP")
    parser.add_argument("--as-json", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.runs > 1:
        several(arguments.runs, sys.argv[1:] if argv is None else argv)
        return 0
    torch.set_num_threads(1)
    name = arguments.model
    steps = arguments.steps or {"mlp": 150, "vit": 40, "resnet": 20}[name]
    print(f"model {name}, batches of {BATCH} images {SIDE}x{SIDE}, {arguments.rounds} rounds of {steps} iterations")
    seconds = measured(chosen(name, peers=arguments.peers), rounds=arguments.rounds, steps=steps)
    show(seconds, GOALS if name == "mlp" else ())
    if arguments.as_json:
        medians = {f"{one} / {other}": ratios(seconds, one, other) for one, other, _ in GOALS if other in seconds}
        print(json.dumps({pair: statistics.median(values) for pair, values in medians.items()}))
    return 0


def chosen(name: str, *, peers: str) -> dict[str, Variant]:
    """What is compared on a model."""
    variants = {
        "bare": bare(name),
        "bare, fused step": bare(name, is_fused=True),
        "ours": ours(name, is_logged=False),
        "ours, logged": ours(name, is_logged=True),
    }
    if peers == "all" and importlib.util.find_spec("lightning") is None:
        print("Lightning is not installed and left out; for the comparison: pip install lightning")
    elif peers == "all":
        variants["lightning"] = with_lightning(name, is_logged=False)
        variants["lightning, logged"] = with_lightning(name, is_logged=True)
    return variants


if __name__ == "__main__":
    raise SystemExit(main())
