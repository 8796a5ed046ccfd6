"""Which parameters are trained together: with which weight decay, and by which factor of the learning rate.

A group is all parameters that share a role (trunk or head), a factor and a weight decay. Frozen parameters are in none.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vissl_like.config.schema_model import Optimizer as OptimizerOptions
from vissl_like.config.schema_model import ParamGroup
from vissl_like.core.parallel import is_part
from vissl_like.errors import ConfigError
from vissl_like.optim.schedules import StepRates
from vissl_like.registry import resolve

log = logging.getLogger(__name__)

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)

#: A numbered layer of a trunk: layer1 (ResNet), blocks.3 (timm ViT), layer.3 (Hugging Face), encoder_layer_3, stages.0.
_NUMBERED = re.compile(r"(?:^|[._])(?:blocks|layers?|stages)[._]?(\d+)(?=[._]|$)")

#: Options of ours that each optimizer takes, under its own names.
_ARGUMENTS: dict[str, dict[str, str]] = {
    "sgd": {"momentum": "MOMENTUM", "nesterov": "NESTEROV"},
    "adam": {"betas": "BETAS", "eps": "EPS"},
    "adamw": {"betas": "BETAS", "eps": "EPS"},
    "nadam": {"betas": "BETAS", "eps": "EPS"},
    "rmsprop": {"momentum": "MOMENTUM", "eps": "EPS"},
    "lars": {"momentum": "MOMENTUM", "nesterov": "NESTEROV", "trust_coeff": "TRUST_COEFFICIENT"},
}

#: Optimizers that do a step in one pass over the memory (half the time of one operation after the other, results equal
#: but for rounding), unless OPTIMIZER.OPTIONS says how they should do it.
_FUSED = ("sgd", "adam", "adamw")
#: Those of them that PyTorch can do so with sharded weights.
_FUSED_SHARDED = ("adam", "adamw")
_WAYS = {"fused", "foreach", "capturable", "differentiable"}


@dataclass(frozen=True)
class Group:
    """Parameters with the same rules. `decay_is_general`: it is OPTIMIZER.WEIGHT_DECAY and follows that one's schedule."""

    role: str
    lr_factor: float
    weight_decay: float
    decay_is_general: bool
    names: tuple[str, ...] = ()
    parameters: tuple[nn.Parameter, ...] = field(default=(), repr=False)

    @property
    def count(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters)


def make_groups(model: nn.Module, options: OptimizerOptions) -> list[Group]:
    """The groups of all trainable parameters of a model, in the order of their first members.

    Rules, in this order: GROUPS by regular expression; then normalisation layers (REGULARIZE_BN), biases
    (REGULARIZE_BIAS; those of normalisation layers need both) and NON_REGULARIZED_PARAMETERS go without weight decay;
    heads may have their own. With lr_decay the factor of a layer is DECAY to the power of its distance from the heads.
    """
    names = [name for name, _ in model.named_parameters()]
    layer_factor = layer_factors(names, options) if options.PARAM_GROUP_CONSTRUCTOR == "lr_decay" else {}
    patterns = [_compile(own, i) for i, own in enumerate(options.GROUPS)]
    used: set[int] = set()
    members: dict[Group, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter, module in _trainable(model):
        role = "head" if _is_head(name) else "trunk"
        own = next((i for i, pattern in enumerate(patterns) if pattern.search(name)), None)
        if own is not None:
            used.add(own)
        rules = options.GROUPS[own] if own is not None else None
        decay, is_general = _weight_decay(name, module, role=role, rules=rules, options=options)
        factor = layer_factor.get(name, 1.0) * (rules.LR_FACTOR if rules else 1.0)
        group = Group(role=role, lr_factor=factor, weight_decay=decay, decay_is_general=is_general)
        members.setdefault(group, []).append((name, parameter))
    _complain(members, options, unused=sorted(set(range(len(patterns))) - used), names=names)
    return [
        Group(
            role=group.role,
            lr_factor=group.lr_factor,
            weight_decay=group.weight_decay,
            decay_is_general=group.decay_is_general,
            names=tuple(name for name, _ in found),
            parameters=tuple(parameter for _, parameter in found),
        )
        for group, found in members.items()
    ]


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter, nn.Module]]:
    """(name, parameter, the module that owns it), each parameter once."""
    found, seen = [], set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((name, parameter, module))
    return found


