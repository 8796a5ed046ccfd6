"""Part discovery: images with class labels in, parts out. PDiscoFormer, iFAM and the models that they are compared with.

The model decides what there is to learn: part losses where it has parts, a cross-entropy for each classifier.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vissl_like.analysis.class_metrics import ClassMetrics, TestFacts
from vissl_like.config.schema_model import Loss
from vissl_like.config.schema_parts import PartsLoss
from vissl_like.core import distributed
from vissl_like.data.mix import make_mix
from vissl_like.errors import ConfigError, DataError
from vissl_like.losses import affine as affine_maps
from vissl_like.losses import parts as losses
from vissl_like.losses.affine import Affine
from vissl_like.models.masked_vit import Decoupled
from vissl_like.models.part_groups import freeze_idle
from vissl_like.models.parts import PartNoise, PartsOutput, StageOne
from vissl_like.models.two_stage import TwoStage, TwoStageOutput
from vissl_like.outputs.part_figures import Drawing
from vissl_like.tasks.request import TaskRequest

log = logging.getLogger(__name__)

#: What a model gives for images: the logits of its classifiers, the one that counts first.
Logits = list[Tensor]
#: What the names of their accuracies end with.
SUFFIXES = ("", "_stage_1")


@dataclass(frozen=True)
class Predicted:
    """What a model says of a test batch; `maps` (B, K+1, h, w) where there are parts."""

    logits: Logits
    maps: Tensor | None = None


class Parts(nn.Module):
    """The task of all part models: losses of LOSS.PARTS, accuracies of both stages.

    Batches hold data (B, 3, H, W), label (B,) int64, index (B,) and, for decoupled models, mask (B, H', W').
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss,
        num_classes: int,
        facts: TestFacts | None = None,
        class_names: Sequence[str] = (),
        mix: Any = None,
        measure_training: bool = True,
        drawing: Drawing | None = None,
    ) -> None:
        """`mix`: callable(images, labels) -> (images, soft labels), for mixup and cutmix. `drawing`: of the test's maps."""
        super().__init__()
        self.model, self.options, self.num_classes, self.mix = model, loss.PARTS, num_classes, mix
        self.measure_training, self.drawing = measure_training, drawing
        count = 2 if isinstance(model, TwoStage) else 1
        self.tested = [ClassMetrics(num_classes, facts=facts, class_names=class_names) for _ in range(count)]
        self.trained = [ClassMetrics(num_classes, class_names=class_names, with_auroc=False) for _ in range(count)]

    @classmethod
    def build(cls, model: nn.Module, request: TaskRequest) -> Parts:
        """The task of a run."""
        assert request.num_classes is not None
        _train_what_learns(model, request.loss.PARTS)
        mix = make_mix(request.mix, num_classes=request.num_classes, smoothing=request.loss.PARTS.SMOOTHING)
        if mix is not None and isinstance(model, Decoupled):
            raise ConfigError("config.DATA.MIX: images are mixed, their masks are not; leave it off with given masks.")
        return cls(
            model,
            loss=request.loss,
            mix=mix,
            num_classes=request.num_classes,
            facts=request.facts,
            class_names=request.class_names,
            measure_training=request.meters.ENABLE_TRAINING_METER,
            drawing=request.drawing,
        )

    @property
    def draws_in_test(self) -> bool:
        """Whether evaluation is random (EVAL_GUMBEL)."""
        options = getattr(self.model, "options", None) or getattr(getattr(self.model, "heads", None), "options", None)
        return bool(getattr(options, "EVAL_GUMBEL", False))

    # ------------------------------------------------------------------------------------------------------- training
    def forward(
        self,
        batch: Mapping[str, Any],
        *,
        noise: PartNoise | None = None,
        twin_noise: PartNoise | None = None,
        affine: Affine | None = None,
    ) -> dict[str, Tensor]:
        """The training step: {"loss": (), and each term with its weight}. What is not given is drawn."""
        images, labels = batch["data"], batch["label"]
        targets = labels
        if self.mix is not None:
            images, targets = self.mix(images, labels)
        if isinstance(self.model, StageOne | TwoStage):
            logits, terms = self._with_parts(images, noise=noise, twin_noise=twin_noise, affine=affine)
        else:
            logits, terms = [self._plain(batch, images)], {}
        weights = [self.options.CLASSIFICATION_LOSS_STAGE_2, self.options.CLASSIFICATION_LOSS]
        if isinstance(self.model, StageOne):
            weights = weights[1:]
        for values, weight, suffix in zip(logits, weights, SUFFIXES):
            if weight:
                terms[f"loss_classification{suffix}"] = weight * classification(values, targets, self.options)
        self._count_training(logits, labels)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    training_step = forward

    def _plain(self, batch: Mapping[str, Any], images: Tensor) -> Tensor:
        return self.model(images, batch["mask"]) if isinstance(self.model, Decoupled) else self.model(images)

    def _with_parts(
        self, images: Tensor, *, noise: PartNoise | None, twin_noise: PartNoise | None, affine: Affine | None
    ) -> tuple[Logits, dict[str, Tensor]]:
        """One pass of the model; the transformed images go through stage 1 in the same pass."""
        twin, size = None, (images.shape[2], images.shape[3])
        if self.options.EQUIVARIANCE_LOSS:
            affine = affine or draw(self.options, size)
            twin = affine_maps.warp(images, affine)
        output = self.model(images, noise=noise, twin=twin, twin_noise=twin_noise)
        stage_one = output.stage_one if isinstance(output, TwoStageOutput) else output
        logits = [output.logits, stage_one.logits] if isinstance(output, TwoStageOutput) else [output.logits]
        terms = part_terms(stage_one, self.options)
        if output.twin is not None and affine is not None:
            terms["loss_equiv"] = self.options.EQUIVARIANCE_LOSS * equivariance(
                stage_one.maps, output.twin.maps, affine, size=size, options=self.options
            )
        return logits, terms

    def _count_training(self, logits: Logits, labels: Tensor) -> None:
        if self.measure_training:
            for counts, values in zip(self.trained, logits):
                counts.update(values, labels)

    # ----------------------------------------------------------------------------------------------------------- test
    def predict(self, model: nn.Module, batch: Mapping[str, Any]) -> Predicted:
        """Logits (B, C) of the classifier that counts, then of stage 1 where there are two."""
        if isinstance(model, Decoupled):
            return Predicted([model(batch["data"], batch["mask"])])
        return predicted(model(batch["data"]))

    def score(self, outputs: Predicted, batch: Mapping[str, Any]) -> Tensor:
        """Count a batch, and draw it if it is one of those; returns the sum of the plain cross-entropies, ()."""
        for counts, values in zip(self.tested, outputs.logits):
            counts.update(values, batch["label"], rows=batch["index"])
        self._draw(outputs.maps, batch)
        return torch.stack([F.cross_entropy(values.float(), batch["label"]) for values in outputs.logits]).sum()

    def _draw(self, maps: Tensor | None, batch: Mapping[str, Any]) -> None:
        """A picture that cannot be written is no reason to end a training."""
        epoch = batch.get("epoch")
        if self.drawing is None or maps is None or epoch is None:
            return
        try:
            self.drawing.draw(batch["data"], maps, rows=batch["index"].tolist(), epoch=epoch)
        except DataError as problem:
            log.warning("%s The run goes on without this picture.", problem)

    def test_metrics(self, prefix: str) -> dict[str, float]:
        """Accuracies of all ranks; the counts start again. A collective call."""
        return _flatten(self.tested, prefix)

    def train_metrics(self, prefix: str) -> dict[str, float]:
        """Accuracies of the training steps on all ranks; the counts start again. A collective call."""
        return _flatten(self.trained, prefix) if self.measure_training else {}

    def running_state(self) -> list[dict[str, Any]]:
        """This rank's counts of the epoch so far."""
        return [counts.state() for counts in self.trained] if self.measure_training else []

    def load_running_state(self, states: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Go on counting from the sum of these ranks' states."""
        for counts in self.trained:
            counts.reset()
        for of_rank in states:
            for counts, state in zip(self.trained, of_rank):
                counts.add_state(dict(state))


def _train_what_learns(model: nn.Module, options: PartsLoss) -> None:
    """Freeze what no term of the loss has a gradient for; ConfigError if there is no term at all."""
    is_alone = not isinstance(model, StageOne | TwoStage)
    idle = [] if is_alone else freeze_idle(model, options)
    if (is_alone and not options.CLASSIFICATION_LOSS_STAGE_2) or not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "config.LOSS.PARTS: every term that this model has is of weight 0 (or all that it reaches is frozen, "
            "config.MODEL.PARTS.FREEZE_*): there is nothing to learn. Set "
            f"config.LOSS.PARTS.CLASSIFICATION_LOSS{'' if isinstance(model, StageOne) else '_STAGE_2'}=1."
        )
    if idle:
        log.info("not trained, since no term of config.LOSS.PARTS has a gradient for it: %s", ", ".join(idle))


