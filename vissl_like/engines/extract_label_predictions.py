"""Engine `extract_label_predictions`: what the heads of a trained model say about each image, in data set order."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vissl_like.analysis.extraction import Loading, outputs
from vissl_like.analysis.meters import MeterGroup, build_meters, ignored_target
from vissl_like.config.schema import Config, Job
from vissl_like.core import distributed, rng
from vissl_like.core.on_main import apart
from vissl_like.data.images import ImageDataset
from vissl_like.data.loader import close_workers, eval_batches
from vissl_like.data.order import eval_range
from vissl_like.engines.extract_features import (
    load_model,
    loading_of,
    open_split,
    progress_bar,
    wanted_splits,
    warn_random_views,
)
from vissl_like.errors import ConfigError
from vissl_like.files import write_array

log = logging.getLogger(__name__)

#: Classes that are written for each image, best first.
TOP = 5


def run(job: Job, run_dir: Path) -> dict[str, Any]:
    """Write predictions/<SPLIT> for every split that has data (or EXTRACT_FEATURES.SPLITS). Called on every rank."""
    config = with_heads(job.config)
    rng.set_determinism(config.MACHINE.DETERMINISTIC)
    loading = loading_of(config)
    datasets = {split: open_split(config, split, run_dir) for split in wanted_splits(config)}
    results: dict[str, Any] = {}
    try:
        loaded = load_model(config, next(iter(datasets.values())), run_dir, with_heads=True)
        if not len(loaded.model.heads):
            raise ConfigError(
                "config.MODEL.HEAD.PARAMS=[]: there are no heads whose predictions could be extracted. "
                "Give those of the trained model."
            )
        for dataset in datasets.values():
            dataset.write_label_map(run_dir)
            results |= predict_split(config, loaded.model, dataset, run_dir, loading=loading)
    finally:
        for dataset in datasets.values():
            close_workers(dataset)
    return results | loaded.results()


def with_heads(config: Config) -> Config:
    """The configuration with trained heads asked for, whatever it says about features."""
    settings = config.MODEL.FEATURE_EVAL_SETTINGS
    wanted = settings.model_copy(update={"EVAL_TRUNK_AND_HEAD": True, "EXTRACT_TRUNK_FEATURES_ONLY": False})
    return config.model_copy(update={"MODEL": config.MODEL.model_copy(update={"FEATURE_EVAL_SETTINGS": wanted})})


def head_outputs(model: Any, images: Tensor) -> Mapping[str, Tensor]:
    """{"0": logits of the first output, ...}"""
    return {str(i): logits for i, logits in enumerate(model(images))}


def predict_split(
    config: Config, model: torch.nn.Module, dataset: ImageDataset, run_dir: Path, *, loading: Loading
) -> dict[str, Any]:
    """Predict one split; returns its meters as flat results, if it has labels. Rows of unreadable images do not count."""
    parts: dict[str, list[np.ndarray]] = {}
    meters: MeterGroup | None = None
    is_multi_label = dataset.labels is not None and dataset.labels.ndim == 2
    with apart():
        for read, logits in _outputs_of(config, model, dataset, loading=loading):
            if meters is None:
                meters = meters_of(config, num_heads=len(logits))
                _warn_of_other_classes(dataset, logits)
            label, valid = read["label"], read["valid"]
            if dataset.num_classes is not None:
                meters.update([torch.from_numpy(value) for value in logits.values()], label, valid=valid)
            parts.setdefault("targets", []).append(np.where(_like(valid.numpy(), label), label.numpy(), -1))
            parts.setdefault("inds", []).append(read["index"].numpy())
            for head, value in logits.items():
                predictions, scores = decide(value, is_multi_label=is_multi_label)
                parts.setdefault(f"{head}/predictions", []).append(predictions)
                parts.setdefault(f"{head}/conf_scores", []).append(scores)
    dataset.write_bad_images()
    heads = max(distributed.all_gather_object(0 if meters is None else meters.num_heads))
    _write(parts, dataset, run_dir / "predictions" / dataset.split, num_heads=heads)
    if dataset.num_classes is None:
        return {}
    return (meters or meters_of(config, num_heads=heads)).flatten(dataset.split.lower())


def meters_of(config: Config, *, num_heads: int) -> MeterGroup:
    """The meters of METERS.NAMES, which leave out what the loss leaves out."""
    return build_meters(config.METERS, num_heads=num_heads, ignore_index=ignored_target(config.LOSS))


def _warn_of_other_classes(dataset: ImageDataset, logits: Mapping[str, np.ndarray]) -> None:
    """Say so if the outputs cannot be the classes of the labels: a student of clusters, on images with classes."""
    outputs = {value.shape[1] for value in logits.values()}
    if dataset.num_classes is not None and outputs != {dataset.num_classes} and distributed.is_main():
        log.warning(
            "config.DATA.%s has labels of %d classes, the heads have %s outputs: metrics compare the one with the other.",
            dataset.split, dataset.num_classes, " and ".join(map(str, sorted(outputs))),
        )  # fmt: skip


def _outputs_of(
    config: Config, model: torch.nn.Module, dataset: ImageDataset, *, loading: Loading
) -> Iterator[tuple[Mapping[str, Any], dict[str, np.ndarray]]]:
    """This rank's batches with the logits of every output."""
    world, batch = distributed.current(), getattr(config.DATA, dataset.split).BATCHSIZE_PER_REPLICA
    warn_random_views(dataset)
    batches = eval_batches(
        dataset,
        batch=batch,
        rank=world.rank,
        size=world.size,
        workers=loading.workers,
        method=loading.method,
        pin_memory=loading.pin_memory,
    )
    first, last = eval_range(len(dataset), batch, world.rank, world.size)
    show = progress_bar(config, f"predictions of {dataset.split}", unit="image")
    rows = 0
    for read, logits in outputs(model, batches, head_outputs, to_input=dataset.device_transform, loading=loading):
        rows += len(read["index"])
        show(rows, last - first)
        yield read, logits


