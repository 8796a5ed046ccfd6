"""What would stop a run for want of images or features is said by the dry run, and at the start before anything is made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vissl_like.analysis.features import FeatureWriter, Subject
from vissl_like.data.source import unicode_array
from vissl_like.launch.main import main

ROWS = 12
DRY = "config.RUN.DRY_RUN=true"
TO_RUN = "config.RUN.DIR=r"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_features(
    folder: Path, split: str, *, layers: tuple[str, ...] = ("res5",), weights: str = "w", classes: int = 2
) -> None:
    """Features of ROWS images, as an extraction leaves them."""
    FeatureWriter.prepare(
        folder / split,
        Subject(
            split=split,
            paths=unicode_array(f"{split}/{row}.png" for row in range(ROWS)),
            stamps=np.arange(ROWS),
            labels=np.arange(ROWS) % classes,
            root="/images",
            name="toy",
            fingerprint=f"f {split}",
            class_names=["a", "b"],
            identity={"weights": weights, "model": "m"},
        ),
        layers=dict.fromkeys(layers, (3,)),
        dtype="float32",
        shard_rows=5,
        block_rows=4,
    )
    writer, generator = FeatureWriter(folder / split), np.random.default_rng(0)
    for block, (start, stop) in enumerate(writer.blocks):
        writer.write(block, {name: generator.normal(size=(stop - start, 3)).astype(np.float32) for name in layers})
    writer.close()
    FeatureWriter.finish(folder / split)


def refusals(capsys: pytest.CaptureFixture[str], *overrides: str, code: int = 3) -> str:
    """What the dry run says; a start says the same and makes no run folder."""
    texts = []
    for more in ([DRY], []):
        assert main([*overrides, TO_RUN, *more]) == code
        texts.append(capsys.readouterr().err.strip().splitlines()[-1])
    assert texts[0] == texts[1]
    assert not Path("r").exists()
    return texts[0]


CLUSTER = ["engine_name=cluster_features", "config.CLUSTERFIT.FEATURES.PATH=f", "config.CLUSTERFIT.NUM_CLUSTERS=4"]
EVALUATE = ["engine_name=evaluate", "config.EVALUATE.FEATURES_PATH=f", "config.NEAREST_NEIGHBOR.TOPK=[3]"]


def test_layers_of_the_features_that_are_clustered(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_features(workplace / "f", "TRAIN", layers=("res4", "res5"))
    key = "config.CLUSTERFIT.FEATURES.LAYER_NAME"
    said = refusals(capsys, *CLUSTER)
    assert f"{key}='': f/TRAIN has several layers; name one. Extracted: res4, res5." in said
    said = refusals(capsys, *CLUSTER, f"{key}=res3")
    assert f"{key}='res3': f/TRAIN has no such layer; did you mean 'res" in said and "Extracted: res4, res5." in said
    assert main([*CLUSTER, f"{key}=res4", TO_RUN, DRY]) == 0


@pytest.mark.parametrize(
    ("override", "code", "text"),
    [
        ("config.CLUSTERFIT.NUM_CLUSTERS=13", 3, "NUM_CLUSTERS=13: f/TRAIN has only 12 rows. Use at most 12 clusters"),
        ("config.CLUSTERFIT.FEATURES.DIMENSIONALITY_REDUCTION=4", 2, "REDUCTION=4: 12 rows of 3 dimensions have at most 3"),
        ("config.CLUSTERFIT.DATA_LIMIT=3", 2, "CLUSTERFIT.DATA_LIMIT=3: fewer rows than config.CLUSTERFIT.NUM_CLUSTERS=4"),
        ("config.CLUSTERFIT.FEATURES.PATH=g", 3, "no such file or folder; did you mean ./f?"),
        ("config.CLUSTERFIT.FEATURES.DATA_PARTITION=VAL", 3, "no extracted features of split VAL there (found: TRAIN)"),
    ],
)  # fmt: skip
def test_numbers_and_paths(
    workplace: Path, capsys: pytest.CaptureFixture[str], override: str, code: int, text: str
) -> None:
    write_features(workplace / "f", "TRAIN")
    assert text in refusals(capsys, *CLUSTER, override, code=code)


@pytest.mark.parametrize("given", ["run", "run/features/TRAIN"])
def test_the_folder_beside_the_features(workplace: Path, capsys: pytest.CaptureFixture[str], given: str) -> None:
    write_features(workplace / "run" / "features", "TRAIN")
    said = refusals(capsys, *CLUSTER, f"config.CLUSTERFIT.FEATURES.PATH={given}")
    assert said.endswith("no extracted features of split TRAIN there (found: none). They are in 'run/features'.")


@pytest.mark.parametrize("name", ["res5/shard_00001.npy", "res5/sums.npy", "images.npy", "labels.npy"])
@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_damaged_features(workplace: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str) -> None:
    write_features(workplace / "f", "TRAIN")
    file = workplace / "f" / "TRAIN" / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-4])
    said = refusals(capsys, *CLUSTER)
    problem = said.partition(f"error: f/TRAIN/{name}: ")[2]
    assert problem.startswith("missing.") if damage == "gone" else f"{file.stat().st_size} bytes" in problem
    assert "un the extraction again" in said


def test_an_interrupted_extraction_and_splits_of_two_models(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_features(workplace / "f", "TRAIN")
    write_features(workplace / "f", "TEST", weights="other")
    assert "come from different models (weights differ)" in refusals(capsys, *CLUSTER)
    assert "were extracted with different weights" in refusals(capsys, *EVALUATE)
    (workplace / "f" / "TRAIN" / "manifest.json").rename(workplace / "f" / "TRAIN" / "partial.json")
    assert "f/TRAIN: the extraction was interrupted. Run it again" in refusals(capsys, *CLUSTER)


@pytest.mark.parametrize(
    ("override", "code", "text"),
    [
        ("config.LINEAR_PROBE.LAYERS=[res6]", 2, "config.LINEAR_PROBE.LAYERS='res6': not extracted; did you mean 'res5'?"),
        ("config.LOW_SHOT.SAMPLES_PER_CLASS=[2,7]", 3, "SAMPLES_PER_CLASS=7: class 0 has only 6 training images"),
        ("config.NEAREST_NEIGHBOR.TOPK=[3]", 0, ""),
    ],
)  # fmt: skip
def test_features_that_are_evaluated(
    workplace: Path, capsys: pytest.CaptureFixture[str], override: str, code: int, text: str
) -> None:
    for split in ("TRAIN", "TEST"):
        write_features(workplace / "f", split)
    protocols = "config.EVALUATE.PROTOCOLS=[knn,linear,low_shot]"
    few = ["config.LOW_SHOT.SAMPLES_PER_CLASS=[2]", protocols, override]
    if code:
        assert text in refusals(capsys, *EVALUATE, *few, code=code)
    else:
        assert main([*EVALUATE, *few, TO_RUN, DRY]) == 0


def test_a_probe_of_one_class_is_refused_before_anything_is_measured(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("TRAIN", "TEST"):
        write_features(workplace / "f", split, classes=1)
    said = refusals(capsys, *EVALUATE)
    assert "f/TRAIN: all labels of TRAIN are of one class ([0]), but a probe" in said


def make_images(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


CHAIN = ["config=pretrain/clusterfit/clusterfit_folder", "config.DATA.TRAIN.DATA_PATHS=[images]"]


def test_a_chain_with_fewer_images_than_clusters(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(workplace / "images", 6)
    said = refusals(capsys, *CHAIN)
    assert said.startswith("error: stage 'clusters': config.CLUSTERFIT.NUM_CLUSTERS=100: TRAIN has only 6 images.")
    said = refusals(capsys, *CHAIN, "config.CLUSTERFIT.NUM_CLUSTERS=6", "config.DATA.TRAIN.DATA_LIMIT=4")
    assert "NUM_CLUSTERS=6: TRAIN has only 4 images. Use at most 4 clusters, or more images." in said


def test_a_training_with_fewer_images_than_a_step_needs(capsys: pytest.CaptureFixture[str]) -> None:
    said = ["config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=500", "config.DATA.TRAIN.DROP_LAST=true", DRY]
    assert main(["config=debug/supervised_synthetic", *said]) == 3
    assert "64 images are too few for one step, which needs 500 on each of 1 process " in capsys.readouterr().err


@pytest.mark.parametrize("overrides", [["config=debug/supervised_synthetic"], CHAIN])
def test_an_empty_folder_is_found_before_a_process_starts(
    workplace: Path, capsys: pytest.CaptureFixture[str], overrides: list[str]
) -> None:
    (workplace / "images" / "deep").mkdir(parents=True)
    (workplace / "images" / "deep" / "notes.txt").touch()
    folder = ["config.DATA.TRAIN.DATA_SOURCES=[disk_folder]", "config.DATA.TRAIN.DATA_PATHS=[images]"]
    said = refusals(capsys, *overrides, *folder)
    assert "config.DATA.TRAIN.DATA_PATHS.0='images': no image in this folder or below it. Known extensions: " in said
    assert said.endswith("Put images there, or give another folder.")


@pytest.mark.parametrize(
    ("source", "path", "text"),
    [
        ("disk_filelist", "images", "this is a folder, not a list. For a folder of images use DATA_SOURCES=[disk_folder]."),
        ("disk_filelist", "none.txt", "the list is empty. It names one image per row (.npy) or line (.txt)."),
        ("disk_folder", "none.txt", "this is a file, not a folder. For a .npy or .txt list use DATA_SOURCES=[disk_filelist]."),
    ],
)  # fmt: skip
def test_folders_and_lists_are_told_apart(
    workplace: Path, capsys: pytest.CaptureFixture[str], source: str, path: str, text: str
) -> None:
    make_images(workplace / "images", 6)
    (workplace / "none.txt").touch()
    given = [f"config.DATA.TRAIN.DATA_SOURCES=[{source}]", f"config.DATA.TRAIN.DATA_PATHS=[{path}]"]
    said = refusals(capsys, "config=debug/supervised_synthetic", *given)
    assert "config.DATA.TRAIN.DATA_PATHS.0=" in said and said.endswith(text)


def test_several_layers_need_a_name_before_they_are_extracted(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(workplace / "images", 6)
    both = "[[res4,[Identity,[]]],[flatten,[Identity,[]]]]"
    said = refusals(
        capsys, "engine_name=cluster_features", "config.CLUSTERFIT.FEATURES.EXTRACT=true",
        "config.DATA.TRAIN.DATA_SOURCES=[disk_folder]", "config.DATA.TRAIN.DATA_PATHS=[images]",
        f"config.MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP={both}", code=2,
    )  # fmt: skip
    assert "LAYER_NAME='': this run extracts several layers; name the one to cluster: res4, flatten." in said
