"""The moving average of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vissl_like.config.schema_model import Ema as Options
from vissl_like.errors import WeightsError
from vissl_like.models.ema import Ema


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)


def test_average_by_hand() -> None:
    model = net()
    ema = Ema(model, options=Options(DECAY=0.75, WARMUP=0.0), total_steps=10)
    expected = model[0].weight.detach().clone().double()
    for step in range(1, 5):
        change(model)
        ema.update(step)
        expected = 0.75 * expected + 0.25 * model[0].weight.detach().double()
    torch.testing.assert_close(ema.state_dict()["0.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    assert ema.state_dict()["1.num_batches_tracked"] == 4


def test_warmup_copies() -> None:
    model = net()
    ema = Ema(model, options=Options(DECAY=0.9, WARMUP=0.5), total_steps=4)
    for step in (1, 2):
        change(model)
        ema.update(step)
        assert torch.equal(ema.state_dict()["0.weight"], model[0].weight)
    change(model)
    ema.update(3)
    torch.testing.assert_close(ema.state_dict()["0.weight"], model[0].weight - 0.9)


def test_only_every_so_many_steps() -> None:
    model = net()
    ema = Ema(model, options=Options(UPDATE_ITER=3, WARMUP=1.0), total_steps=10)
    first = model[0].weight.detach().clone()
    for step in (1, 2):
        change(model)
        ema.update(step)
        assert torch.equal(ema.state_dict()["0.weight"], first)
    ema.update(3)
    assert torch.equal(ema.state_dict()["0.weight"], model[0].weight)


def test_in_place_and_back() -> None:
    model = net()
    ema = Ema(model, options=Options(), total_steps=10)
    first = model[0].weight.detach().clone()
    change(model)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), ema.in_place():
        assert torch.equal(model[0].weight, first)
        raise KeyError
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


def test_state_goes_on() -> None:
    model = net()
    ema = Ema(model, options=Options(), total_steps=10)
    first = model[0].weight.detach().clone()
    change(model)
    other = Ema(model, options=Options(), total_steps=10)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.state_dict()["0.weight"], first)
    with pytest.raises(WeightsError, match=r"0\.bias"):
        other.load_state_dict({})


def test_rising_decay_is_timms() -> None:
    """1 - (1 + n)^(-2/3) with n updates before, until that exceeds DECAY."""
    from timm.utils import ModelEmaV3

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    ours = Ema(model, options=Options(DECAY=0.7, WARMUP=0.0, RISING_DECAY=True), total_steps=10)
    theirs = ModelEmaV3(model, decay=0.7, use_warmup=True)
    for step in range(1, 11):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ours.update(step)
        theirs.update(model, step=step)
        torch.testing.assert_close(ours.state_dict()["weight"], theirs.module.weight.data, rtol=1e-6, atol=1e-6)
