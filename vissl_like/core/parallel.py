"""All that wraps a model for several processes. Compilation and sharding belong here too, and nowhere else."""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vissl_like.core import distributed
from vissl_like.errors import ConfigError

#: The argument that decides about buffers at each step; newer versions of PyTorch call it otherwise.
_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def synchronise_norms(model: nn.Module, *, group_size: int) -> nn.Module:
    """Let BatchNorm layers take their statistics over several processes (GPU only; on the CPU nothing changes).

    group_size: -1 the processes of each machine, 0 all, N groups of N.
    """
    world = distributed.current()
    if world.size == 1 or world.device.type != "cuda":
        return model
    size = {-1: world.local_size, 0: world.size}.get(group_size, min(group_size, world.size))
    if world.size % size:
        raise ConfigError(
            f"config.MODEL.SYNC_BN_CONFIG.GROUP_SIZE={group_size}: {world.size} processes cannot be split into groups "
            f"of {size}."
        )
    group = None if size == world.size else dist.new_subgroups(group_size=size)[0]
    return nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group=group)


def wrap_for_gradients(task: nn.Module, *, broadcast_buffers: bool, bucket_cap_mb: int) -> nn.Module:
    """The task, with gradients averaged over the processes; the task itself if there is only one."""
    world = distributed.current()
    if world.size == 1:
        return task
    return DistributedDataParallel(
        task,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        bucket_cap_mb=bucket_cap_mb,
        gradient_as_bucket_view=True,
        **{_BUFFERS: broadcast_buffers},
    )


def unwrap(module: nn.Module) -> nn.Module:
    """The module that was handed to wrap_for_gradients()."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def without_exchange(module: nn.Module) -> AbstractContextManager[None]:
    """Within it, gradients are only added up on this process (all but the last part of an accumulated batch)."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers (BatchNorm statistics) of rank 0, which are those that are saved.

    During training each process updates its own; an evaluation over several processes must use the same everywhere.
    """
    if distributed.current().size == 1:
        return
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
