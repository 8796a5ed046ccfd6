"""The pipeline parts/toybirds_spurious on a handful of drawn birds: what each of its models sees, and what it reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.stage_runs import start
from tests.integration.training_runs import results
from vissl_like.data import toybirds

BIRDS = ("landbird", "waterbird")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the recipe with one epoch of each stage on 48 images."""
    folder = tmp_path_factory.mktemp("spurious")
    birds = folder / "birds"
    toybirds.make_folder(birds, lambda target: toybirds.write_waterbirds(target, counts=(48, 4, 16)))
    done = start(
        "pipeline",
        folder / "run",
        "config=parts/toybirds_spurious",
        f"config.DATA.TRAIN.DATA_PATHS=[{birds}]",
        f"config.DATA.TEST.DATA_PATHS=[{birds}]",
        "config.OPTIMIZER.NUM_EPOCHS=1",
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def weights(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / "checkpoints" / "last" / "model.safetensors")


def test_the_table_has_the_three_models_side_by_side(run_dir: Path) -> None:
    table = json.loads((run_dir / "table.json").read_text())
    found = results(run_dir)
    assert [row[0] for row in table["rows"]] == ["whole images", "true masks", "learned masks"]
    for row, stage in zip(table["rows"], ("unmasked", "true_masks", "learned_masks")):
        groups = [found[f"{stage}/test_top_1_of_{bird}_on_{place}"] for bird in BIRDS for place in ("land", "water")]
        assert row[1] == pytest.approx(sum(groups) / 4)
        assert row[2] == min(groups)
    assert 0 < table["rows"][2][3] < 100


def test_stage_two_leaves_the_learned_parts_as_they_were(run_dir: Path) -> None:
    before, after = weights(run_dir / "parts"), weights(run_dir / "two_stage")
    trunk = {name: value for name, value in before.items() if name.startswith("trunk.")}
    assert trunk
    for name, value in trunk.items():
        assert torch.equal(after[name.replace("trunk.", "trunk.stage_1.", 1)], value)
    assert torch.equal(after["heads.stage_1.prototypes.weight"], before["heads.prototypes.weight"])
    assert not torch.equal(before["heads.prototypes.weight"], torch.zeros_like(before["heads.prototypes.weight"]))
