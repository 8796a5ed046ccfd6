"""The engine `train` in this process: options that must have an effect, and mistakes that are found before training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vissl_like.config.schema import Job
from vissl_like.engines.train import run
from vissl_like.errors import ConfigError
from vissl_like.outputs.writers import read_metrics

VIEWS = [{"name": "Resize", "size": [16, 16]}, {"name": "ToTensor"}]
OPTIMIZER = {"NUM_EPOCHS": 1, "PARAM_SCHEDULERS": {"LR": {"NAME": "constant", "VALUE": 0.01}}}


def job(train: dict[str, Any] | None = None, test: dict[str, Any] | None = None, **config: Any) -> Job:
    split = {
        "DATA_SOURCES": ["synthetic"],
        "NUM_SYNTHETIC": 8,
        "SYNTHETIC_SIZE": 16,
        "BATCHSIZE_PER_REPLICA": 4,
        "TRANSFORMS": VIEWS,
    }
    data = {"NUM_DATALOADER_WORKERS": 0, "TRAIN": split | (train or {}), "TEST": split | (test or {})}
    tree = {
        "LOG_FREQUENCY": 1,
        "DATA": data,
        "MODEL": {"TRUNK": {"NAME": "resnet_small"}, **config.pop("MODEL", {})},
        "OPTIMIZER": OPTIMIZER,
        "RUN": {"PROGRESS": "none"},
    }
    return Job.model_validate({"config": tree | config})


def first_loss(run_dir: Path, **config: Any) -> float:
    run_dir.mkdir()
    run(job(**config), run_dir)
    return next(record["loss"] for record in read_metrics(run_dir) if record["kind"] == "train")


def test_bgr_turns_the_channels_exactly_once(tmp_path: Path) -> None:
    rgb = first_loss(tmp_path / "rgb")
    assert first_loss(tmp_path / "bgr", MODEL={"INPUT_TYPE": "bgr"}) != rgb


def test_means_do_not_depend_on_the_size_of_batches(tmp_path: Path) -> None:
    """Labels of -1 and weights of classes count in the loss, so they count in every mean of it, and in the gradients."""
    np.save(tmp_path / "x.npy", np.array([0, -1, -1, -1, 1, 2, 2, 2]))
    labels = {"LABEL_PATHS": [str(tmp_path / "x.npy")], "LABEL_ALIGNMENT": "position"}
    frozen = {"EVAL_MODE_ON": True, "FREEZE_TRUNK_ONLY": True}
    frozen["LINEAR_EVAL_FEAT_POOL_OPS_MAP"] = [["flatten", ["Identity", []]]]
    found = []
    for batch in (8, 2):
        (run_dir := tmp_path / str(batch)).mkdir()
        work = job(
            OPTIMIZER={**OPTIMIZER, "ACCUMULATE_STEPS": 8 // batch},
            train=labels | {"BATCHSIZE_PER_REPLICA": batch},
            test=labels | {"BATCHSIZE_PER_REPLICA": batch + 1},
            MODEL={"FEATURE_EVAL_SETTINGS": frozen, "HEAD": {"PARAMS": [["mlp", {"dims": ["auto", 3]}]]}},
            LOSS={"CROSS_ENTROPY": {"WEIGHT": [1.0, 3.0, 0.5]}},
        )
        results = run(work, run_dir)
        step = next(record["loss"] for record in read_metrics(run_dir) if record["kind"] == "train")
        found.append([step, results["train_loss"], results["test_loss"]])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0][0] == pytest.approx(found[0][1], rel=1e-6)


def test_parameters_are_watched(tmp_path: Path) -> None:
    event = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"TENSORBOARD": {"ENABLED": True, "LOG_PARAMS": True, "LOG_PARAMS_EVERY_N_ITERS": 2}}
    run(job(LOGGERS=options), tmp_path)
    found = event.EventAccumulator(str(tmp_path / "tb_logs")).Reload()
    assert "parameters/trunk._feature_blocks.conv1.weight" in found.Tags()["histograms"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"METERS": {"NAMES": ["mean_ap_list_meter"]}}, r"mean_ap_list_meter does not go with labels of one class"),
        (
            {"train": {"TRANSFORMS": [*VIEWS[:1], {"name": "Grayscale"}, VIEWS[1]]}},
            r"TRAIN.TRANSFORMS: makes images of 1",
        ),
        (
            {"train": {"TRANSFORMS": [*VIEWS, {"name": "Normalize", "mean": [0.5, 0.5], "std": [1.0, 1.0]}]}},
            r"TRAIN.TRANSFORMS: Normalize does not fit images of 3 channels",
        ),
        (
            {
                "MODEL": {"FEATURE_EVAL_SETTINGS": {"LINEAR_EVAL_FEAT_POOL_OPS_MAP": [["res3", ["Identity", []]]]}},
                "test": {"TRANSFORMS": [{"name": "Resize", "size": [32, 32]}, VIEWS[1]]},
            },
            r"TEST.TRANSFORMS: images of 32x32 do not fit the heads",
        ),
    ],
)
def test_mistakes_are_found_before_the_first_step(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(job(**config), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_cluster_numbers_against_named_classes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "x.npy", np.arange(8) % 3)
    named = {"LABEL_ALIGNMENT": "position", "LABEL_PATHS": [str(tmp_path / "names.npy")]}
    np.save(tmp_path / "names.npy", np.array(["owl", "elk", "owl", "yak"] * 2))
    numbers = {"LABEL_PATHS": [str(tmp_path / "x.npy")], "LABEL_ALIGNMENT": "position"}
    with caplog.at_level(logging.WARNING):
        run(job(train=numbers, test=named), tmp_path)
    assert "class numbers without names" in caplog.text
    assert json.loads((tmp_path / "test_label_to_index_map.json").read_text()) == {"elk": 0, "owl": 1, "yak": 2}
    assert not (tmp_path / "train_label_to_index_map.json").exists()
