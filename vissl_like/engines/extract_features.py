"""Engine `extract_features`: features of any layers of any model, for every image, in the order of the data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vissl_like.analysis import extraction
from vissl_like.analysis.extraction import Extraction, Loading
from vissl_like.analysis.feature_formats import check_formats, write_formats, write_per_image
from vissl_like.analysis.features import FeatureStore
from vissl_like.config.plan import make_plan
from vissl_like.config.schema import Config, Job
from vissl_like.config.schema_model import Model
from vissl_like.core import distributed, rng
from vissl_like.core.evaluation import Arithmetic
from vissl_like.core.on_main import on_main
from vissl_like.core.weights import WeightsReport, fingerprint, load_initial_weights, saved_head_shapes
from vissl_like.data.dataset import SPLITS, build_dataset, is_used
from vissl_like.data.images import ImageDataset, Sample
from vissl_like.data.loader import close_workers
from vissl_like.errors import ConfigError
from vissl_like.files import write_text
from vissl_like.models.heads import has_open_sizes, resolve_from_state
from vissl_like.models.vision_model import VisionModel
from vissl_like.models.zoo import build_model, stores_heads
from vissl_like.outputs import console

WEIGHTS_REPORT = "weights_report.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model on its device, in eval mode, with what was loaded into it."""

    model: VisionModel
    report: WeightsReport

    def results(self) -> dict[str, Any]:
        """How much of the trunk was loaded, for results.json."""
        if not self.report.source:
            return {"weights": "random" if self.report.trunk.total else "none needed"}
        return {"weights": self.report.source, "weights_loaded": 100 * self.report.trunk.value}


def run(job: Job, run_dir: Path) -> dict[str, Any]:
    """Extract every split that has data (or EXTRACT_FEATURES.SPLITS). Called on every rank."""
    config = job.config
    rng.set_determinism(config.MACHINE.DETERMINISTIC)
    return extract_splits(config, run_dir, features_folder(config, run_dir), splits=wanted_splits(config))


def features_folder(config: Config, run_dir: Path) -> Path:
    """Where features go."""
    given = config.EXTRACT_FEATURES.OUTPUT_DIR
    return Path(given).expanduser() if given else run_dir / "features"


def wanted_splits(config: Config) -> list[str]:
    """The splits to extract; ConfigError if there is none, or one without data."""
    given: list[str] = list(dict.fromkeys(config.EXTRACT_FEATURES.SPLITS))
    empty = [split for split in given if not is_used(config.DATA, split)]
    if empty:
        raise ConfigError(
            f"config.EXTRACT_FEATURES.SPLITS={given}: config.DATA.{empty[0]}.DATA_SOURCES is empty. "
            f"Set it, or leave {empty[0]} out."
        )
    found = given or [split for split in SPLITS if is_used(config.DATA, split)]
    if not found:
        raise ConfigError("config.DATA: no split has images. Set config.DATA.TRAIN.DATA_SOURCES (and DATA_PATHS).")
    return found


def extract_splits(
    config: Config,
    run_dir: Path,
    folder: Path,
    *,
    splits: Sequence[str],
    calibrate: int = 0,
    check: Callable[[ImageDataset], None] = lambda dataset: None,
) -> dict[str, Any]:
    """Build the model, extract these splits into `folder`, write further formats. Returns flat results.

    calibrate: number of training batches from which BatchNorm statistics are set first (0: none). check: raises for a
    data set that the caller cannot use, before anything is extracted.
    """
    options = config.EXTRACT_FEATURES
    check_formats(list(options.FORMATS))
    loading = loading_of(config)
    datasets = {split: open_split(config, split, run_dir) for split in splits}
    for dataset in datasets.values():
        check(dataset)
    try:
        loaded = load_model(config, datasets[splits[0]], run_dir)
        if calibrate:
            _calibrate(config, loaded.model, datasets, run_dir, num_batches=calibrate, loading=loading)
        identity = identity_of(config, loaded.model)
        found = [
            _extract_split(config, loaded.model, dataset, folder, identity=identity, loading=loading)
            for dataset in datasets.values()
        ]
    finally:
        for dataset in datasets.values():
            close_workers(dataset)
    on_main(lambda: _write_copies(config, folder, found))
    return {**_results(found), **loaded.results()}


