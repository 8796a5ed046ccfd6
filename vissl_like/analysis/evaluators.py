"""How good features are: weighted nearest neighbours, logistic probes on all or few labels, and low-shot SVMs.

Letters: n rows, D dimensions, C classes, Q queries of a block, K neighbours. Every answer comes with integer counts.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vissl_like.analysis.meters import average_precision, percent
from vissl_like.analysis.pca import fit_standardiser
from vissl_like.analysis.rows import MappedRows, Rows, SelectedRows, each, normalise, resident, spans
from vissl_like.config.plan import usable_cores
from vissl_like.core import rng
from vissl_like.errors import DataError

logger = logging.getLogger(__name__)

#: Queries per block of kNN; processes take whole blocks.
QUERY_ROWS = 256
_BANK_ROWS = 16384


@dataclass(frozen=True)
class Score:
    """Hits among `total` samples. `top5` is None with fewer than five classes; `c` is the regularisation chosen."""

    top1: int
    top5: int | None
    total: int
    c: float | None = None

    def accuracies(self) -> dict[str, float]:
        """{"top1": percent, "top5": percent}."""
        found = {"top1": percent(self.top1, self.total)}
        return found if self.top5 is None else {**found, "top5": percent(self.top5, self.total)}


def knn_ranking(
    bank: Rows,
    bank_labels: np.ndarray,
    queries: Rows,
    *,
    topk: list[int],
    sigma: float,
    num_classes: int,
    part: tuple[int, int] | None = None,
    device: torch.device | None = None,
    threads: int = 0,
) -> dict[int, np.ndarray]:
    """The classes with the most votes for each query (of queries `part` only), per K: (n, min(5, C)) int64, best first.

    A neighbour votes exp(similarity / sigma), the similarity being the dot product. The largest similarity is subtracted
    first, which changes no ranking: without it float32 overflows for features that are not of length 1. Of equal rows the
    first is the neighbour; of equal votes the lower class wins.
    """
    start, stop = part or (0, len(queries))
    similarity, index = _neighbours(
        bank, queries, k=min(max(topk), len(bank)), start=start, stop=stop, device=device or torch.device("cpu"),
        threads=threads or usable_cores(),
    )  # fmt: skip
    classes = torch.from_numpy(bank_labels)[index]
    weights = ((similarity - similarity[:, :1]).double() / sigma).exp()
    kept = min(5, num_classes)
    result: dict[int, np.ndarray] = {}
    for k in topk:
        ranking = np.empty((stop - start, kept), dtype=np.int64)
        for low, high in spans(stop - start, QUERY_ROWS):
            votes = torch.zeros(high - low, num_classes, dtype=torch.float64)
            votes.scatter_add_(1, classes[low:high, :k], weights[low:high, :k])
            ranking[low:high] = votes.sort(dim=1, descending=True, stable=True).indices[:, :kept].numpy()
        result[k] = ranking
    return result


def _neighbours(
    bank: Rows, queries: Rows, *, k: int, start: int, stop: int, device: torch.device, threads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities (n, K), largest first, and bank rows (n, K) of the K nearest; the bank is read once, in blocks."""
    best = torch.full((stop - start, k), -torch.inf)
    index = torch.full((stop - start, k), -1, dtype=torch.int64)
    queries = resident(queries)
    threads = 1 if device.type == "cuda" else threads

    for low, high in spans(len(bank), max(_BANK_ROWS, k)):
        block = torch.from_numpy(bank.read(low, high)).to(device)

        def merge(span: tuple[int, int], *, block: torch.Tensor = block, low: int = low) -> None:
            rows = slice(*span)
            x = torch.from_numpy(queries.read(start + span[0], start + span[1])).to(device)
            found = _merge(best[rows].to(device), index[rows].to(device), x @ block.T, first=low)
            best[rows], index[rows] = found[0].cpu(), found[1].cpu()

        for _ in each(merge, spans(stop - start, QUERY_ROWS), threads=threads):
            pass
    return best, index


