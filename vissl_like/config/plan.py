"""What follows from a configuration on this machine: every inferred value, what was given, and why. Free of torch.

The configuration itself is never changed; the Plan stands beside it, is printed as a table and written to plan.json.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vissl_like.config.schema import Config
from vissl_like.config.schema_model import Schedule
from vissl_like.data.order import steps_per_epoch, unused_rows
from vissl_like.files import write_json
from vissl_like.optim.scaling import (
    child_schedules,
    is_geometric,
    normalized_weight_decay,
    scale_factor,
    scale_schedule,
)

PLAN_FILE = "plan.json"
_LR = "OPTIMIZER.PARAM_SCHEDULERS.LR"


@dataclass(frozen=True)
class PlanRow:
    """One inferred value. `key` is dotted without `config.`, or words for what is no option."""

    key: str
    given: str
    used: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The values in force. Batches count images; `global_batch` is one optimizer step over all processes."""

    world_size: int
    device: str
    backend: str
    precision: str
    batch_per_rank: int
    global_batch: int
    accumulate: int
    steps_per_epoch: int | None
    total_steps: int | None
    num_workers: int
    num_threads: int
    lr: Schedule
    lr_head: Schedule
    weight_decay: float
    rows: tuple[PlanRow, ...]
    warnings: tuple[str, ...] = ()

    def with_row(self, key: str, given: Any, used: Any, reason: str) -> Plan:
        """A copy with one more row at the top."""
        return dataclasses.replace(self, rows=(PlanRow(key, _show(given), _show(used), reason), *self.rows))


