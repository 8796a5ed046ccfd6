"""Mixup and CutMix: the numbers of timm's Mixup, seed for seed, and batches of odd size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup

from vissl_like.config.schema_data import Mix
from vissl_like.config.schema_parts import PartsLoss
from vissl_like.core import rng
from vissl_like.data.mix import make_mix
from vissl_like.errors import ConfigError
from vissl_like.tasks.parts import classification

C = 5
KINDS: dict[str, dict[str, Any]] = {
    "mixup": {"MIXUP": 0.8},
    "cutmix": {"CUTMIX": 1.0},
    "both": {"MIXUP": 0.4, "CUTMIX": 0.7},
    "rarely": {"MIXUP": 0.4, "CUTMIX": 0.7, "PROB": 0.5, "SWITCH_PROB": 0.8},
    "minmax": {"CUTMIX_MINMAX": [0.2, 0.8]},
    "mixup or minmax": {"MIXUP": 1.0, "CUTMIX_MINMAX": [0.3, 0.9]},
}


def batch(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return torch.rand(size, 3, 11, 14, generator=chance), torch.randint(C, (size,), generator=chance)


def timms(options: Mix, smoothing: float) -> Mixup:
    return Mixup(
        mixup_alpha=options.MIXUP, cutmix_alpha=options.CUTMIX, cutmix_minmax=options.CUTMIX_MINMAX or None,
        prob=options.PROB, switch_prob=options.SWITCH_PROB, mode=options.MODE, label_smoothing=smoothing, num_classes=C,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_equal_timms(kind: str, mode: str) -> None:
    options = Mix(MODE=mode, **KINDS[kind])
    mix, reference = make_mix(options, num_classes=C, smoothing=0.1), timms(options, 0.1)
    assert mix is not None
    changed = 0
    for seed in range(12):
        images, labels = batch(6, seed)
        before = images.clone()
        rng.seed_step(seed, 3, 0)
        found, targets = mix(images, labels)
        assert torch.equal(images, before)
        rng.seed_step(seed, 3, 0)
        expected, wanted = reference(before, labels)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(targets, wanted, rtol=0, atol=1e-6)
        changed += not torch.equal(images, found)
    assert changed == 12 if kind != "rarely" else 0 < changed


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("size", [1, 7])
def test_batches_of_odd_size(mode: str, size: int) -> None:
    """The middle image stays as it is; the targets of the others say how much of which image there is."""
    mix = make_mix(Mix(MIXUP=1.0, CUTMIX=1.0, MODE=mode), num_classes=size)
    assert mix is not None
    labels = torch.arange(size)
    images = torch.zeros(size, size, 9, 9)  # a channel for each image
    images[labels, labels] = 1
    for seed in range(10):
        rng.seed_step(seed, 0, 0)
        found, targets = mix(images, labels)
        torch.testing.assert_close(found.mean((2, 3)), targets, rtol=0, atol=1e-6)
        torch.testing.assert_close(targets.sum(1), torch.ones(size))
        assert torch.allclose(found[size // 2], images[size // 2], atol=1e-6)


def test_nothing_to_mix() -> None:
    assert make_mix(Mix(), num_classes=C) is None
    mix = make_mix(Mix(MIXUP=1.0, PROB=0.0), num_classes=C, smoothing=0.2)
    assert mix is not None
    images, labels = batch(4)
    found, targets = mix(images, labels)
    assert torch.equal(found, images)
    assert targets[0].tolist() == pytest.approx([0.84 if k == labels[0] else 0.04 for k in range(C)])


@pytest.mark.parametrize("limits", [[0.2], [0.5, 0.2], [-0.1, 0.5], [0.2, 1.5], [0.1, 0.2, 0.3]])
def test_wrong_limits(limits: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"config\.DATA\.MIX\.CUTMIX_MINMAX=\[.*such as \[0\.2, 0\.8\]"):
        make_mix(Mix(CUTMIX_MINMAX=limits), num_classes=C)


def test_limits_that_are_equal_are_that_size() -> None:
    mix = make_mix(Mix(CUTMIX_MINMAX=[0.5, 0.5]), num_classes=C)
    assert mix is not None
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 10, 8).contiguous()
    rng.seed_step(0, 0, 0)
    found, _ = mix(images, torch.zeros(4, dtype=torch.int64))
    assert (found[0, 0] == 3).sum() == 5 * 4


def test_smoothing_counts_once() -> None:
    """Of mixed targets it is in the targets; the loss adds none."""
    options = PartsLoss(SMOOTHING=0.3)
    logits, labels = torch.from_numpy(np.random.default_rng(0).normal(size=(4, C))), torch.tensor([0, 1, 2, 3])
    mix = make_mix(Mix(MIXUP=1.0, PROB=0.0), num_classes=C, smoothing=0.3)
    assert mix is not None
    targets = mix(torch.zeros(4, 3, 2, 2), labels)[1].double()
    torch.testing.assert_close(
        classification(logits, targets, options), classification(logits, labels, options), rtol=1e-6, atol=0
    )
