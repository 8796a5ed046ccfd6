"""All that is done to a model so that it trains in less memory, faster, and on several processes; and nowhere else.

In this order, from the inside to the outside:

    recompute   MODEL.ACTIVATION_CHECKPOINTING: blocks forget what lies inside them and compute it again when needed
    compile     MACHINE.COMPILE: each kind of block, or the whole model, becomes one program (the recomputation included)
    shard       DISTRIBUTED.STRATEGY=fsdp: each process keeps a part of every weight (PyTorch's fully_shard); blocks are
                gathered around their own computation, so compiled programs see whole weights
    DDP         DISTRIBUTED.STRATEGY=ddp: each process keeps everything, and gradients are averaged

Modules change their class, not their place: names of modules and weights stay what they were.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vissl_like.core import distributed
from vissl_like.errors import ConfigError

if TYPE_CHECKING:
    from vissl_like.config.schema import Config

#: The argument that decides about buffers at each step; newer versions of PyTorch call it otherwise.
_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
_nothing = contextlib.nullcontext
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NORMS = nn.modules.batchnorm._BatchNorm
Forward = Callable[..., Any]


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


# ------------------------------------------------------------------------------------------------- the model in training
def is_to_be_sharded(config: Config) -> bool:
    """Whether arrange() will shard the model. Such a one is built on the CPU, as it need not fit onto one device."""
    return config.DISTRIBUTED.STRATEGY == "fsdp" and distributed.current().size > 1 and not config.TEST_ONLY


def arrange(model: nn.Module, config: Config, *, inner: Iterable[str] = ()) -> None:
    """Recompute, compile and shard a model as the configuration says, in place, before an optimizer sees its weights.

    `inner`: names of modules whose outputs are read by hooks. A block that is read from inside is left as it is.
    """
    recompute = config.MODEL.ACTIVATION_CHECKPOINTING.USE_ACTIVATION_CHECKPOINTING
    how = config.MACHINE.COMPILE
    inner = set(inner)
    found = blocks(model)
    whole = {name: b for name, b in found.items() if not any(read.startswith(f"{name}.") for read in inner)}
    if not whole and (recompute or how == "blocks"):
        key = (
            "config.MODEL.ACTIVATION_CHECKPOINTING.USE_ACTIVATION_CHECKPOINTING"
            if recompute
            else "config.MACHINE.COMPILE"
        )
        reason = "are all read from inside (LINEAR_EVAL_FEAT_POOL_OPS_MAP)" if found else "are not to be found"
        raise ConfigError(
            f"{key}: repeated blocks of config.MODEL.TRUNK.NAME={config.MODEL.TRUNK.NAME!r} {reason}. Leave it off."
        )
    for block in whole.values() if recompute else ():
        change_forward(block, _recomputed if how == "none" else _recomputed_in_program)
    if how != "none":
        _compile(model, whole.values(), how=how, backend=config.MACHINE.COMPILE_BACKEND, is_read=bool(inner))
    if is_to_be_sharded(config):
        _shard(
            model, whole.values(), precision=config.MACHINE.PRECISION, reshard=config.DISTRIBUTED.RESHARD_AFTER_FORWARD
        )


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a trunk by name: those of a transformer, of the stages of a ResNet, and so on.

    A block stands with nothing but its like in a list of modules, has parts with weights itself, occurs twice at least,
    and holds no smaller ones.
    """
    prefix = "trunk." if isinstance(getattr(model, "trunk", None), nn.Module) else ""
    found: dict[str, nn.Module] = {}
    for name, module in model.get_submodule(prefix.rstrip(".")).named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            continue
        parts = {key: part for key, part in module.named_children() if _has_weights(part)}
        if len({type(part) for part in parts.values()}) == 1 and all(map(_is_composite, parts.values())):
            found |= {f"{prefix}{name}.{key}" if name else f"{prefix}{key}": part for key, part in parts.items()}
    smallest = {name: part for name, part in found.items() if not any(other.startswith(f"{name}.") for other in found)}
    counts = Counter(type(part) for part in smallest.values())
    return {name: part for name, part in smallest.items() if counts[type(part)] > 1}


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_composite(module: nn.Module) -> bool:
    return any(_has_weights(part) for part in module.children())


