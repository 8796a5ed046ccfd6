"""Engine `cluster_features`: k-means on extracted features; the cluster of each image becomes its pseudo-label."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vissl_like.analysis.blocks import ALONE, Shard
from vissl_like.analysis.cluster_metrics import agreement
from vissl_like.analysis.cluster_report import write_report_data
from vissl_like.analysis.features import FeatureStore
from vissl_like.analysis.kmeans import KMeansResult, kmeans, pick_backend
from vissl_like.analysis.nearest import assign_blocks
from vissl_like.analysis.npy_file import NpyFile
from vissl_like.analysis.pca import check_components, fit_pca, fit_standardiser
from vissl_like.analysis.rows import MappedRows, Rows, SelectedRows, normalise
from vissl_like.config.plan import usable_cores
from vissl_like.config.schema import Config, Job
from vissl_like.core import distributed, rng
from vissl_like.core.on_main import on_main
from vissl_like.data.dataset import is_used
from vissl_like.data.images import ImageDataset
from vissl_like.data.labels import write_label_files
from vissl_like.engines.extract_features import extract_splits, features_folder, loading_of, open_split
from vissl_like.errors import ConfigError, DataError
from vissl_like.files import write_json

log = logging.getLogger(__name__)

#: One step of preparation: a block (b, D) -> (b, D').
Step = Callable[[np.ndarray], np.ndarray]


#: First row, labels (b,) int64, squared distances (b,) float32.
LabelledRows = tuple[int, np.ndarray, np.ndarray]

_PCA_KEY = "CLUSTERFIT.FEATURES.DIMENSIONALITY_REDUCTION"
# Rows whose labels a process hands over at a time; more than a block has.
_ROUND_ROWS = 1 << 16


@dataclass(frozen=True)
class Assigned:
    """The clusters of one split, mapped from files: labels (n,) int64, squared distances (n,) float32."""

    split: str
    store: FeatureStore
    labels: np.ndarray
    distances: np.ndarray

    def results(self, *, prefix: str, k: int) -> dict[str, Any]:
        """Agreement with the data set's own classes, where it has some and one per image, and empty clusters."""
        classes = self.store.labels
        known = np.zeros(0) if classes is None or classes.ndim != 1 else classes[classes >= 0]
        has_classes = classes is not None and 1 < len(np.unique(known)) < len(known)
        found = agreement(classes, self.labels) if classes is not None and has_classes else {}
        counts = {} if prefix else {"empty_clusters": int((np.bincount(self.labels, minlength=k) == 0).sum())}
        return {**counts, **{prefix + key: value for key, value in found.items()}}


def run(job: Job, run_dir: Path) -> dict[str, Any]:
    """Cluster CLUSTERFIT.FEATURES.DATA_PARTITION, assign TEST_PARTITION to its centroids. Called on every rank."""
    config, options = job.config, job.config.CLUSTERFIT
    rng.set_determinism(config.MACHINE.DETERMINISTIC)
    output = output_folder(config, run_dir)
    pick_backend(options.CLUSTER_BACKEND)  # before hours of extraction
    results, folder = {}, features_to_read(config, run_dir)
    if options.FEATURES.EXTRACT:
        results = extract_splits(
            config, run_dir, folder, splits=_splits_to_extract(config), check=partial(check_rows, config)
        )
    stores = open_stores(config, folder)
    images = _images_of(config, stores, run_dir)
    main_split = options.FEATURES.DATA_PARTITION
    steps = on_main(lambda: fit_steps(config, stores[main_split]))
    rows = {split: prepared(store, steps) for split, store in stores.items()}
    found = cluster(config, rows[main_split], what=f"features of {main_split}")
    files = {split: assign_split(rows[split], found, output=output, split=split, config=config) for split in stores}

    def publish() -> dict[str, Any]:
        try:
            assigned = [
                Assigned(split, store, *(np.load(file, mmap_mode="r", allow_pickle=False) for file in files[split]))
                for split, store in stores.items()
            ]
            write_outputs(config, assigned, found, output=output, images=images, rows=rows[main_split])
            return _results(config, found, assigned)
        finally:
            for file in chain.from_iterable(files.values()):
                file.unlink(missing_ok=True)

    return results | on_main(publish)


def output_folder(config: Config, run_dir: Path) -> Path:
    """Where label files go; not the run folder itself, which has a manifest of its own."""
    given = config.CLUSTERFIT.OUTPUT_DIR
    output = Path(given).expanduser() if given else run_dir / "clusters"
    if output.resolve() == run_dir.resolve():
        raise ConfigError(
            f"config.CLUSTERFIT.OUTPUT_DIR={given!r}: is the run folder itself. Use a folder below it, or leave it empty."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"config.CLUSTERFIT.OUTPUT_DIR={str(output)!r}: cannot be made ({error}).") from error
    return output


