"""Options of models, weights, losses and optimisation: MODEL, LOSS, METERS, OPTIMIZER."""

from __future__ import annotations

from typing import Any, Literal

from vissl_like.config.schema_parts import PartsLoss, PartsModel
from vissl_like.config.section import Section, group, option


class ResNets(Section):
    DEPTH: Literal[18, 34, 50, 101, 152, 200] = option(50, "Layers.")
    WIDTH_MULTIPLIER: int = option(1, "Multiplies every width.", ge=1)
    WIDTH_PER_GROUP: int = option(64, "Width of each group (ResNeXt).", ge=1)
    GROUPS: int = option(1, "Groups of the 3x3 convolutions (ResNeXt).", ge=1)
    NORM: Literal["BatchNorm", "LayerNorm", "GroupNorm"] = option(
        "BatchNorm", "Normalisation; LayerNorm is GroupNorm with one group."
    )
    GROUPNORM_GROUPS: int = option(32, "Groups of GroupNorm.", ge=1)
    ZERO_INIT_RESIDUAL: bool = option(False, "Start the last normalisation of each block at zero.")
    STANDARDIZE_CONVOLUTIONS: bool = option(False, "Standardise convolution weights.")
    LAYER4_STRIDE: Literal[1, 2] = option(2, "Stride of the last stage.")


class Trunk(Section):
    NAME: str = option("resnet", "A trunk of ours (`list trunks`), or torchvision/NAME, timm/NAME, hf/NAME.")
    RESNETS: ResNets = group(ResNets, "Options of NAME=resnet.")
    OPTIONS: dict[str, Any] = option(
        {}, "Arguments for the library's constructor (torchvision, timm, hf) or our trunk."
    )


class Head(Section):
    PARAMS: list[Any] = option(
        [["mlp", {"dims": ["auto", "auto"]}]], "One [name, options] per head; `auto` sizes are inferred."
    )
    BATCHNORM_EPS: float = option(1e-5, "Epsilon of batch normalisation in heads.", gt=0)
    BATCHNORM_MOMENTUM: float = option(0.1, "Momentum of batch normalisation in heads.", ge=0, le=1)
    PARAMS_MULTIPLIER: float = option(1.0, "Scales the initial weights of heads.", gt=0)


class FeatureEval(Section):
    EVAL_MODE_ON: bool = option(False, "Use the trunk as a feature extractor.")
    FREEZE_TRUNK_ONLY: bool = option(False, "Train the heads on a frozen trunk (kept in eval mode).")
    FREEZE_TRUNK_AND_HEAD: bool = option(False, "Freeze everything (extraction).")
    EXTRACT_TRUNK_FEATURES_ONLY: bool = option(False, "Return trunk features; skip the heads.")
    EVAL_TRUNK_AND_HEAD: bool = option(False, "Load the weights of the heads too.")
    ASSERT_HEAD_LAYER_SHAPE_INIT: bool = option(True, "A head of another shape in the weights file is an error.")
    SHOULD_FLATTEN_FEATS: bool = option(True, "Flatten pooled features to (B, D).")
    LINEAR_EVAL_FEAT_POOL_OPS_MAP: list[Any] = option([], "One [layer, [pooling, arguments]] per feature.")


class RenameRule(Section):
    PATTERN: str = option("", "Regular expression searched in each key of the file.")
    REPLACE: str = option("", "Replacement; \\1 refers to a group.")


class WeightsInit(Section):
    PARAMS_FILE: str = option(
        "", "A .pth/.pt/.torch/.ckpt/.safetensors file, a run folder, timm:NAME, torchvision:NAME or hf:NAME."
    )
    STATE_DICT_KEY_NAME: str | list[str] = option(
        "auto", "Key (or nested keys) of the state dict in the file; '' if the file is it; auto: found."
    )
    SKIP_LAYERS: list[str] = option(["num_batches_tracked"], "Model keys that contain one of these are left alone.")
    REMOVE_PREFIX: str = option("", "Prefix taken off the keys of the file, once.")
    APPEND_PREFIX: str = option("", "Prefix put before every key of the file, after REMOVE_PREFIX.")
    RENAME: list[RenameRule] = option([], "Regular-expression renames, in order, before the prefixes.")
    PRESET: str = option("", "A named set of rename rules (`list weight_presets`).")
    MIN_LOADED: float = option(0.9, "Share of trunk parameters that must be loaded.", ge=0, le=1)
    ALLOW_UNSAFE: bool = option(False, "Unpickle a file that needs code to load. Only for files you trust.")


