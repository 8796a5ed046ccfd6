"""Weights of part models: one backbone for two stages, a stage for another model, files of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor

from tests.part_models import HF, VIT, build, images
from vissl_like.config.schema_model import FeatureEval, WeightsInit
from vissl_like.core.weights import load_initial_weights
from vissl_like.core.weights_plan import Status


def load(model: torch.nn.Module, state: dict[str, Tensor], folder: Path, **weights: Any) -> Any:
    torch.save(state, folder / "weights.pth")
    wanted = WeightsInit(PARAMS_FILE=str(folder / "weights.pth"), **weights)
    return load_initial_weights(model, wanted, feature_eval=FeatureEval())


def test_one_backbone_fills_both_stages(tmp_path: Path) -> None:
    """Also at another image size; the position tables are resampled in both."""
    source = build("parts", VIT, size=16).trunk.backbone
    model = build("two_stage", VIT, size=32)
    report = load(model, source.state_dict(), tmp_path, APPEND_PREFIX="trunk._feature_blocks.", MIN_LOADED=1.0)
    assert report.trunk.value == 1 and not report.heads.loaded
    for stage in ("stage_1", "stage_2"):
        backbone = model.trunk[stage].backbone
        assert torch.equal(backbone.cls_token, source.cls_token)
        assert torch.equal(backbone.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
        assert backbone.pos_embed.shape[1] == 64
    assert torch.equal(model.trunk["stage_1"].backbone.pos_embed, model.trunk["stage_2"].backbone.pos_embed)
    assert "unexpected 0" in report.table()


def test_a_single_stage_run_starts_two_stages(tmp_path: Path) -> None:
    first = build("parts", VIT)
    model = build("two_stage", VIT)
    with torch.no_grad():
        model.heads["stage_1"].prototypes.weight.zero_()
    report = load(model, first.state_dict(), tmp_path, PRESET="parts_stage_one", MIN_LOADED=1.0)
    assert report.trunk.value == 1
    assert torch.equal(model.stage_one(images(), noise=None).part_dot, first(images()).part_dot)
    assert torch.equal(model.trunk["stage_2"].backbone.cls_token, first.trunk.backbone.cls_token)


@pytest.mark.parametrize(
    "trunk", [VIT, {"NAME": "timm/resnet18", "OPTIONS": {}}, {"NAME": "torchvision/convnext_tiny"}]
)
def test_a_librarys_classifier_becomes_the_baseline(trunk: dict[str, Any], tmp_path: Path) -> None:
    library, name = trunk["NAME"].split("/")
    size, options = (64, trunk.get("OPTIONS", {})) if trunk is not VIT else (16, VIT["OPTIONS"] | {"img_size": 16})
    torch.manual_seed(0)
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    original = make(name, num_classes=5, **options).eval()
    model = build("pooled", trunk, size=size, POOLING_TYPE="cls" if trunk is VIT else "gap").eval()
    report = load(model, original.state_dict(), tmp_path, PRESET="ifam_baseline", MIN_LOADED=1.0)
    assert report.trunk.value == report.heads.value == 1
    x = images(2, (size, size))
    torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize("preset", ["ifam", "hf_dinov2"])
def test_gated_layers_of_transformers_4_are_taken_apart(preset: str, tmp_path: Path) -> None:
    """There, gate and up stand above each other in one tensor; the library itself writes them so."""
    trunk = HF | {"OPTIONS": HF["OPTIONS"] | {"use_swiglu_ffn": True}}
    source = build("parts", trunk).trunk.backbone
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn_like(parameter))
    source.save_pretrained(tmp_path / "saved")
    state = load_file(tmp_path / "saved" / "model.safetensors")
    assert [key for key in state if "weights_in" in key] and not [key for key in state if "gate_proj" in key]
    model = build("two_stage", trunk)
    if preset == "ifam":
        state = {f"stage_{n}.{key}": value for key, value in state.items() for n in (1, 2)}
    report = load(model, state, tmp_path, PRESET=preset, MIN_LOADED=1.0)
    assert report.trunk.value == 1 and not report.count(Status.UNEXPECTED) and "taken apart" in report.table()
    for stage in ("stage_1", "stage_2"):
        for name, value in model.trunk[stage].backbone.state_dict().items():
            assert torch.equal(value, source.state_dict()[name]), name


def test_a_wrong_prefix_names_the_one_that_fills_both_stages(tmp_path: Path) -> None:
    source = build("parts", VIT).trunk.backbone.state_dict()
    with pytest.raises(Exception, match=r"APPEND_PREFIX=trunk\._feature_blocks\. would load 100\.0 %"):
        load(build("two_stage", VIT), source, tmp_path)
