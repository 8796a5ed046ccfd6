"""Shards in the real engines: the numbers of the folder they were made from, and exact restarts, from files and URLs."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_engines import digests, job, results_of, run_ranks, stable
from tests.integration.training_runs import assert_same_course, launch, losses, records, results
from tests.shard_server import Server, serving
from tests.unit.test_data_shards import png
from vissl_like.config.schema import Job
from vissl_like.data.shrink import shrink

CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders images/train (48 images of 4 classes) and images/test (20 of 3), and their shards in www/train, www/test."""
    root = tmp_path_factory.mktemp("data")
    for split, count, classes in (("train", 12, 4), ("test", 20 // 3 + 1, 3)):
        for c, name in enumerate(CLASSES[:classes]):
            for i in range(count):
                file = root / "images" / split / name / f"{i:02d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(png(1000 * c + i + 50 * len(split), side=30))
        source = str(root / "images" / split)
        shrink(source, str(root / "www" / split), format="webdataset", shard_size=7 if split == "train" else 9)
    return root


@pytest.fixture(scope="module")
def server(data: Path) -> Iterator[Server]:
    with serving(data / "www", data / "state") as running:
        yield running


def narrow(data: Path, cache: Path) -> dict[str, Any]:
    """Windows of two shards, and room for two such windows."""
    sizes = sorted(file.stat().st_size for file in (data / "www").rglob("*.tar"))
    return {"SHUFFLE_SHARDS": 2, "CACHE_GB": (sum(sizes[-4:]) + 1000) / 1e9, "CACHE_DIR": str(cache), "RETRIES": 4}


# ------------------------------------------------------------------------------------------------------------- engines
def jobs(data: Path, folder: Path, *, kind: str, paths: dict[str, str], cache: Path) -> list[tuple[Job, Path]]:
    changes: dict[str, Any] = {"DATA__STREAM": narrow(data, cache), "DATA__NUM_DATALOADER_WORKERS": 1}
    changes["MULTI_PROCESSING_METHOD"] = "fork"
    for split, path in paths.items():
        changes |= {f"DATA__{split}__DATA_SOURCES": [kind], f"DATA__{split}__DATA_PATHS": [path]}
    features = {"PATH": str(folder / "extract" / "features"), "LAYER_NAME": "flatten"}
    protocols = {"PROTOCOLS": ["knn", "low_shot"]}
    return [
        (job("extract_features", data, **changes), folder / "extract"),
        (job("cluster_features", data, CLUSTERFIT__FEATURES=features, **changes), folder / "cluster"),
        (job("evaluate", data, EVALUATE=protocols, **changes), folder / "evaluate"),
        (job("extract_label_predictions", data, METERS__NAMES=["accuracy_list_meter"], **changes), folder / "predict"),
    ]


@pytest.fixture(scope="module")
def from_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    paths = {split: str(data / "images" / split.lower()) for split in ("TRAIN", "TEST")}
    assert run_ranks(jobs(data, folder, kind="disk_folder", paths=paths, cache=folder / "c"), folder, ranks=1) == [0]
    return folder


def test_every_engine_gives_what_the_folder_gives(
    data: Path, server: Server, from_folder: Path, tmp_path: Path
) -> None:
    """From files and from URLs, with two processes instead of one; shards of 7 and 9 images do not fall on batches."""
    todo = []
    for name, base in (("files", str(data / "www")), ("urls", server.url)):
        paths = {
            "TRAIN": f"{base}/train/shard-{{000000..000006}}.tar",
            "TEST": f"{base}/test/shard-{{000000..000002}}.tar",
        }
        todo += jobs(data, tmp_path / name, kind="webdataset", paths=paths, cache=tmp_path / "cache")
    assert run_ranks(todo, tmp_path, ranks=2) == [0, 0]
    for _, run_dir in todo:
        expected = from_folder / run_dir.name
        assert digests(run_dir) == digests(expected), run_dir
        assert stable(results_of(run_dir)) == stable(results_of(expected))
    assert results_of(tmp_path / "urls" / "extract")["train_rows"] == 48


# ------------------------------------------------------------------------------------------------------------ training
def training(kind: str, base: str, **stream: Any) -> list[str]:
    names = {"TRAIN": "train/shard-{000000..000006}.tar", "TEST": "test/shard-{000000..000002}.tar"}
    overrides = ["config.OPTIMIZER.NUM_EPOCHS=3", "config.CHECKPOINT.EVERY_STEPS=2"]
    for split, name in names.items():
        path = f"{base}/{split.lower()}" if kind == "disk_folder" else f"{base}/{name}"
        overrides += [f"config.DATA.{split}.DATA_SOURCES=[{kind}]", f"config.DATA.{split}.DATA_PATHS=['{path}']"]
        overrides += [f"config.DATA.{split}.DATASET_NAMES=[toy]"]
    return overrides + [f"config.DATA.STREAM.{name}={value}" for name, value in stream.items()]


def test_training_on_files_is_training_on_the_folder(data: Path, tmp_path: Path) -> None:
    """And so it is from URLs whose images are all mixed."""
    for name, kind, base in (("folder", "disk_folder", data / "images"), ("files", "webdataset", data / "www")):
        done = launch(tmp_path / name, *training(kind, str(base), CACHE_DIR=tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "folder")) == 18
    assert_same_course(tmp_path / "files", tmp_path / "folder")


@pytest.fixture(scope="module")
def undisturbed(data: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training from URLs, shard by shard."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = launch(folder / "run", *training("webdataset", server.url, **narrow(data, folder / "cache")))
    assert done.returncode == 0, done.stderr
    assert results(folder / "run")["test_top_1"] >= 0 and len(losses(folder / "run")) == 18
    return folder / "run"


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_within_epochs_it_ends_in_the_same_bits(
    data: Path, server: Server, undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    """The second start has no cache left and a server that cuts connections; the last one other workers."""
    options = training("webdataset", server.url, **narrow(data, tmp_path / "cache"))
    loaders = "config.DATA.NUM_DATALOADER_WORKERS="
    for steps in ("4", "5"):
        killed = launch(tmp_path / "run", *options, f"{loaders}{workers}", env={"KILL_AFTER": steps})
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        shutil.rmtree(tmp_path / "cache")
        server.order(break_after=9000, break_times=3)
    done = launch(tmp_path / "run", *options, f"{loaders}{2 - workers}")
    assert done.returncode == 0, done.stderr
    assert_same_course(tmp_path / "run", undisturbed)


def test_a_lost_server_is_one_line_and_the_run_goes_on_later(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The address of the second server differs, so the shards come under another name: the rows are the same."""
    with serving(data / "www", tmp_path / "state") as server:
        options = training("webdataset", server.url, **{**narrow(data, tmp_path / "cache"), "RETRIES": 1})
        killed = launch(tmp_path / "run", *options, env={"KILL_AFTER": "4"})
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        for file in (tmp_path / "cache").glob("*.tar"):
            file.unlink()
        server.order(status=503)
        lost = launch(tmp_path / "run", *options)
        assert lost.returncode == 3
        assert "cannot be asked for, tried 2 times (the server answers 503" in lost.stderr
        assert "Traceback" not in lost.stderr
        server.order()
        done = launch(tmp_path / "run", *options)
        assert done.returncode == 0, done.stderr
    assert_same_course(tmp_path / "run", undisturbed)


def test_mistakes_are_found_before_anything_starts(data: Path, tmp_path: Path) -> None:
    options = training("webdataset", str(data / "www"))
    wrong = {
        "config.DATA.TRAIN.DATA_SOURCES=[webdatset]": (2, "did you mean webdataset"),
        f"config.DATA.TRAIN.DATA_PATHS=['{data}/www/train/shard-{{000000..000009}}.tar']": (3, "3 of 10 are missing"),
        "config.DATA.TRAIN.DATA_PATHS=['pipe:touch /tmp/never']": (2, "VISSL_LIKE_PIPES"),
        "config.DATA.STREAM.SHUFFLE=shard": (2, "shards"),
    }
    for override, (code, text) in wrong.items():
        done = launch(tmp_path / "run", *options, override)
        assert done.returncode == code and text in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_catalog_may_name_shards(data: Path, tmp_path: Path) -> None:
    catalog = {"toy": {"train": [str(data / "www" / "train"), ""], "val": [f"{data}/www/test/shard-*.tar", ""]}}
    (tmp_path / "catalog.json").write_text(json.dumps(catalog))
    options = [word for word in training("webdataset", "") if "DATA_PATHS" not in word]
    done = launch(tmp_path / "run", *options, f"config.DATA.CATALOG={tmp_path}/catalog.json")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 18 and len(records(tmp_path / "run")) > 18
