"""The flags of iFAM and PDiscoFormer, and how a command line of theirs is read. Free of torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vissl_like.errors import ConfigError
from vissl_like.registry import suggest

TWO_STAGE, SINGLE, BASELINE, DECOUPLED = "train_net", "train_net_pdisco", "train_net_baseline", "train_net_decoupled"
SCRIPTS = (TWO_STAGE, SINGLE, BASELINE, DECOUPLED)

#: Flag -> (type, default). A type of bool is a switch.
FLAGS: dict[str, tuple[type, Any]] = {
    "model_arch": (str, "hf_hub:timm/vit_base_patch14_reg4_dinov2.lvd142m"),
    "use_hf_transformers": (bool, False), "use_torchvision_resnet_model": (bool, False),
    "data_path": (str, ""), "image_sub_path": (str, ""), "image_sub_path_train": (str, "images"),
    "image_sub_path_test": (str, "images"), "dataset": (str, "cub"), "train_split": (float, 0.9),
    "eval_mode": (str, "val"), "mask_sub_path": (str, "all_masks"), "mask_sub_path_train": (str, "segmentations"),
    "mask_sub_path_test": (str, "segmentations"), "snapshot_dir": (str, ""), "save_every_n_epochs": (int, 10),
    "batch_size": (int, 16), "epochs": (int, 28), "num_workers": (int, 4), "seed": (int, 42),
    "grad_accumulation_steps": (int, 1), "amap_saving_prob": (float, 0.05), "grad_norm_clip": (float, 2.0),
    "use_amp": (bool, False), "eval_only": (bool, False), "crop_pct": (float, None), "mixup": (float, 0.0),
    "cutmix": (float, 0.0), "cutmix_minmax": (list, []), "mixup_prob": (float, 1.0), "mixup_switch_prob": (float, 0.5),
    "mixup_mode": (str, "batch"), "turn_on_mixup_or_cutmix": (bool, False), "augmentations_to_use": (str, "cub_original"),
    "image_size": (int, 448), "color_jitter": (float, 0.4), "aa": (str, "rand-m6-mstd0.5"),
    "train_interpolation": (str, "bicubic"), "imagenet_default_mean_and_std": (bool, False), "hflip": (float, 0.5),
    "vflip": (float, 0.0), "reprob": (float, 0.0), "remode": (str, "pixel"), "recount": (int, 1), "resplit": (bool, False),
    "num_parts": (int, 8), "pretrained_start_weights": (bool, False), "pretrained_model_path": (str, ""),
    "drop_path": (float, 0.0), "drop_path_stage_1": (float, 0.0), "drop_path_stage_2": (float, 0.0),
    "output_stride": (int, 32), "freeze_backbone": (bool, False), "freeze_params": (bool, False),
    "freeze_params_stage_1": (bool, False), "freeze_params_stage_2": (bool, False), "freeze_second_stage": (bool, False),
    "optimizer_type": (str, "adam"), "weight_decay": (float, 0.0), "momentum": (float, 0.9), "betas1": (float, 0.9),
    "betas2": (float, 0.999), "dampening": (float, 0.0), "trust_coeff": (float, 0.001), "always_adapt": (bool, False),
    "turn_off_grad_averaging": (bool, False), "max_grad_norm": (float, 1.0), "use_zero": (bool, False),
    "scheduler_type": (str, "cosine"), "scheduler_warmup_epochs": (int, 0), "warmup_lr": (float, 0.0),
    "scheduler_restart_factor": (int, 1), "cosine_cycle_limit": (int, 1), "scheduler_gamma": (float, 0.1),
    "scheduler_step_size": (int, 10), "min_lr": (float, 0.0), "lr": (float, 1e-6), "scratch_lr_factor": (float, 1e4),
    "finer_lr_factor": (float, 1e3), "modulation_lr_factor": (float, 1e4), "stage_two_lr_factor": (float, 1.0),
    "wandb": (bool, False), "wandb_project": (str, ""), "job_type": (str, ""), "wandb_entity": (str, ""),
    "group": (str, "vit_base"), "wandb_mode": (str, "online"), "log_interval": (int, 10),
    "resume_training": (bool, False), "wandb_resume_id": (str, ""), "classification_loss": (float, 1.0),
    "classification_loss_stage_2": (float, 1.0), "presence_loss": (float, 1.0), "presence_loss_beta": (float, 0.1),
    "presence_loss_type": (str, "original"), "concentration_loss": (float, 0.0), "equivariance_loss": (float, 1.0),
    "total_variation_loss": (float, 1.0), "enforced_presence_loss": (float, 2.0),
    "enforced_presence_loss_type": (str, "enforced_presence"), "pixel_wise_entropy_loss": (float, 1.0),
    "orthogonality_loss_landmarks": (float, 1.0), "degrees": (float, 90.0), "translate_x": (float, 0.11),
    "translate_y": (float, 0.11), "scale_l": (float, 0.8), "scale_u": (float, 1.4), "shear_x": (float, 0.0),
    "shear_y": (float, 0.0), "part_dropout": (float, 0.3), "part_dropout_stage_2": (float, 0.3),
    "gumbel_softmax": (bool, False), "softmax_temperature": (float, 1.0), "gumbel_softmax_temperature": (float, 1.0),
    "gumbel_softmax_hard": (bool, False), "array_training_job": (bool, False), "part_logits_threshold_path": (str, ""),
    "intervention_fixed_part_id": (list, []), "use_soft_masks": (bool, False), "smoothing": (float, 0.0),
    "averaging_type": (str, ""), "model_ema_force_cpu": (bool, False), "model_ema_decay": (float, 0.9999),
    "no_model_ema_warmup": (bool, False), "use_bce_loss": (bool, False), "bce_sum": (bool, False),
    "bce_target_thresh": (float, None), "bce_pos_weight": (float, None), "split_type": (str, "split_closed"),
    "pooling_type": (str, "cls"), "late_masking": (bool, False), "anno_path_train": (str, ""), "anno_path_test": (str, ""),
    "metadata_path": (str, ""), "species_id_to_name_file": (str, ""), "modulation_type": (str, "original"),
    "modulation_orth": (bool, False), "classifier_type": (str, "linear"), "noise_variance": (float, 0.0),
}  # fmt: skip
#: Defaults that the documentation gives, where the parser has others.
DOCUMENTED = {
    "train_split": 1, "eval_mode": "test", "save_every_n_epochs": 16, "image_size": 518, "optimizer_type": "adamw",
    "weight_decay": 0.05,
}  # fmt: skip
#: Defaults that differ in the other scripts.
DEFAULTS: dict[str, dict[str, Any]] = {
    BASELINE: {"lr": 1e-4, "scratch_lr_factor": 100.0, "weight_decay": 0.05, "grad_norm_clip": 0.0},
    DECOUPLED: {"lr": 1e-4, "scratch_lr_factor": 100.0, "weight_decay": 0.05, "grad_norm_clip": 0.0},
}


@dataclass
class Command:
    """A command line of an original: `given` are the flags that it names, asked for by [] (with defaults)."""

    script: str
    given: dict[str, Any]
    nodes: int = 1
    processes: int = 0
    notices: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def __getitem__(self, flag: str) -> Any:
        self.asked.add(flag)
        return self.given.get(flag, DEFAULTS.get(self.script, {}).get(flag, FLAGS[flag][1]))

    def has(self, flag: str) -> bool:
        """Whether the command names the flag."""
        self.asked.add(flag)
        return flag in self.given


def read_command(text: str, *, script: str = "") -> Command:
    """Take a command line apart, with or without torchrun before it. Raises ConfigError for unknown flags and values.

    What the documents mistype is repaired with a notice: stray slashes and backslashes, placeholders in angle brackets.
    """
    notices: list[str] = []
    joined = re.sub(r"<\s*([^<>]*?)\s*>", lambda found: "<" + re.sub(r"\s+", "_", found.group(1)) + ">", text)
    if script and script not in SCRIPTS:
        raise ConfigError(f"translate --script {script}: one of {', '.join(SCRIPTS)}.")
    try:
        words = shlex.split(joined.replace("\\\n", " ").replace("\n", " "))
    except ValueError as error:
        raise ConfigError(f"translate: this is no command line ({error}).") from None
    command = Command(script or _script(words), {}, notices=notices)
    position = 0
    while position < len(words):
        position = _read_word(command, words, position)
    return command


def _script(words: Sequence[str]) -> str:
    for word in words:
        name = word.rsplit("/", 1)[-1].removesuffix(".py")
        if name in SCRIPTS:
            return name
    return TWO_STAGE


def _read_word(command: Command, words: Sequence[str], position: int) -> int:
    """Read what stands at `position`; returns where to go on."""
    word = words[position]
    name, has_value, value = word.lstrip("-").partition("=")
    flag = name.replace("-", "_")
    following = words[position + 1 :]
    if not word.startswith("-") or re.fullmatch(r"-?[\d.]+(e-?\d+)?", word):
        if word.strip() in ("", "/", "\\") or re.fullmatch("<[^>]*>", word):
            command.notices.append(f"{word!r} is no argument and was left out (a typing error of the document)")
        elif not word.endswith(".py") and word not in ("torchrun", "python", "python3"):
            raise ConfigError(f"translate: {word!r} stands alone; flags begin with --.")
        return position + 1
    if flag in ("nnodes", "nproc_per_node"):
        number = value or (following[0] if following else "")
        count = int(number) if number.isdigit() else 0
        if flag == "nnodes":
            command.nodes = count or 1
        else:
            command.processes = count
        return position + (1 if has_value else 2)
    if flag not in FLAGS:
        hint = suggest(flag, list(FLAGS)) or "."
        raise ConfigError(f"translate: --{name}: the original has no such flag{hint}")
    kind = FLAGS[flag][0]
    if kind is bool:
        command.given[flag] = True
        return position + 1
    if kind is list:
        taken = _while_numbers(following)
        command.given[flag] = [float(item) if "." in item else int(item) for item in taken]
        return position + 1 + len(taken)
    if not has_value and not following:
        raise ConfigError(f"translate: --{name} needs a value.")
    _keep(command, flag, value if has_value else following[0])
    return position + (1 if has_value else 2)


def _while_numbers(words: Sequence[str]) -> list[str]:
    taken = []
    for word in words:
        if not re.fullmatch(r"-?[\d.]+", word):
            break
        taken.append(word)
    return taken


def _keep(command: Command, flag: str, text: str) -> None:
    kind = FLAGS[flag][0]
    if kind is not str and text.startswith("<"):
        command.notices.append(f"--{flag} {text}: a placeholder; the default {FLAGS[flag][1]} is used")
        return
    try:
        command.given[flag] = kind(float(text)) if kind is int and float(text).is_integer() else kind(text)
    except ValueError:
        raise ConfigError(f"translate: --{flag} {text}: not a number.") from None