def _extract_split(
    config: Config,
    model: VisionModel,
    dataset: ImageDataset,
    folder: Path,
    *,
    identity: dict[str, Any],
    loading: Loading,
) -> Extraction:
    options = getattr(config.DATA, dataset.split)
    warn_random_views(dataset)
    bar = progress_bar(config, f"features of {dataset.split}")
    found = extraction.extract(
        model,
        dataset,
        folder,
        options=config.EXTRACT_FEATURES,
        batch=options.BATCHSIZE_PER_REPLICA,
        identity={**identity, "transforms": options.TRANSFORMS, **pixels_of(config, dataset)},
        loading=loading,
        overwrite=config.RUN.OVERWRITE,
        progress=bar,
    )
    if found.rows_done and distributed.is_main():
        log.info(
            "%s: %d rows of %s in %.1f s (%.0f images/s) to %s",
            found.split, found.rows_done, found.dims, found.seconds, found.rows_done / found.seconds, folder / found.split,
        )  # fmt: skip
    return found


def pixels_of(config: Config, dataset: ImageDataset) -> dict[str, Any]:
    """Options, where they are in force, by which the same transforms give slightly other pixels."""
    found = {"reduced_decode": config.DATA.REDUCED_DECODE, "on_device": bool(dataset.device_transform.augment)}
    return {name: value for name, value in found.items() if value}


def progress_bar(config: Config, title: str, *, unit: str = "batch") -> Callable[[int, int], None]:
    """(done, total) -> shown on the main process."""
    shown: list[console.Progress] = []

    def update(done: int, total: int) -> None:
        if not distributed.is_main():
            return
        if not shown:
            mode = config.RUN.PROGRESS
            shown.append(
                console.progress(mode, total=total, title=title, unit=unit, log_frequency=config.LOG_FREQUENCY)
            )
        shown[0].update(done)
        if done == total:
            shown[0].close()

    return update


def _write_copies(config: Config, folder: Path, found: Sequence[Extraction]) -> None:
    """Further formats and single files, for every layer."""
    options = config.EXTRACT_FEATURES
    for split in found:
        for layer in split.dims:
            store = FeatureStore.open(folder, split.split, layer)
            write_formats(store, list(options.FORMATS))
            if options.MAP_FEATURES_TO_IMG_NAME:
                write_per_image(store, folder / "features_to_image" / split.split)


def _results(found: Sequence[Extraction]) -> dict[str, Any]:
    done, seconds = sum(split.rows_done for split in found), sum(split.seconds for split in found)
    results: dict[str, Any] = {f"{split.split.lower()}_rows": split.rows for split in found}
    results |= {f"dim_{layer}": dim for layer, dim in found[0].dims.items()}
    results["bad_images"] = sum(split.num_bad for split in found)
    if done:
        results["images_per_s"] = done / seconds
    return results


# ------------------------------------------------------------------------------------------- what other engines use too
def open_split(config: Config, split: str, run_dir: Path) -> ImageDataset:
    """The data set of a split, for evaluation."""
    return build_dataset(
        config.DATA, split, seed=config.SEED_VALUE, input_type=config.MODEL.INPUT_TYPE, run_dir=run_dir
    )


def loading_of(config: Config) -> Loading:
    """How this process reads and computes batches."""
    world = distributed.current()
    on_gpu = world.device.type == "cuda"
    plan = make_plan(
        config,
        num_processes=world.size,
        device="gpu" if on_gpu else "cpu",
        num_train=None,
        engine_name="extract_features",
    )
    return Loading(
        workers=plan.num_workers,
        method=config.MULTI_PROCESSING_METHOD,
        pin_memory=config.DATA.PIN_MEMORY and on_gpu,
        threads=plan.num_threads,
        arithmetic=Arithmetic(precision=plan.precision, channels_last=config.MACHINE.CHANNELS_LAST),
    )