def _merge(
    best: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, *, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put those of `scores` (Q, b), of bank rows first..., that beat the K best so far (Q, K) in their places.

    Only scores above the K-th best are sorted, few after the first block. Stable sorting keeps equal rows in order.
    """
    k = best.shape[1]
    if first == 0 and scores.shape[1] >= k:
        candidates = scores >= scores.topk(k, dim=1, sorted=True).values[:, -1:]
    else:
        candidates = scores > best[:, -1:]
    counts = candidates.sum(1)
    most = int(counts.max()) if len(counts) else 0
    if most == 0:
        return best, index
    row, column = candidates.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    extra = scores.new_full((len(best), most), -torch.inf)
    where = index.new_full((len(best), most), -1)
    extra[row, place] = scores[row, column]
    where[row, place] = column + first
    merged, order = torch.cat([best, extra], 1).sort(dim=1, descending=True, stable=True)
    return merged[:, :k], torch.cat([index, where], 1).gather(1, order[:, :k])


def score_ranking(ranking: np.ndarray, labels: np.ndarray) -> Score:
    """Count the hits of rankings (n, up to 5) against labels (n,); negative labels do not count."""
    known = labels >= 0
    hits = (ranking == labels[:, None]) & known[:, None]
    top5 = int(hits[:, :5].any(axis=1).sum()) if ranking.shape[1] >= 5 else None
    return Score(int(hits[:, 0].sum()), top5, int(known.sum()))


@dataclass(frozen=True)
class Labelled:
    """Rows and their classes (n,) int64; negative classes are unknown."""

    rows: Rows
    labels: np.ndarray

    def known(self) -> Labelled:
        """Only the rows whose class is known."""
        kept = np.flatnonzero(self.labels >= 0)
        return self if len(kept) == len(self.labels) else Labelled(SelectedRows(self.rows, kept), self.labels[kept])

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self.rows.read(0, len(self.rows)).astype(np.float64), self.labels

    def select(self, indices: np.ndarray) -> Labelled:
        """The rows of these ascending indices."""
        return Labelled(SelectedRows(self.rows, indices), self.labels[indices])


def linear_probe(
    train: Labelled,
    test: Labelled,
    *,
    c_values: list[float],
    val: Labelled | None = None,
    standardize: bool = True,
    max_iter: int = 1000,
    seed: int = 0,
    threads: int = 0,
) -> Score:
    """Multinomial logistic regression on all training rows, by L-BFGS in float64.

    The C with the most hits on `val` is used (the smallest of equals); without `val` a tenth of the training rows, drawn
    by `seed`, is held out to choose, and the probe is then fitted to all of them. Holds the training rows in memory.
    `threads` fits run at once, each in one thread: BLAS threads would make them slower and change their bits.
    """
    train, test = train.known(), test.known()
    val = val.known() if val is not None else None
    if standardize:
        train, test, val = _standardise(train, test, val, threads=threads)
    fit_on, choose_on = (train, val) if val is not None or len(c_values) == 1 else _hold_out(train, seed=seed)
    x, y = fit_on.arrays()
    with _single_threaded_blas():
        probes = list(each(lambda c: _fit(x, y, c=c, max_iter=max_iter), c_values, threads=threads or usable_cores()))
        chosen = 0
        if choose_on is not None and len(c_values) > 1:
            hits = [_score(probe, choose_on).top1 for probe in probes]
            chosen = min(range(len(hits)), key=lambda i: (-hits[i], c_values[i]))
        c, probe = c_values[chosen], probes[chosen]
        if fit_on is not train:
            probe = _fit(*train.arrays(), c=c, max_iter=max_iter)
        score = _score(probe, test)
    return Score(score.top1, score.top5, score.total, c)


def low_shot(
    train: Labelled,
    test: Labelled,
    *,
    samples_per_class: int,
    num_draws: int,
    c: float,
    seed: int = 0,
    max_iter: int = 1000,
    threads: int = 0,
) -> list[Score]:
    """Logistic regression on `samples_per_class` labels of each class, once per draw; rows are standardised by `train`."""
    train, test, _ = _standardise(train.known(), test.known(), None, threads=threads)
    test = Labelled(resident(test.rows), test.labels)

    def one(draw: int) -> Score:
        rows = draw_per_class(train.labels, samples_per_class, seed=seed, draw=draw)
        score = _score(_fit(*train.select(rows).arrays(), c=c, max_iter=max_iter), test)
        return Score(score.top1, score.top5, score.total, c)

    with _single_threaded_blas():
        return list(each(one, range(num_draws), threads=threads or usable_cores()))


def draw_per_class(labels: np.ndarray, samples: int, *, seed: int, draw: int) -> np.ndarray:
    """Ascending rows: the first `samples` of each class in the order of this draw."""
    refuse_too_few(labels, samples)
    classes = np.unique(labels)
    order = rng.permutation(seed, draw, len(labels))
    return np.sort(np.concatenate([order[labels[order] == c][:samples] for c in classes]))


def refuse_too_few(labels: np.ndarray, samples: int) -> None:
    """Raise DataError if a class has fewer than `samples` of these labels (n,)."""
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min(initial=samples) < samples:
        short = classes[counts.argmin()]
        raise DataError(
            f"config.LOW_SHOT.SAMPLES_PER_CLASS={samples}: class {short} has only {counts.min()} training images. "
            f"Use at most {counts.min()}."
        )


def refuse_one_class(labels: np.ndarray, *, place: str = "config.DATA") -> None:
    """Raise DataError if these labels (n,) are all of one class; `place` says whose they are."""
    found = np.unique(labels)
    if len(found) < 2:
        raise DataError(
            f"{place}: all labels of TRAIN are of one class ({found.tolist()}), but a probe learns to tell two or more apart. "
            "Give images of several classes, or set config.EVALUATE.PROTOCOLS=[knn]."
        )


def _standardise(
    train: Labelled, test: Labelled, val: Labelled | None, *, threads: int
) -> tuple[Labelled, Labelled, Labelled | None]:
    scale = fit_standardiser(train.rows, threads=threads or usable_cores())
    scaled = [Labelled(MappedRows(part.rows, scale), part.labels) if part else None for part in (train, test, val)]
    assert scaled[0] is not None and scaled[1] is not None
    return scaled[0], scaled[1], scaled[2]


def _hold_out(train: Labelled, *, seed: int) -> tuple[Labelled, Labelled]:
    """Nine tenths and one tenth of the rows."""
    order = rng.permutation(seed, 0, len(train.labels))
    held = max(1, len(order) // 10)
    return train.select(np.sort(order[held:])), train.select(np.sort(order[:held]))


@contextlib.contextmanager
def _single_threaded_blas() -> Iterator[None]:
    """One BLAS thread per operation, and no warnings of scikit-learn about convergence: ours says more."""
    import sklearn.linear_model  # noqa: F401  before the limit, which reaches only libraries that are loaded
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fit(x: np.ndarray, y: np.ndarray, *, c: float, max_iter: int) -> Any:
    """A logistic regression on x (n, D) float64, y (n,)."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    refuse_one_class(y)
    with threadpool_limits(
        1
    ):  # OpenMP keeps a limit per calling thread, so the one around all fits does not reach here
        probe = LogisticRegression(C=c, max_iter=max_iter).fit(x, y)
    if int(probe.n_iter_.max()) >= max_iter:
        logger.warning("the probe with C=%g stopped at MAX_ITER=%d before it had converged", c, max_iter)
    return probe


def _score(probe: Any, test: Labelled) -> Score:
    rankings = [_rank_classes(probe, test.rows.read(*span)) for span in spans(len(test.labels), 4096)]
    return score_ranking(np.concatenate(rankings), test.labels)


def _rank_classes(probe: Any, block: np.ndarray) -> np.ndarray:
    """Class labels by decision value, best first; of equals the lower class. (b, min(5, C))."""
    values = probe.decision_function(block.astype(np.float64))
    if values.ndim == 1:  # two classes: one value, for the second
        values = np.stack([-values, values], axis=1)
    order = np.argsort(-values, axis=1, kind="stable")[:, :5]
    return probe.classes_[order]


def cost_grid(costs: list[float], *, base: float = -1.0, power_range: tuple[int, int] = (4, 20)) -> list[float]:
    """The costs of an SVM search: those given, then base^p for p in the range if the base is positive."""
    return [*costs, *(float(base) ** p for p in range(*power_range) if base > 0)]


def svm_low_shot_ap(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    costs: list[float],
    normalize: bool = True,
    max_iter: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Mean average precision over classes, in percent, of linear SVMs one against the rest, for each cost (len(costs),).

    x (n, D), y (n, C) with 1 for the classes of an image and -1 for ignored. Squared hinge loss, l2, dual, positives weigh
    twice (the low-shot protocol of Goyal et al. 2019, arXiv:1905.01235). `normalize` divides rows by their length + 1e-5.
    """
    from sklearn.svm import LinearSVC

    if normalize:
        train_x, test_x = normalise(train_x), normalise(test_x)
    result = []
    for cost in costs:
        values = []
        for c in range(train_y.shape[1]):
            kept, judged = train_y[:, c] >= 0, test_y[:, c] >= 0
            machine = LinearSVC(
                C=cost, class_weight={1: 2, 0: 1}, loss="squared_hinge", penalty="l2", dual=True, max_iter=max_iter,
                intercept_scaling=1.0, random_state=seed,
            )  # fmt: skip
            machine.fit(train_x[kept], (train_y[kept, c] == 1).astype(int))
            decision = machine.decision_function(test_x[judged])
            values.append(average_precision(decision, test_y[judged, c])[2])
        result.append(100.0 * float(np.nanmean(values)))
    return np.array(result)
