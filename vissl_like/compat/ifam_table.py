"""What becomes of each flag of iFAM and PDiscoFormer, as a table: found out by translating commands with and without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vissl_like.compat.ifam import translate
from vissl_like.compat.ifam_flags import BASELINE, DECOUPLED, DEFAULTS, DOCUMENTED, FLAGS, SINGLE, TWO_STAGE
from vissl_like.config import reference

#: Flags that the two-stage trainer does not have -> the script that has them.
ELSEWHERE = {
    "freeze_params": SINGLE, "drop_path": SINGLE, "modulation_type": SINGLE, "modulation_orth": SINGLE,
    "classifier_type": SINGLE, "noise_variance": SINGLE, "gumbel_softmax_temperature": SINGLE,
    "turn_on_mixup_or_cutmix": SINGLE, "anno_path_train": SINGLE, "anno_path_test": SINGLE, "metadata_path": SINGLE,
    "species_id_to_name_file": SINGLE, "image_sub_path": SINGLE, "pooling_type": BASELINE, "late_masking": DECOUPLED,
    "mask_sub_path_train": DECOUPLED, "mask_sub_path_test": DECOUPLED,
}  # fmt: skip
#: Read by the original's losses and data sets although its two-stage parser does not define them.
UNDEFINED = ("use_bce_loss", "bce_sum", "bce_target_thresh", "bce_pos_weight", "split_type")
#: Flags without which a flag has no effect.
_WITH = {
    "averaging_type": "", "model_ema_decay": "--averaging_type ema", "no_model_ema_warmup": "--averaging_type ema",
    "momentum": "--optimizer_type lars", "dampening": "--optimizer_type lars", "trust_coeff": "--optimizer_type lars",
    "always_adapt": "--optimizer_type lars", "max_grad_norm": "--optimizer_type lamb",
    "turn_off_grad_averaging": "--optimizer_type lamb", "color_jitter": "--augmentations_to_use timm",
    "aa": "--augmentations_to_use timm", "train_interpolation": "--augmentations_to_use timm",
    "reprob": "--augmentations_to_use timm", "remode": "--augmentations_to_use timm --reprob 0.5",
    "imagenet_default_mean_and_std": "--augmentations_to_use timm",
    "crop_pct": "--augmentations_to_use timm --dataset imagenet --image_size 224", "mask_sub_path": "--dataset siim_acr",
    "eval_mode": "--dataset waterbirds",
    "array_training_job": "--snapshot_dir runs", "anno_path_train": "--dataset part_imagenet",
    "anno_path_test": "--dataset part_imagenet", "split_type": "--dataset turtle_reid", "wandb_mode": "--wandb",
    "output_stride": "--model_arch resnet50", "gumbel_softmax_hard": "--gumbel_softmax",
}  # fmt: skip
#: Values that show what a flag does, where any other text or number than the default will not do.
_EXAMPLES = {
    "model_arch": "timm/vit_small_patch14_dinov2", "dataset": "waterbirds", "eval_mode": "worst_case",
    "augmentations_to_use": "timm", "optimizer_type": "adamw", "scheduler_type": "steplr", "averaging_type": "ema",
    "train_split": "0.5", "remode": "const", "split_type": "split_open", "dampening": "0.5",
}  # fmt: skip
_NOTES = {
    "model_arch": "also microsoft/rad-dino with use_hf_transformers",
    "use_hf_transformers": "always takes the published weights, as the original does",
    "use_torchvision_resnet_model": "single-stage models; a CNN cannot be the second stage",
    "dataset": "the evaluation document's `metashifts` is `meta_shift`",
    "train_split": "the original trains on all images whatever it says; here it counts: cut by class, seeded",
    "eval_mode": "val, worst_case and best_case; groups are always reported, so one test says all",
    "snapshot_dir": "a file, or its `snapshot_best.pt` with eval_only: `config.MODEL.WEIGHTS_INIT.PARAMS_FILE`",
    "save_every_n_epochs": "the newest save is always there to go on from",
    "lr": "`AUTO_LR_SCALING` scales it by the root of the batch; a command's own rate is taken as it is",
    "use_amp": "bf16; fp16 on GPUs without it",
    "imagenet_default_mean_and_std": "giving it turns ImageNet's statistics off in the original; here, too",
    "softmax_temperature": "one dash in the original's parser; one or two here",
    "gumbel_softmax": "noise in training only; `config.MODEL.PARTS.EVAL_GUMBEL=true` evaluates as the original",
    "freeze_backbone": "tokens and positions go on training",
    "weight_decay": "multiplied by sqrt(1 / (batches x epochs)), as in the original",
    "min_lr": "absolute, the same for every parameter group",
    "orthogonality_loss_landmarks": "compares parts; `ORTHOGONALITY_TRANSPOSED=true` compares dimensions, as iFAM does",
    "equivariance_loss": "the second pass goes through stage 1 only",
    "mixup": "the task `parts` only", "cutmix": "the task `parts` only", "cutmix_minmax": "the task `parts` only",
    "model_ema_decay": "the average is saved beside the weights, not instead of them",
    "part_logits_threshold_path": "distances decide; `PART_LOGITS_THRESHOLD_METRIC=dot` decides as the original",
    "resume_training": "always on: a run folder goes on from its newest save",
    "color_jitter": "`TimmTrain`, color_jitter", "aa": "`TimmTrain`, auto_augment", "reprob": "`RandomErasing`",
    "train_interpolation": "`TimmTrain`, interpolation",
    "remode": "`RandomErasing`, value; rand, one colour for a patch there, is noise here",
    "hflip": "`RandomHorizontalFlip`", "vflip": "`RandomVerticalFlip`",
    "crop_pct": "`Resize`, with the timm transforms on ImageNet below 384 pixels",
    "image_sub_path": "both sub-paths in one", "amap_saving_prob": "the first batch is always drawn unless it is 0",
    "output_stride": "timm's CNNs only",
    "log_interval": "and how often gradients are sent to Weights & Biases",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A flag, the options that it becomes (none: `note` says why), its default there and the options' default here."""

    flag: str
    script: str
    keys: tuple[str, ...]
    original: Any
    ours: tuple[Any, ...]
    note: str


