"""Parameter groups and the optimizers built over them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vissl_like.config.schema_model import HeadOptimizer, LayerWiseLrDecay, ParamGroup
from vissl_like.config.schema_model import Optimizer as Options
from vissl_like.errors import ConfigError
from vissl_like.optim.groups import (
    Group,
    build_optimizer,
    layer_factors,
    load_state_by_name,
    make_groups,
    set_rates,
    state_by_name,
    table,
)
from vissl_like.optim.schedules import StepRates


class Net(nn.Module):
    """Names as in a real model: a stem, two stages, a class token, two heads."""

    def __init__(self) -> None:
        super().__init__()
        blocks = nn.Module()
        blocks.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        blocks.bn1 = nn.BatchNorm2d(4)
        blocks.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))
        blocks.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.LayerNorm(4))
        blocks.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        blocks.norm = nn.LayerNorm(4)
        self.trunk = nn.Module()
        self.trunk._feature_blocks = blocks
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), nn.Linear(4, 2)])


def decay_of(groups: list[Group]) -> dict[str, float]:
    return {name.removeprefix("trunk._feature_blocks."): group.weight_decay for group in groups for name in group.names}


def factor_of(groups: list[Group]) -> dict[str, float]:
    return {name.removeprefix("trunk._feature_blocks."): group.lr_factor for group in groups for name in group.names}


def test_default_groups_are_vissls() -> None:
    groups = make_groups(Net(), Options(WEIGHT_DECAY=0.1))
    assert {(group.role, group.weight_decay) for group in groups} == {
        (r, d) for r in ("trunk", "head") for d in (0.1, 0.0)
    }
    decay = decay_of(groups)
    free = {name for name, value in decay.items() if value == 0}
    assert free == {"bn1.weight", "bn1.bias", "layer1.1.weight", "layer1.1.bias", "layer2.1.weight", "layer2.1.bias",
                    "norm.weight", "norm.bias", "heads.0.1.weight", "heads.0.1.bias"}  # fmt: skip
    assert len(decay) == len(list(Net().parameters()))


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        ({"REGULARIZE_BN": True}, "bn1.weight", 0.1),
        ({"REGULARIZE_BN": True}, "bn1.bias", 0.1),
        ({"REGULARIZE_BN": True, "REGULARIZE_BIAS": False}, "bn1.weight", 0.1),
        ({"REGULARIZE_BN": True, "REGULARIZE_BIAS": False}, "bn1.bias", 0.0),
        ({"REGULARIZE_BIAS": False}, "layer1.0.bias", 0.0),
        ({"REGULARIZE_BIAS": False}, "layer1.0.weight", 0.1),
        ({}, "layer1.0.bias", 0.1),
        ({}, "cls_token", 0.1),
        ({"NON_REGULARIZED_PARAMETERS": ["cls_tok"]}, "cls_token", 0.0),
        ({"CONSTRUCT_SINGLE_PARAM_GROUP_ONLY": True}, "bn1.bias", 0.1),
        ({"HEAD_OPTIMIZER_PARAMS": HeadOptimizer(USE_DIFFERENT_WD=True, WEIGHT_DECAY=0.5)}, "heads.1.weight", 0.5),
        ({"HEAD_OPTIMIZER_PARAMS": HeadOptimizer(USE_DIFFERENT_WD=True, WEIGHT_DECAY=0.5)}, "heads.0.1.weight", 0.0),
        ({"HEAD_OPTIMIZER_PARAMS": HeadOptimizer(USE_DIFFERENT_WD=True, WEIGHT_DECAY=0.5)}, "conv1.weight", 0.1),
        ({"GROUPS": [ParamGroup(MATCH="bn1", WEIGHT_DECAY=0.7)]}, "bn1.bias", 0.7),
    ],
)
def test_weight_decay_rules(options: dict, name: str, expected: float) -> None:
    assert decay_of(make_groups(Net(), Options(WEIGHT_DECAY=0.1, **options)))[name] == expected


def test_frozen_parameters_are_left_out() -> None:
    net = Net()
    net.trunk.requires_grad_(False)
    groups = make_groups(net, Options())
    assert all(name.startswith("heads.") for group in groups for name in group.names)
    net.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        make_groups(net, Options())


def test_shared_parameters_are_in_one_group_once() -> None:
    net = Net()
    net.heads[1].weight = nn.Parameter(torch.zeros(2, 4))
    net.heads.append(nn.Linear(4, 2))
    net.heads[2].weight = net.heads[1].weight
    members = [id(parameter) for group in make_groups(net, Options()) for parameter in group.parameters]
    assert len(members) == len(set(members)) == len(list(net.parameters()))


def test_first_matching_group_wins() -> None:
    own = [ParamGroup(MATCH=r"layer1\.0", LR_FACTOR=0.5), ParamGroup(MATCH="layer", LR_FACTOR=0.1)]
    factors = factor_of(make_groups(Net(), Options(GROUPS=own)))
    assert (factors["layer1.0.weight"], factors["layer1.1.weight"], factors["conv1.weight"]) == (0.5, 0.1, 1.0)


def test_group_that_matches_nothing_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"GROUPS\[1\].MATCH='layr1'.*Names look like"):
        make_groups(Net(), Options(GROUPS=[ParamGroup(MATCH="layer1"), ParamGroup(MATCH="layr1")]))
    with pytest.raises(ConfigError, match="not a regular expression"):
        make_groups(Net(), Options(GROUPS=[ParamGroup(MATCH="(")]))


def test_layers_of_a_resnet() -> None:
    options = Options(PARAM_GROUP_CONSTRUCTOR="lr_decay", LAYER_WISE_LR_DECAY=LayerWiseLrDecay(DECAY=0.5))
    factors = factor_of(make_groups(Net(), options))
    assert factors["conv1.weight"] == factors["bn1.weight"] == 0.5**3
    assert factors["layer1.0.weight"] == factors["layer1.1.bias"] == 0.5**2
    assert factors["layer2.0.weight"] == 0.5
    assert factors["heads.0.0.weight"] == factors["norm.weight"] == 1.0


VITS = {
    "timm": ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.11.mlp.fc2.bias",
             "norm.weight"),
    "torchvision": ("class_token", "encoder.pos_embedding", "conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight",
                    "encoder.layers.encoder_layer_11.mlp.0.bias", "encoder.ln.weight"),
    "hf": ("embeddings.cls_token", "embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight",
           "encoder.layer.0.layernorm_before.weight", "encoder.layer.11.output.dense.bias", "layernorm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("library", VITS)
def test_layers_of_vision_transformers(library: str) -> None:
    """Depths as in MAE: embeddings 0, block i at i + 1, last norm and head at 13."""
    token, table_, patch, first, last, norm = (f"trunk._feature_blocks.{name}" for name in VITS[library])
    options = Options(LAYER_WISE_LR_DECAY=LayerWiseLrDecay(DECAY=0.75))
    factors = layer_factors([token, table_, patch, first, last, norm, "heads.0.weight"], options)
    expected = [0.75**13] * 3 + [0.75**12, 0.75, 1.0, 1.0]
    assert list(factors.values()) == pytest.approx(expected, rel=1e-12)


def test_trunk_without_numbered_layers_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"no numbered layers.*GROUPS"):
        layer_factors(["trunk.fc.weight"], Options())


def test_rates_reach_the_groups() -> None:
    options = Options(
        WEIGHT_DECAY=0.1, GROUPS=[ParamGroup(MATCH="layer1", LR_FACTOR=0.5, WEIGHT_DECAY=0.2)], NAME="adamw"
    )
    groups = make_groups(Net(), options)
    optimizer = build_optimizer(groups, options)
    set_rates(optimizer, groups, StepRates(2.0, 3.0, 0.4))
    by_name = {
        name: (target["lr"], target["weight_decay"])
        for target, group in zip(optimizer.param_groups, groups)
        for name in group.names
    }
    assert by_name["trunk._feature_blocks.layer1.0.weight"] == (1.0, 0.2)
    assert by_name["trunk._feature_blocks.conv1.weight"] == (2.0, 0.4)
    assert by_name["trunk._feature_blocks.bn1.weight"] == (2.0, 0.0)
    assert by_name["heads.1.weight"] == (3.0, 0.4)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "lars", "timm/lamb", "timm/lion"])
def test_every_optimizer_takes_a_step(name: str) -> None:
    net = Net()
    options = Options(NAME=name)
    groups = make_groups(net, options)
    optimizer = build_optimizer(groups, options)
    set_rates(optimizer, groups, StepRates(0.1, 0.1, None))
    before = net.heads[1].weight.detach().clone()
    net.heads[1](torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net.heads[1].weight, before)


def test_wrong_argument_lists_the_right_ones() -> None:
    options = Options(OPTIONS={"momentun": 0.5})
    with pytest.raises(ConfigError, match=r"momentun.*momentum"):
        build_optimizer(make_groups(Net(), options), options)
    with pytest.raises(ConfigError, match="Nesterov"):
        build_optimizer(make_groups(Net(), Options()), Options(MOMENTUM=0.0, NESTEROV=True))


def test_state_by_name_survives_another_grouping() -> None:
    def trained(options: Options) -> tuple[nn.Module, list[Group], torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = Net()
        groups = make_groups(net, options)
        return net, groups, build_optimizer(groups, options)

    one, two = Options(NAME="adam"), Options(NAME="adam", CONSTRUCT_SINGLE_PARAM_GROUP_ONLY=True)
    net, groups, optimizer = trained(one)
    net.heads[1](torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    state = state_by_name(optimizer, groups)
    assert set(state) == {"heads.1.weight", "heads.1.bias"}
    _, other_groups, other = trained(two)
    load_state_by_name(other, other_groups, state)
    found = state_by_name(other, other_groups)
    assert found.keys() == state.keys()
    for name, entries in state.items():
        for key, value in entries.items():
            assert torch.equal(found[name][key], value)


def test_state_of_an_unknown_parameter_is_refused() -> None:
    options = Options()
    groups = make_groups(Net(), options)
    with pytest.raises(ConfigError, match="'gone.weight', which is not trained now"):
        load_state_by_name(build_optimizer(groups, options), groups, {"gone.weight": {}})


def test_table_counts_members() -> None:
    groups = make_groups(Net(), Options())
    assert sum(group.count for group in groups) == sum(p.numel() for p in Net().parameters())
    assert len(table(groups).splitlines()) == len(groups) + 1


def test_options_set_in_vain_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    for name, momentum, said in (("timm/lamb", 0.5, True), ("adam", 0.9, False), ("sgd", 0.5, False)):
        caplog.clear()
        options = Options(NAME=name, MOMENTUM=momentum)
        build_optimizer(make_groups(model, options), options)
        assert ("does not take MOMENTUM" in caplog.text) == said


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_fused_steps_equal_single_operations(name: str) -> None:
    """But for rounding; and OPTIONS decides."""
    trained = []
    for options in ({}, {"foreach": False}):
        torch.manual_seed(0)
        layer = nn.Linear(50, 30).double()
        groups = make_groups(layer, Options(NAME=name, WEIGHT_DECAY=0.1))
        optimizer = build_optimizer(groups, Options(NAME=name, WEIGHT_DECAY=0.1, OPTIONS=options))
        assert bool(optimizer.defaults["fused"]) == (not options)
        for step in range(20):
            layer.zero_grad()
            layer(torch.full((4, 50), step / 10, dtype=torch.float64)).square().mean().backward()
            set_rates(optimizer, groups, StepRates(0.01 * (1 + step % 3), 0.01, None))
            optimizer.step()
        trained.append(layer.weight.detach())
    torch.testing.assert_close(*trained, rtol=1e-10, atol=1e-12)
