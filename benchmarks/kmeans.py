"""Lloyd's iterations: ours, faiss, scikit-learn, and the limit, which is the matrix product of rows and centroids alone.

    python benchmarks/kmeans.py                     both of these
    python benchmarks/kmeans.py --speed             60,000 x 256, 1,000 clusters, 8 iterations
    python benchmarks/kmeans.py --memory            memory that each needs beyond the rows, for 200,000 of them and twice that
    python benchmarks/kmeans.py --rows 100000       other sizes: --rows, --dim, --clusters, --iterations

Equal first centroids and rows, and as many assignments of rows to centroids. One thread, CPU seconds; the variants take
turns in shuffled order and the ratios of a round are compared, since the speed of a shared machine drifts. Where our time
goes is measured in the same turns. Memory is how far a fresh process, which holds the rows and has used everything once on
a few small ones, grows beyond what it holds.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from _rounds import in_words, ratios, run_parts, turns, verdict

from vissl_like.analysis.blocks import ALONE, Blocks, block_rows
from vissl_like.analysis.exact_sums import ExactSums
from vissl_like.analysis.kmeans import KMeansResult, kmeans
from vissl_like.analysis.lloyd import objective_of, update
from vissl_like.analysis.nearest import Table
from vissl_like.analysis.rows import ArrayRows, one_thread
from vissl_like.analysis.seeding import initial_rows

LIMIT = "matrix product alone"
CPU = torch.device("cpu")
#: What the time of ours is divided into.
READING, PRODUCTS, SEARCH, SUMS, REST = "reading", "products", "largest scores", "sums of rows", "all else"


@dataclass(frozen=True)
class Variant:
    """`run` takes rows and returns the objective, or 0; `prepare` makes the rows that it gets, and is not measured."""

    run: Callable[[np.ndarray], float]
    prepare: Callable[[np.ndarray], np.ndarray] = np.asarray


def clustered(rows: int, dim: int, *, seed: int = 0) -> np.ndarray:
    """Rows around 2,000 means, as wide as the means are apart."""
    generator = np.random.default_rng(seed)
    means = generator.standard_normal((2000, dim), dtype=np.float32)
    x = generator.standard_normal((rows, dim), dtype=np.float32)
    for start in range(0, rows, 4096):
        part = x[start : start + 4096]
        part += means[generator.integers(0, len(means), len(part))]
    return x


# -------------------------------------------------------------------------------------------- variants
def ours(x: np.ndarray, *, k: int, iterations: int, backend: str = "torch") -> KMeansResult:
    """What the engine calls."""
    return kmeans(
        ArrayRows(x), k=k, iterations=iterations, backend=backend, max_points_per_centroid=0, threads=1, seed=0
    )


def by_faiss(x: np.ndarray, *, k: int, iterations: int) -> float:
    """faiss itself; for the seed 1234 it starts from the same rows as ours for 0."""
    import faiss

    faiss.omp_set_num_threads(1)
    found = faiss.Kmeans(
        x.shape[1], k, niter=iterations, seed=1234, max_points_per_centroid=len(x), min_points_per_centroid=1
    )
    found.train(x)
    return float(found.obj[-1])


def by_sklearn(x: np.ndarray, *, k: int, iterations: int) -> float:
    """scikit-learn's Lloyd from the same rows, which it changes meanwhile.

    After its iterations it assigns all rows once more, so that it gets one iteration less. Its inertia is that of this last
    assignment, as the objective of ours and of faiss is.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    first = x[initial_rows(len(x), k, seed=0)]
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        found = KMeans(k, init=first, n_init=1, max_iter=iterations - 1, tol=0, algorithm="lloyd", copy_x=False).fit(x)
    return float(found.inertia_)