class SyncBN(Section):
    CONVERT_BN_TO_SYNC_BN: bool = option(False, "Normalise over all processes (GPU).")
    GROUP_SIZE: int = option(-1, "-1: the processes of a node; 0: all; N: groups of N.", ge=-1)


class ActivationCheckpointing(Section):
    USE_ACTIVATION_CHECKPOINTING: bool = option(
        False, "Keep the inputs of the trunk's repeated blocks only and compute the rest again: less memory, more time."
    )


class GradClip(Section):
    USE_GRAD_CLIP: bool = option(False, "Clip gradients by their norm.")
    NORM_TYPE: float = option(2.0, "Order of the norm.", gt=0)
    MAX_NORM: float = option(1.0, "Largest norm.", gt=0)


class Ema(Section):
    ENABLED: bool = option(False, "Keep an exponential moving average of the weights and evaluate it too.")
    DECAY: float = option(0.9999, "Decay per update.", ge=0, lt=1)
    WARMUP: float = option(0.05, "Share of training during which the average only copies.", ge=0, le=1)
    RISING_DECAY: bool = option(False, "Decay 1 - (1 + updates)^(-2/3) until that exceeds DECAY (timm's warm-up).")
    UPDATE_ITER: int = option(1, "Steps between updates.", ge=1)


class Model(Section):
    NAME: str = option(
        "vision", "Kind of model: vision (a trunk with heads), or one of part discovery (`list model_kinds`)."
    )
    TRUNK: Trunk = group(Trunk, "The feature network.")
    HEAD: Head = group(Head, "What stands on the features.")
    PARTS: PartsModel = group(PartsModel, "Part discovery: prototypes, masks and the second stage.")
    INPUT_TYPE: Literal["rgb", "bgr", "lab"] = option("rgb", "Channel order or colour space that the model takes.")
    FEATURE_EVAL_SETTINGS: FeatureEval = group(FeatureEval, "Frozen-trunk evaluation and extraction.")
    WEIGHTS_INIT: WeightsInit = group(WeightsInit, "Initial weights from any published checkpoint.")
    NON_TRAINABLE_PARAMS: list[str] = option([], "Exact names of parameters that are never trained.")
    SYNC_BN_CONFIG: SyncBN = group(SyncBN, "Synchronised batch normalisation.")
    ACTIVATION_CHECKPOINTING: ActivationCheckpointing = group(ActivationCheckpointing, "Memory against time.")
    GRAD_CLIP: GradClip = group(GradClip, "Gradient clipping.")
    EMA: Ema = group(Ema, "Average of the weights.")


class CrossEntropy(Section):
    TEMPERATURE: float = option(1.0, "Divides the logits.", gt=0)
    NORMALIZE_OUTPUT: bool = option(False, "L2-normalise the logits first.")
    LABEL_SMOOTHING: float = option(0.0, "Share of the target spread over all classes.", ge=0, lt=1)
    IGNORE_INDEX: int = option(-1, "Targets of this value do not count.")
    WEIGHT: list[float] | None = option(None, "Weight per class.")


class BceLogits(Section):
    REDUCTION: Literal["mean", "sum", "none"] = option(
        "mean", "How elements are combined; none: sum over classes, mean over images."
    )


class Loss(Section):
    NAME: str = option("cross_entropy", "The loss (`list losses`); its options stand in the section of the same name.")
    CROSS_ENTROPY: CrossEntropy = group(CrossEntropy, "Sum over heads of the cross-entropy.")
    BCE_LOGITS: BceLogits = group(BceLogits, "Multi-label binary cross-entropy.")
    PARTS: PartsLoss = group(PartsLoss, "Terms of part discovery.")


class ListMeter(Section):
    TOPK_VALUES: list[int] = option([1], "The k of top-k.")
    METER_NAMES: list[str] = option([], "A name per head. Empty: their numbers.")


class MeanApMeter(Section):
    METER_NAMES: list[str] = option([], "A name per head. Empty: their numbers.")


