"""Which tensor of a file goes where in a model, and what to change if too few do: names and shapes only, no torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from vissl_like.core.weights_rules import HEADS, KEY, TRUNK, KeyRules, canonical, presets

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

#: Position tables: (1, N, C) or (N, C), class and register tokens first, then a square grid.
POSITION_TABLE = re.compile(r"(^|\.)(pos_embed|pos_embedding|positional_embedding|position_embeddings?)(\.weight)?$")
MOST_PREFIX_TOKENS = 8
#: What makes a tensor one of a head where heads are left alone, anywhere in its name.
_HEADS = "heads"
#: Words of SKIP_LAYERS that recipes name for all models: one that has no such tensors is no mistake.
_USUAL_WORDS = ("num_batches_tracked", _HEADS)


class Status(Enum):
    """What happens to a tensor."""

    LOADED = "loaded"
    REMAPPED = "remapped"
    RESAMPLED = "resampled"
    SKIPPED = "skipped"
    MISSING = "missing"
    MISMATCHED = "mismatched"
    UNEXPECTED = "unexpected"


#: States in which the model's tensor is filled from the file.
FILLED = (Status.LOADED, Status.REMAPPED, Status.RESAMPLED)


@dataclass(frozen=True)
class Row:
    """One line of the report. Unexpected tensors have no place in the model; missing ones none in the file."""

    status: Status
    model_key: str
    file_key: str
    model_shape: Shape | None
    file_shape: Shape | None


@dataclass(frozen=True)
class Share:
    """Number of parameters (single values) that are loaded, of those that should be."""

    loaded: int
    total: int

    @property
    def value(self) -> float:
        return self.loaded / self.total if self.total else 1.0

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % of {self.total:,} parameters" if self.total else "no parameters to load"


@dataclass(frozen=True)
class LoadPlan:
    """The decision for every tensor of model and file, in their order."""

    rows: tuple[Row, ...]
    trunk: Share
    heads: Share
    notes: tuple[str, ...] = ()
    #: No name of the file lies in trunk or heads after the rules: VISSL's "not compatible".
    incompatible: bool = False

    def of(self, *statuses: Status) -> list[Row]:
        return [row for row in self.rows if row.status in statuses]

    @property
    def loaded(self) -> dict[str, str]:
        """Model key -> key in the file."""
        return {row.model_key: row.file_key for row in self.of(*FILLED)}

    def errors_in_shape(self, *, assert_heads: bool) -> list[Row]:
        """Tensors that are in both under the same name with different shapes, where this is an error."""
        return [row for row in self.of(Status.MISMATCHED) if assert_heads or not row.model_key.startswith(HEADS)]


def plan_loading(
    file: Shapes,
    model: Shapes,
    *,
    rules: KeyRules,
    skip: Sequence[str] = (),
    load_heads: bool = True,
    parameters: Collection[str] | None = None,
    grids: Mapping[str, tuple[int, int]] | None = None,
    copies: Mapping[str, str] | None = None,
) -> LoadPlan:
    """Decide for every tensor. `skip` are SKIP_LAYERS: substrings of model keys, tested after all renames.

    load_heads=False leaves heads alone (a frozen trunk that is evaluated with new heads): all tensors with "heads" in
    their names, as VISSL does. `parameters` are the model keys that count for the shares, by default all. `grids`: height
    and width of position tables that are not square. `copies`: model key -> the name to take where the file does not have
    the key itself (several backbones of one kind).
    """
    copies = copies or {}
    names: dict[str, str] = {}
    clashes = []
    for key in file:
        name = rules.apply(key)
        if name in names:
            clashes.append(f"{names[name]} and {key} both become {name}; the second is used")
        names[name] = key
    rows = []
    for key, shape in model.items():
        source = names.get(canonical(key))
        if source is None and key in copies:
            source = names.get(copies[key])
        status = _status(key, shape, source, file, skip=skip, load_heads=load_heads, grid=(grids or {}).get(key))
        rows.append(Row(status, key, source or "", shape, file[source] if source is not None else None))
    notes = [*clashes, *_idle_words(skip, model), *_trunk_taken_for_heads(rows, skip=skip)]
    used = {canonical(key) for key in model} | set(copies.values())
    unexpected = [Row(Status.UNEXPECTED, "", key, None, file[key]) for name, key in names.items() if name not in used]
    counted = [row for row in rows if parameters is None or row.model_key in parameters]
    return LoadPlan(
        rows=tuple(rows + unexpected),
        trunk=_share([row for row in counted if not row.model_key.startswith(HEADS)]),
        heads=_share([row for row in counted if row.model_key.startswith(HEADS)]),
        notes=tuple(notes),
        incompatible=not any(name.startswith((TRUNK, HEADS)) for name in names),
    )


def _status(
    key: str,
    shape: Shape,
    source: str | None,
    file: Shapes,
    *,
    skip: Sequence[str],
    load_heads: bool,
    grid: tuple[int, int] | None,
) -> Status:
    if _is_skipped(key, skip):
        return Status.SKIPPED
    if source is None:
        return Status.MISSING
    if _HEADS in key and not load_heads:
        return Status.SKIPPED
    if file[source] != shape:
        return Status.RESAMPLED if prefix_tokens(key, file[source], shape, grid=grid) is not None else Status.MISMATCHED
    return Status.LOADED if source == key else Status.REMAPPED


def _is_skipped(key: str, skip: Sequence[str]) -> bool:
    """Whether a word of SKIP_LAYERS occurs in a model's name; a word may call trunk. trunk.base_model., as VISSL does."""
    return any(word in key or canonical(word) in key for word in skip)


