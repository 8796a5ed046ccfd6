"""DATA_LIMIT: which rows of a split are used."""

from __future__ import annotations

import numpy as np

from vissl_like.config.schema_data import Split
from vissl_like.errors import ConfigError, DataError


def needs_labels(options: Split) -> bool:
    """Whether the choice of rows depends on the labels."""
    return options.DATA_LIMIT >= 0 and options.DATA_LIMIT_SAMPLING.IS_BALANCED


def limited_rows(n: int, *, options: Split, labels: np.ndarray | None, key: str) -> np.ndarray | None:
    """Ascending rows that DATA_LIMIT leaves of n, int64, or None for all.

    The rows are put in an order drawn from DATA_LIMIT_SAMPLING.SEED (balanced: within each class); the first
    SKIP_NUM_SAMPLES are left out and the next DATA_LIMIT taken, so that two subsets with the same seed can be disjoint.
    """
    limit, sampling = options.DATA_LIMIT, options.DATA_LIMIT_SAMPLING
    if limit < 0:
        return None
    if limit == 0:
        raise ConfigError(f"{key}.DATA_LIMIT=0 leaves no image. -1 means all.")
    if sampling.IS_BALANCED:
        return _balanced(limit, options=options, labels=labels, key=key)
    chosen = _order(sampling.SEED, n)[sampling.SKIP_NUM_SAMPLES :][:limit]
    if not len(chosen):
        raise DataError(
            f"{key}.DATA_LIMIT_SAMPLING.SKIP_NUM_SAMPLES={sampling.SKIP_NUM_SAMPLES} leaves none of the {n} images. Skip fewer."
        )
    return np.sort(chosen)


def _order(seed: int, n: int) -> np.ndarray:
    # RandomState: its streams are frozen, so the subset is the same with every numpy.
    return np.random.RandomState(seed).permutation(n)


def _balanced(limit: int, *, options: Split, labels: np.ndarray | None, key: str) -> np.ndarray:
    """The same number of each class; what is left over goes to the first classes, one each, so the limit is met exactly.

    The first n images in the balanced order are n // classes of each class, and one more of the first n % classes:
    SKIP_NUM_SAMPLES of them are left out and the next `limit` taken.
    """
    if labels is None or labels.ndim != 1:
        raise DataError(
            f"{key}.DATA_LIMIT_SAMPLING.IS_BALANCED=true needs one class per image, and there is none. Set it to false."
        )
    classes, skipped = np.unique(labels[labels >= 0]), options.DATA_LIMIT_SAMPLING.SKIP_NUM_SAMPLES
    if limit < len(classes) or not len(classes):
        raise DataError(
            f"{key}.DATA_LIMIT={limit}: less than one image for each of the {len(classes)} classes. Raise it, or "
            "set IS_BALANCED=false."
        )
    order = _order(options.DATA_LIMIT_SAMPLING.SEED, len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]  # in drawn order within each class
    starts = np.searchsorted(labels[by_class], classes, side="left")
    ends = np.searchsorted(labels[by_class], classes, side="right")
    quotas = zip(_quotas(skipped, len(classes)), _quotas(skipped + limit, len(classes)), strict=True)
    chosen = []
    for number, start, end, (first, last) in zip(classes, starts, ends, quotas, strict=True):
        of_class = by_class[start:end]
        if len(of_class) < last:
            raise DataError(
                f"{key}.DATA_LIMIT={limit}: takes {last - first} images of class {int(number)} ({first} left out before), as "
                f"IS_BALANCED wants it of {len(classes)} classes, but it has {len(of_class)}. Lower it, or set "
                "IS_BALANCED=false."
            )
        chosen.append(of_class[first:last])
    return np.sort(np.concatenate(chosen))


def _quotas(total: int, count: int) -> list[int]:
    """`total` shared out among `count` classes, the first ones getting what is left over."""
    return [total // count + (number < total % count) for number in range(count)]
