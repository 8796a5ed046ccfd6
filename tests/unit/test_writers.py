"""Metrics reach metrics.jsonl, TensorBoard, W&B and the terminal; resuming leaves no step twice."""

from __future__ import annotations

import io
import json
import math
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vissl_like.config.schema import Loggers, Run
from vissl_like.errors import ConfigError
from vissl_like.outputs import console
from vissl_like.outputs.writers import Writers, read_metrics, rewind, wandb_id


def make_writers(run_dir: Path, *, total_steps: int = 4, first_step: int = 1, **loggers: object) -> Writers:
    return Writers(
        run_dir,
        loggers=Loggers.model_validate(loggers),
        run=Run(PROGRESS="none"),
        engine="train",
        log_frequency=2,
        total_steps=total_steps,
        first_step=first_step,
    )


def train_steps(writers: Writers, steps: range, model: torch.nn.Module | None = None) -> None:
    for step in steps:
        if model is not None:
            model(torch.ones(2, 3)).sum().backward()
        writers.metrics({"kind": "train", "step": step, "epoch": step / 2, "loss": 1.0 / step})
        writers.progress(step, {"loss": 1.0 / step})


def test_records_are_on_disk_before_close(tmp_path: Path) -> None:
    writers = make_writers(tmp_path)
    writers.metrics({"kind": "train", "step": 1, "loss": torch.tensor(0.5), "lr": np.float32(0.25), "counts": [1, 2]})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    writers.close()
    assert line == {"kind": "train", "step": 1, "loss": 0.5, "lr": 0.25, "counts": [1, 2]}


def test_nan_is_valid_json_and_comes_back(tmp_path: Path) -> None:
    writers = make_writers(tmp_path)
    writers.metrics({"kind": "train", "step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    writers.close()
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf


@given(steps=st.lists(st.integers(1, 30), max_size=20), keep=st.integers(0, 30), torn=st.text("{\":, 'ab", max_size=12))
def test_rewind_keeps_exactly_the_steps_up_to(tmp_path_factory: pytest.TempPathFactory, steps, keep, torn) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    whole = [json.dumps({"kind": "train", "step": step, "loss": step * 0.1}) + "\n" for step in steps]
    (run_dir / "metrics.jsonl").write_text("".join(whole) + "{" + torn)
    dropped = rewind(run_dir, keep)
    kept = [line for line, step in zip(whole, steps) if step <= keep]
    assert (run_dir / "metrics.jsonl").read_text() == "".join(kept)
    assert dropped == len(whole) - len(kept) + 1


def test_rewind_without_a_file_does_nothing(tmp_path: Path) -> None:
    assert rewind(tmp_path, 5) == 0
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_holds_scalars_histograms_and_no_purged_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"ENABLED": True, "LOG_PARAMS": True, "LOG_PARAMS_EVERY_N_ITERS": 2}
    model = torch.nn.Linear(3, 1)
    first = make_writers(tmp_path, TENSORBOARD=options)
    first.watch(model)
    train_steps(first, range(1, 4))
    first.close()
    again = make_writers(tmp_path, first_step=3, TENSORBOARD=options)
    train_steps(again, range(3, 5))
    again.close()
    events = EventAccumulator(str(tmp_path / "tb_logs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Histograms("parameters/weight")] == [2]


def test_missing_tensorboard_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"TENSORBOARD.ENABLED=true .* pip install tensorboard"):
        make_writers(tmp_path, TENSORBOARD={"ENABLED": True})


def test_a_continued_run_continues_its_wandb_run(tmp_path: Path) -> None:
    options = {"ENABLED": True, "MODE": "offline", "PROJECT": "p", "GROUP": "g", "WATCH_GRADIENTS": True}
    for steps in (range(1, 3), range(3, 5)):
        writers = make_writers(tmp_path, WANDB=options)
        model = torch.nn.Linear(3, 1)
        writers.watch(model)
        train_steps(writers, steps, model)
        writers.close()
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(run_id) for folder in folders)
    deadline = time.monotonic() + 60  # wandb writes in a process of its own, which may be late on a crowded machine
    while not all(map(_wandb_history, folders)) and time.monotonic() < deadline:
        time.sleep(0.2)
    history = [_wandb_history(folder) for folder in folders]
    assert [[line["step"] for line in lines] for lines in history] == [[1, 2], [3, 4]]
    assert history[1][0]["train/loss"] == 1.0 / 3
    watched = [[any(key.startswith("gradients/") for key in line) for line in lines] for lines in history]
    assert watched == [[False, True], [False, True]]


def _wandb_history(folder: Path) -> list[dict]:
    """The history of a small offline run: a 7-byte header, then records of checksum (4), length (2), type (1), data."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    data, at, lines = file.read_bytes(), 7, []
    while at + 7 <= len(data):
        (length,) = struct.unpack_from("<H", data, at + 4)
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines


def test_wandb_id_stays_and_can_be_given(tmp_path: Path) -> None:
    made = wandb_id(tmp_path)
    assert wandb_id(tmp_path) == made
    assert wandb_id(tmp_path, given="abc") == "abc"
    assert wandb_id(tmp_path) == "abc"


class Clock:
    """Seconds that pass only when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_show_numbers_and_the_time_left() -> None:
    clock, stream = Clock(), io.StringIO()
    shown = console.progress("auto", total=40, title="rotnet", log_frequency=10, stream=stream, clock=clock)
    for step in range(1, 41):
        clock.now = step * 2.0
        shown.update(step, {"epoch": step / 10, "loss": 1.0 / step, "lr": 0.1, "images_per_s": 1234.5})
    shown.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "rotnet  step 10/40  epoch 1.00  loss 0.1  lr 0.1  1234 images/s  eta 1:00"
    assert [line.split()[2] for line in lines] == ["10/40", "20/40", "30/40", "40/40"]
    assert "eta" not in lines[-1]


def test_lines_are_a_second_apart() -> None:
    clock, stream = Clock(), io.StringIO()
    shown = console.progress("lines", total=1000, title="", log_frequency=1, stream=stream, clock=clock)
    for step in range(1, 1001):
        clock.now = step * 0.01
        shown.update(step, {})
    assert len(stream.getvalue().splitlines()) == 11


def test_bar_ends_complete_and_keeps_the_newest_numbers() -> None:
    stream = io.StringIO()
    shown = console.progress("bar", total=3, title="rotnet", stream=stream)
    for step in range(1, 4):
        shown.update(step, {"loss": 0.5} if step == 1 else None)
    shown.close()
    assert "3/3" in stream.getvalue() and "loss 0.5" in stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61, "1:01"), (3725, "1:02:05"), (200000, "2 d 07 h")])
def test_duration(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text
