"""What a notebook uses: finished runs, their models, and their weights for other libraries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from vissl_like.config.schema import Config, Job
from vissl_like.core import checkpoint
from vissl_like.core.weights import state_shapes
from vissl_like.core.weights_export import export_state_dict
from vissl_like.errors import DataError, WeightsError
from vissl_like.files import read_yaml
from vissl_like.models.vision_model import VisionModel
from vissl_like.models.zoo import build_saved_model
from vissl_like.outputs.writers import read_metrics

__all__ = ["Run", "export_state_dict", "load_model", "load_run"]


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    path: Path
    engine_name: str
    config: Config

    @property
    def results(self) -> dict[str, Any]:
        """Final metrics; empty while the run is not finished."""
        return _json(self.path / "results.json")

    def metrics(self, kind: str = "") -> list[dict[str, Any]]:
        """Lines of metrics.jsonl in order; `kind` ("train", "test", ...) keeps those alone."""
        return [entry for entry in read_metrics(self.path) if not kind or entry.get("kind") == kind]

    def model(self, *, device: str = "cpu", averaged: bool = False) -> VisionModel:
        """The model of the newest checkpoint, as load_model() gives it."""
        return load_model(self.path, device=device, averaged=averaged)


def load_run(run_dir: str | Path) -> Run:
    """The configuration and results of a run folder."""
    path = Path(run_dir).expanduser()
    job = _job(path / "config.yaml")
    return Run(path=path, engine_name=job.engine_name, config=job.config)


def load_model(source: str | Path, *, device: str = "cpu", averaged: bool = False) -> VisionModel:
    """The trained model in eval mode: its outputs are those of the evaluation during training.

    source: a run folder (its newest checkpoint), a checkpoint folder in it (RUN/checkpoints/best), or the
    model.safetensors there. averaged: the moving average of the weights (MODEL.EMA). Images must be transformed as
    DATA.TEST.TRANSFORMS says.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise WeightsError(f"{path}: there is no such run or checkpoint.")
    if path.is_file():
        path = path.parent
    run_dir = path
    while not (run_dir / "config.yaml").is_file():
        if run_dir == run_dir.parent:
            raise WeightsError(
                f"{path}: no config.yaml here or above it, so the model is not known. Give a run folder."
            )
        run_dir = run_dir.parent
    state = checkpoint.load_model_state(path, averaged=averaged)
    model = build_saved_model(_job(run_dir / "config.yaml").config.MODEL, state_shapes(state))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            f"{path}: the weights do not belong to the model in {run_dir / 'config.yaml'} ({error})."
        ) from error
    return model.to(torch.device(device)).eval()


def _job(file: Path) -> Job:
    if not file.is_file():
        raise DataError(f"{file.parent}: not a run folder: it has no {file.name}.")
    try:
        return Job.model_validate(read_yaml(file))
    except (yaml.YAMLError, ValidationError) as error:
        raise DataError(f"{file}: not a configuration of this version ({error}).") from error


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