def predicted(output: TwoStageOutput | PartsOutput | Tensor) -> Predicted:
    """What a model of any kind gave for images, in one form."""
    if isinstance(output, TwoStageOutput):
        return Predicted([output.logits, output.stage_one.logits], output.stage_one.maps)
    return Predicted([output.logits], output.maps) if isinstance(output, PartsOutput) else Predicted([output])


def _flatten(counted: Sequence[ClassMetrics], prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for counts, suffix in zip(counted, SUFFIXES):
        found |= counts.flatten(prefix, suffix=suffix)
        counts.reset()
    return found


# --------------------------------------------------------------------------------------------------------------- terms
def classification(logits: Tensor, targets: Tensor, options: PartsLoss) -> Tensor:
    """Cross-entropy of logits (B, C) for labels (B,), smoothed, or targets (B, C) as they are; or BCE over the classes."""
    logits = losses.full(logits)
    if not options.USE_BCE_LOSS:
        smoothing = options.SMOOTHING if targets.ndim == 1 else 0.0  # mixed targets are smooth already (data/mix.py)
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
    wanted = targets.to(logits.dtype) if targets.ndim == 2 else F.one_hot(targets, logits.shape[1]).to(logits.dtype)
    if options.SMOOTHING and targets.ndim == 1:
        wanted = wanted * (1 - options.SMOOTHING) + options.SMOOTHING / logits.shape[1]
    if options.BCE_TARGET_THRESH is not None:
        wanted = (wanted > options.BCE_TARGET_THRESH).to(logits.dtype)
    weight = None if options.BCE_POS_WEIGHT is None else logits.new_tensor(options.BCE_POS_WEIGHT)
    values = F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight, reduction="none")
    return values.sum(dim=1).mean() if options.BCE_SUM else values.mean()


