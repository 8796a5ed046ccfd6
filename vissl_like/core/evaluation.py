"""One pass over the test split, exact on any number of processes; and how batches get onto the device."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vissl_like.analysis.rows import each
from vissl_like.core import distributed, parallel, rng, signals
from vissl_like.errors import DataError

Batch = dict[str, Any]
#: Marks a batch whose outputs do not count.
STAND_IN = "stand_in"
#: What stays on the host.
HOST_ONLY = ("draws", "counts")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Task(Protocol):
    """What a method offers to the loop. It is an nn.Module; calling it is the training step."""

    model: nn.Module
    #: Whether predict() draws random numbers; if so, batches of a test are computed one after the other.
    draws_in_test: bool

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """{"loss": ()} and further scalars to log, each a mean over the batch."""
        ...

    def predict(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        """What a batch of the test gives, without side effects. `model` is self.model or a replica of it."""
        ...

    def score(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        """Count what predict() gave; returns the batch's mean loss, (). batch["epoch"]: see evaluate()."""
        ...

    def test_metrics(self, prefix: str) -> dict[str, float]:
        """What score() counted, over all ranks; starts counting anew."""
        ...

    def train_metrics(self, prefix: str) -> dict[str, float]:
        """What the training steps counted, over all ranks; starts counting anew."""
        ...

    def running_state(self) -> list[dict[str, Any]]:
        """This rank's counts of the epoch so far."""
        ...

    def load_running_state(self, states: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Go on counting from the sum of these states."""
        ...

    def eval(self) -> Any: ...


@dataclass(frozen=True)
class Arithmetic:
    """Device, precision and layout of all computations."""

    precision: str = "fp32"
    channels_last: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        """Half precision where it was asked for."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(distributed.current().device.type, dtype=PRECISIONS[self.precision])

    def to_device(self, batch: Mapping[str, Any], to_input: Callable[..., Tensor]) -> Batch:
        """The batch on the device; data as the model takes it (`to_input`: what the transforms leave to the device).

        Random numbers of the transforms, `draws`, and `counts` stay on the host and go no further.
        """
        device = distributed.current().device
        on_host = device.type == "cpu"  # where the batch is already
        moved = {
            name: value if on_host or not isinstance(value, Tensor) else value.to(device, non_blocking=True)
            for name, value in batch.items()
            if name not in HOST_ONLY
        }
        data, draws = batch["data"], batch.get("draws")
        if draws is not None:
            to_input = partial(to_input, draws=draws)
        if isinstance(data, Tensor):
            moved["data"] = self._input(moved["data"], to_input)
        else:  # several crops
            moved["data"] = [self._input(part.to(device, non_blocking=True), to_input) for part in data]
        return moved

    def _input(self, images: Tensor, to_input: Callable[[Tensor], Tensor]) -> Tensor:
        images = to_input(images)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def evaluate(
    task: Task,
    batches: Iterable[Batch],
    *,
    to_input: Callable[[Tensor], Tensor],
    arithmetic: Arithmetic,
    seed: int,
    prefix: str = "test",
    epoch: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """{prefix_loss, prefix_<measure>, ...} over this rank's batches and those of all others; None if interrupted.

    Batches do not depend on the number of ranks, each is computed by one thread (several at once on a CPU), counts are
    whole numbers and losses are summed exactly: so neither processes nor threads change a bit of the results. The loss is
    the mean over all that it counts, however large the batches are. Rows that are not `valid` (unreadable images) do not
    count. `epoch`: how many epochs the model has been trained for, for a task that draws what it finds; None: nothing is
    to be drawn.
    """
    parallel.share_buffers(task.model)
    task.eval()
    on_cpu = distributed.current().device.type == "cpu"
    is_parallel = on_cpu and not task.draws_in_test and parallel.is_replicable(task.model)
    threads = torch.get_num_threads() if is_parallel else 1
    own = threading.local()

    def compute(kept: Batch) -> tuple[Batch, Any, float]:
        if not hasattr(own, "model"):
            own.model = task.model if threads <= 1 else replica(task.model)
        if task.draws_in_test:
            rng.seed_step(seed, int(kept["index"][0]), 0)  # what is drawn follows from the rows
        with torch.inference_mode(), arithmetic.autocast():
            inputs = arithmetic.to_device(kept, to_input)
            return inputs, task.predict(own.model, inputs), counted_rows(kept)

    losses: list[Tensor] = []
    counts: list[float] = []
    kept: Iterator[Batch] = (part for part in map(_valid_rows, _until(interrupted, batches)) if len(part["index"]))
    kept = _in_step(kept) if parallel.is_sharded(task.model) else kept
    for inputs, outputs, counted in each(compute, kept, threads=threads):
        if not inputs.get(STAND_IN):
            with torch.inference_mode():
                losses.append(task.score(outputs, inputs | {"epoch": epoch}).detach())
            counts.append(counted)
    if any(distributed.all_gather_object(interrupted())):
        task.test_metrics(prefix)
        return None
    values = torch.stack(losses).double().cpu().tolist() if losses else []
    gathered = distributed.all_gather_object([(loss * count, count) for loss, count in zip(values, counts)])
    pairs = [pair for part in gathered for pair in part]
    total = math.fsum(count for _, count in pairs)
    loss = math.fsum(value for value, _ in pairs) / total if total else math.nan
    return {f"{prefix}_loss": loss, **task.test_metrics(prefix)}


def counted_rows(batch: Mapping[str, Any]) -> float:
    """What the rows of a batch count in the mean loss: their number, or the sum of `counts`."""
    counts = batch.get("counts")
    return len(batch["index"]) if counts is None else float(counts.sum())


def replica(model: nn.Module) -> nn.Module:
    """The same modules once more with the same tensors, for another thread: a trunk hooks its modules during a pass."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def _until(interrupted: Callable[[], bool], batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches until the run is asked to stop. A signal to the whole process group also ends the loader's workers."""
    try:
        for batch in batches:
            if interrupted():
                return
            yield batch
    except (RuntimeError, DataError):
        if not signals.comes_soon(interrupted):
            raise


def _in_step(batches: Iterator[Batch]) -> Iterator[Batch]:
    """This rank's batches, and stand-ins once it has no more: a forward pass of a sharded model needs every rank."""
    batch = next(batches, None)
    firsts = distributed.all_gather_object(None if batch is None else _first_row(batch))
    stand_in = next((first for first in firsts if first is not None), None)
    while int(distributed.all_reduce_sum(torch.tensor(int(batch is not None)))):
        assert stand_in is not None
        yield {**stand_in, STAND_IN: True} if batch is None else batch
        batch = next(batches, None)


def _first_row(batch: Batch) -> Batch:
    def first(value: Any) -> Any:
        return value[:1].clone() if isinstance(value, Tensor) and value.ndim else value

    return {name: [first(part) for part in v] if isinstance(v, list) else first(v) for name, v in batch.items()}


def _valid_rows(batch: Batch) -> Batch:
    valid = batch.get("valid")
    if valid is None or bool(valid.all()):
        return batch
    return {name: value[valid] if isinstance(value, Tensor) and value.ndim else value for name, value in batch.items()}
