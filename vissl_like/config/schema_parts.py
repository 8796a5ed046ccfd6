"""Options of part discovery: the models (MODEL.PARTS) and their losses (LOSS.PARTS). K parts and one background."""

from __future__ import annotations

from typing import Any, Literal

from vissl_like.config.section import Section, group, option


class StageTwoTrunk(Section):
    NAME: str = option("", "A Vision Transformer, timm/NAME or hf/NAME. Empty: the one of MODEL.TRUNK.")
    OPTIONS: dict[str, Any] = option({}, "Arguments for its constructor. With an empty NAME: beside MODEL.TRUNK's.")


class PartsModel(Section):
    NUM_PARTS: int = option(8, "Foreground parts K; the background is one more prototype.", ge=1)
    PROTOTYPE_INIT: Literal["random", "kmeans"] = option(
        "random",
        "kmeans: the background from the borders of training images, parts by clustering what differs from it.",
    )
    PROTOTYPE_IMAGES: int = option(400, "PROTOTYPE_INIT=kmeans: training images that are clustered.", ge=1)
    PROTOTYPE_RESTARTS: int = option(3, "PROTOTYPE_INIT=kmeans: runs, of which the lowest objective counts.", ge=1)
    SOFTMAX_TEMPERATURE: float = option(1.0, "Divides distances (and noise) before the softmax over parts.", gt=0)
    GUMBEL_SOFTMAX: bool = option(True, "Add Gumbel noise to the distances in training.")
    GUMBEL_SOFTMAX_HARD: bool = option(
        False, "With GUMBEL_SOFTMAX, single stage: one-hot maps with the gradient of the soft ones (straight-through)."
    )
    EVAL_GUMBEL: bool = option(False, "Noise at evaluation too, as in the original; results are then random.")
    SHARED_GUMBEL: bool = option(
        True, "One noise sample for maps and mask. false: two draws, and noise in the mask always, as in the original."
    )
    TEMPERATURE_NEEDS_GUMBEL: bool = option(
        False, "SOFTMAX_TEMPERATURE acts only together with GUMBEL_SOFTMAX, as in PDiscoFormer."
    )
    MODULATION_TYPE: Literal[
        "original", "layer_norm", "parallel_mlp", "parallel_mlp_no_bias", "parallel_mlp_no_act",
        "parallel_mlp_no_act_no_bias", "none",
    ] = option("layer_norm", "What is done to each part's feature before the classifier.")  # fmt: skip
    MODULATION_ORTH: bool = option(True, "The orthogonality loss sees modulated features; false: those before.")
    CLASSIFIER_TYPE: Literal["linear", "independent_mlp"] = option(
        "linear", "Head of stage 1: one for all parts, or normalisation and a linear layer per part."
    )
    NOISE_VARIANCE: float = option(
        0.0,
        "Training only: noise on map x feature at each position, as a share of the features' standard deviation.",
        ge=0,
    )
    PART_DROPOUT: float = option(0.3, "Probability that a part is left out of the stage-1 class scores.", ge=0, lt=1)
    PART_DROPOUT_STAGE_2: float = option(0.3, "Probability that a part is left out of the mask.", ge=0, lt=1)
    DROP_PATH_STAGE_1: float = option(0.0, "Stochastic depth of the stage-1 backbone.", ge=0, lt=1)
    DROP_PATH_STAGE_2: float = option(0.0, "Stochastic depth of the stage-2 backbone.", ge=0, lt=1)
    OUTPUT_STRIDE: int = option(32, "timm CNNs: input pixels per cell of the last stage.", ge=1)
    STAGE_TWO_TRUNK: StageTwoTrunk = group(StageTwoTrunk, "Backbone of stage 2.")
    USE_SOFT_MASKS: bool = option(
        False, "Stage 2: weigh tokens by their foreground probability instead of a hard mask."
    )
    MASK_GRADIENT: Literal["none", "straight_through"] = option(
        "none", "Hard masks: whether the loss of stage 2 reaches stage 1, through the soft mask."
    )
    PRUNE_TOKENS: bool = option(True, "Hard masks at evaluation: leave background tokens out (same result, less work).")
    LATE_MASKING: bool = option(
        False, "Decoupled model: unmasked transformer; the mask acts on the final tokens, which are averaged."
    )
    POOLING_TYPE: Literal["cls", "gap", "gap_cls", "ep", "aim"] = option(
        "cls", "Baseline: class token, mean of patch tokens, both, efficient probing, attention pooling."
    )
    REMOVE_PARTS: list[int] = option([], "Evaluation: parts (from 0) whose tokens are taken out of the mask.")
    PART_LOGITS_THRESHOLD_PATH: str = option(
        "", "Evaluation: JSON {part: least inner product with the prototype}; tokens below belong to no such part."
    )
    PART_LOGITS_THRESHOLD_METRIC: Literal["distance", "dot"] = option(
        "distance", "With thresholds, parts compete by distance; dot: by inner product, as in the original."
    )
    FREEZE_BACKBONE: bool = option(False, "Train of stage 1 only tokens, positions and part layers.")
    FREEZE_PARAMS_STAGE_1: bool = option(False, "Freeze tokens and position embeddings of stage 1.")
    FREEZE_PARAMS_STAGE_2: bool = option(False, "Freeze tokens and position embeddings of stage 2.")
    FREEZE_SECOND_STAGE: bool = option(False, "Train of stage 2 only tokens, positions and head.")


