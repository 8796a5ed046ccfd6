"""Extraction, clustering, evaluation and label predictions on small image folders; the same bits at 1, 2 and 3 ranks."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.integration import forks
from vissl_like.analysis.features import FeatureStore
from vissl_like.config.schema import Job
from vissl_like.data.dataset import build_dataset
from vissl_like.errors import ConfigError, DataError
from vissl_like.models.zoo import build_model
from vissl_like.registry import resolve

PROCESS = Path(__file__).with_name("engine_process.py")
CLASSES = ("ant", "bee", "cat")
TRANSFORMS = [{"name": "Resize", "size": [24, 24]}, {"name": "ToTensor"}]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def write_images(root: Path) -> Path:
    """train: 45 images, equal names in each class, one unreadable; test: 24 images."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 15), ("test", 8)):
        for c, name in enumerate(CLASSES):
            for i in range(count):
                folder = root / split / name / ("a" if i % 2 else "b")
                folder.mkdir(parents=True, exist_ok=True)
                pixels = generator.integers(0, 90, (28, 30, 3)) + np.eye(3, dtype=int)[c] * 140
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i // 2}.png")
    (root / "train" / "bee" / "a" / "2.png").write_bytes(b"not an image")
    return root


def job(engine: str, images: Path, **changes: Any) -> Job:
    """A job on the folder; changes are {"DATA__TRAIN__X": value}."""

    def split(name: str) -> dict[str, Any]:
        return {
            "DATASET_NAMES": ["toy"],
            "DATA_SOURCES": ["disk_folder"],
            "DATA_PATHS": [str(images / name)],
            "BATCHSIZE_PER_REPLICA": 4,
            "TRANSFORMS": TRANSFORMS,
        }

    config: dict[str, Any] = {
        "RUN": {"PROGRESS": "none"},
        "MACHINE": {"NUM_THREADS": 2},
        "DATA": {"NUM_DATALOADER_WORKERS": 0, "MAX_BAD_FRACTION": 0.1, "TRAIN": split("train"), "TEST": split("test")},
        "MODEL": {"TRUNK": {"NAME": "resnet_small"}},
        "CLUSTERFIT": {"NUM_CLUSTERS": 5, "NUM_ITER": 8},
        "EXTRACT_FEATURES": {"SHARD_ROWS": 10},
        "NEAREST_NEIGHBOR": {"TOPK": [5]},
        "LOW_SHOT": {"SAMPLES_PER_CLASS": [3], "NUM_DRAWS": 2},
    }
    return job_of(engine, config, changes)


def job_of(engine: str, config: dict[str, Any], changes: dict[str, Any]) -> Job:
    """The configuration with `changes`: A__B=value stands for config.A.B=value."""
    for key, value in changes.items():
        node, *path = config, *key.split("__")
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return Job.model_validate({"engine_name": engine, "config": config})


def run(job: Job, run_dir: Path) -> dict[str, Any]:
    run_dir.mkdir(parents=True, exist_ok=True)
    return resolve("engine", job.engine_name, key="engine_name")(job, run_dir)


