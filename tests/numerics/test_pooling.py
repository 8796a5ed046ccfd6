"""Pooled features of whole models against the recorded shapes (tests/data/vissl_eval.json), and their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from vissl_like.config.schema_model import Model
from vissl_like.models.vision_model import VisionModel
from vissl_like.models.zoo import build_model, build_on_meta

DATA = Path(__file__).parents[1] / "data"
CASES = [case for case in json.loads((DATA / "vissl_eval.json").read_text())["cases"] if "pool_map" in case]
#: The original pools res3 by the operation of res5avg and the other way round; ours goes by the map.
UNORDERED = {
    "pool_unordered_flat1_224": [[2, 2048], [2, 2048]],
    "pool_unordered_flat0_224": [[2, 2048, 1, 1], [2, 512, 2, 2]],
}


def section(pool_map: list[Any], *, flatten: bool, depth: int) -> Model:
    return Model.model_validate(
        {
            "TRUNK": {"NAME": "resnet", "RESNETS": {"DEPTH": depth}},
            "HEAD": {"PARAMS": []},
            "FEATURE_EVAL_SETTINGS": {"LINEAR_EVAL_FEAT_POOL_OPS_MAP": pool_map, "SHOULD_FLATTEN_FEATS": flatten},
        }
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_shapes_of_a_resnet_50(case: dict[str, Any]) -> None:
    model = build_on_meta(section(case["pool_map"], flatten=case["flatten"], depth=case["depth"]), num_classes=None)
    images = torch.empty(case["batch"], 3, case["input_size"], case["input_size"], device="meta")
    shapes = [list(output.shape) for output in model.eval()(images)]
    assert shapes == UNORDERED.get(case["name"], case["output_shapes"])


def test_values_go_by_the_map() -> None:
    """Order of the map, not of the network; repeated layers under names of their own."""
    pool_map = [
        ["res5avg", ["Identity", []]],
        ["res3", ["AdaptiveAvgPool2d", [[2, 2]]]],
        ["res3", ["MaxPool2d", [2, 2, 0]]],
        ["conv1", ["AvgPool2d", [[8, 8], 8, 0]]],
    ]
    torch.manual_seed(0)
    model: VisionModel = build_model(section(pool_map, flatten=True, depth=18), num_classes=None, image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    net = model.trunk.backbone
    with torch.no_grad():
        features = model.features(images)
        conv1 = functional.relu(net.bn1(net.conv1(images)))
        res3 = net.layer2(net.layer1(net.maxpool(conv1)))
        res5 = net.layer4(net.layer3(res3))
    assert list(features) == ["res5avg", "res3", "res3_1", "conv1"]
    expected = [
        res5.mean((2, 3)),
        functional.adaptive_avg_pool2d(res3, 2).flatten(1),
        functional.max_pool2d(res3, 2).flatten(1),
        functional.avg_pool2d(conv1, 8).flatten(1),
    ]
    for value, wanted in zip(features.values(), expected):
        torch.testing.assert_close(value, wanted)
