"""Names of VISSL: each is known here, translated, or refused with a reason."""

from typing import Any

import pytest

from vissl_like.config import aliases, reference
from vissl_like.config.check import load_job
from vissl_like.config.schema import Config
from vissl_like.errors import ConfigError

#: VISSL's options (its defaults.yaml, the part that concerns this project), `section: keys` below `config`.
VISSL = """
: VERBOSE LOG_FREQUENCY TEST_ONLY TEST_MODEL TEST_EVERY_NUM_EPOCH SEED_VALUE MULTI_PROCESSING_METHOD
REPRODUCIBILITY: CUDDN_DETERMINISTIC
HOOKS: CHECK_NAN LOG_GPU_STATS
HOOKS.EMA_MODEL: SAVE_EMA_MODEL ENABLE_EMA_METERS UPDATE_ITER WARMUP DECAY EMA_DEVICE
HOOKS.PERF_STATS: MONITOR_PERF_STATS PERF_STAT_FREQUENCY ROLLING_BTIME_FREQ
HOOKS.MEMORY_SUMMARY: PRINT_MEMORY_SUMMARY LOG_ITERATION_NUM DUMP_MEMORY_ON_EXCEPTION
HOOKS.MODEL_COMPLEXITY: COMPUTE_COMPLEXITY INPUT_SHAPE
HOOKS.TENSORBOARD_SETUP: USE_TENSORBOARD LOG_DIR EXPERIMENT_LOG_DIR FLUSH_EVERY_N_MIN LOG_PARAMS LOG_PARAMS_GRADIENTS
HOOKS.TENSORBOARD_SETUP: LOG_PARAMS_EVERY_N_ITERS
MONITORING: MONITOR_ACTIVATION_STATISTICS
PROFILING: START_ITERATION WARMUP_ITERATIONS NUM_ITERATIONS STOP_TRAINING_AFTER_PROFILING OUTPUT_FOLDER PROFILED_RANKS
PROFILING.MEMORY_PROFILING: TRACK_BY_LAYER_MEMORY
PROFILING.RUNTIME_PROFILING: USE_PROFILER PROFILE_CPU PROFILE_GPU LEGACY_PROFILER
DATA: NUM_DATALOADER_WORKERS PIN_MEMORY ENABLE_ASYNC_GPU_COPY DDP_BUCKET_CAP_MB
DATA.TRAIN: DATASET_NAMES DATA_SOURCES DATA_PATHS LABEL_SOURCES LABEL_PATHS LABEL_TYPE BATCHSIZE_PER_REPLICA TRANSFORMS
DATA.TRAIN: COLLATE_FUNCTION COLLATE_FUNCTION_PARAMS DROP_LAST MMAP_MODE DEFAULT_GRAY_IMG_SIZE ENABLE_QUEUE_DATASET
DATA.TRAIN: RANDOM_SYNTHETIC_IMAGES RANDOM_SYNTHETIC_LABELS DATA_LIMIT BASE_DATASET COPY_TO_LOCAL_DISK
DATA.TRAIN: COPY_DESTINATION_DIR INPUT_KEY_NAMES TARGET_KEY_NAMES REMOVE_IMG_PATH_PREFIX NEW_IMG_PATH_PREFIX
DATA.TRAIN: USE_DEBUGGING_SAMPLER USE_STATEFUL_DISTRIBUTED_SAMPLER DATASET_PATHS
DATA.TRAIN.DATA_LIMIT_SAMPLING: SEED IS_BALANCED SKIP_NUM_SAMPLES
DATA.TEST.STRATIFIED_SAMPLER: ENABLED CLASSES_PER_BATCH STEP_PER_EPOCH UNIQUE_CLASSES
DATA.TEST.POWER_LAW_SAMPLER: ENABLED POWER
METERS: name names enable_training_meter model_output_mask
METERS.accuracy_list_meter: num_meters topk_values meter_names
METERS.precision_at_k_list_meter: num_meters topk_values meter_names
METERS.recall_at_k_list_meter: num_meters topk_values meter_names
METERS.mean_ap_list_meter: num_classes num_meters max_cpu_capacity meter_names
MACHINE: DEVICE
MODEL: BASE_MODEL_NAME INPUT_TYPE NON_TRAINABLE_PARAMS TEMP_FROZEN_PARAMS_ITER_MAP MULTI_INPUT_HEAD_MAPPING
MODEL: SINGLE_PASS_EVERY_CROP
MODEL.CUDA_CACHE: CLEAR_CUDA_CACHE CLEAR_FREQ
MODEL.ACTIVATION_CHECKPOINTING: USE_ACTIVATION_CHECKPOINTING NUM_ACTIVATION_CHECKPOINTING_SPLITS
MODEL.SHARDED_DDP_SETUP: USE_SDP reduce_buffer_size
MODEL.FSDP_CONFIG: AUTO_SETUP_FSDP AUTO_WRAP_THRESHOLD AMP_TYPE FORCE_SYNC_CUDA flatten_parameters mixed_precision
MODEL.FSDP_CONFIG: fp32_reduce_scatter compute_dtype bucket_cap_mb clear_autocast_cache verbose
MODEL.FEATURE_EVAL_SETTINGS: EVAL_MODE_ON FREEZE_TRUNK_ONLY FREEZE_TRUNK_AND_HEAD EXTRACT_TRUNK_FEATURES_ONLY
MODEL.FEATURE_EVAL_SETTINGS: EVAL_TRUNK_AND_HEAD ASSERT_HEAD_LAYER_SHAPE_INIT SHOULD_FLATTEN_FEATS
MODEL.FEATURE_EVAL_SETTINGS: LINEAR_EVAL_FEAT_POOL_OPS_MAP
MODEL.GRAD_CLIP: USE_GRAD_CLIP NORM_TYPE MAX_NORM
MODEL.TRUNK: NAME
MODEL.TRUNK.RESNETS: DEPTH WIDTH_MULTIPLIER NORM GROUPNORM_GROUPS STANDARDIZE_CONVOLUTIONS GROUPS ZERO_INIT_RESIDUAL
MODEL.TRUNK.RESNETS: WIDTH_PER_GROUP LAYER4_STRIDE
MODEL.TRUNK.TRUNK_PARAMS.RESNETS: DEPTH
MODEL.TRUNK.VISION_TRANSFORMERS: IMAGE_SIZE PATCH_SIZE
MODEL.HEAD: PARAMS BATCHNORM_EPS BATCHNORM_MOMENTUM PARAMS_MULTIPLIER
MODEL.SYNC_BN_CONFIG: CONVERT_BN_TO_SYNC_BN SYNC_BN_TYPE GROUP_SIZE
MODEL.AMP_PARAMS: USE_AMP AMP_ARGS AMP_TYPE
MODEL.WEIGHTS_INIT: PARAMS_FILE STATE_DICT_KEY_NAME SKIP_LAYERS REMOVE_PREFIX APPEND_PREFIX
LOSS: name
LOSS.CrossEntropyLoss: ignore_index
LOSS.cross_entropy_multiple_output_single_target: weight reduction ignore_index normalize_output temperature
LOSS.bce_logits_multiple_output_single_target: reduction world_size
LOSS.simclr_info_nce_loss: temperature
OPTIMIZER: name use_zero use_larc weight_decay momentum nesterov num_epochs betas regularize_bn regularize_bias
OPTIMIZER: non_regularized_parameters construct_single_param_group_only param_group_constructor
OPTIMIZER.larc_config: clip eps trust_coefficient
OPTIMIZER.head_optimizer_params: use_different_lr use_different_wd weight_decay
OPTIMIZER.layer_wise_lr_decay: decay
OPTIMIZER.param_schedulers.lr.auto_lr_scaling: auto_scale base_value base_lr_batch_size scaling_type
OPTIMIZER.param_schedulers.lr: name update_interval values milestones schedulers interval_scaling lengths start_value
OPTIMIZER.param_schedulers.lr: end_value value
OPTIMIZER.param_schedulers.lr_head: name values milestones
EXTRACT_FEATURES: OUTPUT_DIR CHUNK_THRESHOLD MAP_FEATURES_TO_IMG_NAME
CLUSTERFIT: OUTPUT_DIR NUM_ITER N_ITER NUM_CLUSTERS DATA_LIMIT CLUSTER_BACKEND
CLUSTERFIT.DATA_LIMIT_SAMPLING: SEED
CLUSTERFIT.FEATURES: EXTRACT PATH DATA_PARTITION TEST_PARTITION DATASET_NAME LAYER_NAME DIMENSIONALITY_REDUCTION
RANKING: USE_GPU RANKING_BACKEND
RANKING.FEATURES: LAYER_NAME
TRAINER: TRAIN_STEP_NAME TASK_NAME
CHECKPOINT: DIR APPEND_DISTR_RUN_ID BACKEND AUTO_RESUME CHECKPOINT_FREQUENCY CHECKPOINT_ITER_FREQUENCY
CHECKPOINT: OVERWRITE_EXISTING LATEST_CHECKPOINT_RESUME_FILE_NUM USE_SYMLINK_CHECKPOINT_FOR_RESUME
DISTRIBUTED: BACKEND NCCL_DEBUG NCCL_SOCKET_NTHREADS BROADCAST_BUFFERS NUM_NODES NUM_PROC_PER_NODE INIT_METHOD RUN_ID
DISTRIBUTED: MANUAL_GRADIENT_REDUCTION
SLURM: USE_SLURM NAME COMMENT PARTITION LOG_FOLDER TIME_HOURS CONSTRAINT MEM_GB PORT_ID NUM_CPU_PER_PROC
NEAREST_NEIGHBOR: SIGMA TOPK L2_NORM_FEATS USE_CUDA OPTIMIZE_MEMORY
NEAREST_NEIGHBOR.FEATURES: PATH
SVM: normalize cls_list loss penalty
SVM.costs: costs_list base
LOW_SHOT_BENCHMARK: METHOD
LOW_SHOT_BENCHMARK.LOGISTIC_REGRESSION: LAMBDA SEEDS
LOW_SHOT_BENCHMARK.FEATURES: PATH
DISTILLATION.TEACHER_MODEL: NAME
IMG_RETRIEVAL: DATASET_PATH
GEO_LOCALIZATION: NAME
"""


