"""What one run leaves for another: heads whose sizes the weights file knows, and averages of weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.integration.stage_runs import start
from tests.integration.test_failures import common, data, make_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 40)


@pytest.fixture(scope="module")
def student(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on seven pseudo-labels, with an average of its weights."""
    folder = tmp_path_factory.mktemp("student")
    np.save(folder / "y.npy", np.arange(40) % 7)
    labels = [f"config.DATA.TRAIN.LABEL_PATHS=[{folder / 'y.npy'}]", "config.DATA.TRAIN.LABEL_ALIGNMENT=position"]
    tested = [*data("TEST", images), f"config.DATA.TEST.LABEL_PATHS=[{folder / 'y.npy'}]"]
    average = [
        "config.MODEL.EMA.ENABLED=true",
        "config.MODEL.EMA.DECAY=0.5",
        "config.DATA.TEST.LABEL_ALIGNMENT=position",
    ]
    done = start("train", folder / "run", *data("TRAIN", images), *tested, *common(), *labels, *average)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_predictions_have_as_many_outputs_as_the_weights(images: Path, student: Path, tmp_path: Path) -> None:
    weights = f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={student}"
    done = start("extract_label_predictions", tmp_path / "run", *data("TRAIN", images), *common(), weights)
    assert done.returncode == 0, done.stderr
    assert "has labels of 2 classes, the heads have 7 outputs" in done.stderr
    assert np.load(tmp_path / "run" / "predictions" / "TRAIN" / "predictions.npy").shape == (40, 5)
    report = json.loads((tmp_path / "run" / "weights_report.json").read_text())
    assert report["heads"]["share"] == 1.0
    heads = [row for row in report["tensors"] if (row["model"] or "").startswith("heads.")]
    assert heads and all(row["model_shape"] == row["file_shape"] and row["model_shape"][0] == 7 for row in heads)
    images_given = start("extract_label_predictions", tmp_path / "dry", *data("TRAIN", images), *common(), weights, DRY)
    assert images_given.returncode == 0 and "heads: 455 parameters in 1" in images_given.stdout  # 64 x 7 + 7


DRY = "config.RUN.DRY_RUN=true"


@pytest.mark.parametrize("is_enabled", [True, False])
def test_a_test_alone_also_tests_the_average(is_enabled: bool, images: Path, student: Path, tmp_path: Path) -> None:
    labels = student.parent / "y.npy"
    given = [
        *data("TEST", images),
        f"config.DATA.TEST.LABEL_PATHS=[{labels}]",
        "config.DATA.TEST.LABEL_ALIGNMENT=position",
    ]
    more = ["config.TEST_ONLY=true", f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={student}"]
    done = start("train", tmp_path / "run", *given, *common(), *more, f"config.MODEL.EMA.ENABLED={is_enabled}")
    assert done.returncode == 0, done.stderr
    trained, found = (json.loads((run / "results.json").read_text()) for run in (student, tmp_path / "run"))
    assert trained["test_ema_loss"] != trained["test_loss"] == found["test_loss"]
    if is_enabled:
        assert found["test_ema_loss"] == trained["test_ema_loss"]
        assert found["test_ema_top_1"] == trained["test_ema_top_1"]
    else:
        assert not [key for key in found if "ema" in key]