class Meters(Section):
    NAMES: list[
        Literal["accuracy_list_meter", "precision_at_k_list_meter", "recall_at_k_list_meter", "mean_ap_list_meter"]
    ] = option(["accuracy_list_meter"], "Meters of training and test.")
    ENABLE_TRAINING_METER: bool = option(True, "Also measure during training.")
    ACCURACY_LIST_METER: ListMeter = group(ListMeter, "Top-k accuracy in percent.")
    PRECISION_AT_K_LIST_METER: ListMeter = group(ListMeter, "Multi-label precision at k in percent.")
    RECALL_AT_K_LIST_METER: ListMeter = group(ListMeter, "Multi-label recall at k in percent.")
    MEAN_AP_LIST_METER: MeanApMeter = group(MeanApMeter, "Mean average precision in percent.")


class AutoLrScaling(Section):
    AUTO_SCALE: bool = option(False, "Scale the learning rate by the global batch size.")
    BASE_VALUE: float = option(0.1, "Learning rate at BASE_LR_BATCH_SIZE.", ge=0)
    BASE_LR_BATCH_SIZE: int = option(256, "Batch size that BASE_VALUE belongs to.", ge=1)
    SCALING_TYPE: Literal["linear", "sqrt"] = option(
        "linear",
        "linear: BASE_VALUE x batch / BASE_LR_BATCH_SIZE; sqrt: BASE_VALUE x sqrt(batch / BASE_LR_BATCH_SIZE), the rule of "
        "the part models. The batch is that of a whole step: all processes, accumulated passes included.",
    )


class Schedule(Section):
    AUTO_LR_SCALING: AutoLrScaling = group(AutoLrScaling, "Scaling by batch size.")
    NAME: str = option("multistep", "Schedule (`list schedules`).")
    UPDATE_INTERVAL: Literal["epoch", "step"] = option("epoch", "When the value changes.")
    VALUE: float = option(0.1, "constant: the value.")
    VALUES: list[float] = option([0.1, 0.01, 0.001], "step, multistep: the value of each span.")
    MILESTONES: list[int] = option([30, 60], "multistep: the epochs at which the value changes.")
    START_VALUE: float = option(0.1, "First value of cosine, linear, inverse_sqrt and others.")
    END_VALUE: float = option(0.0, "Last value of cosine and linear; timm_cosine: of every parameter group.")
    BASE_VALUE: float = option(0.1, "polynomial, step_with_fixed_gamma: first value.")
    POWER: float = option(1.0, "polynomial: exponent.")
    DECAY: float = option(0.1, "exponential: the last value as a share of the first.")
    GAMMA: float = option(0.1, "step_with_fixed_gamma, timm_step: factor at each step.")
    NUM_DECAYS: int = option(3, "step_with_fixed_gamma: number of steps.", ge=1)
    WARMUP_INTERVAL_LENGTH: float = option(
        0.0, "inverse_sqrt: share of training at which the value is START_VALUE.", ge=0, le=1
    )
    RESTART_INTERVAL_LENGTH: float = option(1.0, "cosine_warm_restart: share of training per cycle.", gt=0, le=1)
    WAVE_TYPE: Literal["half", "full"] = option("half", "cosine_warm_restart: half or full waves.")
    LR_MULTIPLIER: float = option(1.0, "cosine_warm_restart: factor at each restart.")
    IS_ADAPTIVE: bool = option(False, "cosine_warm_restart: peaks follow one cosine over the whole training.")
    WARMUP_EPOCHS: int = option(0, "timm_*: epochs in which the rate rises from WARMUP_VALUE to its value.", ge=0)
    WARMUP_VALUE: float = option(0.0, "timm_*: rate of every parameter group at the start of the warm-up.", ge=0)
    STEP_EPOCHS: int = option(10, "timm_step: epochs between two multiplications by GAMMA.", ge=1)
    SCHEDULERS: list[dict[str, Any]] = option([], "composite: the children, in order.")
    LENGTHS: list[float] = option([], "composite: share of training of each child; they add up to 1.")
    INTERVAL_SCALING: list[Literal["fixed", "rescaled"]] = option(
        [], "composite: rescaled children see 0..1 over their own span."
    )


