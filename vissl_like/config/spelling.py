"""Which known name was meant? Edit distances over words and over dotted keys, fast enough for a command line.

One edit is an inserted, deleted or substituted character, or two neighbouring ones in the wrong order
(Damerau-Levenshtein, optimal string alignment). Differences that are slips of the writing rather than of the name cost
less: upper against lower case, `-` against `_`, a neighbouring key of the keyboard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

#: Words that are further apart than this are strangers; the exact number does not matter.
FAR = 5.0
_CASE, _JOINER, _NEIGHBOUR = 0.1, 0.2, 0.9
#: A level of the key that is missing or too many: just more than two edits.
_LEVEL = 2.05
#: A word that another begins with, such as SEED of SEED_VALUE, and one that is anywhere in it.
_BEGINNING, _PART = 1.0, 2.5

_ROWS = ("1234567890-", "qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbours() -> frozenset[tuple[str, str]]:
    pairs = set()
    for row_number, row in enumerate(_ROWS):
        for place, letter in enumerate(row):
            below = _ROWS[row_number + 1][max(0, place - 1) : place + 1] if row_number + 1 < len(_ROWS) else ""
            for other in (*row[place + 1 : place + 2], *below):
                pairs |= {(letter, other), (other, letter)}
    return frozenset(pairs)


_NEIGHBOURS = _neighbours()


@lru_cache(maxsize=4096)
def _substitution(a: str, b: str) -> float:
    a, b = a.lower(), b.lower()
    if a == b:
        return _CASE
    if a in "-_ " and b in "-_ ":
        return _JOINER
    return _NEIGHBOUR if (a, b) in _NEIGHBOURS else 1.0


@lru_cache(maxsize=65536)
def distance(a: str, b: str) -> float:
    """Edits between two words; FAR if there are at least that many."""
    if a == b:
        return 0.0
    if abs(len(a) - len(b)) >= FAR:
        return FAR
    before: list[float] = []
    row = [float(i) for i in range(len(b) + 1)]
    for i, x in enumerate(a, 1):
        before, last, row = row, before, [float(i)]
        for j, y in enumerate(b, 1):
            substituted = before[j - 1] + (0.0 if x == y else _substitution(x, y))
            best = min(before[j] + 1, row[j - 1] + 1, substituted)
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, last[j - 2] + 1)
            row.append(best)
        if min(row) >= FAR:
            return FAR
    return min(row[-1], FAR)


def nearest(word: str, known: Iterable[str], *, limit: int = 1) -> list[str]:
    """Known words that may be meant by `word`, nearest first; none if none is near.

    A known word that contains the typed one (or the other way round) counts as near.
    """
    scored = []
    for name in known:
        apart = distance(word, name)
        low, known_low = word.lower(), name.lower()
        if apart > _allowed(word) and len(word) >= 3 and (low in known_low or known_low in low):
            apart = _allowed(word)
        if apart <= _allowed(word):
            scored.append((apart, abs(len(name) - len(word)), name))
    return [name for _, _, name in sorted(scored)[:limit]]


def _allowed(word: str) -> float:
    return max(2.0, min(len(word) / 2, FAR - 1))


Path = tuple[str, ...]


def nearest_paths(path: Sequence[str], known: Iterable[Path], *, limit: int = 3) -> list[tuple[float, Path]]:
    """(distance, path) of the known paths nearest to `path`, best first. `*` in a known path stands for a list index.

    Components are aligned: each is compared with its partner, and a level that is missing or too many has its price.
    """
    typed = tuple(path)
    scored = []
    for place, candidate in enumerate(known):
        apart = _path_distance(typed, candidate)
        if apart < FAR + _LEVEL:
            scored.append((apart, *_shape_difference(typed, candidate), place, candidate))
    scored.sort()
    return [(one[0], _with_indices(typed, one[-1])) for one in scored[:limit]]


@lru_cache(maxsize=65536)
def _component_distance(typed: str, known: str) -> float:
    if known == "*":
        return 0.0 if typed.isdigit() else FAR
    apart = distance(typed, known)
    longest = max(len(typed), len(known))
    if longest > 1 and longest - 0.5 <= apart < FAR:  # no letter in common
        return min(FAR, apart + 1.5)
    if apart > _BEGINNING and len(typed) >= 3 and known.lower().startswith(f"{typed.lower()}_"):
        return _BEGINNING
    return _PART if apart > _PART and is_part(typed, known) else apart


def is_part(typed: str, known: str) -> bool:
    """Whether one word is contained in the other, whatever the case and the underscores."""
    short, long = sorted((typed.lower().replace("_", ""), known.lower().replace("_", "")), key=len)
    return len(short) >= 5 and short in long


def _path_distance(typed: Path, known: Path) -> float:
    # Equal ends cost nothing and are most of the work: cut them off first.
    start = 0
    while start < min(len(typed), len(known)) and typed[start] == known[start]:
        start += 1
    stop = 0
    while stop < min(len(typed), len(known)) - start and typed[-1 - stop] == known[-1 - stop]:
        stop += 1
    a, b = typed[start : len(typed) - stop], known[start : len(known) - stop]
    if len(a) == len(b) == 1:
        return _component_distance(a[0], b[0])
    row = [j * _LEVEL for j in range(len(b) + 1)]
    for i, x in enumerate(a, 1):
        before, row = row, [i * _LEVEL]
        for j, y in enumerate(b, 1):
            partner = before[j - 1] + _component_distance(x, y)
            row.append(min(partner, before[j] + _LEVEL, row[j - 1] + _LEVEL))
    return min(row[-1], _joined_distance(typed, known))


def _joined_distance(typed: Path, known: Path) -> float:
    """Distance as plain text, for a dot that was left out, doubled or mistyped."""
    if len(typed) == len(known) or "*" in known:
        return FAR + _LEVEL
    a, b = ".".join(typed), ".".join(known)
    return distance(a, b) if abs(len(a) - len(b)) <= 2 else FAR + _LEVEL


def _shape_difference(typed: Path, known: Path) -> tuple[int, int]:
    """Breaks ties before the given order does: the same number of levels, then a last word of about the same length."""
    return abs(len(typed) - len(known)), abs(len(typed[-1]) - len(known[-1]))


def _with_indices(typed: Path, known: Path) -> Path:
    """The known path with the typed list indices in place of its stars, in order."""
    indices = [part for part in typed if part.isdigit()]
    return tuple(indices.pop(0) if part == "*" and indices else ("0" if part == "*" else part) for part in known)
