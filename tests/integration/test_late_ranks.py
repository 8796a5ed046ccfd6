"""Processes of a run that come late or see another state of files than the first: each case once went wrong."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.integration.test_engines import (
    THREAD_SENSITIVE,
    digests,
    job,
    jobs_of_all_engines,
    run,
    run_ranks,
    write_images,
)
from vissl_like.config.schema import Job
from vissl_like.core.saving import Saver
from vissl_like.models.zoo import build_model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process extracts."""
    folder = tmp_path_factory.mktemp("alone")
    run(*jobs_of_all_engines(images, folder)[0])
    return folder


def test_a_late_rank_writes_its_own_part(images: Path, alone: Path, tmp_path: Path) -> None:
    """It once took its share of what the first had left, instead of its share of all, and blocks were missing."""
    extraction, run_dir = jobs_of_all_engines(images, tmp_path)[0]
    assert run_ranks([(extraction, run_dir)], tmp_path, ranks=2, how="write_late") == [0, 0]
    assert digests(run_dir) == digests(alone / run_dir.name)


def test_ranks_wait_for_a_slow_one(images: Path, alone: Path, tmp_path: Path) -> None:
    """They once gave up when its part took longer by more than config.DISTRIBUTED.TIMEOUT_S."""
    extraction, run_dir = jobs_of_all_engines(images, tmp_path)[0]
    assert run_ranks([(extraction, run_dir)], tmp_path, ranks=2, how="write_slowly") == [0, 0]
    assert digests(run_dir) == digests(alone / run_dir.name)


def test_a_signal_to_one_rank_stops_the_extraction_of_all(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """The others once went on to the end, and then missed the one that had stopped."""
    [(extraction, run_dir), *_] = jobs_of_all_engines(images, tmp_path)
    assert run_ranks([(extraction, run_dir)], tmp_path, ranks=2, how="stop_last") == [1, 1]
    said = capfd.readouterr().err
    assert "Stopped: SIGTERM: extraction stopped; what is done is kept." in said
    assert "Stopped: a signal to another process: extraction stopped; what is done is kept." in said
    assert not np.load(run_dir / "features" / "TRAIN" / "done.npy").all()


def test_all_ranks_read_the_same_save_of_a_training_that_goes_on(images: Path, tmp_path: Path) -> None:
    """Each once took the newest that it saw, and the features of one file came from several models."""
    changes = {"MODEL__TRUNK": THREAD_SENSITIVE, "DATA__TEST__DATA_SOURCES": []}
    for step in (1, 2):
        torch.manual_seed(step)
        model = build_model(job("extract_features", images, **changes).config.MODEL, num_classes=3, image_size=(24, 24))
        with contextlib.closing(Saver(tmp_path / "weights", keep=2, in_background=False)) as saver:
            saver.save(step=step, model_state=model.state_dict(), training_state={})
    saves = tmp_path / "weights" / "checkpoints"

    def extraction(weights: Path) -> Job:
        return job("extract_features", images, MODEL__WEIGHTS_INIT={"PARAMS_FILE": str(weights)}, **changes)

    known = []
    for step in (1, 2):
        run(extraction(saves / f"step_{step:08d}"), tmp_path / f"of_{step}")
        known.append(digests(tmp_path / f"of_{step}"))
    (saves / "step_00000002").rename(saves / "later")
    both = (extraction(tmp_path / "weights"), tmp_path / "both")
    assert run_ranks([both], tmp_path, ranks=2, how="read_newer") == [0, 0]
    assert known[0] != known[1] and digests(tmp_path / "both") in known


def test_ranks_that_see_different_images_are_told_so(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """An image came while they looked; each rank once computed with its own rows."""
    shutil.copytree(images, tmp_path / "images")
    extraction = job("extract_features", tmp_path / "images", DATA__TEST__DATA_SOURCES=[])
    assert run_ranks([(extraction, tmp_path / "run")], tmp_path, ranks=2, how="list_more") == [1, 1]
    said = capfd.readouterr().err
    assert (
        said.count("DataError: config.DATA.TRAIN: the processes do not see the same images and labels: rank 0 on") == 2
    )
    assert "has 45 images" in said and "has 46 images" in said
    assert not (tmp_path / "run" / "features").exists()


def test_all_ranks_cluster_the_same_splits(images: Path, alone: Path, tmp_path: Path) -> None:
    """Features of TEST that came while the ranks looked for them were once awaited by some of them only."""
    shutil.copytree(alone / "extract" / "features", tmp_path / "features")
    (tmp_path / "features" / "TEST").rename(tmp_path / "features" / "later")
    features = {"PATH": str(tmp_path / "features"), "LAYER_NAME": "flatten"}
    clusters = job("cluster_features", images, CLUSTERFIT__FEATURES=features)
    assert run_ranks([(clusters, tmp_path / "run")], tmp_path, ranks=2, how="find_more") == [0, 0]
    assert not any(file.name.startswith("toy_test") for file in (tmp_path / "run" / "clusters").iterdir())