class ParamSchedulers(Section):
    LR: Schedule = group(Schedule, "Learning rate.")
    LR_HEAD: Schedule = group(Schedule, "Learning rate of heads, if HEAD_OPTIMIZER_PARAMS.USE_DIFFERENT_LR.")
    WEIGHT_DECAY: Schedule | None = option(None, "Weight decay over time. Null: constant OPTIMIZER.WEIGHT_DECAY.")


class HeadOptimizer(Section):
    USE_DIFFERENT_LR: bool = option(False, "Heads follow PARAM_SCHEDULERS.LR_HEAD.")
    USE_DIFFERENT_WD: bool = option(False, "Heads have their own weight decay.")
    WEIGHT_DECAY: float = option(1e-4, "Weight decay of heads.", ge=0)


class LayerWiseLrDecay(Section):
    DECAY: float = option(0.9, "Learning rate factor per layer, from the last to the first.", gt=0, le=1)


class ParamGroup(Section):
    MATCH: str = option("", "Regular expression searched in parameter names; the first matching group wins.")
    LR_FACTOR: float = option(1.0, "Multiplies the scheduled learning rate.", ge=0)
    WEIGHT_DECAY: float | None = option(None, "Weight decay of this group. Null: by the general rules.")


class PartFactors(Section):
    SCRATCH_LR_FACTOR: float = option(1e4, "Classifiers of both stages.", ge=0)
    FINER_LR_FACTOR: float = option(1e3, "Prototypes.", ge=0)
    MODULATION_LR_FACTOR: float = option(1e4, "Modulation.", ge=0)
    STAGE_TWO_LR_FACTOR: float = option(1.0, "Backbone and tokens of stage 2.", ge=0)
    BACKBONE_LR_FACTOR: float = option(1.0, "Backbone and tokens of stage 1 (of the only stage).", ge=0)


class Optimizer(Section):
    NAME: str = option("sgd", "Optimizer (`list optimizers`), or timm/NAME.")
    NUM_EPOCHS: int = option(90, "Epochs of training.", ge=0)
    ACCUMULATE_STEPS: int = option(1, "Forward and backward passes per optimizer step.", ge=1)
    WEIGHT_DECAY: float = option(1e-4, "Weight decay of regularised parameters.", ge=0)
    MOMENTUM: float = option(0.9, "sgd, lars, rmsprop: momentum.", ge=0, lt=1)
    NESTEROV: bool = option(False, "sgd, lars: Nesterov momentum.")
    BETAS: tuple[float, float] = option((0.9, 0.999), "adam, adamw: decay of the averages.")
    EPS: float = option(1e-8, "adam, adamw, rmsprop: epsilon.", gt=0)
    TRUST_COEFFICIENT: float = option(0.001, "lars: trust coefficient.", gt=0)
    OPTIONS: dict[str, Any] = option({}, "Further arguments of the optimizer's constructor.")
    REGULARIZE_BN: bool = option(False, "Weight decay on normalisation layers.")
    REGULARIZE_BIAS: bool = option(True, "Weight decay on biases.")
    NON_REGULARIZED_PARAMETERS: list[str] = option(
        [], "No weight decay on parameters whose name contains one of these."
    )
    CONSTRUCT_SINGLE_PARAM_GROUP_ONLY: bool = option(False, "One group with the same options for everything.")
    NORMALIZED_WEIGHT_DECAY: bool = option(
        False, "Multiply WEIGHT_DECAY by sqrt(1 / (batches per epoch x epochs)), arXiv:1711.05101, appendix B.1."
    )
    PARAM_GROUP_CONSTRUCTOR: Literal["default", "lr_decay", "parts"] = option(
        "default", "How parameters are grouped; parts: by their role in a model of part discovery (PARTS)."
    )
    PARTS: PartFactors = group(PartFactors, "Factors of the learning rate, with PARAM_GROUP_CONSTRUCTOR=parts.")
    LAYER_WISE_LR_DECAY: LayerWiseLrDecay = group(LayerWiseLrDecay, "Options of lr_decay.")
    HEAD_OPTIMIZER_PARAMS: HeadOptimizer = group(HeadOptimizer, "Different options for heads.")
    GROUPS: list[ParamGroup] = option([], "Own groups by name, before the general rules.")
    PARAM_SCHEDULERS: ParamSchedulers = group(ParamSchedulers, "Values over time.")
