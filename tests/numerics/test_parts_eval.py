"""Part metrics against recorded results of the original evaluation, and against scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vissl_like.analysis import part_metrics

RECORDED = np.load(Path(__file__).parents[1] / "data" / "parts_eval.npz")
SIZE = (64, 64)


def tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(RECORDED[name])


@pytest.mark.parametrize(("split", "suffix"), [("eval", ""), ("fit", "_fit")])
def test_clusters_at_keypoints(split: str, suffix: str) -> None:
    maps, keypoints = tensor(f"{split}/maps"), tensor(f"{split}/keypoints")[..., 1:]
    table = part_metrics.keypoint_table(maps, keypoints, size=SIZE)
    assert table.sum() == int((keypoints[..., 2] > 0).sum())
    assert part_metrics.normalized_mutual_information(table) == pytest.approx(float(RECORDED["nmi" + suffix]), abs=1e-3)
    assert part_metrics.adjusted_rand_index(table) == pytest.approx(float(RECORDED["ari" + suffix]), abs=1e-3)


def test_counts_add_up_over_batches() -> None:
    maps, keypoints = tensor("eval/maps"), tensor("eval/keypoints")[..., 1:]
    whole = part_metrics.keypoint_table(maps, keypoints, size=SIZE)
    parts = [part_metrics.keypoint_table(maps[i : i + 5], keypoints[i : i + 5], size=SIZE) for i in range(0, 16, 5)]
    assert (sum(parts) == whole).all()


def test_pixel_wise_clusters() -> None:
    table = part_metrics.mask_table(tensor("eval/maps")[:6], tensor("partmask/masks"))
    nmi, ari = float(RECORDED["partmask/nmi"]), float(RECORDED["partmask/ari"])
    assert part_metrics.normalized_mutual_information(table) == pytest.approx(nmi, abs=1e-3)
    assert part_metrics.adjusted_rand_index(table) == pytest.approx(ari, abs=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=60))
def test_scores_of_a_table_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found, annotated = np.array(pairs).T
    table = np.zeros((4, 5), dtype=np.int64)
    np.add.at(table, (found, annotated), 1)
    nmi, ari = normalized_mutual_info_score(annotated, found), adjusted_rand_score(annotated, found)
    assert part_metrics.normalized_mutual_information(table) == pytest.approx(100 * nmi, abs=1e-6)
    assert part_metrics.adjusted_rand_index(table) == pytest.approx(100 * ari, abs=1e-6)


def found_centres(split: str) -> part_metrics.Centres:
    keypoints, boxes = tensor(f"{split}/keypoints")[..., 1:], tensor(f"{split}/boxes")[:, 1:]
    return part_metrics.centres(tensor(f"{split}/maps"), keypoints, boxes, size=SIZE)


@pytest.mark.parametrize("split", ["fit", "eval"])
def test_centres(split: str) -> None:
    found = found_centres(split)
    count = len(found.parts)
    np.testing.assert_allclose(found.parts.reshape(count, -1), RECORDED[f"{split}/centers"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.repeat(found.active, 2, axis=1), RECORDED[f"{split}/active"])
    np.testing.assert_array_equal(np.repeat(found.visible, 2, axis=1), RECORDED[f"{split}/masks"])
    keypoints = found.keypoints.reshape(count, -1)
    np.testing.assert_allclose(keypoints, RECORDED[f"{split}/annos"], rtol=1e-5, atol=1e-6)


def test_keypoint_regression() -> None:
    found = part_metrics.keypoint_regression(found_centres("fit"), found_centres("eval"))
    assert found["keypoint_error"] == pytest.approx(float(RECORDED["kpr"]), abs=1e-3)
    assert found["keypoint_error"] < found["keypoint_error_of_mean"]


def test_regression_of_keypoints_that_are_parts() -> None:
    """Keypoints at an affine image of the parts' centres are found exactly; the mean predictor is off by the spread."""
    random = np.random.default_rng(0)
    spots = random.normal(size=(40, 3, 2))
    all_true = np.ones((40, 3), dtype=bool)
    exact = part_metrics.Centres(spots, all_true, spots[:, ::-1] * 2 + 1, all_true)
    found = part_metrics.keypoint_regression(exact, exact)
    assert found["keypoint_error"] == pytest.approx(0, abs=1e-9) and found["keypoint_pck"] == 100
    spread = np.linalg.norm(exact.keypoints - exact.keypoints.mean(0), axis=2).mean() * 100
    assert found["keypoint_error_of_mean"] == pytest.approx(spread)


