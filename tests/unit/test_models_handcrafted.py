"""Trunks without parameters, checked by hand."""

from __future__ import annotations

import torch

from vissl_like.config.schema_model import Model
from vissl_like.models.handcrafted import GreyHistogram, RawPixels
from vissl_like.models.zoo import build_model


def test_raw_pixels() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(RawPixels()(images), images.flatten(1))
    halves = RawPixels(size=2)(torch.ones(2, 3, 4, 4) * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
    torch.testing.assert_close(halves, torch.tensor([0.0, 1.0]).view(2, 1).expand(2, 12))


def test_histogram_counts_shares() -> None:
    image = torch.tensor([[0.0, 0.24, 0.26, 0.99], [1.0, -3.0, 7.0, 0.5]]).expand(1, 3, 2, 4)
    expected = torch.tensor([[3.0, 1.0, 1.0, 3.0]]) / 8
    torch.testing.assert_close(GreyHistogram(bins=4)(image), expected)
    shifted = GreyHistogram(bins=4, range=(-1.0, 3.0))(image * 4 - 1)
    torch.testing.assert_close(shifted, expected)


def test_histogram_weighs_colours() -> None:
    green = torch.zeros(1, 3, 1, 1)
    green[:, 1] = 1.0
    assert GreyHistogram(bins=10)(green).argmax().item() == 5  # 0.587
    assert GreyHistogram(bins=10, in_channels=1)(torch.full((1, 1, 2, 2), 0.35)).argmax().item() == 3


def test_histogram_is_exact_in_half_precision() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        counts = GreyHistogram(bins=2)(torch.zeros(1, 3, 64, 64))
    assert counts.tolist() == [[1.0, 0.0]]


def test_they_have_no_parameters_but_take_heads() -> None:
    for name in ("raw_pixels", "grey_histogram"):
        model = build_model(Model.model_validate({"TRUNK": {"NAME": name}}), num_classes=3, image_size=8)
        assert not list(model.trunk.parameters())
        assert model(torch.rand(2, 3, 8, 8))[0].shape == (2, 3)
