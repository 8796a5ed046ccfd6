"""What a classifier owes to backgrounds: ImageNet-9, its gap, and the backgrounds challenge (arXiv 2006.09994).

A prediction is the class of the largest logit, mapped to one of nine classes. Counts are whole numbers and each image has
the same batch on any number of processes, so results are exact. C classes of the model.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vissl_like.analysis.extraction import Batch, Call, Loading, outputs
from vissl_like.analysis.rows import share, spans
from vissl_like.config.schema import Config
from vissl_like.core import distributed
from vissl_like.core.on_main import apart
from vissl_like.data.dataset import is_used
from vissl_like.data.imagenet9 import NUM_CLASSES, ImageNet9Source, read_class_map
from vissl_like.data.images import ImageDataset
from vissl_like.data.labels import Labels
from vissl_like.data.loader import close_workers
from vissl_like.data.source import Source, SubsetSource
from vissl_like.data.views import build_views
from vissl_like.errors import ConfigError, DataError

log = logging.getLogger(__name__)
_class_map = functools.lru_cache(maxsize=1)(read_class_map)

KEY = "config.EVALUATE_PARTS.BACKGROUNDS"
SAME, RANDOM = "mixed_same", "mixed_rand"


@dataclass(frozen=True)
class _Object:
    """An image (C, H, W) as the loader gives it, the pixels of its object bool (H, W), and its class among nine."""

    image: Tensor
    mask: Tensor
    label: int

    def on(self, grounds: Tensor) -> Batch:
        """The object on each of these images (B, C, H, W)."""
        if grounds.shape[1:] != self.image.shape:
            raise ConfigError(
                f"config.DATA.TEST.TRANSFORMS: makes images of {tuple(self.image.shape[1:])} and "
                f"{tuple(grounds.shape[2:])} pixels; the challenge needs one size. Add Resize and CenterCrop."
            )
        return {"data": torch.where(self.mask, self.image, grounds)}


@contextlib.contextmanager
def _closing(dataset: ImageDataset) -> Iterator[None]:
    """Its loader's processes end with the block; what could not be read is counted over all processes."""
    try:
        yield
        dataset.write_bad_images()
    finally:
        close_workers(dataset)


def stand_in(config: Config) -> ImageDataset:
    """TEST where none is given: the images of ImageNet-9, with the number of classes that the model must have.

    Those are the classes of the map of ImageNet's to the nine, or nine where there is no map or TRAIN says how many.
    """
    file = _map_file(config)
    has_map = bool(config.EVALUATE_PARTS.BACKGROUNDS.CLASS_MAP) or file.is_file()
    is_mapped = has_map and not is_used(config.DATA, "TRAIN")
    return _dataset(
        config, ImageNet9Source(_root(config)), num_classes=len(_class_map(file)) if is_mapped else NUM_CLASSES
    )


def refuse_missing_folders(config: Config) -> None:
    """Raises ConfigError or DataError unless the folders are there that the protocols read."""
    asked, options = config.EVALUATE_PARTS.PROTOCOLS, config.EVALUATE_PARTS.BACKGROUNDS
    variants = [*(options.VARIANTS if "in9" in asked else ())]
    variants += ["original", options.ONLY_BACKGROUNDS] if "background_challenge" in asked else []
    for variant in variants:
        folder = _root(config) / variant / "val"
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; {KEY}.PATH is the folder of ImageNet-9.")


