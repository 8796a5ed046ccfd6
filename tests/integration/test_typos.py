"""Two hundred mistyped keys: the right one is suggested first, everywhere a key can stand, at little cost."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.forks import run_ranks
from vissl_like.config import reference

ROOT = Path(__file__).resolve().parents[2]
LETTERS = string.ascii_uppercase + "_"
#: So many in all places together, and so many more without a command line.
NUMBER, MORE, LEAST_RIGHT = 200, 40, 0.95
PLACES = ("recipe file", "command line", "+key", "sweep")


def edited(word: str, rng: random.Random) -> str:
    """The word with one letter inserted, deleted, substituted, or two neighbours swapped."""
    place, kind = rng.randrange(len(word)), rng.choice(("insert", "delete", "substitute", "swap"))
    if kind == "insert":
        return word[:place] + rng.choice(LETTERS) + word[place:]
    if kind == "delete":
        return word[:place] + word[place + 1 :]
    if kind == "substitute":
        return word[:place] + rng.choice(LETTERS) + word[place + 1 :]
    return word[:place] + word[place + 1 : place + 2] + word[place] + word[place + 2 :]


def typos(number: int, seed: int) -> list[tuple[str, str]]:
    """(mistyped key, right key): one or two edits in the last or a middle word of a real key."""
    rng = random.Random(seed)
    keys = [entry.key for entry in reference.entries().values() if not entry.is_section and "*" not in entry.key]
    found: list[tuple[str, str]] = []
    while len(found) < number:
        right = rng.choice(keys).split(".")
        place = rng.randrange(1, len(right)) if len(right) > 1 else 0
        place = rng.choice((place, len(right) - 1))
        word = right[place]
        for _ in range(rng.choice((1, 2))):
            word = edited(word, rng) if word else word
        wrong = [*right[:place], word, *right[place + 1 :]]
        if word and not word[0].isdigit() and reference.find(tuple(wrong)) is None:
            found.append((".".join(wrong), ".".join(right)))
    return found


def arguments(wrong: str, place: str, folder: Path) -> list[str]:
    """A command line with the mistyped key in this place."""
    if place == "recipe file":
        tree: object = 1
        for part in reversed(wrong.split(".")):
            tree = {part: tree}
        page = folder / "configs/config/typo/page.yaml"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("# @package _global_\n" + yaml.safe_dump(tree))
        return ["config=typo/page"]
    base = ["config=debug/supervised_synthetic"]
    return {
        "command line": [*base, f"{wrong}=1"],
        "+key": [*base, f"+{wrong}=1"],
        "sweep": ["-m", *base, f"{wrong}=1,2", "config.SEED_VALUE=1,2"],
    }[place]


#: Runs command lines one after the other, where nobody counts lines: (exit code, stderr) of each.
ONE_BY_ONE = """
import contextlib, io, json, sys
from pathlib import Path
from tests.integration.test_typos import arguments
from vissl_like.launch.main import main
ended = []
for wrong in sys.argv[2:]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(arguments(wrong, sys.argv[1], Path.cwd()))
    ended.append((code, said.getvalue()))
print(json.dumps(ended))
"""


@pytest.mark.parametrize("place", PLACES)
def test_the_right_key_is_suggested_first(place: str, tmp_path: Path) -> None:
    cases, program = typos(NUMBER // len(PLACES), seed=PLACES.index(place)), tmp_path / "one_by_one.py"
    program.write_text(ONE_BY_ONE)
    (done,) = run_ranks([place, *(wrong for wrong, _ in cases)], cwd=tmp_path, program=program)
    assert done.returncode == 0, done.stderr
    missed = []
    for (wrong, right), (code, error) in zip(cases, json.loads(done.stdout), strict=True):
        assert code == 2 and f"unknown key {wrong}" in error and "Traceback" not in error
        suggested = re.search(r"did you mean ([\w.]+)", error)
        if suggested is None or suggested.group(1) != right:
            missed.append((wrong, right, suggested and suggested.group(1)))
    assert len(missed) <= (1 - LEAST_RIGHT) * NUMBER / len(PLACES), missed


def test_many_more_typos_are_understood() -> None:
    from vissl_like.config.suggest import suggest_keys

    cases = typos(MORE, seed=99)
    right = sum(suggest_keys(tuple(wrong.split(".")))[:1] == (key,) for wrong, key in cases)
    assert right >= LEAST_RIGHT * len(cases)


PROGRAM = """
import sys
from vissl_like.launch.main import main
code = main(sys.argv[1:])
heavy = {"torch", "torchvision", "timm", "transformers", "wandb", "matplotlib", "faiss", "sklearn"} & set(sys.modules)
print("heavy:", *heavy)
sys.exit(code)
"""


@pytest.mark.parametrize("place", PLACES)
def test_a_mistake_costs_little_and_imports_no_torch(place: str, tmp_path: Path) -> None:
    wrong, right = typos(1, seed=7)[0]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments(wrong, place, tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{place}: {after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime:.2f} s of CPU")
    assert done.returncode == 2 and done.stdout.strip() == "heavy:"
    assert right in done.stderr and "Traceback" not in done.stderr
