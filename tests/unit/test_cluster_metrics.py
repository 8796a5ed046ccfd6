"""NMI, adjusted Rand index and purity against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vissl_like.analysis.cluster_metrics import agreement

pairs = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 5), min_size=n, max_size=n), st.lists(st.integers(0, 9), min_size=n, max_size=n)
    )
)


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_equals_scikit_learn(pair: tuple[list[int], list[int]]) -> None:
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    classes, clusters = map(np.array, pair)
    found = agreement(classes, clusters)
    assert found["nmi"] == pytest.approx(100 * normalized_mutual_info_score(classes, clusters), abs=1e-7)
    assert found["ari"] == pytest.approx(100 * adjusted_rand_score(classes, clusters), abs=1e-7)
    by_hand = sum(np.bincount(classes[clusters == k]).max() for k in np.unique(clusters))
    assert found["purity"] == pytest.approx(100 * by_hand / len(classes))


def test_names_of_clusters_do_not_matter() -> None:
    classes = np.array([0, 0, 1, 1, 2, 2])
    assert agreement(classes, np.array([7, 7, 3, 3, 5, 5])) == pytest.approx({"nmi": 100, "ari": 100, "purity": 100})


def test_unknown_classes_do_not_count() -> None:
    classes, clusters = np.array([0, 0, 1, 1, -1, -1]), np.array([0, 0, 1, 1, 0, 1])
    assert agreement(classes, clusters) == pytest.approx({"nmi": 100, "ari": 100, "purity": 100})
    assert agreement(np.array([-1, -1]), np.array([0, 1])) == {}


def test_large_counts_are_exact() -> None:
    n = 200_000
    classes, clusters = np.zeros(n, dtype=np.int64), np.arange(n) % 2
    assert agreement(classes, clusters)["ari"] == 0.0
    assert agreement(clusters, clusters)["ari"] == 100.0
