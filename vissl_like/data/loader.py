"""Batches in a fixed order, read in this process or in worker processes; how many there are changes nothing in them.

A request names an epoch and rows; a worker answers with a whole batch. Errors and unreadable images come back with the
batch, so that the user sees one message instead of a worker's traceback.
"""

from __future__ import annotations

import copy
import multiprocessing
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vissl_like.data import order
from vissl_like.data.images import ImageDataset
from vissl_like.data.shard_cache import fetch_ahead
from vissl_like.data.sharding import Hints
from vissl_like.errors import DataError, UserError

#: Batches that each worker has in hand.
_PREFETCH = 2
# Imported once by the server that forkserver workers are forked from, instead of once in each worker.
_PRELOAD = ["torch", "torchvision.transforms.v2", "PIL.Image", "vissl_like.data.loader"]


def refuse_too_few(
    images: int, batch_per_rank: int, accumulate: int, size: int, drop_last: bool, *, split: str
) -> None:
    """Raise DataError if so many images make no step of training on `size` processes."""
    if order.steps_per_epoch(images, batch_per_rank, accumulate, size, drop_last):
        return
    wanted = batch_per_rank * accumulate if drop_last else accumulate
    raise DataError(
        f"config.DATA.{split}: {images} images are too few for one step, which needs {wanted} "
        f"on each of {size} process{'es' * (size > 1)} "
        f"(DROP_LAST={str(drop_last).lower()}). Give more images, or lower config.DATA.{split}.BATCHSIZE_PER_REPLICA, "
        "config.OPTIMIZER.ACCUMULATE_STEPS or the number of processes."
    )


