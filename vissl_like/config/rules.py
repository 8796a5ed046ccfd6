"""What the types cannot say: names of components, options that must fit together, files that must exist.

Each function returns (key, text) pairs; the text begins with the key and its value and ends with the cure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from vissl_like import registry
from vissl_like.config import components
from vissl_like.config.rules_launch import slurm_problems
from vissl_like.config.rules_parts import part_problems
from vissl_like.config.schema import Config, Job
from vissl_like.config.schema_data import Split
from vissl_like.config.schema_model import Schedule
from vissl_like.config.spelling import nearest
from vissl_like.errors import ConfigError, DataError, UserError, WeightsError

Problem = tuple[str, str]

SPLITS = ("TRAIN", "VAL", "TEST")
_DISK = ("disk_folder", "disk_filelist")
_SHARDS = "webdataset"
#: Sources that make their folder where it is missing.
_DRAWN = ("toybirds", "toy_waterbirds")
#: Sources of our own that know where a bird belongs (SUBSET); one of a plugin may read it, too.
_WITH_SUBSETS = ("waterbirds", "toy_waterbirds")
#: Sources that bring or draw their images themselves.
_WITHOUT_PATH = ("synthetic", "mnist5k", "digits")
#: Optimizers whose fused step PyTorch has for sharded weights, too.
_FUSED_SHARDED = ("adam", "adamw")
#: Tasks that mix the images of a batch (DATA.MIX).
_MIXING = ("parts",)
#: Values of PARAMS_FILE that are no paths.
_NAMED_WEIGHTS = ("timm:", "torchvision:", "hf:", "http://", "https://")


# --------------------------------------------------------------------------------------------------------------- names
def name_problems(job: Job) -> Iterator[Problem]:
    """Names of components that do not exist."""
    config = job.config
    named = [
        ("engine", job.engine_name, "engine_name"),
        ("model", config.MODEL.NAME, "config.MODEL.NAME"),
        ("task", config.TASK.NAME, "config.TASK.NAME"),
        ("loss", config.LOSS.NAME, "config.LOSS.NAME"),
        ("trunk", config.MODEL.TRUNK.NAME, "config.MODEL.TRUNK.NAME"),
        ("optimizer", config.OPTIMIZER.NAME, "config.OPTIMIZER.NAME"),
    ]
    named += [("head", name, f"config.MODEL.HEAD.PARAMS.{i}.0") for i, name in _head_names(config.MODEL.HEAD.PARAMS)]
    for split in SPLITS:
        options: Split = getattr(config.DATA, split)
        for i, source in enumerate(options.DATA_SOURCES):
            named.append(("data_source", source, f"config.DATA.{split}.DATA_SOURCES.{i}"))
        for i, source in enumerate(options.LABEL_SOURCES):
            named.append(("data_source", source, f"config.DATA.{split}.LABEL_SOURCES.{i}"))
    named += [("schedule", schedule.NAME, f"{key}.NAME") for key, schedule in _schedules(config)]
    for kind, name, key in named:
        text = components.problem(kind, name, key)
        if text:
            yield key, text
    yield from _transform_problems(config)
    yield from _preset_problems(config)


def _head_names(params: list[Any]) -> Iterator[tuple[int, str]]:
    for number, head in enumerate(params):
        if isinstance(head, list) and head and isinstance(head[0], str):
            yield number, head[0]


def _transform_problems(config: Config) -> Iterator[Problem]:
    for split in SPLITS:
        for number, entry in enumerate(getattr(config.DATA, split).TRANSFORMS):
            key = f"config.DATA.{split}.TRANSFORMS.{number}"
            name = entry.get("name")
            if not isinstance(name, str):
                yield key, f"{key}={entry!r}: a transform is {{name: NAME, argument: value, ...}}."
                continue
            known = components.transform_names()
            near = nearest(name, known) if name not in known else []
            if name not in known and components.knows_torchvision():
                hint = f"; did you mean {near[0]}?" if near else "."
                yield key, f"{key}.name={name!r}: no such transform{hint} `list transforms` shows all."


def _preset_problems(config: Config) -> Iterator[Problem]:
    preset = config.MODEL.WEIGHTS_INIT.PRESET
    if preset:
        key = "config.MODEL.WEIGHTS_INIT.PRESET"
        text = components.problem("weight preset", preset, key, components.listing("weight_presets"))
        if text:
            yield key, text


def _schedules(config: Config) -> Iterator[tuple[str, Schedule]]:
    """(key, schedule) of every schedule that is in use."""
    schedules = config.OPTIMIZER.PARAM_SCHEDULERS
    yield "config.OPTIMIZER.PARAM_SCHEDULERS.LR", schedules.LR
    if config.OPTIMIZER.HEAD_OPTIMIZER_PARAMS.USE_DIFFERENT_LR:
        yield "config.OPTIMIZER.PARAM_SCHEDULERS.LR_HEAD", schedules.LR_HEAD
    if schedules.WEIGHT_DECAY is not None:
        yield "config.OPTIMIZER.PARAM_SCHEDULERS.WEIGHT_DECAY", schedules.WEIGHT_DECAY


# ---------------------------------------------------------------------------------------------------- fitting together
def fit_problems(job: Job) -> Iterator[Problem]:
    """Options that do not fit together."""
    config = job.config
    for split in SPLITS:
        yield from _parallel_lists(getattr(config.DATA, split), split)
    yield from _heads_and_pooling(config)
    yield from part_problems(config)
    yield from _number_lists(config)
    yield from _engine_needs(job)
    yield from slurm_problems(config)
    if not list(_heads_and_pooling(config)):
        yield from _wanted_layers(job)
    if config.DISTRIBUTED.BACKEND == "nccl" and config.MACHINE.DEVICE == "cpu":
        key = "config.DISTRIBUTED.BACKEND"
        yield key, f"{key}='nccl': it works between GPUs only, but config.MACHINE.DEVICE='cpu'. Use auto or gloo."
    yield from _sharding_problems(config)
    if job.engine_name == "train":
        yield from _schedule_problems(config)
        yield from _mix_problems(config)


def _sharding_problems(config: Config) -> Iterator[Problem]:
    """What needs whole weights in every process."""
    if config.DISTRIBUTED.STRATEGY != "fsdp":
        return
    key, value = "config.MACHINE.COMPILE", config.MACHINE.COMPILE
    if value == "model":
        yield (
            key,
            f"{key}='model': sharded blocks are gathered one by one (config.DISTRIBUTED.STRATEGY='fsdp'). Use blocks.",
        )
    optimizer = config.OPTIMIZER
    if optimizer.OPTIONS.get("fused") and optimizer.NAME.removeprefix("timm/") not in _FUSED_SHARDED:
        key = "config.OPTIMIZER.OPTIONS.fused"
        yield (
            key,
            f"{key}={optimizer.OPTIONS['fused']}: PyTorch has no fused step of config.OPTIMIZER.NAME={optimizer.NAME!r} for "
            "sharded weights (config.DISTRIBUTED.STRATEGY='fsdp'). Leave it out, or use adam or adamw.",
        )
    loggers = config.LOGGERS
    for key, is_on in (
        ("config.LOGGERS.TENSORBOARD.LOG_PARAMS", loggers.TENSORBOARD.ENABLED and loggers.TENSORBOARD.LOG_PARAMS),
        ("config.LOGGERS.WANDB.WATCH_GRADIENTS", loggers.WANDB.ENABLED and loggers.WANDB.WATCH_GRADIENTS),
    ):
        if is_on:
            yield (
                key,
                f"{key}=True: no process has whole weights (config.DISTRIBUTED.STRATEGY='fsdp'). Set it to false.",
            )


def _mix_problems(config: Config) -> Iterator[Problem]:
    """Mixed images where nothing mixes them."""
    if config.TASK.NAME not in _MIXING:
        for name in ("MIXUP", "CUTMIX", "CUTMIX_MINMAX"):
            value = getattr(config.DATA.MIX, name)
            if value:
                key = f"config.DATA.MIX.{name}"
                yield (
                    key,
                    f"{key}={value}: config.TASK.NAME={config.TASK.NAME!r} mixes no images; leave it off. Classification with "
                    "mixed images: TASK.NAME=parts with MODEL.NAME=pooled.",
                )


def _parallel_lists(options: Split, split: str) -> Iterator[Problem]:
    count = len(options.DATA_SOURCES)
    prefix = f"config.DATA.{split}"
    if count == 0:
        if options.DATA_PATHS:
            key = f"{prefix}.DATA_PATHS"
            yield key, f"{key}={options.DATA_PATHS}: needs {prefix}.DATA_SOURCES=[disk_folder] or [disk_filelist]."
        return
    for name in ("DATASET_NAMES", "DATA_PATHS", "LABEL_SOURCES", "LABEL_PATHS"):
        values = getattr(options, name)
        allowed = (0, 1, count) if name == "LABEL_PATHS" else (0, count)
        if len(values) not in allowed:
            key = f"{prefix}.{name}"
            yield (
                key,
                f"{key}={values}: {len(values)} entries, but DATA_SOURCES={options.DATA_SOURCES} has {count}; "
                "give one for each source.",
            )
    for number, (source, path) in enumerate(zip(options.DATA_SOURCES, options.DATA_PATHS)):
        if path and source in _WITHOUT_PATH:
            key = f"{prefix}.DATA_PATHS.{number}"
            yield (
                key,
                f"{key}={path!r}: the source {source!r} ({prefix}.DATA_SOURCES) brings its own images and reads no path. "
                f"For images of yours set {prefix}.DATA_SOURCES=[disk_folder]; else leave DATA_PATHS out.",
            )
    without = registry.OWN["data_source"].difference(_WITH_SUBSETS)
    others = [source for source in options.DATA_SOURCES if source in without]
    if options.SUBSET and others:
        key = f"{prefix}.SUBSET"
        yield (
            key,
            f"{key}={options.SUBSET!r}: only {' and '.join(_WITH_SUBSETS)} have such a part, {others[0]} "
            f"({prefix}.DATA_SOURCES) has none. Leave it out.",
        )
    limits = options.DATA_LIMIT_SAMPLING
    if limits.IS_BALANCED and options.DATA_LIMIT < 0:
        key = f"{prefix}.DATA_LIMIT_SAMPLING.IS_BALANCED"
        yield key, f"{key}=True: needs {prefix}.DATA_LIMIT, the number of samples to draw."


def _heads_and_pooling(config: Config) -> Iterator[Problem]:
    for number, head in enumerate(config.MODEL.HEAD.PARAMS):
        is_pair = isinstance(head, list) and len(head) in (1, 2) and isinstance(head[0], str)
        if not is_pair or (len(head) == 2 and not isinstance(head[1], dict)):
            key = f"config.MODEL.HEAD.PARAMS.{number}"
            yield key, f"{key}={head!r}: a head is [name, {{options}}], for example [mlp, {{dims: [auto, auto]}}]."
    key = "config.MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP"
    for number, item in enumerate(config.MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP):
        good = isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], list)
        if not good or not item[1] or not isinstance(item[1][0], str):
            yield (
                f"{key}.{number}",
                f"{key}.{number}={item!r}: an entry is [layer, [pooling, arguments]], "
                "for example [res5, [AdaptiveAvgPool2d, [[1, 1]]]] or [flatten, [Identity, []]].",
            )


def _wanted_layers(job: Job) -> Iterator[Problem]:
    """Layers that are named for clustering or evaluation are among those that the same run extracts."""
    config, extracted = job.config, _extracted_layers(job.config)
    wanted: list[tuple[str, list[str]]] = []
    if job.engine_name == "cluster_features" and config.CLUSTERFIT.FEATURES.EXTRACT:
        key, name = "config.CLUSTERFIT.FEATURES.LAYER_NAME", config.CLUSTERFIT.FEATURES.LAYER_NAME
        wanted = [(key, [name] if name else [])]
        if not name and len(extracted) > 1:
            yield key, f"{key}='': this run extracts several layers; name the one to cluster: {', '.join(extracted)}."
    if job.engine_name == "evaluate" and not config.EVALUATE.FEATURES_PATH:
        sections = ("NEAREST_NEIGHBOR", "LINEAR_PROBE", "LOW_SHOT")
        wanted = [(f"config.{section}.LAYERS", getattr(config, section).LAYERS) for section in sections]
    for key, layers in wanted:
        for layer in layers:
            if layer not in extracted and not layer.startswith("heads"):
                near = nearest(layer, extracted)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                yield key, f"{key}={layer!r}: this run does not extract it{hint} It extracts: {', '.join(extracted)}."


def _extracted_layers(config: Config) -> list[str]:
    """Names of the features: a layer's, with _1, _2, ... where it is listed again."""
    listed = [item[0] for item in config.MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP] or ["flatten"]
    return [
        name if listed[:i].count(name) == 0 else f"{name}_{listed[:i].count(name)}" for i, name in enumerate(listed)
    ]