def product(x: np.ndarray, *, k: int, iterations: int, by_torch: bool = False) -> float:
    """The products of the same blocks into the same memory, and nothing else; by numpy, as ours, or by PyTorch."""
    size = block_rows(k, x.shape[1], device=CPU)
    centroids = x[initial_rows(len(x), k, seed=0)]
    scores = np.empty((size, k), dtype=np.float32)
    for _ in range(iterations):
        for start in range(0, len(x), size):
            block = x[start : start + size]
            if by_torch:
                out = torch.from_numpy(scores[: len(block)])
                torch.mm(torch.from_numpy(block), torch.from_numpy(centroids).T, out=out)
            else:
                np.matmul(block, centroids.T, out=scores[: len(block)])
    return 0.0


def variants(k: int, iterations: int) -> dict[str, Variant]:
    """By name."""
    run = {"k": k, "iterations": iterations}
    return {
        "ours": Variant(lambda x: ours(x, **run).objective[-1]),
        "ours, float16 rows": Variant(lambda x: ours(x, **run).objective[-1], lambda x: x.astype(np.float16)),
        "faiss": Variant(lambda x: by_faiss(x, **run)),
        "scikit-learn": Variant(lambda x: by_sklearn(x, **run), np.copy),
        LIMIT: Variant(lambda x: product(x, **run)),
        "the same by PyTorch": Variant(lambda x: product(x, **run, by_torch=True)),
    }


