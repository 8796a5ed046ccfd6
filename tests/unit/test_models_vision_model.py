"""Trunk and heads together: outputs, frozen parts, what extraction returns, inputs other than RGB, the zoo's errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from vissl_like import registry
from vissl_like.config.schema_model import Model
from vissl_like.errors import ConfigError
from vissl_like.models.vision_model import VisionModel
from vissl_like.models.zoo import build_model, build_on_meta, build_saved_model

MAP = [["res3", ["AdaptiveAvgPool2d", [[2, 2]]]], ["res4avg", ["Identity", []]]]
IMAGES = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))


def section(name: str = "resnet_small", options: dict[str, Any] | None = None, **model: Any) -> Model:
    return Model.model_validate({"TRUNK": {"NAME": name, "OPTIONS": options or {}}, **model})


def built(*args: Any, num_classes: int | None = 4, **model: Any) -> VisionModel:
    torch.manual_seed(0)
    return build_model(section(*args, **model), num_classes=num_classes, image_size=28)


def test_default_model() -> None:
    model = built()
    assert sum(parameter.numel() for parameter in model.parameters()) == 78420
    assert [tuple(output.shape) for output in model(IMAGES)] == [(4, 4)]
    assert {name: tuple(value.shape) for name, value in model.features(IMAGES).items()} == {"flatten": (4, 64)}
    assert all(key.startswith(("trunk._feature_blocks.", "heads.0.clf.0.")) for key in model.state_dict())


def test_one_head_per_feature_and_chain() -> None:
    mlp = ["mlp", {"dims": ["auto", "auto"]}]
    model = built(HEAD={"PARAMS": [mlp, mlp]}, FEATURE_EVAL_SETTINGS={"LINEAR_EVAL_FEAT_POOL_OPS_MAP": MAP})
    assert model.heads[0].clf[0].in_features == 32 * 4
    assert [tuple(output.shape) for output in model(IMAGES)] == [(4, 4), (4, 4)]
    chain = built(HEAD={"PARAMS": [["mlp", {"dims": ["auto", 8], "use_relu": True}], mlp]}).eval()
    with torch.no_grad():
        [output] = chain(IMAGES)
        torch.testing.assert_close(output, chain.heads[1](chain.heads[0](chain.trunk(IMAGES)["flatten"])))
    features_only = built(HEAD={"PARAMS": []}, FEATURE_EVAL_SETTINGS={"LINEAR_EVAL_FEAT_POOL_OPS_MAP": MAP})
    assert [tuple(output.shape) for output in features_only(IMAGES)] == [(4, 128), (4, 64)]


@pytest.mark.parametrize("flag", ["FREEZE_TRUNK_ONLY", "FREEZE_TRUNK_AND_HEAD"])
@pytest.mark.parametrize("pool_map", [[], [["res4avg", ["Identity", []]]]])
def test_frozen_trunk_never_moves(flag: str, pool_map: list[Any]) -> None:
    """With or without a map: no gradients, and batch-norm statistics stay although train() is called."""
    model = built(FEATURE_EVAL_SETTINGS={flag: True, "LINEAR_EVAL_FEAT_POOL_OPS_MAP": pool_map}).train()
    before = copy.deepcopy(model.trunk.state_dict())
    output = model(IMAGES)[0]
    assert output.requires_grad == (flag == "FREEZE_TRUNK_ONLY")
    if output.requires_grad:
        output.sum().backward()
    assert all(parameter.grad is None for parameter in model.trunk.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.trunk.state_dict().items())
    assert not model.trunk.training and not model.trunk.backbone.bn1.training
    assert model.heads.training == (flag == "FREEZE_TRUNK_ONLY")
    assert model.training


def test_unfrozen_trunk_moves() -> None:
    model = built().train()
    model(IMAGES)[0].sum().backward()
    assert model.trunk.backbone.bn1.num_batches_tracked.item() == 1
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_features_with_heads() -> None:
    settings = {"EVAL_MODE_ON": True, "FREEZE_TRUNK_AND_HEAD": True, "EVAL_TRUNK_AND_HEAD": True}
    model = built(FEATURE_EVAL_SETTINGS=settings).eval()
    features = model.features(IMAGES)
    assert list(features) == ["flatten", "heads"]
    assert torch.equal(features["heads"], model(IMAGES)[0])
    only = built(FEATURE_EVAL_SETTINGS={**settings, "EXTRACT_TRUNK_FEATURES_ONLY": True})
    assert list(only.features(IMAGES)) == ["flatten"]
    several = built(
        HEAD={"PARAMS": [["mlp", {"dims": ["auto", "auto"]}]] * 2},
        FEATURE_EVAL_SETTINGS={**settings, "LINEAR_EVAL_FEAT_POOL_OPS_MAP": MAP},
    )
    assert list(several.features(IMAGES)) == ["res3", "res4avg", "heads", "heads_1"]


def test_without_heads_nothing_about_labels_is_asked() -> None:
    model = build_model(section(), num_classes=None, with_heads=False)
    assert len(model.heads) == 0
    with pytest.raises(ConfigError, match="number of classes is not known"):
        build_model(section(), num_classes=None)


def test_parameters_that_are_never_trained() -> None:
    model = built(NON_TRAINABLE_PARAMS=["trunk._feature_blocks.conv1.weight", "heads.0.clf.0.bias"])
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["trunk._feature_blocks.conv1.weight", "heads.0.clf.0.bias"]
    with pytest.raises(
        ConfigError, match=r"NON_TRAINABLE_PARAMS.*\n.*did you mean 'trunk._feature_blocks.conv1.weight'"
    ):
        built(NON_TRAINABLE_PARAMS=["trunk._feature_block.conv1.weight"])


def test_bgr_and_lab() -> None:
    rgb, bgr = built().eval(), built(INPUT_TYPE="bgr").eval()
    with torch.no_grad():
        assert torch.equal(rgb(IMAGES)[0], bgr(IMAGES.flip(1))[0])
        lab = built(INPUT_TYPE="lab").eval()
        assert lab.trunk.backbone.conv1.in_channels == 1
        changed = IMAGES.clone()
        changed[:, 1:] = 0
        assert torch.equal(lab(IMAGES)[0], lab(changed)[0])


def test_meta_model_is_the_same_model() -> None:
    real, meta = built(), build_on_meta(section(), num_classes=4, image_size=28)
    assert {k: v.shape for k, v in real.state_dict().items()} == {k: v.shape for k, v in meta.state_dict().items()}
    assert all(value.is_meta for value in meta.state_dict().values())


def test_saved_model_needs_no_class_count() -> None:
    """Widths that follow from the image size and the labels are read off the saved tensors."""
    settings = {"LINEAR_EVAL_FEAT_POOL_OPS_MAP": [["res3", ["Identity", []]]]}
    model = built(FEATURE_EVAL_SETTINGS=settings)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    again = build_saved_model(section(FEATURE_EVAL_SETTINGS=settings), shapes)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(IMAGES)[0], model.eval()(IMAGES)[0])


@pytest.mark.parametrize("name", sorted(registry.COMPONENTS["trunk"]))
def test_every_own_trunk(name: str) -> None:
    """Forward, features, shapes, state dict, copy: each registered trunk goes through the same."""
    model = built(name).eval()
    with torch.no_grad():
        features = model.features(IMAGES)
        outputs = model(IMAGES)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(IMAGES)[0], outputs[0])
    shapes = model.trunk.feature_shapes(image_size=28)
    assert {key: tuple(value.shape[1:]) for key, value in features.items()} == shapes
    assert outputs[0].shape == (4, 4)
    assert "flatten" in model.layer_names()
    assert not [key for key in model.state_dict() if "base_model" in key]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet_smal", {}, r"TRUNK.NAME='resnet_smal': no such trunk; did you mean 'resnet_small'"),
        ("torchvision/resnet19", {}, "torchvision has no such model; did you mean 'resnet18'"),
        ("timm/resnet18x", {}, "timm has no such model; did you mean 'resnet18"),
        ("hf/dinov22", {}, "no such model type or config class; did you mean 'dinov2'"),
        ("hf/bert", {}, "BertModel does not take images"),
        ("hf/nobody/nothing", {}, "neither a local folder with a config.json nor a model that can be fetched"),
        (
            "resnet_small",
            {"width": [1]},
            "TRUNK.OPTIONS.width: trunk resnet_small has no such option; did you mean 'widths'",
        ),
        ("torchvision/resnet18", {"zero_init": True}, "OPTIONS.zero_init: .*did you mean 'zero_init_residual'"),
        ("timm/resnet18", {"drop_rat": 0.1}, "OPTIONS.drop_rat: .*did you mean 'drop_rate'"),
        ("hf/dinov2", {"hidden_sise": 8}, "OPTIONS.hidden_sise: Dinov2Config .*did you mean 'hidden_size'"),
        ("timm/resnet18", {"pretrained": True}, "OPTIONS.pretrained: cannot be set here: weights come through"),
        (
            "timm/resnet18",
            {"num_classes": 5},
            "OPTIONS.num_classes: cannot be set here: the classifier is config.MODEL.HEAD",
        ),
        ("grey_histogram", {"bins": 0}, "bins=0 must be at least 1"),
        ("resnet", {"depth": 18}, "set config.MODEL.TRUNK.RESNETS.DEPTH instead"),
    ],
)
def test_errors(name: str, options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        build_model(section(name, options), num_classes=4)


@pytest.mark.parametrize(
    ("pool_map", "message"),
    [
        (
            [["res9", ["Identity", []]]],
            r"POOL_OPS_MAP='res9': trunk 'resnet_small' has no such layer; did you mean 'res",
        ),
        ([["res3", ["AvgPool", [2]]]], r"MAP\[0\]: 'AvgPool' is no pooling operation; did you mean 'AvgPool2d'"),
        ([["res3", ["AvgPool2d", []]]], r"MAP\[0\]: AvgPool2d does not take the arguments \[\]"),
        ([["res3", ["AvgPool2d", [[9, 9], 1, 0]]]], "does not fit layer 'res3', whose features are 32x7x7 here"),
        ([["res3"]], r"MAP\[0\]=\['res3'\]: must be \[layer, \[operation, arguments\]\]"),
        ([["res3", "Identity"]], "must be"),
    ],
)
def test_pooling_map_errors(pool_map: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(HEAD={"PARAMS": []}, FEATURE_EVAL_SETTINGS={"LINEAR_EVAL_FEAT_POOL_OPS_MAP": pool_map})


def test_local_transformers_folder(tmp_path: Any) -> None:
    """hf/<folder>: its config.json decides; the weights in it are loaded only through WEIGHTS_INIT."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    saved = Dinov2Model(config)
    saved.save_pretrained(tmp_path)
    model = build_model(section(f"hf/{tmp_path}"), num_classes=2)
    assert {key.removeprefix("trunk._feature_blocks.") for key in model.trunk.state_dict(prefix="trunk.")} == set(
        saved.state_dict()
    )
    assert not model.trunk.backbone.embeddings.mask_token.requires_grad
    assert model(torch.randn(1, 3, 28, 28))[0].shape == (1, 2)


