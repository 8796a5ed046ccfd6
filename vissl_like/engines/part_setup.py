"""What a training of part discovery is set up with, beyond what every training has."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vissl_like.analysis.class_metrics import TestFacts
from vissl_like.analysis.extraction import Loading, outputs
from vissl_like.analysis.prototypes import find_prototypes
from vissl_like.config.schema import Config
from vissl_like.config.schema_model import Optimizer
from vissl_like.core import rng
from vissl_like.data.annotated import groups_of, origins
from vissl_like.data.images import ImageDataset
from vissl_like.errors import ConfigError
from vissl_like.optim import groups as param_groups


def make_groups(model: torch.nn.Module, options: Optimizer) -> list[param_groups.Group]:
    """The parameter groups of OPTIMIZER.PARAM_GROUP_CONSTRUCTOR."""
    if options.PARAM_GROUP_CONSTRUCTOR != "parts":
        return param_groups.make_groups(model, options)
    from vissl_like.models.part_groups import PartModel
    from vissl_like.optim.part_groups import make_part_groups

    if not isinstance(model, PartModel):
        raise ConfigError(
            "config.OPTIMIZER.PARAM_GROUP_CONSTRUCTOR='parts': for models of part discovery only (config.MODEL.NAME="
            "parts, two_stage, decoupled, pooled). Use default."
        )
    return make_part_groups(model, options)


def start_prototypes(
    model: torch.nn.Module, dataset: ImageDataset, config: Config, *, loading: Loading, batch: int
) -> None:
    """MODEL.PARTS.PROTOTYPE_INIT=kmeans: prototypes from the features of training images as epoch 0 shows them."""
    options = config.MODEL.PARTS
    if options.PROTOTYPE_INIT != "kmeans" or config.MODEL.NAME not in ("parts", "two_stage"):
        return
    count = min(options.PROTOTYPE_IMAGES, len(dataset))
    rows = np.sort(rng.permutation(config.SEED_VALUE, 0, len(dataset))[:count])
    batches = loading.batches(dataset, np.array_split(rows, -(-count // batch)))
    is_single = config.MODEL.NAME == "parts"

    def maps(of: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"maps": (of.trunk if is_single else of.trunk["stage_1"]).maps(images)}

    found = outputs(model, batches, maps, to_input=dataset.device_transform, loading=loading)
    prototypes = find_prototypes(
        (torch.from_numpy(arrays["maps"]) for _, arrays in found),
        num_parts=options.NUM_PARTS, seed=config.SEED_VALUE, restarts=options.PROTOTYPE_RESTARTS,
    )  # fmt: skip
    heads: Any = model.heads
    weight = (heads if is_single else heads["stage_1"]).prototypes.weight
    with torch.no_grad():
        weight.copy_(prototypes.reshape(weight.shape))


def test_facts(test: ImageDataset | None, train: ImageDataset | None) -> TestFacts:
    """The groups of the test images, and their shares of the training images."""
    if test is None:
        return TestFacts()
    found = groups_of(test.source)
    known = _known_classes(test.source)
    if found is None:
        return TestFacts(known_classes=known)
    trained = None if train is None else groups_of(train.source)
    shares = None
    if trained is not None and trained[1] == found[1]:
        counts = np.bincount(trained[0], minlength=len(found[1]))
        shares = counts / max(1, counts.sum())
    return TestFacts(groups=found[0], group_names=found[1], group_shares=shares, known_classes=known)


def _known_classes(source: Any) -> np.ndarray | None:
    """The classes that may be predicted, bool (C,), where every source knows them."""
    sources = origins(source)
    if not all(hasattr(one, "known_classes") for one in sources):
        return None
    return np.asarray(np.stack([one.known_classes for one in sources]).any(axis=0))