def in_parts(x: np.ndarray, *, k: int, iterations: int) -> dict[str, float]:
    """CPU seconds of the parts of ours: what an iteration calls for each block, with a clock between the calls.

    The search for the largest scores is what the nearest centroids take beyond the products; each block's products are
    computed once more for this.
    """
    spent = dict.fromkeys((READING, PRODUCTS, SEARCH, SUMS, REST), 0.0)

    def lap(part: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        began = time.process_time()
        found = call(*arguments, **options)
        spent[part] += time.process_time() - began
        return found

    blocks = Blocks(ArrayRows(x), size=block_rows(k, x.shape[1], device=CPU), device=CPU)
    centroids = torch.from_numpy(x[initial_rows(len(x), k, seed=0)])
    space = np.empty((max(stop - start for start, stop in blocks.spans), k), dtype=np.float32)
    with one_thread():
        magnitude = lap(REST, blocks.largest_magnitude, what="rows")
        exact = ExactSums(k, x.shape[1], rows=len(x), magnitude=magnitude, device=CPU)
        for _ in range(iterations):
            table = lap(REST, Table, centroids)
            for span in blocks.spans:
                block = lap(READING, blocks.load, span)
                lap(PRODUCTS, np.matmul, block.numpy(), centroids.numpy().T, out=space[: len(block)])
                labels = lap(SEARCH, table.nearest, block)
                lap(SUMS, exact.put, span, block, labels)
            sums, counts, squares = lap(REST, exact.total, ALONE.reduce)
            lap(REST, objective_of, centroids, sums, counts, squares=squares)
            centroids, _ = lap(REST, update, sums, counts, old=centroids)
    spent[SEARCH] -= spent[PRODUCTS]
    return spent


# ------------------------------------------------------------------------------------------- measuring
def speed(arguments: argparse.Namespace) -> None:
    """CPU seconds of each, ratios of each round, objectives, and the parts of ours."""
    x = clustered(arguments.rows or 60_000, arguments.dim)
    run = {"k": arguments.clusters, "iterations": arguments.iterations}
    runs = variants(**run)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    objectives: dict[str, float] = {}
    parts: list[dict[str, float]] = []
    for variant in runs.values():  # imports and caches
        variant.run(variant.prepare(x[: max(2 * arguments.clusters, 4096)]))
    for _, name in turns([*runs, "parts"], rounds=arguments.rounds):
        if name == "parts":
            parts.append(in_parts(x, **run))
            continue
        rows = runs[name].prepare(x)
        began = time.process_time()
        objectives[name] = runs[name].run(rows)
        seconds[name].append(time.process_time() - began)
    show(seconds, objectives, flop=2.0 * x.size * arguments.clusters * arguments.iterations)
    show_parts(parts, seconds["ours"])


def show(seconds: dict[str, list[float]], objectives: dict[str, float], *, flop: float) -> None:
    """A line for each variant, and one for each goal."""
    print(f"{'':<24}{'CPU s':>8}{'GFLOP/s':>9}{'objective':>16}   x the matrix product (quartiles)")
    for name, values in seconds.items():
        middle = statistics.median(values)
        found = f"{objectives[name]:16.8g}" if objectives[name] else " " * 16
        print(f"{name:<24}{middle:8.2f}{flop / middle / 1e9:9.0f}{found}   {in_words(ratios(seconds, LIMIT, name))}")
    for slow, factor in ((LIMIT, 0.75), ("faiss", 1.0), ("scikit-learn", 1.3)):
        values = ratios(seconds, slow, "ours")
        is_reached = statistics.median(values) >= factor
        print(f"goal: ours >= {factor:g} x {slow}: {in_words(values)}, {verdict(is_reached)}")
    difference = objectives["ours"] / objectives["faiss"] - 1
    print(f"goal: objective within 0.1 % of faiss: {100 * difference:+.4f} %, {verdict(abs(difference) <= 1e-3)}")


def show_parts(parts: list[dict[str, float]], whole: list[float]) -> None:
    """Their shares of the sum of all parts, and that sum as a share of the time of ours, as a check."""
    for name in parts[0]:
        print(f"of ours: {name:<16}{in_words([one[name] / sum(one.values()) for one in parts])}")
    print(f"all parts / ours: {in_words([sum(one.values()) / other for one, other in zip(parts, whole)])}")


def growth(name: str, *, rows: int, dim: int, k: int) -> float:
    """In this process: MB that two assignments need at their peak beyond what is there before."""
    small, variant = variants(8, 2)[name], variants(k, 2)[name]
    small.run(small.prepare(clustered(64, 16)))  # libraries, but no memory of the size of what is measured
    x = variant.prepare(clustered(rows, dim))
    ctypes.CDLL(None).malloc_trim(0)  # what was freed shall not be there to be used again
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    variant.run(x)
    return resident("VmHWM") - before


def resident(what: str) -> float:
    """MB of memory of this process now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{what}:")) / 1024


def memory(arguments: argparse.Namespace) -> None:
    """Each variant in a process of its own, with one and with two times the rows."""
    rows = arguments.rows or 200_000
    held = 4 * rows * arguments.dim / 2**20
    print(f"{'MB beyond the rows':<24}" + "".join(f"{f'{n * rows} rows ({n * held:.0f} MB)':>28}" for n in (1, 2)))
    found = {}
    for name in ("ours", "faiss", "scikit-learn"):
        found[name] = [in_a_process(name, n * rows, arguments) for n in (1, 2)]
        print(f"{name:<24}" + "".join(f"{megabytes:28.1f}" for megabytes in found[name]))
    first, second = found["ours"]
    print(f"goal: ours <= 0.2 x the rows: {first / held:.3f}, {verdict(first / held <= 0.2)}")
    more = (second - first) / held
    print(f"goal: no more for more rows, <= 0.02 x those added: {more:.3f}, {verdict(more <= 0.02)}")


def in_a_process(name: str, rows: int, arguments: argparse.Namespace) -> float:
    command = [sys.executable, str(Path(__file__).resolve()), "--growth", name, "--rows", str(rows)]
    command += ["--dim", str(arguments.dim), "--clusters", str(arguments.clusters)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rows", type=int, help="default: 60,000 for the speed, 200,000 for the memory")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=8, help="assignments of all rows, at least 2")
    parser.add_argument("--rounds", type=int, default=7, help="how often each runs")
    parser.add_argument("--growth", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("vissl_like").setLevel(logging.ERROR)  # few rows for a cluster are no news here
    if arguments.growth:
        print(growth(arguments.growth, rows=arguments.rows, dim=arguments.dim, k=arguments.clusters))
        return 0
    run_parts({"speed": lambda: speed(arguments), "memory": lambda: memory(arguments)}, arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
