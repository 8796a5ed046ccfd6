"""Engine `train`: trains a model on labels (given, pseudo- or made by a transform) and tests it; also frozen-trunk heads."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vissl_like.analysis.meters import MeterGroup, build_meters
from vissl_like.config.plan import Plan, make_plan
from vissl_like.config.schema import Config, Job
from vissl_like.config.schema_model import Meters
from vissl_like.core import checkpoint, distributed, parallel, rng
from vissl_like.core.evaluation import Arithmetic, evaluate
from vissl_like.core.loop import Feed, Options, Record, Training
from vissl_like.core.weights import load_initial_weights
from vissl_like.data.dataset import build_dataset, is_used
from vissl_like.data.images import ImageDataset
from vissl_like.data.loader import close_workers, eval_batches, train_batches
from vissl_like.errors import ConfigError
from vissl_like.models.ema import Ema
from vissl_like.models.heads import is_chain
from vissl_like.models.vision_model import VisionModel
from vissl_like.models.zoo import build_model
from vissl_like.optim import groups as param_groups
from vissl_like.optim.schedules import Rates, unreached_milestones
from vissl_like.outputs.writers import Writers, read_metrics, rewind
from vissl_like.registry import resolve

WEIGHTS_REPORT = "weights_report.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """The images of a training. `train` is None when only the test runs, `test` when there is none."""

    train: ImageDataset | None
    test: ImageDataset | None

    @property
    def any(self) -> ImageDataset:
        found = self.train or self.test
        assert found is not None
        return found

    def close(self) -> None:
        for dataset in (self.train, self.test):
            if dataset is not None:
                close_workers(dataset)


class Silent:
    """The record of all ranks but the main one."""

    def metrics(self, record: Mapping[str, Any]) -> None:
        pass

    def progress(self, step: int, record: Mapping[str, Any] | None = None) -> None:
        pass

    def close(self) -> None:
        pass


def run(job: Job, run_dir: Path) -> dict[str, Any]:
    """Train, or test only, and return the final metrics. Called on every rank."""
    config = job.config
    world = distributed.current()
    rng.set_determinism(config.MACHINE.DETERMINISTIC)
    splits = open_splits(config, run_dir)
    plan = make_plan(
        config,
        num_processes=world.size,
        device="gpu" if world.device.type == "cuda" else "cpu",
        num_train=None if splits.train is None else len(splits.train),
    )
    model = make_model(config, splits)
    saved = distributed.broadcast_object(find_checkpoint(config, run_dir) if distributed.is_main() else None)
    if saved is None:
        start_weights(model, config, run_dir)
    try:
        if splits.train is None:
            if saved is not None:
                model.load_state_dict(saved.model_state())
            return test_only(config, model, splits, plan, run_dir)
        return train(job, model, splits, plan, run_dir, saved)
    finally:
        splits.close()


def open_splits(config: Config, run_dir: Path) -> Splits:
    """The datasets that this run uses."""
    data, seed = config.DATA, config.SEED_VALUE
    build = partial(build_dataset, data, seed=seed, input_type=config.MODEL.INPUT_TYPE, run_dir=run_dir)
    with_test = is_used(data, "TEST") and (config.TEST_MODEL or config.TEST_ONLY)
    if config.TEST_ONLY and not with_test:
        raise ConfigError("config.TEST_ONLY=true needs a test split: set config.DATA.TEST.DATA_SOURCES.")
    train = None if config.TEST_ONLY else build("TRAIN", train=True)
    test = build("TEST", train=True) if with_test else None
    return Splits(train=train, test=test)


def make_model(config: Config, splits: Splits) -> VisionModel:
    """The model on its device, randomly initialised, the same on every rank."""
    rng.seed_model(config.SEED_VALUE)
    num_classes = max((split.num_classes or 0 for split in (splits.train, splits.test) if split is not None), default=0)
    data = splits.any[0]["data"]
    model = build_model(config.MODEL, num_classes=num_classes or None, image_size=tuple(data.shape[-2:]))
    if config.MODEL.SYNC_BN_CONFIG.CONVERT_BN_TO_SYNC_BN:
        model = parallel.synchronise_norms(model, group_size=config.MODEL.SYNC_BN_CONFIG.GROUP_SIZE)
    layout = torch.channels_last if config.MACHINE.CHANNELS_LAST else torch.preserve_format
    return model.to(distributed.current().device, memory_format=layout)


def find_checkpoint(config: Config, run_dir: Path) -> checkpoint.Saved | None:
    """The checkpoint to go on from, or None."""
    if config.CHECKPOINT.AUTO_RESUME:
        return checkpoint.newest(run_dir)
    if checkpoint.saved_steps(run_dir) and not config.TEST_ONLY:
        raise ConfigError(
            f"config.CHECKPOINT.AUTO_RESUME=false, but {run_dir} holds checkpoints. Set config.RUN.OVERWRITE=true to "
            "start anew there, or choose another config.RUN.DIR."
        )
    return None


def start_weights(model: VisionModel, config: Config, run_dir: Path) -> None:
    """Fill the model from MODEL.WEIGHTS_INIT and write down what became of each tensor."""
    report = load_initial_weights(
        model, config.MODEL.WEIGHTS_INIT, feature_eval=config.MODEL.FEATURE_EVAL_SETTINGS
    )
    if distributed.is_main():
        log.info("%s", report.table())
        (run_dir / WEIGHTS_REPORT).write_text(report.to_json())


def train(
    job: Job, model: VisionModel, splits: Splits, plan: Plan, run_dir: Path, saved: checkpoint.Saved | None
) -> dict[str, Any]:
    """Train from the checkpoint or from the start."""
    config, optimization = job.config, job.config.OPTIMIZER
    steps_per_epoch = plan.steps_per_epoch or 0
    if steps_per_epoch == 0 and optimization.NUM_EPOCHS:
        next(train_feed(config, splits, plan)(0, 0))  # raises the loader's error for too few images
    groups = param_groups.make_groups(model, optimization)
    if distributed.is_main():
        log.info("parameter groups\n%s", param_groups.table(groups))
        warn_unreached(plan, optimization.NUM_EPOCHS)
    options = loop_options(config, plan)
    record = open_record(job, run_dir, total_steps=options.total_steps, first_step=(saved.step if saved else 0) + 1)
    try:
        training = Training(
            task=parallel.wrap_for_gradients(
                make_task(config, model, splits),
                broadcast_buffers=config.DISTRIBUTED.BROADCAST_BUFFERS,
                bucket_cap_mb=config.DISTRIBUTED.BUCKET_CAP_MB,
            ),
            optimizer=param_groups.build_optimizer(groups, optimization),
            groups=groups,
            rates=Rates(
                lr=plan.lr,
                lr_head=plan.lr_head,
                weight_decay=optimization.PARAM_SCHEDULERS.WEIGHT_DECAY,
                steps_per_epoch=max(1, steps_per_epoch),
                num_epochs=max(1, optimization.NUM_EPOCHS),
            ),
            feed=make_feed(config, splits, plan),
            options=options,
            run_dir=run_dir,
            record=record,
            ema=Ema(model, options=config.MODEL.EMA, total_steps=options.total_steps) if config.MODEL.EMA.ENABLED else None,
        )
        if saved is not None:
            training.resume(saved)
            training.known_tests = known_tests(run_dir, saved.step)
        return training.run()
    finally:
        record.close()
