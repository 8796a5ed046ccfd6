"""What a process learns from SLURM's variables: node lists, tasks of srun, and what looks like them but is none."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vissl_like.config.schema import Config, Job
from vissl_like.core import distributed
from vissl_like.errors import ConfigError
from vissl_like.launch import allocation
from vissl_like.launch.allocation import Step, adopt, counts, expand, in_job, join, port_for, recognise
from vissl_like.launch.machine import Processes, processes_for

#: As SLURM 22.05 set them for the second task of `srun` with one task on each of two nodes.
SRUN = {
    "SLURM_CPUS_PER_TASK": "2",
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
#: As it set them in the batch script, and in the shell of `salloc`.
BATCH = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}
SALLOC = {name: value for name, value in BATCH.items() if name not in ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_PROCID")}
FOUR_TASKS = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """These variables of SLURM and no others; what a test adds is taken away again."""
    names = (*("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),)
    ours = (*names, allocation.ONE_GPU_PER_TASK, "SUBMITIT_EXECUTOR", "CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID")
    for name in (*ours, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the test does
        monkeypatch.delenv(name)
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


def job(**sections: dict[str, Any]) -> Job:
    return Job(config=Config(**sections))


# ---------------------------------------------------------------------------------------------------------- node lists
@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node7", ["node7"]),
        ("node[01-03,7],gpu-a-[1,3]-ib", ["node01", "node02", "node03", "node7", "gpu-a-1-ib", "gpu-a-3-ib"]),
        ("a,b-1,c[9-11].x", ["a", "b-1", "c9.x", "c10.x", "c11.x"]),
        ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
        ("[1-2]", ["1", "2"]),
    ],
)
def test_node_lists_of_slurm(text: str, hosts: list[str]) -> None:
    assert expand(text) == hosts


@pytest.mark.parametrize(
    "text", ["", "a[1", "a]1[", "a[[1]]", "a[]", "a[3-1]", "a[x]", "a[1-]", "a,,b", "a[1,]", "a[-1]"]
)
def test_what_is_no_node_list(text: str) -> None:
    with pytest.raises(ValueError, match="node list"):
        expand(text)


names = st.from_regex(r"[a-z]([a-z-]{0,4}[a-z])?", fullmatch=True)
widths = st.integers(1, 4)


@st.composite
def groups(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A group as SLURM writes it, and its hosts."""
    text, hosts = draw(names), [""]
    hosts = [text]
    for _ in range(draw(st.integers(0, 2))):
        width = draw(widths)
        spans = draw(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=1, max_size=3))
        numbers = [f"{n:0{width}}" for first, more in spans for n in range(first, first + more + 1)]
        text += (
            "["
            + ",".join(f"{first:0{width}}" + (f"-{first + more:0{width}}" if more else "") for first, more in spans)
            + "]"
        )
        suffix = draw(st.sampled_from(["", "-ib", ".x"]))
        text += suffix
        hosts = [host + number + suffix for host in hosts for number in numbers]
    return text, hosts


@given(st.lists(groups(), min_size=1, max_size=4))
def test_every_node_list_gives_its_hosts_in_order(parts: list[tuple[str, list[str]]]) -> None:
    text = ",".join(group for group, _ in parts)
    assert expand(text) == [host for _, hosts in parts for host in hosts]


@given(st.lists(groups(), min_size=1, max_size=3))
def test_node_lists_are_read_as_submitit_reads_them(parts: list[tuple[str, list[str]]]) -> None:
    from submitit.slurm.slurm import _parse_node_list

    text = ",".join(group for group, _ in parts)
    assert expand(text) == _parse_node_list(text)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 5)), min_size=1, max_size=6))