#: Classes with another forward pass, by the class and the function that made the pass; and where such a class names it.
_changed: dict[tuple[type, Any], type] = {}
_MADE_BY = "forward_made_by"


def change_forward(module: nn.Module, make: Callable[[Forward], Forward]) -> None:
    """Give a module the forward pass make(its own one). Modules of one class share the result."""
    kind = type(module)
    if (kind, make) not in _changed:
        content = {"forward": make(kind.forward), "__module__": kind.__module__, _MADE_BY: make}
        _changed[kind, make] = type(kind.__name__, (kind,), content)
    module.__class__ = _changed[kind, make]


# ------------------------------------------------------------------------------------------------------------- recompute
def _recomputed(forward: Forward) -> Forward:
    """A forward pass that keeps its inputs only. The second time it draws the same numbers and counts no statistics."""
    return _checkpointed(forward, lambda block: {"context_fn": lambda: (_nothing(), _without_statistics(block))})


def _recomputed_in_program(forward: Forward) -> Forward:
    """The same for a forward pass that is compiled: there, statistics are no part of what is computed again."""
    return _checkpointed(forward, lambda block: {})


def _checkpointed(forward: Forward, options: Callable[[nn.Module], dict[str, Any]]) -> Forward:
    from torch.utils.checkpoint import checkpoint

    def run(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(self, *arguments, **named)
        return checkpoint(forward, self, *arguments, use_reentrant=False, **options(self), **named)

    return run


@contextlib.contextmanager
def _without_statistics(module: nn.Module) -> Iterator[None]:
    """Within it BatchNorm layers do what they always do, but count statistics in copies that are thrown away."""
    kept = [(norm, dict(norm._buffers)) for norm in module.modules() if isinstance(norm, _NORMS) and norm.training]
    for norm, buffers in kept:
        norm._buffers.update({name: None if value is None else value.clone() for name, value in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)


# --------------------------------------------------------------------------------------------------------------- compile
def _compile(model: nn.Module, parts: Iterable[nn.Module], *, how: str, backend: str, is_read: bool) -> None:
    if how == "model" and is_read:
        raise ConfigError(
            "config.MACHINE.COMPILE='model': features that are read on the way "
            "(config.MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP) would end the program there. Use blocks."
        )
    import torch._dynamo

    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"config.MACHINE.COMPILE_BACKEND={backend!r}: PyTorch has {', '.join(sorted(known))}.")
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if backend == "inductor" and not any(name and shutil.which(name) for name in compilers):
        raise ConfigError(
            f"config.MACHINE.COMPILE={how!r}: PyTorch needs a C++ compiler for this and finds none. Install one (g++), name "
            "it in the environment variable CXX, or set config.MACHINE.COMPILE=none."
        )
    # Blocks may differ in a number (stochastic depth), which gives each its own program.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    make = _programs.setdefault(backend, lambda forward: torch.compile(forward, backend=backend))
    for part in [model] if how == "model" else parts:
        change_forward(part, make)


#: How a forward pass is compiled, by backend.
_programs: dict[str, Callable[[Forward], Forward]] = {}


# ----------------------------------------------------------------------------------------------------------------- shard
def _shard(model: nn.Module, parts: Iterable[nn.Module], *, precision: str, reshard: bool) -> None:
    """Shard each part, and what is left, by rows over all processes, and move it to the device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise ConfigError(
            f"config.DISTRIBUTED.STRATEGY='fsdp': the weight {scalars[0]!r} is a single number, which cannot be sharded. "
            "Give it the shape (1,), or use ddp."
        )
    world = distributed.current()
    mesh = init_device_mesh(world.device.type, (world.size,))
    parts = list(parts)
    inside = {id(module) for part in parts for module in part.modules()}
    rest = [module for module in model.modules() if id(module) not in inside]
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=_arithmetic(part.modules(), precision), reshard_after_forward=reshard)
    # The rest is given up after the forward pass, too: weights that are changed in place later (the average, before a test)
    # must be gathered anew.
    fully_shard(model, mesh=mesh, mp_policy=_arithmetic(rest, precision), reshard_after_forward=True)


def _arithmetic(modules: Iterable[nn.Module], precision: str) -> Any:
    """Weights are sent in half precision where all computes in it; gradients are added up in single precision.

    Batch normalisation wants weights of the type of its statistics.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if precision == "fp32" or any(isinstance(module, _NORMS) for module in modules):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=_HALF[precision], reduce_dtype=torch.float32)


