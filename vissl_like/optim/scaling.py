"""Learning rates that follow the global batch size (OPTIMIZER.PARAM_SCHEDULERS.LR.AUTO_LR_SCALING). Free of torch.

The rules are VISSL's (its `infer_learning_rate`), so that its recipes give its learning rates. One difference: accumulated
batches count as part of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from vissl_like.config.schema_model import AutoLrScaling, Schedule
from vissl_like.errors import ConfigError

#: Digits to which VISSL rounds the ratio of neighbouring values and the values themselves.
_RATIO_DIGITS, _VALUE_DIGITS = 6, 8


def scale_schedule(schedule: Schedule, *, global_batch: int, batch_per_node: int, key: str = "LR") -> Schedule:
    """The schedule for this batch size; the same object if AUTO_SCALE is off.

    `global_batch` counts the images of one optimizer step over all processes, `batch_per_node` those of one machine.
    """
    if not schedule.AUTO_LR_SCALING.AUTO_SCALE:
        return schedule
    base = schedule.AUTO_LR_SCALING
    scaled = base.BASE_VALUE * scale_factor(base, batch=global_batch)
    if schedule.NAME == "composite":
        return _scale_composite(schedule, scaled, global_batch=global_batch, batch_per_node=batch_per_node, key=key)
    return _scale_plain(schedule, scaled, key=key)


def scale_factor(options: AutoLrScaling, *, batch: int) -> float:
    """By how much the learning rate at BASE_LR_BATCH_SIZE is multiplied for this batch."""
    ratio = batch / options.BASE_LR_BATCH_SIZE
    return math.sqrt(ratio) if options.SCALING_TYPE == "sqrt" else ratio


def child_schedules(schedule: Schedule, *, key: str = "LR") -> list[Schedule]:
    """The children of a composite schedule; raises ConfigError for one that is not a schedule."""
    children = []
    for number, options in enumerate(schedule.SCHEDULERS):
        where = f"config.OPTIMIZER.PARAM_SCHEDULERS.{key}.SCHEDULERS[{number}]"
        try:
            child = Schedule(**options)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"{where}={options!r}: {problems}.") from None
        except TypeError:
            raise ConfigError(f"{where}={options!r}: its keys must be those of a schedule (NAME, ...).") from None
        if child.NAME == "composite":
            raise ConfigError(f"{where}: a composite schedule cannot stand in another one; list its children directly.")
        children.append(child)
    return children


def _scale_plain(schedule: Schedule, scaled: float, *, key: str) -> Schedule:
    rule = _RULES.get(schedule.NAME)
    if rule is None:
        raise ConfigError(
            f"config.OPTIMIZER.PARAM_SCHEDULERS.{key}.NAME={schedule.NAME!r}: no rule to scale it by the batch size. "
            f"Set AUTO_LR_SCALING.AUTO_SCALE=false, or use one of {', '.join(sorted(_RULES))}, composite."
        )
    return schedule.model_copy(update=rule(schedule, scaled, key))


def _scale_cosine(schedule: Schedule, scaled: float, key: str) -> dict[str, Any]:
    if schedule.START_VALUE == 0:
        raise ConfigError(
            f"config.OPTIMIZER.PARAM_SCHEDULERS.{key}.START_VALUE=0.0: a schedule that starts at zero cannot be scaled "
            "by its start. Set AUTO_LR_SCALING.AUTO_SCALE=false and give the values."
        )
    return {"START_VALUE": scaled, "END_VALUE": scaled * (schedule.END_VALUE / schedule.START_VALUE)}


def _scale_values(schedule: Schedule, scaled: float, key: str) -> dict[str, Any]:
    values = schedule.VALUES
    if not values or values[0] == 0:
        raise ConfigError(
            f"config.OPTIMIZER.PARAM_SCHEDULERS.{key}.VALUES={values}: scaling needs a first value that is not zero."
        )
    gamma = ratio_of(values)
    return {"VALUES": [round(scaled * gamma**i, _VALUE_DIGITS) for i in range(len(values))]}


def ratio_of(values: list[float]) -> float:
    """The ratio of the first two values of a schedule, which scaling takes for that of all."""
    return round(values[1] / values[0], _RATIO_DIGITS) if len(values) > 1 else 1.0


def is_geometric(values: list[float]) -> bool:
    """Whether each value is the same multiple of the one before it; scaling makes them so."""
    gamma = ratio_of(values) if values and values[0] else 1.0
    return all(math.isclose(value, values[0] * gamma**i, rel_tol=1e-5) for i, value in enumerate(values))


_RULES: dict[str, Callable[[Schedule, float, str], dict[str, Any]]] = {
    "constant": lambda schedule, scaled, key: {"VALUE": scaled},
    "linear": lambda schedule, scaled, key: {"END_VALUE": scaled},
    "cosine": _scale_cosine,
    "cosine_warm_restart": _scale_cosine,
    "step": _scale_values,
    "multistep": _scale_values,
    "step_with_fixed_gamma": lambda schedule, scaled, key: {"BASE_VALUE": scaled},
    "timm_cosine": lambda schedule, scaled, key: {"START_VALUE": scaled},
    "timm_step": lambda schedule, scaled, key: {"START_VALUE": scaled},
    "timm_linear": lambda schedule, scaled, key: {"START_VALUE": scaled},
    "inverse_sqrt": lambda schedule, scaled, key: {"START_VALUE": scaled},
}


def _scale_composite(
    schedule: Schedule, scaled: float, *, global_batch: int, batch_per_node: int, key: str
) -> Schedule:
    """Scale each child. A linear first child is the warm-up: from what one machine would use up to the scaled value.

    On one machine such a warm-up would not rise and is left out; its span goes to the next child. A single child that
    remains stands for the whole.
    """
    children = [_scale_plain(child, scaled, key=key) for child in child_schedules(schedule, key=key)]
    lengths, intervals = list(schedule.LENGTHS), list(schedule.INTERVAL_SCALING)
    if children and children[0].NAME == "linear":
        base = schedule.AUTO_LR_SCALING
        first_value = base.BASE_VALUE * batch_per_node / base.BASE_LR_BATCH_SIZE
        children[0] = children[0].model_copy(update={"START_VALUE": first_value})
        if global_batch == batch_per_node and first_value <= scaled and len(children) > 1:
            del children[0], intervals[:1]
            lengths = [sum(lengths[:2]), *lengths[2:]]
    if len(children) == 1:
        return children[0].model_copy(
            update={"UPDATE_INTERVAL": schedule.UPDATE_INTERVAL, "AUTO_LR_SCALING": schedule.AUTO_LR_SCALING}
        )
    plain = [child.model_dump(exclude_unset=True) for child in children]
    return schedule.model_copy(update={"SCHEDULERS": plain, "LENGTHS": lengths, "INTERVAL_SCALING": intervals})


def normalized_weight_decay(weight_decay: float, *, num_train: int, global_batch: int, num_epochs: int) -> float:
    """weight_decay * sqrt(1 / (batches per epoch * epochs)), arXiv:1711.05101, appendix B.1.

    Batches are those of all processes, before accumulation; a set smaller than one batch counts as one.
    """
    batches = max(1, num_train // global_batch)
    return weight_decay * math.sqrt(1 / (batches * max(1, num_epochs)))
