"""Text tables of data sets: one record per line, fields separated by blanks or commas. Every error names file and line."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vissl_like.errors import DataError

#: What a field is called in messages.
_KINDS = {"i": "a whole number", "f": "a number", "s": "text", "r": "text to the end of the line"}


@dataclass(frozen=True)
class Table:
    """Columns by name: int64, float64 or unicode arrays (N,); `lines` (N,) are their line numbers, from 1."""

    file: Path
    columns: dict[str, np.ndarray]
    lines: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.lines)

    def problem(self, row: int, what: str) -> DataError:
        """An error about one record."""
        return DataError(f"{self.file}, line {int(self.lines[row])}: {what}")


def read_table(file: Path, *, separator: str | None = None, **fields: str) -> Table:
    """Read a file whose lines hold these fields, in this order, separated by blanks (or `separator`).

    Each field is "i" (whole number), "f" (finite number), "s" (a word) or "r" (the rest of the line). Empty lines are
    passed over. Raises DataError for a missing file, a line of another form, or a file without records.
    """
    found: dict[str, list[object]] = {name: [] for name in fields}
    lines = []
    for number, words in _records(file, fields, separator):
        for (name, kind), word in zip(fields.items(), words):
            found[name].append(_value(word, kind, file=file, line=number, name=name))
        lines.append(number)
    if not lines:
        raise DataError(f"{file}: is empty; expected lines of the form {_form(fields)}.")
    types = {"i": np.int64, "f": np.float64, "s": np.str_, "r": np.str_}
    columns = {name: np.array(values, dtype=types[fields[name]]) for name, values in found.items()}
    return Table(file, columns, np.array(lines, dtype=np.int64))


def _records(file: Path, fields: dict[str, str], separator: str | None) -> Iterator[tuple[int, list[str]]]:
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). This data set needs it.") from error
    has_rest = "r" in fields.values()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        words = line.split(separator, maxsplit=len(fields) - 1 if has_rest else -1)
        if len(words) != len(fields):
            raise DataError(
                f"{file}, line {number}: {line.strip()[:80]!r} has {len(words)} fields; expected {_form(fields)}."
            )
        yield number, [word.strip() for word in words]


def _form(fields: dict[str, str]) -> str:
    return " ".join(f"<{name}>" for name in fields)


def _value(word: str, kind: str, *, file: Path, line: int, name: str) -> object:
    try:
        if kind in "if" and "_" in word:  # Python would read 1_000 as a number
            raise ValueError(word)
        if kind == "i":
            return int(np.int64(int(word)))
        if kind == "f":
            number = float(word)
            if math.isfinite(number):
                return number
            raise ValueError(word)
    except ValueError:
        raise DataError(f"{file}, line {line}: {name} is {word!r}, which is not {_KINDS[kind]}.") from None
    except OverflowError:
        raise DataError(f"{file}, line {line}: {name} is {word[:40]!r}, which is too large.") from None
    return word


def read_csv(file: Path, *, needs: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Records of a CSV file whose first line names the columns: (number of the line, {column: text without blanks}).

    Raises DataError for a file that cannot be read, a column of `needs` that is missing, and a line without its value.
    """
    found = []
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            absent = [name for name in needs if name not in reader.fieldnames]
            if absent:
                raise DataError(f"{file}, line 1: no column {absent[0]!r}; expected {', '.join(needs)}.")
            for record in reader:
                empty = [name for name in needs if record[name] is None]
                if empty:
                    raise DataError(f"{file}, line {reader.line_num}: the line ends before its {empty[0]}.")
                found.append((reader.line_num, {name: str(record[name]).strip() for name in needs}))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). This data set needs it.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: is not text in UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    except csv.Error as error:
        raise DataError(f"{file}: is not a CSV file ({error}).") from error
    return found


def index_of(table: Table, name: str, *, allow_repeats: bool = False) -> dict[str, int]:
    """Value of a column as text -> row. A value that stands twice is an error, unless repeats are allowed (the first)."""
    index: dict[str, int] = {}
    for row, value in enumerate(table[name].tolist()):
        first = index.setdefault(str(value), row)
        if first != row and not allow_repeats:
            where = int(table.lines[first])
            raise table.problem(row, f"{name} {value} stands there a second time; the first is in line {where}.")
    return index


def aligned(table: Table, name: str, to: Table) -> np.ndarray:
    """Rows of `table`, int64 (N,), whose `name` is that of each row of `to`. Both hold the same values, each once."""
    index, wanted = index_of(table, name), index_of(to, name)
    missing = [row for value, row in wanted.items() if value not in index]
    if missing:
        more = f" and {len(missing) - 1} more" * (len(missing) > 1)
        where = f"{to.file}, line {int(to.lines[missing[0]])}"
        raise DataError(f"{table.file}: has no line for {name} {to[name][missing[0]]}{more}, which {where} lists.")
    extra = [row for value, row in index.items() if value not in wanted]
    if extra:
        raise table.problem(extra[0], f"{name} {table[name][extra[0]]} is not in {to.file}.")
    return np.array([index[value] for value in wanted], dtype=np.int64)