def _is_head(name: str) -> bool:
    return name.split(".", 1)[0] == "heads"


def is_norm(module: nn.Module) -> bool:
    """Whether this is a normalisation layer, of torch or (by its name) of another library."""
    return isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()


def _weight_decay(
    name: str, module: nn.Module, *, role: str, rules: ParamGroup | None, options: OptimizerOptions
) -> tuple[float, bool]:
    """(weight decay, whether it is the general one)."""
    if rules is not None and rules.WEIGHT_DECAY is not None:
        return rules.WEIGHT_DECAY, False
    if options.CONSTRUCT_SINGLE_PARAM_GROUP_ONLY:
        return options.WEIGHT_DECAY, True
    is_bias = name.rsplit(".", 1)[-1] == "bias"
    exempt = (
        (is_norm(module) and not options.REGULARIZE_BN)
        or (is_bias and not options.REGULARIZE_BIAS)
        or any(part in name for part in options.NON_REGULARIZED_PARAMETERS)
    )
    if exempt:
        return 0.0, False
    if role == "head" and options.HEAD_OPTIMIZER_PARAMS.USE_DIFFERENT_WD:
        return options.HEAD_OPTIMIZER_PARAMS.WEIGHT_DECAY, False
    return options.WEIGHT_DECAY, True


def layer_factors(names: Sequence[str], options: OptimizerOptions) -> dict[str, float]:
    """Learning-rate factor of each parameter: DECAY ** (n - depth).

    The trunk's numbered layers have depths 1, 2, ...; what stands before them depth 0 (patch and position embedding,
    stem); what stands after them and the heads depth n, one more than the last layer. (VISSL lets the last
    normalisation share the depth of the last block; MAE and BEiT do as here.)
    """
    numbers = {name: int(found.group(1)) for name in names if not _is_head(name) and (found := _NUMBERED.search(name))}
    if not numbers:
        raise ConfigError(
            "config.OPTIMIZER.PARAM_GROUP_CONSTRUCTOR='lr_decay': this trunk has no numbered layers (layer1, blocks.0, "
            "stages.0, ...). Use default, and GROUPS with LR_FACTOR by regular expression."
        )
    lowest, last = min(numbers.values()), max(numbers.values()) - min(numbers.values()) + 2
    depths, is_before = {}, True
    for name in names:
        if name in numbers:
            depths[name], is_before = numbers[name] - lowest + 1, False
        else:
            depths[name] = 0 if is_before and not _is_head(name) else last
    return {name: options.LAYER_WISE_LR_DECAY.DECAY ** (last - depth) for name, depth in depths.items()}


def _compile(own: ParamGroup, i: int) -> re.Pattern[str]:
    try:
        return re.compile(own.MATCH)
    except re.error as error:
        where = f"config.OPTIMIZER.GROUPS[{i}].MATCH={own.MATCH!r}"
        raise ConfigError(f"{where}: not a regular expression: {error}.") from None