def _number_lists(config: Config) -> Iterator[Problem]:
    """Lists of numbers (and of protocols) that must not be empty and have a least element."""
    meters = config.METERS
    whole = [
        ("NEAREST_NEIGHBOR.TOPK", config.NEAREST_NEIGHBOR.TOPK),
        ("LOW_SHOT.SAMPLES_PER_CLASS", config.LOW_SHOT.SAMPLES_PER_CLASS),
        ("METERS.ACCURACY_LIST_METER.TOPK_VALUES", meters.ACCURACY_LIST_METER.TOPK_VALUES),
        ("METERS.PRECISION_AT_K_LIST_METER.TOPK_VALUES", meters.PRECISION_AT_K_LIST_METER.TOPK_VALUES),
        ("METERS.RECALL_AT_K_LIST_METER.TOPK_VALUES", meters.RECALL_AT_K_LIST_METER.TOPK_VALUES),
    ]
    for name, counts in whole:
        if not counts or min(counts) < 1:
            yield f"config.{name}", f"config.{name}={counts}: must be one or more whole numbers, each at least 1."
    if 0 <= config.CLUSTERFIT.DATA_LIMIT < config.CLUSTERFIT.NUM_CLUSTERS:
        key = "config.CLUSTERFIT.DATA_LIMIT"
        yield (
            key,
            f"{key}={config.CLUSTERFIT.DATA_LIMIT}: fewer rows than config.CLUSTERFIT.NUM_CLUSTERS="
            f"{config.CLUSTERFIT.NUM_CLUSTERS}. Give at least as many rows as clusters; -1: all.",
        )
    c_values = config.LINEAR_PROBE.C
    if not c_values or min(c_values) <= 0:
        key = "config.LINEAR_PROBE.C"
        yield key, f"{key}={c_values}: must be one or more numbers, each more than 0."
    if not config.EVALUATE.PROTOCOLS:
        key = "config.EVALUATE.PROTOCOLS"
        yield key, f"{key}=[]: nothing would be measured. Give one or more of knn, linear, low_shot."


