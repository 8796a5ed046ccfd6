"""Engine `evaluate`: how good the features of one model are, by nearest neighbours and by probes; exact at any world size."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vissl_like.analysis import extraction
from vissl_like.analysis.evaluators import (
    QUERY_ROWS,
    Labelled,
    Score,
    knn_ranking,
    linear_probe,
    low_shot,
    refuse_one_class,
    refuse_too_few,
    score_ranking,
)
from vissl_like.analysis.features import FeatureStore, read_manifest
from vissl_like.analysis.rows import MappedRows, Rows, share, unit
from vissl_like.config.plan import usable_cores
from vissl_like.config.schema import Config, Job
from vissl_like.core import distributed, rng
from vissl_like.core.on_main import apart, on_main
from vissl_like.data.dataset import is_used
from vissl_like.data.images import ImageDataset
from vissl_like.engines.extract_features import extract_splits, loading_of
from vissl_like.errors import ConfigError, DataError
from vissl_like.registry import suggest

log = logging.getLogger(__name__)


def run(job: Job, run_dir: Path) -> dict[str, Any]:
    """Extract TRAIN, VAL and TEST, then measure every protocol on every layer. Called on every rank."""
    config = job.config
    rng.set_determinism(config.MACHINE.DETERMINISTIC)
    given = config.EVALUATE.FEATURES_PATH
    folder = Path(given).expanduser() if given else run_dir / "features"
    results = {} if given else _extract(config, run_dir, folder)
    stores = check_features(config, folder)
    for protocol in dict.fromkeys(config.EVALUATE.PROTOCOLS):
        measured = MEASURES[protocol](config, stores)
        results.update(measured)
        if distributed.is_main():
            log.info(
                "%s: %s", protocol, "  ".join(f"{key}={value:.2f}" for key, value in measured.items() if "top" in key)
            )
    if not given and not config.EVALUATE.KEEP_FEATURES:
        on_main(lambda: shutil.rmtree(folder))
    return results


def _extract(config: Config, run_dir: Path, folder: Path) -> dict[str, Any]:
    for split in ("TRAIN", "TEST"):
        if not is_used(config.DATA, split):
            raise ConfigError(
                f"config.DATA.{split}.DATA_SOURCES is empty: evaluate learns from TRAIN and measures on TEST. "
                "Set it, or evaluate extracted features by config.EVALUATE.FEATURES_PATH."
            )
    splits = [split for split in ("TRAIN", "VAL", "TEST") if is_used(config.DATA, split)]
    calibrate = config.EVALUATE.CALIBRATE_BN_BATCHES
    return extract_splits(
        config, run_dir, folder, splits=splits, calibrate=calibrate, check=partial(check_labels, config)
    )


def check_labels(config: Config, dataset: ImageDataset) -> None:
    """Labels that every protocol can use, before hours of extraction."""
    _refuse_labels(config, extraction.stored_labels(dataset), dataset.split, place=dataset.root or dataset.name)


def _refuse_labels(config: Config, labels: np.ndarray | None, split: str, *, place: str) -> None:
    """Raise DataError unless there is one class per image and, to learn from, as many as the protocols need."""
    known = _labels_to_compare(labels, split, place=place)
    if split == "TRAIN":
        known, protocols = known[known >= 0], config.EVALUATE.PROTOCOLS
        if {"linear", "low_shot"} & set(protocols):
            refuse_one_class(known, place=place)
        for samples in config.LOW_SHOT.SAMPLES_PER_CLASS if "low_shot" in protocols else []:
            refuse_too_few(known, samples)


Stores = dict[str, dict[str, FeatureStore]]


def open_stores(folder: Path) -> Stores:
    """{layer: {split: features}} of TRAIN, TEST and, where it is there, VAL; all of one model, all with labels."""
    key = "EVALUATE.FEATURES_PATH"
    manifests = {split: read_manifest(folder, split, key=key) for split in ("TRAIN", "TEST")}
    if (folder / "VAL" / "manifest.json").is_file():
        manifests["VAL"] = read_manifest(folder, "VAL", key=key)
    weights = {split: manifest["identity"].get("weights") for split, manifest in manifests.items()}
    if len(set(weights.values())) > 1:
        raise DataError(
            f"{folder}: the splits were extracted with different weights ({weights}). Extract all with one model."
        )
    layers = list(manifests["TRAIN"]["layers"])
    return {layer: {split: FeatureStore.open(folder, split, layer) for split in manifests} for layer in layers}


def check_features(config: Config, folder: Path) -> Stores:
    """The features of all layers. Raises what would stop a measurement, before the first one; reads labels and headers."""
    stores = open_stores(folder)
    sections = {
        "knn": ("NEAREST_NEIGHBOR", config.NEAREST_NEIGHBOR.LAYERS),
        "linear": ("LINEAR_PROBE", config.LINEAR_PROBE.LAYERS),
        "low_shot": ("LOW_SHOT", config.LOW_SHOT.LAYERS),
    }
    for protocol in config.EVALUATE.PROTOCOLS:
        key, layers = sections[protocol]
        chosen_layers(stores, layers, key=key)
    for split, store in next(iter(stores.values())).items():
        _refuse_labels(config, store.labels, split, place=str(store.folder))
    return stores


def labelled(store: FeatureStore) -> Labelled:
    """Features with one class per image."""
    labels = _labels_to_compare(store.labels, store.manifest["split"], place=str(store.folder))
    return Labelled(store, labels)


def _labels_to_compare(labels: np.ndarray | None, split: str, *, place: str) -> np.ndarray:
    """The labels (n,) of a split; DataError if there are none, or several per image."""
    if labels is None or not (labels >= 0).any():
        raise DataError(
            f"{place}: the images of {split} have no labels, but evaluation compares with them. "
            f"Give config.DATA.{split}.LABEL_SOURCES or LABEL_PATHS and extract again."
        )
    if labels.ndim != 1:
        raise DataError(
            f"{place}: {split} has several labels per image; kNN and probes here take one. "
            "Use the train engine with heads on a frozen trunk and METERS.NAMES=[mean_ap_list_meter]."
        )
    return labels


def chosen_layers(stores: Stores, layers: list[str], *, key: str) -> list[str]:
    """The layers of an option, all if it is empty."""
    for layer in layers:
        if layer not in stores:
            known = list(stores)
            raise ConfigError(
                f"config.{key}.LAYERS={layer!r}: not extracted{suggest(layer, known) or '.'} There are: {', '.join(known)}."
            )
    return layers or list(stores)


def _suffix(layer: str, layers: list[str]) -> str:
    return "" if len(layers) == 1 else f"_{layer}"


def _named(name: str, scores: Iterable[Score], suffix: str) -> dict[str, Any]:
    """Flat results of one measurement, the mean over several draws: name_top1, name_top5, and the counts behind them."""
    scores = list(scores)
    table = [score.accuracies() for score in scores]
    means = {f"{name}_{what}{suffix}": float(np.mean([row[what] for row in table])) for what in table[0]}
    counts = {
        f"{name}_correct{suffix}": sum(s.top1 for s in scores),
        f"{name}_total{suffix}": sum(s.total for s in scores),
    }
    chosen = {f"{name}_c{suffix}": scores[0].c} if len(scores) == 1 and scores[0].c is not None else {}
    return {**means, **counts, **chosen}


def measure_knn(config: Config, stores: Stores) -> dict[str, Any]:
    """Weighted nearest neighbours: each rank classifies whole blocks of the test images, and the hits are added up."""
    options, loading, world = config.NEAREST_NEIGHBOR, loading_of(config), distributed.current()
    layers = chosen_layers(stores, options.LAYERS, key="NEAREST_NEIGHBOR")
    results: dict[str, Any] = {}
    for layer in layers:
        bank, queries = labelled(stores[layer]["TRAIN"]).known(), labelled(stores[layer]["TEST"])
        for k in options.TOPK:
            if k > len(bank.labels) and distributed.is_main():
                log.warning("config.NEAREST_NEIGHBOR.TOPK: %d neighbours, but TRAIN has %d images", k, len(bank.labels))
        first, last = share(-(-len(queries.labels) // QUERY_ROWS), rank=world.rank, size=world.size)
        part = (first * QUERY_ROWS, min(last * QUERY_ROWS, len(queries.labels)))
        with apart():
            rankings = knn_ranking(
                _comparable(bank.rows, options.L2_NORM_FEATS),
                bank.labels,
                _comparable(queries.rows, options.L2_NORM_FEATS),
                topk=options.TOPK,
                sigma=options.SIGMA,
                num_classes=int(max(bank.labels.max(), queries.labels.max())) + 1,
                part=part,
                device=world.device,
                threads=loading.threads,
            )
        for k, ranking in rankings.items():
            name = "knn" if len(options.TOPK) == 1 else f"knn_{k}"
            score = _summed(score_ranking(ranking, queries.labels[slice(*part)]))
            results |= _named(name, [score], _suffix(layer, layers))
    return results


def _comparable(rows: Rows, normalised: bool) -> Rows:
    return MappedRows(rows, unit) if normalised else rows


def _summed(score: Score) -> Score:
    """The counts of all ranks together."""
    counts = torch.tensor([score.top1, score.top5 or 0, score.total])
    top1, top5, total = distributed.all_reduce_sum(counts).tolist()
    return Score(top1, None if score.top5 is None else top5, total)


def measure_linear(config: Config, stores: Stores) -> dict[str, Any]:
    """Logistic regression on all training labels; on the main rank, which may use all cores while the others wait."""
    options = config.LINEAR_PROBE
    layers = chosen_layers(stores, options.LAYERS, key="LINEAR_PROBE")

    def probe(layer: str) -> Score:
        splits = {split: labelled(store) for split, store in stores[layer].items()}
        return linear_probe(
            splits["TRAIN"],
            splits["TEST"],
            val=splits.get("VAL"),
            c_values=options.C,
            standardize=options.STANDARDIZE,
            max_iter=options.MAX_ITER,
            seed=config.SEED_VALUE,
            threads=config.MACHINE.NUM_THREADS or usable_cores(),
        )

    scores = on_main(lambda: {layer: probe(layer) for layer in layers})
    return {
        key: value
        for layer in layers
        for key, value in _named("linear", [scores[layer]], _suffix(layer, layers)).items()
    }


def measure_low_shot(config: Config, stores: Stores) -> dict[str, Any]:
    """Logistic regression on a few labels per class, the mean over several draws; on the main rank."""
    options = config.LOW_SHOT
    layers = chosen_layers(stores, options.LAYERS, key="LOW_SHOT")

    def draws(layer: str, samples: int) -> list[Score]:
        return low_shot(
            labelled(stores[layer]["TRAIN"]),
            labelled(stores[layer]["TEST"]),
            samples_per_class=samples,
            num_draws=options.NUM_DRAWS,
            c=options.C,
            seed=options.SEED,
            max_iter=config.LINEAR_PROBE.MAX_ITER,
            threads=config.MACHINE.NUM_THREADS or usable_cores(),
        )

    found = on_main(lambda: {(layer, n): draws(layer, n) for layer in layers for n in options.SAMPLES_PER_CLASS})
    results: dict[str, Any] = {}
    for (layer, samples), scores in found.items():
        results |= _named(f"low_shot_{samples}", scores, _suffix(layer, layers))
    return results


MEASURES = {"knn": measure_knn, "linear": measure_linear, "low_shot": measure_low_shot}
