"""What benchmarks have in common: parts to choose from, turns in shuffled order, ratios of the runs of a round.

The speed of a shared machine drifts, a ratio of two runs that follow each other much less.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence


def turns(names: Iterable[str], *, rounds: int) -> Iterator[tuple[int, str]]:
    """(number of the round, whose turn it is): every name once in each round, in an order that is the same in each run."""
    order, names = random.Random(0), list(names)
    for number in range(rounds):
        for name in order.sample(names, len(names)):
            yield number, name


def ratios(seconds: Mapping[str, Sequence[float]], slow: str, fast: str) -> list[float]:
    """How many times as fast as `slow` the variant `fast` was in each round."""
    return [one / other for one, other in zip(seconds[slow], seconds[fast])]


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile; of a single number three times itself."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else list(values) * 3


def in_words(values: Sequence[float], *, digits: int = 2) -> str:
    """Median and quartiles."""
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def verdict(reached: bool) -> str:
    """What a goal's line ends with."""
    return "reached" if reached else "MISSED"


def run_parts(parts: Mapping[str, Callable[[], None]], chosen: argparse.Namespace) -> None:
    """Those parts of a benchmark that flags of their names choose; without such a flag all. Prints how long each took."""
    for name in [name for name in parts if getattr(chosen, name)] or parts:
        print(f"-- {name}", flush=True)
        began = time.perf_counter()
        parts[name]()
        print(f"-- {name}: {time.perf_counter() - began:.0f} s", flush=True)