def load_model(config: Config, dataset: ImageDataset, run_dir: Path, *, with_heads: bool | None = None) -> Loaded:
    """The model with its initial weights; its heads only where their outputs are wanted (`with_heads` None: as configured).

    Sizes of heads that are `auto` are those of the heads in the weights file, else they follow from the data. Without
    weights it is random, the same on every rank, and the log says so loudly.
    """
    settings = config.MODEL.FEATURE_EVAL_SETTINGS
    if with_heads is None:
        with_heads = stores_heads(settings)
    rng.seed_model(config.SEED_VALUE)
    size = tuple(dataset[0]["data"].shape[-2:])
    section, is_resolved = with_saved_heads(config.MODEL) if with_heads else (config.MODEL, False)
    num_classes = None if is_resolved else dataset.num_classes
    model = build_model(section, num_classes=num_classes, image_size=size, with_heads=with_heads)
    report = load_initial_weights(model, config.MODEL.WEIGHTS_INIT, feature_eval=settings)
    if distributed.is_main():
        log.info("%s", report.table())
        write_text(run_dir / WEIGHTS_REPORT, report.to_json())
        if not report.source and report.trunk.total:
            log.warning(
                "NO WEIGHTS: config.MODEL.WEIGHTS_INIT.PARAMS_FILE is empty, so what follows comes from an UNTRAINED network."
            )
    layout = torch.channels_last if config.MACHINE.CHANNELS_LAST else torch.preserve_format
    return Loaded(model.to(distributed.current().device, memory_format=layout).eval(), report)


def with_saved_heads(model: Model) -> tuple[Model, bool]:
    """The section with every `auto` of its heads read off the heads in PARAMS_FILE; and whether that settled all of them."""
    if not has_open_sizes(model.HEAD.PARAMS):
        return model, False
    params = resolve_from_state(model.HEAD.PARAMS, saved_head_shapes(model.WEIGHTS_INIT))
    resolved = model.model_copy(update={"HEAD": model.HEAD.model_copy(update={"PARAMS": params})})
    return resolved, not has_open_sizes(params)


def identity_of(config: Config, model: VisionModel) -> dict[str, Any]:
    """What features depend on, beside the images and their transforms."""
    section = config.MODEL
    return {
        "weights": fingerprint(model),
        "model": {
            "trunk": section.TRUNK.model_dump(mode="json"),
            "input_type": section.INPUT_TYPE,
            "features": section.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP,
        },
        "precision": config.MACHINE.PRECISION,
        "seed": config.SEED_VALUE,
    }


def warn_random_views(dataset: ImageDataset) -> None:
    """Say so if the transforms of a split are random: features then belong to one random view of each image."""
    first = dataset.sample(0, 0)
    if distributed.is_main() and any(not _is_same(first, dataset.sample(epoch, 0)) for epoch in range(1, 5)):
        log.warning(
            "config.DATA.%s.TRANSFORMS are random: features belong to one random view of each image. "
            "Resize and CenterCrop are usual here.",
            dataset.split,
        )


def _is_same(one: Sample, other: Sample) -> bool:
    return torch.equal(one.data, other.data) and np.array_equal(one.draws, other.draws)


def _calibrate(
    config: Config,
    model: VisionModel,
    datasets: dict[str, ImageDataset],
    run_dir: Path,
    *,
    num_batches: int,
    loading: Loading,
) -> None:
    dataset = datasets.get("TRAIN") or open_split(config, "TRAIN", run_dir)
    count = extraction.calibrate_batchnorm(
        model,
        dataset,
        num_batches=num_batches,
        batch=config.DATA.TRAIN.BATCHSIZE_PER_REPLICA,
        seed=config.SEED_VALUE,
        loading=loading,
    )
    if distributed.is_main():
        log.info("BatchNorm statistics of %d layers set from %d training batches", count, num_batches)