def _engine_needs(job: Job) -> Iterator[Problem]:
    data, config = job.config.DATA, job.config
    needed = {"train": ["TRAIN"], "extract_label_predictions": []}.get(job.engine_name, [])
    if job.engine_name == "evaluate" and not config.EVALUATE.FEATURES_PATH:
        needed = ["TRAIN", "TEST"]
    if job.engine_name == "train" and config.TEST_ONLY:
        needed = ["TEST"]
    if job.engine_name == "cluster_features" and config.CLUSTERFIT.FEATURES.EXTRACT:
        needed = [config.CLUSTERFIT.FEATURES.DATA_PARTITION]
    if job.engine_name in ("extract_features", "extract_label_predictions"):
        needed = list(config.EXTRACT_FEATURES.SPLITS) if job.engine_name == "extract_features" else []
        if not needed and not any(getattr(data, split).DATA_SOURCES for split in SPLITS):
            needed = ["TRAIN"]
    for split in needed:
        if not getattr(data, split).DATA_SOURCES:
            key = f"config.DATA.{split}.DATA_SOURCES"
            yield (
                key,
                f"{key}=[]: the engine {job.engine_name} needs data here, for example [disk_folder] with "
                f"config.DATA.{split}.DATA_PATHS=[FOLDER]; or start from a recipe (`list recipes`).",
            )


