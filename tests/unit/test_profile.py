"""The profile of a training: its times add up, it changes nothing, and it says what it found."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_loop import Lines, make, same, weights, without_times
from vissl_like.config.schema import Profile
from vissl_like.core.loop import Training
from vissl_like.core.profile import PHASES, advice
from vissl_like.errors import ConfigError
from vissl_like.outputs.report_sections import profile as section
from vissl_like.outputs.run_folder import RunFolder

NAP_S = 0.02


def profiled(run_dir: Path, *, on_batch: Any = None, accumulate: int = 1, **options: Any) -> tuple[Training, Lines]:
    """Two epochs of 7 steps (4 with two micro-batches each) of a small model."""
    section = Profile(**{"ENABLED": True, "WAIT": 2, "STEPS": 4, "WARMUP": 1, **options})
    training, lines = make(run_dir, on_batch=on_batch, accumulate=accumulate, profile=section)
    training.run()
    return training, lines


def found(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "profile" / "profile.json").read_text())


def nap(epoch: int, step: int, batch: dict[str, Any]) -> dict[str, Any]:
    time.sleep(NAP_S)
    return batch


@pytest.mark.parametrize("accumulate", [1, 2])
def test_phases_add_up_to_the_step(tmp_path: Path, accumulate: int) -> None:
    began = time.perf_counter()
    profiled(tmp_path, accumulate=accumulate)
    whole_ms = 1000 * (time.perf_counter() - began)
    result = found(tmp_path)
    assert tuple(result["phases_ms"]) == PHASES
    assert min(result["phases_ms"].values()) > 0
    assert sum(result["phases_ms"].values()) == pytest.approx(result["step_ms"], rel=1e-9)
    assert result["steps"] == [3, 6]
    assert 0 < 4 * result["step_ms"] < whole_ms


def test_images_per_second_are_those_of_the_timed_steps(tmp_path: Path) -> None:
    """Steps 3 to 6 of 7: four whole batches of 8."""
    profiled(tmp_path)
    result = found(tmp_path)
    assert result["images_per_s"] * 4 * result["step_ms"] / 1000 == pytest.approx(32, rel=1e-9)


def test_a_profile_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    training, lines = profiled(tmp_path / "on", SHAPES=True, MEMORY=True, STACKS=True)
    plain, plain_lines = make(tmp_path / "off")
    plain.run()
    assert same(weights(training), weights(plain))
    assert without_times(lines.lines) == without_times(plain_lines.lines)
    assert (tmp_path / "on" / "profile").is_dir() and not (tmp_path / "off" / "profile").exists()


def test_trace_holds_the_phases_of_the_traced_steps(tmp_path: Path) -> None:
    """The seven steps before the traced ones are of the first epoch; the trace has those of the second."""
    profiled(tmp_path)
    with gzip.open(tmp_path / "profile" / "trace.json.gz", "rt") as file:
        events = Counter(event.get("name") for event in json.load(file)["traceEvents"])
    assert all(events[f"step: {phase}"] >= 4 for phase in PHASES)
    operations = {one["name"]: one for one in found(tmp_path)["operations"]}
    assert len(operations) == 10
    assert operations["aten::addmm"]["calls"] == 2  # the two linear layers; the epoch's test is not counted
    assert not any(name.startswith(("step: ", "ProfilerStep")) for name in operations)


def test_waiting_for_images_is_found_and_advised_against(tmp_path: Path) -> None:
    profiled(tmp_path, on_batch=nap)
    result = found(tmp_path)
    assert result["phases_ms"]["data wait"] >= 1000 * NAP_S
    text = (tmp_path / "profile" / "summary.txt").read_text()
    assert "data wait" in text and "profile/trace.json.gz" in text
    assert [line in text for line in result["advice"]] == [True] * len(result["advice"])


@pytest.mark.parametrize(("share", "is_much"), [(0.1, False), (0.19, False), (0.21, True), (0.9, True)])
def test_advice_is_given_where_it_matters(share: float, is_much: bool) -> None:
    seconds = {**dict.fromkeys(PHASES, 0.0), "data wait": share, "forward": 1 - share}
    said = advice(seconds)
    assert len(said) == is_much
    assert not said or ("NUM_DATALOADER_WORKERS" in said[0] and f"{100 * share:.0f} %" in said[0])


def test_a_training_that_ends_early_leaves_what_was_timed(tmp_path: Path) -> None:
    profiled(tmp_path, WAIT=12, STEPS=50)
    result = found(tmp_path)
    assert result["steps"] == [13, 14] and result["operations"] == [] and result["trace"] == ""
    assert "no operations were traced" in (tmp_path / "profile" / "summary.txt").read_text()
    assert not list((tmp_path / "profile").glob("trace*"))


def test_a_training_that_ends_before_leaves_nothing(tmp_path: Path) -> None:
    profiled(tmp_path, WAIT=50)
    assert not (tmp_path / "profile").exists()


def test_times_alone(tmp_path: Path) -> None:
    profiled(tmp_path, CPU=False, GPU=False)
    assert found(tmp_path)["steps"] == [3, 6] and not (tmp_path / "profile" / "trace.json.gz").exists()


def test_unknown_process_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.PROFILE\.RANKS=\[3\]: no such process; here they are 0\."):
        profiled(tmp_path, RANKS=[3])
    profiled(tmp_path, RANKS=[0, 1])  # as VISSL's default, on one process
    assert found(tmp_path)["rank"] == 0


def test_a_profile_that_cannot_be_written_does_not_end_the_training(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    training, _ = profiled(tmp_path)
    assert training.step == 14 and "could not be written" in caplog.text


def test_report_shows_the_phases(tmp_path: Path) -> None:
    profiled(tmp_path, on_batch=nap)
    shown = section(RunFolder(tmp_path))
    assert shown is not None and all(phase in shown.body for phase in PHASES)
    assert section(RunFolder(tmp_path / "elsewhere")) is None


def test_metrics_know_the_waiting_of_every_line(tmp_path: Path) -> None:
    """Of the seconds that belong to a line, those of the nap were spent waiting: whatever the machine is busy with."""
    training, lines = make(tmp_path, on_batch=nap, log_every=1)
    training.run()
    train = [line for line in lines.lines if line["kind"] == "train"]
    rows = [2 if line["step"] % 7 == 0 else 8 for line in train]
    for line, count in zip(train, rows):
        seconds = count / line["images_per_s"]
        assert line["data_wait_share"] * seconds >= NAP_S * 0.999
        assert line["data_wait_share"] <= 1
