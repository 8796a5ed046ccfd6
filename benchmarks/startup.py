"""What it costs to begin: CPU seconds of the whole command, up to its first training step, and of its short answers.

    python benchmarks/startup.py
    python benchmarks/startup.py --rounds 9

The first step of a tiny recipe, from the command line to the end of its backward pass and update, against a script that
imports torch, builds the same network and does a step on random numbers. Each command is a process of its own; CPU
seconds of it and its children; the commands take turns, and the ratios of a round are compared. All three end at once
after the step, without clearing up. Lightning: pip install lightning
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _rounds import in_words, ratios, turns, verdict

ROOT = Path(__file__).resolve().parents[1]

BARE = """
import os
import torch
from vissl_like.models.resnet import resnet_small
trunk = resnet_small()
model = torch.nn.Sequential(trunk, torch.nn.Flatten(), torch.nn.Linear(64, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
images, labels = torch.randn(16, 3, 28, 28), torch.randint(0, 4, (16,))
torch.nn.functional.cross_entropy(model(images), labels).backward()
optimizer.step()
os._exit(0)
"""

LIGHTNING = """
import os
import lightning, torch
from vissl_like.models.resnet import resnet_small
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(resnet_small(), torch.nn.Flatten(), torch.nn.Linear(64, 4))
    def training_step(self, batch, number):
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
data = torch.utils.data.TensorDataset(torch.randn(16, 3, 28, 28), torch.randint(0, 4, (16,)))
lightning.Trainer(
    accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
).fit(Module(), torch.utils.data.DataLoader(data, batch_size=16))
os._exit(0)
"""

#: A task that ends the process where the second step would begin: what comes after the first is not to be counted.
PLUGIN = """
import os
from vissl_like import registry
from vissl_like.tasks.supervised import Supervised
class Once(Supervised):
    steps = 0
    def forward(self, batch):
        Once.steps += 1
        if Once.steps == 2:
            os._exit(0)
        return super().forward(batch)
registry.add("task", "once", "once:Once")
"""

TOOL = str(ROOT / "tools" / "run_distributed_engines.py")
RECIPE = (
    "config=debug/supervised_synthetic",
    "config.PLUGINS=[once]",
    "config.TASK.NAME=once",
    "config.MACHINE.DEVICE=cpu",
)


def cpu_seconds(command: Sequence[str], folder: str) -> float:
    """Of a process and its children, user and system."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), folder]), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 2):
        raise SystemExit(f"{' '.join(command)[:200]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(folder: str, number: int) -> dict[str, list[str]]:
    """What is compared; each round has a run folder of its own."""
    python = sys.executable
    found = {
        "import torch": [python, "-c", "import torch"],
        "bare script": [python, "-c", BARE],
        "ours, first step": [python, TOOL, *RECIPE, f"config.RUN.DIR={folder}/run{number}"],
        "ours, --help": [python, TOOL, "--help"],
        "ours, mistyped key": [python, TOOL, RECIPE[0], "config.OPTIMIZER.NUM_EPOCH=1"],
        "ours, dry run": [python, TOOL, RECIPE[0], "config.RUN.DRY_RUN=true"],
    }
    if importlib.util.find_spec("lightning") is not None:
        found["lightning"] = [python, "-c", LIGHTNING]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "once.py").write_text(PLUGIN)
        for number, name in turns(commands("", 0), rounds=arguments.rounds + 1):
            taken = cpu_seconds(commands(folder, number)[name], folder)
            if number:  # the first round fills the file caches
                seconds.setdefault(name, []).append(taken)
    if "lightning" not in seconds:
        print("Lightning is not installed and left out; for the comparison: pip install lightning")
    print(f"{'':<20}{'CPU s':>7}   x bare script (quartiles)")
    for name in commands("", 0):
        of_bare = in_words(ratios(seconds, name, "bare script"))
        print(f"{name:<20}{statistics.median(seconds[name]):7.2f}   {of_bare}")
    found = ratios(seconds, "ours, first step", "bare script")
    is_reached = statistics.median(found) <= 1.25
    print(f"goal: first step <= 1.25 x bare script: {in_words(found)}, {verdict(is_reached)}")
    for name in ("ours, --help", "ours, mistyped key"):
        is_reached = statistics.median(seconds[name]) <= 1
        print(f"goal: {name} <= 1 s: {in_words(seconds[name])} s, {verdict(is_reached)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
