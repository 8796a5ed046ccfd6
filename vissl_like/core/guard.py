"""Losses and weights that are not finite: noticed before they are used, and kept so that one can look into the case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vissl_like.core import distributed, parallel
from vissl_like.core.state_format import write_tensors
from vissl_like.errors import UserError
from vissl_like.files import write_json

FOLDER = "replay"


class FiniteGuard:
    """Looks at the losses of each step before the weights are changed by them.

    On a GPU the answer is copied while the backward pass still runs, so waiting for it does not let the GPU run dry.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._losses: list[Tensor] = []
        self._copy: Tensor | None = None
        self._copied: Any = None

    def look(self, losses: list[Tensor]) -> None:
        """Take note of the losses () of a step's micro-batches; to be called before the last backward pass."""
        self._losses = losses
        if losses[0].device.type != "cuda":
            return
        if self._copy is None or len(self._copy) != len(losses):
            self._copy = torch.empty(len(losses), dtype=torch.float32, pin_memory=True)
            self._copied = torch.cuda.Event()
        self._copy.copy_(torch.stack(losses), non_blocking=True)
        self._copied.record()

    def first_bad(self) -> int | None:
        """The first micro-batch whose loss is not finite. Waits for the forward passes, not for the backward ones."""
        if self._losses[0].device.type == "cuda":
            self._copied.synchronize()
            values = [] if self._copy is None else self._copy.tolist()
        else:
            values = [loss.item() for loss in self._losses]
        return next((i for i, value in enumerate(values) if not math.isfinite(value)), None)

    def check(self, micro_batches: Sequence[Mapping[str, Any]], model: nn.Module, *, where: Mapping[str, Any]) -> None:
        """Save a replay bundle and raise UserError if a loss was not finite. `where`: step, epoch, seed, ..."""
        bad = self.first_bad()
        if bad is None:
            return
        loss = self._losses[bad].item()
        info = {**where, "loss": str(loss), "micro_batch": bad}
        folder = save_replay(self._run_dir, micro_batches[bad], model, info=info)
        raise UserError(
            f"the loss is {loss} in step {where['step']} (epoch {where['epoch']}). The weights were not changed by it, "
            f"and earlier checkpoints are intact. The batch and the weights lie in {folder}. Lower "
            "config.OPTIMIZER.PARAM_SCHEDULERS.LR, set config.MODEL.GRAD_CLIP.USE_GRAD_CLIP=true or "
            "config.MACHINE.PRECISION=fp32; config.CHECK_NAN=false goes on regardless."
        )


def save_replay(run_dir: Path, batch: Mapping[str, Any], model: nn.Module, *, info: Mapping[str, Any]) -> Path:
    """Write batch.safetensors, model.safetensors, info.json to RUN.DIR/replay/step_N (other ranks: step_N_rank_R)."""
    world = distributed.current()
    folder = run_dir / FOLDER / (f"step_{info['step']}" + (f"_rank_{world.rank}" if world.rank else ""))
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "batch.safetensors", {name: v for name, v in batch.items() if isinstance(v, Tensor)})
    rows = parallel.is_sharded(model)  # the other processes are not here to give theirs
    write_tensors(folder / ("model.rows.safetensors" if rows else "model.safetensors"), local_state(model))
    indices = batch["index"].tolist() if "index" in batch else []
    about = {**info, "rank": world.rank, "world_size": world.size, "indices": indices}
    write_json(folder / "info.json", about)
    return folder


def local_state(model: nn.Module) -> dict[str, Tensor]:
    """What lies in this process of each tensor of the model."""
    return {name: parallel.local(value) for name, value in model.state_dict().items()}


def refuse_bad_weights(model: nn.Module, *, step: int) -> None:
    """Raise UserError if a weight is not finite: such weights are never saved over good ones."""
    floating = [(name, value) for name, value in local_state(model).items() if value.is_floating_point()]
    finite = torch.stack([torch.isfinite(value).all() for _, value in floating]).tolist() if floating else []
    bad = [name for (name, _), good in zip(floating, finite) if not good]
    if parallel.is_sharded(model):
        bad = list(dict.fromkeys(name for found in distributed.all_gather_object(bad) for name in found))
    if bad:
        raise UserError(
            f"after step {step} {len(bad)} tensors of the model are not finite, the first is {bad[0]!r}. They were not "
            "saved; earlier checkpoints are intact. Lower config.OPTIMIZER.PARAM_SCHEDULERS.LR or set "
            "config.MODEL.GRAD_CLIP.USE_GRAD_CLIP=true; config.CHECK_NAN=false saves them regardless."
        )
