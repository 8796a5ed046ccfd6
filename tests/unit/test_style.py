"""The habits of the code base, checked: short files and functions, no global randomness, nothing unsafe or undone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "vissl_like").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
CODE = PACKAGE + TOOLS

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}
#: Global random functions. Generators with a seed of their own are fine anywhere.
GLOBAL_NUMPY = re.compile(r"\bnp\.random\.(?!default_rng|Generator|SeedSequence|PCG64|Philox|MT19937|RandomState)\w+")
GLOBAL_RANDOM = re.compile(r"(?<![\w.])random\.(?!Random\b)\w+\(")
UNFINISHED = re.compile(r"raise NotImplementedError|\bTODO\b|\bFIXME\b|\bXXX\b")
UNSAFE = re.compile(r"pickle\.loads?\(|allow_pickle=True|weights_only=False")
NEWER_THAN_3_10 = re.compile(
    r"\btomllib\b|\bStrEnum\b|\bExceptionGroup\b|datetime\.UTC|from typing import .*\b(Self|override)\b"
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def matches(pattern: re.Pattern[str], paths: list[Path], *, allowed: tuple[str, ...] = ()) -> list[str]:
    """`file:line: text` of every match outside comments and outside the allowed files."""
    return [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in paths
        if relative(path) not in allowed
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if pattern.search(line.split("  #")[0]) and not line.lstrip().startswith("#")
    ]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"), feature_version=(3, 10))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_files_are_short() -> None:
    long = {
        relative(path): n for path in CODE + TESTS if (n := len(path.read_text("utf-8").splitlines())) > MAX_FILE_LINES
    }
    assert not long


def test_functions_are_short() -> None:
    long = {
        f"{relative(path)}:{node.name}": length
        for path in CODE + BENCHMARKS
        for node in functions(path)
        if (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert not long


def test_no_drawer_for_everything() -> None:
    assert not [relative(path) for path in CODE + TESTS if path.name in FORBIDDEN_NAMES]


def test_randomness_has_one_home() -> None:
    assert not matches(GLOBAL_NUMPY, CODE, allowed=("vissl_like/core/rng.py",))
    users = [path for path in CODE if re.search(r"^\s*import random$", path.read_text("utf-8"), re.MULTILINE)]
    assert not matches(GLOBAL_RANDOM, users, allowed=("vissl_like/core/rng.py",))


def test_nothing_is_unfinished() -> None:
    assert not matches(UNFINISHED, CODE + BENCHMARKS)


def test_nothing_unpickles_by_accident() -> None:
    """The one exception is the reader behind MODEL.WEIGHTS_INIT.ALLOW_UNSAFE."""
    assert not matches(UNSAFE, CODE, allowed=("vissl_like/core/weights.py",))


def test_python_3_10_is_enough() -> None:
    assert not matches(NEWER_THAN_3_10, CODE + BENCHMARKS)


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_every_module_and_public_function_says_what_it_is(path: Path) -> None:
    text = path.read_text("utf-8")
    if path.name == "__init__.py" and not text.strip():
        return
    assert ast.get_docstring(ast.parse(text)), f"{relative(path)} has no docstring"
