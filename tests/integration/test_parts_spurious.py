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

STAGE_TWO = "{patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2, reg_tokens: 1}"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    return load_file(sorted(stage.glob("checkpoints/**/*.safetensors"))[-1])


def test_the_table_has_the_three_models_side_by_side(run_dir: Path) -> None:
    table = json.loads((run_dir / "table.json").read_text())
    found = results(run_dir)
    assert [row[0] for row in table["rows"]] == ["whole images", "true masks", "learned masks"]
    for row, stage in zip(table["rows"], ("unmasked", "true_masks", "learned_masks")):
        assert row[1] == found[f"{stage}/test_top_1"]
        of_groups = [found[f"{stage}/test_top_1_of_{bird}_on_{place}"] for bird in BIRDS for place in ("land", "water")]
        assert row[2] == min(of_groups)
    assert 0 < table["rows"][2][3] < 100


BIRDS = ("landbird", "waterbird")
