"""Training ViT-B/16 in bf16: images per second and model FLOP utilisation of our loop, eager, compiled, recomputed.

    python benchmarks/gpu/train.py                       ViT-B/16, 224 px, batches of 256
    python benchmarks/gpu/train.py --batch 128 --trunk timm/vit_large_patch16_224
    python benchmarks/gpu/train.py --tiny                a small model on whatever there is, to see that it works

The images are one batch of uint8 in pinned host memory, sent at each step as a loader would: normalised on the device,
AdamW, clipping. A bare PyTorch loop on the same compiled model, with images that lie on the device, is the limit of the
loop; a product of large matrices in bf16 that of the device. The variants take turns; images/s are medians over windows.
The FLOPs of a step are three times those of its forward pass, recomputation not counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vissl_like.analysis.meters import build_meters
from vissl_like.config.schema import Config
from vissl_like.config.schema_model import GradClip, Schedule
from vissl_like.core import distributed, parallel, rng
from vissl_like.core.evaluation import Arithmetic
from vissl_like.core.loop import Feed, Options, Training
from vissl_like.models.vision_model import VisionModel
from vissl_like.models.zoo import build_model
from vissl_like.optim.groups import build_optimizer, make_groups
from vissl_like.optim.schedules import Rates
from vissl_like.tasks.supervised import Supervised

CLASSES = 1000


@dataclass(frozen=True)
class Setting:
    """What is trained, and how long a window of measurement is."""

    trunk: dict[str, Any]
    side: int
    batch: int
    steps: int
    precision: str
    backend: str
    device: torch.device


def configured(setting: Setting, *, compiled: str = "none", recompute: bool = False) -> Config:
    """The configuration of a variant."""
    return Config.model_validate(
        {
            "MODEL": {
                "TRUNK": setting.trunk,
                "ACTIVATION_CHECKPOINTING": {"USE_ACTIVATION_CHECKPOINTING": recompute},
            },
            "MACHINE": {"COMPILE": compiled, "COMPILE_BACKEND": setting.backend, "PRECISION": setting.precision},
            "OPTIMIZER": {"NAME": "adamw"},
        }
    )


def arranged(setting: Setting, config: Config) -> VisionModel:
    rng.seed_model(0)
    model = build_model(config.MODEL, num_classes=CLASSES, image_size=setting.side).to(setting.device)
    parallel.arrange(model, config, inner=model.read_modules())
    return model


class Windows:
    """The record of a training: images/s of each window."""

    def __init__(self) -> None:
        self.speeds: list[float] = []

    def metrics(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "train":
            self.speeds.append(record["images_per_s"])

    def progress(self, step: int, record: Mapping[str, Any] | None = None) -> None:
        pass


def host_batch(setting: Setting) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, 3, setting.side, setting.side)
    batch = {
        "data": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        "label": torch.randint(0, CLASSES, (setting.batch,), generator=generator),
        "index": torch.arange(setting.batch),
    }
    pinned = {name: value.pin_memory() if setting.device.type == "cuda" else value for name, value in batch.items()}
    return pinned | {"weight": torch.tensor(1.0)}


def normalise(images: Tensor) -> Tensor:
    return (images.float() - 116.0) / 58.0


def our_loop(setting: Setting, config: Config, run_dir: Path) -> Callable[[], list[float]]:
    """A training that goes on for some windows at each call, and their images/s."""
    model, batch, record = arranged(setting, config), host_batch(setting), Windows()
    groups = make_groups(model, config.OPTIMIZER)
    windows = 4

    def batches(epoch: int, first_step: int, in_process: bool) -> Iterator[dict[str, Tensor]]:
        return iter([batch] * (setting.steps * windows))

    options = Options(
        seed=0,
        num_epochs=1 << 20,
        steps_per_epoch=setting.steps * windows,
        arithmetic=Arithmetic(precision=setting.precision),
        clip=GradClip(USE_GRAD_CLIP=True),
        log_every=setting.steps,
        save_every_epochs=0,
    )
    training = Training(
        task=Supervised(
            model, loss=config.LOSS, train_meters=None, test_meters=build_meters(config.METERS, num_heads=1)
        ),
        optimizer=build_optimizer(groups, config.OPTIMIZER),
        groups=groups,
        rates=Rates(lr=Schedule(NAME="constant", VALUE=1e-4), steps_per_epoch=options.steps_per_epoch, num_epochs=1),
        feed=Feed(train=batches, to_input=normalise),
        options=options,
        run_dir=run_dir,
        record=record,
    )

    def call() -> list[float]:
        record.speeds.clear()
        training.run_epoch()
        return record.speeds[-windows + 1 :]  # the first window holds the start

    return call


def bare_loop(setting: Setting, config: Config) -> Callable[[], list[float]]:
    """The limit: images that lie on the device, and nothing but a training step."""
    model = arranged(setting, config).train()
    images = normalise(host_batch(setting)["data"].to(setting.device))
    labels = host_batch(setting)["label"].to(setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    arithmetic = Arithmetic(precision=setting.precision)

    def window() -> float:
        wait(setting.device)
        began = time.perf_counter()
        for _ in range(setting.steps):
            with arithmetic.autocast():
                loss = nn.functional.cross_entropy(model(images)[0], labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        wait(setting.device)
        return setting.steps * setting.batch / (time.perf_counter() - began)

    return lambda: [window() for _ in range(3)]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def flops_per_image(setting: Setting) -> float:
    """Three times the forward pass."""
    model = arranged(setting, configured(setting)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, setting.side, setting.side, device=setting.device))
    return 3.0 * counter.get_total_flops()


def product_limit(setting: Setting, *, size: int) -> float:
    """FLOP/s of a product of two square matrices, in the arithmetic of the training."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(setting.precision, torch.float32)
    a = torch.randn(size, size, device=setting.device, dtype=kind)
    speeds = []
    for _ in range(7):
        wait(setting.device)
        began = time.perf_counter()
        for _ in range(10):
            a @ a
        wait(setting.device)
        speeds.append(20 * size**3 / (time.perf_counter() - began))
    return statistics.median(speeds)