def test_counts(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{number}(x{times})" if times > 1 else str(number) for number, times in runs)
    assert counts(text) == [number for number, times in runs for _ in range(times)]


def test_what_are_no_counts() -> None:
    for text in ("", "2(x)", "x2", "2,", "2(x3"):
        with pytest.raises(ValueError, match="no list of counts"):
            counts(text)


@given(st.integers(1, 10**8), st.integers(0, 50))
def test_ports_are_free_for_users_and_differ_between_neighbours(job_id: int, step_id: int) -> None:
    assert 1024 < port_for(job_id, step_id) < 32768
    assert len({port_for(job_id, step_id), port_for(job_id, step_id + 1), port_for(job_id + 1, step_id)}) == 3


# ---------------------------------------------------------------------------------------------------------- recognising
def test_a_task_of_srun() -> None:
    step = recognise(SRUN)
    assert step == Step(41, 0, ("node1", "node2"), (1, 1), node=1, rank=1, local_rank=0)
    assert step is not None and step.name == "41.0"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH,
        SALLOC,
        SRUN | {"SLURM_PTY_PORT": "42111"},  # srun --pty bash
        SRUN | {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # the interactive step of salloc
        SRUN | {"SLURM_STEP_ID": str(0xFFFFFFFB)},  # the batch step
    ],
    ids=["no SLURM", "batch script", "salloc", "pty", "interactive step", "batch step"],
)
def test_what_is_no_task_of_srun(environ: dict[str, str]) -> None:
    assert recognise(environ) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SLURM_NODEID": "2"}, "does not fit 2 nodes"),
        ({"SLURM_LOCALID": "1"}, "does not fit 2 nodes"),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, r"with \[1\] tasks"),
        ({"SLURM_STEP_NODELIST": "node[1-"}, "not wholly"),
        ({"SLURM_JOB_ID": "x"}, "not wholly"),
    ],
)
def test_variables_that_contradict_each_other(change: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recognise(SRUN | change)


# -------------------------------------------------------------------------------------------------- one task per node
@pytest.mark.parametrize("environ", [SRUN], indirect=True)
def test_one_task_per_node_infers_the_machines(environ: None) -> None:
    adopted, _ = adopt(job())
    options = adopted.config.DISTRIBUTED
    assert (options.NUM_NODES, options.ENDPOINT, options.NODE_ID) == (2, f"node1:{port_for(41)}", 1)
    join()
    assert "RANK" not in os.environ


@pytest.mark.parametrize("environ", [SRUN | {"SLURM_NODEID": "0", "SLURM_PROCID": "0"}], indirect=True)
def test_what_is_inferred_is_said_once_with_its_reason(environ: None) -> None:
    _, notes = adopt(job())
    keys = [note.split("=")[0].removeprefix("config.DISTRIBUTED.") for note in notes]
    assert keys == ["NUM_NODES", "ENDPOINT", "NODE_ID"]
    assert notes[0] == "config.DISTRIBUTED.NUM_NODES=2 is inferred: the tasks of srun (SLURM step 41.0)."


@pytest.mark.parametrize("environ", [SRUN], indirect=True)
def test_what_is_given_stays(environ: None) -> None:
    given_job = job(DISTRIBUTED={"NUM_NODES": 2, "ENDPOINT": "h:1", "NODE_ID": 0})
    assert adopt(given_job) == (given_job, [])
    with pytest.raises(ConfigError, match="NUM_NODES=4: srun started this on 2 nodes"):
        adopt(job(DISTRIBUTED={"NUM_NODES": 4}))


@pytest.mark.parametrize("environ", [BATCH, SALLOC], indirect=True)
def test_several_machines_without_srun_are_refused_with_the_cure(environ: None) -> None:
    with pytest.raises(
        ConfigError, match="was not started by srun. Start it on all: srun --nodes=2 --ntasks-per-node=1"
    ):
        adopt(job(DISTRIBUTED={"NUM_NODES": 2}))
    for harmless in (job(), job(DISTRIBUTED={"NUM_NODES": 2, "ENDPOINT": "h:1"})):  # others are started in another way
        assert adopt(harmless) == (harmless, [])
    join()
    assert "RANK" not in os.environ


ONE_TASK = SRUN | {
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_STEP_NODELIST": "node1",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
}


@pytest.mark.parametrize("environ", [ONE_TASK], indirect=True)
def test_one_task_is_a_plain_run(environ: None) -> None:
    assert adopt(job()) == (job(), [])
    with pytest.raises(ConfigError, match="srun started one task"):
        adopt(job(DISTRIBUTED={"NUM_NODES": 2}))
    join()
    assert "RANK" not in os.environ and not allocation.are_ranks()


@pytest.mark.parametrize("environ", [{}, {"SLURM_JOB_ID": "41"}, {"SUBMITIT_EXECUTOR": "local"}], indirect=True)
def test_a_job_is_not_submitted_from_inside_a_job(environ: None) -> None:
    _, notes = adopt(job(SLURM={"USE_SLURM": True}))
    if "SLURM_JOB_ID" in os.environ:
        assert notes == ["config.SLURM.USE_SLURM=true: this already is SLURM job 41, so the run starts here."]
    else:
        assert notes == []
    assert in_job() == bool({"SLURM_JOB_ID", "SUBMITIT_EXECUTOR"} & set(os.environ))


# ------------------------------------------------------------------------------------------------- one task per process
@pytest.mark.parametrize("environ", [FOUR_TASKS], indirect=True)
def test_several_tasks_on_a_node_are_ranks(environ: None) -> None:
    join()
    assert {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node1", str(port_for(41)))
    assert processes_for(Config(MACHINE={"DEVICE": "cpu"})) == Processes("cpu", 2, 4)
    assert allocation.starter() == "srun" and allocation.cores_of_node() == 4


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}


@pytest.mark.parametrize("environ", [FOUR_TASKS | TORCHRUN | {"MASTER_ADDR": "h", "MASTER_PORT": "1"}], indirect=True)
def test_what_torchrun_said_below_srun_stays(environ: None) -> None:
    join()
    assert os.environ["WORLD_SIZE"] == "8" and allocation.starter() == "torchrun"


@pytest.mark.parametrize("environ", [FOUR_TASKS | {"SLURM_STEP_TASKS_PER_NODE": "1,2"}], indirect=True)
def test_nodes_with_different_tasks_are_refused(environ: None) -> None:
    with pytest.raises(ConfigError, match=r"the nodes have \[1, 2\] tasks"):
        join()


@pytest.mark.parametrize(
    ("environ", "own"),
    [
        (FOUR_TASKS | {"CUDA_VISIBLE_DEVICES": "1", "SLURM_STEP_GPUS": "0,1"}, True),
        (FOUR_TASKS | {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_PER_TASK": "1"}, True),
        (FOUR_TASKS | {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "2"}, True),
        (FOUR_TASKS | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_GPUS": "0,1"}, False),  # all tasks see all
        (FOUR_TASKS | {"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_GPUS": "0"}, False),  # two tasks on one GPU
        (FOUR_TASKS, False),
    ],
    indirect=["environ"],
)
def test_a_task_that_sees_one_gpu_uses_that(environ: None, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    visible = len(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    join()
    assert allocation.ONE_GPU_PER_TASK == distributed.ONE_GPU_PER_TASK
    if not own and visible == 1:
        with pytest.raises(ConfigError, match="this machine has 1 GPU"):
            processes_for(Config())
        return
    assert processes_for(Config()) == Processes("gpu", 2, 4)
    assert distributed._pick_device("gpu", local_rank=1, local_size=2) == torch.device("cuda", 0 if own else 1)
    assert chosen == [0 if own else 1]
