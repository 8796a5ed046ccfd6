"""The loop on a small model in memory: accumulation, precision, resuming, stopping, tests, best, and what is not finite."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vissl_like.analysis.meters import build_meters
from vissl_like.config.schema_model import Ema as EmaOptions
from vissl_like.config.schema_model import GradClip, Loss, Meters, Optimizer, Schedule
from vissl_like.core import checkpoint, rng
from vissl_like.core.evaluation import Arithmetic
from vissl_like.core.loop import Feed, Options, Training
from vissl_like.data import order
from vissl_like.errors import ConfigError, Stopped, UserError
from vissl_like.models.ema import Ema
from vissl_like.optim.groups import build_optimizer, make_groups
from vissl_like.optim.schedules import Rates
from vissl_like.tasks.supervised import Supervised

N, CLASSES, SIDE = 50, 3, 4
IMAGES = torch.randn(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
LABELS = (IMAGES.flatten(1)[:, :5].sum(1) > 0).long() + (IMAGES[:, 0, 0, 0] > 1).long()


class Net(nn.Module):
    """A small classifier with dropout, so that the model's noise matters."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 16), nn.ReLU(), nn.Dropout(dropout))
        self.heads = nn.ModuleList([nn.Linear(16, CLASSES)])

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.heads[0](self.trunk(images))]


