"""Running a model over a data set without training: outputs whose bits depend on no number of processes or threads.

On a CPU a convolution may differ in its last bits with the number of threads inside it. So each batch is computed by one
thread, and as many batches at once as there are threads; this costs no speed. A batch has the same rows at any world size.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vissl_like.analysis.features import MANIFEST, FeatureWriter, Subject
from vissl_like.analysis.rows import each, share, spans
from vissl_like.config.schema_data import ExtractFeatures
from vissl_like.core import distributed, signals
from vissl_like.core.evaluation import Arithmetic
from vissl_like.core.on_main import apart, on_main
from vissl_like.data.images import ImageDataset
from vissl_like.data.loader import row_batches
from vissl_like.errors import DataError

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
#: What is taken from a model: (model, images on its device) -> {name: (B, ...)}.
Call = Callable[[Any, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Loading:
    """How batches are read and computed on this process."""

    workers: int = 0
    method: str = "forkserver"
    pin_memory: bool = False
    threads: int = 1
    arithmetic: Arithmetic = field(default_factory=Arithmetic)

    def batches(self, dataset: ImageDataset, rows: list[np.ndarray]) -> Iterator[Batch]:
        """One batch per array of rows, in order."""
        return row_batches(dataset, rows, workers=self.workers, method=self.method, pin_memory=self.pin_memory)


def outputs(
    model: nn.Module, batches: Iterable[Batch], call: Call, *, to_input: Callable[[Tensor], Tensor], loading: Loading
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Each batch with what `call` takes from the model for it, as float32 arrays (B, ...), in order."""
    model.eval()
    threads = loading.threads if distributed.current().device.type == "cpu" else 1
    own = threading.local()

    def compute(batch: Batch) -> tuple[Batch, dict[str, np.ndarray]]:
        if not hasattr(own, "model"):
            own.model = model if threads <= 1 else _replica(model)
        with torch.inference_mode(), loading.arithmetic.autocast():
            moved = loading.arithmetic.to_device(image_part(batch), to_input)
            found = call(own.model, moved["data"])
        return batch, {name: value.float().cpu().numpy() for name, value in found.items()}

    return each(compute, batches, threads=threads)


def image_part(batch: Batch) -> Batch:
    """What the model's input is made of."""
    return {name: batch[name] for name in ("data", "draws") if name in batch}


def _replica(model: nn.Module) -> nn.Module:
    """The same modules once more, with the same tensors: a trunk hooks its modules during a pass, so threads cannot share."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def trunk_features(model: Any, images: Tensor) -> Mapping[str, Tensor]:
    """The features of the pooling map, or `flatten`, and outputs of heads where asked for."""
    return model.features(images)


@dataclass(frozen=True)
class Extraction:
    """What became of one split. `seconds` is 0 and `rows_done` too where everything was there already."""

    split: str
    rows: int
    rows_done: int
    seconds: float
    dims: dict[str, int]
    num_bad: int


def extract(
    model: nn.Module,
    dataset: ImageDataset,
    folder: Path,
    *,
    options: ExtractFeatures,
    batch: int,
    identity: Mapping[str, Any],
    loading: Loading,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Extraction:
    """Write the features of all rows below `folder`/<split>; every process calls it and takes its part of the blocks.

    A block is one batch. Finished work is kept: nothing is done for an extraction that is complete, only the rest for one
    that was interrupted or damaged. `progress`: blocks done and to do on this process.
    """
    started = time.perf_counter()
    target = folder / dataset.split
    pending = _prepare(
        model, dataset, target, options, batch=batch, identity=identity, loading=loading, overwrite=overwrite
    )
    rows_done = 0
    if pending is not None:
        world, writer = distributed.current(), FeatureWriter(target)
        first, last = share(len(pending), rank=world.rank, size=world.size)
        mine = pending[first:last]
        batches = loading.batches(dataset, [np.arange(*writer.blocks[block]) for block in mine])
        found = outputs(model, batches, trunk_features, to_input=dataset.device_transform, loading=loading)
        with signals.listen() as stop:
            with apart(asked=lambda: stop.requested) as is_stopped, _closing(writer, stop):
                for done, (block, (read, features)) in enumerate(zip(mine, found, strict=True), 1):
                    writer.write(block, features, valid=read["valid"].numpy())
                    progress(done, len(mine))
                    if stop.requested or is_stopped():
                        break
            if is_stopped():
                raise signals.stopped(
                    f"{stop.name or 'a signal to another process'}: extraction stopped; what is done is kept. Start again "
                    "to go on."
                )
        rows_done = sum(stop - start for start, stop in (writer.blocks[block] for block in pending))
        dataset.write_bad_images()
    manifest = on_main(lambda: _finish(target, is_new=pending is not None))
    seconds = time.perf_counter() - started if pending is not None else 0.0
    dims = {name: int(layer["dim"]) for name, layer in manifest["layers"].items()}
    return Extraction(dataset.split, len(dataset), rows_done, seconds, dims, len(manifest["bad_rows"]))


@contextlib.contextmanager
def _closing(writer: FeatureWriter, stop: signals.StopRequest) -> Iterator[None]:
    """Close the writer at the end. A signal may have ended the loader's processes as well: that is no error then."""
    try:
        yield
    except (RuntimeError, DataError):
        if not signals.comes_soon(lambda: stop.requested):
            with contextlib.suppress(DataError):  # the first error is the cause
                writer.close()
            raise
    writer.close()


