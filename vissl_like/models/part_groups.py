"""Which role each parameter of a part model has, by the module that owns it, and which of them are frozen.

The roles are those of iFAM's optimizer groups. They partition the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from vissl_like.config.schema_parts import PartsLoss, PartsModel
from vissl_like.models.masked_vit import Decoupled
from vissl_like.models.part_backbones import MapTrunk, TokenTrunk
from vissl_like.models.parts import PartLayers, PerPart, StageOne
from vissl_like.models.pooled_vit import PooledModel
from vissl_like.models.two_stage import TwoStage

#: Backbone without tokens; class token, registers and positions; prototypes; modulation; classifier. _2: of stage 2.
ROLES = ("backbone", "tokens", "prototypes", "modulation", "head", "backbone_2", "tokens_2", "head_2")
PartModel = StageOne | TwoStage | Decoupled | PooledModel
#: Terms of the loss that look at nothing but the maps.
MAP_TERMS = (
    "TOTAL_VARIATION_LOSS", "CONCENTRATION_LOSS", "ENFORCED_PRESENCE_LOSS", "BACKGROUND_AREA_LOSS", "PRESENCE_LOSS",
    "PIXEL_WISE_ENTROPY_LOSS", "EQUIVARIANCE_LOSS",
)  # fmt: skip


def parameter_roles(model: PartModel) -> dict[str, str]:
    """Name of each parameter -> its role, in the order of named_parameters().

    Models with one backbone and no parts (decoupled, baseline) have backbone, tokens and head.
    """
    role_of: dict[int, str] = {}
    for role, parameter in _members(model):
        assert id(parameter) not in role_of, f"a parameter has two roles: {role_of.get(id(parameter))} and {role}"
        role_of[id(parameter)] = role
    return {name: role_of[id(parameter)] for name, parameter in model.named_parameters()}


def _members(model: PartModel) -> Iterator[tuple[str, nn.Parameter]]:
    if isinstance(model, TwoStage):
        yield from _trunk(model.trunk["stage_1"], "")
        yield from _part_layers(model.heads["stage_1"])
        yield from _trunk(model.trunk["stage_2"], "_2")
        yield from _all("head_2", model.heads["stage_2"].parameters())
        return
    yield from _trunk(model.trunk, "")
    if isinstance(model.heads, PartLayers):
        yield from _part_layers(model.heads)
    else:
        yield from _all("head", model.heads.parameters())


def _trunk(trunk: nn.Module, suffix: str) -> Iterator[tuple[str, nn.Parameter]]:
    tokens = trunk.token_parameters() if isinstance(trunk, MapTrunk | TokenTrunk) else []
    known = {id(parameter) for parameter in tokens}
    yield from _all(f"tokens{suffix}", tokens)
    yield from _all(f"backbone{suffix}", (item for item in trunk.parameters() if id(item) not in known))


def _part_layers(layers: PartLayers) -> Iterator[tuple[str, nn.Parameter]]:
    yield from _all("prototypes", layers.prototypes.parameters())
    yield from _all("modulation", layers.modulation.parameters())
    yield from _all("head", layers.classifier.parameters())


def _all(role: str, parameters: Iterable[nn.Parameter]) -> Iterator[tuple[str, nn.Parameter]]:
    return ((role, parameter) for parameter in parameters)


def freeze(model: PartModel, options: PartsModel) -> None:
    """Stop the training of the roles that FREEZE_* name.

    In models without parts FREEZE_BACKBONE freezes the tokens too, so that only the head trains.
    """
    alone = isinstance(model, Decoupled | PooledModel)
    frozen = {
        "backbone": options.FREEZE_BACKBONE,
        "tokens": options.FREEZE_PARAMS_STAGE_1 or (alone and options.FREEZE_BACKBONE),
        "backbone_2": options.FREEZE_SECOND_STAGE,
        "tokens_2": options.FREEZE_PARAMS_STAGE_2,
    }
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if frozen.get(roles[name], False):
            parameter.requires_grad_(False)
    model.train(model.training)  # frozen batch normalisation goes to its running statistics


def freeze_idle(model: PartModel, loss: PartsLoss) -> list[str]:
    """Stop the training of what no term of the loss has a gradient for, and return its roles.

    Such parameters would never change, and stop DistributedDataParallel.
    """
    if not isinstance(model, StageOne | TwoStage):
        return []
    reached = _reached(model, loss)
    roles = parameter_roles(model)
    idle = sorted({role for role in roles.values() if role not in reached})
    for name, parameter in model.named_parameters():
        if roles[name] in idle:
            parameter.requires_grad_(False)
    layers = model.heads["stage_1"] if isinstance(model, TwoStage) else model.heads
    sees_background = loss.ORTHOGONALITY_LOSS_LANDMARKS and layers.options.MODULATION_ORTH
    if isinstance(layers.modulation, PerPart) and not sees_background:
        layers.modulation.layers[-1].requires_grad_(False)  # no class score is made of the background
    model.train(model.training)
    return idle


def _reached(model: StageOne | TwoStage, loss: PartsLoss) -> set[str]:
    """The roles that some term of the loss has a gradient for."""
    is_double = isinstance(model, TwoStage)
    options: PartsModel = model.options if is_double else model.heads.options
    maps = {"backbone", "tokens", "prototypes"}
    found = set(maps) if any(getattr(loss, term) for term in MAP_TERMS) else set()
    if loss.ORTHOGONALITY_LOSS_LANDMARKS:
        found |= maps | ({"modulation"} if options.MODULATION_ORTH else set())
    if loss.CLASSIFICATION_LOSS:
        found |= maps | {"modulation", "head"}
    if is_double and loss.CLASSIFICATION_LOSS_STAGE_2:
        mask_has_gradient = options.USE_SOFT_MASKS or options.MASK_GRADIENT != "none"
        found |= {"backbone_2", "tokens_2", "head_2"} | (maps if mask_has_gradient else set())
    return found
