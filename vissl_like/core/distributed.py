"""The processes of a run. Code is written for one rank; each function here is the identity when there is only one."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vissl_like.errors import ConfigError

T = TypeVar("T")

#: Environment variable of ranks that see one GPU each, their own. launch.allocation sets it.
ONE_GPU_PER_TASK = "VISSL_LIKE_ONE_GPU_PER_TASK"


@dataclass(frozen=True)
class World:
    """Where this process stands among those of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


_ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
_world = _ALONE


def current() -> World:
    """This process's place; one process on the CPU until start() was called."""
    return _world


def is_main() -> bool:
    """Whether this process writes files."""
    return _world.rank == 0


def start(*, device: str = "cpu", backend: str = "auto", timeout_s: int = 1800) -> World:
    """Join the processes that the environment names (RANK, WORLD_SIZE, ... of torch elastic or torchrun), if it does.

    `device` is cpu or gpu. On GPUs CPU tensors travel by gloo and GPU tensors by nccl, so that counts and objects
    never need a GPU.
    """
    global _world
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    where = _pick_device(device, local_rank=local_rank, local_size=local_size)
    if size > 1 and not dist.is_initialized():
        on_gpu = where.type == "cuda" and backend in ("auto", "nccl")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=where if on_gpu else None,
        )
    _world = World(rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=where)
    return _world


def _pick_device(device: str, *, local_rank: int, local_size: int) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "config.MACHINE.DEVICE='gpu': this machine shows no GPU to PyTorch. Use cpu, or mend the driver."
        )
    index = 0 if ONE_GPU_PER_TASK in os.environ else local_rank
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"config.DISTRIBUTED.NUM_PROC_PER_NODE={local_size}: this machine has {torch.cuda.device_count()} GPUs; "
            "use at most one process per GPU."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def shutdown() -> None:
    """Leave the group; the process is alone afterwards."""
    global _world
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _world = _ALONE


def is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that another process does not answer any more."""
    if error is None:
        return False
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return isinstance(error, dist.DistError) or is_gloo or is_lost_connection(error.__cause__)


def barrier() -> None:
    """Wait until every process is here."""
    if _world.size > 1:
        # A sum of CPU tensors instead of dist.barrier(), which would occupy the GPU.
        dist.all_reduce(torch.zeros(1))


def all_gather_object(value: T) -> list[T]:
    """The value of every rank, in order of ranks. Tensors in it should be on the CPU."""
    if _world.size == 1:
        return [value]
    received: list[Any] = [None] * _world.size
    dist.all_gather_object(received, value)
    return received


def broadcast_object(value: T) -> T:
    """The value of rank 0, on every rank. What the others pass is ignored."""
    if _world.size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def disagreement(look: Callable[[], str]) -> str:
    """What the first process has, and what another one has instead of it; empty if all have the same. A collective call.

    For what each process reads by itself: files change, and those of two machines differ, while processes read them.
    """
    if _world.size == 1:
        return ""
    seen = all_gather_object((look(), platform.node()))
    other = next((rank for rank, (text, _) in enumerate(seen) if text != seen[0][0]), None)
    if other is None:
        return ""
    return ", ".join(
        f"rank {rank} on {host} has {text}" for rank, (text, host) in enumerate(seen) if rank in (0, other)
    )


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, a new tensor on the same device. Integer sums are exact whatever the number of ranks."""
    if _world.size == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The rows (B, ...) of all ranks after one another; gradients flow back to the rank that a row came from."""
    if _world.size == 1:
        return tensor
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor.contiguous()))


def start_any(flag: bool) -> Callable[[], bool]:
    """Ask all ranks whether one of them has the flag set; the function returned waits for the answer.

    Asked at one step and read at the next, it costs no waiting, and every rank reads the same answer at the same step.
    """
    if _world.size == 1:
        return lambda: flag
    total = torch.tensor([int(flag)])
    work = dist.all_reduce(total, async_op=True)

    def answer() -> bool:
        work.wait()
        return bool(total.item())

    return answer
