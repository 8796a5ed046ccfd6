"""Checkpoints that are either whole or not there, and that can be read without this package. Writing: core/saving.py.

RUN.DIR/checkpoints/step_XXXXXXXX/ holds

    model.safetensors       the weights under their plain names
    ema.safetensors         the averaged weights, if there are any
    training.safetensors    every tensor of the training state (optimizer, running sums, ...)
    training.json           the structure of that state, with references to those tensors
    manifest.json           step, and size and checksum of each file

With a sharded model (DISTRIBUTED.STRATEGY=fsdp) the large tensors of the training state lie elsewhere:

    training.rank_00000.safetensors, ...   the rows of each process
    training.parts.json                    {tensor: [[file, first row, row after the last], ...]}

Weights are never split, and nothing here is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from vissl_like.core import distributed, parallel, state_format
from vissl_like.core.on_main import on_main
from vissl_like.core.state_format import Stored
from vissl_like.errors import WeightsError

FOLDER, MANIFEST = "checkpoints", "manifest.json"
MODEL, EMA, TENSORS, STRUCTURE = "model.safetensors", "ema.safetensors", "training.safetensors", "training.json"
PARTS = "training.parts.json"

log = logging.getLogger(__name__)


def rank_file(kind: str, rank: int) -> str:
    """The file of one process's rows; kind: training, or (while a checkpoint is being made) weights."""
    return f"{kind}.rank_{rank:05d}.safetensors"


@dataclass(frozen=True)
class Saved:
    """One whole checkpoint on the disk."""

    path: Path
    step: int

    def model_state(self) -> dict[str, Tensor]:
        """The weights by plain name, on the CPU."""
        return load_file(self.path / MODEL)

    def load_into(self, model: nn.Module) -> None:
        """Give the model these weights, of a sharded one the rows that lie here; raises WeightsError if they do not fit."""
        try:
            model.load_state_dict(shard_like(self.model_state(), model.state_dict()))
        except RuntimeError as error:
            raise WeightsError(
                f"{self.path}: does not fit this model: {error}. Resume with the configuration of the run, or set "
                "config.RUN.OVERWRITE=true to start anew."
            ) from error

    def ema_state(self) -> dict[str, Tensor] | None:
        """The averaged weights, or None."""
        return load_file(self.path / EMA) if (self.path / EMA).exists() else None

    def training_state(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Optimizer, running sums and whatever else the training needs to go on.

        Tensors under `optimizer/<name of a weight>` are sharded as that weight is.
        """
        structure = json.loads((self.path / STRUCTURE).read_text())
        weights = weights or {}
        tensors = {}
        for path, stored in self._stored().items():
            section, _, rest = path.partition("/")
            weight = weights.get(rest.rpartition("/")[0]) if section == "optimizer" else None
            tensors[path] = stored.whole() if weight is None else load_like(stored, weight)
        return state_format.join_state(structure, tensors)

    def _stored(self) -> dict[str, Stored]:
        """The tensors of the training state by name."""
        found = {name: Stored((tensor,)) for name, tensor in load_file(self.path / TENSORS).items()}
        parts = json.loads((self.path / PARTS).read_text()) if (self.path / PARTS).exists() else {}
        files = {file: load_file(self.path / file) for file in {file for rows in parts.values() for file, _, _ in rows}}
        return found | {name: Stored(tuple(files[file][name] for file, _, _ in rows)) for name, rows in parts.items()}


def shard_like(state: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state`; those whose target of the same name is sharded as it is, from the rows that lie here."""
    return {
        name: load_like(Stored((tensor,)), targets[name]) if name in targets else tensor
        for name, tensor in state.items()
    }


def load_like(stored: Stored, target: Tensor) -> Tensor:
    """A stored tensor, sharded as `target` is; as a whole if that one is not, or has another shape."""
    if not parallel.is_part(target) or stored.shape != tuple(target.shape):
        return stored.whole()
    start, stop = parallel.rows_of_ranks(len(target))[distributed.current().rank]
    return parallel.as_part(stored.rows(start, stop), like=target)


def newest(run_dir: Path) -> Saved | None:
    """The newest save whose files are all as written; None if there is none at all.

    Damaged ones are logged and passed over. If only damaged ones are there, it is an error: nothing is trained anew
    over the remains of a long run.
    """
    steps = saved_steps(run_dir)
    for step in reversed(steps):
        path = run_dir / FOLDER / step_name(step)
        damage = find_damage(path)
        if damage is None:
            return Saved(path=path, step=step)
        log.warning("checkpoint %s is damaged (%s); the one before it is used", path, damage)
    if steps:
        raise WeightsError(
            f"{run_dir / FOLDER}: every checkpoint is damaged ({', '.join(map(str, steps))}). "
            "Remove that folder, or set config.RUN.OVERWRITE=true, to start anew."
        )
    return None


def load_model_state(path: Path, *, averaged: bool = False) -> dict[str, Tensor]:
    """The weights of a run folder (its newest whole checkpoint) or of one checkpoint folder; `averaged`: the EMA's.

    Every process calls it. Of a run folder the main one takes the newest for all: the run may be going on.
    """
    if (path / MANIFEST).exists() and (path / MODEL).exists():
        damage = find_damage(path)
        if damage is not None:
            raise WeightsError(f"{path}: this checkpoint is damaged ({damage}). Use another step of the run.")
        saved: Saved | None = Saved(path=path, step=-1)
    else:
        saved = on_main(lambda: newest(path.parent if path.name == FOLDER else path))
    if saved is None:
        stages = sorted(str(folder.parent) for folder in path.glob(f"*/{FOLDER}"))
        cure = f" The stages of a pipeline have some: {', '.join(stages)}." if stages else ""
        raise WeightsError(f"{path}: there is no checkpoint here (expected {FOLDER}/step_*/{MODEL}).{cure}")
    state = saved.ema_state() if averaged else saved.model_state()
    if state is None:
        raise WeightsError(f"{saved.path}: no {EMA}; the run did not keep averaged weights (config.MODEL.EMA.ENABLED).")
    return state


def saved_steps(run_dir: Path) -> list[int]:
    """Steps that have a folder, rising, damaged or not."""
    folder = run_dir / FOLDER
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(found.group(1)) for name in names if (found := re.fullmatch(r"step_(\d{8,})", name)))


def step_name(step: int) -> str:
    """The folder name of a step."""
    return f"step_{step:08d}"


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Reads every byte."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
        for name, written in files.items():
            kind = next((key for key in written if key != "bytes"), state_format.CHECKSUM)
            found = state_format.record_of(path / name, kind=kind)
            if found["bytes"] != written["bytes"]:
                return f"{name} has {found['bytes']} bytes instead of {written['bytes']}"
            if found != written:
                return f"{name} does not have the checksum it was written with"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    missing = {MODEL, TENSORS, STRUCTURE} - set(files)
    return f"{MANIFEST} does not name {', '.join(sorted(missing))}" if missing else None