def _schedule_problems(config: Config) -> Iterator[Problem]:
    from vissl_like.optim.scaling import child_schedules
    from vissl_like.optim.schedules import build_curve

    for key, schedule in _schedules(config):
        name = key.rpartition(".")[2]
        try:
            if schedule.NAME == "composite":
                child_schedules(schedule, key=name)
            build_curve(schedule, num_epochs=max(1, config.OPTIMIZER.NUM_EPOCHS), key=name)
        except ConfigError as error:
            yield key, str(error)


# ------------------------------------------------------------------------------------------------------------- remarks
def remarks(job: Job) -> Iterator[Problem]:
    """What is allowed but probably not meant."""
    config = job.config
    for split in used_splits(job):
        options: Split = getattr(config.DATA, split)
        if options.label_type != options.LABEL_TYPE:
            key = f"config.DATA.{split}.LABEL_TYPE"
            given = "LABEL_SOURCES" if options.LABEL_SOURCES else "LABEL_PATHS"
            yield key, f"{key}={options.LABEL_TYPE!r} is ignored: {given} says where the labels come from."
    if job.engine_name == "train":
        yield from _unreached(config)
        if config.CHECKPOINT.BEST_METRIC and not (config.TEST_MODEL and config.DATA.TEST.DATA_SOURCES):
            key = "config.CHECKPOINT.BEST_METRIC"
            yield key, f"{key}={config.CHECKPOINT.BEST_METRIC!r}: without a test split no save is the best one."
    weights = config.MODEL.WEIGHTS_INIT
    if not weights.PARAMS_FILE and job.engine_name in ("extract_features", "extract_label_predictions"):
        key = "config.MODEL.WEIGHTS_INIT.PARAMS_FILE"
        yield key, f"{key}='': the features are those of an untrained network."


