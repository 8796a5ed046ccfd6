"""Backbones of torchvision, timm and transformers by name: always randomly initialised, without their classifier.

Weights come through MODEL.WEIGHTS_INIT alone, so that every load is counted and reported.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vissl_like.errors import ConfigError
from vissl_like.models.trunk import Adapter, resnet_layers
from vissl_like.registry import suggest

NAME_KEY = "config.MODEL.TRUNK.NAME"
OPTIONS_KEY = "config.MODEL.TRUNK.OPTIONS"
#: Arguments that would fetch weights, change the face of the backbone, or belong to the head.
RESERVED = {
    "pretrained": "weights come through config.MODEL.WEIGHTS_INIT.PARAMS_FILE",
    "weights": "weights come through config.MODEL.WEIGHTS_INIT.PARAMS_FILE",
    "weights_backbone": "weights come through config.MODEL.WEIGHTS_INIT.PARAMS_FILE",
    "checkpoint_path": "weights come through config.MODEL.WEIGHTS_INIT.PARAMS_FILE",
    "num_classes": "the classifier is config.MODEL.HEAD",
    "features_only": "layers are named in config.MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP",
}


def build(name: str, options: dict[str, Any]) -> tuple[nn.Module, Adapter]:
    """The backbone that `torchvision/NAME`, `timm/NAME` or `hf/NAME` stands for."""
    library, _, model = name.partition("/")
    for option in options:
        if option in RESERVED:
            raise ConfigError(f"{OPTIONS_KEY}.{option}: cannot be set here: {RESERVED[option]}.")
    return LIBRARIES[library](model, options)


def construct(name: str, make: Any, options: dict[str, Any], *, key: str = OPTIONS_KEY) -> Any:
    """make(**options); a refused option becomes a ConfigError that names it."""
    try:
        return _make(make, options)
    except TypeError as error:
        wrong = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if wrong is None:
            raise ConfigError(f"{key}={options}: {name} refuses them ({error}).") from error
        known = [parameter for parameter in _known_options(make) if parameter not in RESERVED]
        listed = f" Known: {', '.join(known)}." if known else ""
        message = f"{key}.{wrong[1]}: {name} has no such option{suggest(wrong[1], known) or '.'}{listed}"
        raise ConfigError(message) from error
    except (ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{key}={options}: {name} refuses them ({error}).") from error


def _make(make: Any, options: dict[str, Any]) -> Any:
    """make(**options); under the meta device also for the few that look at values while they build."""
    if torch.get_default_device().type != "meta":
        return make(**options)
    try:
        return make(**options)
    except RuntimeError:
        with torch.device("cpu"):
            return make(**options).to("meta")


def _known_options(make: Any) -> list[str]:
    """Named parameters of a constructor; behind a **kwargs wrapper, those of the class that it makes."""
    names = _parameters(make)
    if names:
        return names
    with torch.device("meta"):
        return [name for name in _parameters(type(make()).__init__) if name != "self"]


def _parameters(make: Any) -> list[str]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in inspect.signature(make).parameters.items() if parameter.kind in named]


def _torchvision(model: str, options: dict[str, Any]) -> tuple[nn.Module, Adapter]:
    from torchvision import models

    known = models.list_models(module=models)
    if model not in known:
        raise ConfigError(
            f"{NAME_KEY}='torchvision/{model}': torchvision has no such model{suggest(model, known) or '.'}"
        )
    arguments = dict(options)
    if model in ("googlenet", "inception_v3"):
        # Auxiliary classifiers would return a second output; the library also wants its slow start asked for.
        arguments = {"aux_logits": False, "init_weights": True} | arguments
    backbone = construct(f"torchvision's {model}", lambda **kw: models.get_model(model, weights=None, **kw), arguments)
    classifier = _drop_classifier(backbone)
    side = getattr(backbone, "image_size", None) or (299 if model == "inception_v3" else 224)
    adapter = Adapter(
        name=f"torchvision/{model}",
        library="torchvision",
        pooled=_flat_output,
        layers=resnet_layers(backbone),
        image_size=(side, side),
        classifier=classifier,
    )
    return backbone, adapter


def _drop_classifier(backbone: nn.Module) -> str:
    """Replace the last linear layer by the identity, so that the model returns its pooled features; its dotted name."""
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in linear if re.match(r"(fc|classifier|heads?)(\.|$)", name)]
    if inside:
        parent, _, child = inside[-1].rpartition(".")
        setattr(backbone.get_submodule(parent), child, nn.Identity())
        return inside[-1]
    if isinstance(getattr(backbone, "classifier", None), nn.Sequential):  # SqueezeNet classifies by a convolution
        backbone.classifier = nn.AdaptiveAvgPool2d((1, 1))
    return ""


def _flat_output(backbone: nn.Module, images: Tensor) -> Tensor:
    return torch.flatten(backbone(images), 1)


def _timm(model: str, options: dict[str, Any]) -> tuple[nn.Module, Adapter]:
    import timm

    if not timm.is_model(model):
        hint = suggest(model.partition(".")[0], timm.list_models()) or "."
        raise ConfigError(f"{NAME_KEY}='timm/{model}': timm has no such model{hint}")
    arguments = {"pretrained": False, "num_classes": 0} | options
    backbone = construct(f"timm's {model}", lambda **kw: timm.create_model(model, **kw), arguments)
    freeze_unused(backbone)
    settings = backbone.pretrained_cfg
    embed = getattr(backbone, "patch_embed", None)
    size = getattr(embed, "img_size", None) or tuple(settings["input_size"][1:])
    classifier = settings.get("classifier") or ""
    layers = resnet_layers(backbone)
    adapter = Adapter(
        name=f"timm/{model}",
        library="timm",
        pooled=_timm_pooled,
        layers=layers,
        in_channels=options.get("in_chans", 3),
        image_size=(size[0], size[1]),
        classifier=classifier if isinstance(classifier, str) else classifier[0],
    )
    return backbone, adapter


def _timm_pooled(backbone: nn.Module, images: Tensor) -> Tensor:
    return torch.flatten(backbone.forward_head(backbone.forward_features(images), pre_logits=True), 1)


def freeze_unused(backbone: nn.Module) -> None:
    """Mask tokens take part only in masked-image training; a parameter without gradient would stop DDP."""
    for name, parameter in backbone.named_parameters():
        if name.endswith("mask_token"):
            parameter.requires_grad_(False)


def _hf(model: str, options: dict[str, Any]) -> tuple[nn.Module, Adapter]:
    from transformers import AutoModel

    config = _hf_config(model, options)
    if hasattr(config, "mask_ratio") and "mask_ratio" not in options:
        config.mask_ratio = 0.0  # features of whole images; masking is a training task
    backbone = construct(f"transformers' {model}", lambda: AutoModel.from_config(config), {})
    if getattr(backbone, "main_input_name", "") != "pixel_values":
        raise ConfigError(f"{NAME_KEY}='hf/{model}': {type(backbone).__name__} does not take images.")
    if _has_trained_pooler(backbone):
        # Many published weights lack this layer, so `flatten` would be a random projection of the class token.
        backbone.pooler = None
    freeze_unused(backbone)
    side = getattr(config, "image_size", 224)
    size = (side, side) if isinstance(side, int) else tuple(side)
    adapter = Adapter(
        name=f"hf/{model}",
        library="hf",
        pooled=_hf_pooled,
        layers={},
        in_channels=getattr(config, "num_channels", 3),
        image_size=(size[0], size[1]),
    )
    return backbone, adapter


def _has_trained_pooler(backbone: nn.Module) -> bool:
    pooler = getattr(backbone, "pooler", None)
    return pooler is not None and next(pooler.parameters(), None) is not None


def _hf_config(model: str, options: dict[str, Any]) -> Any:
    """The configuration of a model type ("dinov2"), a config class ("Dinov2Config"), a local folder or a hub name."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    types = {
        **{kind: kind for kind in CONFIG_MAPPING_NAMES},
        **{cls: kind for kind, cls in CONFIG_MAPPING_NAMES.items()},
    }
    path = Path(model).expanduser()
    if model in types:
        source, make = None, lambda **kw: AutoConfig.for_model(types[model], **kw)
    elif "/" in model or path.is_dir():
        source = str(path) if path.is_dir() else model
        make = lambda **kw: AutoConfig.from_pretrained(source, trust_remote_code=False, **kw)  # noqa: E731
    else:
        hint = suggest(model, sorted(types)) or "."
        raise ConfigError(f"{NAME_KEY}='hf/{model}': transformers has no such model type or config class{hint}")
    try:
        default = make()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{NAME_KEY}='hf/{model}': neither a local folder with a config.json nor a model that can be fetched from"
            f" the hub now ({str(error).splitlines()[0]}). Without network give the path of a downloaded folder."
        ) from error
    known = [name for name in default.to_dict() if not name.startswith("_")]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{OPTIONS_KEY}.{name}: {type(default).__name__} has no such option{suggest(name, known) or '.'}"
            )
    return construct(f"transformers' {model}", make, options)


def _hf_pooled(backbone: nn.Module, images: Tensor) -> Tensor:
    """The model's own parameter-free pooling where it has one, else its class token: (B, D)."""
    arguments: dict[str, Any] = {}
    accepted = inspect.signature(backbone.forward).parameters
    if "interpolate_pos_encoding" in accepted:
        arguments["interpolate_pos_encoding"] = True
    if "noise" in accepted:  # masked autoencoders shuffle patches by noise: rising noise keeps their order
        side = backbone.config.patch_size
        patches = (images.shape[-2] // side) * (images.shape[-1] // side)
        rising = torch.arange(patches, device=images.device, dtype=torch.float32)
        arguments["noise"] = rising.expand(len(images), patches)
    output = backbone(pixel_values=images, **arguments)
    pooled = getattr(output, "pooler_output", None)
    return torch.flatten(output.last_hidden_state[:, 0] if pooled is None else pooled, 1)


LIBRARIES = {"torchvision": _torchvision, "timm": _timm, "hf": _hf}
