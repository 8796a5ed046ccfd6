"""Saves in the background: what they hold, what waits for them, and what a full disk or a kill in the middle leaves."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.unit.test_distributed import ROOT, SHARDING, run_ranks
from vissl_like.core import checkpoint
from vissl_like.core.saving import HostCopies, Saver
from vissl_like.errors import DataError

BIG = 4_000_000


def states(value: float, *, size: int = BIG) -> dict[str, dict[str, object]]:
    return {
        "model_state": {"w": torch.full((size,), value), "n": torch.tensor(int(value))},
        "training_state": {"step": int(value), "optimizer": {"w": {"exp_avg": torch.full((size,), -value)}}},
    }


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A limit on the size of files stands for a disk that fills up in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("in_background", [True, False])
def test_a_save_holds_the_state_of_its_moment(tmp_path: Path, in_background: bool) -> None:
    """The state changes as soon as save() has returned, three times; memory of copies is used again."""
    saver = Saver(tmp_path, keep=9, in_background=in_background)
    state = states(1.0)
    for step in (1, 2, 3):
        state["model_state"]["w"].fill_(step)  # type: ignore[attr-defined]
        state["training_state"]["optimizer"]["w"]["exp_avg"].fill_(-step)  # type: ignore[index]
        state["training_state"]["step"] = step
        saver.save(step=step, **state)  # type: ignore[arg-type]
        state["model_state"]["w"].fill_(99)  # type: ignore[attr-defined]
        state["training_state"]["step"] = 99
    saver.mark_best(2)
    saver.finish()
    saver.close()
    for step in (1, 2, 3):
        saved = checkpoint.Saved(tmp_path / "checkpoints" / checkpoint.step_name(step), step)
        assert checkpoint.find_damage(saved.path) is None
        training = saved.training_state()
        assert saved.model_state()["w"].unique().tolist() == [step] and training["step"] == step
        assert training["optimizer"]["w"]["exp_avg"].unique().tolist() == [-step]
    links = {name: os.readlink(tmp_path / "checkpoints" / name) for name in ("last", "best")}
    assert links == {"last": "step_00000003", "best": "step_00000002"}


def test_copies_use_their_memory_again() -> None:
    copies = HostCopies()
    source = {"file": {"a": torch.randn(4, 5).T, "b": torch.arange(3)}}
    first = copies.take(source)["file"]
    assert all(torch.equal(first[name], source["file"][name]) for name in source["file"])
    places = {name: copy.data_ptr() for name, copy in first.items()}
    source["file"]["a"].zero_()
    second = copies.take(source)["file"]
    assert {name: copy.data_ptr() for name, copy in second.items()} == places and not second["a"].any()
    other = copies.take({"file": {"a": torch.randn(7)}})["file"]
    assert other["a"].shape == (7,)


def test_a_full_disk_is_heard_of_at_the_next_save(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=2)
    saver.save(step=1, **states(1.0))  # type: ignore[arg-type]
    saver.finish()
    with largest_file(1_000_000):
        saver.save(step=2, **states(2.0))  # type: ignore[arg-type]
        saver.mark_best(2)
        with pytest.raises(DataError, match="no room to save"):
            saver.save(step=3, **states(3.0))  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["last", "step_00000001"]
    saver.save(step=4, **states(4.0))  # type: ignore[arg-type]
    saver.finish()
    saver.close()
    assert checkpoint.saved_steps(tmp_path) == [1, 4]


def test_the_end_waits_and_says_what_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """close() comes after an error as well: it raises nothing over it."""
    saver = Saver(tmp_path, keep=2)
    with largest_file(1_000_000):
        saver.save(step=1, **states(1.0))  # type: ignore[arg-type]
        saver.close()
    assert "no room to save" in caplog.text
    saver = Saver(tmp_path, keep=2)
    saver.save(step=2, **states(2.0))  # type: ignore[arg-type]
    saver.close()
    assert checkpoint.saved_steps(tmp_path) == [2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_a_process_that_is_forked_meanwhile_adds_nothing(tmp_path: Path) -> None:
    """Loader processes are forked while files are written: they must not write anything into them."""
    saver = Saver(tmp_path, keep=1)
    for step in range(1, 4):
        saver.save(step=step, **states(float(step)))  # type: ignore[arg-type]
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
    saver.finish()
    saver.close()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and saved.step == 3


KILLED = """
import os, signal, sys, threading, time, torch
from pathlib import Path
from vissl_like.core.saving import Saver
folder = Path(sys.argv[1])
saver = Saver(folder, keep=1)
state = {"training_state": {"step": 1}}
saver.save(step=1, model_state={"w": torch.ones(1000)}, **state)
saver.finish()
def watch():
    while True:
        for file in (folder / "checkpoints").glob(".saving-2-*/model.safetensors"):
            if file.stat().st_size > 10_000_000:
                os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
