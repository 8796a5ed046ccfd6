"""Which key or recipe was meant by a mistyped one. Free of Hydra."""

from __future__ import annotations

import difflib
from functools import lru_cache

from vissl_like.config import aliases, reference
from vissl_like.config.recipes import KeyPath, Library
from vissl_like.config.spelling import FAR, is_part, nearest_paths


@lru_cache(maxsize=256)
def suggest_keys(path: KeyPath) -> tuple[str, ...]:
    """Full keys that may be meant, best first: options, new names of old ones, and sections if nothing else is near."""
    while len(path) > 2 and path[-1].isdigit():
        path = path[:-1]
    above = [reference.find(path[:length]) for length in range(1, len(path))]
    known = [entry for entry in reference.entries().values() if entry not in above]
    ranked = nearest_paths(path, [entry.path for entry in known if not entry.is_section], limit=6)
    ranked += [
        (apart + 0.5, section)
        for apart, section in nearest_paths(path, [entry.path for entry in known if entry.is_section])
    ]
    new_names = dict(aliases.old_names())
    old = nearest_paths(path, new_names, limit=1)
    if old and old[0][0] <= 2 and (not ranked or old[0][0] < ranked[0][0] - 0.5):
        ranked.append((old[0][0], new_names[old[0][1]]))
    # The right words on the wrong level are no slip of the keyboard; they beat other words on the right level.
    ranked = [(apart - _is_inside(path, candidate), candidate) for apart, candidate in ranked]
    ranked.sort(key=lambda one: one[0])
    if not ranked:
        return ()
    best, first = ranked[0]
    is_sure = first[-1].lower() == path[-1].lower() or is_part(path[-1], first[-1])
    if best > (FAR if is_sure else _limit(".".join(path[1:] or path))):
        return ()
    near = [".".join(candidate) for apart, candidate in ranked if apart <= best + 0.5]
    return tuple(dict.fromkeys(near))[: 1 if best <= 1 else 2]


def _is_inside(typed: KeyPath, known: KeyPath) -> bool:
    """Whether the known path has all typed words, in their order, and more."""
    rest = iter(part.lower() for part in known)
    return len(typed) < len(known) and all(part.lower() in rest for part in typed)


def _limit(typed: str) -> float:
    """How far from something known this may be to count as meant."""
    return min(FAR, 1.1 + len(typed) / 4)


def suggest_recipe(name: str, library: Library) -> str:
    """`; did you mean X?` for an unknown recipe, and where to see them all."""
    names = list(library.files)
    last = name.rpartition("/")[2]
    ranked = nearest_paths(name.split("/"), (tuple(known.split("/")) for known in names))
    near = [known for known in names if known.rpartition("/")[2] == last]
    near += ["/".join(path) for apart, path in ranked if apart <= min(ranked[0][0] + 0.5, _limit(name))]
    near = near or difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    unique = list(dict.fromkeys(near))[:2]
    hint = f"; did you mean {' or '.join(unique)}?" if unique else "."
    return f"{hint} `list recipes` shows all {len(names)}; your own are found in ./configs/config or by --config-dir."