class PartsLoss(Section):
    """Weights of the terms; a term of weight 0 is not computed."""

    CLASSIFICATION_LOSS: float = option(1.0, "Weight: cross-entropy of stage 1.", ge=0)
    CLASSIFICATION_LOSS_STAGE_2: float = option(1.0, "Weight: cross-entropy of stage 2.", ge=0)
    TOTAL_VARIATION_LOSS: float = option(1.0, "Weight: total variation of all maps.", ge=0)
    CONCENTRATION_LOSS: float = option(0.0, "Weight: spatial variance of each part (small; try 1000).", ge=0)
    CONCENTRATION_SQUARE: bool = option(
        False, "Divide row offsets by the width and column offsets by the height, as in the original."
    )
    ENFORCED_PRESENCE_LOSS: float = option(2.0, "Weight: the background is there, near the border.", ge=0)
    ENFORCED_PRESENCE_LOSS_TYPE: Literal["enforced_presence", "log", "linear", "mse"] = option(
        "enforced_presence", "Border term, or a function of the background's mean share of the image."
    )
    BACKGROUND_AREA_LOSS: float = option(0.0, "Weight: 1 - the background's mean share, beside the term above.", ge=0)
    PRESENCE_LOSS: float = option(1.0, "Weight: each part is seen somewhere in the batch.", ge=0)
    PRESENCE_LOSS_TYPE: Literal["original", "soft_constraint", "tanh", "soft_tanh"] = option(
        "original", "How a part's largest activations become a loss."
    )
    PRESENCE_LOSS_BETA: float = option(0.1, "soft_constraint: weight left for parts that are not seen.", ge=0, le=1)
    PRESENCE_BATCH: Literal["process", "global"] = option(
        "process", "Batch over which a part must be seen: that of each process, as in the original, or of all."
    )
    PIXEL_WISE_ENTROPY_LOSS: float = option(1.0, "Weight: entropy over parts at each position.", ge=0)
    ORTHOGONALITY_LOSS_LANDMARKS: float = option(1.0, "Weight: features of different parts are orthogonal.", ge=0)
    ORTHOGONALITY_TRANSPOSED: bool = option(
        False, "Compare feature dimensions instead of parts, as iFAM's trainer does by mistake."
    )
    EQUIVARIANCE_LOSS: float = option(1.0, "Weight: maps of a transformed image are the transformed maps.", ge=0)
    EQUIVARIANCE_WARP: Literal["bilinear", "nearest_two_step"] = option(
        "bilinear", "How maps are warped back; nearest_two_step: shift, then turn and scale, as in the original."
    )
    EQUIVARIANCE_IGNORE_OUTSIDE: bool = option(False, "Leave out positions that the transformation moved out of view.")
    DEGREES: float = option(90.0, "Equivariance: largest angle.", ge=0, le=180)
    TRANSLATE_X: float = option(0.11, "Equivariance: largest shift as a share of the width.", ge=0, le=1)
    TRANSLATE_Y: float = option(0.11, "Equivariance: largest shift as a share of the height.", ge=0, le=1)
    SCALE_L: float = option(0.8, "Equivariance: smallest scale.", gt=0)
    SCALE_U: float = option(1.4, "Equivariance: largest scale.", gt=0)
    SMOOTHING: float = option(0.0, "Label smoothing of both cross-entropies in training.", ge=0, lt=1)
    USE_BCE_LOSS: bool = option(False, "Binary cross-entropy per class instead of cross-entropy in training.")
    BCE_SUM: bool = option(False, "BCE: sum over classes instead of mean.")
    BCE_TARGET_THRESH: float | None = option(None, "BCE: soft targets above this count as 1, others as 0.")
    BCE_POS_WEIGHT: float | None = option(None, "BCE: weight of positive targets.")


