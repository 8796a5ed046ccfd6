"""One split as the rest of the program sees it: rows of images with labels, views and a fingerprint."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vissl_like.core import distributed, rng
from vissl_like.data import badimages
from vissl_like.data.annotated import annotation
from vissl_like.data.decode import Encoded, Unreadable
from vissl_like.data.geometry import Placement
from vissl_like.data.labels import Labels
from vissl_like.data.sharding import Sharding
from vissl_like.data.source import Source, encoded_row, fingerprint, sharding_of
from vissl_like.data.views import DeviceTransform, TransformFailed, Views
from vissl_like.errors import DataError
from vissl_like.files import write_json

_log = logging.getLogger(__name__)

_MAX_REPLACEMENTS = 64

# How many files wait in memory while the first is decoded.
_ROWS_AT_ONCE = 16

# Looked up when asked for and left behind when the dataset is sent to a worker process.
_NOT_FOR_WORKERS = ("paths", "stamps", "fingerprint", "sharding", "loaders", "bad")


class Sample(NamedTuple):
    """One row as a worker sees it.

    data (C, H, W), in memory also as (H, W, C); label int64 () or (K,), -1 without labels; the row that was read, another
    one if that was unreadable; bad rows met on the way; the random numbers (R,) that the device augments it with; the
    mask of its object, bool (H, W), where it is asked for.
    """

    data: torch.Tensor
    label: np.ndarray
    used: int
    bad: dict[int, str]
    draws: np.ndarray
    mask: torch.Tensor | None = None


#: labels int64 (B,) or (B, K) -> how much each row counts in the mean loss, float64 (B,).
RowWeights = Callable[[np.ndarray], np.ndarray]


class ImageDataset(torch.utils.data.Dataset):
    """Images of one split. What row r looks like in epoch e follows from (seed, e, r) alone.

    `labels` are the images' own, int64 (N,) or multi-hot (N, K), or None. `num_classes` and `class_names` speak of the
    labels in the samples, which a transform (ImgRotatePil) may have replaced. `bad` collects row -> reason of the
    images that could not be read; the loader fills it. `row_weights`: see weigh_rows().
    """

    def __init__(
        self,
        source: Source,
        *,
        views: Views,
        labels: Labels | None,
        split: str,
        name: str,
        seed: int,
        max_bad_fraction: float = 0.01,
        run_dir: Path | None = None,
    ) -> None:
        self.source, self.views, self.split, self.name, self.seed = source, views, split, name, seed
        self.labels = None if labels is None else labels.values
        self.num_classes, self.class_names = _classes_in_samples(labels, views)
        self._max_bad_fraction, self._run_dir = max_bad_fraction, run_dir
        self.bad: dict[int, str] = {}
        self._num_known_bad = 0
        self._seen_bad: dict[int, str] = {}
        self.loaders: dict[Any, Any] = {}
        self.row_weights: RowWeights | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.__dict__.items() if key not in _NOT_FOR_WORKERS}
        return {**kept, "loaders": {}, "bad": {}}

    def __len__(self) -> int:
        return len(self.source)

    # ------------------------------------------------------------------------------ what it is made of
    @functools.cached_property
    def paths(self) -> np.ndarray:
        """Identity of each row, unicode (N,): relative to `root`, or absolute, or a made-up name."""
        return self.source.paths

    @property
    def root(self) -> str:
        """Folder that `paths` are relative to, or ""."""
        return self.source.root

    @functools.cached_property
    def stamps(self) -> np.ndarray:
        """int64 (N,): file size in bytes or a checksum; changes when the image changes."""
        return self.source.stamps()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the ordered paths and stamps."""
        return fingerprint(self.paths, self.stamps)

    @functools.cached_property
    def sharding(self) -> Sharding | None:
        """How the rows lie in shards, or None."""
        return sharding_of(self.source)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of the rows in an epoch of training, int64 (N,): a function of seed and epoch."""
        return rng.permutation(seed, epoch, len(self)) if self.sharding is None else self.sharding.order(seed, epoch)

    def weigh_rows(self, row_weights: RowWeights) -> None:
        """Let batches carry `counts` float64 (B,), what their rows count in the mean loss, if not all count alike."""
        weights = self._weights_by(row_weights)
        self.row_weights = row_weights if weights is not None and np.ptp(weights) else None

    def counted_before(self, rows: np.ndarray) -> np.ndarray | None:
        """What the rows before each position of an order count, float64 (N + 1,); None if that is just their number."""
        weights = None if self.row_weights is None or self.views.label_names else self._weights_by(self.row_weights)
        return None if weights is None else np.concatenate([[0.0], np.cumsum(weights[rows])])

    def _weights_by(self, row_weights: RowWeights) -> np.ndarray | None:
        """Of every row; of every class where a transform makes the labels; None without labels."""
        labels = self.labels if self.views.label_names is None else np.arange(len(self.views.label_names))
        return None if labels is None or not len(labels) else row_weights(labels)

    @property
    def device_transform(self) -> DeviceTransform:
        """What is left to do on batches: uint8 or float (B, C, H, W) -> float32 (B, C, H, W)."""
        return self.views.device_transform

    def file(self, row: int) -> str | None:
        """Absolute file of a row, if it has one."""
        return self.source.file(row)

    def image(self, row: int) -> Image.Image:
        """The untransformed image as RGB, for montages. Raises DataError if it cannot be read."""
        try:
            return self.source.load(row)
        except Unreadable as reason:
            raise DataError(f"{self._where(row)}: {reason}. Mend or remove this image.") from reason

    def _where(self, row: int) -> str:
        return self.source.file(row) or self.source.path(row)

    # ----------------------------------------------------------------------------------------- samples
    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        """Row `item`, or (epoch, row): data (C, H, W), label int64 () or (K,), index, valid; draws (R,) and mask (H, W)
        if any.
        """
        epoch, row = item if isinstance(item, tuple) else (0, item)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        found = self.sample(epoch, row)
        self.record_bad(found.bad)
        sample = {
            "data": found.data,
            "label": torch.as_tensor(found.label),
            "index": row,
            "valid": found.used == row,
        }
        if found.mask is not None:
            sample["mask"] = found.mask
        return {**sample, "draws": torch.from_numpy(found.draws)} if len(found.draws) else sample

    def sample(self, epoch: int, row: int) -> Sample:
        """One row in one epoch. The row read differs from `row` if that one is unreadable; the label is that of the row
        read.
        """
        bad: dict[int, str] = {}
        candidate = row
        for attempt in range(1, _MAX_REPLACEMENTS + 1):
            reason = self._seen_bad.get(candidate)
            if reason is None:
                try:
                    return self._view(epoch, row, candidate, bad)
                except Unreadable as error:
                    reason = str(error)
            bad[candidate] = self._seen_bad[candidate] = reason
            candidate = rng.mix(self.seed, row, attempt) % len(self)
        raise DataError(
            f"config.DATA.{self.split}: {len(bad)} of {len(self)} images were tried, none can be read; the first is "
            f"{self._where(row)}: {bad[row]}. Mend or remove them."
        )

    @property
    def encoded_size(self) -> tuple[int, int] | None:
        """Height and width of every sample where samples() can write them all to one place; else None."""
        if not self.views.is_fused_whole or not hasattr(self.source, "read"):
            return None
        assert self.views.fused is not None
        return self.views.fused.size

    def samples(self, epoch: int, rows: Sequence[int] | np.ndarray, *, out: torch.Tensor | None = None) -> list[Sample]:
        """sample() of several rows. Faster where the transforms are one step: files are opened and numbers drawn first.

        Both are quick when they are done for some rows in a row, before pixels drive everything else out of the caches.
        `out` uint8 (B, *encoded_size, 3): where images may be written to; those that were have their data there.
        """
        found: list[Sample] = []
        slots = [None] * len(rows) if out is None else out
        with rng.preserved():
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                part = [int(row) for row in rows[start : start + _ROWS_AT_ONCE]]
                begun = [self._begin(epoch, row) for row in part]
                found += [self._finish(epoch, *one) for one in zip(part, begun, slots[start:])]
        return found

    def _begin(self, epoch: int, row: int) -> tuple[Encoded, Placement, np.ndarray] | None:
        """What _finish() needs: the file, its crop, its numbers for the device. None: left to sample()."""
        if not self.views.is_fused_whole or row in self._seen_bad:
            return None
        assert self.views.fused is not None
        try:
            data = encoded_row(self.source, row)
            if data is None:
                return None
            encoded = Encoded(data)
        except Unreadable:
            return None
        rng.seed_sample(self.seed, epoch, row, only_torch=True)  # nothing here draws from others
        width, height = encoded.size
        placement = self.views.fused.place(height, width)
        return None if placement is None else (encoded, placement, self.views.draw())

    def _finish(
        self, epoch: int, row: int, begun: tuple[Encoded, Placement, np.ndarray] | None, out: torch.Tensor | None
    ) -> Sample:
        if begun is not None:
            encoded, placement, draws = begun
            assert self.views.fused is not None
            try:
                data = self.views.fused.apply(encoded, placement, out=out)
                return Sample(data, self._label(row), row, {}, draws)
            except Unreadable:
                pass  # sample() meets it once more and finds a replacement
        return self.sample(epoch, row)

    def _label(self, row: int) -> np.ndarray:
        return np.asarray(-1 if self.labels is None else self.labels[row], dtype=np.int64)

    def _view(self, epoch: int, row: int, used: int, bad: dict[int, str]) -> Sample:
        """Row `used` in the view that is drawn for `row`. Raises Unreadable."""
        image = self._open(used)
        with rng.sample_scope(self.seed, epoch, row):
            try:
                data, given, mask = self._transformed(image, used)
            except TransformFailed as error:
                size = "x".join(str(side) for side in image.size)
                raise DataError(
                    f"{self._where(used)} ({size}): config.DATA.{self.split}.TRANSFORMS: {error}"
                ) from error
            draws = self.views.draw()
        label = self._label(used) if given is None else np.asarray(given, dtype=np.int64)
        return Sample(data, label, used, bad, draws, mask)

    def _transformed(
        self, image: Image.Image | Encoded, used: int
    ) -> tuple[torch.Tensor, int | None, torch.Tensor | None]:
        """Data, the label if a transform gives it, and the mask if it is asked for."""
        if not self.views.with_masks:
            return (*self.views(image), None)
        assert isinstance(image, Image.Image)
        mask = annotation(self.source, "mask", used)
        if mask.shape != (image.height, image.width):
            raise DataError(
                f"{self._where(used)}: the image has {image.width}x{image.height} pixels, its mask "
                f"{mask.shape[1]}x{mask.shape[0]}. A mask must fit its image pixel by pixel; see "
                f"config.DATA.{self.split}.MASK_SUB_PATH."
            )
        data, moved = self.views.together(image, mask)
        return data, None, moved

    def _open(self, row: int) -> Image.Image | Encoded:
        """The image of a row: not yet decoded where that can be done together with what comes next."""
        data = encoded_row(self.source, row) if self.views.fused is not None else None
        return self.source.load(row) if data is None else Encoded(data)

    # -------------------------------------------------------------------------------------- bad images
    def record_bad(self, bad: dict[int, str]) -> None:
        """Add unreadable rows to `bad`. Raises DataError once they are more than MAX_BAD_FRACTION of all."""
        new = {row: reason for row, reason in bad.items() if row not in self.bad}
        if not new:
            return
        self.bad.update(new)
        self._refuse_too_many(self.bad)

    def _refuse_too_many(self, bad: dict[int, str]) -> None:
        if len(bad) <= self._max_bad_fraction * len(self):
            return
        named = self._named(bad)
        file = badimages.add_to_list(self._run_dir, split=self.split, bad=named) if self._run_dir else None
        raise badimages.too_many(
            named, rows=len(self), max_fraction=self._max_bad_fraction, split=self.split, list_file=file
        )

    def _named(self, bad: dict[int, str]) -> dict[str, str]:
        return {self._where(row): reason for row, reason in sorted(bad.items())}

    def write_label_map(self, run_dir: Path) -> None:
        """Write RUN.DIR/<split>_label_to_index_map.json, {name of a class: its number}, if the classes have names."""
        if not distributed.is_main():
            return
        file = run_dir / f"{self.split.lower()}_label_to_index_map.json"
        if self.class_names:
            write_json(file, {name: number for number, name in enumerate(self.class_names)})
        else:
            file.unlink(missing_ok=True)

    def write_bad_images(self, run_dir: Path | None = None) -> Path | None:
        """Add what all ranks found to RUN.DIR/bad_images.txt; every rank must call it. None if nothing is listed there.

        Raises DataError if all ranks together found more than MAX_BAD_FRACTION.
        """
        folder = run_dir or self._run_dir
        found: dict[int, str] = {}
        for of_rank in distributed.all_gather_object(self.bad):
            found.update(of_rank)
        file = None
        if folder is not None and distributed.is_main():
            file = badimages.add_to_list(Path(folder), split=self.split, bad=self._named(found))
        self._refuse_too_many(found)
        if len(found) > self._num_known_bad and distributed.is_main():
            _log.warning(badimages.replaced(len(found), rows=len(self), split=self.split, list_file=file))
        self._num_known_bad = len(found)
        return file


def _classes_in_samples(labels: Labels | None, views: Views) -> tuple[int | None, list[str] | None]:
    if views.label_names is not None:
        return len(views.label_names), views.label_names
    return (None, None) if labels is None else (labels.num_classes, labels.class_names)