saver.save(step=2, model_state={str(i): torch.ones(3_000_000) for i in range(30)}, **state)
saver.finish()
"""


def test_killed_in_the_middle_of_a_file(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    half = list((tmp_path / "checkpoints").glob(".saving-2-*"))
    saved = checkpoint.newest(tmp_path)
    assert half and saved is not None and saved.step == 1
    saver = Saver(tmp_path, keep=1)
    saver.save(step=3, **states(3.0, size=10))  # type: ignore[arg-type]
    saver.finish()
    saver.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["last", "step_00000003"]


def test_a_failure_of_one_process_is_an_error_of_all(tmp_path: Path) -> None:
    """The disk of rank 1 is full: sharded, its rows are missing, so nothing is published; then there is room again."""
    code = f"""
        import os, resource
        from pathlib import Path
        from torch import nn
        from vissl_like.config.schema import Config
        from vissl_like.core import checkpoint
        from vissl_like.core.saving import Saver
        from vissl_like.errors import DataError
        folder = Path({str(tmp_path)!r})
        world = distributed.start(device="cpu")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 301), nn.Linear(301, 3))
        whole = {{name: value.clone() for name, value in model.state_dict().items()}}
        parallel.arrange(model, Config.model_validate({{"DISTRIBUTED": {{"STRATEGY": "fsdp"}}}}))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 300)).sum().backward()
        optimizer.step()
        names = dict(model.named_parameters())
        def state(step):
            return {{"step": step, "optimizer": {{name: dict(optimizer.state[p]) for name, p in names.items()}}}}
        saver = Saver(folder, keep=2)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        for step in (1, 2, 3):
            if step == 2 and world.rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
            saver.save(step=step, model_state=model.state_dict(), training_state=state(step))
            try:
                saver.finish()
                print(step, "saved")
            except DataError as error:
                print(step, "no room" in str(error), checkpoint.saved_steps(folder))
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        saver.close()
        saved = checkpoint.newest(folder)
        back = saved.training_state(names)["optimizer"]
        for name, parameter in names.items():
            for key, value in optimizer.state[parameter].items():
                assert torch.equal(parallel.local(back[name][key]), parallel.local(value)), (name, key)
        plain = saved.training_state()["optimizer"]["0.weight"]["exp_avg"]
        assert torch.equal(plain, parallel.whole(optimizer.state[names["0.weight"]]["exp_avg"]))
        with torch.no_grad():
            expected = {{name: parallel.whole(value).clone() for name, value in model.state_dict().items()}}
            for parameter in model.parameters():
                parallel.local(parameter).zero_()
        saved.load_into(model)
        for name, value in model.state_dict().items():
            assert torch.equal(parallel.whole(value), expected[name]) and torch.equal(saved.model_state()[name], expected[name])
        distributed.shutdown()
        """
    outputs = run_ranks(code, size=2, folder=tmp_path, imports=SHARDING)
    assert outputs == ["1 saved\n2 True [1]\n3 saved\n"] * 2
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["last", "step_00000001", "step_00000003"]