def part_terms(output: PartsOutput, options: PartsLoss) -> dict[str, Tensor]:
    """What the maps and features of one batch contribute, each with its weight; terms without weight are left out."""
    maps, background = output.maps, output.maps[:, -1]
    makers = {
        "loss_tv": (options.TOTAL_VARIATION_LOSS, lambda: losses.total_variation(maps)),
        "loss_conc": (
            options.CONCENTRATION_LOSS,
            lambda: losses.concentration(maps[:, :-1], square=options.CONCENTRATION_SQUARE),
        ),
        "loss_enforced_presence": (
            options.ENFORCED_PRESENCE_LOSS,
            lambda: losses.enforced_presence(background, kind=options.ENFORCED_PRESENCE_LOSS_TYPE),
        ),
        "loss_background_area": (
            options.BACKGROUND_AREA_LOSS,
            lambda: losses.enforced_presence(background, kind="linear"),
        ),
        "loss_presence": (options.PRESENCE_LOSS, lambda: presence(maps, options)),
        "loss_pixel_wise_entropy": (options.PIXEL_WISE_ENTROPY_LOSS, lambda: losses.pixel_wise_entropy(maps)),
        "loss_orth": (
            options.ORTHOGONALITY_LOSS_LANDMARKS,
            lambda: losses.orthogonality(output.features, transposed=options.ORTHOGONALITY_TRANSPOSED),
        ),
    }
    return {name: weight * make() for name, (weight, make) in makers.items() if weight}


def presence(maps: Tensor, options: PartsLoss) -> Tensor:
    """Each part is seen in the batch of this process, or (PRESENCE_BATCH=global) in that of all."""
    peaks = losses.part_peaks(maps[:, :-1])
    if options.PRESENCE_BATCH == "global":
        peaks = distributed.gather_with_gradient(peaks)
    return losses.presence(peaks, kind=options.PRESENCE_LOSS_TYPE, beta=options.PRESENCE_LOSS_BETA)


def draw(options: PartsLoss, size: tuple[int, int]) -> Affine:
    """The transformation of a step, the same for all images of the process."""
    return affine_maps.draw_affine(
        size,
        degrees=options.DEGREES,
        translate=(options.TRANSLATE_X, options.TRANSLATE_Y),
        scale=(options.SCALE_L, options.SCALE_U),
    )


def equivariance(maps: Tensor, twin: Tensor, affine: Affine, *, size: tuple[int, int], options: PartsLoss) -> Tensor:
    """Part maps (B, K+1, h, w) of images of `size` and of the transformed images, compared where they came from."""
    back = affine_maps.warp_back(twin[:, :-1], affine, image_size=size, method=options.EQUIVARIANCE_WARP)
    inside = affine_maps.inside(twin, affine, image_size=size) if options.EQUIVARIANCE_IGNORE_OUTSIDE else None
    return losses.equivariance(maps[:, :-1], back, inside=inside)