def features_to_read(config: Config, run_dir: Path) -> Path:
    """The folder of the features that are clustered."""
    options = config.CLUSTERFIT.FEATURES
    if options.EXTRACT:
        if options.PATH:
            raise ConfigError(
                f"config.CLUSTERFIT.FEATURES.PATH={options.PATH!r}: is read only with EXTRACT=false. Features are extracted to "
                "config.EXTRACT_FEATURES.OUTPUT_DIR; set that instead, or EXTRACT=false."
            )
        return features_folder(config, run_dir)
    return Path(options.PATH).expanduser() if options.PATH else run_dir / "features"


def _splits_to_extract(config: Config) -> list[str]:
    """DATA_PARTITION, and TEST_PARTITION if it has data."""
    options = config.CLUSTERFIT.FEATURES
    if not is_used(config.DATA, options.DATA_PARTITION):
        raise ConfigError(
            f"config.CLUSTERFIT.FEATURES.DATA_PARTITION={options.DATA_PARTITION!r}: "
            f"config.DATA.{options.DATA_PARTITION}.DATA_SOURCES is empty. Say where its images are."
        )
    test = options.TEST_PARTITION
    with_test = test and test != options.DATA_PARTITION and is_used(config.DATA, test)
    return [options.DATA_PARTITION, test] if with_test else [options.DATA_PARTITION]


def check_rows(config: Config, dataset: ImageDataset) -> None:
    """As many images as clusters, before hours of extraction."""
    options = config.CLUSTERFIT
    if dataset.split == options.FEATURES.DATA_PARTITION and options.NUM_CLUSTERS > len(dataset):
        raise DataError(
            f"config.CLUSTERFIT.NUM_CLUSTERS={options.NUM_CLUSTERS}: {dataset.split} has only {len(dataset)} images. "
            f"Use at most {len(dataset)} clusters, or more images."
        )


def check_features(config: Config, run_dir: Path) -> None:
    """Raise what would stop the clustering of features that are there already; reads no more than their headers."""
    options = config.CLUSTERFIT
    store = open_stores(config, features_to_read(config, run_dir))[options.FEATURES.DATA_PARTITION]
    if options.NUM_CLUSTERS > len(store):
        raise DataError(
            f"config.CLUSTERFIT.NUM_CLUSTERS={options.NUM_CLUSTERS}: {store.folder} has only {len(store)} rows. "
            f"Use at most {len(store)} clusters, or more images."
        )
    check_components(options.FEATURES.DIMENSIONALITY_REDUCTION, store, key=_PCA_KEY)


def open_stores(config: Config, folder: Path) -> dict[str, FeatureStore]:
    """The features of both partitions; an error if they are not of one model. The main one comes first."""
    options = config.CLUSTERFIT.FEATURES
    main, test = options.DATA_PARTITION, options.TEST_PARTITION
    stores: dict[str, FeatureStore] = {main: FeatureStore.open(folder, main, options.LAYER_NAME)}
    if not test or test == main:
        return stores
    if not on_main(lambda: (folder / test).is_dir()):  # they may just be coming
        if distributed.is_main():
            log.info("no features of %s in %s: only %s gets labels", test, folder, main)
        return stores
    stores[test] = FeatureStore.open(folder, test, stores[main].layer)
    for what in ("weights", "model"):
        if stores[main].manifest["identity"].get(what) != stores[test].manifest["identity"].get(what):
            raise DataError(
                f"{folder}: the features of {main} and {test} come from different models ({what} differ). "
                "Extract both with one, or set config.CLUSTERFIT.FEATURES.TEST_PARTITION=''."
            )
    return stores


def _images_of(config: Config, stores: dict[str, FeatureStore], run_dir: Path) -> ImageDataset | None:
    """The images of the clustered split, for pictures, if configured; an error if they are not those of the features."""
    split = config.CLUSTERFIT.FEATURES.DATA_PARTITION
    if not is_used(config.DATA, split):
        return None
    dataset, store = open_split(config, split, run_dir), stores[split]
    if dataset.fingerprint != store.fingerprint:
        raise DataError(
            f"{store.folder}: these features belong to {store.rows} other or changed images than the {len(dataset)} of "
            f"config.DATA.{split}. Extract them again, or configure the images that they were made from."
        )
    return dataset


