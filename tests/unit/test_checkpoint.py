"""Checkpoints: what goes in comes out, damage is found, and an interrupted or failed save changes nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from vissl_like.core import checkpoint, state_format
from vissl_like.core.saving import Saver
from vissl_like.errors import DataError, WeightsError

MODEL = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2), "n": torch.tensor(7)}


def save(run_dir: Path, step: int, *, keep: int = 2, **state: object) -> Path:
    saver = Saver(run_dir, keep=keep)
    path = saver.save(step=step, model_state=MODEL, training_state={"step": step, **state})
    saver.finish()
    return path


def mark_best(run_dir: Path, step: int) -> None:
    saver = Saver(run_dir, keep=1)
    saver.mark_best(step)
    saver.finish()


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    state = {
        "optimizer": {"a.weight": {"momentum": torch.randn(2, 3), "step": torch.tensor(3.0)}},
        "by_number": {0: "zero", 1: (1, 2.5, None)},
        "$odd": [True, float("inf"), 0.1 + 0.2, "text", []],
        "empty": {},
        "half": torch.randn(3).bfloat16(),
        "mask": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
    }
    saved_at = save(tmp_path, 5, **state)
    back = checkpoint.newest(tmp_path)
    assert back is not None and back.path == saved_at and back.step == 5
    found = back.training_state()
    assert found.keys() == {*state, "step"}
    for name in ("half", "mask", "none"):
        assert found[name].dtype == state[name].dtype and torch.equal(found[name], state[name])
    assert torch.equal(found["optimizer"]["a.weight"]["momentum"], state["optimizer"]["a.weight"]["momentum"])
    assert found["by_number"] == state["by_number"] and found["$odd"] == state["$odd"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=12,
)


@given(JSON)
def test_any_plain_state_survives_json(state: object) -> None:
    structure, tensors = state_format.split_state(state)
    back = state_format.join_state(json.loads(json.dumps(structure)), tensors)
    assert back == state and type(back) is type(state)


def test_library_reads_our_safetensors(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "wide": torch.randn(2, 5, dtype=torch.float64),
        "transposed": torch.randn(4, 3).T,
        "scalar": torch.tensor(2.0, dtype=torch.float16),
        "empty": torch.zeros(0, 2),
        "flags": torch.tensor([True, False, True]),
        "short": torch.randn(3).bfloat16(),
    }
    state_format.write_tensors(tmp_path / "x.safetensors", tensors)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


def test_model_file_needs_only_safetensors(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert torch.equal(load_file(path / "model.safetensors")["a.weight"], MODEL["a.weight"])


def test_newest_k_best_and_last_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
        if step == 10:
            mark_best(tmp_path, step)
    assert checkpoint.saved_steps(tmp_path) == [10, 30, 40]
    assert os.readlink(tmp_path / "checkpoints" / "last") == "step_00000040"
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step_00000010"
    mark_best(tmp_path, 40)
    save(tmp_path, 50)
    assert checkpoint.saved_steps(tmp_path) == [40, 50]


def damage_truncate(path: Path) -> None:
    file = path / "training.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def damage_flip(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "model.safetensors").write_bytes(data)


def damage_delete(path: Path) -> None:
    (path / "training.json").unlink()


def damage_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"step": 20, "fil')


def damage_empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize("harm", [damage_truncate, damage_flip, damage_delete, damage_manifest, damage_empty])
def test_damaged_newest_is_passed_over_and_said(tmp_path: Path, harm, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    harm(save(tmp_path, 20))
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 10
    assert "step_00000020 is damaged" in caplog.text
    save(tmp_path, 20)
    again = checkpoint.newest(tmp_path)
    assert again is not None and again.step == 20


def test_checksums_of_older_releases_are_still_checked(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        digest = hashlib.blake2b((path / name).read_bytes(), digest_size=16).hexdigest()
        manifest["files"][name] = {"bytes": (path / name).stat().st_size, "blake2b": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.find_damage(path) is None
    damage_flip(path)
    assert "checksum" in (checkpoint.find_damage(path) or "")


def test_nothing_whole_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    damage_flip(save(tmp_path, 10))
    with pytest.raises(WeightsError, match=r"every checkpoint is damaged.*OVERWRITE"):
        checkpoint.newest(tmp_path)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None


def test_abandoned_half_saves_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 10)
    gone = subprocess.Popen(["true"])
    gone.wait()
    host = os.uname().nodename
    half = tmp_path / "checkpoints" / f".saving-20-{host}-{gone.pid}"
    busy = tmp_path / "checkpoints" / f".saving-20-{host}-{os.getppid()}"
    half.mkdir()
    busy.mkdir()
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 10
    save(tmp_path, 20)
    assert not half.exists() and busy.exists()


def test_weights_of_a_run_folder_or_a_step(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    for where in (tmp_path, tmp_path / "checkpoints", path, tmp_path / "checkpoints" / "last"):
        assert torch.equal(checkpoint.load_model_state(where)["a.weight"], MODEL["a.weight"])
    with pytest.raises(WeightsError, match="EMA"):
        checkpoint.load_model_state(tmp_path, averaged=True)
    with pytest.raises(WeightsError, match="no checkpoint here"):
        checkpoint.load_model_state(tmp_path / "elsewhere")
    save(tmp_path / "chain" / "teacher", 10)
    with pytest.raises(WeightsError, match="have some: .*/chain/teacher[.]$"):
        checkpoint.load_model_state(tmp_path / "chain")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 10)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    with pytest.raises(WeightsError, match=r"(?s)does not fit this model.*a\.weight"):
        saved.load_into(torch.nn.Linear(3, 2))


def test_failed_save_leaves_the_older_one(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that fills up in the middle of a file."""
    save(tmp_path, 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(DataError, match="no room to save") as caught:
            save(tmp_path, 20, big=torch.zeros(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 3
    assert checkpoint.saved_steps(tmp_path) == [10]
    assert not [entry for entry in os.listdir(tmp_path / "checkpoints") if entry.startswith(".")]
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 10


def test_state_without_a_plain_form_names_the_entry() -> None:
    with pytest.raises(TypeError, match="optimizer/odd"):
        state_format.split_state({"optimizer": {"odd": object()}})
