"""Optimizer groups, learning rates and one whole training step of part discovery, as the original has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics.part_vectors import Vectors, build, check_gradients, close, load, options, our_names
from vissl_like.config.schema_model import GradClip, Loss, Optimizer, PartFactors, Schedule
from vissl_like.losses.affine import Affine
from vissl_like.models.parts import PartNoise
from vissl_like.optim.clipping import clip_gradients
from vissl_like.optim.groups import build_optimizer, set_rates
from vissl_like.optim.part_groups import make_part_groups
from vissl_like.optim.scaling import normalized_weight_decay
from vissl_like.optim.schedules import Rates
from vissl_like.tasks.parts import Parts

RECORDED, STEP = Vectors("parts_optim"), Vectors("parts_train_step")
TRUNK = {"NAME": "timm/vit_base_patch14_reg4_dinov2", "OPTIONS": {"embed_dim": 48, "depth": 2, "num_heads": 4}}
LR = 2.828e-6
FACTORS = PartFactors(SCRATCH_LR_FACTOR=1e4, MODULATION_LR_FACTOR=1e4, FINER_LR_FACTOR=1e3)


def two_stage(**parts: Any) -> Any:
    return build("two_stage", options(TRUNK, {"NUM_PARTS": 4, **parts}), num_classes=6, image_size=56)


def rates_of(model: Any, *, preset: str, names: list[str], decay: float, schedule: Schedule, epochs: int) -> Any:
    """(learning rate, weight decay) of each recorded parameter in the first epoch; None where it is not trained."""
    wanted = Optimizer(NAME="adamw", WEIGHT_DECAY=decay, PARTS=FACTORS, PARAM_GROUP_CONSTRUCTOR="parts")
    groups = make_part_groups(model, wanted)
    optimizer = build_optimizer(groups, wanted)
    set_rates(optimizer, groups, Rates(lr=schedule, steps_per_epoch=1, num_epochs=epochs).at(0))
    of = {
        name: (target["lr"], target["weight_decay"])
        for group, target in zip(groups, optimizer.param_groups)
        for name in group.names
    }
    return [of.get(ours) for ours in our_names(names, preset=preset).values()]


@pytest.mark.parametrize(("recipe", "batch", "epochs"), [("seed_cub", 16, 90), ("metashift_like", 32, 30)])
def test_groups(recipe: str, batch: int, epochs: int) -> None:
    about = RECORDED.settings["recipes"][recipe]
    decay = normalized_weight_decay(
        0.05, num_train=about["train_images"], global_batch=batch * about["world_size"], num_epochs=epochs
    )
    assert decay == pytest.approx(RECORDED.record["recipe_weight_decay"][recipe], rel=1e-9)
    schedule = Schedule(NAME="timm_cosine", START_VALUE=LR)
    names = RECORDED.record["param_names"]
    found = rates_of(
        two_stage(FREEZE_BACKBONE=True), preset="ifam", names=names, decay=decay, schedule=schedule, epochs=epochs
    )
    below = f"groups/{recipe}"
    trainable = RECORDED.arrays[f"{below}/trainable"]
    assert [value is not None for value in found] == trainable.tolist()
    rows = np.flatnonzero(trainable)
    ours = np.array([found[row] for row in rows])
    np.testing.assert_allclose(ours[:, 0], RECORDED.arrays[f"{below}/lr"][rows], rtol=1e-9)
    np.testing.assert_allclose(ours[:, 1], RECORDED.arrays[f"{below}/weight_decay"][rows], rtol=1e-9)


def test_groups_of_the_single_stage() -> None:
    decay = normalized_weight_decay(0.01, num_train=5994, global_batch=32, num_epochs=28)
    parts = {"NUM_PARTS": 4, "FREEZE_BACKBONE": True, "MODULATION_TYPE": "layer_norm"}
    model = build("parts", options(TRUNK, parts), num_classes=6, image_size=56)
    names = RECORDED.record["stage1_param_names"]
    schedule = Schedule(NAME="timm_step", START_VALUE=1.414e-6)
    found = rates_of(model, preset="pdiscoformer", names=names, decay=decay, schedule=schedule, epochs=28)
    trainable = RECORDED.arrays["stage1_groups/trainable"]
    assert [value is not None for value in found] == trainable.tolist()
    rows = np.flatnonzero(trainable)
    ours = np.array([found[row] for row in rows])
    np.testing.assert_allclose(ours[:, 0], RECORDED.arrays["stage1_groups/lr"][rows], rtol=1e-9)
    np.testing.assert_allclose(ours[:, 1], RECORDED.arrays["stage1_groups/weight_decay"][rows], rtol=1e-9)


@pytest.mark.parametrize(("kind", "query"), [("ep", "heads.pool.queries"), ("aim", "heads.pool.query"), ("cls", "")])
def test_queries_of_a_pooling_do_not_decay(kind: str, query: str) -> None:
    """The matrices of the head do; its vectors and the queries do not."""
    trunk = TRUNK | {"OPTIONS": {"embed_dim": 96, "depth": 1, "num_heads": 4}}
    model = build("pooled", options(trunk, {"POOLING_TYPE": kind}), num_classes=6, image_size=56)
    decay = {
        name: group.weight_decay
        for group in make_part_groups(model, Optimizer(WEIGHT_DECAY=0.05))
        for name in group.names
        if name.startswith("heads.")
    }
    matrices = {name for name, value in model.named_parameters() if value.ndim > 1 and name.startswith("heads.")}
    assert query in {"", *decay} and "heads.classifier.weight" in matrices
    assert decay == {name: 0.05 if name in matrices - {query} else 0.0 for name in decay}


SCHEDULES = {
    "cosine_seed": {"NAME": "timm_cosine"},
    "cosine_warmup": {"NAME": "timm_cosine", "WARMUP_EPOCHS": 5},
    "linear": {"NAME": "timm_linear"},
    "linear_warmup": {"NAME": "timm_linear", "WARMUP_EPOCHS": 3},
    "step": {"NAME": "timm_step", "GAMMA": 0.5, "STEP_EPOCHS": 4},
    "step_default": {"NAME": "timm_step"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str) -> None:
    """Every epoch of every group; the last recorded row is what is left after the training."""
    epochs = RECORDED.record["schedules"][name]["epochs"]
    recorded = RECORDED.arrays[f"schedule/{name}"]
    rates = Rates(lr=Schedule(START_VALUE=LR, **SCHEDULES[name]), steps_per_epoch=3, num_epochs=epochs)
    factors = np.array([1, 1, 1, 1, 1, 1e3, 1e3, 1e4, 1e4, 1e4, 1e4, 1e4])
    for epoch in range(epochs):
        found = rates.at(3 * epoch + 1)
        np.testing.assert_allclose(found.lr * factors + found.lr_floor, recorded[epoch], rtol=1e-9, atol=1e-18)


def test_least_rate_and_first_rate_are_those_of_every_group() -> None:
    """By hand: 4 epochs of a cosine from 1e-2 f to 1e-5, the first two of them warm-up from 1e-6."""
    schedule = Schedule(NAME="timm_cosine", START_VALUE=1e-2, END_VALUE=1e-5, WARMUP_EPOCHS=2, WARMUP_VALUE=1e-6)
    rates = Rates(lr=schedule, steps_per_epoch=1, num_epochs=4)
    for factor in (1.0, 100.0):
        lr = 1e-2 * factor
        expected = [1e-6, 1e-6 + (lr - 1e-6) / 2, 1e-5 + 0.5 * (lr - 1e-5), 1e-5 + (lr - 1e-5) * (2 - 2**0.5) / 4]
        found = [rates.at(step).lr * factor + rates.at(step).lr_floor for step in range(4)]
        assert found == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------------------ one whole step
TERMS = {
    "loss_classification_train": "loss_classification",
    "loss_presence_train": "loss_presence",
    "loss_orth_train": "loss_orth",
    "loss_equiv_train": "loss_equiv",
    "loss_total_train": "loss",
    "loss_tv": "loss_tv",
    "loss_enforced_presence": "loss_enforced_presence",
    "loss_pixel_wise_entropy": "loss_pixel_wise_entropy",
    "loss_classification_stage_1": "loss_classification_stage_1",
}
#: Where the original's trainer differs from ours, its way: see docs/parts.md.
AS_RECORDED = {"SHARED_GUMBEL": False, "FREEZE_BACKBONE": True}
LOSS_AS_RECORDED = {"ORTHOGONALITY_TRANSPOSED": True, "EQUIVARIANCE_WARP": "nearest_two_step"}


def test_one_training_step(tmp_path: Path) -> None:
    """Two forward passes, all losses, clipping, AdamW: losses, gradients and the new weights."""
    model = two_stage(**AS_RECORDED)
    load(model, STEP.below("sd/"), tmp_path, preset="ifam")
    task = Parts(model.train(), loss=Loss.model_validate({"PARTS": LOSS_AS_RECORDED}), num_classes=6)
    angle, x, y, scale = STEP["affine"].tolist()
    values = task(
        {"data": STEP["image"], "label": STEP["label"], "index": torch.arange(3)},
        noise=noise(0), twin_noise=noise(2), affine=Affine(angle, x, y, scale),
    )  # fmt: skip
    for name, recorded in zip(STEP.record["loss_names"], STEP["losses"].tolist()):
        if name in TERMS:
            assert values[TERMS[name]].item() == pytest.approx(recorded, rel=1e-5, abs=1e-6), name
        else:
            assert recorded == 0, name
    values["loss"].backward()
    names = our_names(list(STEP.below("sd/")), preset="ifam")
    parameters = dict(model.named_parameters())
    frozen = {names[name] for name in STEP.record["frozen"]}
    assert {name for name, parameter in parameters.items() if not parameter.requires_grad} == frozen
    norm = clip_gradients(list(parameters.values()), GradClip(USE_GRAD_CLIP=True, MAX_NORM=2.0))
    close(norm, STEP["grad_norm"], "gradient")
    factor = min(1.0, 2.0 / float(norm))
    check_gradients(model, {name: value * factor for name, value in STEP.below("grad/").items()}, preset="ifam")
    wanted = Optimizer(
        NAME="adamw",
        WEIGHT_DECAY=STEP.settings["normalised_weight_decay"],
        PARTS=FACTORS,
        PARAM_GROUP_CONSTRUCTOR="parts",
    )
    groups = make_part_groups(model, wanted)
    optimizer = build_optimizer(groups, wanted)
    schedule = Schedule(NAME="timm_cosine", START_VALUE=STEP.settings["lr"])
    set_rates(optimizer, groups, Rates(lr=schedule, steps_per_epoch=46, num_epochs=90).at(0))
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    optimizer.step()
    for name, recorded in STEP.below("after/").items():
        moved = gradients.get(names[name])
        sure = torch.ones_like(recorded, dtype=torch.bool) if moved is None else moved.abs() > 1e-6
        found = model.state_dict()[names[name]]
        torch.testing.assert_close(
            found[sure], recorded[sure], rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def noise(first: int) -> PartNoise:
    return PartNoise(
        maps=STEP[f"noise_{first}"],
        mask=STEP[f"noise_{first + 1}"],
        keep_mask=STEP[f"drop_{first}"],
        keep_scores=STEP[f"drop_{first + 1}"],
    )
