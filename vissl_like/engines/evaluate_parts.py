"""Engine `evaluate_parts`: what the parts of a trained model are worth, exactly at any number of processes.

TEST is measured; the keypoint regression and the thresholds learn from TRAIN, seen through TEST's transforms.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vissl_like.analysis import part_evaluation, part_speed
from vissl_like.analysis.backgrounds import Backgrounds, refuse_missing_folders, stand_in
from vissl_like.analysis.extraction import Batch, Loading, outputs
from vissl_like.analysis.part_evaluation import PROTOCOLS, Measured, framing_of
from vissl_like.analysis.part_metrics import LogitHistogram
from vissl_like.analysis.rows import share, spans
from vissl_like.config.plan import make_plan
from vissl_like.config.schema import Config, Job
from vissl_like.core import distributed, rng
from vissl_like.core.evaluation import evaluate
from vissl_like.core.on_main import apart, on_main
from vissl_like.data.annotated import has_annotation, refuse_missing_annotations
from vissl_like.data.dataset import build_dataset, is_used
from vissl_like.data.images import ImageDataset
from vissl_like.data.mask_rules import MODELS_WITH_MASKS
from vissl_like.engines import feeds, train
from vissl_like.engines.feeds import Splits
from vissl_like.errors import ConfigError
from vissl_like.files import write_json
from vissl_like.models.masked_vit import Decoupled
from vissl_like.models.parts import StageOne
from vissl_like.models.two_stage import TwoStage, leave_one_out
from vissl_like.outputs.part_figures import Drawing
from vissl_like.tasks.parts import SUFFIXES, predicted

log = logging.getLogger(__name__)

THRESHOLDS_FOLDER = "thresholds"
HISTOGRAMS_FILE = "histograms.json"
#: Bins of a part in that file, and how finely the logits are counted that no threshold follows from.
_FIGURE_BINS, _COARSE_BITS = 50, 16
SPEED_FILE = "speed.json"
BACKGROUND_PROTOCOLS = {"in9", "background_challenge"}


def run(job: Job, run_dir: Path) -> dict[str, Any]:
    """Measure every protocol of EVALUATE_PARTS. Called on every rank."""
    config = job.config
    rng.set_determinism(config.MACHINE.DETERMINISTIC)
    splits = open_splits(config, run_dir)
    try:
        return _Evaluation(config, splits, run_dir).run()
    finally:
        splits.close()


def open_splits(config: Config, run_dir: Path) -> Splits:
    """TEST, and TRAIN through TEST's transforms if a protocol learns from it.

    Backgrounds alone need no TEST: ImageNet-9 has its own folder.
    """
    wanted = set(config.EVALUATE_PARTS.PROTOCOLS)
    has_own = wanted <= BACKGROUND_PROTOCOLS and not is_used(config.DATA, "TEST")
    for split in ("TEST", "TRAIN") if wanted & {"regression", "thresholds"} else ("TEST",):
        if not is_used(config.DATA, split) and not has_own:
            raise ConfigError(
                f"config.DATA.{split}.DATA_SOURCES=[]: evaluate_parts needs images here, for example [cub] with DATA_PATHS."
            )
    seen = config.DATA.TRAIN.model_copy(update={"TRANSFORMS": config.DATA.TEST.TRANSFORMS})
    data = config.DATA.model_copy(update={"TRAIN": seen})
    build = partial(
        build_dataset,
        data,
        seed=config.SEED_VALUE,
        input_type=config.MODEL.INPUT_TYPE,
        run_dir=run_dir,
        train=True,
        with_masks=config.MODEL.NAME in MODELS_WITH_MASKS,
    )
    train_set = build("TRAIN") if is_used(data, "TRAIN") else None
    return Splits(train=train_set, test=stand_in(config) if has_own else build("TEST"))


def all_logits(model: Any, images: Tensor) -> dict[str, Tensor]:
    """{suffix of a classifier: logits (B, C)}."""
    return dict(zip(SUFFIXES, predicted(model(images)).logits))


class _Evaluation:
    """A model, its images, and what is asked of them."""

    def __init__(self, config: Config, splits: Splits, run_dir: Path) -> None:
        assert splits.test is not None
        self.config, self.splits, self.run_dir = config, splits, run_dir
        self.options, self.test = config.EVALUATE_PARTS, splits.test
        self.drawing, self.is_drawn = Drawing.of(config, run_dir), False
        world = distributed.current()
        device = "gpu" if world.device.type == "cuda" else "cpu"
        self.plan = make_plan(
            config, num_processes=world.size, device=device, num_train=None, engine_name="evaluate_parts"
        )
        arithmetic = train.arithmetic(config, self.plan)
        self.loading = Loading(
            **feeds.loading(config, self.plan), threads=torch.get_num_threads(), arithmetic=arithmetic
        )
        self.annotated = [name for name in self.options.PROTOCOLS if name in PROTOCOLS]
        key = "config.DATA.TEST.TRANSFORMS"
        self.framing = framing_of(config.DATA.TEST.TRANSFORMS, key=key) if self.annotated else None
        for name in self.annotated:
            for split in (splits.test, splits.train if name == "regression" else None):
                if split is not None:
                    key = f"config.DATA.{split.split}.DATA_SOURCES"
                    refuse_missing_annotations(split.source, PROTOCOLS[name], key=key, protocol=name)
        self.model = train.make_model(config, splits)
        self._refuse_what_cannot_be()
        train.start_weights(self.model, config, run_dir)
        train.warn_of_random_weights(config, self.model)

    def _refuse_what_cannot_be(self) -> None:
        """Raise ConfigError for protocols that do not go with the model, before anything is measured."""
        others = BACKGROUND_PROTOCOLS & set(self.options.PROTOCOLS)
        if others and isinstance(self.model, Decoupled):
            raise ConfigError(
                f"config.EVALUATE_PARTS.PROTOCOLS: {min(others)} has no masks for config.MODEL.NAME='decoupled'. Leave it "
                "out, or use another model."
            )
        of_maps = [name for name in self.options.PROTOCOLS if name in PROTOCOLS or name == "thresholds"]
        if of_maps and not isinstance(self.model, StageOne | TwoStage):
            raise ConfigError(
                f"config.MODEL.NAME={self.config.MODEL.NAME!r}: has no part maps, which {of_maps[0]} of "
                "config.EVALUATE_PARTS.PROTOCOLS needs. Leave it out, or use parts or two_stage."
            )
        if "leave_one_out" in self.options.PROTOCOLS:
            if not isinstance(self.model, TwoStage):
                raise ConfigError(
                    "config.EVALUATE_PARTS.PROTOCOLS: leave_one_out takes parts out of the mask of stage 2; "
                    f"config.MODEL.NAME={self.config.MODEL.NAME!r} has none. Use two_stage."
                )
            leave_one_out(self.config.MODEL.PARTS.NUM_PARTS, fixed=self.options.FIXED_PARTS)
        if others:
            refuse_missing_folders(self.config)

    def run(self) -> dict[str, Any]:
        results: dict[str, Any] = {}
        if "classification" in self.options.PROTOCOLS:
            results |= self.classification("test")
        if self.annotated:
            results |= self.annotations("", lambda dataset: self.found(dataset))
            results |= self.floor_and_oracle() if self.options.BASELINES else {}
        if "leave_one_out" in self.options.PROTOCOLS:
            results |= self.interventions()
        if "thresholds" in self.options.PROTOCOLS:
            self.thresholds()
        results |= self.other_backgrounds()
        if "speed" in self.options.PROTOCOLS:
            results |= self.speed()
        self.test.write_bad_images()
        if distributed.is_main():
            log.info("%s", "  ".join(f"{name}={value:.2f}" for name, value in results.items()))
        return results

    def classification(self, prefix: str) -> dict[str, float]:
        """Accuracies of both stages on TEST."""
        found = evaluate(
            train.make_task(self.config, self.model, self.splits, drawing=self.drawing),  # type: ignore[arg-type]
            feeds.test_feed(self.config, self.test, self.plan)(),
            to_input=self.test.device_transform,
            arithmetic=self.loading.arithmetic,
            seed=self.config.SEED_VALUE,
            prefix=prefix,
            epoch=None if self.annotated or prefix != "test" else 0,  # annotated protocols draw the same maps
        )
        return found or {}

    # ---------------------------------------------------------------------------------------------------- annotations
    def blocks(self, dataset: ImageDataset) -> list[np.ndarray]:
        """The rows of this rank, in batches that do not depend on the number of ranks."""
        world = distributed.current()
        every = spans(len(dataset), self.config.DATA.TEST.BATCHSIZE_PER_REPLICA)
        start, stop = share(len(every), rank=world.rank, size=world.size)
        return [np.arange(*span) for span in every[start:stop]]

    def maps(self, dataset: ImageDataset) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """(rows, maps, inner products) of this rank's batches."""
        blocks = self.blocks(dataset)
        for rows, (read, found) in zip(blocks, self.outputs(dataset, blocks)):
            maps = torch.from_numpy(found["maps"])
            if dataset is self.test and not self.is_drawn:
                self.drawing.draw(read["data"], maps, rows=rows.tolist(), epoch=0)
            yield rows, maps, torch.from_numpy(found["part_dot"])
        self.is_drawn = self.is_drawn or dataset is self.test

    def outputs(self, dataset: ImageDataset, blocks: list[np.ndarray]) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """The batches of these blocks with what stage 1 says of them."""

        def call(model: Any, images: Tensor) -> dict[str, Tensor]:
            found = model.stage_one(images)
            return {"maps": found.maps, "part_dot": found.part_dot}

        batches = self.loading.batches(dataset, blocks)
        return outputs(self.model, batches, call, to_input=dataset.device_transform, loading=self.loading)

    def found(self, dataset: ImageDataset) -> Iterator[tuple[np.ndarray, Tensor]]:
        return ((rows, maps) for rows, maps, _ in self.maps(dataset))

    def annotations(self, prefix: str, make: Any) -> dict[str, float]:
        """The annotated protocols for the maps that `make` gives for a split."""
        fit: Measured | None = None
        if "regression" in self.annotated and self.splits.train is not None:
            fit = self.measured(make, self.splits.train, ["regression"])
        values = part_evaluation.values(self.measured(make, self.test, self.annotated), fit=fit)
        return {f"{prefix}{name}": value for name, value in values.items()}

    def measured(self, make: Any, dataset: ImageDataset, protocols: Sequence[str]) -> Measured:
        assert self.framing is not None
        with apart():
            found = part_evaluation.measure(make(dataset), dataset, framing=self.framing, protocols=protocols)
        return found.join()

    def floor_and_oracle(self) -> dict[str, float]:
        """What random maps and the annotated parts get."""
        [(_, first)] = self.outputs(self.test, [np.array([0])])  # a process may have no images of its own
        grid = first["maps"].shape[2:]
        parts, seed = self.config.MODEL.PARTS.NUM_PARTS, self.config.SEED_VALUE
        framing = self.framing
        assert framing is not None

        def random(dataset: ImageDataset) -> Any:
            return part_evaluation.random_maps(self.blocks(dataset), num_parts=parts, grid=grid, seed=seed)

        results = self.annotations("random_", random)
        if has_annotation(self.test.source, "part_masks"):
            results |= self.annotations(
                "oracle_",
                lambda dataset: part_evaluation.annotated_maps(self.blocks(dataset), dataset, framing=framing),
            )
        return results

    # -------------------------------------------------------------------------------------------------- interventions
    def interventions(self) -> dict[str, float]:
        """Accuracy of stage 2 without each part, beside FIXED_PARTS."""
        model: Any = self.model
        before: Any = model.options
        results: dict[str, float] = {}
        for removed in leave_one_out(before.NUM_PARTS, fixed=self.options.FIXED_PARTS):
            model.options = before.model_copy(update={"REMOVE_PARTS": list(removed)})
            results |= self.classification("without_" + "_".join(str(part) for part in removed))
        model.options = before
        return results

    # ------------------------------------------------------------------------------------------- backgrounds and speed
    def other_backgrounds(self) -> dict[str, float]:
        """Accuracies on ImageNet-9, and the backgrounds challenge."""
        results: dict[str, float] = {}
        known = Backgrounds(self.model, all_logits, self.config, self.loading)
        if "in9" in self.options.PROTOCOLS:
            results |= known.accuracies()
        if "background_challenge" in self.options.PROTOCOLS:
            results |= known.challenge()
        return results

    def speed(self) -> dict[str, float]:
        """Write RUN.DIR/speed.json: images per second of the main process, which has the machine to itself."""
        rows = spans(len(self.test), self.config.DATA.TEST.BATCHSIZE_PER_REPLICA)[0]

        def work() -> dict[str, float]:
            read = next(iter(self.loading.batches(self.test, [np.arange(*rows)])))
            batch = self.loading.arithmetic.to_device(read, self.test.device_transform)
            found = part_speed.measure(
                self.model,
                batch["data"],
                batch.get("mask"),
                options=self.options.SPEED,
                arithmetic=self.loading.arithmetic,
            )
            write_json(self.run_dir / SPEED_FILE, {"batch": len(batch["data"]), "rows": found})
            return part_speed.flat(found)

        return on_main(work)

    def thresholds(self) -> None:
        """Write RUN.DIR/thresholds/<kept share>.json: the logit below which a share of each part's tokens lies.

        And histograms.json: the logits of each part for its own tokens and for all others.
        """
        assert self.splits.train is not None
        num_parts = self.config.MODEL.PARTS.NUM_PARTS
        own, others = LogitHistogram(num_parts), LogitHistogram(num_parts, bits=_COARSE_BITS)
        with apart():
            for _, maps, part_dot in self.maps(self.splits.train):
                own.add(part_dot, maps)
                others.add(part_dot, maps, own=False)
        for histogram in (own, others):
            histogram.counts = distributed.all_reduce_sum(torch.from_numpy(histogram.counts)).numpy()
        on_main(
            lambda: write_thresholds(self.run_dir / THRESHOLDS_FOLDER, own, others, quantiles=self.options.QUANTILES)
        )


def write_thresholds(folder: Path, own: LogitHistogram, others: LogitHistogram, *, quantiles: Sequence[float]) -> None:
    """One file for each quantile of the parts' own logits, and the histograms of both."""
    folder.mkdir(exist_ok=True)
    parts = range(len(own.counts))
    lost = [str(part) for part in parts if not own.counts[part].any()]
    if lost:
        log.warning("parts %s own no token of TRAIN: their threshold lets everything pass", ", ".join(lost))
    for q in quantiles:
        write_json(folder / f"{1 - q:g}.json", {str(part): max(own.quantile(part, q), -1e30) for part in parts})
    table = {}
    for part in parts:
        spreads = [histogram.spread(part) for histogram in (own, others) if histogram.counts[part].any()]
        low, high = min((low for low, _ in spreads), default=0.0), max((high for _, high in spreads), default=0.0)
        edges = np.linspace(low, high if high > low else low + 1.0, _FIGURE_BINS + 1)
        counts = {"own": own.coarse(part, edges), "others": others.coarse(part, edges)}
        table[str(part)] = {"edges": edges.tolist(), **counts}
    write_json(folder / HISTOGRAMS_FILE, table)