class PartMaps(Section):
    SAVING_PROB: float = option(
        0.05,
        "Share of the test batches whose part maps are drawn into RUN.DIR/part_maps; the first one always is. 0: none.",
        ge=0,
        le=1,
    )
    EVERY_EPOCHS: int = option(10, "Of models in training: every this many epochs, the first and the last.", ge=1)
    HEAT_MAPS: bool = option(False, "Also draw the map of each part by itself.")
    MAX_IMAGES: int = option(16, "Images of a batch that are drawn.", ge=1)


class Backgrounds(Section):
    PATH: str = option(
        "",
        "Folder of ImageNet-9 (backgrounds challenge): VARIANT/val/CLASS/*, fg_mask/val/CLASS/*.npy, in_to_in9.json.",
    )
    VARIANTS: list[str] = option(
        ["original", "mixed_same", "mixed_rand"], "in9: sub-folders of PATH whose accuracy is measured."
    )
    ONLY_BACKGROUNDS: str = option("only_bg_t", "background_challenge: sub-folder of the backgrounds alone.")
    CLASS_MAP: str = option(
        "", "JSON {class of the model: 0 to 8, or -1 for none}. Empty: in_to_in9.json in PATH. Not used with 9 classes."
    )


class Speed(Section):
    REPEATS: int = option(30, "Batches that are timed, each with pruned and with unpruned tokens.", ge=2)
    WARMUP: int = option(3, "Batches before them that are not.", ge=0)
    SHARES: list[float] = option(
        [1.0, 0.75, 0.5, 0.25, 0.1],
        "Foreground shares of random masks that stage 2 is timed with, beside the model's own masks.",
    )


class EvaluateParts(Section):
    PROTOCOLS: list[
        Literal[
            "classification", "keypoints", "regression", "foreground", "part_masks", "leave_one_out", "thresholds",
            "in9", "background_challenge", "speed",
        ]
    ] = option(["classification", "keypoints", "regression", "foreground"], "What is measured.")  # fmt: skip
    BACKGROUNDS: Backgrounds = group(Backgrounds, "What in9 and background_challenge measure.")
    SPEED: Speed = group(Speed, "How speed is measured: images per second of evaluation, on the first batch of TEST.")
    BASELINES: bool = option(False, "Also measure random maps (random_*) and annotated part masks (oracle_*).")
    FIXED_PARTS: list[int] = option([], "leave_one_out: parts that are removed in every run beside the one.")
    QUANTILES: list[float] = option([0.01, 0.03, 0.05, 0.1], "thresholds: shares of a part's tokens that may be lost.")
