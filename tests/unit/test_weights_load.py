"""Loading published layouts into models in every mode, the report, and what stops a load."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from vissl_like.config.schema_model import Model
from vissl_like.core.weights import WeightsReport, fingerprint, load_initial_weights
from vissl_like.core.weights_plan import Status
from vissl_like.errors import WeightsError
from vissl_like.models.vision_model import VisionModel
from vissl_like.models.zoo import build_model, build_on_meta

State = dict[str, Tensor]
MODES: dict[str, dict[str, Any]] = {
    "finetune": {},
    "linear": {
        "EVAL_MODE_ON": True,
        "FREEZE_TRUNK_ONLY": True,
        "LINEAR_EVAL_FEAT_POOL_OPS_MAP": [["res5avg", ["Identity", []]]],
    },
    "extract": {
        "EVAL_MODE_ON": True,
        "FREEZE_TRUNK_AND_HEAD": True,
        "EXTRACT_TRUNK_FEATURES_ONLY": True,
        "LINEAR_EVAL_FEAT_POOL_OPS_MAP": [["res5", ["AvgPool2d", [[2, 2], 1, 0]]]],
    },
}


def section(
    mode: str = "finetune", name: str = "resnet", options: dict[str, Any] | None = None, **weights: Any
) -> Model:
    trunk = {"NAME": name, "OPTIONS": options or {}, "RESNETS": {"DEPTH": 18}}
    return Model.model_validate({"TRUNK": trunk, "FEATURE_EVAL_SETTINGS": MODES[mode], "WEIGHTS_INIT": weights})


def built(model: Model, size: int = 64) -> VisionModel:
    return build_model(model, num_classes=1000, image_size=size)


def load(model: Model, size: int = 64) -> tuple[VisionModel, WeightsReport]:
    net = built(model, size)
    return net, load_initial_weights(net, model.WEIGHTS_INIT, feature_eval=model.FEATURE_EVAL_SETTINGS)


@pytest.fixture(scope="module")
def published() -> State:
    """Names and shapes of torchvision's ResNet-18, with every value different."""
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    return {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in state.items()}


def start_with(prefix: str) -> Callable[[State], Any]:
    return lambda state: {f"{prefix}{key}": value for key, value in state.items()}


def classy(prefix: str) -> Callable[[State], Any]:
    def make(state: State) -> Any:
        trunk = {f"{prefix}_feature_blocks.{key}": value for key, value in state.items() if not key.startswith("fc.")}
        heads = {"0.clf.0.weight": state["fc.weight"], "0.clf.0.bias": state["fc.bias"]}
        return {
            "classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": heads}}},
            "type": "consolidated",
        }

    return make


LAYOUTS: dict[str, tuple[Callable[[State], Any], dict[str, Any]]] = {
    "torchvision": (start_with(""), {"APPEND_PREFIX": "trunk._feature_blocks."}),
    "torchvision_documented_prefix": (start_with(""), {"APPEND_PREFIX": "trunk.base_model._feature_blocks."}),
    "torchvision_preset": (start_with(""), {"PRESET": "torchvision_resnet"}),
    "vissl": (classy(""), {}),
    "vissl_feature_extractor": (classy("base_model."), {"STATE_DICT_KEY_NAME": "classy_state_dict"}),
    "vissl_preset": (classy(""), {"PRESET": "vissl_resnet"}),
    "vissl_flat": (start_with("trunk._feature_blocks."), {"STATE_DICT_KEY_NAME": ""}),
    "ddp": (start_with("module."), {"REMOVE_PREFIX": "module.", "APPEND_PREFIX": "trunk._feature_blocks."}),
    "ddp_preset": (start_with("module.trunk._feature_blocks."), {"PRESET": "ddp"}),
    "moco": (lambda state: {"state_dict": start_with("module.encoder_q.")(state)}, {"PRESET": "moco"}),
    "dino": (lambda state: {"teacher": start_with("backbone.")(state), "student": {}}, {"PRESET": "dino"}),
}


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_loads_in_every_mode(layout: str, mode: str, published: State, tmp_path: Path) -> None:
    make, options = LAYOUTS[layout]
    path = tmp_path / "weights.torch"
    torch.save(make(published), path)
    model, report = load(section(mode, PARAMS_FILE=str(path), **options))
    assert report.trunk.value == 1.0
    net = model.trunk.backbone
    assert torch.equal(net.conv1.weight, published["conv1.weight"])
    assert torch.equal(net.layer4[1].bn2.running_var, published["layer4.1.bn2.running_var"])
    has_heads = "vissl" in layout and layout != "vissl_flat" and mode == "finetune"
    assert torch.equal(model.heads[0].clf[0].bias, published["fc.bias"]) == has_heads


