"""Optimizer groups, learning rates and one whole training step of part discovery, as the original has them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.optim.lamb import Lamb
from timm.optim.lars import Lars

from tests.numerics.part_vectors import Vectors, build, check_gradients, close, load, options, our_names
from vissl_like.compat.ifam import translate
from vissl_like.config.schema_model import GradClip, Loss, Optimizer, PartFactors, Schedule
from vissl_like.errors import ConfigError
from vissl_like.losses.affine import Affine
from vissl_like.models.parts import PartNoise
from vissl_like.optim.clipping import clip_gradients
from vissl_like.optim.groups import Group, build_optimizer, set_rates
from vissl_like.optim.part_groups import lr_factors, make_part_groups
from vissl_like.optim.scaling import normalized_weight_decay
from vissl_like.optim.schedules import Rates
from vissl_like.tasks.parts import Parts

RECORDED, STEP = Vectors("parts_optim"), Vectors("parts_train_step")
#: What iFAM's commands say of learning rates; the recorded schedules are all of them.
ROLES_OF_GROUPS = (
    "backbone", "backbone", "tokens_2", "backbone_2", "backbone_2", "prototypes", "prototypes", "modulation",
    "head", "head", "head_2", "head_2",
)  # fmt: skip
#: Kind of model -> (role, whether it decays) -> number of the group in the original.
NUMBERS = {
    "two_stage": {
        ("backbone", True): 0, ("backbone", False): 1, ("tokens", False): 1, ("tokens_2", False): 2,
        ("backbone_2", True): 3, ("backbone_2", False): 4, ("prototypes", False): 5, ("modulation", False): 7,
        ("head", True): 8, ("head", False): 9, ("head_2", True): 10, ("head_2", False): 11,
    },
    "parts": {
        ("backbone", True): 0, ("backbone", False): 1, ("tokens", False): 1, ("prototypes", False): 2,
        ("modulation", False): 3, ("head", True): 4,
    },
}  # fmt: skip
BASE = "--lr 2.828e-6 --scratch_lr_factor 1e4 --modulation_lr_factor 1e4 --finer_lr_factor 1e3 "


def sizes() -> dict[str, Any]:
    """The backbone of which the groups were recorded."""
    given = RECORDED.settings["model"]
    options = {"embed_dim": given["dim"], "depth": given["depth"], "num_heads": given["heads"]}
    registers = {"reg_tokens": RECORDED.settings["registers"]}
    return {"NAME": "timm/vit_base_patch14_reg4_dinov2", "OPTIONS": options | registers}


def model_of(kind: str, flags: str) -> Any:
    """The model of recorded size that is frozen as these flags of the original say."""
    given, translated = RECORDED.settings["model"], section("MODEL.PARTS", flags)
    frozen = {name: on for name, on in translated.items() if name.startswith("FREEZE")}
    wanted = options(sizes(), {"NUM_PARTS": given["K"], **frozen})
    return build(kind, wanted, num_classes=given["classes"], image_size=tuple(given["img"]))


def said(flags: str) -> dict[str, Any]:
    """What `vissl-like translate ifam` makes of a command with these flags."""
    script = "train_net_pdisco" if "freeze_params " in f"{flags} " else ""
    return translate(f"--data_path CUB {flags}", script=script).overrides


def section(name: str, flags: str) -> dict[str, Any]:
    """What it says of one section of the configuration."""
    below = f"config.{name}."
    return {key.removeprefix(below): value for key, value in said(flags).items() if key.startswith(below)}


def optimizer_of(flags: str, *, weight_decay: float) -> tuple[Optimizer, Schedule]:
    values = section("OPTIMIZER", flags)
    wanted = Optimizer(
        **{name: values[name] for name in ("NAME", "OPTIONS", "BETAS") if name in values},
        WEIGHT_DECAY=weight_decay,
        PARTS=PartFactors(**section("OPTIMIZER.PARTS", flags)),
        PARAM_GROUP_CONSTRUCTOR="parts",
    )
    return wanted, Schedule(**section("OPTIMIZER.PARAM_SCHEDULERS.LR", flags))


def check_groups(kind: str, below: str, names: list[str], *, preset: str, flags: str, images: int, world: int) -> float:
    """Group, rate and decay of each recorded parameter in the first epoch, and which are trained; returns the decay.

    The original's frozen parameters stay in their groups, ours are in none: the groups are those of nothing frozen.
    """
    given = said(flags)
    epochs = given["config.OPTIMIZER.NUM_EPOCHS"]
    decay = normalized_weight_decay(
        given["config.OPTIMIZER.WEIGHT_DECAY"],
        num_train=images,
        global_batch=given["config.DATA.TRAIN.BATCHSIZE_PER_REPLICA"] * world,
        num_epochs=epochs,
    )
    wanted, schedule = optimizer_of(flags, weight_decay=decay)
    groups = make_part_groups(model_of(kind, ""), wanted)
    optimizer = build_optimizer(groups, wanted)
    set_rates(optimizer, groups, Rates(lr=schedule, steps_per_epoch=1, num_epochs=epochs).at(0))
    of = {
        name: (NUMBERS[kind][group.role, group.decay_is_general], target["lr"], target["weight_decay"])
        for group, target in zip(groups, optimizer.param_groups)
        for name in group.names
    }
    numbers, rates, decays = zip(*(of[ours] for ours in our_names(names, preset=preset).values()))
    recorded = {name: RECORDED.arrays[f"{below}/{name}"] for name in ("group", "group_size", "lr", "weight_decay")}
    assert numbers == tuple(recorded["group"])
    assert np.bincount(numbers, minlength=len(recorded["group_size"])).tolist() == recorded["group_size"].tolist()
    np.testing.assert_allclose(rates, recorded["lr"], rtol=1e-9)
    np.testing.assert_allclose(decays, recorded["weight_decay"], rtol=1e-9)
    model = model_of(kind, flags)
    check_trained(model, names, RECORDED.arrays[f"{below}/trainable"], preset=preset)
    assert {name for group in make_part_groups(model, wanted) for name in group.names} == trained_names(model)
    return decay


@pytest.mark.parametrize("recipe", RECORDED.settings["recipes"])
def test_groups(recipe: str) -> None:
    """From the recorded command line on."""
    about = RECORDED.settings["recipes"][recipe]
    decay = check_groups(
        "two_stage", f"groups/{recipe}", RECORDED.record["param_names"], preset="ifam",
        flags=about["flags"], images=about["train_images"], world=about["world_size"],
    )  # fmt: skip
    assert decay == pytest.approx(RECORDED.record["recipe_weight_decay"][recipe], rel=1e-9)


def test_groups_of_the_single_stage() -> None:
    about = RECORDED.record["stage1_recipe"]
    check_groups(
        "parts", "stage1_groups", RECORDED.record["stage1_param_names"], preset="pdiscoformer",
        flags=about["flags"], images=about["train_images"], world=about["world_size"],
    )  # fmt: skip


@pytest.mark.parametrize("row", range(len(RECORDED.arrays["freeze/combos"])))
def test_every_way_to_freeze(row: int) -> None:
    on = RECORDED.arrays["freeze/combos"][row]
    model = model_of(
        "two_stage", " ".join(f"--{flag}" for flag, is_on in zip(RECORDED.record["freeze_flags"], on) if is_on)
    )
    check_trained(model, RECORDED.record["param_names"], RECORDED.arrays["freeze/trainable"][row], preset="ifam")


@pytest.mark.parametrize("row", range(4))
def test_every_way_to_freeze_a_single_stage(row: int) -> None:
    flags = " ".join(flag for flag, is_on in (("--freeze_backbone", row >= 2), ("--freeze_params", row % 2)) if is_on)
    names, trained = RECORDED.record["stage1_param_names"], RECORDED.arrays["stage1_freeze/trainable"][row]
    check_trained(model_of("parts", flags), names, trained, preset="pdiscoformer")


def check_trained(model: Any, names: list[str], trained: np.ndarray, *, preset: str) -> None:
    ours = our_names(names, preset=preset)
    assert trained_names(model) == {ours[name] for name, is_trained in zip(names, trained) if is_trained}


def trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_model_that_is_frozen_as_a_whole_is_refused() -> None:
    trunk = sizes() | {"OPTIONS": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
    model = build("parts", options(trunk, {"NUM_PARTS": 2}), num_classes=2, image_size=(56, 56))
    with pytest.raises(ConfigError, match=r"nothing to train: every parameter is frozen \(config.MODEL.PARTS.FREEZE_"):
        make_part_groups(model.requires_grad_(False), Optimizer())


@pytest.mark.parametrize(("kind", "query"), [("ep", "heads.pool.queries"), ("aim", "heads.pool.query"), ("cls", "")])
def test_queries_of_a_pooling_do_not_decay(kind: str, query: str) -> None:
    """The matrices of the head do; its vectors and the queries do not."""
    trunk = sizes() | {"OPTIONS": {"embed_dim": 96, "depth": 1, "num_heads": 4}}
    model = build("pooled", options(trunk, {"POOLING_TYPE": kind}), num_classes=6, image_size=(56, 56))
    decay = {
        name: group.weight_decay
        for group in make_part_groups(model, Optimizer(WEIGHT_DECAY=0.05))
        for name in group.names
        if name.startswith("heads.")
    }
    matrices = {name for name, value in model.named_parameters() if value.ndim > 1 and name.startswith("heads.")}
    assert query in {"", *decay} and "heads.classifier.weight" in matrices
    assert decay == {name: 0.05 if name in matrices - {query} else 0.0 for name in decay}


def test_the_classifier_of_the_single_stage_decays_as_a_whole() -> None:
    """One group of it, in the original: with a network per part its normalisation decays, too."""
    wanted = options(sizes(), {"NUM_PARTS": 2, "CLASSIFIER_TYPE": "independent_mlp"})
    for kind, count in (("parts", 1), ("two_stage", 2)):
        model = build(kind, wanted, num_classes=6, image_size=(56, 56))
        groups = [group for group in make_part_groups(model, Optimizer(WEIGHT_DECAY=0.05)) if group.role == "head"]
        assert [group.weight_decay for group in groups] == [0.05, 0.0][:count]
        assert sum(len(group.names) for group in groups) == 2 * 3  # weight, and weight and bias of the normalisation


@pytest.mark.parametrize("name", RECORDED.record["schedules"])
def test_schedules(name: str) -> None:
    """Every epoch of every group, from the recorded flags on, and what is left after the last one."""
    about = RECORDED.record["schedules"][name]
    epochs, recorded = about["epochs"], RECORDED.arrays[f"schedule/{name}"]
    options, schedule = optimizer_of(f"{BASE} --epochs {epochs} {about['flags']}", weight_decay=0.0)
    rates = Rates(lr=schedule, steps_per_epoch=3, num_epochs=epochs)
    by_role = lr_factors(options)
    factors = np.array([by_role[role] for role in ROLES_OF_GROUPS])
    assert len(recorded) == epochs + 1
    for epoch, row in enumerate(recorded):
        found = rates.at(3 * epoch + 1)
        np.testing.assert_allclose(found.lr * factors + found.lr_floor, row, rtol=1e-9, atol=1e-18)


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
    "loss_conc_train": "loss_conc",
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
LOSS_AS_RECORDED = {"ORTHOGONALITY_TRANSPOSED": True, "EQUIVARIANCE_WARP": "nearest_two_step"}
#: Recorded names of the weights of the terms.
WEIGHTS = {
    "cls1": "CLASSIFICATION_LOSS", "cls2": "CLASSIFICATION_LOSS_STAGE_2", "presence": "PRESENCE_LOSS",
    "equiv": "EQUIVARIANCE_LOSS", "tv": "TOTAL_VARIATION_LOSS", "ep": "ENFORCED_PRESENCE_LOSS",
    "ent": "PIXEL_WISE_ENTROPY_LOSS", "orth": "ORTHOGONALITY_LOSS_LANDMARKS",
}  # fmt: skip


#: Flags of the recorded command; of what it does not say the settings do.
FLAGS = " ".join(STEP.settings["flags"])
#: With noise on the maps there are two draws in each of the two passes, else one.
HAS_GUMBEL = "noise_3" in STEP.arrays


def step_model(folder: Path) -> Any:
    given = STEP.settings
    parts = {
        **section("MODEL.PARTS", FLAGS),
        "NUM_PARTS": given["K"], "SOFTMAX_TEMPERATURE": given["tau"], "SHARED_GUMBEL": False,
        "GUMBEL_SOFTMAX": HAS_GUMBEL, "PART_DROPOUT": given["dropout"], "PART_DROPOUT_STAGE_2": given["dropout2"],
    }  # fmt: skip
    model = build("two_stage", options(STEP.trunk, parts), num_classes=STEP.num_classes, image_size=STEP.image_size)
    load(model, STEP.below("sd/"), folder, preset="ifam")
    return model.train()


def step_loss() -> Loss:
    given = STEP.settings
    x, y = given["translate"]
    low, high = given["scale"]
    parts = {
        **section("LOSS.PARTS", FLAGS), **LOSS_AS_RECORDED, **{WEIGHTS[name]: weight for name, weight in given["w"].items()},
        "CONCENTRATION_LOSS": given["conc"], "CONCENTRATION_SQUARE": True, "SMOOTHING": given["smoothing"],
        "PRESENCE_LOSS_TYPE": given["presence_type"], "PRESENCE_LOSS_BETA": given["beta"],
        "ENFORCED_PRESENCE_LOSS_TYPE": given["ep_type"], "DEGREES": given["degrees"], "TRANSLATE_X": x, "TRANSLATE_Y": y,
        "SCALE_L": low, "SCALE_U": high,
    }  # fmt: skip
    return Loss.model_validate({"PARTS": parts})


def step_optimizer(model: Any) -> torch.optim.Optimizer:
    """The recorded optimizer, with the rates of the first step of the recorded training."""
    given = STEP.settings
    epochs, batch = given["epochs"], given["bs"] * given["world"]
    decay = normalized_weight_decay(given["wd"], num_train=given["n_train"], global_batch=batch, num_epochs=epochs)
    assert decay == pytest.approx(given["normalised_weight_decay"], rel=1e-9)
    about = re.fullmatch(r"(\w+) betas (\S+)/(\S+) eps (\S+)", given["optimizer"])
    assert about is not None
    kind, first, second, eps = about.groups()
    command = f"--lr {given['lr']} --epochs {epochs} --optimizer_type {kind} --betas1 {first} --betas2 {second} {FLAGS}"
    wanted, schedule = optimizer_of(command, weight_decay=decay)
    wanted = wanted.model_copy(update={"EPS": float(eps)})
    groups = make_part_groups(model, wanted)
    optimizer = build_optimizer(groups, wanted)
    rates = Rates(lr=schedule, steps_per_epoch=given["n_train"] // batch, num_epochs=epochs)
    set_rates(optimizer, groups, rates.at(0))
    return optimizer


def draws() -> list[PartNoise]:
    """What was drawn in the pass of the images and in that of the transformed ones, in the recorded order."""
    noise = (STEP[f"noise_{number}"] for number in itertools.count())
    keep = (STEP[f"drop_{number}"] for number in itertools.count())
    return [
        PartNoise(
            maps=next(noise) if HAS_GUMBEL else None,
            mask=next(noise),
            keep_mask=next(keep) if STEP.settings["dropout2"] else None,
            keep_scores=next(keep) if STEP.settings["dropout"] else None,
        )
        for _ in range(2)
    ]


def test_logits_of_the_training_step(tmp_path: Path) -> None:
    with torch.no_grad():
        found = step_model(tmp_path)(STEP["image"], noise=draws()[0])
    close(found.logits, STEP["logits_stage2"], "feature")
    close(found.stage_one.logits, STEP["logits_stage1"], "feature")


def test_one_training_step(tmp_path: Path) -> None:
    """Two forward passes, all losses, clipping, the optimizer: losses, gradients and the new weights."""
    model = step_model(tmp_path)
    task = Parts(model, loss=step_loss(), num_classes=STEP.num_classes)
    angle, x, y, scale = STEP["affine"].tolist()
    noise, twin_noise = draws()
    values = task(
        {"data": STEP["image"], "label": STEP["label"], "index": torch.arange(len(STEP["label"]))},
        noise=noise, twin_noise=twin_noise, affine=Affine(angle, x, y, scale),
    )  # fmt: skip
    values["loss"] = values["loss"] / STEP.settings["accum"]
    for name, recorded in zip(STEP.record["loss_names"], STEP["losses"].tolist()):
        if TERMS[name] in values:
            assert values[TERMS[name]].item() == pytest.approx(recorded, rel=1e-5, abs=1e-6), name
        else:
            assert recorded == 0, name
    values["loss"].backward()
    names = our_names(list(STEP.below("sd/")), preset="ifam")
    parameters = dict(model.named_parameters())
    frozen = {names[name] for name in STEP.record["frozen"]}
    assert {name for name, parameter in parameters.items() if not parameter.requires_grad} == frozen
    largest = STEP.settings["clip"] or 1e30  # 0: not clipped
    norm = clip_gradients(list(parameters.values()), GradClip(USE_GRAD_CLIP=True, MAX_NORM=largest))
    close(norm, STEP["grad_norm"], "gradient")
    factor = min(1.0, largest / float(norm))
    check_gradients(model, {name: value * factor for name, value in STEP.below("grad/").items()}, preset="ifam")
    optimizer = step_optimizer(model)
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    optimizer.step()
    for name, recorded in STEP.below("after/").items():
        moved = gradients.get(names[name])
        sure = torch.ones_like(recorded, dtype=torch.bool) if moved is None else moved.abs() > 1e-6
        found = model.state_dict()[names[name]]
        torch.testing.assert_close(
            found[sure], recorded[sure], rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


# ---------------------------------------------------------------------------------------------------------- optimizers
#: Flags of each optimizer of the original -> what makes it, and with which arguments.
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "nadam": (torch.optim.NAdam, {}),
    "adamw --betas1 0.8 --betas2 0.95": (torch.optim.AdamW, {"betas": (0.8, 0.95)}),
    "sgd --momentum 0.8": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    **{
        kind: (Lars, {"momentum": 0.9, "trust_coeff": 0.001, "nesterov": kind[0] == "n", "trust_clip": kind[-1] == "c"})
        for kind in ("lars", "nlars", "larc", "nlarc")
    },
    "lars --dampening 0.5 --trust_coeff 0.01 --always_adapt": (
        Lars, {"momentum": 0.9, "dampening": 0.5, "trust_coeff": 0.01, "always_adapt": True},
    ),
    "lamb": (Lamb, {"max_grad_norm": 1.0, "grad_averaging": True}),
    "lambc": (Lamb, {"max_grad_norm": 1.0, "grad_averaging": True, "trust_clip": True}),
    "lamb --max_grad_norm 0.5 --turn_off_grad_averaging": (Lamb, {"max_grad_norm": 0.5, "grad_averaging": False}),
}  # fmt: skip


@pytest.mark.parametrize("flags", OPTIMIZERS)
def test_optimizers(flags: str) -> None:
    """Three steps of a matrix and a vector with ten times its rate and no decay, against the libraries' own."""
    make, arguments = OPTIMIZERS[flags]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 4, generator=generator), torch.randn(4, generator=generator)]
    gradients = [[torch.randn(*value.shape, generator=generator) for value in start] for _ in range(3)]
    theirs, ours = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    expected = make(
        [
            {"params": theirs[:1], "lr": 0.1, "weight_decay": 0.05},
            {"params": theirs[1:], "lr": 1.0, "weight_decay": 0.0},
        ],
        lr=0.1,
        **arguments,
    )
    wanted, schedule = optimizer_of(f"--lr 0.1 --optimizer_type {flags}", weight_decay=0.05)
    groups = [
        Group("backbone", 1.0, 0.05, True, ("matrix",), (ours[0],)),
        Group("head", 10.0, 0.0, False, ("vector",), (ours[1],)),
    ]
    found = build_optimizer(groups, wanted)
    set_rates(found, groups, Rates(lr=schedule, steps_per_epoch=10, num_epochs=5).at(0))
    for step in gradients:
        for optimizer, parameters in ((expected, theirs), (found, ours)):
            for parameter, gradient in zip(parameters, step):
                parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert all(float((value.detach() - before).abs().max()) > 1e-6 for value, before in zip(ours, start))
