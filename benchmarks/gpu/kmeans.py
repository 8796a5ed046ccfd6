"""Lloyd's iterations on a GPU: ours in each precision, faiss-gpu where it is installed, and the matrix product alone.

    python benchmarks/gpu/kmeans.py                                                  1.28 million x 2,048, 16,000 clusters
    python benchmarks/gpu/kmeans.py --device cpu --rows 8000 --dim 64 --clusters 100  shows that it works

Equal first centroids, rows and iterations. Seconds of wall time per iteration, with the rows already on the device: the
difference between a run of many iterations and one of a single iteration. The variants take turns in shuffled order, and
the ratios of a round are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from _rounds import in_words, ratios, turns

from vissl_like.analysis.blocks import Blocks, block_rows
from vissl_like.analysis.kmeans import faiss_module, kmeans
from vissl_like.analysis.lloyd import Lloyd
from vissl_like.analysis.nearest import Precision
from vissl_like.analysis.rows import ArrayRows
from vissl_like.analysis.seeding import initial_rows

PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bfloat16")
#: Runs some iterations; returns the objective, or 0.
Variant = Callable[[int], float]


def clustered(rows: int, dim: int) -> np.ndarray:
    """Rows around 20,000 means, made piece by piece."""
    draw = np.random.default_rng(0)
    means = draw.standard_normal((20_000, dim), dtype=np.float32)
    x = np.empty((rows, dim), dtype=np.float32)
    for start in range(0, rows, 16384):
        part = x[start : start + 16384]
        draw.standard_normal(part.shape, dtype=np.float32, out=part)
        part += means[draw.integers(0, len(means), len(part))]
    return x


def ours(blocks: Blocks, *, k: int, magnitude: float, precision: Precision) -> Variant:
    """Over rows that stay on the device."""
    first = initial_rows(len(blocks.rows), k, seed=0)

    def run(iterations: int) -> float:
        lloyd = Lloyd(blocks, k=k, magnitude=magnitude, precision=precision)
        found = lloyd.run(first, iterations=iterations).objective[-1]
        if lloyd.precision != precision:
            print(f"{precision} was given up for float32")
        return found

    return run


def product(blocks: Blocks, *, k: int, precision: Precision) -> Variant:
    """The limit: the products of the same blocks into the same memory."""
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    centroids = torch.from_numpy(blocks.rows.take(np.arange(k))).to(blocks.device, kind)
    ready = [blocks.load(span).to(kind) for span in blocks.spans]
    scores = torch.empty(max(map(len, ready)), k, dtype=kind, device=blocks.device)

    def run(iterations: int) -> float:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        for _ in range(iterations):
            for block in ready:
                torch.mm(block, centroids.T, out=scores[: len(block)])
        torch.backends.cuda.matmul.fp32_precision = before
        return 0.0

    return run


def by_faiss(x: np.ndarray, *, k: int) -> Variant:
    """faiss on the GPU from the same rows; it copies them to the device in each run."""
    return lambda iterations: kmeans(
        ArrayRows(x),
        k=k,
        iterations=iterations,
        backend="faiss",
        max_points_per_centroid=0,
        device=torch.device("cuda"),
    ).objective[-1]


def seconds_of(run: Variant, iterations: int, *, device: torch.device) -> tuple[float, float]:
    """Wall seconds and objective."""
    began = time.perf_counter()
    objective = run(iterations)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, objective


def main(argv: Sequence[str] | None = None) -> int:
    """One table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--clusters", type=int, default=16_000)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(argv)
    device, k = torch.device(arguments.device), arguments.clusters
    x = clustered(arguments.rows, arguments.dim)
    size = block_rows(k, arguments.dim, device=device)
    blocks = Blocks(ArrayRows(x), size=size, device=device)
    magnitude = blocks.largest_magnitude(what="rows")
    runs: dict[str, Variant] = {}
    for precision in PRECISIONS:
        runs[f"ours, {precision}"] = ours(blocks, k=k, magnitude=magnitude, precision=precision)
        runs[f"matrix product, {precision}"] = product(blocks, k=k, precision=precision)
    faiss = faiss_module()
    if device.type == "cuda" and faiss is not None and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        runs["faiss-gpu"] = by_faiss(x, k=k)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    objectives: dict[str, float] = {}
    for number, name in turns(runs, rounds=arguments.rounds + 1):
        once, _ = seconds_of(runs[name], 1, device=device)
        many, objectives[name] = seconds_of(runs[name], 1 + arguments.iterations, device=device)
        if number:  # the first round warms up
            seconds[name].append((many - once) / arguments.iterations)
    show(seconds, objectives, flop=2.0 * arguments.rows * arguments.dim * k)
    return 0


def show(seconds: dict[str, list[float]], objectives: dict[str, float], *, flop: float) -> None:
    """A line for each variant, then ours as a share of the matrix products, and of faiss where it ran."""
    for name, values in seconds.items():
        middle = statistics.median(values)
        objective = f"objective {objectives[name]:.6g}" if objectives[name] else ""
        print(f"{name:<28}{1000 * middle:10.1f} ms per iteration{flop / middle / 1e12:10.2f} TFLOP/s   {objective}")
    for precision in PRECISIONS:
        mine, limit = f"ours, {precision}", f"matrix product, {precision}"
        print(f"{limit} / ours: {in_words(ratios(seconds, limit, mine))}")
        if "faiss-gpu" in seconds:
            print(f"faiss-gpu / {mine}: {in_words(ratios(seconds, 'faiss-gpu', mine))}")


if __name__ == "__main__":
    raise SystemExit(main())
