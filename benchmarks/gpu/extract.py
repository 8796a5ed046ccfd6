"""From JPEG files to features on disk: our extraction, against its loader alone and against the forward passes alone.

    python benchmarks/gpu/extract.py                     ViT-B/16 in bf16, 20,000 photos of 500x375, Resize and CenterCrop
    python benchmarks/gpu/extract.py --photos 200000     longer
    python benchmarks/gpu/extract.py --tiny              a small network on whatever there is, to see that it works

Neither the loader nor the network can be quicker when both work at once than alone, so the slower of the two is the limit.
The loader's processes stay alive between the turns, and everything runs once before it is measured. Wall seconds.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from _rounds import in_words, turns, verdict
from jpeg import TAIL, TEST, write_photos

from vissl_like.analysis.extraction import Loading, extract, image_part, trunk_features
from vissl_like.analysis.rows import spans
from vissl_like.config.plan import usable_cores
from vissl_like.config.schema import Config
from vissl_like.core import distributed, rng
from vissl_like.core.evaluation import Arithmetic
from vissl_like.data.dataset import build_dataset
from vissl_like.data.images import ImageDataset
from vissl_like.data.loader import close_workers
from vissl_like.models.vision_model import VisionModel
from vissl_like.models.zoo import build_model

GOAL = 0.85
OURS, LOADER, FORWARD = "ours", "loader alone", "forward passes alone"


def configured(photos: Path, arguments: argparse.Namespace) -> Config:
    """What a user would write."""
    transforms: list[dict[str, Any]] = [*TEST, *TAIL]
    if arguments.tiny:
        transforms = [{"name": "Resize", "size": [32, 32]}, *TAIL]
    split = {"DATA_SOURCES": ["disk_folder"], "DATA_PATHS": [str(photos)], "TRANSFORMS": transforms}
    small = {"NAME": "resnet_small"} if arguments.tiny else {"NAME": arguments.trunk}
    return Config.model_validate({"DATA": {"TRAIN": split}, "MODEL": {"TRUNK": small}})


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def variants(
    config: Config, model: VisionModel, dataset: ImageDataset, loading: Loading, folder: Path, *, batch: int
) -> dict[str, Callable[[], Any]]:
    """What is compared; each goes over all photos."""
    rows = [np.arange(start, stop) for start, stop in spans(len(dataset), batch)]
    first = loading.arithmetic.to_device(
        image_part(next(loading.batches(dataset, rows[:1]))), dataset.device_transform
    )["data"]

    def ours() -> None:
        extract(
            model, dataset, folder, options=config.EXTRACT_FEATURES, batch=batch, identity={}, loading=loading,
            overwrite=True,
        )  # fmt: skip
        shutil.rmtree(folder)

    def loader() -> None:
        for _ in loading.batches(dataset, rows):
            pass

    def forward() -> None:
        with torch.inference_mode(), loading.arithmetic.autocast():
            for of_batch in rows:
                trunk_features(model, first[: len(of_batch)])
        synchronise()

    return {OURS: ours, LOADER: loader, FORWARD: forward}


def compare(calls: dict[str, Callable[[], Any]], *, images: int, rounds: int) -> None:
    """Images per second of each, and ours as a share of the slower one of the others in the same round."""
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    for number, name in turns(calls, rounds=rounds + 1):
        began = time.perf_counter()
        calls[name]()
        if number:  # the first round starts the loader's processes, and compiles
            speeds[name].append(images / (time.perf_counter() - began))
    for name, values in speeds.items():
        print(f"{name:<24}{statistics.median(values):10.0f} images/s")
    shares = [ours / min(limits) for ours, *limits in zip(speeds[OURS], speeds[LOADER], speeds[FORWARD])]
    is_reached = statistics.median(shares) >= GOAL
    print(f"goal: ours >= {GOAL} x the slower one of the others: {in_words(shares)}, {verdict(is_reached)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Make photos, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--trunk", default="timm/vit_base_patch16_224")
    parser.add_argument("--photos", type=int, default=20_000, help="55 kB each; 2,000 different ones")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=max(1, usable_cores() - 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.photos, arguments.batch, arguments.workers, arguments.rounds = 96, 8, 1, 1
    world = distributed.start(device="gpu" if torch.cuda.is_available() else "cpu")
    on_gpu = world.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        make_photos(photos, count=arguments.photos)
        config = configured(photos, arguments)
        rng.seed_model(0)
        dataset = build_dataset(config.DATA, "TRAIN", seed=0)
        model = build_model(config.MODEL, num_classes=None, image_size=224, with_heads=False).to(world.device).eval()
        loading = Loading(
            workers=arguments.workers,
            pin_memory=on_gpu,
            arithmetic=Arithmetic(precision="bf16" if on_gpu else "fp32"),
        )
        try:
            calls = variants(config, model, dataset, loading, Path(folder, "features"), batch=arguments.batch)
            compare(calls, images=len(dataset), rounds=arguments.rounds)
        finally:
            close_workers(dataset)
    return 0


def make_photos(folder: Path, *, count: int) -> None:
    """Up to 2,000 different photos, and links to them under further names."""
    different = min(count, 2000)
    write_photos(folder, count=different, size=(500, 375))
    originals = sorted(folder.rglob("*.jpg"))
    for row in range(different, count):
        original = originals[row % different]
        original.with_name(f"{row:06d}.jpg").hardlink_to(original)


if __name__ == "__main__":
    raise SystemExit(main())
