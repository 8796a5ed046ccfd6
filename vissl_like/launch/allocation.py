"""A SLURM job that the user opened himself: what srun says about this process, and what follows for the run. No torch.

`srun` with one task per node: each task starts the processes of its node; number of nodes, endpoint and node id are
inferred. `srun` with several tasks on a node: the tasks are the ranks. Without srun (a batch script, a shell, a notebook
inside a job) a command runs on its node alone, whatever else SLURM's variables say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vissl_like.config.schema import Job
from vissl_like.errors import ConfigError
from vissl_like.launch.machine import started_by_torchrun

#: As in core.distributed, which is not imported here since it needs torch: such ranks use the first GPU they see.
ONE_GPU_PER_TASK = "VISSL_LIKE_ONE_GPU_PER_TASK"

#: Step numbers from here on stand for batch scripts, interactive shells and the like, not for srun.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
#: Ports that follow from a job's number: above well-known ones, below those that systems give to clients.
_FIRST_PORT, _NUM_PORTS = 10000, 20000


@dataclass(frozen=True)
class Step:
    """One task of an srun: `tasks` counts those of each node, in the order of `hosts`."""

    job_id: int
    step_id: int
    hosts: tuple[str, ...]
    tasks: tuple[int, ...]
    node: int
    rank: int
    local_rank: int

    @property
    def name(self) -> str:
        """As SLURM writes it."""
        return f"{self.job_id}.{self.step_id}"

    @property
    def port(self) -> int:
        """The same on every task, another one for each step."""
        return port_for(self.job_id, self.step_id)


def recognise(environ: Mapping[str, str]) -> Step | None:
    """The srun task that this environment describes, or None. Raises ConfigError if it contradicts itself."""
    step_id = environ.get("SLURM_STEP_ID", "")
    if not step_id.isdigit() or int(step_id) >= _FIRST_SPECIAL_STEP or "SLURM_PROCID" not in environ:
        return None
    if "SLURM_PTY_PORT" in environ:  # srun --pty: a shell, of which only the first task is somebody's terminal
        return None
    try:
        step = Step(
            job_id=int(environ["SLURM_JOB_ID"]),
            step_id=int(step_id),
            hosts=tuple(expand(environ["SLURM_STEP_NODELIST"])),
            tasks=tuple(counts(environ["SLURM_STEP_TASKS_PER_NODE"])),
            node=int(environ["SLURM_NODEID"]),
            rank=int(environ["SLURM_PROCID"]),
            local_rank=int(environ["SLURM_LOCALID"]),
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"SLURM's variables describe a task of srun, but not wholly ({error}). Start it anew by srun, or take "
            "SLURM_STEP_ID out of the environment to run on this machine alone."
        ) from error
    if len(step.hosts) != len(step.tasks) or step.node >= len(step.hosts) or step.local_rank >= step.tasks[step.node]:
        raise ConfigError(
            f"SLURM step {step.name}: task {step.rank} on node {step.node} does not fit {len(step.hosts)} nodes "
            f"with {list(step.tasks)} tasks. Take SLURM_STEP_ID out of the environment to run on this machine alone."
        )
    return step


def in_job(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process belongs to a SLURM job, or to one that submitit started."""
    return "SLURM_JOB_ID" in environ or "SUBMITIT_EXECUTOR" in environ