def _finish(target: Path, *, is_new: bool) -> dict[str, Any]:
    return FeatureWriter.finish(target) if is_new else json.loads((target / MANIFEST).read_text(encoding="utf-8"))


def _prepare(
    model: nn.Module,
    dataset: ImageDataset,
    target: Path,
    options: ExtractFeatures,
    *,
    batch: int,
    identity: Mapping[str, Any],
    loading: Loading,
    overwrite: bool,
) -> list[int] | None:
    """The blocks that are to be written, the same on every process, or None if all is there.

    The main process alone looks what is pending: the marks change as soon as one process is through with its part.
    """
    shapes = feature_shapes(model, dataset, loading=loading)

    def prepare() -> list[int] | None:
        has_work = FeatureWriter.prepare(
            target,
            subject_of(dataset, identity),
            layers=shapes,
            dtype=options.DTYPE,
            shard_rows=options.SHARD_ROWS,
            block_rows=batch,
            overwrite=overwrite,
        )
        return FeatureWriter(target).pending() if has_work else None

    pending = on_main(prepare)
    if pending is None:
        logger.info("features of %s are complete in %s; nothing to do", dataset.split, target)
    return pending


def feature_shapes(model: nn.Module, dataset: ImageDataset, *, loading: Loading) -> dict[str, tuple[int, ...]]:
    """Shape of each feature without the batch axis, from the first image."""
    first = row_batches(dataset, [np.array([0])])
    _, found = next(outputs(model, first, trunk_features, to_input=dataset.device_transform, loading=loading))
    return {name: tuple(array.shape[1:]) for name, array in found.items()}


def subject_of(dataset: ImageDataset, identity: Mapping[str, Any]) -> Subject:
    """What the feature files say about the data set."""
    replaced = dataset.views.label_names is not None
    return Subject(
        split=dataset.split,
        paths=dataset.paths,
        stamps=dataset.stamps,
        labels=stored_labels(dataset),
        root=dataset.root,
        name=dataset.name,
        fingerprint=dataset.fingerprint,
        class_names=None if replaced else dataset.class_names,
        identity=dict(identity),
    )


def stored_labels(dataset: ImageDataset) -> np.ndarray | None:
    """The labels that are written beside features; those that a transform makes are not of the images."""
    return None if dataset.views.label_names is not None else dataset.labels


def calibrate_batchnorm(
    model: nn.Module, dataset: ImageDataset, *, num_batches: int, batch: int, seed: int, loading: Loading
) -> int:
    """Set the statistics of BatchNorm layers to those of some seeded batches of the data; for random trunks.

    Plain averages over the batches, all computed on every process. Returns the number of layers.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    layers = [layer for layer in layers if layer.running_mean is not None]
    order = dataset.order(seed, 0)
    rows = [order[start:stop] for start, stop in spans(min(len(order), num_batches * batch), batch) if stop - start > 1]
    model.eval()

    def forward(batch: Batch) -> None:
        with torch.no_grad(), loading.arithmetic.autocast():
            moved = loading.arithmetic.to_device(image_part(batch), dataset.device_transform)
            model.trunk_features(moved["data"])  # type: ignore[operator]

    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain average
            layer.train()
        for _ in each(forward, loading.batches(dataset, rows), threads=1):
            pass
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.eval()
    return len(layers)