def peak_memory(call: Callable[[], Any], device: torch.device) -> float:
    """GB that a call takes beyond what was in use before."""
    if device.type != "cuda":
        call()
        return float("nan")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def compare(setting: Setting, folder: Path, *, rounds: int, product: int) -> None:
    """Print one line for each variant."""
    blocks = configured(setting, compiled="blocks")
    variants = {
        "ours, eager": our_loop(setting, configured(setting), folder / "a"),
        "ours, compiled blocks": our_loop(setting, blocks, folder / "b"),
        "ours, compiled model": our_loop(setting, configured(setting, compiled="model"), folder / "c"),
        "ours, eager, recomputed": our_loop(setting, configured(setting, recompute=True), folder / "d"),
        "ours, blocks, recomputed": our_loop(
            setting, configured(setting, compiled="blocks", recompute=True), folder / "e"
        ),
        "bare loop, compiled blocks": bare_loop(setting, blocks),
    }
    starts, memory = {}, {}
    for name, call in variants.items():  # compilation, and optimizer states
        began = time.perf_counter()
        call()
        starts[name] = time.perf_counter() - began
        memory[name] = peak_memory(call, setting.device)
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            speeds[name] += variants[name]()
    limit, flops = product_limit(setting, size=product), flops_per_image(setting)
    print(f"{flops / 1e9:.1f} GFLOP per training image; products of {product}: {limit / 1e12:.1f} TFLOP/s")
    print(f"{'':<28}{'images/s':>9}{'quartiles':>18}{'of products':>13}{'GB extra':>10}{'start, s':>10}")
    for name, values in speeds.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        share = middle * flops / limit
        print(
            f"{name:<28}{middle:9.1f}{f'{low:.1f} to {high:.1f}':>18}{share:13.3f}{memory[name]:10.2f}{starts[name]:10.1f}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--trunk", default="timm/vit_base_patch16_224")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="of a window")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    world = distributed.start(device="gpu" if torch.cuda.is_available() else "cpu")
    setting = Setting(
        trunk={"NAME": arguments.trunk},
        side=arguments.side,
        batch=arguments.batch,
        steps=arguments.steps,
        precision=arguments.precision,
        backend="inductor",
        device=world.device,
    )
    if arguments.tiny:
        shape = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 2}
        small = {"NAME": "timm/vit_tiny_patch16_224", "OPTIONS": shape}
        backend = "inductor" if world.device.type == "cuda" else "aot_eager"
        setting = replace(setting, trunk=small, side=32, batch=8, steps=3, backend=backend)
    with tempfile.TemporaryDirectory() as folder:
        compare(
            setting,
            Path(folder),
            rounds=1 if arguments.tiny else arguments.rounds,
            product=256 if arguments.tiny else 8192,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
