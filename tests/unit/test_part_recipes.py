"""The recipes of the published commands of part discovery pass a dry run on small folders of the same layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import part_folders
from vissl_like.config.check import load_job
from vissl_like.config.plan import make_plan
from vissl_like.config.recipes import Library
from vissl_like.launch.main import main

#: Recipe -> folder, and what a dry run says of the images.
RECIPES = {
    "ifam_cub_k8": ("birds", "8 classes, tensors 3x518x518"),
    "ifam_waterbirds": ("birds", "2 classes, tensors 3x518x518"),
    "ifam_metashift": ("meta_shift", "2 classes, tensors 3x224x224"),
    "ifam_siim_acr": ("siim_acr", "2 classes, tensors 3x518x518"),
    "pdiscoformer_cub_k8": ("birds", "8 classes, tensors 3x518x518"),
    "resnet50_cub_k8": ("birds", "8 classes, tensors 3x448x448"),
    "resnet101_cub_k8": ("birds", "8 classes, tensors 3x448x448"),
}
#: Recipes that differ from one of those in the number of parts.
OTHER_NUMBERS = {
    f"{family}_cub_k{count}": (f"{family}_cub_k8", count) for family in ("ifam", "pdiscoformer") for count in (4, 16)
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parts")
    return {
        "birds": part_folders.write_birds(root / "CUB_200_2011", train=128),
        "meta_shift": part_folders.write_meta_shift(root / "MetaDatasetCatDog", train=128),
        "siim_acr": part_folders.write_siim_acr(root / "siim_acr", train=128),
    }


def test_every_published_command_has_its_recipe_here() -> None:
    published = {name.partition("/")[2] for name in Library().files if name.startswith("parts/")}
    assert {*RECIPES, *OTHER_NUMBERS} == {
        name for name in published if not name.startswith("toybirds") and name != "ifam"
    }


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_pass_a_dry_run(name: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, images = RECIPES[name]
    paths = [f"config.DATA.{split}.DATA_PATHS=[{folders[folder]}]" for split in ("TRAIN", "TEST")]
    code = main([f"config=parts/{name}", *paths, "config.RUN.DRY_RUN=true"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert f"TRAIN: 128 images, {images}" in out
    assert "fetched and checked when the run starts" in out  # a dry run asks no server


@pytest.mark.parametrize("name", OTHER_NUMBERS)
def test_other_numbers_of_parts(name: str) -> None:
    plain, count = OTHER_NUMBERS[name]
    assert (
        load_job([f"config=parts/{name}"]).job
        == load_job([f"config=parts/{plain}", f"config.MODEL.PARTS.NUM_PARTS={count}"]).job
    )


@pytest.mark.parametrize(
    ("name", "lr", "batch"), [("ifam_cub_k8", 2.828e-6, 128), ("pdiscoformer_cub_k8", 1.414e-6, 32)]
)
def test_learning_rates_follow_the_root_of_the_batch(name: str, lr: float, batch: int) -> None:
    """The published rate at the published batch, 1e-6 for 16 images, and the root in between."""
    config = load_job([f"config=parts/{name}"]).job.config
    per_process = config.DATA.TRAIN.BATCHSIZE_PER_REPLICA
    for processes in (1, batch // per_process, 16):
        found = make_plan(config, num_processes=processes, device="cpu", num_train=5994, cores=2, engine_name="train")
        assert found.lr.START_VALUE == pytest.approx(lr * (processes * per_process / batch) ** 0.5, rel=1e-12)
        assert found.lr.START_VALUE == pytest.approx(1e-6 * (processes * per_process / 16) ** 0.5, rel=2e-4)
