"""Command lines of iFAM and PDiscoFormer -> a recipe and overrides. Free of torch.

Every flag of the originals is known here: what it becomes, or why it has no counterpart. Flags that are not given have the
originals' defaults (those of the parser, which are not always those of its documentation).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vissl_like.compat.ifam_flags import (
    BASELINE,
    DECISIVE,
    DECOUPLED,
    DOCUMENTED,
    FLAGS,
    SINGLE,
    SINGLE_ONLY,
    STATED,
    TWO_STAGE,
    Command,
    read_command,
)
from vissl_like.compat.translation import Translation
from vissl_like.errors import ConfigError
from vissl_like.registry import suggest

DATASETS = {
    "cub": "cub", "nabirds": "nabirds", "waterbirds": "waterbirds", "meta_shift": "meta_shift", "metashifts": "meta_shift",
    "siim_acr": "siim_acr", "imagenet": "disk_folder", "imagenet_v2": "imagenet_v2", "imagenet_a": "imagenet_a",
    "imagenet_r": "imagenet_r", "turtle_reid": "turtle_reid", "flowers102": "flowers102",
    "part_imagenet": "part_imagenet", "part_imagenet_ood": "part_imagenet",
}  # fmt: skip
#: Names of the weights that each script saves.
_PRESETS = {TWO_STAGE: "ifam", SINGLE: "pdiscoformer", BASELINE: "ifam_baseline", DECOUPLED: "ifam_decoupled"}
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
_SIIM = {"mean": [0.48865] * 3, "std": [0.24621] * 3}


def translate(text: str, *, script: str = "") -> Translation:
    """The recipe and the overrides that do what a command of the original is meant to do."""
    command = read_command(text, script=script)
    result = _translated(command)
    single = [f"--{flag}" for flag in SINGLE_ONLY if flag in command.given]
    if single and command.script == TWO_STAGE and not script:
        result.notices.append(
            f"{', '.join(single)}: PDiscoFormer has this, whose script is called train_net, too; for a command of it write "
            f"`translate ifam --script {SINGLE} -- ...`. Here it is read as iFAM's, with two stages"
        )
    result.notices += _defaults_taken(command)
    for flag in _lost(command, result):
        result.without[flag] = _WITHOUT.get(flag, "has no effect together with the other flags")
    return result


def _translated(command: Command) -> Translation:
    result = Translation(recipe="parts/ifam", notices=command.notices)
    for part in (_model, _parts, _data, _optimizer, _losses, _run, _tracking):
        part(command, result)
    return result


def _lost(command: Command, result: Translation) -> Iterator[str]:
    """Given flags that nothing asked for, or whose value changes nothing and that no notice names."""
    given = dict(command.given)
    for flag, value in command.given.items():
        rest = {other: given[other] for other in given if other != flag}
        without = _translated(replace(command, given=rest, notices=[], asked=set()))
        if without.overrides != result.overrides:
            continue
        given = rest  # of two flags that say the same, one counts
        is_said = any(re.search(rf"--{flag}\b", line) for line in result.notices)
        is_meant = flag not in command.asked or (value != command.default(flag) and not is_said)
        if is_meant and value != _DONE_ANYWAY.get(flag):
            yield flag


def _defaults_taken(command: Command) -> list[str]:
    """Notices of defaults that a user of this script may not expect."""
    left_out = [flag for flag in FLAGS if flag not in command.given]
    if command.script != TWO_STAGE:
        assumed = [flag for flag in DECISIVE if flag in left_out and flag not in STATED.get(command.script, ())]
        source = "the baseline and the two-stage trainer" if command.script == DECOUPLED else "the two-stage trainer"
        listed = "".join(f"--{flag} {command.default(flag)}, " for flag in assumed)
        return [
            f"{command.script}: flags that are not given have defaults of {source}, perhaps not its own: {listed}..."
        ]
    is_open = {flag for flag in DOCUMENTED for line in command.notices if line.startswith(f"--{flag} <")}
    return [
        f"--{flag} is not given: {FLAGS[flag][1]} as the parser has it (the documentation says {value})"
        for flag, value in DOCUMENTED.items()
        if flag in left_out and flag not in is_open
    ]


def _model(command: Command, result: Translation) -> None:
    kinds = {TWO_STAGE: "two_stage", SINGLE: "parts", BASELINE: "pooled", DECOUPLED: "decoupled"}
    name, weights, options = _trunk(command)
    result.overrides |= {"config.MODEL.NAME": kinds[command.script], "config.MODEL.TRUNK.NAME": name}
    if options:
        result.overrides["config.MODEL.TRUNK.OPTIONS"] = options
    if command["pretrained_model_path"]:
        result.overrides["config.MODEL.WEIGHTS_INIT.PARAMS_FILE"] = command["pretrained_model_path"]
    elif command["pretrained_start_weights"] or command["use_hf_transformers"]:
        result.overrides["config.MODEL.WEIGHTS_INIT.PARAMS_FILE"] = weights
    if command["averaging_type"] not in ("", "ema"):
        raise ConfigError(f"translate: --averaging_type {command['averaging_type']}: ema, or leave it out.")
    if command["averaging_type"] == "ema":
        result.overrides |= {
            "config.MODEL.EMA.ENABLED": True,
            "config.MODEL.EMA.DECAY": command["model_ema_decay"],
            "config.MODEL.EMA.WARMUP": 0.0,
            "config.MODEL.EMA.RISING_DECAY": not command["no_model_ema_warmup"],
        }
    if command["eval_only"]:
        result.overrides["config.TEST_ONLY"] = True


def _trunk(command: Command) -> tuple[str, str, dict[str, Any]]:
    """Name of the trunk, of its weights, and options."""
    arch = str(command["model_arch"])
    if command["use_hf_transformers"]:
        is_rad_dino = arch == "microsoft/rad-dino"
        return ("hf/dinov2" if is_rad_dino else f"hf/{arch}"), f"hf:{arch}", {"image_size": 518} if is_rad_dino else {}
    plain = arch.removeprefix("hf_hub:").removeprefix("timm/")
    if command["use_torchvision_resnet_model"]:
        return f"torchvision/{plain}", f"torchvision:{plain}", {}
    name, _, tag = plain.partition(".")
    depth = re.fullmatch(r"resnet(\d+)", name)
    if depth and not tag:
        tag = "a1_in1k" if int(depth.group(1)) < 100 else "a1h_in1k"
    return f"timm/{name}", f"timm:{name}.{tag}" if tag else f"timm:{name}", {}


def _parts(command: Command, result: Translation) -> None:
    single = command.script != TWO_STAGE
    names = {
        "num_parts": "NUM_PARTS", "gumbel_softmax": "GUMBEL_SOFTMAX", "part_dropout": "PART_DROPOUT",
        "part_dropout_stage_2": "PART_DROPOUT_STAGE_2", "use_soft_masks": "USE_SOFT_MASKS",
        "drop_path_stage_2": "DROP_PATH_STAGE_2", "output_stride": "OUTPUT_STRIDE", "freeze_backbone": "FREEZE_BACKBONE",
        "freeze_second_stage": "FREEZE_SECOND_STAGE", "freeze_params_stage_2": "FREEZE_PARAMS_STAGE_2",
        "part_logits_threshold_path": "PART_LOGITS_THRESHOLD_PATH", "pooling_type": "POOLING_TYPE",
        "late_masking": "LATE_MASKING",
    }  # fmt: skip
    below = "config.MODEL.PARTS."
    result.overrides |= {below + name: command[flag] for flag, name in names.items()}
    is_cnn = re.search("resnet|convnext", str(command["model_arch"])) and not command["use_torchvision_resnet_model"]
    if not is_cnn and command["output_stride"] != 32:
        result.overrides[below + "OUTPUT_STRIDE"] = 32
        result.notices.append("--output_stride: the original reads it for timm's CNNs only, as here")
    result.overrides[below + "DROP_PATH_STAGE_1"] = command["drop_path" if single else "drop_path_stage_1"]
    frozen = command["freeze_params_stage_1"] or command["freeze_params"]
    result.overrides[below + "FREEZE_PARAMS_STAGE_1"] = frozen
    heat = "softmax_temperature" if command.has("softmax_temperature") else "gumbel_softmax_temperature"
    result.overrides[below + "SOFTMAX_TEMPERATURE"] = command[heat]
    if command.script == SINGLE:
        for flag in ("modulation_type", "modulation_orth", "classifier_type", "noise_variance"):
            result.overrides[below + flag.upper()] = command[flag]
        if command["gumbel_softmax"]:
            result.overrides[below + "GUMBEL_SOFTMAX_HARD"] = command["gumbel_softmax_hard"]
        result.overrides[below + "TEMPERATURE_NEEDS_GUMBEL"] = True
    if command["intervention_fixed_part_id"]:
        result.overrides["config.EVALUATE_PARTS.FIXED_PARTS"] = command["intervention_fixed_part_id"]


def _data(command: Command, result: Translation) -> None:
    dataset = command["dataset"]
    if dataset not in DATASETS:
        hint = suggest(dataset, list(DATASETS)) or "."
        raise ConfigError(f"translate: --dataset {dataset}: no such data set{hint} Known: {', '.join(DATASETS)}.")
    if dataset == "metashifts":
        result.notices.append("--dataset metashifts is meta_shift in the original's own code")
    for split in ("TRAIN", "TEST"):
        below = f"config.DATA.{split}."
        sub_path = command[f"image_sub_path_{split.lower()}"]
        if command.has("image_sub_path") and not command.has(f"image_sub_path_{split.lower()}"):
            sub_path = command["image_sub_path"]
        root = command["data_path"]
        if dataset == "imagenet":
            root = f"{root}/{'train' if split == 'TRAIN' else 'val'}"
        result.overrides |= {
            below + "DATA_SOURCES": [DATASETS[dataset]],
            below + "DATA_PATHS": [root],
            below + "BATCHSIZE_PER_REPLICA": command["batch_size"],
            below + "TRANSFORMS": _train_views(command) if split == "TRAIN" else _test_views(command),
        }
        if _uses_sub_path(command, dataset, split):
            result.overrides[below + "IMAGE_SUB_PATH"] = sub_path
        _masks_and_files(command, result, split=split)
    _evaluated_part(command, result)
    if dataset in ("cub", "nabirds"):
        result.overrides["config.DATA.TRAIN_SPLIT.FRACTION"] = command["train_split"]
        result.overrides["config.DATA.TRAIN_SPLIT.ORDER"] = "stratified"
        if command["train_split"] < 1:
            result.notices.append(
                f"--train_split {command['train_split']}: the original reads it and trains on all images; here it counts, "
                "by class"
            )
    for flag, name in (("mixup", "MIXUP"), ("cutmix", "CUTMIX")):
        if command[flag]:
            result.overrides[f"config.DATA.MIX.{name}"] = command[flag]
    if command["cutmix_minmax"]:
        result.overrides["config.DATA.MIX.CUTMIX_MINMAX"] = command["cutmix_minmax"]
    for flag, name in (("mixup_prob", "PROB"), ("mixup_switch_prob", "SWITCH_PROB"), ("mixup_mode", "MODE")):
        if command.has(flag):
            result.overrides[f"config.DATA.MIX.{name}"] = command[flag]
    result.overrides["config.DATA.NUM_DATALOADER_WORKERS"] = command["num_workers"]


def _uses_sub_path(command: Command, dataset: str, split: str) -> bool:
    """Folders of images below the root: where the original needs the flag, or where it was given."""
    given = command.has(f"image_sub_path_{split.lower()}") or command.has("image_sub_path")
    return given and dataset in (
        "cub",
        "nabirds",
        "waterbirds",
        "meta_shift",
        "siim_acr",
        "metashifts",
        "part_imagenet",
    )


def _masks_and_files(command: Command, result: Translation, *, split: str) -> None:
    below, word = f"config.DATA.{split}.", split.lower()
    dataset = command["dataset"]
    if command.script == DECOUPLED:
        result.overrides[below + "MASK_SUB_PATH"] = command[f"mask_sub_path_{word}"]
    elif dataset == "siim_acr":
        result.overrides[below + "MASK_SUB_PATH"] = command["mask_sub_path"]
    if dataset.startswith("part_imagenet") and command[f"anno_path_{word}"]:
        result.overrides[below + "ANNOTATION_PATH"] = command[f"anno_path_{word}"]
    if dataset == "turtle_reid":
        result.overrides[below + "SPLIT_COLUMN"] = command["split_type"]


def _evaluated_part(command: Command, result: Translation) -> None:
    mode = command["eval_mode"]
    if mode not in ("val", "test", "worst_case", "best_case"):
        raise ConfigError(f"translate: --eval_mode {mode}: val, test, or for Waterbirds worst_case or best_case.")
    dataset = command["dataset"]
    if mode in ("worst_case", "best_case"):
        if dataset == "waterbirds":
            result.overrides["config.DATA.TEST.SUBSET"] = mode
        else:
            result.notices.append(
                f"--eval_mode {mode}: a part of Waterbirds; of {dataset} all test images are measured"
            )
    elif mode == "val" and dataset == "waterbirds":
        result.overrides["config.DATA.TEST.USE_SPLIT"] = "VAL"
    elif mode == "val" and dataset in ("cub", "nabirds"):
        if command["train_split"] < 1:
            result.overrides["config.DATA.TEST.USE_SPLIT"] = "VAL"
        else:
            result.notices.append(
                "--eval_mode val with all images in training: the original evaluates nothing; here TEST"
            )
    elif mode == "val" and command.has("eval_mode"):
        result.notices.append(f"--eval_mode val: {dataset} has no validation images here; its test images are measured")


def _normalize(command: Command) -> dict[str, Any]:
    if command["dataset"] == "siim_acr" or command["augmentations_to_use"] == "siim_acr":
        return {"name": "Normalize", **_SIIM}
    is_half = command["imagenet_default_mean_and_std"] and command["augmentations_to_use"] == "timm"
    return {"name": "Normalize", **(_HALF if is_half else _IMAGENET)}


def _train_views(command: Command) -> list[dict[str, Any]]:
    size, kind = command["image_size"], command["augmentations_to_use"]
    end = [{"name": "ToTensor"}, _normalize(command)]
    flips = [{"name": "RandomHorizontalFlip", "p": command["hflip"]}]
    flips += [{"name": "RandomVerticalFlip", "p": command["vflip"]}] if command["vflip"] else []
    if command.script == DECOUPLED:
        return [
            {"name": "Resize", "size": size}, {"name": "CropOnMask", "size": size}, *flips,
            {"name": "ImgPilRandomColorJitter", "strength": 0.25, "prob": 0.5},
            {"name": "ImgPilPlanckianJitter", "p": 0.5}, *end,
        ]  # fmt: skip
    if "siim_acr" in (kind, command["dataset"]):
        return [{"name": "Resize", "size": [size, size]}, {"name": "RandomHorizontalFlip", "p": 0.5}, *end]
    if kind == "timm":
        return _timm_views(command, end)
    if kind != "cub_original":
        raise ConfigError(f"translate: --augmentations_to_use {kind}: timm, cub_original or siim_acr.")
    if command["dataset"].startswith("imagenet"):
        return [{"name": "RandomResizedCrop", "size": size}, *flips, *end]
    light = [{"name": "ImgPilPlanckianJitter", "p": 0.8}] if command.script != SINGLE else []
    turn = {"name": "RandomAffine", "degrees": 90, "translate": [0.2, 0.2], "scale": [0.8, 1.2]}
    return [{"name": "Resize", "size": size}, *flips, *light, turn, {"name": "RandomCrop", "size": size}, *end]


def _timm_views(command: Command, end: list[dict[str, Any]]) -> list[dict[str, Any]]:
    policy = {
        "name": "TimmTrain", "size": command["image_size"], "hflip": command["hflip"], "vflip": command["vflip"],
        "color_jitter": command["color_jitter"], "auto_augment": command["aa"],
        "interpolation": command["train_interpolation"],
    }  # fmt: skip
    erase = []
    if command["reprob"]:
        value = {"const": 0, "rand": "random", "pixel": "random"}.get(command["remode"], "random")
        erase = [{"name": "RandomErasing", "p": command["reprob"], "value": value}]
    return [policy, *end, *erase]


def _test_views(command: Command) -> list[dict[str, Any]]:
    size, end = command["image_size"], [{"name": "ToTensor"}, _normalize(command)]
    if command["dataset"] == "siim_acr":
        return [{"name": "Resize", "size": [size, size]}, *end]
    is_timm = command["augmentations_to_use"] == "timm" and command["dataset"].startswith("imagenet")
    if is_timm and size >= 384:
        return [{"name": "Resize", "size": [size, size], "interpolation": "bicubic"}, *end]
    if is_timm:
        larger = math.floor(size / (command["crop_pct"] or 224 / 256))
        resize = {"name": "Resize", "size": larger, "interpolation": "bicubic"}
        return [resize, {"name": "CenterCrop", "size": size}, *end]
    return [{"name": "Resize", "size": size}, {"name": "CenterCrop", "size": size}, *end]


def _optimizer(command: Command, result: Translation) -> None:
    below, kind = "config.OPTIMIZER.", str(command["optimizer_type"])
    name, options = _optimizer_of(command, kind)
    lr = below + "PARAM_SCHEDULERS.LR."
    schedules = {"cosine": "timm_cosine", "steplr": "timm_step", "linearlr": "timm_linear"}
    if command["scheduler_type"] not in schedules:
        raise ConfigError(f"translate: --scheduler_type {command['scheduler_type']}: cosine, linearlr or steplr.")
    result.overrides |= {
        below + "NAME": name, below + "OPTIONS": options, below + "NUM_EPOCHS": command["epochs"],
        below + "ACCUMULATE_STEPS": command["grad_accumulation_steps"], below + "WEIGHT_DECAY": command["weight_decay"],
        below + "NORMALIZED_WEIGHT_DECAY": True,
        below + "PARAM_GROUP_CONSTRUCTOR": "parts",
        lr + "NAME": schedules[command["scheduler_type"]], lr + "START_VALUE": command["lr"],
        lr + "END_VALUE": command["min_lr"], lr + "WARMUP_EPOCHS": command["scheduler_warmup_epochs"],
        lr + "WARMUP_VALUE": command["warmup_lr"], lr + "GAMMA": command["scheduler_gamma"],
        lr + "STEP_EPOCHS": command["scheduler_step_size"],
        "config.MODEL.GRAD_CLIP.USE_GRAD_CLIP": command["grad_norm_clip"] > 0,
        "config.MACHINE.PRECISION": "bf16" if command["use_amp"] else "fp32",
    }  # fmt: skip
    if command["grad_norm_clip"] > 0:
        result.overrides["config.MODEL.GRAD_CLIP.MAX_NORM"] = command["grad_norm_clip"]
    if kind in ("adam", "adamw", "nadam"):
        result.overrides[below + "BETAS"] = [command["betas1"], command["betas2"]]
    for flag in ("scratch_lr_factor", "finer_lr_factor", "modulation_lr_factor", "stage_two_lr_factor"):
        result.overrides[f"{below}PARTS.{flag.upper()}"] = command[flag]
    if command["use_amp"]:
        result.notices.append("--use_amp is bf16 here; on GPUs without it set config.MACHINE.PRECISION=fp16")


def _optimizer_of(command: Command, kind: str) -> tuple[str, dict[str, Any]]:
    """Our name of the optimizer and the arguments that are not options of ours."""
    plain = {"adam": "adam", "adamw": "adamw", "nadam": "nadam"}
    if kind in plain:
        return plain[kind], {}
    if kind == "sgd":
        return "timm/sgd", {"momentum": command["momentum"], "nesterov": True}
    lars = re.fullmatch(r"(n?)lar([sc])", kind)
    if lars:
        return "timm/lars", {
            "momentum": command["momentum"], "dampening": command["dampening"], "nesterov": bool(lars.group(1)),
            "trust_coeff": command["trust_coeff"], "trust_clip": lars.group(2) == "c",
            "always_adapt": command["always_adapt"],
        }  # fmt: skip
    if kind in ("lamb", "lambc"):
        return "timm/lamb", {
            "betas": [command["betas1"], command["betas2"]], "max_grad_norm": command["max_grad_norm"],
            "grad_averaging": not command["turn_off_grad_averaging"], "trust_clip": kind == "lambc",
            "always_adapt": command["always_adapt"],
        }  # fmt: skip
    known = "adam, adamw, nadam, sgd, lars, nlars, larc, nlarc, lamb, lambc"
    raise ConfigError(f"translate: --optimizer_type {kind}: one of {known}.")


def _losses(command: Command, result: Translation) -> None:
    flags = (
        "classification_loss", "classification_loss_stage_2", "presence_loss", "presence_loss_beta",
        "presence_loss_type", "concentration_loss", "equivariance_loss", "total_variation_loss",
        "enforced_presence_loss", "enforced_presence_loss_type", "pixel_wise_entropy_loss",
        "orthogonality_loss_landmarks", "degrees", "translate_x", "translate_y", "scale_l", "scale_u", "smoothing",
        "use_bce_loss", "bce_sum", "bce_target_thresh", "bce_pos_weight",
    )  # fmt: skip
    result.overrides |= {f"config.LOSS.PARTS.{flag.upper()}": command[flag] for flag in flags}


def _run(command: Command, result: Translation) -> None:
    folder, is_file = command["snapshot_dir"], str(command["snapshot_dir"]).endswith((".pt", ".pth"))
    seed = f"/{command['seed']}" if command["array_training_job"] and not command["resume_training"] else ""
    if is_file or (folder and command["eval_only"]):
        file = folder if is_file else f"{folder}{seed}/snapshot_best.pt"
        result.overrides |= {
            "config.MODEL.WEIGHTS_INIT.PARAMS_FILE": file,
            "config.MODEL.WEIGHTS_INIT.PRESET": _PRESETS[command.script],
        }
    elif folder:
        result.overrides["config.RUN.DIR"] = f"{folder}{seed}"
    if folder and command["eval_only"] and not is_file:
        result.notices.append(
            f"--eval_only measures {file}, the original's best save; of a run of this program name its folder as "
            "config.MODEL.WEIGHTS_INIT.PARAMS_FILE, and no PRESET"
        )
    result.overrides |= {
        "config.SEED_VALUE": command["seed"],
        "config.CHECKPOINT.EVERY_EPOCHS": command["save_every_n_epochs"],
        "config.PART_MAPS.EVERY_EPOCHS": command["save_every_n_epochs"],
        "config.PART_MAPS.SAVING_PROB": command["amap_saving_prob"],
        "config.LOG_FREQUENCY": command["log_interval"],
        "config.DISTRIBUTED.NUM_NODES": command.nodes,
    }
    if command.processes:
        result.overrides["config.DISTRIBUTED.NUM_PROC_PER_NODE"] = command.processes
    result.overrides["config.CHECKPOINT.AUTO_RESUME"] = True
    if command["resume_training"]:
        result.notices.append("--resume_training: a run folder always goes on where it stopped (from the newest save)")


def _tracking(command: Command, result: Translation) -> None:
    below = "config.LOGGERS.WANDB."
    result.overrides[below + "ENABLED"] = command["wandb"]
    if command["wandb"]:
        result.overrides[below + "WATCH_GRADIENTS"] = True
    names = {
        "wandb_project": "PROJECT", "job_type": "JOB_TYPE", "wandb_entity": "ENTITY", "group": "GROUP",
        "wandb_mode": "MODE", "wandb_resume_id": "RESUME_ID",
    }  # fmt: skip
    for flag, name in names.items():
        if command.has(flag):
            result.overrides[below + name] = command[flag]


#: Values of flags that say what is done in any case where they change nothing.
_DONE_ANYWAY = {
    "eval_mode": "test", "train_split": 1.0, "augmentations_to_use": "siim_acr", "pretrained_start_weights": True,
}  # fmt: skip
#: Flags without a counterpart, and why.
_WITHOUT = {
    "use_zero": "no ZeRO-1; config.DISTRIBUTED.STRATEGY=fsdp shards the optimizer's state, too",
    "resplit": "the original reads it and does nothing",
    "recount": "one patch is erased; add RandomErasing several times for more",
    "crop_pct": "part of the test transforms (timm on ImageNet), which are written out above",
    "shear_x": "the original draws a shear and never applies it",
    "shear_y": "the original draws a shear and never applies it",
    "scheduler_restart_factor": "one cosine cycle spans the training, so there is nothing to restart",
    "cosine_cycle_limit": "one cosine cycle spans the training, so there is nothing to restart",
    "model_ema_force_cpu": "the average lies on the model's device and is always evaluated",
    "gumbel_softmax_hard": "the two-stage original reads it and does nothing; PDiscoFormer's is translated, with "
    "gumbel_softmax",
    "metadata_path": "for data sets that the paper does not use (PlantNet, iNaturalist)",
    "species_id_to_name_file": "for data sets that the paper does not use (PlantNet)",
    "turn_on_mixup_or_cutmix": "on where --mixup or --cutmix is above 0",
    "anno_path_train": "only PartImageNet has annotation files",
    "anno_path_test": "only PartImageNet has annotation files",
    "image_sub_path": "stands for both sub-paths; they are given, or the data set has folders of its own",
    "image_sub_path_train": "the data set has folders of its own",
    "image_sub_path_test": "the data set has folders of its own",
    "train_split": "CUB and NABirds only",
    "augmentations_to_use": "radiographs, and images with given masks, have transforms of their own",
    "model_ema_decay": "nothing is averaged without --averaging_type ema",
    "no_model_ema_warmup": "nothing is averaged without --averaging_type ema",
    "array_training_job": "no --snapshot_dir is given, or the run goes on in it",
    "mask_sub_path": "only SIIM-ACR has this folder",
    "mask_sub_path_train": "masks are given to the decoupled model only",
    "mask_sub_path_test": "masks are given to the decoupled model only",
    "split_type": "only TurtleReID has ways to split",
    "modulation_type": "the two-stage model has layer_norm built in, as here by default",
    "modulation_orth": "the two-stage model compares modulated features, as here by default",
    "classifier_type": "the two-stage model has one linear classifier, as here by default",
    "noise_variance": "PDiscoFormer's single-stage model only",
}
