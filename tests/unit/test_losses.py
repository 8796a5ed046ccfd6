"""Classification losses: what they refuse, and limits that can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from vissl_like.config.schema_model import Loss
from vissl_like.errors import ConfigError, DataError
from vissl_like.losses.classification import bce_logits, cross_entropy, row_weights
from vissl_like.tasks.supervised import loss_function


def test_uniform_logits_cost_log_k() -> None:
    loss = cross_entropy(torch.zeros(3, 7, dtype=torch.float64), torch.tensor([0, 3, 6]))
    assert math.isclose(loss.item(), math.log(7), rel_tol=1e-12)


def test_outputs_are_summed_not_averaged() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 4])
    one = cross_entropy(logits, target)
    torch.testing.assert_close(cross_entropy([logits, logits, logits], target), 3 * one)


def test_half_precision_is_computed_in_float32() -> None:
    logits = torch.randn(8, 5).half()
    target = torch.arange(8) % 5
    assert cross_entropy(logits, target).dtype == torch.float32
    torch.testing.assert_close(cross_entropy(logits, target), cross_entropy(logits.float(), target))


def test_one_hot_shares_equal_class_numbers() -> None:
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 1, 1])
    shares = torch.nn.functional.one_hot(target, 4)
    torch.testing.assert_close(cross_entropy(logits, shares), cross_entropy(logits, target))


def test_label_beyond_the_head_names_the_numbers() -> None:
    with pytest.raises(DataError, match=r"label is 12.*has 10 outputs"):
        cross_entropy(torch.zeros(2, 10), torch.tensor([3, 12]))


def test_ignored_targets_do_not_count() -> None:
    logits = torch.randn(4, 3)
    target = torch.tensor([0, -1, 2, -1])
    torch.testing.assert_close(cross_entropy(logits, target), cross_entropy(logits[[0, 2]], target[[0, 2]]))


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({}, [0, 1, 2, 0, 1, 2, 2]),
        ({"CROSS_ENTROPY": {"IGNORE_INDEX": 2}}, [0, 2, 2, 2, 1, 2, 0]),
        ({"CROSS_ENTROPY": {"WEIGHT": [1.0, 0.0, 2.5]}}, [0, -1, 1, 1, 1, 2, -1]),
        ({"CROSS_ENTROPY": {"WEIGHT": [1.0, 0.2, 2.5], "LABEL_SMOOTHING": 0.1}}, [0, -1, 1, 1, 1, 2, -1]),
        ({"CROSS_ENTROPY": {"WEIGHT": [1.0, 0.0, 2.5]}}, [[1, 0, 0], [0, 1, 1]] * 3 + [[0, 0, 1]]),
        ({"NAME": "bce_logits"}, [[1, 0, 1], [-1, -1, -1], [-1, 0, 1], [-1, 1, -1], [0, 0, 0], [1, -1, 1], [1, 1, 1]]),
    ],
)
def test_batches_weighted_by_their_rows_give_the_mean_over_all(options: dict[str, Any], target: list[Any]) -> None:
    loss = Loss.model_validate(options)
    function = loss_function(loss)
    logits, labels = torch.randn(7, 3, dtype=torch.float64), torch.tensor(target)
    weights = torch.from_numpy(row_weights(np.array(target), loss=loss))
    for parts in ([3, 1, 3], [1] * 7):
        pieces = zip(logits.split(parts), labels.split(parts), weights.split(parts))
        total = sum(function(some, of_some) * counted.sum() for some, of_some, counted in pieces)
        torch.testing.assert_close(total / weights.sum(), function(logits, labels))


@pytest.mark.parametrize("ignore_index", [-1, 1])
def test_without_a_known_target_the_loss_is_zero(ignore_index: int) -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((3,), ignore_index), ignore_index=ignore_index)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_negative_label_beside_the_ignored_one_is_an_error() -> None:
    with pytest.raises(DataError, match="a label is -1"):
        cross_entropy(torch.zeros(3, 4), torch.tensor([2, -1, 0]), ignore_index=1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_unknown_labels_have_no_gradient(reduction: str) -> None:
    logits = torch.randn(5, 3, requires_grad=True)
    target = torch.tensor([[0, 1, -1], [1, 1, -1], [-1, 0, -1], [0, -1, -1], [1, 1, -1]])
    bce_logits(logits, target, reduction=reduction).backward()
    assert (logits.grad[target == -1] == 0).all()
    assert (logits.grad[target != -1] != 0).all()


def test_bce_reductions_agree_where_all_is_known() -> None:
    logits, target = torch.randn(5, 3, dtype=torch.float64), torch.randint(0, 2, (5, 3))
    mean = bce_logits(logits, target, reduction="mean")
    torch.testing.assert_close(bce_logits(logits, target, reduction="sum"), mean * 15)
    torch.testing.assert_close(bce_logits(logits, target, reduction="none"), mean * 3)


def test_bce_shape_mismatch_is_explained() -> None:
    with pytest.raises(DataError, match="one column per class"):
        bce_logits(torch.zeros(2, 4), torch.zeros(2, 3))


def test_a_batch_without_targets_costs_nothing() -> None:
    """A mean over nothing would be NaN, and end the training."""
    logits = torch.randn(3, 4, requires_grad=True)
    for weight in (None, [1.0, 2.0, 3.0, 4.0]):
        loss = cross_entropy(logits, torch.full((3,), -1), weight=weight)
        loss.backward()
        assert loss.item() == 0.0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 2.0, 4.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mean_is_that_of_torch(weight: list[float] | None, smoothing: float) -> None:
    logits, target = torch.randn(6, 4), torch.tensor([0, -1, 2, 3, 1, -1])
    expected = torch.nn.functional.cross_entropy(
        logits,
        target,
        weight=None if weight is None else torch.tensor(weight),
        ignore_index=-1,
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(cross_entropy(logits, target, weight=weight, label_smoothing=smoothing), expected)


def test_as_many_weights_as_classes() -> None:
    with pytest.raises(ConfigError, match=r"WEIGHT has 2 numbers.*4 outputs"):
        cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]), weight=[1.0, 2.0])


def test_ignored_labels_need_not_fit_and_missing_ones_are_named() -> None:
    logits = torch.zeros(2, 4)
    assert math.isclose(
        cross_entropy(logits, torch.tensor([1, 255]), ignore_index=255).item(), math.log(4), rel_tol=1e-6
    )
    with pytest.raises(DataError, match=r"label is -1.*IGNORE_INDEX=255"):
        cross_entropy(logits, torch.tensor([1, -1]), ignore_index=255)
