"""Part discovery from the command line on drawn birds: warm-up, training, measures and pictures, by one and two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.integration.stage_runs import start
from tests.integration.training_runs import losses, records, results
from vissl_like.data import toybirds

#: A smaller trunk, and every step is logged.
QUICK = [
    "config.MODEL.TRUNK.OPTIONS={width: 8, stem: [8, 8]}",
    "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=8",
    "config.DATA.TRAIN_SPLIT.FRACTION=1",
    "config.LOG_FREQUENCY=1",
]
#: Nothing is drawn at random in the model or the data, and the transformation of the equivariance loss is always the same.
CALM = [
    "config.MODEL.PARTS={GUMBEL_SOFTMAX: false, PART_DROPOUT: 0, PROTOTYPE_INIT: random}",
    "config.LOSS.PARTS={DEGREES: 0, TRANSLATE_X: 0, TRANSLATE_Y: 0, SCALE_L: 1.25, SCALE_U: 1.25}",
    "config.LOSS.PARTS.CONCENTRATION_LOSS=10",
    "config.DATA.TRAIN.TRANSFORMS=[{name: Resize, size: 64}, {name: ToTensor}]",
    "config.OPTIMIZER={NAME: sgd, NUM_EPOCHS: 2}",
    "config.OPTIMIZER.PARAM_SCHEDULERS.LR={NAME: constant, START_VALUE: 0.05}",
]


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "birds"
    toybirds.make_folder(folder, lambda target: toybirds.write_cub(target, train=32, test=24))
    return folder


def run(recipe: str, run_dir: Path, birds: Path, *overrides: str, ranks: int = 1) -> dict[str, Any]:
    """results.json of a recipe of configs/config/parts on these birds."""
    splits = ["TRAIN"] if recipe == "toybirds_warmup" else ["TRAIN", "TEST"]
    data = [f"config.DATA.{split}.DATA_PATHS=[{birds}]" for split in splits]
    engine = "evaluate_parts" if recipe.endswith("evaluate") else "train"
    done = start(engine, run_dir, f"config=parts/{recipe}", *QUICK, *data, *overrides, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return results(run_dir)


def weights_of(run_dir: Path) -> str:
    return f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={run_dir}"


@pytest.fixture(scope="module")
def trained(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short training on a warmed-up trunk, with prototypes by k-means."""
    folder = tmp_path_factory.mktemp("trained")
    run("toybirds_warmup", folder / "warmup", birds, "config.OPTIMIZER.NUM_EPOCHS=1")
    run("toybirds_train", folder / "parts", birds, weights_of(folder / "warmup"), "config.OPTIMIZER.NUM_EPOCHS=1")
    return folder / "parts"


def test_measures_and_pictures_do_not_depend_on_the_number_of_processes(
    birds: Path, trained: Path, tmp_path: Path
) -> None:
    """24 test images in batches of 7: one process has three of them, the other one the last, which is smaller."""
    options = [
        *(weights_of(trained), "config.EVALUATE_PARTS.BASELINES=true"),
        *("config.RUN.REPORT=true", "config.PART_MAPS.SAVING_PROB=1", "config.DATA.TEST.BATCHSIZE_PER_REPLICA=7"),
    ]
    alone = run("toybirds_evaluate", tmp_path / "alone", birds, *options)
    both = run("toybirds_evaluate", tmp_path / "both", birds, *options, ranks=2)
    names = ("nmi", "ari", "keypoint_error", "foreground_iou")
    assert {*names, "test_top_1", "keypoint_error_of_mean"} <= set(alone)
    assert {f"{which}_{name}" for which in ("random", "oracle") for name in names} <= set(alone)
    assert alone["oracle_nmi"] > alone["random_nmi"] and alone["oracle_foreground_iou"] > 75
    measures = {name: value for name, value in alone.items() if isinstance(value, float)}
    assert {name: both[name] for name in measures} == pytest.approx(measures, rel=1e-6)
    pictures = sorted(file.name for file in (tmp_path / "alone" / "part_maps").iterdir())
    assert pictures == [f"0000_{batch:05d}.{kind}" for batch in range(4) for kind in ("jpg", "json")]
    for name in pictures:
        assert (tmp_path / "alone" / "part_maps" / name).read_bytes() == (
            tmp_path / "both" / "part_maps" / name
        ).read_bytes()
    page = (tmp_path / "both" / "report.html").read_text()
    assert all(word in page for word in ("random maps", "annotated parts", "mean position", "data:image/jpeg"))


def test_a_process_without_images_takes_part(birds: Path, tmp_path: Path) -> None:
    """All test images are one batch, which the second of two processes has."""
    options = ["config.EVALUATE_PARTS={PROTOCOLS: [keypoints], BASELINES: true}"]
    options += ["config.DATA.TEST.BATCHSIZE_PER_REPLICA=24"]
    alone = run("toybirds_evaluate", tmp_path / "alone", birds, *options)
    both = run("toybirds_evaluate", tmp_path / "both", birds, *options, ranks=2)
    assert {"nmi", "random_nmi", "oracle_nmi"} <= set(alone)
    assert both == pytest.approx(alone, rel=1e-6)


def test_two_processes_train_as_one_with_the_batch_of_both(birds: Path, trained: Path, tmp_path: Path) -> None:
    """Every term is a mean over images but the presence of parts: by default, as in the original, each process must see
    every part, which asks for more than that they are seen in the whole batch.
    """
    options = [*CALM, weights_of(trained), "config.LOSS.PARTS.PRESENCE_BATCH=global"]
    run("toybirds_train", tmp_path / "alone", birds, *options, "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=16")
    run("toybirds_train", tmp_path / "both", birds, *options, ranks=2)
    assert len(losses(tmp_path / "alone")) == 4
    for ours, theirs in zip(records(tmp_path / "both"), records(tmp_path / "alone"), strict=True):
        terms = {name: value for name, value in theirs.items() if name.startswith(("loss", "grad_norm"))}
        assert {name: ours[name] for name in terms} == pytest.approx(terms, rel=1e-5, abs=1e-7)
    ours, theirs = (
        load_file(tmp_path / name / "checkpoints" / "last" / "model.safetensors") for name in ("both", "alone")
    )
    for name, tensor in theirs.items():
        assert ours[name].numpy() == pytest.approx(tensor.numpy(), rel=1e-4, abs=1e-5)

    run(
        "toybirds_train", tmp_path / "each", birds, *CALM, weights_of(trained), "config.OPTIMIZER.NUM_EPOCHS=1", ranks=2
    )
    ours, theirs = ({**records(tmp_path / name)[0]} for name in ("each", "alone"))
    assert ours.pop("loss_presence") > theirs.pop("loss_presence") + 1e-4
    assert ours["loss"] > theirs["loss"]
    terms = {name: value for name, value in theirs.items() if name.startswith("loss_")}
    assert {name: ours[name] for name in terms} == pytest.approx(terms, rel=1e-5, abs=1e-7)
