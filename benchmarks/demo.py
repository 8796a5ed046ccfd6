"""Whether the demo still does what its page says: ClusterFit on 5,000 digits, and what its numbers must keep to.

    python benchmarks/demo.py                            seed 0, about 2 minutes on two cores
    python benchmarks/demo.py config.SEED_VALUE=1        further overrides go to the launch
    python benchmarks/demo.py --run runs/demo            reads a finished run instead

Runs config=pretrain/clusterfit/clusterfit_mnist5k by the program itself in a temporary folder, and prints the time and a
line for each bar. The exit code is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from _rounds import verdict

LAUNCHER = Path(__file__).resolve().parents[1] / "tools" / "run_distributed_engines.py"
LINEAR, FEW = "linear_top1", "low_shot_10_top1"


def gain(better: str, worse: str, measure: str) -> Callable[[Mapping[str, float]], float]:
    """By how many points the probe of one stage is above that of another."""
    return lambda results: results[f"probe_{better}/{measure}"] - results[f"probe_{worse}/{measure}"]


#: What is measured, in percent or points, from the pipeline's results; and the least that it may be. One of the 1,200
#: test images is 0.08 points.
BARS: tuple[tuple[str, Callable[[Mapping[str, float]], float], float], ...] = (
    ("the teacher names the quarter turn", lambda results: results["teacher/test_top_1"], 85.0),
    ("student above teacher, linear", gain("student", "teacher", LINEAR), 2.0),
    ("student above teacher, 10 labels per class", gain("student", "teacher", FEW), 8.0),
    ("supervised above student, linear", gain("supervised", "student", LINEAR), 0.05),
)


def run(folder: Path, overrides: Sequence[str]) -> float:
    """Launch the demo into this folder; returns its seconds."""
    command = [sys.executable, str(LAUNCHER), "config=pretrain/clusterfit/clusterfit_mnist5k"]
    began = time.perf_counter()
    subprocess.run([*command, f"config.RUN.DIR={folder}", *overrides], check=True, stdout=sys.stderr)
    return time.perf_counter() - began


def judge(folder: Path) -> bool:
    """Print each bar with what was measured; whether all are reached."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    measured = [(what, value(results), bar) for what, value, bar in BARS]
    for what, value, bar in measured:
        print(f"{what:<45}{value:6.1f}   at least {bar:g}: {verdict(value >= bar)}")
    return all(value >= bar for _, value, bar in measured)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, or read a finished one, and judge it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run, instead of a new one")
    given, overrides = parser.parse_known_args(argv)
    if given.run is not None:
        return 0 if judge(given.run) else 1
    with tempfile.TemporaryDirectory() as folder:
        seconds = run(Path(folder) / "demo", overrides)
        print(f"{'the whole demo, seconds':<45}{seconds:6.0f}")
        return 0 if judge(Path(folder) / "demo") else 1


if __name__ == "__main__":
    sys.exit(main())
