"""The pipelines parts/toybirds_k8 and parts/toybirds_ablation on a handful of drawn birds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.stage_runs import start
from tests.integration.training_runs import records, results
from vissl_like.config.check import compose_stage, load_job
from vissl_like.config.stages import changed, stage_jobs
from vissl_like.data import toybirds
from vissl_like.launch.main import main


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a folder of 40 training images, of which a batch of 32 is trained on, and 16 test images."""
    folder = tmp_path_factory.mktemp("toybirds") / "birds"
    toybirds.make_folder(folder, lambda target: toybirds.write_cub(target, train=40, test=16))
    given = (f"DATA_PATHS=[{folder}]", "DATA_SOURCES=[toybirds]")
    return [f"config.DATA.{split}.{option}" for split in ("TRAIN", "TEST") for option in given]


def weights(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / "checkpoints" / "last" / "model.safetensors")


def test_parts_before_and_after_training_stand_side_by_side(birds: list[str], tmp_path: Path) -> None:
    done = start("pipeline", tmp_path / "run", "config=parts/toybirds_k8", *birds, "config.OPTIMIZER.NUM_EPOCHS=2")
    assert done.returncode == 0, done.stderr
    table, found = json.loads((tmp_path / "run" / "table.json").read_text()), results(tmp_path / "run")
    names = ("nmi", "ari", "foreground_iou", "keypoint_error", "test_top_1")
    expected = [
        [title, *(found[f"{stage}/{name}"] for name in names)]
        for title, stage in (("epoch 0 (k-means prototypes)", "measured_epoch_0"), ("after training", "measured"))
    ]
    assert table["rows"] == expected and expected[0][1:] != expected[1][1:]
    chance, oracle, mean, _ = table["notes"]
    for note, measures in (
        (chance, ("random_nmi", "random_foreground_iou", "random_keypoint_error")),
        (oracle, ("oracle_nmi", "oracle_ari", "oracle_keypoint_error")),
        (mean, ("keypoint_error_of_mean",)),
    ):
        numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", note)]
        assert numbers == pytest.approx([found[f"measured/{name}"] for name in measures], rel=1e-2)

    warm, begun, trained = (weights(tmp_path / "run" / stage) for stage in ("warmup", "epoch_0", "parts"))
    trunk = [name for name in begun if name.startswith("trunk.")]
    assert trunk and all(torch.equal(begun[name], warm[name]) for name in trunk)
    assert not torch.equal(trained["heads.prototypes.weight"], begun["heads.prototypes.weight"])
    assert [line["kind"] for line in records(tmp_path / "run" / "epoch_0")].count("train") == 0
    assert [line["kind"] for line in records(tmp_path / "run" / "parts")].count("train") == 2


#: Stage -> what its configuration has otherwise than the complete recipe, and the weights that it starts from.
SWITCHES: dict[str, tuple[dict[str, Any], str]] = {
    "random_prototypes": ({}, "random_start"),
    "no_warmup": ({}, "cold_start"),
    "no_area_term": ({"LOSS": {"PARTS": {"BACKGROUND_AREA_LOSS": 0}}}, "start"),
    "no_background_terms": ({"LOSS": {"PARTS": {"BACKGROUND_AREA_LOSS": 0, "ENFORCED_PRESENCE_LOSS": 0}}}, "start"),
}


def test_the_ablation_leaves_out_one_ingredient_at_a_time(
    birds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ["config=parts/toybirds_ablation", *birds]
    jobs = {stage.name: stage.job for stage in stage_jobs(load_job(page).job, tmp_path, compose_stage)}
    configs: dict[str, Any] = {name: job.config.model_dump(mode="json") for name, job in jobs.items()}
    sources = {name: config["MODEL"]["WEIGHTS_INIT"].pop("PARAMS_FILE") for name, config in configs.items()}
    for config in configs.values():
        del config["RUN"]
    for name, (difference, source) in SWITCHES.items():
        assert changed(configs[name], configs["complete"]) == difference
        assert sources[name] == str(tmp_path / source) and sources[f"measured_{name}"] == str(tmp_path / name)
    starts = {name: changed(configs[name], configs["start"]) for name in ("random_start", "cold_start")}
    assert starts == {"random_start": {"MODEL": {"PARTS": {"PROTOTYPE_INIT": "random"}}}, "cold_start": {}}
    assert [sources[name] for name in ("start", "random_start", "cold_start")] == [str(tmp_path / "warmup")] * 2 + [""]

    assert main([*page, f"config.RUN.DIR={tmp_path / 'run'}", "config.RUN.DRY_RUN=true"]) == 0
    out = capsys.readouterr().out
    for name, (_, source) in SWITCHES.items():
        assert f"{name}: train of parts/toybirds_train, after {source} " in out
        assert f"measured_{name}: evaluate_parts of parts/toybirds_evaluate, after {name} " in out
