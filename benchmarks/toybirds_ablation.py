"""What each ingredient of the part recipe for drawn birds is worth: the ablation for several seeds, medians in a table.

    python benchmarks/toybirds_ablation.py                     three seeds, about 4 minutes each on two cores
    python benchmarks/toybirds_ablation.py --seeds 0           one seed
    python benchmarks/toybirds_ablation.py --split VAL         on validation images, to choose settings

Runs config=parts/toybirds_ablation by the program itself, a process per seed, and prints a markdown table: the median of
the seeds, and their range in brackets. Seeds that are finished in --folder are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(seed: int, run_dir: Path, *, split: str) -> dict[str, Any]:
    """The summary of one seed: {"columns": names, "rows": a title and numbers each}."""
    command = [
        *(sys.executable, str(ROOT / "tools" / "run_distributed_engines.py"), "config=parts/toybirds_ablation"),
        *(f"config.SEED_VALUE={seed}", f"config.RUN.DIR={run_dir}"),
        *(["config.DATA.TEST.USE_SPLIT=VAL"] if split == "VAL" else []),
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads((run_dir / "table.json").read_text())


def cell(values: Sequence[float]) -> str:
    """The median, and the range if there are several."""
    middle = f"{statistics.median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f} to {max(values):.1f})"


def markdown(tables: Sequence[dict[str, Any]]) -> str:
    """The tables of all seeds as one."""
    names = tables[0]["columns"]
    lines = [names, ["---"] * len(names)]
    for rows in zip(*(table["rows"] for table in tables), strict=True):
        lines.append([rows[0][0], *(cell(values) for values in list(zip(*rows))[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=["TEST", "VAL"], default="TEST")
    parser.add_argument("--folder", type=Path, help="default: runs/toybirds_ablation_<split>")
    arguments = parser.parse_args(argv)
    folder = arguments.folder or Path("runs") / f"toybirds_ablation_{arguments.split.lower()}"
    tables = [run(seed, folder / f"seed_{seed}", split=arguments.split) for seed in arguments.seeds]
    print(markdown(tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
