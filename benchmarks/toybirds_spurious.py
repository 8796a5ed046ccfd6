"""The recipe parts/toybirds_spurious with several seeds: the accuracy of the worst group with and without masks.

    python benchmarks/toybirds_spurious.py                       five seeds
    python benchmarks/toybirds_spurious.py --seeds 0 1 config.MACHINE.DEVICE=cpu

One launch of the command line for each seed, one after the other; finished runs below --runs are not repeated. Prints a
markdown table of the test images for every seed, then the median and the minimum. Further arguments go to every launch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LAUNCHER = Path(__file__).resolve().parents[1] / "tools/run_distributed_engines.py"
#: Column title -> key of the pipeline's results.
COLUMNS = {
    "whole images: top 1": "unmasked/test_top_1",
    "worst group": "unmasked/test_worst_group",
    "true masks: top 1": "true_masks/test_top_1",
    "worst group ": "true_masks/test_worst_group",
    "learned masks: top 1": "learned_masks/test_top_1",
    "worst group  ": "learned_masks/test_worst_group",
    "foreground IoU": "learned_masks/foreground_iou",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/toybirds_spurious"), help="where the run folders go")
    given, overrides = parser.parse_known_args(arguments)
    measured = [measure(seed, given.runs / f"seed_{seed}", overrides) for seed in given.seeds]
    rows = [[f"seed {seed}", *values] for seed, values in zip(given.seeds, measured)]
    by_column = list(zip(*measured))
    rows.append(["median", *map(statistics.median, by_column)])
    rows.append(["minimum", *map(min, by_column)])
    print("\n".join(table(rows)))


def measure(seed: int, run_dir: Path, overrides: Sequence[str]) -> list[float]:
    """The numbers of COLUMNS for one seed, in percent."""
    command = [sys.executable, str(LAUNCHER), "config=parts/toybirds_spurious", f"config.SEED_VALUE={seed}"]
    command += [f"config.RUN.DIR={run_dir}", *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    return [float(results[key]) for key in COLUMNS.values()]


def table(rows: Sequence[Sequence[str | float]]) -> list[str]:
    """Lines of a markdown table."""
    lines = [["", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    lines += [[cell if isinstance(cell, str) else f"{cell:.1f}" for cell in row] for row in rows]
    return ["| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines]


if __name__ == "__main__":
    main()