def test_regression_without_a_visible_keypoint_is_no_number() -> None:
    spots, none = np.zeros((4, 1, 2)), np.zeros((4, 1), dtype=bool)
    blind = part_metrics.Centres(spots, none, spots, none)
    assert np.isnan(part_metrics.keypoint_regression(blind, blind)["keypoint_error"])


def test_a_keypoint_that_was_seen_once_is_expected_where_it_was() -> None:
    random = np.random.default_rng(1)
    spots, all_true = random.normal(size=(5, 2, 2)), np.ones((5, 2), dtype=bool)
    once = all_true.copy()
    once[1:, 1] = False
    fit = part_metrics.Centres(spots, all_true, spots, once)
    asked = part_metrics.Centres(spots, all_true, spots, np.array([[False, True]] * 5))
    expected = np.linalg.norm(spots[:, 1] - spots[0, 1], axis=1).mean() * 100
    found = part_metrics.keypoint_regression(fit, asked)
    assert found["keypoint_error"] == pytest.approx(expected)
    assert found["keypoint_error_of_mean"] == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
def test_empty_masks_and_empty_foregrounds() -> None:
    background = torch.tensor([0.0, 1.0])[None, :, None, None].expand(2, 2, 3, 5)
    none, every = torch.zeros(2, 7, 4, dtype=torch.bool), torch.ones(2, 7, 4, dtype=torch.bool)
    empty = part_metrics.foreground_overlap(part_metrics.overlap_counts(background, none))
    assert np.isnan(empty["foreground_iou"]) and np.isnan(empty["foreground_iou_per_image"])
    assert empty["background_iou"] == 100
    missed = part_metrics.foreground_overlap(part_metrics.overlap_counts(background, every))
    assert missed["foreground_iou"] == missed["foreground_iou_per_image"] == missed["background_iou"] == 0


def test_foreground() -> None:
    counts = part_metrics.overlap_counts(tensor("eval/maps")[:6], tensor("iou/masks"))
    found = part_metrics.foreground_overlap(counts)
    assert found["foreground_iou"] == pytest.approx(float(RECORDED["iou/fg"]), abs=1e-3)
    assert found["background_iou"] == pytest.approx(float(RECORDED["iou/bg"]), abs=1e-3)
    iou = found["foreground_iou"] / 100
    assert found["foreground_dice"] == pytest.approx(100 * 2 * iou / (1 + iou))


def test_thresholds_are_quantiles_of_the_own_tokens() -> None:
    torch.manual_seed(0)
    logits, maps = torch.randn(6, 4, 20, 20) * 7, torch.rand(6, 4, 20, 20)
    maps[:, 2] = 0  # the third part owns nothing
    whole, halves = part_metrics.LogitHistogram(3), [part_metrics.LogitHistogram(3) for _ in range(2)]
    whole.add(logits, maps)
    for half, rows in zip(halves, (slice(0, 2), slice(2, 6))):
        half.add(logits[rows], maps[rows])
    assert (sum(half.counts for half in halves) == whole.counts).all()
    for part in (0, 1):
        own = logits[:, part][maps.argmax(1) == part].numpy()
        for q in (0.01, 0.05, 0.5, 0.9):
            exact = np.quantile(own, q, method="inverted_cdf")
            assert whole.quantile(part, q) == pytest.approx(exact, rel=1e-3)
    assert whole.quantile(2, 0.05) == float("-inf")


def test_histograms_tell_own_tokens_from_others() -> None:
    torch.manual_seed(0)
    logits, maps = torch.randn(6, 4, 20, 20) * 7, torch.rand(6, 4, 20, 20)
    own, others = part_metrics.LogitHistogram(3), part_metrics.LogitHistogram(3, bits=16)
    own.add(logits, maps)
    others.add(logits, maps, own=False)
    for part in range(3):
        is_own = maps.argmax(1) == part
        for histogram, mask in ((own, is_own), (others, ~is_own)):
            values = logits[:, part][mask].numpy()
            assert histogram.spread(part) == pytest.approx((values.min(), values.max()), rel=0.01)
            edges = np.linspace(-30, 30, 13)
            exact = np.histogram(np.clip(values, -30, 30), edges)[0]
            assert sum(histogram.coarse(part, edges)) == len(values)
            assert np.abs(np.array(histogram.coarse(part, edges)) - exact).max() <= 3  # a bin may lie across an edge
