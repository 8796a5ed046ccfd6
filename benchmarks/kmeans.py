"""Lloyd's iterations: ours, faiss, scikit-learn, and the limit, which is the matrix product of rows and centroids alone.

    python benchmarks/kmeans.py                     60,000 x 256, 1,000 clusters, 8 iterations
    python benchmarks/kmeans.py --rows 200000       other sizes: --rows, --dim, --clusters, --iterations
    python benchmarks/kmeans.py --memory            memory that each needs beyond the rows, for two numbers of rows

Equal first centroids, rows and iterations. One thread, CPU seconds; the variants take turns in shuffled order and the
ratios of a round are compared, since the speed of a shared machine drifts. Memory is the growth of the peak of a fresh
process that holds the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from _rounds import in_words, ratios, turns, verdict

from vissl_like.analysis.blocks import block_rows
from vissl_like.analysis.kmeans import KMeansResult, kmeans
from vissl_like.analysis.rows import ArrayRows
from vissl_like.analysis.seeding import initial_rows

LIMIT = "matrix product alone"
#: Runs the iterations on rows and returns the objective, or 0.
Variant = Callable[[np.ndarray], float]


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
    found = faiss.Kmeans(x.shape[1], k, niter=iterations, seed=1234, max_points_per_centroid=len(x))
    found.train(x)
    return float(found.obj[-1])


def by_sklearn(x: np.ndarray, *, k: int, iterations: int) -> float:
    """scikit-learn's Lloyd from the same rows. Its inertia is that of the last centroids, one half step later."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    first = x[initial_rows(len(x), k, seed=0)]
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        found = KMeans(k, init=first, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd", copy_x=False).fit(x)
    return float(found.inertia_)


def product(x: np.ndarray, *, k: int, iterations: int, by_torch: bool = False) -> float:
    """The products of the same blocks into the same memory, and nothing else; by numpy, as ours, or by PyTorch."""
    size = block_rows(k, x.shape[1], device=torch.device("cpu"))
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
        "ours": lambda x: ours(x, **run).objective[-1],
        "ours, float16 rows": lambda x: ours(x.astype(np.float16), **run).objective[-1],
        "faiss": lambda x: by_faiss(x, **run),
        "scikit-learn": lambda x: by_sklearn(x, **run),
        LIMIT: lambda x: product(x, **run),
        "the same by PyTorch": lambda x: product(x, **run, by_torch=True),
    }


# ------------------------------------------------------------------------------------------- measuring
def compare(x: np.ndarray, *, k: int, iterations: int, rounds: int) -> None:
    """CPU seconds of each, ratios of each round, objectives."""
    runs = variants(k, iterations)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    objectives = {}
    for call in runs.values():  # imports and caches
        call(x[: max(2 * k, 4096)])
    for _, name in turns(runs, rounds=rounds):
        began = time.process_time()
        objectives[name] = runs[name](x)
        seconds[name].append(time.process_time() - began)
    print(f"{'':<24}{'CPU s':>8}{'GFLOP/s':>9}{'objective':>16}   x the matrix product (quartiles)")
    flop = 2 * len(x) * k * x.shape[1] * iterations
    for name, values in seconds.items():
        middle = statistics.median(values)
        found = f"{objectives[name]:16.6g}" if objectives[name] else " " * 16
        print(f"{name:<24}{middle:8.2f}{flop / middle / 1e9:9.0f}{found}   {in_words(ratios(seconds, LIMIT, name))}")
    for slow, factor in ((LIMIT, 0.75), ("faiss", 1.0), ("scikit-learn", 1.3)):
        values = ratios(seconds, slow, "ours")
        is_reached = statistics.median(values) >= factor
        print(f"goal: ours >= {factor:g} x {slow}: {in_words(values)}, {verdict(is_reached)}")
    difference = objectives["ours"] / objectives["faiss"] - 1
    print(f"goal: objective within 0.1 % of faiss: {100 * difference:+.4f} %, {verdict(abs(difference) <= 1e-3)}")


def growth(name: str, *, rows: int, dim: int, k: int) -> float:
    """In this process: MB by which the peak grows while a variant runs one iteration more than nothing."""
    call = variants(k, 2)[name]
    call(clustered(2 * k, dim))  # libraries and their buffers
    x = clustered(rows, dim)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory(arguments: argparse.Namespace) -> None:
    """Each variant in a process of its own, with one and with two times the rows."""
    print(
        f"{'MB beyond the rows':<24}"
        + "".join(f"{f'{n} rows ({4 * n * arguments.dim >> 20} MB)':>28}" for n in sizes(arguments))
    )
    for name in ("ours", "faiss", "scikit-learn"):
        cells = [in_a_process(name, rows, arguments) for rows in sizes(arguments)]
        print(f"{name:<24}" + "".join(f"{cell:28.0f}" for cell in cells))
        if name == "ours":
            share = cells[0] / (4 * arguments.rows * arguments.dim / 2**20)
    print(f"goal: ours <= 0.2 x the rows: {share:.2f}, {verdict(share <= 0.2)}")


def sizes(arguments: argparse.Namespace) -> tuple[int, int]:
    return arguments.rows, 2 * arguments.rows


def in_a_process(name: str, rows: int, arguments: argparse.Namespace) -> float:
    command = [sys.executable, str(Path(__file__).resolve()), "--growth", name, "--rows", str(rows)]
    command += ["--dim", str(arguments.dim), "--clusters", str(arguments.clusters)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7, help="how often each runs")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--growth", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.growth:
        print(growth(arguments.growth, rows=arguments.rows, dim=arguments.dim, k=arguments.clusters))
    elif arguments.memory:
        memory(arguments)
    else:
        x = clustered(arguments.rows, arguments.dim)
        compare(x, k=arguments.clusters, iterations=arguments.iterations, rounds=arguments.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