def _complain(members: Mapping[Group, Any], options: OptimizerOptions, *, unused: list[int], names: list[str]) -> None:
    if not members:
        raise ConfigError(
            "nothing to train: every parameter is frozen (config.MODEL.FEATURE_EVAL_SETTINGS, "
            "config.MODEL.NON_TRAINABLE_PARAMS). Unfreeze something, or set config.TEST_ONLY=true."
        )
    if unused:
        i = unused[0]
        examples = ", ".join(names[:: max(1, len(names) // 4)][:5])
        raise ConfigError(
            f"config.OPTIMIZER.GROUPS[{i}].MATCH={options.GROUPS[i].MATCH!r}: matches no trainable parameter that an "
            f"earlier group does not take. Names look like: {examples}."
        )


def table(groups: Sequence[Group]) -> str:
    """One line per group for the log."""
    lines = ["group   tensors   parameters  lr factor  weight decay  first member"]
    for group in groups:
        lines.append(
            f"{group.role:<7} {len(group.names):>7} {group.count:>12,} {group.lr_factor:>10.4g} "
            f"{group.weight_decay:>13.4g}  {group.names[0]}"
        )
    return "\n".join(lines)


def build_optimizer(groups: Sequence[Group], options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer of OPTIMIZER.NAME over these groups, in this order. set_rates() sets the rates before each step."""
    parameters = [{"params": list(group.parameters), "lr": 0.0, "weight_decay": group.weight_decay} for group in groups]
    arguments = {name: getattr(options, key) for name, key in _ARGUMENTS.get(options.NAME, {}).items()}
    arguments |= options.OPTIONS
    is_sharded = any(is_part(parameter) for group in groups for parameter in group.parameters)
    if options.NAME in (_FUSED_SHARDED if is_sharded else _FUSED) and not _WAYS & arguments.keys():
        arguments["fused"] = True
    idle = _set_but_not_taken(options)
    if idle:
        log.warning(
            "config.OPTIMIZER.NAME=%r does not take %s: set in vain. Its own arguments go into OPTIMIZER.OPTIONS.",
            options.NAME, ", ".join(idle),
        )  # fmt: skip
    try:
        if options.NAME.startswith("timm/"):
            from timm.optim import create_optimizer_v2

            name = options.NAME.removeprefix("timm/")
            return create_optimizer_v2(parameters, opt=name, lr=0.0, weight_decay=0.0, **arguments)
        make = resolve("optimizer", options.NAME, key="OPTIMIZER.NAME")
        return make(parameters, lr=0.0, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"config.OPTIMIZER.NAME={options.NAME!r} with OPTIONS={options.OPTIONS}: {error}."
            f"{_known_arguments(options.NAME)}"
        ) from error


def _set_but_not_taken(options: OptimizerOptions) -> list[str]:
    """Options of single optimizers that differ from their defaults although this one does not read them."""
    every = {key for taken in _ARGUMENTS.values() for key in taken.values()}
    taken = set(_ARGUMENTS.get(options.NAME, {}).values())
    fields = type(options).model_fields
    return sorted(
        key for key in every - taken if getattr(options, key) != fields[key].get_default(call_default_factory=True)
    )


def _known_arguments(name: str) -> str:
    if name.startswith("timm/"):
        return ""
    parameters = list(inspect.signature(resolve("optimizer", name, key="OPTIMIZER.NAME")).parameters)
    return f" Its arguments: {', '.join(parameters[1:])}."


def set_rates(optimizer: torch.optim.Optimizer, groups: Sequence[Group], rates: StepRates) -> None:
    """Set each group's learning rate for the coming step, and its weight decay if that follows the general one's."""
    for target, group in zip(optimizer.param_groups, groups):
        target["lr"] = (rates.lr_head if group.role == "head" else rates.lr) * group.lr_factor + rates.lr_floor
        if rates.weight_decay is not None and group.decay_is_general:
            target["weight_decay"] = rates.weight_decay


def rates_of_roles(optimizer: torch.optim.Optimizer, groups: Sequence[Group]) -> dict[str, float]:
    """{"lr_prototypes": ...}: the learning rates in force, where there are more roles than trunk and head."""
    if {group.role for group in groups} <= {"trunk", "head"}:
        return {}
    return {f"lr_{group.role}": target["lr"] for group, target in zip(groups, optimizer.param_groups)}


def state_by_name(optimizer: torch.optim.Optimizer, groups: Sequence[Group]) -> dict[str, Any]:
    """The optimizer's state under the parameters' names: it does not depend on how they are grouped."""
    return {
        name: dict(optimizer.state[parameter])
        for group in groups
        for name, parameter in zip(group.names, group.parameters)
        if parameter in optimizer.state
    }


def load_state_by_name(optimizer: torch.optim.Optimizer, groups: Sequence[Group], state: Mapping[str, Any]) -> None:
    """The inverse of state_by_name(), for the same or another grouping of the same parameters."""
    names = [name for group in groups for name in group.names]
    unknown = sorted(set(state) - set(names))
    if unknown:
        raise ConfigError(
            f"the checkpoint's optimizer holds {unknown[0]!r}, which is not trained now ({len(unknown)} such "
            "parameters). Resume with the configuration of the run, or set config.RUN.OVERWRITE=true to start anew."
        )
    plain = optimizer.state_dict()
    plain["state"] = {i: dict(state[name]) for i, name in enumerate(names) if name in state}
    optimizer.load_state_dict(plain)
