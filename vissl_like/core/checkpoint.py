"""Checkpoints that are either whole or not there, and that can be read without this package.

RUN.DIR/checkpoints/step_XXXXXXXX/ holds

    model.safetensors       the weights under their plain names
    ema.safetensors         the averaged weights, if there are any
    training.safetensors    every tensor of the training state (optimizer, running sums, ...)
    training.json           the structure of that state, with references to those tensors
    manifest.json           step, and size and checksum of each file

A save is written beside its final name, forced to the disk and published by one rename. `last` and `best` are relative
symbolic links, each replaced in one step. Nothing here is ever unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from vissl_like.core import distributed, state_format
from vissl_like.errors import DataError, WeightsError

FOLDER, MANIFEST = "checkpoints", "manifest.json"
MODEL, EMA, TENSORS, STRUCTURE = "model.safetensors", "ema.safetensors", "training.safetensors", "training.json"

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: Beginnings of names that stand for work in progress; `.saving-<step>-<host>-<pid>`.
_SAVING, _REMOVING = ".saving-", ".removing-"
_STALE_S = 3600.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """One whole checkpoint on the disk."""

    path: Path
    step: int

    def model_state(self) -> dict[str, Tensor]:
        """The weights by plain name, on the CPU."""
        return load_file(self.path / MODEL)

    def load_into(self, model: nn.Module) -> None:
        """Give the model these weights; raises WeightsError if they do not fit."""
        try:
            model.load_state_dict(self.model_state())
        except RuntimeError as error:
            raise WeightsError(
                f"{self.path}: does not fit this model: {error}. Resume with the configuration of the run, or set "
                "config.RUN.OVERWRITE=true to start anew."
            ) from error

    def ema_state(self) -> dict[str, Tensor] | None:
        """The averaged weights, or None."""
        return load_file(self.path / EMA) if (self.path / EMA).exists() else None

    def training_state(self) -> dict[str, Any]:
        """Optimizer, running sums and whatever else the training needs to go on."""
        structure = json.loads((self.path / STRUCTURE).read_text())
        # Copies: tensors of load_file() may be windows onto the file, and an optimizer changes its state in place.
        tensors = {name: tensor.clone() for name, tensor in load_file(self.path / TENSORS).items()}
        return state_format.join_state(structure, tensors)


def save(
    run_dir: Path,
    *,
    step: int,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    keep: int,
    ema_state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save, publish as `last`, and remove all but the newest `keep` and `best`. To be called on every rank.

    Rank 0 writes; the others wait. A full disk raises DataError on every rank and leaves the older saves as they were.
    """
    failure: DataError | None = None
    folder = run_dir / FOLDER
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _full_disk_explained(folder):
                clean(run_dir)
                _publish(folder, step, model_state, training_state, ema_state)
                _point(folder, "last", step)
        except DataError as error:
            failure = error
    failure = distributed.broadcast_object(failure)
    if failure is not None:
        raise failure
    if distributed.is_main():
        _prune(folder, keep)
    return folder / step_name(step)


def mark_best(run_dir: Path, step: int) -> None:
    """Let `best` point at the save of this step."""
    if distributed.is_main():
        _point(run_dir / FOLDER, "best", step)


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
    """The weights of a run folder (its newest whole checkpoint) or of one checkpoint folder; `averaged`: the EMA's."""
    if (path / MANIFEST).exists() and (path / MODEL).exists():
        damage = find_damage(path)
        if damage is not None:
            raise WeightsError(f"{path}: this checkpoint is damaged ({damage}). Use another step of the run.")
        saved: Saved | None = Saved(path=path, step=-1)
    else:
        saved = newest(path.parent if path.name == FOLDER else path)
    if saved is None:
        raise WeightsError(f"{path}: there is no checkpoint here (expected {FOLDER}/step_*/{MODEL}).")
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
            found = state_format.record_of(path / name)
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


def clean(run_dir: Path) -> None:
    """Remove what writers left behind that died while saving or removing."""
    folder = run_dir / FOLDER
    for entry in folder.iterdir() if folder.is_dir() else []:
        if entry.name.startswith(_REMOVING) or (entry.name.startswith(_SAVING) and _is_abandoned(entry)):
            shutil.rmtree(entry, ignore_errors=True)


def discard(run_dir: Path) -> None:
    """Remove all checkpoints of a run folder, for a training that starts anew in it."""
    if distributed.is_main():
        shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    distributed.barrier()


def _publish(
    folder: Path,
    step: int,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    ema_state: Mapping[str, Tensor] | None,
) -> None:
    beside = folder / f"{_SAVING}{step}-{socket.gethostname()}-{os.getpid()}"
    final = folder / step_name(step)
    try:
        beside.mkdir()
        structure, tensors = state_format.split_state(training_state)
        files = {
            MODEL: state_format.write_tensors(beside / MODEL, model_state),
            TENSORS: state_format.write_tensors(beside / TENSORS, tensors),
            STRUCTURE: state_format.write_json(beside / STRUCTURE, structure),
        }
        if ema_state is not None:
            files[EMA] = state_format.write_tensors(beside / EMA, ema_state)
        state_format.write_json(beside / MANIFEST, {"step": step, "files": files})
        state_format.sync_folder(beside)
        if final.exists():  # a damaged save of this step that was passed over
            _remove(final)
        os.rename(beside, final)
        state_format.sync_folder(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _point(folder: Path, link: str, step: int) -> None:
    """Make `link` a relative symbolic link to the save of this step, in one step."""
    beside = folder / f".{link}-{os.getpid()}"
    beside.unlink(missing_ok=True)
    beside.symlink_to(step_name(step))
    os.replace(beside, folder / link)
    state_format.sync_folder(folder)


def _prune(folder: Path, keep: int) -> None:
    linked = {os.readlink(folder / link) for link in ("best", "last") if (folder / link).is_symlink()}
    for step in saved_steps(folder.parent)[:-keep]:
        if step_name(step) not in linked:
            _remove(folder / step_name(step))


def _remove(path: Path) -> None:
    """Remove a checkpoint; interrupted, it leaves no half of one under a checkpoint's name."""
    doomed = path.with_name(f"{_REMOVING}{path.name}-{os.getpid()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _is_abandoned(entry: Path) -> bool:
    """Whether the process that was writing this folder is gone (elsewhere: whether nothing happened for an hour)."""
    host, _, pid = entry.name.removeprefix(_SAVING).partition("-")[2].rpartition("-")
    if host != socket.gethostname() or not pid.isdigit():
        with contextlib.suppress(FileNotFoundError):
            return time.time() - entry.stat().st_mtime > _STALE_S
        return False
    if int(pid) == os.getpid():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@contextlib.contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    """Turn the system's word for a full disk into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise DataError(
            f"{folder}: no room to save a checkpoint ({error.strerror}; {free:.0f} MB free). The older ones are "
            "intact. Free some space, or lower config.CHECKPOINT.KEEP, and start the same command again."
        ) from error
