"""How fast a trained model is evaluated, with and without leaving out background tokens, by the share of foreground."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vissl_like.config.schema_parts import Speed
from vissl_like.core.evaluation import Arithmetic
from vissl_like.models.masked_vit import Decoupled
from vissl_like.models.two_stage import TwoStage

#: Whether tokens are pruned, and what the keys of results say.
_WAYS = {"pruned": True, "unpruned": False}


def measure(
    model: Any, images: Tensor, masks: Tensor | None, *, options: Speed, arithmetic: Arithmetic
) -> list[dict[str, Any]]:
    """Rows {foreground: share or "own", kept_tokens: share, pruned: {...}, unpruned: {...}} for one batch.

    images (B, 3, H, W) on the model's device, masks (B, H', W') of a decoupled model. Each way has images_per_second,
    p50_ms and p95_ms of a batch and, on a GPU, peak_memory_mb. Models without masks have one row, with `unpruned` alone.
    "own": the masks that the model, or the data set, makes; other shares: as many random positions of every image.
    """
    model.eval()
    if not isinstance(model, TwoStage | Decoupled):
        calls = {"unpruned": lambda: model(images)}
        return [{"foreground": "own", "kept_tokens": 1.0, **_timed(calls, images, options, arithmetic)}]
    rows = []
    before = model.options
    try:
        for share in ("own", *options.SHARES):
            run, kept = _with_share(model, images, masks, share, arithmetic)
            calls = {name: _pruning(model, before, on, run) for name, on in _WAYS.items()}
            rows.append({"foreground": share, "kept_tokens": kept, **_timed(calls, images, options, arithmetic)})
    finally:
        model.options = before
    return rows


def _with_share(
    model: TwoStage | Decoupled, images: Tensor, masks: Tensor | None, share: Any, arithmetic: Arithmetic
) -> tuple[Callable[[], Any], float]:
    """The evaluation of a batch with this share of foreground, and the share of patches that pruning keeps."""
    trunk = model.trunk if isinstance(model, Decoupled) else model.trunk["stage_2"]
    grid = trunk.grid(images)
    if isinstance(model, Decoupled):
        given = masks if share == "own" else _random_masks(len(images), grid, share, images.device)
        assert given is not None
        small = torch.nn.functional.interpolate(given[:, None].float(), size=grid, mode="nearest-exact") > 0.5
        return (lambda: model(images, given)), _kept(small.flatten(1))
    if share == "own":
        with torch.inference_mode(), arithmetic.autocast():
            hard = model(images).mask_hard[:, :1]
        small = torch.nn.functional.adaptive_max_pool2d(hard.float(), grid) > 0.5
        return (lambda: model(images)), _kept(small.flatten(1))
    foreground = _random_masks(len(images), grid, share, images.device)
    both = torch.stack([foreground, 1 - foreground], dim=1)

    def run() -> Any:
        model.stage_one(images)
        return model.stage_two(images, soft=both, hard=both)

    return run, _kept(foreground.flatten(1) > 0.5)


def _random_masks(count: int, grid: tuple[int, int], share: float, device: torch.device) -> Tensor:
    """(B, h, w) of zeros and ones, round(share * h * w) ones in each."""
    number = grid[0] * grid[1]
    ranks = torch.rand(count, number, generator=torch.Generator().manual_seed(0)).argsort(dim=1).argsort(dim=1)
    return (ranks < round(share * number)).float().unflatten(1, grid).to(device)


def _kept(foreground: Tensor) -> float:
    """bool (B, n) -> the share of the patches that pruning keeps: the largest foreground of the batch, at least one."""
    return max(1, int(foreground.sum(dim=1).max())) / foreground.shape[1]


def _pruning(model: Any, options: Any, on: bool, run: Callable[[], Any]) -> Callable[[], Any]:
    chosen = options.model_copy(update={"PRUNE_TOKENS": on})

    def call() -> Any:
        model.options = chosen
        return run()

    return call


def _timed(
    calls: dict[str, Callable[[], Any]], images: Tensor, options: Speed, arithmetic: Arithmetic
) -> dict[str, dict[str, float]]:
    """The calls in turns, so that a machine that slows down slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks = dict.fromkeys(calls, 0)
    on_gpu = images.device.type == "cuda"
    with torch.inference_mode(), arithmetic.autocast():
        for repeat in range(options.WARMUP + options.REPEATS):
            for name, call in calls.items():
                spent, peak = _once(call, images.device if on_gpu else None)
                peaks[name] = max(peaks[name], peak)
                if repeat >= options.WARMUP:
                    seconds[name].append(spent)
    return {
        name: {
            "images_per_second": len(images) / float(np.median(values)),
            "p50_ms": 1e3 * float(np.quantile(values, 0.5)),
            "p95_ms": 1e3 * float(np.quantile(values, 0.95)),
            **({"peak_memory_mb": peaks[name] / 2**20} if on_gpu else {}),
        }
        for name, values in seconds.items()
    }


def _once(call: Callable[[], Any], gpu: torch.device | None) -> tuple[float, int]:
    """Seconds, and bytes at the peak on a GPU."""
    if gpu is None:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began, 0
    torch.cuda.reset_peak_memory_stats(gpu)
    torch.cuda.synchronize(gpu)
    began = time.perf_counter()
    call()
    torch.cuda.synchronize(gpu)
    return time.perf_counter() - began, torch.cuda.max_memory_allocated(gpu)


def flat(rows: list[dict[str, Any]]) -> dict[str, float]:
    """{speed_...}: images per second of the model under its own masks."""
    own = rows[0]
    found = {"speed_images_per_second": own.get("pruned", own["unpruned"])["images_per_second"]}
    if "pruned" in own:
        found["speed_images_per_second_unpruned"] = own["unpruned"]["images_per_second"]
        found["speed_kept_tokens"] = 100 * own["kept_tokens"]
    return found
