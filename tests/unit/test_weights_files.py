"""Reading weights files: every format and layout, and a clear refusal of whatever is unsafe, torn or something else."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import pickle
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vissl_like.core.weights import read_state_dict
from vissl_like.core.weights_files import find_state_dict, open_weights, read_content
from vissl_like.errors import WeightsError

#: Weights among which there are single numbers.
NORM = {"n.weight": torch.ones(3), "n.bias": torch.zeros(3), "n.num_batches_tracked": torch.tensor(7)}
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def equal(found: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(STATE) and all(torch.equal(found[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".torch", ".ckpt", ".bin", ""])
def test_torch_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(STATE, path)
    assert equal(read_state_dict(path))
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    assert equal(read_state_dict(path))


def test_safetensors_and_folders(tmp_path: Path) -> None:
    save_file(dict(STATE), tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = read_state_dict(path)
        assert equal(dict(sorted(found.items(), reverse=True)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="this folder holds no weights"):
        read_state_dict(tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "path"),
    [
        (STATE, ()),
        ({"state_dict": STATE, "epoch": 3, "optimizer": {"state": {}}}, ("state_dict",)),
        ({"model": STATE, "args": argparse.Namespace(lr=0.1)}, ("model",)),
        ({"epoch": 1, "model": {"state_dict": STATE}}, ("model", "state_dict")),
        ({"student": STATE, "teacher": STATE}, ("teacher",)),
        ({"classy_state_dict": STATE}, ("classy_state_dict",)),
        ({"epoch": 1, "best_acc1": torch.tensor(71.2), "state_dict": STATE}, ("state_dict",)),
        ({**STATE, "ema": STATE}, ()),
        ({**NORM, "ema": NORM}, ()),
    ],
)
def test_auto_finds_the_state_dict(tmp_path: Path, content: dict[str, Any], path: tuple[str, ...]) -> None:
    torch.save(content, tmp_path / "w.pth")
    file = open_weights(str(tmp_path / "w.pth"))
    assert file.path == path
    assert equal(file.tensors) or file.tensors.keys() == NORM.keys()
    assert any("there are also student" in note for note in file.notes) == (path == ("teacher",))


def test_named_keys(tmp_path: Path) -> None:
    content = {"outer": {"inner": STATE}, "model": {}}
    assert equal(find_state_dict(content, key_name=["outer", "inner"]).tensors)
    assert equal(find_state_dict(STATE, key_name="").tensors)
    assert equal(find_state_dict(STATE, key_name=[]).tensors)
    with pytest.raises(
        WeightsError, match="STATE_DICT_KEY_NAME='modell': there is no key 'modell'. Keys there: 'outer', 'model'"
    ):
        find_state_dict(content, key_name="modell")
    with pytest.raises(WeightsError, match="there is no key 'x' inside outer. Keys there: 'inner'"):
        find_state_dict(content, key_name=["outer", "x"])
    with pytest.raises(WeightsError, match="there is no key 'a' inside outer/inner/a.bias. Keys there: none"):
        find_state_dict(content, key_name=["outer", "inner", "a.bias", "a"])


def test_classy_layout() -> None:
    parts = {"trunk": {"_feature_blocks.w": STATE["a.bias"]}, "heads": {"0.clf.0.bias": STATE["a.bias"]}}
    content = {"phase_idx": 3, "classy_state_dict": {"base_model": {"model": parts}}}
    for key in ("auto", "classy_state_dict"):
        file = find_state_dict(content, key_name=key)
        assert file.is_classy and list(file.tensors) == ["trunk._feature_blocks.w", "heads.0.clf.0.bias"]
    with pytest.raises(WeightsError, match="has no base_model/model/trunk"):
        find_state_dict({"classy_state_dict": {"base_model": {}}})


def test_checkpoints_in_pieces_are_named() -> None:
    with pytest.raises(WeightsError, match=r"VISSL checkpoint in pieces \(shard_list\)"):
        find_state_dict({"type": "shard_list", "shards": ["a.torch"]})


def test_numpy_arrays_become_tensors_and_the_rest_is_named(tmp_path: Path) -> None:
    content = {"w": np.arange(3, dtype=np.float32), "step": 7, "name": "x", "o": np.array(["s"])}
    torch.save(content, tmp_path / "w.pth")
    file = open_weights(str(tmp_path / "w.pth"))
    assert torch.equal(file.tensors["w"], torch.arange(3.0))
    assert list(file.notes) == ["3 entries are not tensors and were left out: step, name, o"]


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"model": STATE, "hook": Evil(mark)}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"needs code to load.*WEIGHTS_INIT.ALLOW_UNSAFE=true"):
        read_state_dict(tmp_path / "evil.pth")
    assert not mark.exists()


def test_a_whole_module_is_refused_with_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "module.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(WeightsError, match=r"imports torch.nn.modules.linear.Linear.*plain state dict"):
        read_state_dict(path)
    with pytest.raises(
        WeightsError, match=r"holds a Linear, not a dictionary of tensors. Save its state_dict\(\) instead"
    ):
        open_weights(str(path), unpickle=lambda file: torch.nn.Linear(2, 2))


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), 5, "text"])
def test_wrong_types(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"holds a (list|Tensor|int|str), not a dictionary of tensors"):
        read_state_dict(tmp_path / "w.pth")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no such file or folder"):
        read_state_dict(tmp_path / "absent.pth")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(WeightsError, match="the file is empty"):
        read_state_dict(tmp_path / "empty.pth")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_torn_files(tmp_path: Path, form: str) -> None:
    """Cut at any place, the file is refused as damaged, with its name."""
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(dict(STATE), path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for cut in (1, 5, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(WeightsError, match=r"w\.(pth|safetensors)'.*(damaged)"):
            read_content(path)


@pytest.mark.parametrize(
    "content", [b"hello world", b"<html>not found</html>", b"\x80\x04garbage", pickle.dumps({"a": 1})]
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match="not a weights file, or damaged"):
        read_content(tmp_path / "w.pth")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server over a folder."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def test_download_once(tmp_path: Path, served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISSL_LIKE_CACHE", str(tmp_path / "cache"))
    address, folder = served
    torch.save(STATE, folder / "w.pth")
    url = f"{address}/w.pth?x=1"
    assert equal(open_weights(url).tensors)
    (folder / "w.pth").unlink()
    assert equal(open_weights(url).tensors)
    kept = [path.name for path in (tmp_path / "cache" / "weights").iterdir()]
    assert kept == [f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_w.pth"]
    with pytest.raises(WeightsError, match=r"absent.pth'.*cannot be fetched.*give its path"):
        open_weights(f"{address}/absent.pth")
    assert len(list((tmp_path / "cache" / "weights").iterdir())) == 1


@pytest.mark.parametrize("source", ["hf:nobody/nothing", "torchvision:resnet_none", "timm:none_such"])
def test_names_that_cannot_be_fetched(source: str) -> None:
    with pytest.raises(WeightsError, match=f"{source}'.*cannot be fetched.*download the file elsewhere"):
        open_weights(source)