def _unreached(config: Config) -> Iterator[Problem]:
    from vissl_like.optim.schedules import unreached_milestones

    for key, schedule in _schedules(config):
        late = unreached_milestones(schedule, num_epochs=config.OPTIMIZER.NUM_EPOCHS)
        if late:
            listed = ", ".join(map(str, late))
            yield (
                f"{key}.MILESTONES",
                f"{key}.MILESTONES: training ends at config.OPTIMIZER.NUM_EPOCHS={config.OPTIMIZER.NUM_EPOCHS}, "
                f"so {listed} {'is' if len(late) == 1 else 'are'} never reached.",
            )


# --------------------------------------------------------------------------------------------------------------- files
def check_files(*jobs: Job, made_in: str = "") -> list[str]:
    """Every file and folder that these jobs read exists. Returns them; raises DataError or WeightsError naming the lost.

    What lies below the folder `made_in` need not be there yet: earlier stages of a pipeline make it.
    """
    wanted: list[tuple[str, str, str]] = []
    problems: list[UserError] = []
    for job in jobs:
        from_catalog, unknown = _from_catalog(job)
        shards, lost = _wanted_shards(job)
        wanted += [*_wanted_files(job), *from_catalog, *shards]
        problems += [*unknown, *lost]
    found: list[str] = []
    for key, path, kind in dict.fromkeys(wanted):
        expanded = os.path.expanduser(path)
        if os.path.exists(expanded):
            found.append(path)
        elif not made_in or not os.path.abspath(expanded).startswith(os.path.join(os.path.abspath(made_in), "")):
            text = f"{key}={path!r}: no such file or folder{_near_file(expanded)}"
            problems.append(WeightsError(text) if kind == "weights" else DataError(text))
    if problems:
        first = type(problems[0])
        raise first("\n".join(dict.fromkeys(map(str, problems))))
    return list(dict.fromkeys(found))


