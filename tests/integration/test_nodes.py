"""Several machines: several launchers on this one, and network namespaces where the system allows it."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.integration.forks import Fork, run_ranks
from tests.integration.hosts import PATIENCE_S, Host, network, outcomes, why_not

WHY_NOT = why_not()
needs_network = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
PORT = 29507

ENDINGS = ["engine_name=endings", "config.PLUGINS=[launch_plugin]", "config.RUN.REPORT=false", "config.RUN.DIR=a"]
CPU = ["config.MACHINE.DEVICE=cpu", "config.RUN.PROGRESS=none"]

#: Features and clusters of a random trunk, a student that learns the clusters, and an evaluation of the random trunk.
CHAIN: dict[str, Any] = {
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
                    "DATA_SOURCES": ["disk_folder"],
                    "DATA_PATHS": ["images"],
                    "BATCHSIZE_PER_REPLICA": 8,
                    "TRANSFORMS": [{"name": "ToTensor"}],
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
    """The shared folder of all machines, with the recipe and 98 images of 7 classes."""
    root = tmp_path_factory.mktemp("shared")
    (root / "recipes").mkdir()
    write_recipe(root, "chain", CHAIN)
    draw = np.random.default_rng(0)
    for label in range(7):
        folder = root / f"images/{label}"
        folder.mkdir(parents=True)
        for number, noise in enumerate(draw.integers(0, 90, (14, 16, 16, 3), np.uint8)):
            Image.fromarray(noise + np.uint8(20 * label)).save(folder / f"{number:02}.png")
    return root


def write_recipe(root: Path, name: str, page: dict[str, Any]) -> None:
    (root / f"recipes/{name}.yaml").write_text("# @package _global_\n" + yaml.safe_dump(page))


def chain(name: str) -> list[str]:
    return ["--config-dir", "recipes", "config=chain", *CPU, f"config.RUN.DIR={name}"]


@pytest.fixture(scope="module")
def alone(workplace: Path) -> Path:
    """The chain in one process."""
    (done,) = run_ranks(chain("alone"), cwd=workplace)
    assert done.returncode == 0, done.stderr
    return workplace / "alone"


def run_on(machines: list[Host], workplace: Path, name: str) -> None:
    """Run the chain on all these machines, the last one first: there is no order in which they must be started."""
    port = PORT if machines[0].namespace else free_port()
    same = [*chain(name), *meeting(len(machines), f"{machines[0].address}:{port}")]
    own = [[] if host.namespace else [f"config.DISTRIBUTED.NODE_ID={node}"] for node, host in enumerate(machines)]
    commands = [host.start(workplace, *same, *more) for host, more in reversed([*zip(machines, own)])]
    (first, *others) = reversed(outcomes(commands))
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
def test_four_machines_write_what_one_process_writes(hosts: list[Host], workplace: Path, alone: Path) -> None:
    run_on(hosts, workplace, "four")
    assert_same_outputs(workplace / "four", alone)
    assert json.loads((workplace / "four/student/plan.json").read_text())["values"]["world_size"] == 4


@pytest.mark.skipif(not WHY_NOT, reason="four machines on a network do the same")
def test_two_launchers_on_this_machine_write_what_one_process_writes(here: Host, workplace: Path, alone: Path) -> None:
    run_on([here, here], workplace, "two")
    assert_same_outputs(workplace / "two", alone)
    assert json.loads((workplace / "two/student/plan.json").read_text())["values"]["world_size"] == 2


@needs_network
def test_of_two_machines_one_dies_and_comes_back(hosts: list[Host], workplace: Path, alone: Path) -> None:
    """Everything equals what one process writes, the training what two undisturbed processes compute, to the last bit."""
    same = [*chain("disturbed"), *meeting(2, f"{hosts[0].address}:{PORT}")]
    first = hosts[0].start(workplace, *same)
    second = hosts[1].start(workplace, *same, env={"KILL_LAUNCHER_AFTER": "4"})
    second.communicate(timeout=PATIENCE_S)  # until its rank, which writes there too, has ended as well
    assert second.returncode == -signal.SIGKILL
    again = hosts[1].start(workplace, *same)
    (code, _, error), (code_again, _, error_again) = outcomes([first, again])
    assert code == 0, error
    assert code_again == 0, error_again
    assert "lost the connection to another process" in error and "(restart 1 of 3)" in error
    assert "Traceback" not in error + error_again
    assert_same_outputs(workplace / "disturbed", alone)
    assert json.loads((workplace / "disturbed/student/plan.json").read_text())["values"]["world_size"] == 2

    stage = CHAIN["config"] | CHAIN["config"]["PIPELINE"]["STAGES"][1]["CONFIG"]
    labelled = CHAIN["config"]["DATA"]["TRAIN"] | {"LABEL_PATHS": ["alone/clusters/clusters/labels.npy"]}
    stage["DATA"] = CHAIN["config"]["DATA"] | {"TRAIN": labelled}
    page = {"engine_name": "train", "config": {key: value for key, value in stage.items() if key != "PIPELINE"}}
    write_recipe(workplace, "student", page)
    command = ["--config-dir", "recipes", "config=student", *CPU, "config.RUN.DIR=undisturbed"]
    undisturbed = run_ranks(command, ranks=2, cwd=workplace)
    assert [rank.returncode for rank in undisturbed] == [0, 0], undisturbed
    weights = "checkpoints/last/model.safetensors"
    assert content(workplace / "disturbed/student", weights) == content(workplace / "undisturbed", weights)


# ----------------------------------------------------------------------------------------- launchers on one machine
def test_an_endpoint_that_nobody_answers(here: Host, tmp_path: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    wrong = meeting(2, endpoint, join_timeout_s=2)
    ((code, out, error),) = outcomes([here.start(tmp_path, *ENDINGS, *CPU, *wrong, "config.DISTRIBUTED.NODE_ID=1")])
    assert code == 2 and out == ""
    assert error.splitlines() == [
        f"waiting for the first machine at {endpoint} (at most 2 s)",
        f"error: config.DISTRIBUTED.ENDPOINT='{endpoint}': nobody answered within 2 s (config.DISTRIBUTED.JOIN_TIMEOUT_S). "
        "Start the same command on the machine that has this address, and let no firewall close the port.",
    ]
    assert not (tmp_path / "a").exists()


def test_an_endpoint_where_another_program_listens(here: Host, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        wrong = meeting(2, f"127.0.0.1:{other.getsockname()[1]}", join_timeout_s=2)
        command = here.start(tmp_path, *ENDINGS, *CPU, *wrong, "config.DISTRIBUTED.NODE_ID=1")
        ((code, _, error),) = outcomes([command])
    assert code == 2 and len(error.splitlines()) <= 2 and "nobody answered within 2 s" in error


def test_another_machine_begins_when_it_sees_all_that_its_processes_read(tmp_path: Path) -> None:
    """On a shared file system config.yaml may come into sight later than launch.json, which is written after it."""
    from torch.distributed import TCPStore

    from vissl_like.config.schema import Distributed, Job
    from vissl_like.launch import folder
    from vissl_like.launch.machine import Processes
    from vissl_like.launch.nodes import Meeting, Session

    job, processes = Job.model_validate({"engine_name": "train", "config": {}}), Processes("cpu", 1, 2)
    options = Distributed(NUM_NODES=2, ENDPOINT=f"127.0.0.1:{free_port()}", JOIN_TIMEOUT_S=60)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    first, second = (
        Session(Meeting(store, options, tmp_path, first=is_first), job, processes, tmp_path)
        for is_first in (True, False)
    )
    files = [tmp_path / name for name in ("config.yaml", "plan.json")]
    with first.leading():
        folder.write_json(tmp_path / "launch.json", {"started": "now"})
        first.offer()
        threading.Timer(1.0, lambda: [file.touch() for file in files]).start()
        with second.following() as ending:
            assert ending is None and all(file.is_file() for file in files)


def test_a_machine_that_never_comes(here: Host, tmp_path: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    second = here.start(tmp_path, *ENDINGS, *CPU, *meeting(3, endpoint), "config.DISTRIBUTED.NODE_ID=1")
    assert second.stderr is not None and second.stderr.readline().startswith("waiting for the first machine")
    short = meeting(3, endpoint, join_timeout_s=5)
    first = here.start(tmp_path, *ENDINGS, *CPU, *short, "config.DISTRIBUTED.NODE_ID=0")
    for code, _, error in outcomes([first, second]):
        assert code == 2
        assert error.splitlines()[-1].startswith(
            f"error: config.DISTRIBUTED.NUM_NODES=3: only 2 of 3 machines came to {endpoint} within 5 s"
        )
        assert "Traceback" not in error


def test_machines_that_do_not_fit_are_refused_and_a_mistake_ends_the_others(here: Host, tmp_path: Path) -> None:
    port, elsewhere = free_port(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    same = [*ENDINGS, *CPU, "config.RUN.NAME=mistake", *meeting(2, f"127.0.0.1:{port}")]
    node = "config.DISTRIBUTED.NODE_ID="
    first = here.start(tmp_path, *same, f"{node}0")
    short = "config.DISTRIBUTED.JOIN_TIMEOUT_S=150"
    other_seed = here.start(tmp_path, *same, f"{node}1", short, "config.SEED_VALUE=5")
    other_name = here.start(tmp_path, *same, f"{node}1", short, "config.RUN.DIR=b")
    other, name = outcomes([other_seed, other_name])
    assert other[0] == 2 and "\n  config.SEED_VALUE: there 0, now 5\n" in other[2]
    assert name[0] == 2 and "config.RUN.DIR: there 'a', now 'b'" in name[2]
    (folder,) = outcomes([here.start(elsewhere, *same, f"{node}1", "config.DISTRIBUTED.JOIN_TIMEOUT_S=1")])
    assert folder[0] == 2 and "config.RUN.DIR='a': this machine" in folder[2] and "share" in folder[2]

    right = here.start(tmp_path, *same, f"{node}1")
    for code, out, error in outcomes([first, right]):
        assert code == 3 and out == ""
        assert error.splitlines()[-1] == "error: config.DATA: these images are wrong."
    log = (tmp_path / "a/log.txt").read_text()
    assert log.count("a machine cannot take part") == 3 and "config.SEED_VALUE: there 0, now 5" in log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "elsewhere"] and not list(elsewhere.iterdir())


def test_restarts_are_counted_and_a_sweep_goes_on_on_all_machines(here: Host, tmp_path: Path) -> None:
    """The first point loses a process in every round."""
    same = ["-m", *ENDINGS, *CPU, "config.RUN.NAME=killed,ok", *meeting(2, f"127.0.0.1:{free_port()}")]
    same.append("config.DISTRIBUTED.MAX_RESTARTS=1")
    both = [here.start(tmp_path, *same, f"config.DISTRIBUTED.NODE_ID={node}") for node in (0, 1)]
    for code, out, error in outcomes(both):
        assert code == 1 and "Traceback" not in error
        (cause,) = [line for line in error.splitlines() if line.startswith("error:")]
        assert cause.startswith("error: rank 1 was killed by signal 9 (SIGKILL)") and cause.endswith("again to resume.")
        assert "after 1 restart (" in cause
        assert ["failed (1)" in line or "done" in line for line in out.splitlines()[-2:]] == [True, True]
    started = (tmp_path / "a/RUN.NAME-killed/started.txt").read_text().splitlines()
    assert sorted(line.split(",")[0] for line in started) == ["0 of 2"] * 2 + ["1 of 2"] * 2
    ledger = [json.loads(line) for line in (tmp_path / "a/sweep.jsonl").read_text().splitlines()]
    assert [(line["status"], line["metrics"].get("ranks")) for line in ledger] == [("failed", None), ("done", 2)]


def wait_for(file: Path, lines: int, commands: list[Fork]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and all(command.poll() is None for command in commands):
        if file.exists() and len(file.read_text().splitlines()) >= lines:
            return
        time.sleep(0.1)
    raise AssertionError([command.communicate() for command in commands if command.poll() is not None])


def test_a_signal_to_one_machine_stops_all_after_saving(here: Host, tmp_path: Path) -> None:
    same = [*ENDINGS, *CPU, "config.RUN.NAME=stop", *meeting(2, f"127.0.0.1:{free_port()}")]
    both = [here.start(tmp_path, *same, f"config.DISTRIBUTED.NODE_ID={node}") for node in (0, 1)]
    wait_for(tmp_path / "a/started.txt", 2, both)
    time.sleep(2)  # both listen now
    both[1].send_signal(signal.SIGUSR1)
    for code, _, error in outcomes(both):
        assert code == 75, error
        assert error.splitlines()[-1] == "stopped by SIGUSR1 after step 1."


def test_without_the_first_machine_the_others_end(here: Host, tmp_path: Path) -> None:
    same = [*ENDINGS, *CPU, *meeting(3, f"127.0.0.1:{free_port()}")]
    first, second = (here.start(tmp_path, *same, f"config.DISTRIBUTED.NODE_ID={node}") for node in (0, 1))
    wait_for_line(tmp_path / "a/log.txt", "machine 2 of 3 is here")
    os.killpg(first.pid, signal.SIGKILL)
    ((code, _, error),) = outcomes([second])
    assert code == 1 and "Traceback" not in error
    last = error.splitlines()[-1]
    assert "does not answer any more; start the same command again on all machines to resume" in last


def wait_for_line(file: Path, words: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not (file.exists() and words in file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