def _vissl_keys() -> list[str]:
    keys = []
    for line in VISSL.strip().splitlines():
        section, _, names = line.partition(":")
        keys += [f"{section}.{name}".lstrip(".") for name in names.split()]
    return keys


@pytest.mark.parametrize("key", _vissl_keys())
def test_every_option_of_vissl_has_an_answer(key: str) -> None:
    path = ("config", *key.split("."))
    if reference.find(path) is None:
        translation = aliases.translate(path, "something")
        assert translation is not None and translation.note.startswith(f"config.{key}")
        for new, _ in translation.pairs:
            assert reference.find(new) is not None


def test_tables_name_keys_that_exist_here_and_old_ones_that_do_not() -> None:
    for old, new in aliases.MOVED.items():
        assert reference.find(("config", *new.split("."))) is not None, new
        assert reference.find(("config", *old.split("."))) is None, old
    for table in (aliases.CONVERTED, aliases.IGNORED, aliases.REFUSED):
        for old in table:
            assert reference.find(("config", *old.removesuffix(".*").split("."), "x")) is None, old


def _config(*overrides: str) -> tuple[Config, tuple[str, ...]]:
    loaded = load_job(["config=debug/supervised_synthetic", *overrides])
    return loaded.job.config, loaded.notes


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("CLUSTERFIT.N_ITER=7", "CLUSTERFIT.NUM_ITER", 7),
        ("OPTIMIZER.num_epochs=3", "OPTIMIZER.NUM_EPOCHS", 3),
        ("OPTIMIZER.name=adam", "OPTIMIZER.NAME", "adam"),
        ("OPTIMIZER.param_schedulers.lr.start_value=0.5", "OPTIMIZER.PARAM_SCHEDULERS.LR.START_VALUE", 0.5),
        (
            "OPTIMIZER.param_schedulers.lr.auto_lr_scaling.auto_scale=true",
            "OPTIMIZER.PARAM_SCHEDULERS.LR.AUTO_LR_SCALING.AUTO_SCALE",
            True,
        ),
        ("OPTIMIZER.param_schedulers.lr.num_decays=2", "OPTIMIZER.PARAM_SCHEDULERS.LR.NUM_DECAYS", 2),
        ("LOSS.name=cross_entropy_multiple_output_single_target", "LOSS.NAME", "cross_entropy"),
        ("LOSS.NAME=bce_logits_multiple_output_single_target", "LOSS.NAME", "bce_logits"),
        (
            "LOSS.cross_entropy_multiple_output_single_target.temperature=2",
            "LOSS.CROSS_ENTROPY.TEMPERATURE",
            2.0,
        ),
        ("METERS.accuracy_list_meter.topk_values=[1,5]", "METERS.ACCURACY_LIST_METER.TOPK_VALUES", [1, 5]),
        ("METERS.name=accuracy_list_meter", "METERS.NAMES", ["accuracy_list_meter"]),
        ("CHECKPOINT.DIR=runs/x", "RUN.DIR", "runs/x"),
        ("CHECKPOINT.CHECKPOINT_FREQUENCY=5", "CHECKPOINT.EVERY_EPOCHS", 5),
        ("CHECKPOINT.CHECKPOINT_ITER_FREQUENCY=-1", "CHECKPOINT.EVERY_STEPS", 0),
        ("CHECKPOINT.OVERWRITE_EXISTING=true", "RUN.OVERWRITE", True),
        ("HOOKS.TENSORBOARD_SETUP.USE_TENSORBOARD=true", "LOGGERS.TENSORBOARD.ENABLED", True),
        ("HOOKS.EMA_MODEL.SAVE_EMA_MODEL=true", "MODEL.EMA.ENABLED", True),
        ("MODEL.AMP_PARAMS.USE_AMP=true", "MACHINE.PRECISION", "fp16"),
        ("MODEL.FSDP_CONFIG.AUTO_SETUP_FSDP=true", "DISTRIBUTED.STRATEGY", "fsdp"),
        ("DISTRIBUTED.RUN_ID=host:1234", "DISTRIBUTED.ENDPOINT", "host:1234"),
        ("NEAREST_NEIGHBOR.TOPK=20", "NEAREST_NEIGHBOR.TOPK", [20]),
        ("MODEL.TRUNK.TRUNK_PARAMS.RESNETS.DEPTH=18", "MODEL.TRUNK.RESNETS.DEPTH", 18),
    ],
)
def test_old_names_on_the_command_line(override: str, key: str, value: Any) -> None:
    config, notes = _config(f"config.{override}")
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    mine = [note for note in notes if "old name" in note]
    assert len(mine) == (0 if override.startswith("NEAREST") else 1)
    assert all(note.startswith("command line: config.") and f"config.{key}" in note for note in mine)