def run_ranks(jobs: list[tuple[Job, Path]], folder: Path, *, ranks: int, how: str = "") -> list[int]:
    """Run the jobs one after the other in `ranks` processes; returns exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    for _, run_dir in jobs:
        run_dir.mkdir(parents=True, exist_ok=True)
    file = folder / "jobs.json"
    file.write_text(json.dumps([[job.model_dump(mode="json"), str(run_dir)] for job, run_dir in jobs]))
    ended = forks.run_ranks([str(file), *([how] if how else [])], program=PROCESS, ranks=ranks, cwd=folder)
    sys.stderr.write("".join(one.stderr for one in ended))
    return [one.returncode for one in ended]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.np[yz]"))
    }


def results_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "results.json").read_text())


def stable(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "images_per_s"}


# ------------------------------------------------------------------------------------------------------- any world size
# Its convolutions differ in their last bits with the number of threads inside them.
THREAD_SENSITIVE = {"NAME": "torchvision/mobilenet_v3_small"}


def jobs_of_all_engines(images: Path, folder: Path) -> list[tuple[Job, Path]]:
    maps = {
        "LINEAR_EVAL_FEAT_POOL_OPS_MAP": [
            ["features.1", ["AdaptiveAvgPool2d", [[2, 2]]]],
            ["flatten", ["Identity", []]],
        ]
    }
    extraction = job("extract_features", images, MODEL__TRUNK=THREAD_SENSITIVE, MODEL__FEATURE_EVAL_SETTINGS=maps)
    features = {"PATH": str(folder / "extract" / "features"), "LAYER_NAME": "flatten", "DIMENSIONALITY_REDUCTION": 6}
    clusters = {
        backend: job("cluster_features", images, CLUSTERFIT__CLUSTER_BACKEND=backend, CLUSTERFIT__FEATURES=features)
        for backend in ("faiss", "torch")
    }
    evaluation = job(
        "evaluate", images, EVALUATE={"PROTOCOLS": ["knn", "linear", "low_shot"], "CALIBRATE_BN_BATCHES": 2}
    )
    return [
        (extraction, folder / "extract"),
        (clusters["faiss"], folder / "faiss"),
        (clusters["torch"], folder / "torch"),
        (evaluation, folder / "evaluate"),
        (job("extract_label_predictions", images, METERS__NAMES=["accuracy_list_meter"]), folder / "predict"),
    ]


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All engines in this process, with two threads."""
    folder = tmp_path_factory.mktemp("alone")
    for each, run_dir in jobs_of_all_engines(images, folder):
        (run_dir / "results.json").write_text(json.dumps(run(each, run_dir)))
    return folder


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_change_no_bit(images: Path, alone: Path, tmp_path: Path, ranks: int) -> None:
    jobs = jobs_of_all_engines(images, tmp_path)
    assert run_ranks(jobs, tmp_path, ranks=ranks) == [0] * ranks
    for _, run_dir in jobs:
        expected = alone / run_dir.name
        assert digests(run_dir) == digests(expected), run_dir.name
        assert stable(results_of(run_dir)) == stable(results_of(expected))
    assert (tmp_path / "extract" / "bad_images.txt").read_text() == (alone / "extract" / "bad_images.txt").read_text()


