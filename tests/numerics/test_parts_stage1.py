"""The single-stage model (PDiscoFormer) with its recorded kinds of modulation and noise: outputs and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F

from tests.numerics.part_vectors import Vectors, build, check_gradients, close, load, options
from vissl_like.models.parts import PartNoise, StageOne

VECTORS = Vectors("parts_stage1")
VARIANTS: dict[str, dict[str, Any]] = VECTORS.settings["variants"]


def model_of(variant: str, folder: Path) -> StageOne:
    recorded = VARIANTS[variant]
    parts = {
        "NUM_PARTS": VECTORS.settings["K"],
        "PART_DROPOUT": VECTORS.settings["dropout"],
        "MODULATION_TYPE": recorded["modulation_type"],
        "CLASSIFIER_TYPE": recorded["classifier_type"],
        "MODULATION_ORTH": recorded["modulation_orth"],
        "GUMBEL_SOFTMAX": recorded["gumbel_softmax"],
        "GUMBEL_SOFTMAX_HARD": recorded.get("gumbel_softmax_hard", False),
        "NOISE_VARIANCE": recorded.get("noise_variance", 0.0),
        "SOFTMAX_TEMPERATURE": recorded["tau"],
        "TEMPERATURE_NEEDS_GUMBEL": True,
        "EVAL_GUMBEL": True,
    }
    model = build(
        "parts", options(VECTORS.trunk, parts), num_classes=VECTORS.num_classes, image_size=VECTORS.image_size
    )
    load(model, VECTORS.below("bb/") | VECTORS.below(f"{variant}/sd/"), folder, preset="pdiscoformer")
    return model


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients(variant: str, mode: str, tmp_path: Path) -> None:
    model = model_of(variant, tmp_path).train(mode == "train")
    run = f"{variant}/{mode}"
    noise = PartNoise(maps=VECTORS.get(f"{run}/noise_0"), keep_scores=VECTORS.get(f"{run}/drop_0"))
    output = model(VECTORS["image"], noise=noise)
    close(output.features, VECTORS[f"{run}/features"], "feature", "features")
    close(output.maps, VECTORS[f"{run}/maps"], "map", "maps")
    close(output.scores, VECTORS[f"{run}/scores"], "feature", "scores")
    close(output.distances, VECTORS[f"{run}/dist"], "distance", "dist")
    if mode == "eval":
        return
    loss = (
        F.cross_entropy(output.logits, VECTORS["label"]) + output.maps.square().mean() + output.features.square().mean()
    )
    close(loss, VECTORS[f"{run}/loss"], "map", "loss")
    loss.backward()
    check_gradients(model, VECTORS.below(f"{run}/grad/"), preset="pdiscoformer")
