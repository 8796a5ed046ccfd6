"""Names of VISSL and of its documentation: what each is called here, or why there is nothing like it.

An old name is accepted with one warning line, in recipes and on the command line. An option without an equivalent is an
error with the reason if it would change what is computed, and a warning otherwise. Keys stand here without `config.`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vissl_like.config.reference import find

Path = tuple[str, ...]

_METERS = ("accuracy_list_meter", "precision_at_k_list_meter", "recall_at_k_list_meter", "mean_ap_list_meter")
_SCHEDULED = ("lr", "lr_head", "weight_decay")


@dataclass(frozen=True)
class Translation:
    """What an old key stands for: new (path, value) pairs, a sentence for the user, and whether it is an error."""

    pairs: tuple[tuple[Path, Any], ...] = ()
    note: str = ""
    is_error: bool = False


#: Old key -> new key, the value unchanged.
MOVED: dict[str, str] = {
    "CLUSTERFIT.N_ITER": "CLUSTERFIT.NUM_ITER",
    "CHECKPOINT.DIR": "RUN.DIR",
    "CHECKPOINT.OVERWRITE_EXISTING": "RUN.OVERWRITE",
    "CHECKPOINT.CHECKPOINT_FREQUENCY": "CHECKPOINT.EVERY_EPOCHS",
    "HOOKS.CHECK_NAN": "CHECK_NAN",
    "HOOKS.EMA_MODEL.UPDATE_ITER": "MODEL.EMA.UPDATE_ITER",
    "HOOKS.EMA_MODEL.WARMUP": "MODEL.EMA.WARMUP",
    "HOOKS.EMA_MODEL.DECAY": "MODEL.EMA.DECAY",
    "HOOKS.TENSORBOARD_SETUP.USE_TENSORBOARD": "LOGGERS.TENSORBOARD.ENABLED",
    "HOOKS.TENSORBOARD_SETUP.LOG_PARAMS": "LOGGERS.TENSORBOARD.LOG_PARAMS",
    "HOOKS.TENSORBOARD_SETUP.LOG_PARAMS_EVERY_N_ITERS": "LOGGERS.TENSORBOARD.LOG_PARAMS_EVERY_N_ITERS",
    "PROFILING.START_ITERATION": "PROFILE.WAIT",
    "PROFILING.WARMUP_ITERATIONS": "PROFILE.WARMUP",
    "PROFILING.NUM_ITERATIONS": "PROFILE.STEPS",
    "PROFILING.PROFILED_RANKS": "PROFILE.RANKS",
    "PROFILING.MEMORY_PROFILING.TRACK_BY_LAYER_MEMORY": "PROFILE.MEMORY",
    "PROFILING.RUNTIME_PROFILING.USE_PROFILER": "PROFILE.ENABLED",
    "PROFILING.RUNTIME_PROFILING.PROFILE_CPU": "PROFILE.CPU",
    "PROFILING.RUNTIME_PROFILING.PROFILE_GPU": "PROFILE.GPU",
    "REPRODUCIBILITY.CUDDN_DETERMINISTIC": "MACHINE.DETERMINISTIC",
    "REPRODUCIBILITY.CUDNN_DETERMINISTIC": "MACHINE.DETERMINISTIC",
    "DATA.DDP_BUCKET_CAP_MB": "DISTRIBUTED.BUCKET_CAP_MB",
    "METERS.names": "METERS.NAMES",
    "METERS.enable_training_meter": "METERS.ENABLE_TRAINING_METER",
    "LOSS.CrossEntropyLoss.ignore_index": "LOSS.CROSS_ENTROPY.IGNORE_INDEX",
    "LOSS.bce_logits_multiple_output_single_target.reduction": "LOSS.BCE_LOGITS.REDUCTION",
    "OPTIMIZER.name": "OPTIMIZER.NAME",
    "OPTIMIZER.larc_config.trust_coefficient": "OPTIMIZER.TRUST_COEFFICIENT",
    "OPTIMIZER.layer_wise_lr_decay.decay": "OPTIMIZER.LAYER_WISE_LR_DECAY.DECAY",
    "NEAREST_NEIGHBOR.FEATURES.PATH": "EVALUATE.FEATURES_PATH",
    "LOW_SHOT_BENCHMARK.FEATURES.PATH": "EVALUATE.FEATURES_PATH",
    **{f"DATA.{split}.DATASET_PATHS": f"DATA.{split}.DATA_PATHS" for split in ("TRAIN", "VAL", "TEST")},
    **{
        f"METERS.{meter}.{key}": f"METERS.{meter.upper()}.{key.upper()}"
        for meter in _METERS
        for key in ("topk_values", "meter_names")
        if (meter, key) != ("mean_ap_list_meter", "topk_values")
    },
    **{
        f"LOSS.cross_entropy_multiple_output_single_target.{key}": f"LOSS.CROSS_ENTROPY.{key.upper()}"
        for key in ("weight", "ignore_index", "normalize_output", "temperature", "label_smoothing")
    },
    **{
        f"OPTIMIZER.{key}": f"OPTIMIZER.{key.upper()}"
        for key in (
            *("weight_decay", "momentum", "nesterov", "num_epochs", "betas", "eps", "regularize_bn", "regularize_bias"),
            *("non_regularized_parameters", "construct_single_param_group_only", "param_group_constructor"),
        )
    },
    **{
        f"OPTIMIZER.head_optimizer_params.{key}": f"OPTIMIZER.HEAD_OPTIMIZER_PARAMS.{key.upper()}"
        for key in ("use_different_lr", "use_different_wd", "weight_decay")
    },
}

_SCHEDULE_KEYS = (
    *("auto_lr_scaling.auto_scale", "auto_lr_scaling.base_value", "auto_lr_scaling.base_lr_batch_size"),
    *("auto_lr_scaling.scaling_type", "name", "update_interval", "value", "values", "milestones", "start_value"),
    *("end_value", "base_value", "power", "decay", "gamma", "warmup_interval_length", "restart_interval_length"),
    *("wave_type", "lr_multiplier", "is_adaptive", "lengths", "interval_scaling", "num_decays"),
)
MOVED |= {
    f"OPTIMIZER.param_schedulers.{name}.{key}": f"OPTIMIZER.PARAM_SCHEDULERS.{name.upper()}.{key.upper()}"
    for name in _SCHEDULED
    for key in _SCHEDULE_KEYS
}

#: Old names of sections whose keys did not change.
MOVED_SECTIONS: dict[str, str] = {"MODEL.TRUNK.TRUNK_PARAMS.RESNETS": "MODEL.TRUNK.RESNETS"}

_LOSS_NAMES = {
    "cross_entropy_multiple_output_single_target": "cross_entropy",
    "CrossEntropyLoss": "cross_entropy",
    "bce_logits_multiple_output_single_target": "bce_logits",
}


def _named_loss(value: Any) -> dict[str, Any]:
    return {"LOSS.NAME": _LOSS_NAMES.get(value, value) if isinstance(value, str) else value}


def _children(new_key: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {new_key: [_upper(child) for child in value] if isinstance(value, list) else value}


def _upper(options: Any) -> Any:
    """A child of a composite schedule with its keys in upper case."""
    return {str(key).upper(): value for key, value in options.items()} if isinstance(options, dict) else options


def _run_id(value: Any) -> dict[str, Any]:
    return {"DISTRIBUTED.ENDPOINT": value} if isinstance(value, str) and ":" in value else {}


def _seeds(value: Any) -> dict[str, Any]:
    seeds = value if isinstance(value, list) else [value]
    return {"LOW_SHOT.SEED": seeds[0] if seeds else 0, "LOW_SHOT.NUM_DRAWS": max(1, len(seeds))}


#: Old key -> function of its value that gives the new keys and values.
CONVERTED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "LOSS.name": _named_loss,
    "METERS.name": lambda value: {"METERS.NAMES": [value]} if value else {},
    "CHECKPOINT.CHECKPOINT_ITER_FREQUENCY": lambda value: {
        "CHECKPOINT.EVERY_STEPS": max(0, value) if isinstance(value, int) else value
    },
    "HOOKS.EMA_MODEL.SAVE_EMA_MODEL": lambda value: {"MODEL.EMA.ENABLED": value},
    "HOOKS.EMA_MODEL.ENABLE_EMA_METERS": lambda value: {"MODEL.EMA.ENABLED": True} if value else {},
    "MODEL.FSDP_CONFIG.AUTO_SETUP_FSDP": lambda value: {
        "DISTRIBUTED.STRATEGY": {True: "fsdp", False: "ddp"}[value] if isinstance(value, bool) else value
    },
    "MODEL.AMP_PARAMS.USE_AMP": lambda value: {
        "MACHINE.PRECISION": {True: "fp16", False: "fp32"}[value] if isinstance(value, bool) else value
    },
    "DISTRIBUTED.RUN_ID": _run_id,
    "LOW_SHOT_BENCHMARK.LOGISTIC_REGRESSION.SEEDS": _seeds,
    **{
        f"DATA.{split}.RANDOM_SYNTHETIC_LABELS": lambda value, split=split: (  # type: ignore[misc]
            {f"DATA.{split}.SYNTHETIC_CLASSES": value} if value else {}
        )
        for split in ("TRAIN", "TEST")
    },
    **{
        f"OPTIMIZER.param_schedulers.{name}.schedulers": _children(
            f"OPTIMIZER.PARAM_SCHEDULERS.{name.upper()}.SCHEDULERS"
        )
        for name in _SCHEDULED
    },
}

_INFERRED = "it is inferred from the heads and the data"
_OWN_PLACE = "events are written to RUN.DIR/tb_logs"
_SUBSTITUTE = "an unreadable image is replaced by another one and listed in bad_images.txt"
_READ_IN_PLACE = "images are read where they are"

#: Old key, or old section with `.*` -> why it is ignored. Harmless: the results are the same without it.
IGNORED: dict[str, str] = {
    "VERSION": "our recipes carry no version",
    "HOOKS.PERF_STATS.*": "speed and data waiting are always in metrics.jsonl",
    "HOOKS.MEMORY_SUMMARY.*": "RUN.DRY_RUN=true estimates the memory",
    "HOOKS.LOG_GPU_STATS": "the GPUs are listed in environment.json",
    "HOOKS.MODEL_COMPLEXITY.*": "RUN.DRY_RUN=true prints the parameters",
    "HOOKS.EMA_MODEL.EMA_DEVICE": "the average stays where the model is",
    "HOOKS.TENSORBOARD_SETUP.LOG_DIR": _OWN_PLACE,
    "HOOKS.TENSORBOARD_SETUP.EXPERIMENT_LOG_DIR": _OWN_PLACE,
    "HOOKS.TENSORBOARD_SETUP.FLUSH_EVERY_N_MIN": "events are flushed as they come",
    "HOOKS.TENSORBOARD_SETUP.LOG_PARAMS_GRADIENTS": "gradients are watched by LOGGERS.WANDB.WATCH_GRADIENTS",
    "MONITORING.*": "activations are not monitored",
    "PROFILING.OUTPUT_FOLDER": "profiles are written to RUN.DIR/profile",
    "PROFILING.RUNTIME_PROFILING.LEGACY_PROFILER": "torch.profiler is used",
    "DATA.ENABLE_ASYNC_GPU_COPY": "copies from pinned memory never wait",
    "MODEL.CUDA_CACHE.*": "PyTorch's allocator needs no clearing",
    "MODEL.ACTIVATION_CHECKPOINTING.NUM_ACTIVATION_CHECKPOINTING_SPLITS": "each repeated block is computed again on its own",
    "MODEL.FSDP_CONFIG.*": "DISTRIBUTED.STRATEGY=fsdp follows MACHINE.PRECISION and needs no further options",
    "MODEL.SHARDED_DDP_SETUP.reduce_buffer_size": "it is an option of a wrapper that is not used",
    "MODEL.SYNC_BN_CONFIG.SYNC_BN_TYPE": "PyTorch's synchronised batch normalisation is used",
    "MODEL.AMP_PARAMS.AMP_ARGS.*": "PyTorch's autocast needs no level",
    "MODEL.AMP_PARAMS.AMP_ARGS": "PyTorch's autocast needs no level",
    "MODEL.AMP_PARAMS.AMP_TYPE": "PyTorch's autocast is used",
    "LOSS.cross_entropy_multiple_output_single_target.reduction": "the loss is a mean over images",
    "LOSS.bce_logits_multiple_output_single_target.world_size": "it is known",
    "METERS.mean_ap_list_meter.num_classes": _INFERRED,
    "METERS.mean_ap_list_meter.max_cpu_capacity": "the meter keeps counts only",
    **{f"METERS.{meter}.num_meters": _INFERRED for meter in _METERS},
    "OPTIMIZER.larc_config.clip": "lars here has no such option",
    "OPTIMIZER.larc_config.eps": "lars here has no such option",
    "CHECKPOINT.APPEND_DISTR_RUN_ID": "RUN.DIR is the folder",
    "CHECKPOINT.BACKEND": "checkpoints are files",
    "CHECKPOINT.USE_SYMLINK_CHECKPOINT_FOR_RESUME": "the newest good checkpoint is resumed",
    "DISTRIBUTED.INIT_METHOD": "processes meet over TCP",
    "DISTRIBUTED.NCCL_DEBUG": "set NCCL's own environment variable NCCL_DEBUG",
    "DISTRIBUTED.NCCL_SOCKET_NTHREADS": "set NCCL's own environment variable NCCL_SOCKET_NTHREADS",
    "DISTRIBUTED.MANUAL_GRADIENT_REDUCTION": "gradients are reduced by DDP",
    "NEAREST_NEIGHBOR.USE_CUDA": "MACHINE.DEVICE decides",
    "NEAREST_NEIGHBOR.OPTIMIZE_MEMORY": "memory is always bounded",
    **{
        f"DATA.{split}.{key}": reason
        for split in ("TRAIN", "TEST")
        for key, reason in {
            "DEFAULT_GRAY_IMG_SIZE": _SUBSTITUTE,
            "ENABLE_QUEUE_DATASET": _SUBSTITUTE,
            "COPY_TO_LOCAL_DISK": _READ_IN_PLACE,
            "COPY_DESTINATION_DIR": _READ_IN_PLACE,
            "USE_STATEFUL_DISTRIBUTED_SAMPLER": "resuming inside an epoch is always exact",
        }.items()
    },
}

_NOT_HERE = "nothing here does the same"
_ONE_WAY = "images and labels have one name each"
_LIBRARY_TRUNK = "use TRUNK.NAME=timm/<name> or torchvision/<name>, with the constructor's arguments in TRUNK.OPTIONS"
_NO_SHARDING = "optimizer states alone are not sharded; DISTRIBUTED.STRATEGY=fsdp shards weights and gradients too"
_SAMPLERS = "every epoch is one permutation of the rows; balance a subset with DATA_LIMIT_SAMPLING.IS_BALANCED"

#: Old key, or old section with `.*` -> (values under which it says nothing, why there is no equivalent). Else an error.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "METERS.model_output_mask": ((False,), _NOT_HERE),
    "MODEL.BASE_MODEL_NAME": (("multi_input_output_model",), "a model is always a trunk with heads"),
    "MODEL.TEMP_FROZEN_PARAMS_ITER_MAP": (([],), "parameters are frozen for good by NON_TRAINABLE_PARAMS only"),
    "MODEL.MULTI_INPUT_HEAD_MAPPING": (([],), _ONE_WAY),
    "MODEL.SINGLE_PASS_EVERY_CROP": ((False,), "there are no multi-crop batches"),
    "MODEL.SHARDED_DDP_SETUP.USE_SDP": ((False,), _NO_SHARDING),
    "MODEL.TRUNK.VISION_TRANSFORMERS.*": ((), _LIBRARY_TRUNK),
    "MODEL.TRUNK.TRUNK_PARAMS.*": ((), _LIBRARY_TRUNK),
    **{
        f"MODEL.TRUNK.{name}.*": ((), _LIBRARY_TRUNK)
        for name in (
            *("REGNET", "EFFICIENT_NETS", "MOBILENETV3", "CONVIT", "XCIT", "SWIN_TRANSFORMER", "BEIT", "CONVNEXT"),
            *("RESNEXT", "VISION_TRANSFORMER", "CLASSY_VIT", "ALEXNET"),
        )
    },
    "PROFILING.STOP_TRAINING_AFTER_PROFILING": ((False,), "a training ends after NUM_EPOCHS; set that to fewer"),
    "OPTIMIZER.use_zero": ((False,), "the optimizer's state is not sharded"),
    "OPTIMIZER.use_larc": ((False,), "use OPTIMIZER.NAME=lars, which also scales each layer's rate"),
    "TRAINER.TRAIN_STEP_NAME": (("standard_train_step",), "TASK.NAME chooses what a step does"),
    "TRAINER.TASK_NAME": (("self_supervision_task",), "TASK.NAME chooses what is trained"),
    "CHECKPOINT.LATEST_CHECKPOINT_RESUME_FILE_NUM": ((1,), "the newest good checkpoint is resumed"),
    "RANKING.*": ((), _NOT_HERE),
    "SVM.*": ((), "there are no SVMs; the linear probe is EVALUATE.PROTOCOLS=[linear] with LINEAR_PROBE"),
    "LOW_SHOT_BENCHMARK.METHOD": (("logistic_regression",), "low-shot probes are logistic regressions (LOW_SHOT)"),
    "LOW_SHOT_BENCHMARK.LOGISTIC_REGRESSION.LAMBDA": ((), "the strength is scaled differently; set LOW_SHOT.C"),
    "DISTILLATION.*": ((), _NOT_HERE),
    "IMG_RETRIEVAL.*": ((), _NOT_HERE),
    "GEO_LOCALIZATION.*": ((), _NOT_HERE),
    **{
        f"LOSS.{name}.*": ((), "this loss does not exist here (`list losses`)")
        for name in (
            *("nce_loss_with_memory", "simclr_info_nce_loss", "multicrop_simclr_info_nce_loss", "swav_loss"),
            *("swav_momentum_loss", "deepclusterv2_loss", "dino_loss", "ibot_loss", "msn_loss", "moco_loss"),
            *("barlow_twins_loss", "distillation_loss"),
        )
    },
    **{
        f"DATA.{split}.{key}": rule
        for split in ("TRAIN", "TEST")
        for key, rule in {
            "RANDOM_SYNTHETIC_IMAGES": ((False,), "use DATA_SOURCES=[synthetic]"),
            "BASE_DATASET": (("generic_ssl",), "DATA_SOURCES chooses where images come from"),
            "INPUT_KEY_NAMES": ((["data"],), _ONE_WAY),
            "TARGET_KEY_NAMES": ((["label"],), _ONE_WAY),
            "USE_DEBUGGING_SAMPLER": ((False,), _SAMPLERS),
            "STRATIFIED_SAMPLER.ENABLED": ((False,), _SAMPLERS),
            "POWER_LAW_SAMPLER.ENABLED": ((False,), _SAMPLERS),
        }.items()
    },
}
IGNORED |= {
    **{
        f"DATA.{split}.{sampler}.*": _SAMPLERS
        for split in ("TRAIN", "TEST")
        for sampler in ("STRATIFIED_SAMPLER", "POWER_LAW_SAMPLER")
    },
}


_GROUPS = "OPTIMIZER.GROUPS gives parameters, found by name, a factor of the rate and a weight decay of their own"
_ONE_VIEW = "every image gives one view, and the losses that compare several do not exist here (`list losses`)"

#: Key of ours -> beginnings of values that VISSL has for it, and why there is no equivalent.
REFUSED_VALUES: dict[str, dict[str, str]] = {
    "OPTIMIZER.PARAM_GROUP_CONSTRUCTOR": {"dino": _GROUPS, "linear_eval_heads": _GROUPS},
    "METERS.NAMES": {"mean_ap_meter": "mean_ap_list_meter measures one head as well as several"},
    **{
        f"DATA.{split}.COLLATE_FUNCTION": {
            **dict.fromkeys(("simclr", "moco", "multicrop", "siamese", "patch_and_image", "ibot"), _ONE_VIEW),
            "cutmixup": "DATA.MIX mixes images, for TASK.NAME=parts",
            "targets_one_hot": "labels of several classes are multi-hot rows already; use default_collate",
            "identity": "samples of a batch are always stacked; use default_collate",
        }
        for split in ("TRAIN", "VAL", "TEST")
    },
}


def translate(path: Path, value: Any) -> Translation | None:
    """What the old key `path` (with its leading `config`) says in our words; None if it is no old name."""
    found = _translated_key(path, value)
    for new, given in found.pairs if found is not None else ():
        refused = _refused_value(".".join(new[1:]), given)
        if refused is not None:
            return refused
    return found


def _translated_key(path: Path, value: Any) -> Translation | None:
    if path[:1] != ("config",):
        return _root(".".join(path), value)
    old = ".".join(path[1:])
    if old in MOVED:
        return _moved(old, MOVED[old], value)
    if old in CONVERTED:
        return _converted(old, CONVERTED[old](value))
    if old in REFUSED:
        return _refused(old, value, *REFUSED[old])
    if old in IGNORED:
        return Translation(note=f"config.{old} is ignored: {IGNORED[old]}.")
    return _by_section(old, value)


def _root(old: str, value: Any) -> Translation | None:
    """Old keys beside `config`."""
    if old == "node_id":
        note = "node_id is an old name of config.DISTRIBUTED.NODE_ID."
        return Translation(((_path("DISTRIBUTED.NODE_ID"), value),), note)
    if old == "VERSION":
        return Translation(note=f"VERSION is ignored: {IGNORED['VERSION']}.")
    if old.split(".")[0] == "hydra":
        return Translation(note=f"{old} is ignored: Hydra's own options are not used.")
    return None


def translate_value(path: Path, value: Any) -> Translation | None:
    """Old values of keys that exist here too: names of losses and others, a single number where a list is meant."""
    key = ".".join(path[1:])
    refused = _refused_value(key, value)
    if refused is not None:
        return refused
    if key == "LOSS.NAME" and isinstance(value, str) and value in _LOSS_NAMES:
        return _converted(f"{key}={value}", {key: _LOSS_NAMES[value]})
    if key == "NEAREST_NEIGHBOR.TOPK" and isinstance(value, int) and not isinstance(value, bool):
        return Translation(((path, [value]),))
    if re.fullmatch(r"OPTIMIZER\.PARAM_SCHEDULERS\.\w+\.SCHEDULERS", key) and isinstance(value, list):
        upper = [_upper(child) for child in value]
        if upper != value:
            return Translation(((path, upper),), f"config.{key}: keys of the children are upper-case here.")
    return None


def old_names() -> Iterator[tuple[Path, Path]]:
    """(old path, new path) of every name that only moved, for suggestions."""
    for old, new in MOVED.items():
        yield ("config", *old.split(".")), ("config", *new.split("."))


def _moved(old: str, new: str, value: Any) -> Translation:
    return Translation(((_path(new), value),), f"config.{old} is an old name of config.{new}.")


def _converted(old: str, new: dict[str, Any]) -> Translation:
    if not new:
        return Translation(note=f"config.{old} is an old name; with this value it says nothing here.")
    words = ", ".join(f"config.{key}={_show(value)}" for key, value in new.items())
    pairs = tuple((_path(key), value) for key, value in new.items())
    return Translation(pairs, f"config.{old} is an old name: {words}.")


def _refused(old: str, value: Any, harmless: tuple[Any, ...], reason: str) -> Translation:
    if value in harmless:
        return Translation(note=f"config.{old} is ignored: {reason}.")
    return Translation(note=f"config.{old}={_show(value)}: VISSL has this option, but {reason}.", is_error=True)


def _refused_value(key: str, value: Any) -> Translation | None:
    """The reason against a value (or one of a list's) that VISSL has for this key of ours."""
    for given in value if isinstance(value, list) else [value]:
        for beginning, reason in REFUSED_VALUES.get(key, {}).items():
            if isinstance(given, str) and given.startswith(beginning):
                return Translation(note=f"config.{key}={given}: VISSL has this value, but {reason}.", is_error=True)
    return None


def _by_section(old: str, value: Any) -> Translation | None:
    parts = old.split(".")
    for length in range(len(parts) - 1, 0, -1):
        section = ".".join(parts[:length])
        if section in MOVED_SECTIONS:
            new = ".".join((MOVED_SECTIONS[section], *parts[length:]))
            return _moved(old, new, value) if find(_path(new)) else None
        if f"{section}.*" in REFUSED:
            return _refused(old, value, *REFUSED[f"{section}.*"])
        if f"{section}.*" in IGNORED:
            return Translation(note=f"config.{old} is ignored: {IGNORED[f'{section}.*']}.")
    return None


def _path(key: str) -> Path:
    return ("config", *key.split("."))


def _show(value: Any) -> str:
    return value if isinstance(value, str) and value else repr(value)
