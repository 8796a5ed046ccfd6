"""From MODEL of the configuration to a model: the only place that knows every kind of trunk."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from vissl_like.config.schema_model import FeatureEval, Model
from vissl_like.config.schema_model import Trunk as TrunkSection
from vissl_like.errors import ConfigError
from vissl_like.models import libraries, pooling
from vissl_like.models.heads import build_heads, resolve_from_state
from vissl_like.models.trunk import Adapter, Trunk, resnet_layers
from vissl_like.models.vision_model import VisionModel
from vissl_like.registry import names, resolve, suggest


def build_model(
    model: Model,
    *,
    num_classes: int | None,
    image_size: int | tuple[int, int] | None = None,
    with_heads: bool = True,
) -> VisionModel:
    """The model of a MODEL section, randomly initialised.

    num_classes fills the last `auto` of each head's dims; None: not known. image_size (pixels; None: the backbone's
    own) matters only where a feature's width depends on it. with_heads=False leaves the heads out (extraction).
    """
    settings = model.FEATURE_EVAL_SETTINGS
    trunk = build_trunk(model.TRUNK, input_type=model.INPUT_TYPE)
    pooled = pooling.pooled_features(settings.LINEAR_EVAL_FEAT_POOL_OPS_MAP)
    trunk.check_layers([feature.layer for feature in pooled], key=pooling.KEY)
    shapes = trunk.feature_shapes([feature.layer for feature in pooled], image_size=image_size)
    flatten = settings.SHOULD_FLATTEN_FEATS
    pooled_shapes = [(item.name, pooling.pooled_shape(item, shapes[item.layer], flatten=flatten)) for item in pooled]
    heads = build_heads(
        model.HEAD if with_heads else model.HEAD.model_copy(update={"PARAMS": []}),
        shapes=pooled_shapes,
        num_classes=num_classes,
    )
    return VisionModel(
        trunk,
        heads,
        pooled=pooled,
        settings=settings,
        input_type=model.INPUT_TYPE,
        non_trainable=model.NON_TRAINABLE_PARAMS,
    )


def build_saved_model(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> VisionModel:
    """The model that saved tensors of these shapes belong to: sizes that were inferred then are read off them."""
    params = resolve_from_state(model.HEAD.PARAMS, shapes) if any(key.startswith("heads.") for key in shapes) else []
    settings = model.FEATURE_EVAL_SETTINGS
    return VisionModel(
        build_trunk(model.TRUNK, input_type=model.INPUT_TYPE),
        build_heads(model.HEAD.model_copy(update={"PARAMS": params}), shapes=None, num_classes=None),
        pooled=pooling.pooled_features(settings.LINEAR_EVAL_FEAT_POOL_OPS_MAP),
        settings=settings,
        input_type=model.INPUT_TYPE,
        non_trainable=model.NON_TRAINABLE_PARAMS,
    )


def build_on_meta(
    model: Model, *, num_classes: int | None, image_size: int | tuple[int, int] | None = None, with_heads: bool = True
) -> VisionModel:
    """The same model without memory for its parameters: for counting and shapes in a dry run."""
    with torch.device("meta"):
        return build_model(model, num_classes=num_classes, image_size=image_size, with_heads=with_heads)


def stores_heads(settings: FeatureEval) -> bool:
    """Whether an extraction wants the outputs of the heads beside the features; without them it needs no heads."""
    return settings.EVAL_TRUNK_AND_HEAD and not settings.EXTRACT_TRUNK_FEATURES_ONLY


def build_trunk(section: TrunkSection, *, input_type: str = "rgb") -> Trunk:
    """The trunk that NAME stands for; ConfigError for an unknown name or a refused option."""
    library = section.NAME.partition("/")[0]
    if "/" in section.NAME and library in libraries.LIBRARIES:
        options = dict(section.OPTIONS)
        if input_type == "lab" and library == "timm":
            options.setdefault("in_chans", 1)
        return Trunk(*libraries.build(section.NAME, options))
    return _own_trunk(section, input_type=input_type)


def _own_trunk(section: TrunkSection, *, input_type: str) -> Trunk:
    name = section.NAME
    if name not in names("trunk"):
        known = names("trunk")
        raise ConfigError(
            f"config.MODEL.TRUNK.NAME={name!r}: no such trunk{suggest(name, known) or '.'} Known: {', '.join(known)},"
            " torchvision/NAME, timm/NAME and hf/NAME."
        )
    make = resolve("trunk", name, key="MODEL.TRUNK.NAME")
    options: dict[str, Any] = {}
    if name == "resnet":
        options = {key.lower(): value for key, value in section.RESNETS.model_dump().items()}
    if input_type == "lab" and "in_channels" in inspect.signature(make).parameters:
        options["in_channels"] = 1
    twice = [key for key in section.OPTIONS if key in options and key != "in_channels"]
    if twice:
        raise ConfigError(
            f"config.MODEL.TRUNK.OPTIONS.{twice[0]}: set config.MODEL.TRUNK.RESNETS.{twice[0].upper()} instead."
        )
    backbone = libraries.construct(f"trunk {name}", make, options | section.OPTIONS)
    adapter = Adapter(
        name=name,
        layers=getattr(backbone, "layers", None) or resnet_layers(backbone),
        in_channels=getattr(backbone, "in_channels", 3),
        classifier="fc" if resnet_layers(backbone) else "",
    )
    return Trunk(backbone, adapter)