def train_batches(
    dataset: ImageDataset,
    *,
    seed: int,
    epoch: int,
    first_step: int = 0,
    batch_per_rank: int,
    accumulate: int = 1,
    rank: int = 0,
    size: int = 1,
    workers: int = 0,
    method: str = "forkserver",
    pin_memory: bool = False,
    drop_last: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """The rest of an epoch from `first_step` on: `accumulate` micro-batches for each step, of one rank.

    data (B, C, H, W) uint8 or float, label (B,) or (B, K) int64, index (B,) int64, valid (B,) bool, weight (): the
    factor for the micro-batch's mean loss with which the mean over micro-batches and ranks is the mean over the
    step's rows; counts (B,) float64: what each row counts in that mean, where not all count alike. draws (B, R) float32
    where the device augments: what device_transform takes beside the images. mask (B, H, W) bool where the dataset has
    them.
    """
    where = (batch_per_rank, accumulate, size, drop_last)
    refuse_too_few(len(dataset), *where, split=dataset.split)
    steps = order.steps_per_epoch(len(dataset), *where)
    shape = {"batch_per_rank": batch_per_rank, "accumulate": accumulate, "size": size}
    rows = dataset.order(seed, epoch)
    before = dataset.counted_before(rows)
    requests, weights = [], []
    for step in range(first_step, steps):
        for start, stop in order.micro_batches(len(dataset), step=step, rank=rank, **shape):
            requests.append(_Request(epoch, rows[start:stop]))
            if before is None:
                weights.append(order.micro_batch_weight(len(dataset), step=step, rows=stop - start, **shape))
            else:
                weights.append(order.counted_weight(before, step=step, start=start, stop=stop, **shape))
    batches = _fetch(dataset, requests, workers=workers, method=method, pin_memory=pin_memory, accumulate=accumulate)
    for batch, weight in zip(batches, weights):
        yield {**batch, "weight": torch.tensor(weight)}


def eval_batches(
    dataset: ImageDataset,
    *,
    batch: int,
    rank: int = 0,
    size: int = 1,
    workers: int = 0,
    method: str = "forkserver",
    pin_memory: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's whole batches of the split, rows in order, each row on one rank only; randomness as in epoch 0.

    Batch k is rows [k*batch, (k+1)*batch) whatever the number of ranks. No weight; counts as in training.
    """
    start, stop = order.eval_range(len(dataset), batch, rank, size)
    requests = [_Request(0, np.arange(first, min(first + batch, stop))) for first in range(start, stop, batch)]
    yield from _fetch(dataset, requests, workers=workers, method=method, pin_memory=pin_memory)


def row_batches(
    dataset: ImageDataset,
    rows: Sequence[np.ndarray],
    *,
    workers: int = 0,
    method: str = "forkserver",
    pin_memory: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """One batch for each array of rows, in order; randomness as in epoch 0. No weight."""
    requests = [_Request(0, np.asarray(of_batch)) for of_batch in rows]
    yield from _fetch(dataset, requests, workers=workers, method=method, pin_memory=pin_memory)


def worker_died(error: BaseException, *, while_reading: bool = False) -> DataError | None:
    """What an error that comes of the sudden end of a loader process means for the user; None for any other error.

    `while_reading`: the error came out of the loader itself, where a broken connection means the same.
    """
    text = str(error)
    is_noticed = "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text)
    is_broken = while_reading and isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    if not is_broken and not (isinstance(error, RuntimeError) and is_noticed):
        return None
    return DataError(
        f"config.DATA.NUM_DATALOADER_WORKERS: a loader process ended by itself "
        f"({text.splitlines()[0] if text else type(error).__name__}). Most often memory "
        "ran out (also of /dev/shm, where batches pass through): lower the number; 0 loads in the main process."
    )


def close_workers(dataset: ImageDataset) -> None:
    """End the worker processes of a dataset now instead of when it is no longer used."""
    while dataset.loaders:
        dataset.loaders.popitem()[1].close()


# -------------------------------------------------------------------------------------------- fetching
class _Request(NamedTuple):
    """A batch to read, and which shards to fetch meanwhile."""

    epoch: int
    rows: np.ndarray
    hints: Hints = Hints()


class _Reader(torch.utils.data.Dataset):
    """Answers a request with a batch. Runs in the worker."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, request: _Request) -> dict[str, Any]:
        for shard in request.hints.release:
            shard.release()
        fetch_ahead(request.hints.fetch)
        try:
            return _read_batch(self._dataset, request.epoch, request.rows)
        except UserError as error:
            return {"error": error}


def _read_batch(dataset: ImageDataset, epoch: int, rows: np.ndarray) -> dict[str, Any]:
    """One batch. Small arrays stay numpy: they travel inside the message, a tensor each needs a file descriptor."""
    size = dataset.encoded_size
    out = None if size is None else _new_images(len(rows), *size)
    samples = dataset.samples(epoch, rows, out=out)
    bad: dict[int, str] = {}
    for sample in samples:
        bad.update(sample.bad)
    images = [sample.data for sample in samples]
    _refuse_mixed_shapes(images, dataset=dataset, rows=rows)
    batch: dict[str, Any] = {
        "data": torch.utils.data.default_collate(images) if out is None else _in_place(images, out),
        "label": np.stack([sample.label for sample in samples]),
        "index": np.asarray(rows, dtype=np.int64),
        "valid": np.array([sample.used == int(row) for sample, row in zip(samples, rows)]),
        "bad": bad,
    }
    if len(samples[0].draws):
        batch["draws"] = np.stack([sample.draws for sample in samples])
    masks = [sample.mask for sample in samples if sample.mask is not None]
    if masks:
        batch["mask"] = torch.utils.data.default_collate(masks)
    return batch


def _new_images(count: int, height: int, width: int) -> torch.Tensor:
    """Room for uint8 images (B, H, W, 3); within a worker in shared memory, as PyTorch's own collation does it."""
    shape = (count, height, width, 3)
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(count * height * width * 3)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)


def _in_place(images: list[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """The images (C, H, W) as a batch (B, C, H, W); most of them are in `out` (B, H, W, C) already."""
    for image, slot in zip(images, out):
        if image.data_ptr() != slot.data_ptr():
            slot.copy_(image.permute(1, 2, 0))
    return out.permute(0, 3, 1, 2)


def _refuse_mixed_shapes(images: list[torch.Tensor], *, dataset: ImageDataset, rows: np.ndarray) -> None:
    first = images[0]
    for image, row in zip(images, rows):
        if image.shape != first.shape:
            raise DataError(
                f"config.DATA.{dataset.split}.TRANSFORMS: images of one batch have different shapes, "
                f"{tuple(first.shape)} ({dataset.source.path(int(rows[0]))}) and {tuple(image.shape)} "
                f"({dataset.source.path(int(row))}). "
                "End with a crop or a resize to a fixed size [height, width]."
            )


def _fetch(
    dataset: ImageDataset,
    requests: list[_Request],
    *,
    workers: int,
    method: str,
    pin_memory: bool,
    accumulate: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of the requests, in order."""
    if dataset.sharding is not None:
        # What this process's workers have in hand, and a step: so much are other ranks behind at most.
        lag = accumulate + workers * _PREFETCH
        hints = dataset.sharding.schedule([request.rows for request in requests], lag=lag)
        requests = [request._replace(hints=given) for request, given in zip(requests, hints)]
    if workers == 0 or len(requests) == 0:
        reader = _Reader(dataset)
        for request in requests:
            yield _finished(dataset, reader[request], pin_memory=pin_memory)
        return
    pool = _pool_of(dataset, workers=workers, method=method, pin_memory=pin_memory)
    try:
        for answer in pool.answers(requests):
            yield _finished(dataset, answer)
    except Exception as error:
        dataset.loaders.pop((workers, method, pin_memory), None)
        clear = worker_died(error, while_reading=True)
        if clear is None:
            raise
        raise clear from error
    finally:
        if pool not in dataset.loaders.values():
            pool.close()


def _finished(dataset: ImageDataset, answer: dict[str, Any], *, pin_memory: bool = False) -> dict[str, torch.Tensor]:
    """A worker's answer as tensors; what it found unreadable is written down, its error raised."""
    if "error" in answer:
        raise answer["error"]
    dataset.record_bad(answer["bad"])
    batch: dict[str, torch.Tensor] = {name: answer[name] for name in ("data", "mask") if name in answer}
    for name in ("label", "index", "valid", "draws"):
        if name in answer:
            batch[name] = torch.from_numpy(answer[name])
    if dataset.row_weights is not None:
        batch["counts"] = torch.from_numpy(dataset.row_weights(answer["label"]))
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if pin_memory else batch


class _Requests:
    """The sampler of a loader that is used again and again: what it yields is set before each pass."""

    def __init__(self) -> None:
        self.requests: list[_Request] = []

    def __iter__(self) -> Iterator[_Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


def _as_it_is(answer: Any) -> Any:
    return answer


class _Pool:
    """Worker processes that stay alive between passes over one dataset."""

    def __init__(self, loader: torch.utils.data.DataLoader, *, sampler: _Requests) -> None:
        self.loader, self._sampler, self.is_busy = loader, sampler, False

    def answers(self, requests: list[_Request]) -> Iterator[dict[str, Any]]:
        """A batch for each request, in order."""
        self._sampler.requests = requests
        self.is_busy = True
        try:
            yield from _leaving_children_alone(self.loader)
        finally:
            self.is_busy = False

    def close(self) -> None:
        """End the processes; the next pass starts new ones. Left to the garbage collector this may take 5 s for each."""
        iterator, self.loader._iterator = self.loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()


def _leaving_children_alone(loader: torch.utils.data.DataLoader) -> Iterator[Any]:
    """A pass of the loader, without the handler that PyTorch then installs for the end of a child.

    That handler raises in whatever the main thread is doing. Without it the end of a worker is an error of the pass that
    waits for its batch, where a request to stop can be told from a crash.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    passing = iter(loader)
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return passing


def _pool_of(dataset: ImageDataset, *, workers: int, method: str, pin_memory: bool) -> _Pool:
    """The dataset's pool for these settings; a new one while that is in the middle of another pass."""
    key = (workers, method, pin_memory)
    kept = dataset.loaders.get(key)
    if kept is not None and not kept.is_busy:
        return kept
    pool = _new_pool(dataset, workers=workers, method=method, pin_memory=pin_memory)
    if kept is None:
        dataset.loaders[key] = pool
    return pool


def _new_pool(dataset: ImageDataset, *, workers: int, method: str, pin_memory: bool) -> _Pool:
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    sampler = _Requests()
    # How many loaders there are is the recipe's word; a recipe for servers also runs on a laptop.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    loader = torch.utils.data.DataLoader(
        _Reader(copy.copy(dataset)),  # without its loaders: no circle, so that processes end with the dataset
        batch_size=None,  # a request is already a batch
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=_PREFETCH,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        persistent_workers=True,
        multiprocessing_context=context,
        generator=torch.Generator(),  # the loader draws a number; leave the model's generator alone
    )
    return _Pool(loader, sampler=sampler)
