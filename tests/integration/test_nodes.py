"""Several machines: network namespaces where the system allows it, several launchers on this machine elsewhere."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.integration.hosts import Host, network, outcomes, why_not

WHY_NOT = why_not()
needs_network = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
PORT = 29507

ENDINGS = ["engine_name=endings", "config.PLUGINS=[launch_plugin]", "config.RUN.REPORT=false", "config.RUN.DIR=a"]
CPU = ["config.MACHINE.DEVICE=cpu", "config.RUN.PROGRESS=none"]

#: Features and clusters of a random trunk, a student that learns the clusters, and an evaluation of the random trunk.
CHAIN = {
    "engine_name": "pipeline",
    "config": {
        "PLUGINS": ["kill_plugin"],
        "SEED_VALUE": 3,
        "MULTI_PROCESSING_METHOD": "fork",
        "RUN": {"REPORT": False},
        "CHECKPOINT": {"EVERY_STEPS": 2},
        "DATA": {
            "NUM_DATALOADER_WORKERS": 0,
            **{
                split: {
                    "DATASET_NAMES": ["digits"],
                    "DATA_SOURCES": ["digits"],
                    "DATA_LIMIT": 98,
                    "BATCHSIZE_PER_REPLICA": 8,
                    "TRANSFORMS": [{"name": "Resize", "size": 16}, {"name": "ToTensor"}],
                }
                for split in ("TRAIN", "TEST")
            },
        },
        "MODEL": {"TRUNK": {"NAME": "resnet_small"}},
        "OPTIMIZER": {"NUM_EPOCHS": 1},
        "CLUSTERFIT": {"NUM_CLUSTERS": 6, "NUM_ITER": 5, "FEATURES": {"EXTRACT": True}},
        "PIPELINE": {
            "STAGES": [
                {"NAME": "clusters", "ENGINE": "cluster_features"},
                {
                    "NAME": "student",
                    "ENGINE": "train",
                    "CONFIG": {
                        "TEST_MODEL": False,
                        "TASK": {"NAME": "supervised_mortal"},
                        "DATA": {"TRAIN": {"LABEL_PATHS": ["{clusters}/clusters/labels.npy"]}},
                    },
                },
                {"NAME": "probe", "ENGINE": "evaluate", "CONFIG": {"NEAREST_NEIGHBOR": {"TOPK": [5]}}},
            ],
            "TABLE": {"ROWS": [{"TITLE": "random", "STAGE": "probe"}], "COLUMNS": {"kNN": "knn_top1"}},
        },
    },
}


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Four machines on a network."""
    with network(4) as machines:
        yield machines
        for one in machines:
            one.end()


@pytest.fixture
def here() -> Iterator[Host]:
    """This machine; what is left of a test's commands is ended."""
    host = Host()
    yield host
    host.end()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def meeting(num_nodes: int, endpoint: str, *, join_timeout_s: int = 300) -> list[str]:
    """The overrides that are the same on every machine."""
    return [
        f"config.DISTRIBUTED.NUM_NODES={num_nodes}",
        f"config.DISTRIBUTED.ENDPOINT={endpoint}",
        f"config.DISTRIBUTED.JOIN_TIMEOUT_S={join_timeout_s}",
    ]


# ------------------------------------------------------------------------------------------------------- a whole chain
@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared folder of all machines, with the recipe."""
    root = tmp_path_factory.mktemp("shared")
    (root / "recipes").mkdir()
    (root / "recipes/chain.yaml").write_text("# @package _global_\n" + yaml.safe_dump(CHAIN))
    return root


def chain(name: str) -> list[str]:
    return ["--config-dir", "recipes", "config=chain", *CPU, f"config.RUN.DIR={name}"]


@pytest.fixture(scope="module")
def alone(workplace: Path) -> Path:
    """The chain in one process."""
    host = Host()
    ((code, _, error),) = outcomes([host.start(workplace, *chain("alone"))])
    assert code == 0, error
    return workplace / "alone"


@pytest.fixture(scope="module")
def undisturbed(workplace: Path) -> Path:
    """The chain on two machines."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    with network(2) as machines:
        run_on(machines, workplace, "undisturbed")
    return workplace / "undisturbed"


def run_on(machines: list[Host], workplace: Path, name: str) -> None:
    """Run the chain on all these machines, the last one first: there is no order in which they must be started."""
    same = [*chain(name), *meeting(len(machines), f"{machines[0].address}:{PORT}")]
    (first, *others) = reversed(outcomes([host.start(workplace, *same) for host in reversed(machines)]))
    assert first[0] == 0, first[2]
    assert "kNN" in first[1] and "machine 2 of" in first[2]
    for code, out, error in others:
        assert code == 0, error
        assert out == "" and error.splitlines()[-1].startswith("done; the first machine has written the results")


def content(run_dir: Path, *patterns: str) -> dict[str, bytes]:
    files = [file for pattern in patterns for file in run_dir.glob(pattern)]
    assert files
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in files}


def counts(run_dir: Path) -> dict[str, object]:
    results = json.loads((run_dir / "probe/results.json").read_text())
    return {key: value for key, value in results.items() if "per_s" not in key and "seconds" not in key}


def assert_same_outputs(run_dir: Path, alone: Path) -> None:
    """Labels and features are equal as bytes, counts are equal."""
    files = ("clusters/clusters/*.npy", "clusters/features/*/*.npy", "clusters/features/*/*/*.npy")
    assert content(run_dir, *files) == content(alone, *files)
    assert counts(run_dir) == counts(alone)
    assert json.loads((run_dir / "clusters/results.json").read_text())["train_rows"] == 98


@needs_network
def test_two_machines_write_what_one_process_writes(undisturbed: Path, alone: Path) -> None:
    assert_same_outputs(undisturbed, alone)
    assert json.loads((undisturbed / "student/plan.json").read_text())["values"]["world_size"] == 2


@needs_network
def test_four_machines_write_what_one_process_writes(hosts: list[Host], workplace: Path, alone: Path) -> None:
    run_on(hosts, workplace, "four")
    assert_same_outputs(workplace / "four", alone)
    assert json.loads((workplace / "four/student/plan.json").read_text())["values"]["world_size"] == 4


@needs_network
def test_a_machine_that_dies_and_comes_back_changes_nothing(
    hosts: list[Host], workplace: Path, undisturbed: Path
) -> None:
    same = [*chain("disturbed"), *meeting(2, f"{hosts[0].address}:{PORT}")]
    first = hosts[0].start(workplace, *same)
    second = hosts[1].start(workplace, *same, env={"KILL_GROUP_AFTER": "4"})
    second.communicate(timeout=300)
    assert second.returncode == -signal.SIGKILL
    again = hosts[1].start(workplace, *same)
    (code, _, error), (code_again, _, error_again) = outcomes([first, again])
    assert code == 0, error
    assert code_again == 0, error_again
    assert "lost the connection to another process" in error and "(restart 1 of 3)" in error
    assert "Traceback" not in error + error_again
    for stage in ("disturbed", "undisturbed"):
        assert (workplace / stage / "student/checkpoints/last/model.safetensors").is_file()
    weights = ("student/checkpoints/last/model.safetensors", "clusters/clusters/*.npy")
    assert content(workplace / "disturbed", *weights) == content(undisturbed, *weights)
    assert counts(workplace / "disturbed") == counts(undisturbed)
