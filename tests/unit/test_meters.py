"""Meters: exact counts, ties, names, refusals, and sums over processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vissl_like.analysis.meters import AccuracyMeter, average_precision, build_meters, class_rank, ignored_target
from vissl_like.config.schema_model import Loss, Meters
from vissl_like.errors import ConfigError, DataError


def group(
    name: str = "accuracy_list_meter", *, heads: int = 1, topk: list[int] | None = None, names: list[str] | None = None
):
    section = {"METER_NAMES": names or []}
    if name != "mean_ap_list_meter":
        section["TOPK_VALUES"] = topk or [1]  # type: ignore[assignment]
    return build_meters(Meters(NAMES=[name], **{name.upper(): section}), num_heads=heads)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_accuracy_equals_counting_by_hand_in_any_batches(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, target = torch.randn(30, 6, generator=generator), torch.randint(0, 6, (30,), generator=generator)
    meters = group(topk=[1, 3])
    for rows in torch.arange(30).split(7):
        meters.update([logits[rows]], target[rows])
    order = logits.argsort(1, descending=True)
    by_hand = {k: 100 * (order[:, :k] == target[:, None]).any(1).float().mean().item() for k in (1, 3)}
    assert meters.flatten("test") == pytest.approx({"test_top_1": by_hand[1], "test_top_3": by_hand[3]}, rel=1e-5)


def test_ties_go_to_the_lower_class_and_nan_is_wrong() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [math.nan, 0.0, 0.0], [math.nan, math.nan, math.nan]])
    assert class_rank(logits[:2], torch.tensor([0, 1])).tolist() == [0, 1]
    meter = AccuracyMeter(topk=[1, 3], num_heads=1)
    meter.update([logits], torch.tensor([0, 1, 0, 2]))
    assert meter.correct.tolist() == [[1], [2]] and meter.total.tolist() == [4]


def test_unknown_and_unseen_classes() -> None:
    meter = AccuracyMeter(topk=[1, 3], num_heads=1)
    meter.update([torch.eye(3)], torch.tensor([0, -1, 7]))  # known and right, unlabelled, a class without a logit
    assert meter.correct.tolist() == [[1], [1]] and meter.total.tolist() == [2]


def test_what_the_loss_leaves_out_is_left_out() -> None:
    loss = Loss(NAME="cross_entropy", CROSS_ENTROPY={"IGNORE_INDEX": 2})
    assert (ignored_target(loss), ignored_target(Loss(NAME="bce_logits")), ignored_target(Loss())) == (2, -1, -1)
    logits, target = torch.eye(3)[[0, 0, 1, 1]], torch.tensor([0, 2, 2, -1])
    for ignored, value in ((2, 100.0), (-1, 100 / 3)):
        meters = build_meters(Meters(NAMES=["accuracy_list_meter"]), num_heads=1, ignore_index=ignored)
        meters.update([logits], target)
        assert meters.flatten("test") == {"test_top_1": pytest.approx(value)}


@pytest.mark.parametrize("name", ["accuracy_list_meter", "precision_at_k_list_meter", "recall_at_k_list_meter"])
def test_more_best_classes_than_there_are_is_an_error(name: str) -> None:
    meters, target = group(name, topk=[1, 9]), torch.tensor([0, 1, 2])
    message = rf"config\.METERS\.{name.upper()}\.TOPK_VALUES=\[1, 9\]: there are only 3 classes.*up to 3"
    with pytest.raises(ConfigError, match=message):
        meters.update([torch.eye(3)], target if name == "accuracy_list_meter" else torch.eye(3).long())
    options = Meters(NAMES=[name], **{name.upper(): {"TOPK_VALUES": [1, 9]}})
    with pytest.raises(ConfigError, match=message):  # before anything is computed, where the heads are known
        build_meters(options, num_heads=2, widths=[20, 3])
    build_meters(options, num_heads=1, widths=[9])


def test_rows_that_are_not_valid_do_not_count() -> None:
    meters = group()
    meters.update([torch.eye(3)], torch.tensor([0, 0, 2]), valid=torch.tensor([True, False, True]))
    assert meters.flatten("test") == {"test_top_1": 100.0}


def test_names_and_keys() -> None:
    target = torch.tensor([0, 1])
    outputs = [torch.eye(2), torch.eye(2).flip(0)]
    for names, nested, flat in [
        ([], {"0": 100.0, "1": 0.0}, {"test_top_1_0": 100.0, "test_top_1_1": 0.0}),
        (["a", "b"], {"a": 100.0, "b": 0.0}, {"test_top_1_a": 100.0, "test_top_1_b": 0.0}),
        (["a", "a"], {"a": [100.0, 0.0]}, {"test_top_1_a_0": 100.0, "test_top_1_a_1": 0.0}),
    ]:
        meters = group(heads=2, names=names)
        meters.update(outputs, target)
        assert meters.compute() == {"accuracy_list_meter": {"top_1": nested}}
        assert meters.flatten("test") == flat
    single = group(names=["clusters"])
    single.update(outputs[:1], target)
    assert single.flatten("train") == {"train_top_1_clusters": 100.0}


def test_reset_forgets_and_nothing_counted_is_not_a_number() -> None:
    meters = group()
    meters.update([torch.eye(2)], torch.tensor([0, 1]))
    meters.reset()
    assert math.isnan(meters.flatten("test")["test_top_1"])


def test_precision_and_recall_at_k() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    target = torch.tensor([[1, 0, 1, 0], [1, 0, 0, -1]])
    precision, recall = group("precision_at_k_list_meter", topk=[1, 2, 4]), group("recall_at_k_list_meter", topk=[1, 3])
    for meters in (precision, recall):
        meters.update([logits], target)
    assert precision.flatten("test") == pytest.approx(
        {"test_precision_top_1": 50.0, "test_precision_top_2": 25.0, "test_precision_top_4": 100 * 3 / 8}
    )
    assert recall.flatten("test") == pytest.approx({"test_recall_top_1": 100 / 3, "test_recall_top_3": 200 / 3})


def test_mean_ap_ignores_unknown_samples_and_absent_classes() -> None:
    meters = group("mean_ap_list_meter")
    logits = torch.tensor([[0.9, 0.1, 0.3], [0.8, 0.2, 0.2], [0.1, 0.7, 0.1]])
    meters.update([logits[:2]], torch.tensor([[1, 0, 0], [-1, 0, 0]]))
    meters.update([logits[2:]], torch.tensor([[0, 1, 0]]))
    assert meters.flatten("test") == {"test_mAP": 100.0}
    ap = meters.compute()["mean_ap_list_meter"]["AP"]["0"]
    assert ap[:2] == [1.0, 1.0] and math.isnan(ap[2])


def test_average_precision_does_not_depend_on_the_order_of_equal_scores() -> None:
    scores, labels = np.array([0.5, 0.5, 0.5, 0.5, 0.1]), np.array([1, 0, 0, 1, 1])
    first = average_precision(scores, labels)[2]
    assert average_precision(scores[::-1], labels[::-1])[2] == first
    # All four are accepted together: precision 1/2 at recall 2/3, then 3/5, which is higher.
    assert first == pytest.approx(0.6)


def test_average_precision_is_at_least_scikit_learns_step_function() -> None:
    from sklearn.metrics import average_precision_score

    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=50), generator.integers(0, 2, size=50)
    ours = average_precision(scores, labels)[2]
    assert average_precision_score(labels, scores) <= ours <= 1


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="2 heads are measured. Give one name per head"):
        group(heads=2, names=["a"])
    with pytest.raises(ConfigError, match="TOPK_VALUES"):
        group(topk=[0])
    with pytest.raises(ConfigError, match="1 heads are measured, but the model gave 2"):
        group().update([torch.eye(2)] * 2, torch.tensor([0, 1]))
    with pytest.raises(DataError, match="mean_ap_list_meter"):
        group().update([torch.eye(2)], torch.eye(2).long())
    with pytest.raises(DataError, match="accuracy_list_meter"):
        group("mean_ap_list_meter").update([torch.eye(2)], torch.tensor([0, 1]))
