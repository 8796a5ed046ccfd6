"""A training step of the two-stage part model against its limit, and evaluation with pruned against unpruned tokens.

    python benchmarks/parts_step.py                    both of these, ViT-S/14 with registers, 224 px, batch 8, on the CPU
    python benchmarks/parts_step.py --training         a step against its limit
    python benchmarks/parts_step.py --evaluation       images per second as a function of the share of foreground
    python benchmarks/parts_step.py --device cuda      on a GPU, bf16 autocast

The limit of a step is forward and backward of what cannot be saved: the stage-1 backbone twice (image and transformed
image) and the stage-2 backbone once, unmasked, with a trivial loss. Step and limit take turns; the ratios of a turn are
compared, in CPU seconds of one thread (wall seconds on a GPU), since the speed of a shared machine drifts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _rounds import in_words, ratios, run_parts, verdict
from torch import Tensor

from vissl_like.config.schema_model import Loss, Model
from vissl_like.models.masked_vit import Decoupled
from vissl_like.models.part_zoo import build_part_model
from vissl_like.models.two_stage import TwoStage
from vissl_like.tasks.parts import Parts

ARCHITECTURE = "timm/vit_small_patch14_reg4_dinov2"
SIZE = (224, 224)
GRID = (16, 16)
NUM_CLASSES = 200
GOAL = 1.15


def build(kind: str, device: str, **options: Any) -> Any:
    """What the program itself builds."""
    torch.manual_seed(0)
    model = Model.model_validate({"TRUNK": {"NAME": ARCHITECTURE}, "PARTS": {"NUM_PARTS": 8} | options})
    return build_part_model(kind, model, num_classes=NUM_CLASSES, image_size=SIZE).to(device)


# ------------------------------------------------------------------------------------------------------------- training
def limit(model: TwoStage, images: Tensor) -> Tensor:
    """The backbones alone, as timm runs them."""
    first, second = (model.trunk[stage].backbone for stage in ("stage_1", "stage_2"))
    outputs = [first.forward_features(images), first.forward_features(images), second.forward_features(images)]
    return torch.stack([output.float().square().mean() for output in outputs]).sum()


def training(arguments: argparse.Namespace) -> None:
    """Ratio of the task's step (all losses of the default configuration) and limit, without and with mask gradient."""
    device, batch = arguments.device, arguments.batch
    images = torch.randn(batch, 3, *SIZE, device=device)
    data = {"data": images, "label": torch.randint(0, NUM_CLASSES, (batch,), device=device)}
    for gradient in ("none", "straight_through"):
        model = build("two_stage", device, MASK_GRADIENT=gradient).train()
        task = Parts(model, loss=Loss(), num_classes=NUM_CLASSES)
        losses: dict[str, Callable[[], Tensor]] = {
            "step": lambda task=task: task(data)["loss"],
            "limit": lambda model=model: limit(model, images),
        }

        def run(name: str, model: TwoStage = model, losses: dict[str, Callable[[], Tensor]] = losses) -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
                loss = losses[name]()
            loss.backward()

        seconds = in_turns({name: (lambda name=name: run(name)) for name in losses}, device, arguments.rounds)
        found = ratios(seconds, "step", "limit")
        is_reached = statistics.median(found) <= GOAL
        print(f"MASK_GRADIENT={gradient}: step {1e3 * statistics.median(seconds['step']):.0f} ms")
        print(f"goal: step <= {GOAL} x limit: {in_words(found)}, {verdict(is_reached)}")


# ----------------------------------------------------------------------------------------------------------- evaluation
def evaluation(arguments: argparse.Namespace) -> None:
    """Images per second of stage 2 under masks with a given share of foreground, a random patch each."""
    device, batch = arguments.device, arguments.batch
    models: dict[str, Decoupled] = {
        name: build("decoupled", device, PRUNE_TOKENS=name == "pruned").eval() for name in ("pruned", "unpruned")
    }
    images = torch.randn(batch, 3, *SIZE, device=device)
    for share in (1.0, 0.75, 0.5, 0.25, 0.1, 0.0):
        order = torch.rand(batch, GRID[0] * GRID[1]).argsort(dim=1).argsort(dim=1)
        masks = (order < round(share * GRID[0] * GRID[1])).float().unflatten(1, GRID).to(device)

        def run(name: str, masks: Tensor = masks) -> None:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
                models[name](images, masks)

        seconds = in_turns({name: (lambda name=name: run(name)) for name in models}, device, arguments.rounds)
        speeds = {name: batch / statistics.median(values) for name, values in seconds.items()}
        print(
            f"foreground {100 * share:3.0f} %: {speeds['pruned']:8.1f} images/s pruned, {speeds['unpruned']:8.1f} unpruned,"
            f" {in_words(ratios(seconds, 'unpruned', 'pruned'))} x"
        )


# ------------------------------------------------------------------------------------------------------------ measuring
def in_turns(calls: dict[str, Callable[[], None]], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one number for each round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            spent = timed(calls[name], device)
            if number:
                seconds[name].append(spent)
    return seconds


def timed(call: Callable[[], None], device: str) -> float:
    """CPU seconds, or wall seconds on a GPU."""
    if device == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    """Run one comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--training", action="store_true", help="a step against its limit")
    parser.add_argument("--evaluation", action="store_true", help="pruned against unpruned tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7, help="turns to measure, at least 2")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    run_parts({"training": lambda: training(arguments), "evaluation": lambda: evaluation(arguments)}, arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