def test_old_name_of_the_paths() -> None:
    config, notes = _config("config.DATA.TRAIN.DATA_SOURCES=[disk_folder]", "config.DATA.TRAIN.DATASET_PATHS=[.]")
    assert config.DATA.TRAIN.DATA_PATHS == ["."]
    assert any("old name" in note and "config.DATA.TRAIN.DATA_PATHS" in note for note in notes)


def test_children_of_a_composite_schedule_may_have_lower_case_keys() -> None:
    config, notes = _config(
        "config.OPTIMIZER.param_schedulers.lr={name: composite, schedulers: [{name: linear, start_value: 0.1, "
        "end_value: 0.2}, {name: step_with_fixed_gamma, num_decays: 2}], lengths: [0.5, 0.5], "
        "interval_scaling: [rescaled, fixed]}"
    )
    schedule = config.OPTIMIZER.PARAM_SCHEDULERS.LR
    assert schedule.SCHEDULERS[0] == {"NAME": "linear", "START_VALUE": 0.1, "END_VALUE": 0.2}
    assert schedule.SCHEDULERS[1] == {"NAME": "step_with_fixed_gamma", "NUM_DECAYS": 2}
    assert schedule.LENGTHS == [0.5, 0.5] and len(notes) == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("OPTIMIZER.use_larc=true", "lars"),
        ("MODEL.SHARDED_DDP_SETUP.USE_SDP=true", "STRATEGY=fsdp"),
        ("MODEL.TRUNK.VISION_TRANSFORMERS.PATCH_SIZE=14", "timm/"),
        ("LOSS.simclr_info_nce_loss.temperature=0.1", "does not exist here"),
        ("DATA.TRAIN.STRATIFIED_SAMPLER.ENABLED=true", "IS_BALANCED"),
    ],
)
def test_what_has_no_equivalent_is_an_error_with_the_reason(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match="VISSL has this option, but") as caught:
        _config(f"config.{override}")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("OPTIMIZER.param_group_constructor=dino", "OPTIMIZER.GROUPS"),
        ("OPTIMIZER.PARAM_GROUP_CONSTRUCTOR=linear_eval_heads", "OPTIMIZER.GROUPS"),
        ("METERS.NAMES=[accuracy_list_meter,mean_ap_meter]", "config.METERS.NAMES=mean_ap_meter: "),
        ("METERS.name=mean_ap_meter", "mean_ap_list_meter measures one head"),
        ("DATA.TRAIN.COLLATE_FUNCTION=simclr_collator", "one view"),
        ("DATA.TEST.COLLATE_FUNCTION=cutmixup_collator", "DATA.MIX"),
    ],
)
def test_values_without_equivalent_are_errors_with_the_reason(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match="VISSL has this value, but") as caught:
        _config(f"config.{override}")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "OPTIMIZER.use_larc=false",
        "HOOKS.PERF_STATS.MONITOR_PERF_STATS=true",
        "DATA.TRAIN.INPUT_KEY_NAMES=[data]",
        "METERS.accuracy_list_meter.num_meters=1",
    ],
)
def test_what_changes_no_result_is_a_warning(override: str) -> None:
    _, notes = _config(f"config.{override}")
    assert len(notes) == 1 and "is ignored" in notes[0]


def test_root_keys_of_vissl() -> None:
    config, notes = _config("hydra.verbose=true", "node_id=3")
    assert config.DISTRIBUTED.NODE_ID == 3 and not config.VERBOSE
    assert notes == ("command line: node_id is an old name of config.DISTRIBUTED.NODE_ID.",)
