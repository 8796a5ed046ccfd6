"""Heads: layers and state keys of VISSL, inferred sizes, one head per feature or a chain, errors that name the key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vissl_like.config.schema_model import Head
from vissl_like.errors import ConfigError
from vissl_like.models.heads import MLPHead, build_heads, resolve_from_state


def heads(params: list[Any], *shapes: tuple[int, ...], num_classes: int | None = None, **section: Any) -> nn.ModuleList:
    named = [(f"feature{index}", shape) for index, shape in enumerate(shapes)]
    return build_heads(Head(PARAMS=params, **section), shapes=named, num_classes=num_classes)


def test_auto_sizes() -> None:
    [head] = heads([["mlp", {"dims": ["auto", "auto"]}]], (512,), num_classes=7)
    assert {key: tuple(value.shape) for key, value in head.state_dict().items()} == {
        "clf.0.weight": (7, 512),
        "clf.0.bias": (7,),
    }
    [head] = heads([["mlp", {"dims": ["auto", 32, 5]}]], (8, 2, 2))
    assert head(torch.randn(3, 8, 2, 2)).shape == (3, 5)


def test_mlp_layers() -> None:
    """Linear, batch norm, ReLU, dropout per layer; the last is linear alone unless asked otherwise."""
    options = {"use_bn": True, "use_relu": True, "use_dropout": True, "use_bias": False}
    [head] = heads([["mlp", {"dims": [4, 8, 3], **options}]], (4,), BATCHNORM_EPS=0.5, BATCHNORM_MOMENTUM=0.25)
    kinds = [type(layer).__name__ for layer in head.clf]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    assert (head.clf[1].eps, head.clf[1].momentum, head.clf[4].bias) == (0.5, 0.25, None)
    [head] = heads([["mlp", {"dims": [4, 8], "skip_last_layer_relu_bn": False, **options}]], (4,))
    assert [type(layer).__name__ for layer in head.clf] == kinds[:4]


def test_eval_mlp() -> None:
    torch.manual_seed(0)
    [head] = heads([["eval_mlp", {"in_channels": "auto", "dims": ["auto", "auto"]}]], (8, 2, 3), num_classes=5)
    assert {key for key, _ in head.named_parameters()} == {
        "channel_bn.weight",
        "channel_bn.bias",
        "clf.clf.0.weight",
        "clf.clf.0.bias",
    }
    maps = torch.randn(4, 8, 2, 3)
    normal = (maps - maps.mean((0, 2, 3), keepdim=True)) / (
        maps.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    linear = head.clf.clf[0]
    expected = normal.flatten(1) @ linear.weight.T + linear.bias
    torch.testing.assert_close(head(maps), expected)
    torch.testing.assert_close(head(maps.flatten(1)), expected)


def test_multiplier_scales_all_initial_parameters() -> None:
    params = [["mlp", {"dims": [4, 3]}]]
    torch.manual_seed(0)
    [plain] = heads(params, (4,))
    torch.manual_seed(0)
    [scaled] = heads(params, (4,), PARAMS_MULTIPLIER=0.5)
    torch.testing.assert_close(scaled.clf[0].weight, plain.clf[0].weight * 0.5)
    torch.testing.assert_close(scaled.clf[0].bias, plain.clf[0].bias * 0.5)


def test_chain_and_one_per_feature() -> None:
    chain = heads(
        [["mlp", {"dims": ["auto", 16], "use_relu": True}], ["mlp", {"dims": ["auto", "auto"]}]], (32,), num_classes=3
    )
    assert [head.clf[0].weight.shape for head in chain] == [(16, 32), (3, 16)]
    each = heads([["mlp", {"dims": ["auto", "auto"]}], ["identity", {}]], (32,), (8,), num_classes=3)
    assert each[0].clf[0].weight.shape == (3, 32)
    assert torch.equal(each[1](torch.ones(2, 8)), torch.ones(2, 8))
    assert len(heads([], (32,), (8,))) == 0


@pytest.mark.parametrize(
    ("params", "shapes", "num_classes", "message"),
    [
        ([["mlp", {"dims": [512, 3]}]], [(64,)], 3, r"PARAMS\[0\].*does not take 'feature0', whose shape is 64"),
        ([["mlp", {"dims": ["auto", 3]}]], [(64,)], 4, "has 3 outputs, but the labels have 4 classes"),
        ([["mlp", {"dims": ["auto", "auto"]}]], [(64,)], None, "the number of classes is not known here"),
        ([["mlp", {"dims": ["auto", "auto", 3]}]], [(64,)], 3, "only the first and the last size"),
        ([["mlp", {"dims": [64, 0]}]], [(64,)], None, "sizes are whole numbers from 1"),
        ([["mlp", {"dims": [64]}]], [(64,)], None, "at least an input and an output"),
        ([["mlp", {}]], [(64,)], None, "missing 1 required keyword-only argument: 'dims'"),
        ([["mlp", {"dims": [64, 3], "use_nb": True}]], [(64,)], 3, r"PARAMS\[0\].use_nb: .*did you mean 'use_bn'"),
        ([["mpl", {"dims": [64, 3]}]], [(64,)], 3, "no such head; did you mean 'mlp'"),
        (["mlp"], [(64,)], 3, r"must be \[name, options\]"),
        ([["identity"]] * 3, [(64,), (64,)], None, r"3 heads for 2 features \(feature0, feature1\)"),
        ([["identity"]], [(64,), (64,)], None, "1 heads for 2 features"),
        ([["eval_mlp", {"in_channels": 5, "dims": ["auto", 3]}]], [(8, 2, 2)], 3, "does not take 'feature0'"),
    ],
)
def test_errors(params: list[Any], shapes: list[tuple[int, ...]], num_classes: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        heads(params, *shapes, num_classes=num_classes)


def test_sizes_are_read_off_saved_heads() -> None:
    params = [
        ["mlp", {"dims": ["auto", 16, "auto"], "use_bn": True, "use_relu": True}],
        ["eval_mlp", {"in_channels": "auto", "dims": ["auto", "auto"]}],
    ]
    saved = heads(params, (32,), (8, 3, 3), num_classes=5)
    shapes = {f"heads.{key}": tuple(value.shape) for key, value in saved.state_dict().items()}
    resolved = resolve_from_state(params, shapes)
    assert [options["dims"] for _, options in resolved] == [[32, 16, 5], [72, 5]]
    again = build_heads(Head(PARAMS=resolved), shapes=None, num_classes=None)
    again.load_state_dict(saved.state_dict())
    assert isinstance(again[0], MLPHead)