def test_wrong_prefix_stops_with_the_right_one(published: State, tmp_path: Path) -> None:
    """Nothing is guessed: the load stops, and what the message says works when it is done."""
    path = tmp_path / "w.pth"
    torch.save({"state_dict": start_with("module.encoder_q.")(published)}, path)
    wrong = {"REMOVE_PREFIX": "module.encoder_k.", "APPEND_PREFIX": "trunk.base_model."}
    for options in ({}, {"APPEND_PREFIX": "trunk._feature_blocks."}, wrong):
        with pytest.raises(WeightsError) as caught:
            load(section("linear", PARAMS_FILE=str(path), **options))
        message = str(caught.value)
        assert "loaded 0.0 % of 11,176,512 parameters of the trunk" in message and "MIN_LOADED=0.9" in message
        found = dict(re.findall(r"WEIGHTS_INIT\.(\w+_PREFIX)=(\S+)", message))
        assert "would load 100.0 % of the trunk" in message
        _, report = load(section("linear", PARAMS_FILE=str(path), **(options | found)))
        assert report.trunk.value == 1.0


def test_another_architecture_is_said(published: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(published, path)
    with pytest.raises(WeightsError) as caught:
        load(section(name="timm/vit_tiny_patch16_224", PARAMS_FILE=str(path), PRESET="timm"), size=224)
    assert "No prefix makes the file fit" in str(caught.value)
    assert "Names in the file: conv1.weight, bn1.weight" in str(caught.value)
    assert "Names in the model: trunk._feature_blocks.cls_token" in str(caught.value)
    model = section("extract", PARAMS_FILE=str(path), PRESET="torchvision_resnet")
    deeper = model.model_copy(update={"TRUNK": section().TRUNK.model_copy(update={"NAME": "torchvision/resnet50"})})
    with pytest.raises(
        WeightsError, match=r"tensors have another shape than in the model: .*\(file 64x64x3x3, model 64x64x1x1\)"
    ):
        load(deeper)


def test_heads(published: State, tmp_path: Path) -> None:
    """Heads of another shape are an error with two cures; heads that are asked for must be there."""
    path = tmp_path / "w.torch"
    torch.save(classy("")(published), path)
    model = section(PARAMS_FILE=str(path))
    seven = build_model(model, num_classes=7)
    with pytest.raises(
        WeightsError, match=r"2 tensors .*heads.0.clf.0.weight \(file 1000x512, model 7x512\).*ASSERT_HEAD"
    ):
        load_initial_weights(seven, model.WEIGHTS_INIT, feature_eval=model.FEATURE_EVAL_SETTINGS)
    relaxed = model.FEATURE_EVAL_SETTINGS.model_copy(update={"ASSERT_HEAD_LAYER_SHAPE_INIT": False})
    report = load_initial_weights(seven, model.WEIGHTS_INIT, feature_eval=relaxed)
    assert (report.trunk.value, report.heads.value, report.count(Status.MISMATCHED)) == (1.0, 0.0, 2)
    skipping = model.WEIGHTS_INIT.model_copy(update={"SKIP_LAYERS": ["num_batches_tracked", "heads"]})
    load_initial_weights(seven, skipping, feature_eval=model.FEATURE_EVAL_SETTINGS)
    torch.save(published, path)
    wanted = model.FEATURE_EVAL_SETTINGS.model_copy(update={"EVAL_MODE_ON": True, "EVAL_TRUNK_AND_HEAD": True})
    preset = section(PARAMS_FILE=str(path), PRESET="torchvision_resnet").WEIGHTS_INIT
    with pytest.raises(
        WeightsError, match="0.0 % of 513,000 parameters of the heads.*EVAL_TRUNK_AND_HEAD.*heads.0.clf.0.weight"
    ):
        load_initial_weights(built(model), preset, feature_eval=wanted)
    with_head = preset.model_copy(update={"PRESET": "torchvision_resnet_head"})
    assert load_initial_weights(built(model), with_head, feature_eval=wanted).heads.value == 1.0


def test_skip_layers_are_left_alone_and_do_not_count(published: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(published, path)
    options = {"PARAMS_FILE": str(path), "PRESET": "torchvision_resnet", "SKIP_LAYERS": ["layer4", "bn1.running"]}
    model, report = load(section(**options))
    assert report.trunk.value == 1.0
    assert not torch.equal(model.trunk.backbone.layer4[0].conv1.weight, published["layer4.0.conv1.weight"])
    assert torch.equal(model.trunk.backbone.layer3[0].bn2.running_mean, published["layer3.0.bn2.running_mean"])
    assert model.trunk.backbone.layer3[0].bn1.running_mean.abs().max() == 0


def test_what_stays_random_is_said(published: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({key: value for key, value in published.items() if "running" not in key and key != "bn1.bias"}, path)
    _, report = load(section(PARAMS_FILE=str(path), PRESET="torchvision_resnet"))
    assert 0.99 < report.trunk.value < 1.0
    assert "1 tensors of the trunk are not in the file and stay random" in report.table()
    assert "40 running statistics of the trunk are not in the file" in report.table()


def test_report(published: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": published}, path)
    _, report = load(section(PARAMS_FILE=str(path), APPEND_PREFIX="trunk._feature_blocks."))
    text = report.table()
    assert f"weights: {path} [model]" in text
    assert "trunk: 100.0 % of 11,176,512 parameters" in text and "heads: 0.0 % of 513,000 parameters" in text
    assert "loaded 0  remapped 100  resampled 0  skipped 20  missing 2  mismatched 0  unexpected 2" in text
    assert "missing: heads.0.clf.0.weight, heads.0.clf.0.bias" in text and "unexpected: fc.weight, fc.bias" in text
    data = json.loads(report.to_json())
    assert data["trunk"] == {"loaded": 11176512, "total": 11176512, "share": 1.0}
    assert data["counts"]["remapped"] == 100 and len(data["tensors"]) == 124
    assert data["tensors"][0] == {
        "status": "remapped",
        "model": "trunk._feature_blocks.conv1.weight",
        "file": "conv1.weight",
        "model_shape": [64, 3, 7, 7],
        "file_shape": [64, 3, 7, 7],
    }


def test_prefixes_on_a_classy_checkpoint_are_mentioned(published: State, tmp_path: Path) -> None:
    path = tmp_path / "w.torch"
    torch.save(classy("")(published), path)
    _, report = load(section(PARAMS_FILE=str(path), APPEND_PREFIX="trunk._feature_blocks."))
    assert report.trunk.value == 1.0
    assert any("are not used on a classy_state_dict" in note for note in report.notes)


def test_without_a_file_the_model_is_random() -> None:
    model, report = load(section("extract"))
    assert report.source == "" and report.trunk.loaded == 0
    assert "its features are random" in report.table()
    assert "random" not in load(section())[1].table().replace("randomly", "")
    assert "is frozen" not in load(section("finetune", name="raw_pixels"))[1].table()
    assert model is not None


def test_a_model_on_meta_is_checked_too(published: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(published, path)
    model = section(PARAMS_FILE=str(path), PRESET="torchvision_resnet")
    net = build_on_meta(model, num_classes=3)
    report = load_initial_weights(net, model.WEIGHTS_INIT, feature_eval=model.FEATURE_EVAL_SETTINGS)
    assert report.trunk.value == 1.0


def test_a_trunk_without_parameters_has_nothing_to_load(published: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(published, path)
    with pytest.raises(WeightsError, match="the trunk has no parameters of its own to load"):
        load(section(name="raw_pixels", PARAMS_FILE=str(path), PRESET="torchvision_resnet"), size=8)


def test_allow_unsafe_loads_with_a_warning(published: State, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": published, "hook": nn.Linear(1, 1)}, path)
    options = {"PARAMS_FILE": str(path), "PRESET": "torchvision_resnet"}
    with pytest.raises(WeightsError, match="ALLOW_UNSAFE=true"):
        load(section(**options))
    _, report = load(section(ALLOW_UNSAFE=True, **options))
    assert report.trunk.value == 1.0
    assert "runs code, because ALLOW_UNSAFE is set" in caplog.text


def test_torchvision_by_name(published: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch's own download cache; the names are known to be the library's, so no prefix is asked for."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    torch.save(published, folder / url.rpartition("/")[2])
    for source in ("torchvision:resnet18", "torchvision:ResNet18_Weights.IMAGENET1K_V1"):
        model, report = load(section(PARAMS_FILE=source))
        assert report.trunk.value == 1.0
        assert torch.equal(model.trunk.backbone.conv1.weight, published["conv1.weight"])


TINY_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}


def test_position_tables_of_timm(tmp_path: Path) -> None:
    """32 px -> 48x64 px: the class token's position stays, the grid is resampled without touching the corners' average."""
    import timm

    source = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, **TINY_VIT)
    ramp = torch.arange(4.0).repeat(4, 1)  # a table that rises from left to right
    with torch.no_grad():
        source.pos_embed[0, 1:] = ramp.reshape(16, 1)
        source.pos_embed[0, 0] = 9.0
    path = tmp_path / "w.pth"
    torch.save(source.state_dict(), path)
    options = {"img_size": [48, 64], **TINY_VIT}
    model = section(name="timm/vit_tiny_patch16_224", options=options, PARAMS_FILE=str(path), PRESET="timm")
    net = build_model(model, num_classes=3)
    report = load_initial_weights(net, model.WEIGHTS_INIT, feature_eval=model.FEATURE_EVAL_SETTINGS)
    assert report.count(Status.RESAMPLED) == 1 and report.trunk.value == 1.0
    table = net.trunk.backbone.pos_embed[0]
    assert table.shape == (1 + 6 * 8, 24) and (table[0] == 9.0).all()
    grid = table[1:, 0].reshape(6, 8)
    torch.testing.assert_close(grid, grid[:1].expand(6, 8))
    assert (grid[0].diff() > 0).all() and abs(grid.mean().item() - 1.5) < 1e-5


def test_transformers_by_folder(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
    saved = Dinov2Model(Dinov2Config(image_size=56, **options))
    saved.save_pretrained(tmp_path)
    for source in (f"hf:{tmp_path}", str(tmp_path)):
        model = section(name="hf/dinov2", options={"image_size": 28, **options}, PARAMS_FILE=source)
        net, report = load(model, size=28)
        assert report.trunk.value == 1.0 and report.count(Status.RESAMPLED) == 1
        assert net.trunk.backbone.embeddings.position_embeddings.shape == (1, 5, 16)
        assert torch.equal(net.trunk.backbone.layernorm.weight, saved.layernorm.weight)


def test_timms_own_filter_converts_dinov2_names(tmp_path: Path) -> None:
    """Hub names of DINOv2 with registers (518 px) into timm's model at 28 px: positions of class and grid are split."""
    import timm

    options = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 14}
    target = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, **options)
    state = target.state_dict()
    hub = {
        key.replace("reg_token", "register_tokens"): value + 1.0 for key, value in state.items() if key != "pos_embed"
    }
    hub["pos_embed"] = torch.rand(1, 1 + 4 * 4, 24)
    hub["mask_token"] = torch.zeros(1, 24)
    path = tmp_path / "w.pth"
    torch.save({"teacher": start_with("backbone.")(hub)}, path)
    trunk = {"name": "timm/vit_small_patch14_reg4_dinov2", "options": {"img_size": 28, **options}}
    model = section(**trunk, PARAMS_FILE=str(path), REMOVE_PREFIX="backbone.", APPEND_PREFIX="trunk._feature_blocks.")
    net, report = load(model, size=28)
    assert report.trunk.value == 1.0
    assert "names were converted by timm's own checkpoint filter" in report.notes
    backbone = net.trunk.backbone
    torch.testing.assert_close(backbone.reg_token, state["reg_token"] + 1.0)
    torch.testing.assert_close(backbone.cls_token[0, 0], state["cls_token"][0, 0] + 1.0 + hub["pos_embed"][0, 0])
    files = {row.model_key.rpartition("blocks.")[2]: row.file_key for row in report.rows}
    assert files["1.norm1.weight"] == "backbone.blocks.1.norm1.weight"
    with pytest.raises(
        WeightsError, match=r"REMOVE_PREFIX=backbone. .*APPEND_PREFIX=trunk._feature_blocks. would load 9"
    ):
        load(section(**trunk, PARAMS_FILE=str(path)), size=28)


def test_fingerprint_follows_the_values() -> None:
    torch.manual_seed(0)
    model = built(section(name="resnet_small"), size=28)
    before = fingerprint(model)
    assert before == fingerprint(model.to("cpu", torch.float32)) and len(before) == 32
    with torch.no_grad():
        model.trunk.backbone.bn1.running_mean[0] += 1e-6
    assert fingerprint(model) != before
