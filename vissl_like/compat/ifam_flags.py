"""The flags of iFAM and PDiscoFormer, and how a command line of theirs is read. Free of torch."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Collection, Sequence
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
#: Flags of PDiscoFormer's script, which has the name of iFAM's.
SINGLE_ONLY = (
    *("freeze_params", "modulation_type", "modulation_orth", "classifier_type", "noise_variance"),
    "gumbel_softmax_temperature",
)
#: Texts of which the parser knows a few, so that a placeholder means the default.
_CHOICES = ("wandb_mode", "dataset", "eval_mode", "augmentations_to_use", "optimizer_type", "scheduler_type")
#: Defaults that the documentation gives, where the parser has others.
DOCUMENTED = {
    "train_split": 1, "eval_mode": "test", "save_every_n_epochs": 16, "image_size": 518, "optimizer_type": "adamw",
    "weight_decay": 0.05,
}  # fmt: skip
_OF_BASELINE = {"lr": 1e-4, "scratch_lr_factor": 100.0, "weight_decay": 0.05, "grad_norm_clip": 0.0}
#: Defaults that differ in other scripts. The decoupled model is trained as the baseline is.
DEFAULTS: dict[str, dict[str, Any]] = {BASELINE: _OF_BASELINE, DECOUPLED: _OF_BASELINE}
#: What is known of the other scripts' defaults; all else is the two-stage trainer's, and said.
STATED: dict[str, Collection[str]] = {BASELINE: _OF_BASELINE}
#: Flags whose defaults decide most about a training.
DECISIVE = (
    "model_arch", "image_size", "batch_size", "epochs", "lr", "scratch_lr_factor", "optimizer_type", "scheduler_type",
    "weight_decay", "grad_norm_clip", "augmentations_to_use", "train_split", "eval_mode",
)  # fmt: skip


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
        return self.given.get(flag, self.default(flag))

    def default(self, flag: str) -> Any:
        """What the flag is where the command does not name it."""
        return DEFAULTS.get(self.script, {}).get(flag, FLAGS[flag][1])

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
    start = next((position for position, word in enumerate(words) if _is_script(word)), -1)
    command = Command(script or _script(words[start] if start >= 0 else ""), {}, notices=notices)
    _read_launcher(command, words[: max(start, 0)])
    position = start + 1
    while position < len(words):
        position = _read_word(command, words, position)
    return command


def _script(word: str) -> str:
    name = word.rsplit("/", 1)[-1].removesuffix(".py")
    return name if name in SCRIPTS else TWO_STAGE


def _is_script(word: str) -> bool:
    return not word.startswith("-") and (word.endswith(".py") or word.rsplit("/", 1)[-1] in SCRIPTS)


# -------------------------------------------------------------------------------------------------------- the launcher
def _read_launcher(command: Command, words: Sequence[str]) -> None:
    """What stands before the script: variables, torchrun, python, srun. Of these, nodes and processes count."""
    others, position = [], 0
    while position < len(words):
        word = words[position]
        taken = _read_processes(command, words, position)
        if re.match(r"\w+=", word):
            command.notices.append(f"{word}: put it before our command, too")
        elif not taken and word.rsplit("/", 1)[-1] not in ("torchrun", "python", "python3"):
            others.append(word)
        position += taken or 1
    if others:
        command.notices.append(f"{' '.join(others)}: for the launcher; our command starts its processes itself")


def _read_processes(command: Command, words: Sequence[str], position: int) -> int:
    """Read --nnodes or --nproc_per_node; returns how many words that took, 0 for another word."""
    name, has_value, value = words[position].lstrip("-").replace("-", "_").partition("=")
    if name not in ("nnodes", "nproc_per_node") or not words[position].startswith("-"):
        return 0
    number = value if has_value else "".join(words[position + 1 : position + 2])
    if number.isdigit() and name == "nnodes":
        command.nodes = int(number)
    elif number.isdigit():
        command.processes = int(number)
    else:
        ours = "one machine" if name == "nnodes" else "one process for each GPU"
        command.notices.append(f"--{name} {number}: no number; {ours} here")
    return 1 if has_value else 2


# ----------------------------------------------------------------------------------------------------------- the flags
def _read_word(command: Command, words: Sequence[str], position: int) -> int:
    """Read what stands at `position`; returns where to go on."""
    word = words[position]
    if not word.startswith("-") or _is_number(word):
        _leave_out(command, word)
        return position + 1
    taken = _read_processes(command, words, position)
    if taken:
        return position + taken
    name, has_value, value = word.lstrip("-").partition("=")
    flag = name.replace("-", "_")
    following = words[position + 1 :]
    if flag not in FLAGS:
        raise ConfigError(f"translate: --{name}: the original has no such flag{_hint(flag)}")
    kind = FLAGS[flag][0]
    if kind is bool:
        _switch_on(
            command, flag, given=value if has_value else following[0] if following else "", is_its=bool(has_value)
        )
        return position + 1
    if kind is list:
        taken_words = [value] if has_value else _while_numbers(following)
        command.given[flag] = [_number(flag, item) for text in taken_words for item in text.split()]
        return position + 1 + (0 if has_value else len(taken_words))
    if not has_value and not following:
        raise ConfigError(f"translate: --{name} needs a value.")
    _keep(command, flag, value if has_value else following[0])
    return position + (1 if has_value else 2)


def _hint(flag: str) -> str:
    positive = flag.removeprefix("no_")
    if positive != flag and FLAGS.get(positive, (None,))[0] is bool:
        return f". To have it off, leave --{positive} out."
    return suggest(flag, list(FLAGS)) or "."


def _leave_out(command: Command, word: str) -> None:
    """A word that is no flag and no value: a typing error of the document, or a mistake."""
    if re.fullmatch("<[^>]*>", word):
        command.notices.append(f"{word} stands for flags that are not there: what they set is as the parser has it")
    elif word.strip() in ("", "/", "\\"):
        command.notices.append(f"{word!r} is no argument and was left out (a typing error of the document)")
    else:
        raise ConfigError(f"translate: {word!r} stands alone; flags begin with --.")


def _switch_on(command: Command, flag: str, *, given: str, is_its: bool) -> None:
    if is_its or given.lower() in ("true", "false", "yes", "no", "on", "off", "0", "1"):
        raise ConfigError(
            f"translate: --{flag} {given}: a switch, which takes no value: it is on where it stands. Leave it out to have "
            "it off."
        )
    command.given[flag] = True


def _while_numbers(words: Sequence[str]) -> list[str]:
    return list(itertools.takewhile(_is_number, words))


def _is_number(word: str) -> bool:
    """Whether a word is meant as a number, 1.2.3 among them."""
    return re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", word, re.IGNORECASE) is not None


def _number(flag: str, text: str) -> float:
    try:
        return float(text) if re.search("[.e]", text, re.IGNORECASE) else int(text)
    except ValueError:
        raise ConfigError(f"translate: --{flag} {text}: not a number.") from None


def _keep(command: Command, flag: str, text: str) -> None:
    kind = FLAGS[flag][0]
    is_open = re.search("<[^>]*>", text) is not None
    if is_open and (kind is not str or flag in _CHOICES):
        command.notices.append(f"--{flag} {text}: a placeholder; the default {FLAGS[flag][1]} is used")
        return
    if is_open:
        command.notices.append(f"--{flag} {text}: a placeholder; put yours in its place below")
    try:
        command.given[flag] = kind(float(text)) if kind is int and float(text).is_integer() else kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"translate: --{flag} {text}: not {what}.") from None
