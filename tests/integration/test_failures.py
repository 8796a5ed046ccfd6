"""Files that are lost or damaged between stages, and images that cannot be read: named, mended, never used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.stage_runs import start
from vissl_like.core import checkpoint

CLUSTERS = [
    "config.CLUSTERFIT.NUM_CLUSTERS=4",
    "config.CLUSTERFIT.NUM_ITER=4",
    "config.CLUSTERFIT.CLUSTER_BACKEND=torch",
]


def data(split: str, images: Path, *, source: str = "disk_folder") -> list[str]:
    return [
        f"config.DATA.{split}.DATA_SOURCES=[{source}]",
        f"config.DATA.{split}.DATA_PATHS=[{images}]",
        f"config.DATA.{split}.TRANSFORMS=[{{name: Resize, size: [24, 24]}}, {{name: ToTensor}}]",
        f"config.DATA.{split}.BATCHSIZE_PER_REPLICA=10",
    ]


def common() -> list[str]:
    return [
        *(
            "config.DATA.NUM_DATALOADER_WORKERS=0",
            "config.MODEL.TRUNK.NAME=resnet_small",
            "config.OPTIMIZER.NUM_EPOCHS=1",
        ),
        *("config.EXTRACT_FEATURES.SHARD_ROWS=40", *CLUSTERS),
    ]


def make_images(root: Path, count: int, *, suffix: str = ".png") -> Path:
    """Two classes of images, one dark and one bright."""
    generator = np.random.default_rng(0)
    for i in range(count):
        folder = root / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 100, (28, 28, 3)) + 100 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}{suffix}")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.suffix == ".npy" or file.name == "manifest.json"]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(files)}


# --------------------------------------------------------------------------------------------------- between two stages
@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 120)


def damage(file: Path, kind: str) -> None:
    """Remove it, cut 40 bytes off, or change a byte in the middle."""
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    if kind == "removed":
        file.unlink()
    else:
        file.write_bytes(content[:-40] if kind == "truncated" else content)


def test_damage_between_stages_is_named_and_only_what_is_lost_is_made_again(images: Path, tmp_path: Path) -> None:
    def extract(counted: Path | str = "") -> None:
        done = start(
            "extract_features", tmp_path / "extract", *data("TRAIN", images, source="counted_folder"), *common(),
            env={"COUNTED": str(counted)} if counted else {},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def cluster(name: str = "cluster"):
        path = f"config.CLUSTERFIT.FEATURES.PATH={tmp_path / 'extract' / 'features'}"
        return start("cluster_features", tmp_path / name, *common(), path)

    extract()
    whole = contents(tmp_path / "extract")
    for number, (kind, name, rows) in enumerate(
        [
            ("truncated", "flatten/shard_00001.npy", range(40, 80)),
            ("removed", "flatten/shard_00002.npy", range(80, 120)),
            ("changed", "flatten/shard_00000.npy", range(30, 40)),
            ("removed", "flatten/sums.npy", range(120)),
            ("truncated", "images.npy", ()),
        ]
    ):
        file = tmp_path / "extract" / "features" / "TRAIN" / name
        damage(file, kind)
        failed = cluster(f"cluster_{number}")
        assert failed.returncode == 3 and "Traceback" not in failed.stderr, failed.stderr
        assert f"{file}: " in failed.stderr and "un the extraction again" in failed.stderr
        assert not list((tmp_path / f"cluster_{number}" / "clusters").glob("*labels*"))
        if kind == "changed":  # what only its checksum shows is mended as the message says
            assert "Remove this file" in failed.stderr
            file.unlink()
            rows = range(40)
        counted = tmp_path / f"counted_{number}"
        extract(counted)
        assert set(map(int, counted.read_text().split())) - {0} == set(rows) - {0}
        assert contents(tmp_path / "extract") | {"manifest.json": b""} == whole | {"manifest.json": b""}

    assert cluster().returncode == 0
    whole = contents(tmp_path / "cluster" / "clusters")
    labels = tmp_path / "cluster" / "clusters" / "labels.npy"
    train = [*data("TRAIN", images), *common(), f"config.DATA.TRAIN.LABEL_PATHS=[{labels}]"]
    for number, (kind, name) in enumerate(
        [("removed", "labels.npy"), ("truncated", "images.npy"), ("changed", "labels.npy")]
    ):
        file = labels.with_name(name)
        damage(file, kind)
        failed = start("train", tmp_path / f"train_{number}", *train)
        assert failed.returncode == 3 and "Traceback" not in failed.stderr and str(file) in failed.stderr, failed.stderr
        file.unlink(missing_ok=True)
        again = cluster()
        assert again.returncode == 0 and f"{file} is missing: what is lost is made again" in again.stderr
        assert contents(tmp_path / "cluster" / "clusters") == whole
    done = start("train", tmp_path / "train", *train)
    assert done.returncode == 0, done.stderr


def test_a_pipeline_mends_a_lost_shard_and_repeats_nothing_else(images: Path, tmp_path: Path) -> None:
    stages = (
        "[{NAME: features, ENGINE: extract_features},"
        " {NAME: clusters, ENGINE: cluster_features, CONFIG: {CLUSTERFIT: {FEATURES: {PATH: '{features}/features'}}}},"
        " {NAME: student, ENGINE: train, CONFIG: {DATA: {TRAIN: {LABEL_PATHS: ['{clusters}/clusters/labels.npy']}}}}]"
    )
    argv = [*data("TRAIN", images, source="counted_folder"), *common(), f"config.PIPELINE.STAGES={stages}"]
    assert start("pipeline", tmp_path / "run", *argv).returncode == 0
    whole = contents(tmp_path / "run" / "features" / "features")
    others = {
        file: file.stat().st_mtime_ns
        for stage in ("clusters", "student")
        for file in (tmp_path / "run" / stage).rglob("manifest.json")
    }
    damage(tmp_path / "run" / "features" / "features" / "TRAIN" / "flatten" / "shard_00001.npy", "truncated")
    (tmp_path / "run" / "manifest.json").unlink()
    counted = tmp_path / "counted"
    done = start("pipeline", tmp_path / "run", *argv, env={"COUNTED": str(counted)})
    assert done.returncode == 0, done.stderr
    assert set(map(int, counted.read_text().split())) - {0} == set(range(40, 80))
    assert contents(tmp_path / "run" / "features" / "features") == whole
    assert {file: file.stat().st_mtime_ns for file in others} == others


def test_a_damaged_checkpoint_of_an_earlier_stage(images: Path, tmp_path: Path) -> None:
    given = [*data("TRAIN", images), *common()]
    assert start("train", tmp_path / "teacher", *given, "config.CHECKPOINT.KEEP=1").returncode == 0
    [step] = checkpoint.saved_steps(tmp_path / "teacher")
    damage(tmp_path / "teacher" / "checkpoints" / checkpoint.step_name(step) / "model.safetensors", "changed")
    weights = f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={tmp_path / 'teacher'}"
    failed = start("extract_features", tmp_path / "extract", *given, weights)
    assert failed.returncode == 3 and "Traceback" not in failed.stderr
    assert str(tmp_path / "teacher") in failed.stderr and "damaged" in failed.stderr and "OVERWRITE" in failed.stderr
    assert not (tmp_path / "extract" / "features").exists()


# ----------------------------------------------------------------------------------------------- images of many kinds
@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """500 JPEGs, of which 5 (1 %) cannot be read, with the reasons; others are unusual but whole."""
    root = make_images(tmp_path_factory.mktemp("jpegs"), 500, suffix=".jpg")
    files = sorted(root.rglob("*.jpg"))
    whole = files[7].read_bytes()
    files[7].write_bytes(whole[:-60])
    files[63].write_bytes(b"")
    files[128].write_text("these are not the pixels that you are looking for\n")
    files[300].write_bytes(whole[:300])
    os.truncate(files[411], 20)
    middle = bytearray(files[200].read_bytes())
    middle[len(middle) // 2 : len(middle) // 2 + 3] = bytes(255 - byte for byte in middle[len(middle) // 2 :][:3])
    files[200].write_bytes(middle)  # other pixels, but pixels
    Image.open(files[201]).convert("CMYK").save(files[201])
    Image.fromarray(np.arange(28 * 28, dtype=np.uint16).reshape(28, 28) * 80).save(files[202], format="PNG")
    Image.open(files[203]).convert("L").save(files[203])
    reasons = {7: "truncated", 63: "empty file", 128: "not an image", 300: "truncated", 411: "not an image"}
    return root, {str(files[k]): reason for k, reason in reasons.items()}


@pytest.mark.parametrize(
    ("engine", "workers"),
    [("train", 0), ("train", 1), ("cluster_features", 0), ("evaluate", 0), ("extract_label_predictions", 0)],
)
def test_one_percent_of_unreadable_images(
    engine: str, workers: int, spoiled: tuple[Path, dict[str, str]], images: Path, tmp_path: Path
) -> None:
    root, reasons = spoiled
    given = [
        *data("TRAIN", root), *data("TEST", images), *common(), f"config.DATA.NUM_DATALOADER_WORKERS={workers}",
        *("config.MULTI_PROCESSING_METHOD=fork", "config.NEAREST_NEIGHBOR.TOPK=[5]", "config.LOW_SHOT.NUM_DRAWS=1"),
        *("config.CLUSTERFIT.FEATURES.EXTRACT=true", "config.EVALUATE.KEEP_FEATURES=true", "config.TEST_MODEL=true"),
    ]  # fmt: skip
    done = start(engine, tmp_path / "run", *given)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()[1:]
    found = {path: reason for _, path, reason in (line.split("\t") for line in lines)}
    assert set(found) == set(reasons)
    assert all(words in found[path].lower() for path, words in reasons.items()), found
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    if engine in ("cluster_features", "evaluate"):
        manifest = json.loads((tmp_path / "run" / "features" / "TRAIN" / "manifest.json").read_text())
        paths = np.load(tmp_path / "run" / "features" / "TRAIN" / "images.npy")
        assert {str(root / path) for path in paths[manifest["bad_rows"]]} == set(reasons)
        assert results["bad_images"] == 5
    if engine == "extract_label_predictions":
        targets = np.load(tmp_path / "run" / "predictions" / "TRAIN" / "targets.npy")
        assert (targets < 0).sum() == 5 and len(targets) == 500
    if engine == "evaluate":
        assert results["linear_total"] == 120 and results["linear_top1"] > 90


def test_more_than_one_percent_is_an_error(spoiled: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    root, _ = spoiled
    for engine in ("train", "extract_features"):
        failed = start(engine, tmp_path / engine, *data("TRAIN", root), *common(), "config.DATA.MAX_BAD_FRACTION=0.007")
        assert failed.returncode == 3 and "Traceback" not in failed.stderr, failed.stderr
        assert "4 of 500 images cannot be read" in failed.stderr and "bad_images.txt" in failed.stderr
        assert "MAX_BAD_FRACTION=0.007" in failed.stderr