def rows() -> list[Row]:
    """All flags, in the order of the parser."""
    return [_row(flag) for flag in FLAGS]


def _row(flag: str) -> Row:
    script = ELSEWHERE.get(flag, TWO_STAGE)
    keys, reason = effect(flag, script)
    options = [reference.find(tuple(key.split("."))) for key in keys]
    default = DEFAULTS.get(script, {}).get(flag, FLAGS[flag][1])
    notes = [_NOTES.get(flag, ""), reason]
    if flag in DOCUMENTED:
        notes.append(f"the original's documentation says {DOCUMENTED[flag]}")
    if flag in UNDEFINED:
        notes.append("read by the original, but missing in its parser")
    return Row(
        flag, script, keys, default, tuple(option.default for option in options if option is not None),
        "; ".join(note for note in notes if note),
    )  # fmt: skip


def effect(flag: str, script: str) -> tuple[tuple[str, ...], str]:
    """The options that the flag changes, and why if there is none."""
    start = f"{script}.py {_WITH.get(flag, '')}"
    before, after = translate(start, script=script), translate(f"{start} --{flag}{_example(flag)}", script=script)
    every = [*before.overrides, *(key for key in after.overrides if key not in before.overrides)]
    changed = tuple(key for key in every if before.overrides.get(key) != after.overrides.get(key))
    return changed, after.without.get(flag, "")


def _example(flag: str) -> str:
    kind, default = FLAGS[flag]
    if flag in _EXAMPLES:
        return f" {_EXAMPLES[flag]}"
    if kind in (int, float):
        return f" {(default or 0) + 1}"
    return {bool: "", list: " 1 2"}.get(kind, " word")