class Lines:
    """The record, kept in memory."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.steps: list[int] = []

    def metrics(self, record: Any) -> None:
        self.lines.append(dict(record))

    def progress(self, step: int, record: Any = None) -> None:
        self.steps.append(step)

    def of(self, kind: str, key: str) -> list[Any]:
        return [line[key] for line in self.lines if line["kind"] == kind]


def rows_as_batch(rows: Any) -> dict[str, torch.Tensor]:
    rows = torch.as_tensor(rows)
    return {
        "data": IMAGES[rows],
        "label": LABELS[rows],
        "index": rows,
        "valid": torch.ones(len(rows), dtype=torch.bool),
    }


def train_feed(batch: int, accumulate: int, on_batch: Any = None) -> Any:
    def batches(epoch: int, first_step: int, in_process: bool) -> Iterator[dict[str, torch.Tensor]]:
        rows = rng.permutation(0, epoch, N)
        shape = {"batch_per_rank": batch, "accumulate": accumulate, "size": 1}
        for step in range(first_step, order.steps_per_epoch(N, batch, accumulate, 1, False)):
            for start, stop in order.micro_batches(N, step=step, rank=0, **shape):
                weight = order.micro_batch_weight(N, step=step, rows=stop - start, **shape)
                made = {**rows_as_batch(rows[start:stop]), "weight": torch.tensor(weight)}
                yield made if on_batch is None else on_batch(epoch, step, made)

    return batches


def all_rows() -> Iterator[dict[str, torch.Tensor]]:
    return (rows_as_batch(range(i, min(i + 7, N))) for i in range(0, N, 7))


def make(
    run_dir: Path, *, batch: int = 8, accumulate: int = 1, epochs: int = 2, dropout: float = 0.3, ema: bool = False,
    on_batch: Any = None, optimizer: Optimizer | None = None, test: Any = None, **options: Any,
) -> tuple[Training, Lines]:  # fmt: skip
    rng.seed_model(0)
    model = Net(dropout)
    section = optimizer or Optimizer(NAME="sgd", MOMENTUM=0.9)
    groups = make_groups(model, section)
    steps = order.steps_per_epoch(N, batch, accumulate, 1, False)
    meters = [build_meters(Meters(), num_heads=1) for _ in range(2)]
    lines = Lines()
    opened = Options(
        seed=0, num_epochs=epochs, steps_per_epoch=steps, accumulate=accumulate, **{"log_every": 1, **options}
    )
    training = Training(
        task=Supervised(model, loss=Loss(), train_meters=meters[0], test_meters=meters[1]),
        optimizer=build_optimizer(groups, section),
        groups=groups,
        rates=Rates(lr=Schedule(NAME="linear", START_VALUE=0.2, END_VALUE=0.0, UPDATE_INTERVAL="step"),
                    steps_per_epoch=steps, num_epochs=epochs),
        feed=Feed(
            train=train_feed(batch, accumulate, on_batch),
            to_input=lambda images: images,
            test=all_rows if test is None else (test or None),
            identity={"global batch": batch * accumulate},
        ),
        options=opened,
        run_dir=run_dir,
        record=lines,
        ema=Ema(model, options=EmaOptions(ENABLED=True, DECAY=0.9), total_steps=opened.total_steps) if ema else None,
    )  # fmt: skip
    return training, lines


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in training.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait_share")} for line in lines]


def test_it_learns_and_records_every_step(tmp_path: Path) -> None:
    training, lines = make(tmp_path, epochs=12, dropout=0.0)
    results = training.run()
    assert lines.of("train", "step") == list(range(1, 12 * 7 + 1)) == lines.steps
    assert results["train_top_1"] >= 96.0 and results["test_top_1"] >= 96.0
    assert results["train_loss"] == lines.of("train_epoch", "train_loss")[-1] < 0.1
    assert {"loss", "lr", "epoch", "images_per_s", "data_wait_share"} <= lines.lines[0].keys()
    assert lines.of("train", "lr")[0] == 0.2 and lines.of("train", "lr")[-1] == pytest.approx(0.2 / 84)


def test_epoch_mean_is_weighted_by_samples(tmp_path: Path) -> None:
    """50 images in batches of 8: the last has 2, and counts a quarter of the others."""
    training, lines = make(tmp_path, epochs=1)
    training.run()
    losses, sizes = lines.of("train", "loss"), [8] * 6 + [2]
    by_hand = sum(loss * size for loss, size in zip(losses, sizes)) / N
    assert lines.of("train_epoch", "train_loss") == [pytest.approx(by_hand, rel=1e-12)]


@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (4, 2), (2, 4)])
def test_accumulation_equals_the_larger_batch(tmp_path: Path, batch: int, accumulate: int) -> None:
    whole, whole_lines = make(tmp_path / "whole", batch=8, dropout=0.0)
    parts, parts_lines = make(tmp_path / "parts", batch=batch, accumulate=accumulate, dropout=0.0)
    whole.run()
    parts.run()
    # The seventh step has 2 rows: fewer than 4 micro-batches need, so it falls away there.
    if accumulate < 4:
        assert parts_lines.of("train", "loss") == pytest.approx(whole_lines.of("train", "loss"), rel=1e-5)
        for name, value in weights(whole).items():
            torch.testing.assert_close(weights(parts)[name], value, rtol=1e-4, atol=1e-6)
    else:
        assert parts_lines.of("train", "loss")[:6] == pytest.approx(whole_lines.of("train", "loss")[:6], rel=0.2)
        assert len(parts_lines.of("train", "loss")) == 12


class Killed(Exception):
    pass


def kill_at(step: int) -> Any:
    """Break off while the batch of this step (counted over epochs) is being loaded."""
    counter = itertools.count()

    def on_batch(epoch: int, number: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if next(counter) == step:
            raise Killed
        return batch

    return on_batch


@pytest.mark.parametrize("kill", [1, 3, 6, 7, 8, 12])
@pytest.mark.parametrize("kind", ["sgd", "adamw_ema_accumulated"])
def test_resumed_run_equals_the_undisturbed_one(tmp_path: Path, kill: int, kind: str) -> None:
    extra: dict[str, Any] = {}
    if kind != "sgd":
        extra = {"ema": True, "batch": 4, "accumulate": 2, "optimizer": Optimizer(NAME="adamw")}
        kill *= 2
    whole, whole_lines = make(tmp_path / "whole", save_every_steps=2, **extra)
    expected = whole.run()

    broken, lines = make(tmp_path / "broken", save_every_steps=2, on_batch=kill_at(kill), **extra)
    with pytest.raises(Killed):
        broken.run()
    saved = checkpoint.newest(tmp_path / "broken")
    again, more = make(tmp_path / "broken", save_every_steps=2, **extra)
    done = 0
    if saved is not None:
        again.resume(saved)
        done = saved.step
        tested = [line for line in lines.lines if line["kind"] == "test" and line["step"] == done]
        again.known_tests = {line["step"]: {k: v for k, v in line.items() if k.startswith("test")} for line in tested}
    assert again.run() == expected
    assert same(weights(again), weights(whole))
    kept = [line for line in lines.lines if line["step"] <= done]
    assert without_times(kept + more.lines) == without_times(whole_lines.lines)


def test_signal_saves_at_the_next_step_and_stops(tmp_path: Path) -> None:
    def on_batch(epoch: int, step: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if (epoch, step) == (0, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    training, _ = make(tmp_path, on_batch=on_batch)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM after step 4 of 14") as caught:
        training.run()
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and saved.step == 4


def test_signal_during_the_test_keeps_the_epoch(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Any]:
        for number, batch in enumerate(all_rows()):
            if number == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            yield batch

    training, _ = make(tmp_path, save_every_epochs=0, test=interrupted)
    with pytest.raises(Stopped, match="SIGUSR1"):
        training.run()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and saved.step == 7 and saved.training_state()["test_due"]
    again, more = make(tmp_path, save_every_epochs=0)
    again.resume(saved)
    expected, _ = make(tmp_path / "whole")
    assert again.run() == expected.run()
    assert more.lines[0]["kind"] == "test" and more.lines[0]["step"] == 7


def test_best_weights_are_those_that_were_best(tmp_path: Path) -> None:
    training, lines = make(tmp_path, epochs=6, keep=1)
    results = training.run()
    scores = dict(zip(lines.of("test", "step"), lines.of("test", "test_top_1")))
    best = max(scores.values())
    assert results["best_test_top_1"] == best
    assert results["best_step"] == min(step for step, score in scores.items() if score == best)
    assert os.readlink(tmp_path / "checkpoints" / "best") == checkpoint.step_name(results["best_step"])
    assert set(checkpoint.saved_steps(tmp_path)) == {results["best_step"], 42}


def test_best_by_a_loss_is_the_lowest(tmp_path: Path) -> None:
    training, lines = make(tmp_path, epochs=4, best_metric="test_loss", save_every_epochs=0)
    assert training.run()["best_test_loss"] == min(lines.of("test", "test_loss"))


def test_unknown_best_metric_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"BEST_METRIC='top1'.*test_loss, test_top_1"):
        training, _ = make(tmp_path, best_metric="top1")
        training.run()
    assert training.step == 0, "the mistake is found before the first step"


def test_tests_come_every_so_many_epochs_and_last(tmp_path: Path) -> None:
    training, lines = make(tmp_path, epochs=5, test_every=2)
    training.run()
    assert lines.of("test", "epoch") == [2, 4, 5]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path) -> None:
    def poison(epoch: int, step: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if (epoch, step) == (1, 2):
            batch["data"] = batch["data"].clone()
            batch["data"][1] = float("nan")
        return batch

    whole, _ = make(tmp_path / "whole", dropout=0.0, epochs=2, save_every_steps=9)
    whole.run()
    training, _ = make(tmp_path / "run", dropout=0.0, on_batch=poison)
    with pytest.raises(UserError, match=r"loss is nan in step 10 .epoch 1.*replay"):
        training.run()
    folder = tmp_path / "run" / "replay" / "step_10"
    info = json.loads((folder / "info.json").read_text())
    batch, state = load_file(folder / "batch.safetensors"), load_file(folder / "model.safetensors")
    assert info["step"] == 10 and info["epoch"] == 1 and info["indices"] == batch["index"].tolist()
    model = Net(0.0)
    model.load_state_dict(state)
    assert torch.isnan(nn.functional.cross_entropy(model(batch["data"])[0], batch["label"]))
    kept = checkpoint.Saved(tmp_path / "whole" / "checkpoints" / "step_00000009", 9)
    assert same(state, kept.model_state())
    newest = checkpoint.newest(tmp_path / "run")
    assert newest is not None and newest.step == 7


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    training, _ = make(tmp_path, epochs=1)
    training.save()
    training.step = 1
    with torch.no_grad():
        training.model.heads[0].weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"heads.0.weight.*not saved"):
        training.save()
    training.saver.finish()
    assert checkpoint.saved_steps(tmp_path) == [0]


def test_nan_check_can_be_switched_off(tmp_path: Path) -> None:
    def poison(epoch: int, step: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**batch, "data": batch["data"] * float("nan")}

    training, lines = make(tmp_path, epochs=1, on_batch=poison, check_nan=False)
    training.run()
    assert all(loss != loss for loss in lines.of("train", "loss"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_the_same(tmp_path: Path, precision: str) -> None:
    exact, exact_lines = make(tmp_path / "exact", dropout=0.0, epochs=3)
    half, half_lines = make(tmp_path / "half", dropout=0.0, epochs=3, arithmetic=Arithmetic(precision=precision))
    exact.run()
    half.run()
    assert half_lines.of("train_epoch", "train_loss") == pytest.approx(
        exact_lines.of("train_epoch", "train_loss"), rel=0.05
    )
    assert half_lines.of("train", "loss") != exact_lines.of("train", "loss")
    assert all(value.dtype == torch.float32 for value in half.model.state_dict().values())


def test_fp16_resumes_with_its_loss_scale(tmp_path: Path) -> None:
    training, _ = make(tmp_path, arithmetic=Arithmetic(precision="fp16"))
    training.run()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    again, _ = make(tmp_path, arithmetic=Arithmetic(precision="fp16"))
    again.resume(saved)
    assert again.scaler.state_dict() == training.scaler.state_dict()


def test_clipping_bounds_the_change(tmp_path: Path) -> None:
    training, lines = make(tmp_path, epochs=1, clip=GradClip(USE_GRAD_CLIP=True, MAX_NORM=1e-3), dropout=0.0,
                           optimizer=Optimizer(NAME="sgd", MOMENTUM=0.0, WEIGHT_DECAY=0.0), test=False)  # fmt: skip
    before = weights(training)
    training.run()
    change = sum((weights(training)[name] - value).square().sum() for name, value in before.items()).sqrt()
    assert 0 < change <= 0.2 * 1e-3 * 7 * 1.001
    assert min(lines.of("train", "grad_norm")) > 1e-3


def test_average_is_tested_and_saved_too(tmp_path: Path) -> None:
    training, _ = make(tmp_path, ema=True)
    live = training.run()
    assert {"test_top_1", "test_ema_top_1", "test_ema_loss"} <= live.keys()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and saved.ema_state() is not None
    assert same(saved.model_state(), weights(training)) and not same(saved.ema_state(), weights(training))
    model = Net(0.0)
    model.load_state_dict(saved.ema_state())
    by_hand = nn.functional.cross_entropy(model.eval()(IMAGES)[0], LABELS).item()
    assert live["test_ema_loss"] == pytest.approx(by_hand, rel=1e-6)


def test_another_global_batch_is_refused(tmp_path: Path) -> None:
    make(tmp_path, epochs=1)[0].run()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    again, _ = make(tmp_path, batch=16)
    with pytest.raises(ConfigError, match="global batch was 8, is 16"):
        again.resume(saved)


def test_no_epochs_leave_the_initial_weights_and_one_test(tmp_path: Path) -> None:
    training, lines = make(tmp_path, epochs=0)
    before = weights(training)
    results = training.run()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and saved.step == 0 and same(saved.model_state(), before)
    assert "test_top_1" in results and lines.of("test", "step") == [0]


def test_unreadable_rows_do_not_count_in_the_test(tmp_path: Path) -> None:
    def marked() -> Iterator[Any]:
        for start in range(0, N, 10):
            batch = rows_as_batch(range(start, start + 10))
            batch["valid"][:9] = False
            yield batch

    training, _ = make(tmp_path, epochs=0, test=marked)
    loss = training.run()["test_loss"]
    rows = list(range(9, N, 10))
    by_hand = nn.functional.cross_entropy(training.model.eval()(IMAGES[rows])[0], LABELS[rows]).item()
    assert loss == pytest.approx(by_hand, rel=1e-6)
