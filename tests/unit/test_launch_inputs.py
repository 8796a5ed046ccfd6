"""Whether what a run reads, and what it has made, is still the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from vissl_like.config.schema import Job
from vissl_like.launch import outputs
from vissl_like.launch.inputs import fingerprint


def test_a_folder_is_known_by_the_names_and_sizes_of_its_files_at_any_depth(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("a/1.jpg", "a/deep/2.jpg", "b/3.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"12345")
    first = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "b" / "3.jpg", (1, 1))
    (tmp_path / "copy" / ".hidden").touch()
    assert fingerprint(tmp_path / "copy") == first  # a copy, with other times
    (folder / "a" / "deep" / "2.jpg").write_bytes(b"123456")
    second = fingerprint(folder)
    (folder / "a" / "deep" / "2.jpg").rename(folder / "a" / "deep" / "4.jpg")
    assert len({first, second, fingerprint(folder)}) == 3
    (folder / "circle").symlink_to(folder)
    (folder / "nowhere").symlink_to(folder / "absent")
    assert len(fingerprint(folder)) == 16


def test_a_run_that_comes_out_the_same_is_the_same(tmp_path: Path) -> None:
    def finished(**content: str) -> str:
        (tmp_path / "manifest.json").write_text(json.dumps({"config_hash": "c", "complete": True, **content}))
        return fingerprint(tmp_path)

    assert finished(content="x", finished="today") == finished(content="x", finished="tomorrow")
    assert finished(content="x", finished="today") != finished(content="y", finished="today")
    assert finished(finished="today") != finished(finished="tomorrow")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_lost_and_shortened_outputs_are_noticed(tmp_path: Path, elsewhere: bool) -> None:
    run_dir = tmp_path / "run"
    folder = tmp_path / "elsewhere" if elsewhere else run_dir / "features"
    job = Job.model_validate({"engine_name": "extract_features"})
    if elsewhere:
        options = {"EXTRACT_FEATURES": {"OUTPUT_DIR": str(folder)}}
        job = Job.model_validate({"engine_name": "extract_features", "config": options})
    for name in ("TRAIN/manifest.json", "TRAIN/flatten/shard_00000.npy", "features_to_image/TRAIN/x.npy"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"12345")
    recorded, content = outputs.record(job, run_dir), outputs.content(job, run_dir)
    assert len(recorded) == 2 and outputs.lost(recorded, run_dir) == []
    shard = folder / "TRAIN" / "flatten" / "shard_00000.npy"
    shard.write_bytes(b"1234")
    assert outputs.lost(recorded, run_dir) == [f"{shard} has 4 bytes, not 5"]
    shard.unlink()
    assert outputs.lost(recorded, run_dir) == [f"{shard} is missing"]
    assert outputs.content(job, run_dir) == content
    (folder / "TRAIN" / "manifest.json").write_bytes(b"other")
    assert outputs.content(job, run_dir) != content