def _wanted_files(job: Job) -> Iterator[tuple[str, str, str]]:
    """(key, path, kind) of every path that is read."""
    config = job.config
    weights = config.MODEL.WEIGHTS_INIT.PARAMS_FILE
    if weights and not weights.startswith(_NAMED_WEIGHTS):
        yield "config.MODEL.WEIGHTS_INIT.PARAMS_FILE", weights, "weights"
    if config.DATA.CATALOG:
        yield "config.DATA.CATALOG", config.DATA.CATALOG, "data"
    for split in used_splits(job):
        options: Split = getattr(config.DATA, split)
        for number, path in enumerate(options.DATA_PATHS):
            if options.DATA_SOURCES[number] not in (_SHARDS, *_DRAWN):
                yield f"config.DATA.{split}.DATA_PATHS.{number}", path, "data"
        for number, files in enumerate(options.LABEL_PATHS):
            for path in [files] if isinstance(files, str) else files:
                yield f"config.DATA.{split}.LABEL_PATHS.{number}", path, "data"
    if job.engine_name == "evaluate" and config.EVALUATE.FEATURES_PATH:
        yield "config.EVALUATE.FEATURES_PATH", config.EVALUATE.FEATURES_PATH, "data"
    if job.engine_name == "cluster_features" and not config.CLUSTERFIT.FEATURES.EXTRACT:
        path = config.CLUSTERFIT.FEATURES.PATH or os.path.join(config.RUN.DIR or ".", "features")
        yield "config.CLUSTERFIT.FEATURES.PATH", path, "data"


def _wanted_shards(job: Job) -> tuple[list[tuple[str, str, str]], list[UserError]]:
    """(key, folder, kind) of the folders of shards, and shards that are missing."""
    found: list[tuple[str, str, str]] = []
    problems: list[UserError] = []
    for split in used_splits(job):
        options: Split = getattr(job.config.DATA, split)
        for number, path in enumerate(options.DATA_PATHS):
            key = f"config.DATA.{split}.DATA_PATHS.{number}"
            try:
                if options.DATA_SOURCES[number] == _SHARDS:
                    found += [(key, folder, "data") for folder in _shard_folders(path, key)]
            except UserError as error:
                problems.append(error)
    return found, problems


def _shard_folders(path: str, key: str) -> list[str]:
    """Folders of the shards that a path names; what lies behind URLs is not asked for. Raises if a shard is missing."""
    from vissl_like.data.shard_names import is_url, shards_of

    return list(dict.fromkeys(os.path.dirname(shard) for shard in shards_of(path, key=key) if not is_url(shard)))


def _from_catalog(job: Job) -> tuple[list[tuple[str, str, str]], list[UserError]]:
    """(key, path, kind) of images that the catalog of data sets names, and what it does not know."""
    from vissl_like.data import catalog

    data = job.config.DATA
    found: list[tuple[str, str, str]] = []
    problems: list[UserError] = []
    for split in used_splits(job):
        options: Split = getattr(data, split)
        for number, source in enumerate(options.DATA_SOURCES):
            # Images may also be named beside a label file; then neither a path nor the catalog is needed.
            is_named = source in _DISK and number < len(options.LABEL_PATHS)
            if source not in (*_DISK, _SHARDS) or options.DATA_PATHS or is_named:
                continue
            name = options.DATASET_NAMES[number] if options.DATASET_NAMES else ""
            key = f"config.DATA.{split}.DATASET_NAMES.{number}"
            try:
                images = catalog.look_up(name, split=split, catalog=data.CATALOG).images
                paths = _shard_folders(images, key) if source == _SHARDS else [images]
                found += [(key, path, "data") for path in paths]
            except UserError as error:
                problems.append(error)
    return found, problems


def used_splits(job: Job) -> list[str]:
    """Splits with data that this job reads."""
    config = job.config
    splits = [split for split in SPLITS if getattr(config.DATA, split).DATA_SOURCES]
    if job.engine_name == "train" and not (config.TEST_MODEL or config.TEST_ONLY):
        splits = [split for split in splits if split != "TEST"]
    if job.engine_name == "extract_features" and config.EXTRACT_FEATURES.SPLITS:
        splits = [split for split in splits if split in config.EXTRACT_FEATURES.SPLITS]
    return splits


def _near_file(path: str) -> str:
    folder, name = os.path.split(path.rstrip("/"))
    folder = folder or "."
    if not os.path.isdir(folder):
        above = folder
        while above and not os.path.isdir(above):
            above = os.path.dirname(above)
        return f"; {above or '.'} exists, what comes after it does not."
    near = nearest(name, os.listdir(folder))
    return f"; did you mean {os.path.join(folder, near[0])}?" if near else "."
