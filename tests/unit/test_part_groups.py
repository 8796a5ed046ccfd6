"""Which role each parameter of a part model has, and which are not trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.part_models import STEM, VIT, build, images
from vissl_like.config.schema_model import Loss, WeightsInit
from vissl_like.core.weights_rules import rules_of
from vissl_like.models.part_groups import MAP_TERMS, freeze, freeze_idle, parameter_roles
from vissl_like.tasks.parts import Parts

DATA = Path(__file__).parents[1] / "data"
#: Weights of all terms but the cross-entropies.
NO_TERMS = dict.fromkeys((*MAP_TERMS, "ORTHOGONALITY_LOSS_LANDMARKS"), 0.0)
GROUPS = {
    "backbone": (0, 1), "tokens": (1,), "tokens_2": (2,), "backbone_2": (3, 4), "prototypes": (5,), "modulation": (7,),
    "head": (8, 9), "head_2": (10, 11),
}  # fmt: skip
GROUPS_OF_ONE = {"backbone": (0, 1), "tokens": (1,), "prototypes": (2,), "modulation": (3,), "head": (4,)}
LARGE = {"NAME": "timm/vit_base_patch14_reg4_dinov2", "OPTIONS": {"embed_dim": 48, "depth": 2, "num_heads": 4}}


def named(preset: str, names: list[str]) -> list[str]:
    rules = rules_of(WeightsInit(PRESET=preset))
    return [rules.apply(name) for name in names]


@pytest.mark.parametrize(
    ("kind", "preset", "prefix", "groups"),
    [("two_stage", "ifam", "", GROUPS), ("parts", "pdiscoformer", "stage1_", GROUPS_OF_ONE)],
)
def test_roles_are_the_groups_of_the_original(kind: str, preset: str, prefix: str, groups: dict[str, Any]) -> None:
    roles = parameter_roles(build(kind, LARGE, size=56, NUM_PARTS=4))
    record = json.loads((DATA / "parts_optim.json").read_text())
    names = named(preset, record[f"{prefix}param_names"])
    assert sorted(names) == sorted(roles)
    found = np.load(DATA / "parts_optim.npz", allow_pickle=False)[
        "groups/seed_cub/group" if not prefix else "stage1_groups/group"
    ]
    for name, group in zip(names, found, strict=True):
        assert group in groups[roles[name]], name


@pytest.mark.parametrize(("kind", "trunk"), [("decoupled", VIT), ("pooled", VIT), ("pooled", STEM)])
def test_models_without_parts_freeze_all_but_the_head(kind: str, trunk: dict[str, Any]) -> None:
    model = build(kind, trunk, FREEZE_BACKBONE=True, POOLING_TYPE="gap")
    roles = parameter_roles(model)
    assert set(roles.values()) <= {"backbone", "tokens", "head"}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (roles[name] == "head") == name.startswith("heads.")


def test_roles_go_by_module_not_by_name() -> None:
    """A backbone whose own names contain head, modulation or cls_token stays a backbone."""
    model = build("parts", VIT)
    model.trunk.backbone.head_modulation = torch.nn.Linear(2, 2)
    model.trunk.backbone.blocks[0].cls_token_mixer = torch.nn.Linear(2, 2)
    roles = parameter_roles(model)
    assert {roles[name] for name in roles if "head_modulation" in name or "mixer" in name} == {"backbone"}


MAPS_ALONE = {"CLASSIFICATION_LOSS": 0, "ORTHOGONALITY_LOSS_LANDMARKS": 0}


@pytest.mark.parametrize(
    ("kind", "parts", "loss", "idle"),
    [
        ("two_stage", {}, {}, set()),
        ("two_stage", {}, MAPS_ALONE, {"modulation", "head"}),
        ("two_stage", {}, {"CLASSIFICATION_LOSS_STAGE_2": 0}, {"backbone_2", "tokens_2", "head_2"}),
        ("two_stage", {}, NO_TERMS | {"CLASSIFICATION_LOSS": 0}, {"backbone", "tokens", "prototypes", "modulation", "head"}),
        ("two_stage", {"USE_SOFT_MASKS": True}, NO_TERMS | {"CLASSIFICATION_LOSS": 0}, {"modulation", "head"}),
        ("two_stage", {"MASK_GRADIENT": "straight_through"}, NO_TERMS | {"CLASSIFICATION_LOSS": 0}, {"modulation", "head"}),
        ("parts", {"MODULATION_ORTH": False}, {"CLASSIFICATION_LOSS": 0}, {"modulation", "head"}),
        ("parts", {}, {"CLASSIFICATION_LOSS": 0}, {"head"}),
        ("parts", {}, NO_TERMS, set()),
    ],
)  # fmt: skip
def test_what_no_term_of_the_loss_reaches_is_not_trained(
    kind: str, parts: dict[str, Any], loss: dict[str, Any], idle: set[str]
) -> None:
    """What is said to be idle is exactly what a step leaves without gradient."""
    model = build(kind, VIT, **parts).train()
    given = Loss.model_validate({"PARTS": loss})
    assert set(freeze_idle(model, given.PARTS)) == idle
    task = Parts(model, loss=given, num_classes=5)
    task({"data": images(), "label": torch.tensor([0, 1]), "index": torch.arange(2)})["loss"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (parameter_roles(model)[name] not in idle), (
            name
        )


@pytest.mark.parametrize("sees_background", [True, False])
def test_the_background_has_no_network_to_train_unless_it_is_compared(sees_background: bool) -> None:
    model = build("parts", VIT, MODULATION_TYPE="parallel_mlp", MODULATION_ORTH=sees_background).train()
    assert not freeze_idle(model, Loss().PARTS)
    task = Parts(model, loss=Loss(), num_classes=5)
    task({"data": images(), "label": torch.tensor([0, 1]), "index": torch.arange(2)})["loss"].backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    assert all(
        parameter.requires_grad == sees_background for parameter in model.heads.modulation.layers[3].parameters()
    )


def test_frozen_batch_normalisation_keeps_its_statistics() -> None:
    model = build("parts", {"NAME": "torchvision/resnet18"}, size=64, FREEZE_BACKBONE=True).train()
    before = model.trunk.backbone.bn1.running_mean.clone()
    model(images(2, (64, 64)))
    assert torch.equal(model.trunk.backbone.bn1.running_mean, before)
    model.trunk.requires_grad_(True)
    model.train()(images(2, (64, 64)))
    assert not torch.equal(model.trunk.backbone.bn1.running_mean, before)


def test_freezing_twice_changes_nothing() -> None:
    model = build("two_stage", VIT, FREEZE_BACKBONE=True)
    before = [parameter.requires_grad for parameter in model.parameters()]
    freeze(model, model.options)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