def _idle_words(skip: Sequence[str], model: Shapes) -> list[str]:
    """A note for each word of SKIP_LAYERS that stands in no name: most likely it is misspelt."""
    words = [word for word in skip if word not in _USUAL_WORDS and not any(_is_skipped(key, [word]) for key in model)]
    return [f"{KEY}.SKIP_LAYERS: {word!r} is in no name of the model, so it leaves nothing out" for word in words]


def _trunk_taken_for_heads(rows: Sequence[Row], *, skip: Sequence[str]) -> list[str]:
    """A note if tensors of the trunk are left alone only because of their names."""
    skipped = [row.model_key for row in rows if row.status is Status.SKIPPED and row.model_key.startswith(TRUNK)]
    left = [key for key in skipped if not _is_skipped(key, skip)]
    if not left:
        return []
    return [
        f"{len(left)} tensors of the trunk have 'heads' in their names and are left as they are, the first is {left[0]};"
        " config.MODEL.FEATURE_EVAL_SETTINGS.EVAL_TRUNK_AND_HEAD=true loads them"
    ]


def prefix_tokens(key: str, file: Shape, model: Shape, *, grid: tuple[int, int] | None = None) -> int | None:
    """Number of class and register tokens if one position table can be resampled into the other, else None.

    Both must have the same width and the same number of such tokens before a square grid (`grid` for the model's own).
    """
    if not POSITION_TABLE.search(key) or len(file) != len(model) or len(file) not in (2, 3) or file[-1] != model[-1]:
        return None
    if len(file) == 3 and (file[0], model[0]) != (1, 1):
        return None
    for prefix in range(min(MOST_PREFIX_TOKENS, file[-2] - 1, model[-2] - 1) + 1):
        cells = model[-2] - prefix
        fits = cells == grid[0] * grid[1] if grid else _is_square(cells)
        if fits and _is_square(file[-2] - prefix):
            return prefix
    return None


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _share(rows: Sequence[Row]) -> Share:
    """Skipped tensors were left out on purpose and do not count."""
    wanted = [row for row in rows if row.status is not Status.SKIPPED]
    return Share(
        loaded=sum(_size(row.model_shape) for row in wanted if row.status in FILLED),
        total=sum(_size(row.model_shape) for row in wanted),
    )


def _size(shape: Shape | None) -> int:
    return math.prod(shape or ())


@dataclass(frozen=True)
class Suggestion:
    """Options that would load this share of the trunk."""

    overrides: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        return f"{' '.join(self.overrides)} would load {100 * self.share:.1f} % of the trunk"


def suggest_rules(file: Shapes, model: Shapes, *, rules: KeyRules) -> Suggestion | None:
    """The prefixes or the preset under which most of the trunk matches in name and shape, if that is more than now.

    REMOVE_PREFIX is tried over the dotted beginnings of names in the file, APPEND_PREFIX over those in the model.
    Among equals, what changes the fewest options and is shortest wins.
    """
    target = {canonical(key): shape for key, shape in model.items() if not key.startswith(HEADS)}
    total = sum(map(_size, target.values()))
    if not total:
        return None
    best = (_score(file, target, rules), 0, 0, rules, "")
    stripped = replace(rules, remove="", append="")
    names = [stripped.rename(key) for key in file]
    removes = [rules.remove, "", *_beginnings(names, least=0.02)]
    appends = [rules.append, "", *_beginnings(list(target), least=0.3)]
    for remove in dict.fromkeys(removes):
        for append in dict.fromkeys(appends):
            candidate = replace(rules, remove=remove, append=append)
            best = max(best, _ranked(file, target, candidate, rules, preset=""), key=lambda entry: entry[:3])
    for name, preset in presets().items():
        best = max(best, _ranked(file, target, preset.rules, rules, preset=name), key=lambda entry: entry[:3])
    score, _, _, found, preset_name = best
    if found == rules:
        return None
    return Suggestion(overrides=_overrides(found, rules, preset_name), share=score / total)


def _ranked(
    file: Shapes, target: Shapes, candidate: KeyRules, current: KeyRules, *, preset: str
) -> tuple[int, int, int, KeyRules, str]:
    changes = 3 if preset else (candidate.remove != current.remove) + (candidate.append != current.append)
    length = len(candidate.remove) + len(candidate.append)
    return _score(file, target, candidate), -changes, -length, candidate, preset


def _score(file: Shapes, target: Shapes, rules: KeyRules) -> int:
    """Parameters of the trunk that match in name and shape."""
    matches = {name for key, shape in file.items() if target.get(name := rules.apply(key)) == shape}
    return sum(_size(target[name]) for name in matches)


def _beginnings(keys: Sequence[str], *, least: float) -> list[str]:
    """Dotted beginnings ("module.", "module.encoder_q.") that this share of the keys have, the commonest first."""
    counts: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        counts.update(".".join(parts[:depth]) + "." for depth in range(1, min(len(parts), 5)))
    return [prefix for prefix, count in counts.most_common(40) if count >= least * len(keys)]


def _overrides(found: KeyRules, current: KeyRules, preset: str) -> tuple[str, ...]:
    """The command-line overrides that lead from the current rules to the found ones."""
    wanted = KeyRules() if preset else found
    changes = [f"{KEY}.PRESET={preset}"] if preset else []
    for name, value, now in (
        ("REMOVE_PREFIX", wanted.remove, current.remove),
        ("APPEND_PREFIX", wanted.append, current.append),
    ):
        if value != now:
            changes.append(f"{KEY}.{name}={value or repr('')}")
    return tuple(changes)
