"""Parameter groups of part discovery: by the role of each parameter, as iFAM and PDiscoFormer train them."""

from __future__ import annotations

from vissl_like.config.schema_model import Optimizer as OptimizerOptions
from vissl_like.errors import ConfigError
from vissl_like.models.part_groups import PartModel, parameter_roles
from vissl_like.models.parts import StageOne
from vissl_like.models.pooled_vit import PooledModel
from vissl_like.optim.groups import Group

#: Roles whose matrices decay; vectors (biases, norms, LayerScale), tokens, prototypes and modulation do not, nor do the
#: queries of a pooling. The classifier of the single-stage model is one group: there vectors decay, too.
_DECAYING = ("backbone", "backbone_2", "head", "head_2")


def make_part_groups(model: PartModel, options: OptimizerOptions) -> list[Group]:
    """The groups of all trainable parameters, in the order of their roles."""
    factors = lr_factors(options)
    found: dict[tuple[str, bool], list[str]] = {}
    parameters = dict(model.named_parameters())
    queries = {id(query) for query in (model.query_parameters() if isinstance(model, PooledModel) else ())}
    whole = ("head",) if isinstance(model, StageOne) else ()
    for name, role in parameter_roles(model).items():
        parameter = parameters[name]
        if parameter.requires_grad:
            decays = role in _DECAYING and (parameter.ndim > 1 or role in whole) and id(parameter) not in queries
            found.setdefault((role, decays), []).append(name)
    if not found:
        raise ConfigError("nothing to train: every parameter is frozen (config.MODEL.PARTS.FREEZE_*).")
    order = list(factors)
    return [
        Group(
            role=role,
            lr_factor=factors[role],
            weight_decay=options.WEIGHT_DECAY if decays else 0.0,
            decay_is_general=decays,
            names=tuple(names),
            parameters=tuple(parameters[name] for name in names),
        )
        for (role, decays), names in sorted(found.items(), key=lambda item: (order.index(item[0][0]), not item[0][1]))
    ]


def lr_factors(options: OptimizerOptions) -> dict[str, float]:
    """Role -> factor of the learning rate."""
    given = options.PARTS
    first, second, scratch = given.BACKBONE_LR_FACTOR, given.STAGE_TWO_LR_FACTOR, given.SCRATCH_LR_FACTOR
    return {
        "backbone": first,
        "tokens": first,
        "backbone_2": second,
        "tokens_2": second,
        "prototypes": given.FINER_LR_FACTOR,
        "modulation": given.MODULATION_LR_FACTOR,
        "head": scratch,
        "head_2": scratch,
    }
