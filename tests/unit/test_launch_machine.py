"""Devices and processes of this machine, and what is written about it."""

import json
from pathlib import Path

import pytest
import torch

from vissl_like.config.schema import Config
from vissl_like.errors import ConfigError
from vissl_like.launch.machine import Processes, environment, processes_for, started_by_torchrun, write_environment


def config(*, device: str = "auto", processes: int = 0, nodes: int = 1) -> Config:
    return Config(MACHINE={"DEVICE": device}, DISTRIBUTED={"NUM_PROC_PER_NODE": processes, "NUM_NODES": nodes})


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As many GPUs as the test says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize(
    ("gpus", "given", "expected"),
    [
        (0, config(), Processes("cpu", 1, 1)),
        (0, config(processes=3), Processes("cpu", 3, 3)),
        (4, config(), Processes("gpu", 4, 4)),
        (4, config(processes=2), Processes("gpu", 2, 2)),
        (4, config(processes=4, nodes=3), Processes("gpu", 4, 12)),
        (4, config(device="cpu"), Processes("cpu", 1, 1)),
    ],
    indirect=["gpus"],
)
def test_one_process_per_gpu_or_one_on_a_cpu(gpus: None, given: Config, expected: Processes) -> None:
    assert processes_for(given) == expected


@pytest.mark.parametrize(
    ("gpus", "given", "words"),
    [
        (0, config(device="gpu"), "config.MACHINE.DEVICE='gpu': PyTorch finds no GPU"),
        (2, config(processes=8), "config.DISTRIBUTED.NUM_PROC_PER_NODE=8: this machine has 2 GPUs"),
        (1, config(device="gpu", processes=2), "this machine has 1 GPU, and a process"),
    ],
    indirect=["gpus"],
)
def test_what_the_machine_does_not_have(gpus: None, given: Config, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        processes_for(given)
    assert words in str(caught.value)


def test_torchrun_decides_about_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not started_by_torchrun()
    values = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert started_by_torchrun()
    assert processes_for(config(device="cpu", processes=1)) == Processes("cpu", 4, 8)


def test_environment_holds_versions_and_hardware_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    write_environment(tmp_path)
    text = (tmp_path / "environment.json").read_text()
    assert json.loads(text) == environment() and "hunter2" not in text
    assert environment()["packages"]["torch"]
    assert environment()["cores"] >= 1