def test_images_that_do_not_fit_are_named_with_their_key() -> None:
    flat = built(FEATURE_EVAL_SETTINGS={"LINEAR_EVAL_FEAT_POOL_OPS_MAP": [["res3", ["Identity", []]]]})
    flat.check_input((3, 28, 28), key="here")
    with pytest.raises(ConfigError, match=r"here: images of 32x32 do not fit the heads"):
        flat.check_input((3, 32, 32), key="here")
    built().check_input((3, 64, 40), key="here")  # pooled to one size
    with pytest.raises(ConfigError, match=r"here: makes images of 1 channels.*takes 3"):
        built().check_input((1, 28, 28), key="here")
    built(INPUT_TYPE="lab").check_input((3, 28, 28), key="here")


def test_parameters_behind_the_last_wanted_layer_are_idle() -> None:
    early = built(FEATURE_EVAL_SETTINGS={"LINEAR_EVAL_FEAT_POOL_OPS_MAP": [["res3", ["AdaptiveAvgPool2d", [[1, 1]]]]]})
    idle = early.idle_parameters((28, 28))
    assert idle and all(name.startswith("trunk._feature_blocks.layer3.") for name in idle)
    assert len(idle) == len(list(early.trunk.backbone.layer3.parameters()))
    assert built().idle_parameters((28, 28)) == []
    assert all(not parameter.is_meta and parameter.grad is None for parameter in early.parameters())
