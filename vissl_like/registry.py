"""Components by kind and name. Names are plain text until used, so they can be listed and checked without torch."""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib
from collections.abc import Iterator
from typing import Any

from vissl_like.errors import ConfigError

#: kind -> name -> "module:attribute". One line adds a component; third parties use add() from a module in PLUGINS.
COMPONENTS: dict[str, dict[str, str]] = {
    "engine": {
        "train": "vissl_like.engines.train:run",
        "extract_features": "vissl_like.engines.extract_features:run",
        "cluster_features": "vissl_like.engines.cluster_features:run",
        "extract_label_predictions": "vissl_like.engines.extract_label_predictions:run",
        "evaluate": "vissl_like.engines.evaluate:run",
        "evaluate_parts": "vissl_like.engines.evaluate_parts:run",
        "pipeline": "vissl_like.engines.pipeline:run",
    },
    "model": {
        "vision": "vissl_like.models.zoo:build_model",
        "parts": "vissl_like.models.part_zoo:single_stage",
        "two_stage": "vissl_like.models.part_zoo:two_stage",
        "decoupled": "vissl_like.models.part_zoo:decoupled",
        "pooled": "vissl_like.models.part_zoo:pooled",
        "local_colour": "vissl_like.models.part_zoo:local_colour",
    },
    "task": {
        "supervised": "vissl_like.tasks.supervised:Supervised",
        "parts": "vissl_like.tasks.parts:Parts",
        "local_colour": "vissl_like.tasks.local_colour:LocalColour",
    },
    "loss": {
        "cross_entropy": "vissl_like.losses.classification:cross_entropy",
        "bce_logits": "vissl_like.losses.classification:bce_logits",
    },
    "trunk": {
        "resnet": "vissl_like.models.resnet:resnet",
        "resnet_small": "vissl_like.models.resnet:resnet_small",
        "conv_stem": "vissl_like.models.conv_stem:ConvStem",
        "raw_pixels": "vissl_like.models.handcrafted:RawPixels",
        "grey_histogram": "vissl_like.models.handcrafted:GreyHistogram",
    },
    "head": {
        "mlp": "vissl_like.models.heads:MLPHead",
        "eval_mlp": "vissl_like.models.heads:EvalMLPHead",
        "identity": "vissl_like.models.heads:IdentityHead",
    },
    "data_source": {
        "disk_folder": "vissl_like.data.folder:FolderSource",
        "disk_filelist": "vissl_like.data.folder:FilelistSource",
        "torchvision_dataset": "vissl_like.data.datasets:TorchvisionSource",
        "mnist5k": "vissl_like.data.datasets:Mnist5kSource",
        "digits": "vissl_like.data.datasets:DigitsSource",
        "synthetic": "vissl_like.data.synthetic:SyntheticSource",
        "cub": "vissl_like.data.cub:CubSource",
        "nabirds": "vissl_like.data.cub:CubSource",
        "waterbirds": "vissl_like.data.cub:WaterbirdsSource",
        "toybirds": "vissl_like.data.toybirds:ToybirdsSource",
        "toy_waterbirds": "vissl_like.data.toybirds:ToyWaterbirdsSource",
        "meta_shift": "vissl_like.data.folders:MetaShiftSource",
        "siim_acr": "vissl_like.data.medical:SiimAcrSource",
        "imagenet_v2": "vissl_like.data.folders:ImageNetV2Source",
        "imagenet_a": "vissl_like.data.folders:ImageNetSubsetSource",
        "imagenet_r": "vissl_like.data.folders:ImageNetSubsetSource",
        "imagenet_9": "vissl_like.data.imagenet9:ImageNet9Source",
        "part_imagenet": "vissl_like.data.part_sets:PartImageNetSource",
        "flowers102": "vissl_like.data.part_sets:FlowersSource",
        "turtle_reid": "vissl_like.data.part_sets:TurtleReidSource",
        "webdataset": "vissl_like.data.streams:ShardSource",
    },
    "optimizer": {
        "sgd": "torch.optim:SGD",
        "adam": "torch.optim:Adam",
        "adamw": "torch.optim:AdamW",
        "nadam": "torch.optim:NAdam",
        "rmsprop": "torch.optim:RMSprop",
        "lars": "timm.optim:Lars",
    },
    "schedule": {
        "constant": "vissl_like.optim.schedules:constant",
        "linear": "vissl_like.optim.schedules:linear",
        "cosine": "vissl_like.optim.schedules:cosine",
        "step": "vissl_like.optim.schedules:step",
        "multistep": "vissl_like.optim.schedules:multistep",
        "step_with_fixed_gamma": "vissl_like.optim.schedules:step_with_fixed_gamma",
        "polynomial": "vissl_like.optim.schedules:polynomial",
        "exponential": "vissl_like.optim.schedules:exponential",
        "inverse_sqrt": "vissl_like.optim.schedules:inverse_sqrt",
        "cosine_warm_restart": "vissl_like.optim.schedules:cosine_warm_restart",
        "composite": "vissl_like.optim.schedules:composite",
        "timm_cosine": "vissl_like.optim.schedules:timm_cosine",
        "timm_step": "vissl_like.optim.schedules:timm_step",
        "timm_linear": "vissl_like.optim.schedules:timm_linear",
    },
}

#: kind -> the names that no plugin has brought.
OWN = {kind: frozenset(table) for kind, table in COMPONENTS.items()}


def names(kind: str) -> list[str]:
    """All known names of one kind, sorted."""
    return sorted(COMPONENTS[kind])


def suggest(word: str, known: list[str]) -> str:
    """`; did you mean X?` for the nearest known word, or the empty string."""
    in_lower_case = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), list(in_lower_case), n=1, cutoff=0.6)
    return f"; did you mean {in_lower_case[near[0]]!r}?" if near else ""


def problem(kind: str, name: str, key: str) -> str | None:
    """What is wrong with this name under this key, or None."""
    if name in COMPONENTS[kind]:
        return None
    return f"config.{key}={name!r}: no such {kind}{suggest(name, names(kind))} Known: {', '.join(names(kind))}."


def resolve(kind: str, name: str, *, key: str) -> Any:
    """The component itself; imports its module. Raises ConfigError for an unknown name."""
    wrong = problem(kind, name, key)
    if wrong:
        raise ConfigError(wrong)
    module, attribute = COMPONENTS[kind][name].split(":")
    with quick_imports():
        return getattr(importlib.import_module(module), attribute)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Imports of large libraries within it take a fifth less: nothing they make is garbage, so none is looked for."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()
            gc.unfreeze()  # now all is among the oldest objects, where the collector seldom looks
            gc.enable()


def add(kind: str, name: str, target: str) -> None:
    """Add a third-party component; `target` is "module:attribute". Raises ConfigError if the name is taken."""
    table = COMPONENTS.setdefault(kind, {})
    if table.get(name, target) != target:
        raise ConfigError(f"plugin component {kind}/{name}={target!r}: the name already stands for {table[name]!r}.")
    table[name] = target


def load_plugins(modules: list[str]) -> None:
    """Import the modules of config.PLUGINS; each calls add() for its components."""
    for module in modules:
        try:
            with quick_imports():
                importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"config.PLUGINS: cannot import {module!r} ({error}). Install it or mend the name."
            ) from error
