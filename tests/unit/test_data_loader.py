"""The same batches, bit for bit, for any number of workers, from any step, at any number of ranks."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vissl_like.config.schema_data import Data
from vissl_like.core import rng
from vissl_like.data.dataset import build_dataset
from vissl_like.data.images import ImageDataset
from vissl_like.data.loader import close_workers, eval_batches, row_batches, train_batches, worker_died
from vissl_like.errors import DataError

# More workers than cores is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

TRANSFORMS = [
    {"name": "RandomResizedCrop", "size": 16},
    {"name": "ColorJitter", "brightness": 0.4, "hue": 0.1},
    {"name": "VisslAutoAugment", "magnitude_std": 0.5},  # draws from random and numpy.random
    {"name": "ImgPilGaussianBlur", "p": 0.5},
    {"name": "ImgRotatePil"},
    {"name": "ToTensor"},
    {"name": "Normalize", "mean": [0.5] * 3, "std": [0.5] * 3},
]


def build(count: int = 43, transforms: list[dict[str, Any]] | None = None) -> ImageDataset:
    options = {"DATA_SOURCES": ["synthetic"], "NUM_SYNTHETIC": count, "SYNTHETIC_SIZE": 24,
               "TRANSFORMS": TRANSFORMS if transforms is None else transforms}  # fmt: skip
    return build_dataset(Data(TRAIN=options), "TRAIN", seed=3)


@pytest.fixture(scope="module")
def dataset() -> Any:
    made = build()
    yield made
    close_workers(made)


def train(dataset: ImageDataset, **options: Any) -> list[dict[str, torch.Tensor]]:
    return list(train_batches(dataset, **{"seed": 3, "epoch": 1, "batch_per_rank": 8, "method": "fork", **options}))


def assert_same(one: list[dict[str, torch.Tensor]], two: list[dict[str, torch.Tensor]]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_what_a_batch_is(dataset: ImageDataset) -> None:
    batches = train(dataset)
    assert [len(batch["data"]) for batch in batches] == [8, 8, 8, 8, 8, 3]
    first = batches[0]
    assert first["data"].shape == (8, 3, 16, 16) and first["data"].dtype == torch.uint8
    assert first["label"].dtype == first["index"].dtype == torch.int64 and first["valid"].dtype == torch.bool
    assert first["weight"].shape == () and all(float(batch["weight"]) == 1 for batch in batches)
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(43))
    assert first["index"].tolist() == rng.permutation(3, 1, 43)[:8].tolist()
    seen = dataset.device_transform(first["data"])
    assert seen.dtype == torch.float32 and seen.min() >= -1 and seen.max() <= 1


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("first_step", [0, 4])
def test_workers_change_nothing(dataset: ImageDataset, workers: int, first_step: int) -> None:
    whole = train(dataset)
    assert_same(whole[first_step:], train(dataset, workers=workers, first_step=first_step))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_start_methods_change_nothing(dataset: ImageDataset, method: str) -> None:
    for epoch in (0, 1):
        assert_same(train(dataset, epoch=epoch), train(dataset, epoch=epoch, workers=1, method=method))
    close_workers(dataset)


def test_a_pass_that_was_left_does_not_disturb_the_next(dataset: ImageDataset) -> None:
    options = {"seed": 3, "epoch": 1, "batch_per_rank": 4, "workers": 2, "method": "fork"}
    assert len(list(itertools.islice(train_batches(dataset, **options), 3))) == 3
    assert_same(train(dataset, epoch=2), train(dataset, epoch=2, workers=2))
    first, second = (train_batches(dataset, **options) for _ in range(2))
    both = list(zip(first, second))
    assert_same([a for a, _ in both], [b for _, b in both])


def test_workers_live_on_between_epochs(dataset: ImageDataset) -> None:
    train(dataset, epoch=0, workers=2)
    pool = dataset.loaders[2, "fork", False]
    alive = [process.pid for process in pool.loader._iterator._workers]
    train(dataset, epoch=1, workers=2)
    assert alive == [process.pid for process in dataset.loaders[2, "fork", False].loader._iterator._workers]


@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_and_accumulation_share_the_same_rows(dataset: ImageDataset, size: int, accumulate: int) -> None:
    alone = train(dataset, batch_per_rank=16)
    layout = {"batch_per_rank": 16 // (size * accumulate), "accumulate": accumulate, "size": size}
    ranks = [train(dataset, rank=rank, **layout) for rank in range(size)]
    for step, whole in enumerate(alone):
        parts = [ranks[rank][step * accumulate + m] for rank in range(size) for m in range(accumulate)]
        assert torch.equal(whole["data"], torch.cat([part["data"] for part in parts]))
        values = [part["index"].double().mean() * part["weight"] for part in parts]
        assert torch.stack(values).mean().item() == pytest.approx(whole["index"].double().mean().item(), rel=1e-6)


def test_dropping_the_last_batch(dataset: ImageDataset) -> None:
    assert [len(batch["data"]) for batch in train(dataset, drop_last=True)] == [8] * 5
    with pytest.raises(DataError, match="too few for one step"):
        train(dataset, batch_per_rank=44, drop_last=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_in_order_at_any_number_of_ranks(dataset: ImageDataset, workers: int) -> None:
    alone = list(eval_batches(dataset, batch=10))
    assert torch.cat([batch["index"] for batch in alone]).tolist() == list(range(43))
    assert "weight" not in alone[0]
    for size in (2, 3, 7):
        options = {"batch": 10, "size": size, "workers": workers, "method": "fork"}
        ranks = [list(eval_batches(dataset, rank=rank, **options)) for rank in range(size)]
        assert_same(alone, [batch for rank in ranks for batch in rank])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_chosen_rows(dataset: ImageDataset, workers: int) -> None:
    rows = [np.array([40, 2]), np.array([7])]
    found = list(row_batches(dataset, rows, workers=workers, method="fork"))
    assert [batch["index"].tolist() for batch in found] == [[40, 2], [7]]
    whole = torch.cat([batch["data"] for batch in eval_batches(dataset, batch=43)])
    assert torch.equal(found[0]["data"], whole[[40, 2]])
    assert list(row_batches(dataset, [], workers=workers, method="fork")) == []


def test_loading_leaves_the_generators_alone(dataset: ImageDataset) -> None:
    def after(workers: int) -> tuple[float, float]:
        torch.manual_seed(1)
        np.random.seed(1)
        train(dataset, workers=workers)
        return torch.rand(1).item(), float(np.random.rand())

    assert after(0) == after(2)


@pytest.mark.parametrize("workers", [0, 2])
def test_sizes_that_do_not_fit(workers: int, tmp_path: Path) -> None:
    for name, size in (("a.png", (4, 4)), ("b.png", (5, 4))):
        Image.new("RGB", size).save(tmp_path / name)
    options = {"DATA_SOURCES": ["disk_folder"], "DATA_PATHS": [str(tmp_path)]}
    dataset = build_dataset(Data(TRAIN=options), "TRAIN", seed=0)
    with pytest.raises(DataError, match=r"different shapes.*End with a crop") as error:
        list(eval_batches(dataset, batch=2, workers=workers, method="fork"))
    assert "Traceback" not in str(error.value)
    close_workers(dataset)


def test_an_error_in_a_worker_is_one_message() -> None:
    dataset = build(transforms=[{"name": "RandomCrop", "size": 99}])
    with pytest.raises(DataError, match=r"synthetic/train/\d+ \(24x24\).*RandomCrop") as error:
        train(dataset, workers=2)
    assert "Traceback" not in str(error.value)
    close_workers(dataset)


def test_a_killed_worker_is_explained() -> None:
    dataset = build()
    batches = train_batches(dataset, seed=0, epoch=0, batch_per_rank=1, workers=1, method="fork")
    next(batches)
    # PyTorch may notice while the batches are read (then it is a DataError) or already here.
    with pytest.raises((DataError, RuntimeError)) as error:
        os.kill(dataset.loaders[1, "fork", False].loader._iterator._workers[0].pid, signal.SIGKILL)
        list(batches)
    shown = worker_died(error.value) or error.value
    assert isinstance(shown, DataError) and "NUM_DATALOADER_WORKERS" in str(shown)
    assert worker_died(RuntimeError("shapes differ")) is None
    batches.close()
    assert len(list(eval_batches(dataset, batch=10, workers=1, method="fork"))) == 5  # with a new process
    close_workers(dataset)