def _sharded_root(module: nn.Module) -> Any:
    """The outermost sharded module, or None."""
    return next((part for part in module.modules() if hasattr(part, "set_requires_gradient_sync")), None)


def is_sharded(model: nn.Module) -> bool:
    """Whether each forward pass of this model needs all processes."""
    return _sharded_root(model) is not None


def is_replicable(model: nn.Module) -> bool:
    """Whether a copy of the modules gives the same bits as the model, in any thread."""
    programs = set(_programs.values())
    return not is_sharded(model) and not any(
        getattr(type(part), _MADE_BY, None) in programs for part in model.modules()
    )


# --------------------------------------------------------------------------------------------- tensors of sharded models
# A sharded tensor is PyTorch's DTensor. It is told by what it can do: importing its class takes half a second.


def is_part(tensor: Tensor) -> bool:
    """Whether the tensor stands for one of which this process holds some rows."""
    return hasattr(tensor, "full_tensor") and all(place.is_shard(0) for place in tensor.placements)


def rows_of_ranks(count: int) -> list[tuple[int, int]]:
    """Which of so many rows each process holds: [start, stop) of rank 0, of rank 1, ..."""
    size = distributed.current().size
    step = -(-count // size)
    return [(min(rank * step, count), min((rank + 1) * step, count)) for rank in range(size)]


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process: the rows of a sharded one, all of any other. Shares memory with it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rows_like(tensor: Tensor, target: Tensor) -> Tensor:
    """Of a whole tensor what lies in this process if it is sharded as `target` is. Shares memory with it."""
    return tensor[slice(*rows_of_ranks(len(tensor))[distributed.current().rank])] if is_part(target) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every process. A collective call if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def as_part(rows: Tensor, *, like: Tensor) -> Tensor:
    """A tensor that is sharded as `like` is, from the rows of this process; the rows themselves if `like` is not."""
    if not is_part(like):
        return rows
    from torch.distributed.tensor import DTensor

    rows = rows.to(like.device)
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


# ------------------------------------------------------------------------------------------------------------- gradients
def wrap_for_gradients(task: nn.Module, *, broadcast_buffers: bool, bucket_cap_mb: int) -> nn.Module:
    """The task, with gradients averaged over the processes; the task itself if its model is sharded or there is only one."""
    world = distributed.current()
    if world.size == 1 or is_sharded(task):
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


@contextlib.contextmanager
def _without_reduction(root: Any) -> Iterator[None]:
    root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        root.set_requires_gradient_sync(True)


def without_exchange(module: nn.Module) -> AbstractContextManager[None]:
    """Within it, gradients are only added up on this process (all but the last part of an accumulated batch)."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    root = _sharded_root(module)
    return contextlib.nullcontext() if root is None else _without_reduction(root)


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers (BatchNorm statistics) of rank 0, which are those that are saved.

    During training each process updates its own; an evaluation over several processes must use the same everywhere.
    """
    if distributed.current().size == 1:
        return
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