# ----------------------------------------------------------------------------------------------------------- preparation
def fit_steps(config: Config, store: FeatureStore) -> list[Step]:
    """What is done to each row before k-means, fitted on the clustered split: standardise, normalise, PCA."""
    options, threads = config.CLUSTERFIT, config.MACHINE.NUM_THREADS or usable_cores()
    steps: list[Step] = []
    if options.FEATURES.STANDARDIZE:
        steps.append(fit_standardiser(store, threads=threads))
    if options.NORMALIZE:
        steps.append(normalise)
    if options.FEATURES.DIMENSIONALITY_REDUCTION:
        pca = fit_pca(
            prepared(store, steps),
            options.FEATURES.DIMENSIONALITY_REDUCTION,
            whiten=options.FEATURES.PCA_WHITEN,
            key=_PCA_KEY,
            threads=threads,
        )
        log.info("PCA to %d dimensions keeps %.1f %% of the variance", len(pca.components), 100 * pca.explained)
        steps.append(pca)
    return steps


def prepared(rows: Rows, steps: list[Step]) -> Rows:
    """The rows as k-means sees them."""
    for step in steps:
        rows = MappedRows(rows, step, dim=len(step.components) if hasattr(step, "components") else None)
    return rows


# ------------------------------------------------------------------------------------------------------------ clustering
def _seed(config: Config) -> int:
    return config.CLUSTERFIT.SEED if config.CLUSTERFIT.SEED >= 0 else config.SEED_VALUE


def cluster(config: Config, rows: Rows, *, what: str) -> KMeansResult:
    """K-means: torch with the rows shared by all ranks, or faiss on the main rank. The same on every rank."""
    options, world = config.CLUSTERFIT, distributed.current()
    backend = pick_backend(options.CLUSTER_BACKEND)
    limit, order_seed = options.DATA_LIMIT, options.DATA_LIMIT_SAMPLING.SEED
    if 0 <= limit < len(rows):
        rows = SelectedRows(rows, rng.sample(order_seed, 0, len(rows), count=limit))

    def fit(threads: int, shard: Shard) -> KMeansResult:
        return kmeans(
            rows,
            k=options.NUM_CLUSTERS,
            iterations=options.NUM_ITER,
            seed=_seed(config),
            redo=options.NUM_REDO,
            spherical=options.SPHERICAL,
            init=options.INIT,
            precision=options.PRECISION,
            backend=backend,
            max_points_per_centroid=options.MAX_POINTS_PER_CENTROID,
            device=world.device,
            threads=threads,
            shard=shard,
            cache_bytes=options.CACHE_MB << 20,
            what=what,
        )

    if backend == "faiss":
        if world.size > 1 and distributed.is_main():
            log.info(
                "CLUSTER_BACKEND=faiss runs in one process; the %d others wait. torch shares the work.", world.size - 1
            )
        return on_main(lambda: fit(config.MACHINE.NUM_THREADS or usable_cores(), ALONE))
    return fit(loading_of(config).threads, Shard(world.rank, world.size, distributed.all_reduce_sum))


def assign_split(rows: Rows, found: KMeansResult, *, output: Path, split: str, config: Config) -> tuple[Path, Path]:
    """The nearest centroid of every row, by all ranks; the main one writes labels and distances, in two files, as they come."""
    world = distributed.current()
    files = (output / f"{split}_labels.npy.part", output / f"{split}_distances.npy.part")
    targets: list[NpyFile] = []
    if world.rank == 0:
        kinds: tuple[np.dtype[Any], ...] = (np.dtype(np.int64), np.dtype(np.float32))
        targets = [NpyFile.create(file, (len(rows),), kind) for file, kind in zip(files, kinds, strict=True)]
    shard = Shard(world.rank, world.size)
    mine = assign_blocks(
        rows,
        found.centroids,
        shard=shard,
        device=world.device,
        threads=loading_of(config).threads,
        what=f"features of {split}",
    )
    for parts in _rounds(mine):
        for start, *arrays in parts:
            for target, array in zip(targets, arrays, strict=False):
                target.write(start, array)
    return files