@dataclass(frozen=True)
class Backgrounds:
    """A model and the folder of ImageNet-9, seen through the transforms of TEST.

    `call`: (model, images) -> {suffix of a classifier: logits (B, C)}, "" for the one that counts.
    """

    model: nn.Module
    call: Call
    config: Config
    loading: Loading

    # ------------------------------------------------------------------------------------------------------- accuracy
    def accuracies(self) -> dict[str, float]:
        """{in9_<variant>: percent} and bg_gap = mixed_same - mixed_rand, for each classifier. A collective call."""
        found: dict[str, float] = {}
        for variant in self.config.EVALUATE_PARTS.BACKGROUNDS.VARIANTS:
            for suffix, value in self._accuracy(variant).items():
                found[f"in9_{variant}{suffix}"] = value
        for suffix in [name.removeprefix(f"in9_{SAME}") for name in found if name.startswith(f"in9_{SAME}")]:
            if f"in9_{RANDOM}{suffix}" in found:
                found[f"bg_gap{suffix}"] = found[f"in9_{SAME}{suffix}"] - found[f"in9_{RANDOM}{suffix}"]
        return found

    def _accuracy(self, variant: str) -> dict[str, float]:
        dataset = _dataset(self.config, ImageNet9Source(_root(self.config), variant=variant))
        right: dict[str, int] = {}
        total = 0
        with _closing(dataset), apart():
            batches = self.loading.batches(dataset, self._own_blocks(len(dataset)))
            for read, logits in outputs(
                self.model, batches, self.call, to_input=dataset.device_transform, loading=self.loading
            ):
                valid, labels = read["valid"].numpy(), read["label"].numpy()
                total += int(valid.sum())
                for suffix, values in logits.items():
                    hits = (self._nine(values) == labels) & valid
                    right[suffix] = right.get(suffix, 0) + int(hits.sum())
        parts = distributed.all_gather_object((right, total))
        images = sum(count for _, count in parts)
        names = sorted({suffix for counts, _ in parts for suffix in counts})
        return {name: 100 * sum(counts.get(name, 0) for counts, _ in parts) / images for name in names}

    # ------------------------------------------------------------------------------------------------------ challenge
    def challenge(self) -> dict[str, float]:
        """{background_challenge: percent, and of each class}: images whose object is recognised on every background.

        The object of each image with a mask is put on each image of ONLY_BACKGROUNDS, until one of them makes the
        prediction wrong. A collective call.
        """
        root = _root(self.config)
        whole = ImageNet9Source(root)
        rows = whole.rows_with_masks()
        objects = _dataset(self.config, SubsetSource(whole, rows), with_masks=True)
        if len(rows) < len(whole) and distributed.is_main():
            log.info("%d of %d images of ImageNet-9 have a mask and take part", len(rows), len(whole))
        grounds = _dataset(
            self.config, ImageNet9Source(root, variant=self.config.EVALUATE_PARTS.BACKGROUNDS.ONLY_BACKGROUNDS)
        )
        with _closing(objects), _closing(grounds), apart():
            mine = self._objects(objects)
            standing = self._standing(mine, grounds)
        counts = torch.zeros(NUM_CLASSES, 2, dtype=torch.int64)  # all, unharmed
        for position, one in enumerate(mine):
            counts[one.label] += torch.tensor([1, position in standing])
        counts = distributed.all_reduce_sum(counts)
        every, unharmed = counts.sum(dim=0).tolist()
        found = {"background_challenge": 100 * unharmed / every if every else float("nan")}
        for name, (of_class, kept) in zip(whole.class_names or [], counts.tolist()):
            if of_class:
                found[f"background_challenge_of_{name.replace(' ', '_')}"] = 100 * kept / of_class
        return found

    def _objects(self, dataset: ImageDataset) -> list[_Object]:
        """This rank's images with masks, as the loader gives them."""
        return [
            _Object(batch["data"][i].clone(), batch["mask"][i].clone(), int(batch["label"][i]))
            for batch in self.loading.batches(dataset, self._own_blocks(len(dataset)))
            for i in range(len(batch["label"]))
            if batch["valid"][i]
        ]

    def _standing(self, objects: list[_Object], dataset: ImageDataset) -> set[int]:
        """Positions of the objects that no background makes the model mistake."""
        standing = list(range(len(objects)))
        for read in self.loading.batches(dataset, self._blocks(len(dataset))):
            shown = read["data"][read["valid"]]
            if not standing or not len(shown):
                continue
            pasted = (objects[position].on(shown) for position in standing)
            found = outputs(self.model, pasted, self.call, to_input=dataset.device_transform, loading=self.loading)
            standing = [
                position
                for position, (_, logits) in zip(standing, found)
                if (self._nine(logits[""]) == objects[position].label).all()
            ]
        return set(standing)

    def _nine(self, logits: np.ndarray) -> np.ndarray:
        """Logits (B, C) -> one of the nine classes each, -1 for none, int64 (B,)."""
        best = logits.argmax(axis=1)
        if logits.shape[1] == NUM_CLASSES:
            return best
        file = _map_file(self.config)
        class_map = _class_map(file)
        if len(class_map) != logits.shape[1]:
            raise ConfigError(
                f"{file}: maps {len(class_map)} classes, but the model has {logits.shape[1]}. Give TEST (or TRAIN) the data"
                f" set that the model was trained on, or another file as {KEY}.CLASS_MAP."
            )
        return class_map[best]

    def _own_blocks(self, count: int) -> list[np.ndarray]:
        """Those of this rank."""
        world, blocks = distributed.current(), self._blocks(count)
        first, last = share(len(blocks), rank=world.rank, size=world.size)
        return blocks[first:last]

    def _blocks(self, count: int) -> list[np.ndarray]:
        return [np.arange(*span) for span in spans(count, self.config.DATA.TEST.BATCHSIZE_PER_REPLICA)]


# --------------------------------------------------------------------------------------------------------- the folder
def _root(config: Config) -> Path:
    path = config.EVALUATE_PARTS.BACKGROUNDS.PATH
    if not path:
        raise ConfigError(f"{KEY}.PATH is not given: set it to the folder of ImageNet-9 (original/, fg_mask/, ...).")
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"{KEY}.PATH={path!r}: no such folder.")
    return folder


def _map_file(config: Config) -> Path:
    """Which of the nine each class of ImageNet is."""
    return Path(config.EVALUATE_PARTS.BACKGROUNDS.CLASS_MAP or _root(config) / "in_to_in9.json").expanduser()


def _dataset(
    config: Config, source: Source, *, num_classes: int = NUM_CLASSES, with_masks: bool = False
) -> ImageDataset:
    """Images of ImageNet-9 through the transforms of TEST."""
    views = build_views(
        config.DATA.TEST.TRANSFORMS,
        key="config.DATA.TEST.TRANSFORMS",
        input_type=config.MODEL.INPUT_TYPE,
        with_masks=with_masks,
    )
    assert source.labels is not None
    return ImageDataset(
        source,
        views=views,
        labels=Labels(source.labels, num_classes, source.class_names),
        split="TEST",
        name=source.name,
        seed=config.SEED_VALUE,
        max_bad_fraction=config.DATA.MAX_BAD_FRACTION,
    )