def _like(valid: np.ndarray, label: Tensor) -> np.ndarray:
    """valid (B,) shaped so that it goes with labels (B,) or (B, C)."""
    return valid.reshape(-1, *(1 for _ in label.shape[1:]))


def decide(logits: np.ndarray, *, is_multi_label: bool) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and confidences of logits (B, C).

    The five best classes and their softmax probabilities (B, 5); of equals the lower class first. Multi-label: for each
    class 1 where the sigmoid is at least one half, and the sigmoid (B, C).
    """
    values = torch.from_numpy(logits).double()
    if is_multi_label:
        scores = values.sigmoid()
        return (scores >= 0.5).to(torch.uint8).numpy(), scores.float().numpy()
    scores, order = values.softmax(1).sort(dim=1, descending=True, stable=True)
    return order[:, :TOP].numpy(), scores[:, :TOP].float().numpy()


def _write(parts: dict[str, list[np.ndarray]], dataset: ImageDataset, folder: Path, *, num_heads: int) -> None:
    """Join the parts of all ranks, which are contiguous and in order, and write them on the main rank."""
    names = [
        "targets",
        "inds",
        *(f"{head}/{what}" for head in range(num_heads) for what in ("predictions", "conf_scores")),
    ]
    for name in names:
        own = np.concatenate(parts[name]) if name in parts else None
        gathered = [part for part in distributed.all_gather_object(own) if part is not None]
        if not distributed.is_main():
            continue
        # One output is written flat, as the original does; several get a folder each.
        place = name.split("/")[-1] if num_heads == 1 else name
        file = folder / f"{place}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_array(file, np.concatenate(gathered))
    if distributed.is_main():
        write_array(folder / "images.npy", dataset.paths)
        log.info("predictions of %d images in %s", len(dataset), folder)