def are_ranks(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether srun started several tasks on a node, so that each is a rank."""
    step = recognise(environ)
    return step is not None and max(step.tasks) > 1


def starter() -> str:
    """Who started processes whose environment is torchrun's: it, or srun."""
    return "srun" if are_ranks() and "TORCHELASTIC_RUN_ID" not in os.environ else "torchrun"


# ------------------------------------------------------------------------------------------------- what follows for a run
def join() -> None:
    """Where srun started several tasks on a node: name them as torchrun names its ranks. Else do nothing."""
    step = None if started_by_torchrun() else recognise(os.environ)
    if step is None or max(step.tasks) == 1:
        return
    if len(set(step.tasks)) > 1:
        raise ConfigError(
            f"SLURM step {step.name}: the nodes have {list(step.tasks)} tasks. Every node must have as many: "
            "srun --ntasks-per-node=N, or one task per node with config.DISTRIBUTED.NUM_PROC_PER_NODE."
        )
    os.environ.update(ranks(step))
    if has_own_gpu(os.environ, num_tasks=step.tasks[step.node]):
        os.environ[ONE_GPU_PER_TASK] = "1"


def ranks(step: Step) -> dict[str, str]:
    """What torchrun would tell this task."""
    return {
        "RANK": str(step.rank),
        "LOCAL_RANK": str(step.local_rank),
        "WORLD_SIZE": str(sum(step.tasks)),
        "LOCAL_WORLD_SIZE": str(step.tasks[step.node]),
        "MASTER_ADDR": step.hosts[0],
        "MASTER_PORT": str(step.port),
    }


def has_own_gpu(environ: Mapping[str, str], *, num_tasks: int) -> bool:
    """Whether this task sees one GPU while the `num_tasks` tasks of its node have one each."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    listed = max(len(environ.get(name, "").split(",")) for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS"))
    counted = environ.get("SLURM_GPUS_ON_NODE", "")
    of_the_node = max(listed, int(counted) if counted.isdigit() else 0)
    return bool(visible) and "," not in visible and (of_the_node >= num_tasks or "SLURM_GPUS_PER_TASK" in environ)


def cores_of_node(environ: Mapping[str, str] = os.environ) -> int | None:
    """CPU cores of this node's tasks together, where srun gave each its share; None where this process sees them all."""
    step = recognise(environ)
    share = environ.get("SLURM_CPUS_PER_TASK", "")
    return step.tasks[step.node] * int(share) if step is not None and share.isdigit() else None


def adopt(job: Job) -> tuple[Job, list[str]]:
    """The job with what the allocation says about machines, and a line about each value that was inferred."""
    step = recognise(os.environ)
    notes = []
    if job.config.SLURM.USE_SLURM and in_job() and "SUBMITIT_EXECUTOR" not in os.environ:
        number = os.environ["SLURM_JOB_ID"]
        notes.append(f"config.SLURM.USE_SLURM=true: this already is SLURM job {number}, so the run starts here.")
    if step is None or len(step.hosts) == 1:
        _check_alone(job, step)
        return job, notes
    given = job.config.DISTRIBUTED
    if given.NUM_NODES not in (1, len(step.hosts)):
        raise ConfigError(
            f"config.DISTRIBUTED.NUM_NODES={given.NUM_NODES}: srun started this on {len(step.hosts)} nodes (SLURM step "
            f"{step.name}). Leave it out, or use srun --nodes={given.NUM_NODES} --ntasks-per-node=1."
        )
    inferred = {
        "NUM_NODES": len(step.hosts),
        "ENDPOINT": given.ENDPOINT or f"{step.hosts[0]}:{step.port}",
        "NODE_ID": step.node if given.NODE_ID < 0 else given.NODE_ID,
    }
    reasons = {
        "NUM_NODES": "the tasks of srun",
        "ENDPOINT": "the first node, a port of this step",
        "NODE_ID": "this task",
    }
    for key, value in inferred.items():
        if value != getattr(given, key) and step.node == 0:  # said once, not by every node
            notes.append(f"config.DISTRIBUTED.{key}={value} is inferred: {reasons[key]} (SLURM step {step.name}).")
    distributed = given.model_copy(update=inferred)
    return job.model_copy(update={"config": job.config.model_copy(update={"DISTRIBUTED": distributed})}), notes


def _check_alone(job: Job, step: Step | None) -> None:
    """Several machines are wanted, but SLURM started this command on one only, and nobody said where the others are."""
    options = job.config.DISTRIBUTED
    if "SLURM_JOB_ID" not in os.environ or options.NUM_NODES == 1 or options.ENDPOINT:
        return
    who = f"srun started one task (step {step.name})" if step is not None else "it was not started by srun"
    raise ConfigError(
        f"config.DISTRIBUTED.NUM_NODES={options.NUM_NODES}: this command runs on one node of SLURM job "
        f"{os.environ['SLURM_JOB_ID']} only, {who}. Start it on all: srun --nodes={options.NUM_NODES} "
        "--ntasks-per-node=1 COMMAND; or leave config.DISTRIBUTED.NUM_NODES out to run on this node."
    )


def port_for(job_id: int, step_id: int = 0) -> int:
    """A port that follows from a job and its step, so that two of them on one node do not meet."""
    return _FIRST_PORT + (job_id * 7 + step_id) % _NUM_PORTS


# ------------------------------------------------------------------------------------------------------ SLURM's notation
def expand(nodelist: str) -> list[str]:
    """Host names of a node list such as `node[01-03,7],gpu-a-[1,3]-ib`, in its order. Raises ValueError."""
    return [host for group in _groups(nodelist) for host in _hosts(group)]


def _groups(nodelist: str) -> Iterator[str]:
    """The parts between the commas outside of brackets."""
    depth, start = 0, 0
    for position, char in enumerate(nodelist):
        depth += (char == "[") - (char == "]")
        if depth not in (0, 1):
            raise ValueError(f"node list {nodelist!r}: brackets do not match")
        if char == "," and depth == 0:
            yield nodelist[start:position]
            start = position + 1
    if depth or not nodelist:
        raise ValueError(f"node list {nodelist!r}: " + ("brackets do not match" if depth else "is empty"))
    yield nodelist[start:]


def _hosts(group: str) -> list[str]:
    """Names of one group: each bracket multiplies them, the last one varies fastest."""
    names = [""]
    for part in re.findall(r"\[[^\]]*\]|[^\[\]]+", group):
        endings = _numbers(part[1:-1]) if part.startswith("[") else [part]
        names = [name + ending for name in names for ending in endings]
    if names == [""]:
        raise ValueError("a node list names an empty host")
    return names


def _numbers(ranges: str) -> list[str]:
    """The numbers of `01-03,7`, with the zeros that the first of a range has."""
    found: list[str] = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not (last.isdigit() and int(last) >= int(first))):
            raise ValueError(f"node list: [{ranges}] is no list of numbers and ranges")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return found


def counts(text: str) -> list[int]:
    """The numbers of SLURM's `2(x3),1`: 2, 2, 2, 1. Raises ValueError."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"{text!r} is no list of counts")
        found += [int(match[1])] * int(match[2] or 1)
    return found
