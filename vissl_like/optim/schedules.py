"""Values over time: each schedule is a pure function of `where`, the share of training that is done, in [0, 1).

The functions are those of ClassyVision and VISSL, so that VISSL's recipes keep their learning rates. Free of torch.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vissl_like.config.schema_model import Schedule
from vissl_like.errors import ConfigError
from vissl_like.optim.scaling import child_schedules
from vissl_like.registry import resolve

#: A function of `where`.
Curve = Callable[[float], float]

#: Added to `where` before it is compared with a border, so that 3 * (1 / 3) counts as 1.
WHERE_EPSILON = 1e-6

#: At how many places of the training a schedule is looked at for values below zero, and what counts as zero.
_LOOKS, _ROUNDING = 200, 1e-12


def build_curve(schedule: Schedule, *, num_epochs: int, key: str = "LR") -> Curve:
    """The function of `where` that this section describes; `key` names the section in errors."""
    maker = resolve("schedule", schedule.NAME, key=f"OPTIMIZER.PARAM_SCHEDULERS.{key}.NAME")
    curve = maker(schedule, num_epochs=num_epochs, key=key)
    lowest = min(curve(i / _LOOKS) for i in range(_LOOKS))
    if lowest < -_ROUNDING:
        raise ConfigError(
            f"config.OPTIMIZER.PARAM_SCHEDULERS.{key}: the {schedule.NAME} schedule falls to {lowest:g}. With a value "
            "below zero training would go uphill; mend its values."
        )
    return curve


def where_at(schedule: Schedule, *, step: int, steps_per_epoch: int, num_epochs: int) -> float:
    """The share of training done before this step (counted from 0): by whole epochs, or by steps."""
    if schedule.UPDATE_INTERVAL == "step":
        return step / (steps_per_epoch * num_epochs)
    return (step // steps_per_epoch) / num_epochs


def unreached_milestones(schedule: Schedule, *, num_epochs: int) -> list[int]:
    """Milestones that a training this short never comes to: worth a warning, since shortening a recipe makes them."""
    children = child_schedules(schedule) if schedule.NAME == "composite" else [schedule]
    return [m for child in children if child.NAME == "multistep" for m in child.MILESTONES if m >= num_epochs]


def from_vissl(options: Mapping[str, Any]) -> Schedule:
    """The schedule that a `param_schedulers.lr` block of VISSL describes (lower-case keys)."""
    return Schedule(**_upper(options))


def _upper(options: Mapping[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for name, value in options.items():
        if name == "schedulers":
            value = [_upper(child) for child in value]
        elif isinstance(value, Mapping):
            value = _upper(value)
        renamed[name.upper()] = value
    return renamed


def _wrong(key: str, option: str, value: Any, why: str) -> ConfigError:
    return ConfigError(f"config.OPTIMIZER.PARAM_SCHEDULERS.{key}.{option}={value}: {why}")


def constant(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """VALUE throughout."""
    return lambda where: options.VALUE


def linear(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """A straight line from START_VALUE to END_VALUE."""
    start, end = options.START_VALUE, options.END_VALUE
    return lambda where: end * where + start * (1 - where)


def cosine(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """Half a cosine wave from START_VALUE to END_VALUE (arXiv:1608.03983)."""
    start, end = options.START_VALUE, options.END_VALUE
    return lambda where: end + 0.5 * (start - end) * (1 + math.cos(math.pi * where))


def step(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """VALUES one after the other, each for an equal share of training."""
    values = options.VALUES
    if not values:
        raise _wrong(key, "VALUES", values, "give at least one value.")
    return lambda where: values[min(int((where + WHERE_EPSILON) * len(values)), len(values) - 1)]


def multistep(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """VALUES that change at the epochs MILESTONES. Milestones at or after the last epoch are never reached."""
    values, milestones = options.VALUES, options.MILESTONES
    if len(values) != len(milestones) + 1:
        raise _wrong(
            key, "VALUES", values, f"{len(milestones)} MILESTONES need {len(milestones) + 1} values, not {len(values)}."
        )
    if milestones != sorted(set(milestones)):
        raise _wrong(key, "MILESTONES", milestones, "epochs must rise.")
    return lambda where: values[bisect.bisect_right(milestones, int((where + WHERE_EPSILON) * num_epochs))]


def step_with_fixed_gamma(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """BASE_VALUE, multiplied by GAMMA at NUM_DECAYS equally spaced moments."""
    values = [options.BASE_VALUE * options.GAMMA**i for i in range(options.NUM_DECAYS + 1)]
    return lambda where: values[min(int((where + WHERE_EPSILON) * len(values)), len(values) - 1)]


def polynomial(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """BASE_VALUE * (1 - where) ** POWER."""
    return lambda where: options.BASE_VALUE * (1 - where) ** options.POWER


def exponential(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """START_VALUE * DECAY ** where."""
    return lambda where: options.START_VALUE * options.DECAY**where


def inverse_sqrt(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """START_VALUE * sqrt(W / where), which is START_VALUE at where = W = WARMUP_INTERVAL_LENGTH and larger before.

    At where = 0 the value is START_VALUE * sqrt(W), as in VISSL. Let a rising schedule precede it in a composite.
    """
    if options.WARMUP_INTERVAL_LENGTH == 0:
        raise _wrong(key, "WARMUP_INTERVAL_LENGTH", 0.0, "inverse_sqrt needs a share of training above 0.")
    peak = options.START_VALUE * math.sqrt(options.WARMUP_INTERVAL_LENGTH)
    return lambda where: peak / math.sqrt(where) if where > 0 else peak


def cosine_warm_restart(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """Cosine waves of RESTART_INTERVAL_LENGTH, each from its own peak down to END_VALUE (arXiv:1608.03983).

    WAVE_TYPE half jumps back to the peak after each interval; full rises to the next peak within an interval and falls
    in the next. The k-th peak is START_VALUE * LR_MULTIPLIER**k, or, if IS_ADAPTIVE, where one cosine over the whole
    training would stand (full: one interval later).
    """
    length, start, end = options.RESTART_INTERVAL_LENGTH, options.START_VALUE, options.END_VALUE
    is_full = options.WAVE_TYPE == "full"
    over_all = cosine(options, num_epochs=num_epochs, key=key)
    stride = 2 * length if is_full else length
    restarts = [0.0] + [length + i * stride for i in range(math.ceil((1 - length) / stride - WHERE_EPSILON))]
    shift = length if is_full else 0.0
    if options.IS_ADAPTIVE:
        peaks = [over_all(restart + shift) for restart in restarts]
    else:
        peaks = [start * options.LR_MULTIPLIER**k for k in range(len(restarts))]

    def value(where: float) -> float:
        peak = peaks[bisect.bisect_right(restarts, where) - 1]
        phase = where / length if is_full else (where % length) / length
        return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * phase))

    return value


def composite(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """SCHEDULERS one after the other, each for its share LENGTHS of training.

    A child with INTERVAL_SCALING `rescaled` sees 0 to 1 over its own span, one with `fixed` sees the place in the whole
    training. Every child changes at the composite's UPDATE_INTERVAL.
    """
    children, lengths, intervals = child_schedules(options, key=key), options.LENGTHS, options.INTERVAL_SCALING
    intervals = intervals or ["rescaled"] * len(children)
    if not children:
        raise _wrong(key, "SCHEDULERS", [], "a composite schedule needs at least one child.")
    if not len(children) == len(lengths) == len(intervals):
        raise _wrong(
            key, "LENGTHS", lengths, f"{len(children)} SCHEDULERS need as many LENGTHS and INTERVAL_SCALING entries."
        )
    if abs(sum(lengths) - 1) > 1e-3 or min(lengths) < 0:
        raise _wrong(key, "LENGTHS", lengths, f"shares must not be negative and add up to 1, not {sum(lengths):g}.")
    curves = [build_curve(child, num_epochs=num_epochs, key=key) for child in children]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]

    def value(where: float) -> float:
        i = min(bisect.bisect_right(ends, where + WHERE_EPSILON), len(curves) - 1)
        if intervals[i] == "fixed" or lengths[i] == 0:
            return curves[i](where)
        return curves[i]((where - (ends[i] - lengths[i])) / lengths[i])

    return value


def timm_cosine(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """Half a cosine wave by epochs from START_VALUE to END_VALUE, which is not multiplied by a group's factor.

    In the WARMUP_EPOCHS the rate rises to its value from WARMUP_VALUE; the wave does not wait for them (timm).
    """
    return _warmed(options, num_epochs, lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / num_epochs)))


def timm_step(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """START_VALUE, multiplied by GAMMA every STEP_EPOCHS; with a warm-up as timm_cosine."""
    return _warmed(options, num_epochs, lambda epoch: options.GAMMA ** (epoch // options.STEP_EPOCHS))


def timm_linear(options: Schedule, *, num_epochs: int, key: str) -> Curve:
    """A straight line by epochs from START_VALUE to a hundredth of it, after a warm-up as timm_cosine."""
    warmup = options.WARMUP_EPOCHS
    if warmup >= num_epochs:
        raise _wrong(key, "WARMUP_EPOCHS", warmup, f"a training of {num_epochs} epochs needs fewer.")
    return _warmed(options, num_epochs, lambda epoch: 1 - 0.99 * (epoch - warmup) / (num_epochs - warmup))


def _warmed(options: Schedule, num_epochs: int, share: Callable[[int], float]) -> Curve:
    """START_VALUE times the share of an epoch, or what of it the warm-up has reached."""

    def value(where: float) -> float:
        epoch = int(where * num_epochs + WHERE_EPSILON)
        if epoch < options.WARMUP_EPOCHS:
            return options.START_VALUE * epoch / options.WARMUP_EPOCHS
        return options.START_VALUE * share(epoch)

    return value


def floor_curve(schedule: Schedule, *, num_epochs: int) -> Curve | None:
    """What a timm schedule adds to the rate of every parameter group, whatever its factor; None for others."""
    if not schedule.NAME.startswith("timm_"):
        return None
    warmup, last = schedule.WARMUP_EPOCHS, schedule.END_VALUE if schedule.NAME == "timm_cosine" else 0.0

    def value(where: float) -> float:
        epoch = int(where * num_epochs + WHERE_EPSILON)
        if epoch < warmup:
            return schedule.WARMUP_VALUE * (1 - epoch / warmup)
        return last * (1 - 0.5 * (1 + math.cos(math.pi * epoch / num_epochs)))

    return value


class StepRates(NamedTuple):
    """Values of one step. A group's learning rate is lr (heads: lr_head) times its factor, plus lr_floor.

    weight_decay None: constant.
    """

    lr: float
    lr_head: float
    weight_decay: float | None
    lr_floor: float = 0.0


class Rates:
    """Learning rates and weight decay of every step of a training."""

    def __init__(
        self,
        *,
        lr: Schedule,
        lr_head: Schedule | None = None,
        weight_decay: Schedule | None = None,
        steps_per_epoch: int,
        num_epochs: int,
    ) -> None:
        """`lr_head` None: as `lr`. `weight_decay` None: constant."""
        self._steps_per_epoch, self._num_epochs = steps_per_epoch, num_epochs
        given = {"LR": lr, "LR_HEAD": None if lr_head == lr else lr_head, "WEIGHT_DECAY": weight_decay}
        self._schedules = {key: schedule for key, schedule in given.items() if schedule is not None}
        self._curves = {
            key: build_curve(schedule, num_epochs=num_epochs, key=key) for key, schedule in self._schedules.items()
        }
        self._floor = floor_curve(lr, num_epochs=num_epochs)

    def at(self, step: int) -> StepRates:
        """The rates of this step, counted from 0."""
        values = {key: curve(self._where(key, step)) for key, curve in self._curves.items()}
        floor = 0.0 if self._floor is None else self._floor(self._where("LR", step))
        return StepRates(values["LR"], values.get("LR_HEAD", values["LR"]), values.get("WEIGHT_DECAY"), floor)

    def _where(self, key: str, step: int) -> float:
        return where_at(
            self._schedules[key], step=step, steps_per_epoch=self._steps_per_epoch, num_epochs=self._num_epochs
        )
