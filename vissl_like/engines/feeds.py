"""The images of a training: its splits, and the batches of each that a process gets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

from vissl_like.config.plan import Plan
from vissl_like.config.schema import Config
from vissl_like.core import distributed
from vissl_like.core.loop import Feed
from vissl_like.data.images import ImageDataset
from vissl_like.data.loader import close_workers, eval_batches, train_batches


@dataclass(frozen=True)
class Splits:
    """The images of a training. `train` is None when only the test runs, `test` when there is none."""

    train: ImageDataset | None
    test: ImageDataset | None

    @property
    def all(self) -> list[ImageDataset]:
        return [split for split in (self.train, self.test) if split is not None]

    @property
    def any(self) -> ImageDataset:
        found = self.train or self.test
        assert found is not None
        return found

    def close(self) -> None:
        for dataset in self.all:
            close_workers(dataset)


def make_feed(config: Config, splits: Splits, plan: Plan) -> Feed:
    """Batches of both splits for this rank."""
    train_set, test_set = splits.train, splits.test
    assert train_set is not None

    def pass_ended() -> None:
        train_set.write_bad_images()
        if test_set is not None:
            test_set.write_bad_images()

    return Feed(
        train=train_feed(config, train_set, plan),
        to_input=train_set.device_transform,
        test=None if test_set is None else test_feed(config, test_set, plan),
        to_test_input=None if test_set is None else test_set.device_transform,
        identity={
            "seed": config.SEED_VALUE,
            "images": f"{len(train_set)} ({hash_of_paths(train_set)})",
            "global batch": plan.global_batch,
            "steps per epoch": plan.steps_per_epoch,
        },
        pass_ended=pass_ended,
    )


def hash_of_paths(dataset: ImageDataset) -> str:
    """Which images a dataset has, and in which order; does not look at the files."""
    text = "\n".join(dataset.paths.tolist()).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def train_feed(config: Config, dataset: ImageDataset, plan: Plan) -> Any:
    """(epoch, first step, in this process) -> the micro-batches of this rank."""
    world = distributed.current()

    def batches(epoch: int, first_step: int, in_process: bool) -> Any:
        options = loading(config, plan)
        return train_batches(
            dataset,
            seed=config.SEED_VALUE,
            epoch=epoch,
            first_step=first_step,
            batch_per_rank=plan.batch_per_rank,
            accumulate=plan.accumulate,
            rank=world.rank,
            size=world.size,
            drop_last=config.DATA.TRAIN.DROP_LAST,
            **(options | {"workers": 0} if in_process else options),
        )

    return batches


def test_feed(config: Config, dataset: ImageDataset, plan: Plan) -> Any:
    """() -> this rank's batches of the test split."""
    world = distributed.current()
    return partial(
        eval_batches,
        dataset,
        batch=config.DATA.TEST.BATCHSIZE_PER_REPLICA,
        rank=world.rank,
        size=world.size,
        **loading(config, plan),
    )


def loading(config: Config, plan: Plan) -> dict[str, Any]:
    """How batches are read."""
    return {
        "workers": plan.num_workers,
        "method": config.MULTI_PROCESSING_METHOD,
        "pin_memory": config.DATA.PIN_MEMORY and distributed.current().device.type == "cuda",
    }
