"""kNN, probes and low-shot draws: against brute force and scikit-learn, at any split of the work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vissl_like.analysis import evaluators as module
from vissl_like.analysis.evaluators import (
    Labelled,
    draw_per_class,
    knn_ranking,
    linear_probe,
    low_shot,
    score_ranking,
)
from vissl_like.analysis.rows import ArrayRows, MappedRows, unit
from vissl_like.errors import DataError


def data(
    n: int, *, classes: int = 6, dim: int = 10, seed: int = 0, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    means = np.random.default_rng(99).normal(size=(classes, dim))
    labels = np.arange(n) % classes
    return (means[labels] + spread * generator.normal(size=(n, dim))).astype(np.float32), labels


def brute_force(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, *, k: int, sigma: float, classes: int
) -> np.ndarray:
    result = []
    for similarity in queries.astype(np.float64) @ bank.astype(np.float64).T:
        near = np.argsort(-similarity, kind="stable")[:k]
        votes = np.bincount(labels[near], np.exp((similarity[near] - similarity.max()) / sigma), minlength=classes)
        result.append(np.argsort(-votes, kind="stable")[:5])
    return np.array(result)


@pytest.mark.parametrize("normalised", [True, False])
def test_knn_equals_brute_force(monkeypatch: pytest.MonkeyPatch, normalised: bool) -> None:
    monkeypatch.setattr(module, "_BANK_ROWS", 130)
    monkeypatch.setattr(module, "QUERY_ROWS", 32)
    (bank, labels), (queries, _) = data(700), data(150, seed=1)
    if normalised:
        bank, queries = unit(bank), unit(queries)
    found = knn_ranking(ArrayRows(bank), labels, ArrayRows(queries), topk=[5, 50], sigma=0.1, num_classes=6, threads=2)
    for k in (5, 50):
        assert np.array_equal(found[k], brute_force(bank, labels, queries, k=k, sigma=0.1, classes=6))


def test_knn_parts_give_the_rows_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERY_ROWS", 32)
    (bank, labels), (queries, _) = data(300), data(150, seed=1)
    run = {"topk": [7], "sigma": 0.5, "num_classes": 6}
    whole = knn_ranking(ArrayRows(bank), labels, ArrayRows(queries), **run)[7]  # type: ignore[arg-type]
    parts = [
        knn_ranking(ArrayRows(bank), labels, ArrayRows(queries), part=p, **run)[7]
        for p in ((0, 64), (64, 96), (96, 150))
    ]  # type: ignore[arg-type]
    assert np.array_equal(np.concatenate(parts), whole)


def test_knn_ties_of_neighbours_and_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = np.ones((40, 3), dtype=np.float32)
    labels = np.array([2, 1, 0, 1] * 10)
    for bank_rows in (3, 16, 100):  # equal rows: the first ones are the neighbours, wherever the blocks end
        monkeypatch.setattr(module, "_BANK_ROWS", bank_rows)
        found = knn_ranking(ArrayRows(bank), labels, ArrayRows(bank[:2]), topk=[1, 2, 3], sigma=1.0, num_classes=4)
        assert found[1][:, 0].tolist() == [2, 2]  # row 0
        assert found[2][:, 0].tolist() == [1, 1]  # classes 2 and 1 have one vote each
        assert found[3].tolist() == [[0, 1, 2, 3]] * 2


def test_knn_with_more_neighbours_than_rows_and_large_similarities() -> None:
    (bank, labels), (queries, truth) = data(30, spread=0.1), data(12, seed=2, spread=0.1)
    found = knn_ranking(ArrayRows(100 * bank), labels, ArrayRows(100 * queries), topk=[200], sigma=0.01, num_classes=6)[
        200
    ]
    assert score_ranking(found, truth).top1 >= 10


def test_scores_leave_out_unknown_labels_and_small_top5() -> None:
    ranking = np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1]])
    score = score_ranking(ranking, np.array([0, 0, -1]))
    assert (score.top1, score.top5, score.total) == (1, None, 2)
    assert score.accuracies() == {"top1": 50.0}
    five = score_ranking(np.tile(np.arange(5), (2, 1)), np.array([4, 7]))
    assert five.accuracies() == {"top1": 0.0, "top5": 50.0}


# --------------------------------------------------------------------------------------------------------------- probes
def test_linear_probe_equals_scikit_learn_and_is_reproducible() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    (x, y), (tx, ty) = data(300), data(200, seed=3)
    x, tx = x * 30 + 5, tx * 30 + 5
    scaler = StandardScaler().fit(x.astype(np.float64))
    expected = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(x), y).predict(scaler.transform(tx))
    scores = [
        linear_probe(Labelled(ArrayRows(x), y), Labelled(ArrayRows(tx), ty), c_values=[0.1], threads=threads)
        for threads in (1, 2)
    ]
    assert scores[0] == scores[1] and scores[0].total == 200
    assert abs(scores[0].top1 - int((expected == ty).sum())) <= 1
    assert scores[0].top5 is not None and scores[0].top5 >= scores[0].top1


def test_linear_probe_chooses_c_on_val_else_on_a_held_out_tenth() -> None:
    (x, y), (tx, ty), (vx, vy) = data(120, spread=3), data(200, seed=3, spread=3), data(200, seed=4, spread=3)
    train, test, val = (Labelled(ArrayRows(a), b) for a, b in ((x, y), (tx, ty), (vx, vy)))
    options = [1e-6, 0.01, 100.0]
    fixed = {c: linear_probe(train, val, c_values=[c]).top1 for c in options}
    chosen = linear_probe(train, test, c_values=options, val=val)
    assert chosen.c == min(options, key=lambda c: (-fixed[c], c))
    again = linear_probe(train, test, c_values=options, seed=1)
    assert again == linear_probe(train, test, c_values=options, seed=1) and again.c in options


def test_probes_leave_out_rows_without_class() -> None:
    (x, y), (tx, ty) = data(120), data(60, seed=3)
    y2, ty2 = y.copy(), ty.copy()
    y2[:20], ty2[:7] = -1, -1
    ours = linear_probe(Labelled(ArrayRows(x), y2), Labelled(ArrayRows(tx), ty2), c_values=[1.0])
    theirs = linear_probe(Labelled(ArrayRows(x[20:]), y[20:]), Labelled(ArrayRows(tx[7:]), ty[7:]), c_values=[1.0])
    assert ours == theirs and ours.total == 53


def test_two_classes_and_one_class() -> None:
    (x, y), (tx, ty) = data(60, classes=2, spread=0.2), data(30, classes=2, seed=5, spread=0.2)
    score = linear_probe(Labelled(ArrayRows(x), y), Labelled(ArrayRows(tx), ty), c_values=[1.0])
    assert score.top1 == 30 and score.top5 is None
    with pytest.raises(DataError, match="all labels of TRAIN are of one class"):
        linear_probe(Labelled(ArrayRows(x), np.zeros(60, dtype=int)), Labelled(ArrayRows(tx), ty), c_values=[1.0])


def test_an_unfinished_fit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    x, y = data(200, spread=5)
    linear_probe(Labelled(ArrayRows(x), y), Labelled(ArrayRows(x), y), c_values=[100.0], max_iter=1)
    assert "stopped at MAX_ITER=1" in caplog.text


def test_low_shot_draws_are_balanced_seeded_and_different() -> None:
    _, y = data(120)
    draws = [draw_per_class(y, 4, seed=0, draw=draw) for draw in (0, 1)]
    for rows in draws:
        assert np.bincount(y[rows]).tolist() == [4] * 6 and (np.diff(rows) > 0).all()
    assert not np.array_equal(*draws)
    assert np.array_equal(draws[0], draw_per_class(y, 4, seed=0, draw=0))
    assert not np.array_equal(draws[0], draw_per_class(y, 4, seed=1, draw=0))


def test_low_shot_scores_each_draw() -> None:
    train, test = (Labelled(ArrayRows(x), y) for x, y in (data(120, spread=0.3), data(60, seed=3, spread=0.3)))
    scores = low_shot(train, test, samples_per_class=3, num_draws=4, c=0.1)
    assert len(scores) == 4 and all(score.total == 60 and score.top1 > 50 for score in scores)
    with pytest.raises(DataError, match=r"SAMPLES_PER_CLASS=30: class 0 has only 20 training images"):
        low_shot(train, test, samples_per_class=30, num_draws=1, c=0.1)


def test_rows_may_be_views() -> None:
    x, y = data(90)
    half = MappedRows(ArrayRows(x), lambda block: block[:, :5], dim=5)
    assert linear_probe(Labelled(half, y), Labelled(half, y), c_values=[1.0]).total == 90
    assert torch.get_num_threads() >= 1