def test_an_error_of_the_main_rank_ends_all_ranks(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    changes = {
        "CLUSTERFIT__FEATURES__EXTRACT": True,
        "CLUSTERFIT__NUM_CLUSTERS": 5,
        "CLUSTERFIT__FEATURES__DIMENSIONALITY_REDUCTION": 99,
        "CLUSTERFIT__CLUSTER_BACKEND": "faiss",
    }
    assert run_ranks([(job("cluster_features", images, **changes), tmp_path / "run")], tmp_path, ranks=2) == [1, 1]
    assert (
        capfd.readouterr().err.count("ConfigError: config.CLUSTERFIT.FEATURES.DIMENSIONALITY_REDUCTION=99: 45 rows")
        == 2
    )


# ----------------------------------------------------------------------------------------------------------- extraction
def test_rows_are_the_features_of_the_images_in_order(images: Path, alone: Path) -> None:
    config = jobs_of_all_engines(images, alone)[0][0].config
    store = FeatureStore.open(alone / "extract" / "features", "TEST", "flatten")
    dataset = build_dataset(config.DATA, "TEST", seed=0)
    assert store.paths.tolist() == dataset.paths.tolist() and len(set(store.paths)) == 24
    assert store.paths[0] == "ant/a/0.png" and store.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    from vissl_like.core import rng

    rng.seed_model(0)
    model = build_model(config.MODEL, num_classes=3, image_size=(24, 24), with_heads=False).eval()
    with torch.inference_mode():
        for row in (0, 5, 23):
            expected = model.features(dataset.device_transform(dataset[row]["data"][None]))["flatten"]
            np.testing.assert_allclose(store.read(row, row + 1), expected.numpy(), rtol=1e-4, atol=1e-5)
    assert FeatureStore.open(alone / "extract" / "features", "TEST", "features.1").dim == 16 * 4


def test_unreadable_images_are_listed_and_counted(alone: Path) -> None:
    results = results_of(alone / "extract")
    assert results["bad_images"] == 1 and results["train_rows"] == 45 and results["test_rows"] == 24
    assert "bee/a/2.png" in (alone / "extract" / "bad_images.txt").read_text()
    manifest = json.loads((alone / "extract" / "features" / "TRAIN" / "manifest.json").read_text())
    assert manifest["bad_rows"] == [17]


def test_no_weights_are_a_loud_warning(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = run(job("extract_features", images, EXTRACT_FEATURES__SPLITS=["TEST"]), tmp_path)
    assert "NO WEIGHTS" in caplog.text and results["weights"] == "random"
    assert "random" in (tmp_path / "weights_report.json").read_text() or results["dim_flatten"] == 64


def test_random_transforms_are_a_warning(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {
        "DATA__TEST__TRANSFORMS": [{"name": "RandomResizedCrop", "size": 24}],
        "EXTRACT_FEATURES__SPLITS": ["TEST"],
    }
    run(job("extract_features", images, **changes), tmp_path)
    assert "DATA.TEST.TRANSFORMS are random" in caplog.text


def test_a_stopped_extraction_keeps_all_that_was_done(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    [(extraction, run_dir), *_] = jobs_of_all_engines(images, tmp_path)
    assert run_ranks([(extraction, run_dir)], tmp_path, ranks=1, how="SIGTERM") == [1]
    assert "SIGTERM: extraction stopped; what is done is kept. Start again to go on." in capfd.readouterr().err
    assert np.load(run_dir / "features" / "TRAIN" / "done.npy").sum() == 3


def test_a_killed_extraction_goes_on_and_ends_in_the_same_bits(images: Path, alone: Path, tmp_path: Path) -> None:
    [(extraction, run_dir), *_] = jobs_of_all_engines(images, tmp_path)
    assert run_ranks([(extraction, run_dir)], tmp_path, ranks=1, how="SIGKILL") == [-9]
    assert np.load(run_dir / "features" / "TRAIN" / "done.npy").sum() == 2
    with pytest.raises(DataError, match="interrupted"):
        FeatureStore.open(run_dir / "features", "TRAIN", "flatten")
    run(extraction, run_dir)
    assert digests(run_dir) == digests(alone / "extract")
    before = {file: file.stat().st_mtime_ns for file in run_dir.rglob("shard_*.npy")}
    assert "images_per_s" not in run(extraction, run_dir)  # everything is there
    assert before == {file: file.stat().st_mtime_ns for file in run_dir.rglob("shard_*.npy")}
    file = run_dir / "features" / "TEST" / "flatten" / "shard_00001.npy"
    file.write_bytes(file.read_bytes()[:-40])
    run(extraction, run_dir)
    assert digests(run_dir) == digests(alone / "extract")


def test_features_of_another_model_are_not_mixed(images: Path, tmp_path: Path) -> None:
    run(job("extract_features", images), tmp_path)
    with pytest.raises(DataError, match="features of another extraction; different: seed, weights"):
        run(job("extract_features", images, SEED_VALUE=1), tmp_path)
    first = digests(tmp_path)
    assert "images_per_s" not in run(job("extract_features", images, DATA__TRAIN__BATCHSIZE_PER_REPLICA=8), tmp_path)
    assert digests(tmp_path) == first  # another batch size: what is finished is taken as it is
    run(job("extract_features", images, SEED_VALUE=1, RUN__OVERWRITE=True), tmp_path)
    assert digests(tmp_path) != first


def test_other_formats(images: Path, tmp_path: Path) -> None:
    options = {
        "SPLITS": ["TEST"],
        "FORMATS": ["safetensors", "parquet"],
        "MAP_FEATURES_TO_IMG_NAME": True,
        "DTYPE": "float16",
    }
    run(job("extract_features", images, EXTRACT_FEATURES=options), tmp_path)
    folder = tmp_path / "features" / "TEST" / "flatten"
    assert {file.suffix for file in folder.iterdir()} == {".npy", ".safetensors", ".parquet"}
    single = np.load(tmp_path / "features" / "features_to_image" / "TEST" / "flatten" / "cat" / "b" / "3.png.npy")
    store = FeatureStore.open(tmp_path / "features", "TEST")
    assert single.dtype == np.float16
    assert np.array_equal(single[0], store.read(0, 24)[store.paths.tolist().index("cat/b/3.png")])


def test_mistakes_of_the_configuration(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"DATA.VAL.DATA_SOURCES is empty"):
        run(job("extract_features", images, EXTRACT_FEATURES__SPLITS=["VAL"]), tmp_path)
    with pytest.raises(ConfigError, match="no split has images"):
        run(Job.model_validate({"engine_name": "extract_features"}), tmp_path)


# ----------------------------------------------------------------------------------------------------------- clustering
def test_label_files(images: Path, alone: Path) -> None:
    folder = alone / "faiss" / "clusters"
    for split, rows in (("train", 45), ("test", 24)):
        labels = np.load(folder / f"toy_{split}_flatten_N5_D6_labels.npy")
        paths = np.load(folder / f"toy_{split}_flatten_N5_D6_images.npy")
        assert labels.dtype == np.int64 and labels.shape == paths.shape == (rows,) and labels.max() < 5
        assert np.load(folder / f"toy_{split}_flatten_N5_D6_distances.npy").shape == (rows,)
    assert np.load(folder / "toy_train_flatten_N5_D6_centroids.npy").shape == (5, 6)
    short, long = (np.load(folder / name) for name in ("labels.npy", "toy_train_flatten_N5_D6_labels.npy"))
    assert np.array_equal(short, long)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["num_clusters"] == 5 and manifest["root"] == str(images / "train")
    extracted = json.loads((alone / "extract" / "features" / "TRAIN" / "manifest.json").read_text())
    assert manifest["features"]["weights"] == extracted["identity"]["weights"]


def test_results_and_report_of_clusters(alone: Path) -> None:
    results = results_of(alone / "torch")
    described = json.loads((alone / "torch" / "clusters" / "kmeans.json").read_text())
    assert results["num_clusters"] == 5 and results["kmeans_backend"] == "torch"
    assert described["objective"] == sorted(described["objective"], reverse=True)
    assert described["objective"][-1] == results["kmeans_objective"] and sum(described["sizes"]) == 45
    assert results["empty_clusters"] == len(described["empty"])
    assert all(0 <= results[key] <= 100 for key in ("nmi", "purity", "test_nmi", "test_purity"))
    report = np.load(alone / "torch" / "clusters" / "report.npz")
    assert report["sizes"].tolist() == described["sizes"]
    assert report["montage_images"].shape[1:] == (64, 64, 3) and report["montage_images"].dtype == np.uint8
    shown = sum(min(size, 10) for size in described["sizes"])
    assert len(report["montage_cluster"]) == len(report["montage_images"]) >= shown - 1  # one may be unreadable
    assert report["projection"].shape == (45, 2) and sorted(set(report["projection_label"])) == [-1, 0, 1, 2]


def test_labels_fit_the_images_in_the_second_stage(images: Path, alone: Path) -> None:
    folder = alone / "faiss" / "clusters"
    labels = dict(zip(np.load(folder / "images.npy").tolist(), np.load(folder / "labels.npy").tolist(), strict=True))
    for changes in ({}, {"DATA__TRAIN__DATA_PATHS": [], "DATA__TRAIN__DATA_SOURCES": ["disk_filelist"]}):
        data = job("train", images, DATA__TRAIN__LABEL_PATHS=[str(folder / "labels.npy")], **changes).config.DATA
        dataset = build_dataset(data, "TRAIN", seed=0, train=True)
        assert dataset.num_classes == 5 and len(dataset) == 45
        names = [path.removeprefix(str(images / "train") + "/") for path in dataset.paths.tolist()]
        assert [labels[name] for name in names] == dataset.labels.tolist()


def test_clustering_with_its_own_extraction(images: Path, tmp_path: Path) -> None:
    changes = {
        "CLUSTERFIT__FEATURES": {"EXTRACT": True, "STANDARDIZE": True},
        "CLUSTERFIT__DATA_LIMIT": 30,
        "CLUSTERFIT__SEED": 3,
    }
    results = run(job("cluster_features", images, **changes), tmp_path)
    described = json.loads((tmp_path / "clusters" / "kmeans.json").read_text())
    assert described["rows_trained_on"] == 30 and described["rows"] == 45 and described["seed"] == 3
    assert results["train_rows"] == 45 and results["test_rows"] == 24
    assert (tmp_path / "clusters" / "toy_test_flatten_N5_D64_labels.npy").exists()


def test_unlabelled_images_without_test_split(images: Path, tmp_path: Path) -> None:
    changes = {
        "DATA__TRAIN__DATA_PATHS": [str(images / "train" / "ant")],  # a and b would be classes
        "DATA__TRAIN__LABEL_TYPE": "zero",
        "DATA__TEST": {},
        "CLUSTERFIT__NUM_CLUSTERS": 3,
        "CLUSTERFIT__FEATURES__EXTRACT": True,
    }
    results = run(job("cluster_features", images, **changes), tmp_path)
    assert results["train_rows"] == 15 and "test_rows" not in results
    assert sorted(file.name for file in (tmp_path / "clusters").glob("toy_test*")) == []


def test_features_that_do_not_fit_are_refused(images: Path, alone: Path, tmp_path: Path) -> None:
    path = {
        "CLUSTERFIT__FEATURES__PATH": str(alone / "extract" / "features"),
        "CLUSTERFIT__FEATURES__LAYER_NAME": "flatten",
    }
    with pytest.raises(DataError, match="NUM_CLUSTERS=60: features of TRAIN have only 45 rows"):
        run(job("cluster_features", images, **path, CLUSTERFIT__NUM_CLUSTERS=60), tmp_path)
    with pytest.raises(DataError, match="belong to 45 other or changed images than the 24 of config.DATA.TRAIN"):
        run(job("cluster_features", images, **path, DATA__TRAIN__DATA_PATHS=[str(images / "test")]), tmp_path)
    with pytest.raises(DataError, match="no extracted features of split TRAIN"):
        run(job("cluster_features", images, CLUSTERFIT__FEATURES__PATH=str(tmp_path)), tmp_path)
    with pytest.raises(ConfigError, match="is the run folder itself"):
        run(job("cluster_features", images, **path, CLUSTERFIT__OUTPUT_DIR=str(tmp_path)), tmp_path)
    with pytest.raises(ConfigError, match="is read only with EXTRACT=false"):
        run(job("cluster_features", images, **path, CLUSTERFIT__FEATURES__EXTRACT=True), tmp_path)
    other = tmp_path / "mixed"
    run(
        job("extract_features", images, EXTRACT_FEATURES__OUTPUT_DIR=str(other), EXTRACT_FEATURES__SPLITS=["TRAIN"]),
        tmp_path,
    )
    seeded = {"EXTRACT_FEATURES__OUTPUT_DIR": str(other), "EXTRACT_FEATURES__SPLITS": ["TEST"], "SEED_VALUE": 5}
    run(job("extract_features", images, **seeded), tmp_path)
    with pytest.raises(DataError, match=r"come from different models \(weights differ\)"):
        run(job("cluster_features", images, CLUSTERFIT__FEATURES__PATH=str(other)), tmp_path)


# ----------------------------------------------------------------------------------------------------------- evaluation
def test_evaluation_results(alone: Path) -> None:
    results = results_of(alone / "evaluate")
    for name, total in (("knn", 24), ("linear", 24), ("low_shot_3", 48)):
        assert results[f"{name}_total"] == total
        assert results[f"{name}_top1"] == pytest.approx(100 * results[f"{name}_correct"] / total)
    assert results["linear_top1"] > 80 and "linear_top5" not in results  # three classes
    assert not (alone / "evaluate" / "features").exists()


def test_evaluating_features_that_are_there(images: Path, alone: Path, tmp_path: Path) -> None:
    changes = {
        "EVALUATE": {"PROTOCOLS": ["knn"], "FEATURES_PATH": str(alone / "extract" / "features")},
        "NEAREST_NEIGHBOR__TOPK": [1, 5],
    }
    results = run(job("evaluate", images, **changes), tmp_path)
    assert {"knn_1_top1_flatten", "knn_5_top1_flatten", "knn_1_top1_features.1", "knn_5_correct_features.1"} <= set(
        results
    )
    assert (alone / "extract" / "features").exists()
    with pytest.raises(ConfigError, match="NEAREST_NEIGHBOR.LAYERS='flaten': not extracted; did you mean 'flatten'"):
        run(job("evaluate", images, **changes, NEAREST_NEIGHBOR__LAYERS=["flaten"]), tmp_path)


def test_evaluation_needs_labels_and_both_splits(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="DATA.TEST.DATA_SOURCES is empty"):
        run(job("evaluate", images, DATA__TEST={}), tmp_path)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (images / "test" / "ant" / "a").iterdir():
        (flat / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="images of TEST have no labels"):
        run(job("evaluate", images, DATA__TEST__DATA_PATHS=[str(flat)]), tmp_path / "run")
    assert not (tmp_path / "run" / "features").exists()  # said before anything is extracted
    with pytest.raises(
        DataError, match=f"config.EVALUATE.FEATURES_PATH='{flat}': no extracted features of split TRAIN"
    ):
        run(job("evaluate", images, EVALUATE__FEATURES_PATH=str(flat)), tmp_path / "run")


def test_clustering_refuses_before_it_extracts(images: Path, tmp_path: Path) -> None:
    extract = {"CLUSTERFIT__FEATURES__EXTRACT": True}
    with pytest.raises(DataError, match="NUM_CLUSTERS=99: TRAIN has only 45 images. Use at most 45"):
        run(job("cluster_features", images, **extract, CLUSTERFIT__NUM_CLUSTERS=99), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="CLUSTERFIT.OUTPUT_DIR=.*cannot be made"):
        run(job("cluster_features", images, **extract, CLUSTERFIT__OUTPUT_DIR=str(tmp_path / "file" / "x")), tmp_path)
    assert not (tmp_path / "features").exists()
    with pytest.raises(DataError, match="file/TRAIN: .*Not a directory"):
        run(job("extract_features", images, EXTRACT_FEATURES__OUTPUT_DIR=str(tmp_path / "file")), tmp_path)


# ---------------------------------------------------------------------------------------------------- label predictions
def test_label_predictions(images: Path, alone: Path) -> None:
    folder = alone / "predict" / "predictions" / "TRAIN"
    arrays = {file.stem: np.load(file) for file in folder.iterdir()}
    assert sorted(arrays) == ["conf_scores", "images", "inds", "predictions", "targets"]
    assert arrays["inds"].tolist() == list(range(45)) and arrays["predictions"].shape == (45, 3)
    assert arrays["targets"][17] == -1 and (arrays["targets"] >= 0).sum() == 44
    assert (np.diff(arrays["conf_scores"], axis=1) <= 0).all()
    np.testing.assert_allclose(arrays["conf_scores"].sum(1), 1, rtol=1e-5)
    numbers = json.loads((alone / "predict" / "train_label_to_index_map.json").read_text())
    assert numbers == {"ant": 0, "bee": 1, "cat": 2}
    results = results_of(alone / "predict")
    known = arrays["targets"] >= 0
    assert results["train_top_1"] == pytest.approx(
        100 * (arrays["predictions"][known, 0] == arrays["targets"][known]).mean()
    )