def make_plan(
    config: Config,
    *,
    num_processes: int,
    device: str,
    num_train: int | None,
    cores: int | None = None,
    engine_name: str = "train",
) -> Plan:
    """The plan for `num_processes` processes over config.DISTRIBUTED.NUM_NODES machines.

    `device` is cpu or gpu, `num_train` the rows of the training split if known, `cores` the CPU cores of one machine
    (None: those that this process may use). Learning rates are scaled and steps counted for the engine `train` only.
    """
    rows: list[PlanRow] = []
    cores = usable_cores() if cores is None else cores
    local = max(1, num_processes // config.DISTRIBUTED.NUM_NODES)
    backend = _processes(config, rows, num_processes=num_processes, local=local, device=device)
    threads = _threads(config, rows, local=local, cores=cores)
    workers = _workers(config, rows, local=local, cores=cores, device=device)
    if config.DATA.AUGMENT_ON_DEVICE == "auto" and device == "gpu":
        rows.append(PlanRow("DATA.AUGMENT_ON_DEVICE", "auto", "True", "the device is a GPU"))
    batch, accumulate = config.DATA.TRAIN.BATCHSIZE_PER_REPLICA, config.OPTIMIZER.ACCUMULATE_STEPS
    global_batch = batch * num_processes * accumulate
    lr, lr_head, steps, total, warnings = _no_training(config)
    weight_decay = config.OPTIMIZER.WEIGHT_DECAY
    if engine_name == "train":
        words = f"{batch} x {num_processes} process{'es' * (num_processes > 1)}" + (
            f" x {accumulate} accumulated" * (accumulate > 1)
        )
        rows.append(PlanRow("images per optimizer step", "", str(global_batch), words))
        per_node = batch * local * accumulate
        lr, lr_head, warnings = _learning_rates(config, rows, global_batch=global_batch, per_node=per_node)
        if num_train is not None:
            weight_decay = _weight_decay(config, rows, num_train=num_train, batch=batch * num_processes)
            steps, total = _steps(config, rows, num_train=num_train, num_processes=num_processes)
    return Plan(
        world_size=num_processes,
        device=device,
        backend=backend,
        precision=config.MACHINE.PRECISION,
        batch_per_rank=batch,
        global_batch=global_batch,
        accumulate=accumulate,
        steps_per_epoch=steps,
        total_steps=total,
        num_workers=workers,
        num_threads=threads,
        lr=lr,
        lr_head=lr_head,
        weight_decay=weight_decay,
        rows=tuple(rows),
        warnings=(*_crowding(device, local=local, cores=cores), *warnings),
    )


def _weight_decay(config: Config, rows: list[PlanRow], *, num_train: int, batch: int) -> float:
    """The weight decay in force; `batch` counts the images of all processes, without accumulation."""
    given, epochs = config.OPTIMIZER.WEIGHT_DECAY, config.OPTIMIZER.NUM_EPOCHS
    if not config.OPTIMIZER.NORMALIZED_WEIGHT_DECAY:
        return given
    used = normalized_weight_decay(given, num_train=num_train, global_batch=batch, num_epochs=epochs)
    why = f"NORMALIZED_WEIGHT_DECAY: x sqrt(1 / ({max(1, num_train // batch)} batches x {epochs} epochs))"
    rows.append(PlanRow("OPTIMIZER.WEIGHT_DECAY", f"{given:g}", f"{used:.6g}", why))
    return used


def _crowding(device: str, *, local: int, cores: int) -> list[str]:
    if device == "gpu" or local <= cores:
        return []
    return [
        f"config.DISTRIBUTED.NUM_PROC_PER_NODE={local}: so many processes share {cores} CPU core{'s' * (cores > 1)}; "
        "config.DISTRIBUTED.NUM_PROC_PER_NODE=1 is faster."
    ]


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _no_training(config: Config) -> tuple[Schedule, Schedule, int | None, int | None, list[str]]:
    schedules = config.OPTIMIZER.PARAM_SCHEDULERS
    return schedules.LR, schedules.LR_HEAD, None, None, []


def _processes(config: Config, rows: list[PlanRow], *, num_processes: int, local: int, device: str) -> str:
    given = config.DISTRIBUTED
    if config.MACHINE.DEVICE != device:
        reason = "PyTorch finds a GPU" if device == "gpu" else "PyTorch finds no GPU"
        rows.append(PlanRow("MACHINE.DEVICE", config.MACHINE.DEVICE, device, reason))
    if given.NUM_PROC_PER_NODE != local:
        why = "one per GPU" if device == "gpu" else "one, on a CPU"
        reason = why if given.NUM_PROC_PER_NODE == 0 else "as many as were started from outside"
        rows.append(PlanRow("DISTRIBUTED.NUM_PROC_PER_NODE", str(given.NUM_PROC_PER_NODE), str(local), reason))
    backend = given.BACKEND
    if backend == "auto":
        backend = "nccl" if device == "gpu" else "gloo"
        if num_processes > 1:
            rows.append(PlanRow("DISTRIBUTED.BACKEND", "auto", backend, f"the device is {device}"))
    return backend


def _threads(config: Config, rows: list[PlanRow], *, local: int, cores: int) -> int:
    if config.MACHINE.NUM_THREADS:
        return config.MACHINE.NUM_THREADS
    threads = max(1, cores // local)
    reason = f"{cores} cores / {local} local process{'es' * (local > 1)}"
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and 0 < int(limit) < threads:
        threads, reason = int(limit), "the environment says OMP_NUM_THREADS"
    rows.append(PlanRow("MACHINE.NUM_THREADS", "0", str(threads), reason))
    return threads


def _workers(config: Config, rows: list[PlanRow], *, local: int, cores: int, device: str) -> int:
    """A GPU is fed by all cores but the one that drives it; on a CPU most cores are needed for the network."""
    given = config.DATA.NUM_DATALOADER_WORKERS
    if given >= 0:
        return given
    share = cores // local
    workers = max(1, min(8, share - 1)) if device == "gpu" else min(4, share // 4)
    reason = f"{share} core{'s' * (share != 1)} per process; " + (
        "one drives the GPU, at most 8 read" if device == "gpu" else "a quarter of them reads, at most 4"
    )
    rows.append(PlanRow("DATA.NUM_DATALOADER_WORKERS", "-1", str(workers), reason))
    return workers


# ------------------------------------------------------------------------------------------------------ learning rates
def _learning_rates(
    config: Config, rows: list[PlanRow], *, global_batch: int, per_node: int
) -> tuple[Schedule, Schedule, list[str]]:
    optimizer = config.OPTIMIZER
    schedules = optimizer.PARAM_SCHEDULERS
    scaled = scale_schedule(schedules.LR, global_batch=global_batch, batch_per_node=per_node)
    warnings = _scaling_rows(schedules.LR, scaled, rows, key=_LR, global_batch=global_batch)
    if not optimizer.HEAD_OPTIMIZER_PARAMS.USE_DIFFERENT_LR:
        if schedules.LR_HEAD not in (schedules.LR, Schedule()):
            reason = "HEAD_OPTIMIZER_PARAMS.USE_DIFFERENT_LR is off"
            rows.append(PlanRow(f"{_LR}_HEAD", describe(schedules.LR_HEAD), "as LR", reason))
        return scaled, scaled, warnings
    head = scale_schedule(schedules.LR_HEAD, global_batch=global_batch, batch_per_node=per_node, key="LR_HEAD")
    warnings += _scaling_rows(schedules.LR_HEAD, head, rows, key=f"{_LR}_HEAD", global_batch=global_batch)
    return scaled, head, warnings


def _scaling_rows(given: Schedule, used: Schedule, rows: list[PlanRow], *, key: str, global_batch: int) -> list[str]:
    """A row if scaling changed the schedule; a warning if it changed the learning rate."""
    options = given.AUTO_LR_SCALING
    if not options.AUTO_SCALE:
        return []
    factor = scale_factor(options, batch=global_batch)
    ratio = f"{global_batch}/{options.BASE_LR_BATCH_SIZE} images"
    reason = f"{options.BASE_VALUE:g} x {ratio if options.SCALING_TYPE == 'linear' else f'sqrt({ratio})'}"
    if given.NAME == "composite":
        lost_warmup = len(used.SCHEDULERS) < len(given.SCHEDULERS)
        reason += "; on one machine the warm-up would not rise and is left out" * lost_warmup
    if describe(given) != describe(used):
        rows.append(PlanRow(key, describe(given), describe(used), reason))
    warnings = _uneven_values(given, used, key=key)
    if factor == 1:
        return warnings
    return [
        *warnings,
        f"config.{key}: the learning rate is {options.BASE_VALUE * factor:g} instead of {options.BASE_VALUE:g}, because "
        f"a step takes {global_batch} images, not {options.BASE_LR_BATCH_SIZE} ({options.SCALING_TYPE} scaling; "
        "AUTO_LR_SCALING.AUTO_SCALE=false turns it off).",
    ]


def _uneven_values(given: Schedule, used: Schedule, *, key: str) -> list[str]:
    """A warning for each list of values whose form scaling changes."""
    before, after = _multisteps(given), _multisteps(used)
    return [
        f"config.{key}: the values {_show(one.VALUES)} do not fall by one factor; scaling puts {_show(other.VALUES)} in "
        "their place, the series of the first two. AUTO_LR_SCALING.AUTO_SCALE=false leaves values as they are."
        for one, other in zip(before, after, strict=True)
        if not is_geometric(one.VALUES)
    ]


def _multisteps(schedule: Schedule) -> list[Schedule]:
    """The schedules with VALUES: this one, or those of its children."""
    parts = child_schedules(schedule) if schedule.NAME == "composite" else [schedule]
    return [part for part in parts if part.NAME in ("step", "multistep")]


def describe(schedule: Schedule) -> str:
    """A schedule in one line: `linear 0.1 to 0.2, then multistep 0.2, 0.02 from 30`."""
    if schedule.NAME == "composite":
        return ", then ".join(describe(child) for child in child_schedules(schedule))
    if schedule.NAME == "multistep":
        spans = zip(schedule.VALUES[1:], schedule.MILESTONES)
        return f"multistep {_show(schedule.VALUES[0])}" + "".join(f", {_show(v)} from {epoch}" for v, epoch in spans)
    if schedule.NAME == "step":
        return f"step {', '.join(map(_show, schedule.VALUES))}"
    if schedule.NAME == "constant":
        return f"constant {_show(schedule.VALUE)}"
    if schedule.NAME in ("step_with_fixed_gamma", "polynomial"):
        return f"{schedule.NAME} from {_show(schedule.BASE_VALUE)}"
    if schedule.NAME in ("linear", "cosine", "cosine_warm_restart"):
        return f"{schedule.NAME} {_show(schedule.START_VALUE)} to {_show(schedule.END_VALUE)}"
    return f"{schedule.NAME} {_show(schedule.START_VALUE)}"


# --------------------------------------------------------------------------------------------------------------- steps
def _steps(config: Config, rows: list[PlanRow], *, num_train: int, num_processes: int) -> tuple[int, int]:
    split, optimizer = config.DATA.TRAIN, config.OPTIMIZER
    where = (num_train, split.BATCHSIZE_PER_REPLICA, optimizer.ACCUMULATE_STEPS, num_processes, split.DROP_LAST)
    steps, unused = steps_per_epoch(*where), unused_rows(*where)
    global_batch = split.BATCHSIZE_PER_REPLICA * optimizer.ACCUMULATE_STEPS * num_processes
    reason = f"{num_train} images / {global_batch}"
    if unused:
        reason += f"; {unused} image{'s are' if unused > 1 else ' is'} left out in each epoch"
        reason += " (DROP_LAST)" if split.DROP_LAST else " (fewer than processes)"
    elif num_train % global_batch:
        reason += ", the last step is shorter"
    rows.append(PlanRow("steps per epoch", "", str(steps), reason))
    total = steps * optimizer.NUM_EPOCHS
    rows.append(PlanRow("steps in all", "", str(total), f"{steps} x {optimizer.NUM_EPOCHS} epochs"))
    return steps, total


# -------------------------------------------------------------------------------------------------------------- output
def table(plan: Plan) -> str:
    """The rows as aligned text: what, given, used, why. Long values stand below each other."""
    lines = [f"  {'inferred':<36}{'given':<11}{'used':<11}because"]
    for row in plan.rows:
        if len(row.given) < 10 and len(row.used) < 10:
            lines.append(f"  {row.key:<36}{row.given:<11}{row.used:<11}{row.reason}")
            continue
        lines.append(f"  {row.key:<36}{'':<22}{row.reason}")
        lines += [f"      given  {row.given}", f"      used   {row.used}"]
    return "\n".join(line.rstrip() for line in lines)


def write_plan(plan: Plan, run_dir: Path) -> None:
    """Write plan.json: the rows, the warnings and the plain values."""
    values = {
        field.name: getattr(plan, field.name)
        for field in dataclasses.fields(plan)
        if field.name not in ("rows", "warnings", "lr", "lr_head")
    }
    content = {
        "values": values,
        "rows": [dataclasses.asdict(row) for row in plan.rows],
        "warnings": list(plan.warnings),
    }
    write_json(run_dir / PLAN_FILE, content)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_show(item)}" for key, item in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)
