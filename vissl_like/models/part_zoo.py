"""From MODEL of the configuration to a model of part discovery, randomly initialised and frozen where asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vissl_like.config.schema_model import Model
from vissl_like.config.schema_model import Trunk as TrunkSection
from vissl_like.errors import ConfigError
from vissl_like.models.colour import ColourModel
from vissl_like.models.masked_vit import Decoupled, check_masked
from vissl_like.models.part_backbones import MapTrunk, TokenTrunk, build_part_trunk, refuse_stride
from vissl_like.models.part_groups import PartModel, freeze
from vissl_like.models.parts import PartLayers, StageOne
from vissl_like.models.pooled_vit import PooledModel
from vissl_like.models.trunk import FLATTEN
from vissl_like.models.two_stage import TwoStage
from vissl_like.models.zoo import build_trunk

ImageSize = int | tuple[int, int] | None


@dataclass(frozen=True)
class _Request:
    model: Model
    num_classes: int
    image_size: ImageSize

    def trunk(self, section: TrunkSection, *, stage: int) -> MapTrunk | TokenTrunk:
        options = self.model.PARTS
        return build_part_trunk(
            section,
            image_size=self.image_size,
            drop_path=options.DROP_PATH_STAGE_1 if stage == 1 else options.DROP_PATH_STAGE_2,
            output_stride=options.OUTPUT_STRIDE if stage == 1 else 32,
            drop_path_key=f"DROP_PATH_STAGE_{stage}",
        )


def build_part_model(
    kind: str, model: Model, *, num_classes: int | None, image_size: int | tuple[int, int] | None = None
) -> PartModel:
    """The model of this kind (a key of PART_MODELS) for images of image_size pixels (side, or height and width).

    ConfigError for a backbone that does not fit the kind.
    """
    if num_classes is None:
        raise ConfigError(f"config.MODEL.NAME={kind!r}: part discovery learns from class labels; the images have none.")
    built = PART_MODELS[kind](_Request(model, num_classes, image_size))
    freeze(built, model.PARTS)
    return built


def single_stage(model: Model, *, num_classes: int | None, image_size: ImageSize = None) -> PartModel:
    """Parts by prototypes and a classifier on them (PDiscoFormer)."""
    return build_part_model("parts", model, num_classes=num_classes, image_size=image_size)


def two_stage(model: Model, *, num_classes: int | None, image_size: ImageSize = None) -> PartModel:
    """Parts, and a second transformer that sees their pixels only (iFAM)."""
    return build_part_model("two_stage", model, num_classes=num_classes, image_size=image_size)


def decoupled(model: Model, *, num_classes: int | None, image_size: ImageSize = None) -> PartModel:
    """A transformer that sees only what given masks let through."""
    return build_part_model("decoupled", model, num_classes=num_classes, image_size=image_size)


def pooled(model: Model, *, num_classes: int | None, image_size: ImageSize = None) -> PartModel:
    """Baseline of part discovery: one backbone, a pooling (MODEL.PARTS.POOLING_TYPE) and a classifier."""
    return build_part_model("pooled", model, num_classes=num_classes, image_size=image_size)


def local_colour(model: Model, *, num_classes: int | None, image_size: ImageSize = None) -> ColourModel:
    """Warm-up of a trunk for part discovery without labels: local colours from images with holes."""
    return ColourModel(build_part_trunk(model.TRUNK, image_size=image_size))


def _parts(request: _Request) -> StageOne:
    trunk = request.trunk(request.model.TRUNK, stage=1)
    return StageOne(trunk, PartLayers(trunk.width, request.model.PARTS, num_classes=request.num_classes))


def _two_stage(request: _Request) -> TwoStage:
    options, section = request.model.PARTS, request.model.TRUNK
    second = options.STAGE_TWO_TRUNK
    merged = TrunkSection(
        NAME=second.NAME or section.NAME,
        RESNETS=section.RESNETS,
        OPTIONS=second.OPTIONS if second.NAME else section.OPTIONS | second.OPTIONS,
    )
    stage_1 = request.trunk(section, stage=1)
    stage_2 = check_masked(request.trunk(merged, stage=2), options)
    return TwoStage(stage_1, stage_2, options=options, num_classes=request.num_classes)


def _decoupled(request: _Request) -> Decoupled:
    options = request.model.PARTS
    if options.USE_SOFT_MASKS or options.MASK_GRADIENT != "none":
        key = "USE_SOFT_MASKS" if options.USE_SOFT_MASKS else "MASK_GRADIENT"
        raise ConfigError(
            f"config.MODEL.PARTS.{key}: the decoupled model has given, hard masks; leave it at its default."
        )
    trunk = check_masked(request.trunk(request.model.TRUNK, stage=2), options)
    return Decoupled(trunk, options=options, num_classes=request.num_classes)


def _pooled(request: _Request) -> PooledModel:
    options, section = request.model.PARTS, request.model.TRUNK
    library = section.NAME.partition("/")[0]
    trunk = request.trunk(section, stage=1) if library in ("timm", "hf") else None
    if isinstance(trunk, TokenTrunk):
        return PooledModel(trunk, kind=options.POOLING_TYPE, num_classes=request.num_classes, width=trunk.width)
    if library != "timm":
        refuse_stride(options.OUTPUT_STRIDE)
    wanted: dict[str, float] = {}
    if options.DROP_PATH_STAGE_1:
        wanted["drop_path_rate"] = options.DROP_PATH_STAGE_1
    if options.OUTPUT_STRIDE != 32:
        wanted["output_stride"] = options.OUTPUT_STRIDE
    plain = build_trunk(section.model_copy(update={"OPTIONS": wanted | section.OPTIONS}))
    width = plain.feature_shapes([FLATTEN], image_size=request.image_size)[FLATTEN][0]
    return PooledModel(plain, kind=options.POOLING_TYPE, num_classes=request.num_classes, width=width)


#: Kind of model -> what makes it.
PART_MODELS: dict[str, Callable[[_Request], PartModel]] = {
    "parts": _parts,
    "two_stage": _two_stage,
    "decoupled": _decoupled,
    "pooled": _pooled,
}
