"""What the types cannot say about part discovery: options that nothing reads, and those that must fit together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vissl_like.config.schema import Config
from vissl_like.config.schema_model import Optimizer

Problem = tuple[str, str]

#: Options of MODEL.PARTS, and the kinds of models that read them.
_READ_BY = {
    **dict.fromkeys(
        ("USE_SOFT_MASKS", "MASK_GRADIENT", "REMOVE_PARTS", "FREEZE_SECOND_STAGE", "FREEZE_PARAMS_STAGE_2"),
        ("two_stage",),
    ),
    "GUMBEL_SOFTMAX_HARD": ("parts",),
    "LATE_MASKING": ("decoupled",),
    "POOLING_TYPE": ("pooled",),
    "PART_LOGITS_THRESHOLD_PATH": ("parts", "two_stage"),
}
#: Options of OPTIMIZER that say how parameters are grouped where that does not go by their role in a part model.
_GENERAL_GROUPS = (
    "GROUPS", "REGULARIZE_BN", "REGULARIZE_BIAS", "NON_REGULARIZED_PARAMETERS", "CONSTRUCT_SINGLE_PARAM_GROUP_ONLY",
    "HEAD_OPTIMIZER_PARAMS.USE_DIFFERENT_LR", "HEAD_OPTIMIZER_PARAMS.USE_DIFFERENT_WD",
)  # fmt: skip


def part_problems(config: Config) -> Iterator[Problem]:
    """(key, text) of options of part discovery that are set in vain or contradict each other."""
    yield from _not_read_by_the_model(config)
    yield from _pairs(config)
    if config.OPTIMIZER.PARAM_GROUP_CONSTRUCTOR == "parts":
        yield from _not_read_by_the_groups(config.OPTIMIZER)


def _not_read_by_the_model(config: Config) -> Iterator[Problem]:
    options, fields = config.MODEL.PARTS, type(config.MODEL.PARTS).model_fields
    for name, kinds in _READ_BY.items():
        value = getattr(options, name)
        if config.MODEL.NAME not in kinds and value != fields[name].get_default(call_default_factory=True):
            key = f"config.MODEL.PARTS.{name}"
            yield (
                key,
                f"{key}={value!r}: config.MODEL.NAME={config.MODEL.NAME!r} does not read it, only {' and '.join(kinds)}. "
                "Leave it out, or choose another kind of model.",
            )


def _pairs(config: Config) -> Iterator[Problem]:
    parts, loss = config.MODEL.PARTS, config.LOSS.PARTS
    if config.MODEL.NAME == "parts" and parts.GUMBEL_SOFTMAX_HARD and not parts.GUMBEL_SOFTMAX:
        key = "config.MODEL.PARTS.GUMBEL_SOFTMAX_HARD"
        yield (
            key,
            f"{key}=True: a form of the softmax with Gumbel noise, but config.MODEL.PARTS.GUMBEL_SOFTMAX=False. Set both "
            "or neither.",
        )
    if loss.SCALE_L > loss.SCALE_U:
        key = "config.LOSS.PARTS.SCALE_L"
        yield key, f"{key}={loss.SCALE_L}: must be at most config.LOSS.PARTS.SCALE_U={loss.SCALE_U}."


def _not_read_by_the_groups(options: Optimizer) -> Iterator[Problem]:
    given, default = options.model_dump(), Optimizer().model_dump()
    for name in _GENERAL_GROUPS:
        value = _at(given, name)
        if value != _at(default, name):
            key = f"config.OPTIMIZER.{name}"
            yield (
                key,
                f"{key}={value!r}: config.OPTIMIZER.PARAM_GROUP_CONSTRUCTOR='parts' groups parameters by their role and does "
                "not read it. Leave it out and use config.OPTIMIZER.PARTS, or set PARAM_GROUP_CONSTRUCTOR=default.",
            )


def _at(options: Any, name: str) -> Any:
    for part in name.split("."):
        options = options[part]
    return options