def _rounds(blocks: Iterator[LabelledRows]) -> Iterator[list[LabelledRows]]:
    """The consecutive blocks of each rank, joined to some thousands of rows of each at a time, until all are through."""
    labels, distances = np.empty(_ROUND_ROWS, dtype=np.int64), np.empty(_ROUND_ROWS, dtype=np.float32)
    block = next(blocks, None)
    while True:
        first, count = block[0] if block else 0, 0
        while block and count + len(block[1]) <= _ROUND_ROWS:
            rows = slice(count, count + len(block[1]))
            labels[rows], distances[rows] = block[1:]
            count, block = rows.stop, next(blocks, None)
        parts = distributed.all_gather_object((first, labels[:count], distances[:count]))
        if not any(len(part[1]) for part in parts):
            return
        yield parts


# --------------------------------------------------------------------------------------------------------------- output
def write_outputs(
    config: Config,
    assigned: list[Assigned],
    found: KMeansResult,
    *,
    output: Path,
    images: ImageDataset | None,
    rows: Rows,
) -> None:
    """Label files of each split, kmeans.json and report.npz; the clustered split comes first. On the main rank."""
    for number, one in enumerate(assigned):
        write_labels(config, one, found, output=output, is_main_split=number == 0)
    write_json(output / "kmeans.json", description(config, found, assigned[0]))
    write_report_data(
        output / "report.npz", assigned[0].store, assigned[0].labels, k=config.CLUSTERFIT.NUM_CLUSTERS,
        dataset=images, rows=rows, seed=_seed(config),
    )  # fmt: skip
    _log_clusters(found, assigned[0])


def write_labels(config: Config, one: Assigned, found: KMeansResult, *, output: Path, is_main_split: bool) -> None:
    """The label files of one split, and for the clustered one also labels.npy, images.npy and manifest.json."""
    store, options = one.store, config.CLUSTERFIT
    name = options.FEATURES.DATASET_NAME or store.manifest["dataset"]["name"]
    k, dim = found.centroids.shape
    prefix = f"{name}_{one.split.lower()}_{store.layer}_N{k}_D{dim}".replace("/", "_")
    inputs = {
        "split": one.split,
        "layer": store.layer,
        "features": {"fingerprint": store.fingerprint, **store.manifest["identity"]},
        "seed": _seed(config),
        "backend": found.backend,
    }
    write_label_files(
        output,
        prefix=prefix,
        labels=one.labels,
        paths=store.paths,
        root=store.manifest["dataset"]["root"],
        fingerprint=store.fingerprint,
        num_clusters=k,
        stamps=store.stamps,
        centroids=found.centroids,
        distances=one.distances,
        extra=inputs,
        also_plain=is_main_split,
    )


def description(config: Config, found: KMeansResult, main: Assigned) -> dict[str, Any]:
    """kmeans.json: how the clusters were found, and their sizes."""
    options = config.CLUSTERFIT
    sizes = np.bincount(main.labels, minlength=options.NUM_CLUSTERS)
    return {
        "backend": found.backend,
        "num_clusters": options.NUM_CLUSTERS,
        "dim": int(found.centroids.shape[1]),
        "rows": len(main.labels),
        "rows_trained_on": found.num_points,
        "seed": _seed(config),
        "num_redo": options.NUM_REDO,
        "init": options.INIT,
        "spherical": options.SPHERICAL,
        "normalize": options.NORMALIZE,
        "standardize": options.FEATURES.STANDARDIZE,
        "pca": options.FEATURES.DIMENSIONALITY_REDUCTION,
        "objective": found.objective,
        "empty_clusters_split": found.num_splits,
        "sizes": sizes.tolist(),
        "empty": np.flatnonzero(sizes == 0).tolist(),
        "seconds": found.seconds,
    }


def _results(config: Config, found: KMeansResult, assigned: list[Assigned]) -> dict[str, Any]:
    """Flat results; nmi, ari and purity in percent."""
    k = config.CLUSTERFIT.NUM_CLUSTERS
    results: dict[str, Any] = {
        "kmeans_objective": found.objective[-1],
        "kmeans_iterations": len(found.objective),
        "kmeans_backend": found.backend,
        "num_clusters": k,
        **assigned[0].results(prefix="", k=k),
    }
    for other in assigned[1:]:
        results |= other.results(prefix=f"{other.split.lower()}_", k=k)
    return results


def _log_clusters(found: KMeansResult, main: Assigned) -> None:
    sizes = np.bincount(main.labels, minlength=len(found.centroids))
    log.info(
        "k-means (%s): %d iterations, objective %.6g -> %.6g, %d rows trained on; cluster sizes: smallest %d, median %d, "
        "largest %d; %d empty",
        found.backend, len(found.objective), found.objective[0], found.objective[-1], found.num_points,
        sizes.min(), int(np.median(sizes)), sizes.max(), int((sizes == 0).sum()),
    )  # fmt: skip
