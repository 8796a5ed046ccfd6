"""From overrides to a checked Job. All problems are found before anything starts, and reported together.

Every value that a recipe or the command line sets is looked up in the schema by its full key: unknown keys get the
nearest key as a suggestion, old names are translated (aliases.py). What is left is merged (compose.py), checked for
types and bounds, then for what fits together (rules.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from vissl_like.config import aliases, components, compose, reference, rules, schema
from vissl_like.config.recipes import KeyPath, Leaf, Library, Recipe, current_library, flatten, new_library
from vissl_like.config.schema import Job
from vissl_like.config.spelling import nearest
from vissl_like.config.stages import stage_jobs
from vissl_like.config.suggest import suggest_keys, suggest_recipe
from vissl_like.errors import ConfigError

_TARGET = (
    "`_target_` is not accepted. A configuration travels with checkpoints, so it must not name code to run. Components "
    "are chosen by NAME (`list losses`, `list trunks`, ...); modules in config.PLUGINS register your own."
)


@dataclass(frozen=True)
class Loaded:
    """A checked job and what it was made from. `notes` are warnings, one line each."""

    job: Job
    recipe: str | None
    presets: tuple[str, ...]
    overrides: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class _Findings:
    """What is found on the way: problems and notes, each once, and who set which key last."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    places: dict[KeyPath, str] = field(default_factory=dict)

    def problem(self, text: str, where: str = "") -> None:
        line = f"{where}: {text}" if where else text
        if line not in self.problems:
            self.problems.append(line)

    def note(self, text: str, where: str = "") -> None:
        line = f"{where}: {text}" if where else text
        if line not in self.notes:
            self.notes.append(line)

    def place(self, path: KeyPath) -> str:
        """Who set this key, or the nearest key above or below it that somebody set; "" for a default."""
        for length in range(len(path), 1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        below = [place for key, place in self.places.items() if key[: len(path)] == path]
        return below[-1] if below else ""


def load_job(overrides: Sequence[str], *, config_dirs: list[str] | None = None) -> Loaded:
    """The job that these overrides describe. Raises ConfigError with every problem of the configuration."""
    loaded, found = _load(overrides, new_library(config_dirs))
    if loaded is None:
        raise ConfigError(report(found.problems))
    return loaded


def load_sweep(overrides: Sequence[str], *, config_dirs: list[str] | None = None) -> list[Loaded]:
    """Every point of a sweep, all of them checked. A problem that all points share is reported once."""
    library = new_library(config_dirs)
    points = compose.expand_sweep(list(overrides), list(library.files))
    results = [_load(point, library) for point in points]
    problems: dict[str, list[int]] = {}
    for number, (_, found) in enumerate(results):
        for problem in found.problems:
            problems.setdefault(problem, []).append(number)
    if problems:
        raise ConfigError(report(at_points(problems, points)))
    return [loaded for loaded, _ in results if loaded is not None]


def at_points(problems: Mapping[str, Sequence[int]], points: Sequence[Sequence[str]]) -> list[str]:
    """Problems of a sweep's points (text -> numbers of the points), each with the overrides that those points share.

    One that all points have is named alone.
    """
    everywhere = set.intersection(*map(set, points))
    lines = []
    for problem, numbers in problems.items():
        first, *others = (points[number] for number in numbers)
        shared = [text for text in first if text not in everywhere and all(text in other for other in others)]
        which = f"points {', '.join(str(number + 1) for number in numbers[:8])}{', ...' * (len(numbers) > 8)}"
        where = f"{which if others else which.replace('points', 'point')} of the sweep"
        about = f"{where} ({' '.join(shared)})" if shared else where
        lines.append(problem if len(numbers) == len(points) else f"{about}: {problem}")
    return lines


def compose_stage(recipe: str | None, inherited: dict[str, Any], own: dict[str, Any], *, where: str) -> Job:
    """A recipe (or the defaults), `inherited` values of a checked job over it, then its `own`: a pipeline's stage."""
    named = [f"config={recipe}"] if recipe else []
    leaves = [Leaf(path, value, where) for path, value in flatten(own) if value != {}]
    loaded, found = _load(named, current_library(), between=inherited, own=leaves)
    if loaded is None:
        raise ConfigError(report(found.problems))
    return loaded.job


def report(problems: Sequence[str]) -> str:
    """Several problems as one text."""
    if len(problems) == 1:
        return problems[0]
    lines = "\n".join("  " + problem.replace("\n", "\n  ") for problem in problems)
    return f"{len(problems)} problems in the configuration:\n{lines}"


def _load(
    overrides: Sequence[str], library: Library, between: dict[str, Any] | None = None, own: Sequence[Leaf] = ()
) -> tuple[Loaded | None, _Findings]:
    found = _Findings()
    request = compose.parse(overrides)
    for key, text in request.problems:
        dotted = compose.dotted_indices(key)
        if not _is_known(dotted):
            _unknown(Leaf(tuple(dotted.split(".")), None, compose.COMMAND_LINE), found)
        found.problem(text, compose.COMMAND_LINE)
    recipe, presets = _known_recipes(request, library, found)
    order = _merge_order([*([recipe] if recipe else []), *presets], library, found)
    trees = {one.name: _tree(one, found) for one in order}
    given = accept([*own, *request.values], found)
    resets = [path for path in request.resets if _can_reset(path, found)]
    try:
        tree = compose.merge(trees, recipe=recipe, presets=presets)
        tree = compose.apply(tree, ((path, value) for path, value in flatten(between or {}) if value != {}))
        tree = compose.apply(tree, ((path, _default_of(path)) for path in resets))
        tree = compose.resolve(compose.apply(tree, given))
    except ConfigError as error:
        found.problem(str(error))
        return None, found
    job = _validated(tree, found)
    if job is not None:
        _check_contents(job, found)
    if found.problems or job is None:
        found.problems.sort(key=_place_in_file)
        return None, found
    return Loaded(job, recipe, tuple(presets), tuple(overrides), tuple(found.notes)), found


def _place_in_file(problem: str) -> tuple[str, int]:
    """Orders problems: those of the command line first, those of a file by line."""
    place = re.match(r"(\S+):(\d+): ", problem)
    return (place.group(1), int(place.group(2))) if place else ("", 0)


# ------------------------------------------------------------------------------------------------------------- recipes
def _known_recipes(request: compose.Request, library: Library, found: _Findings) -> tuple[str | None, list[str]]:
    recipe = request.recipe
    if recipe is not None and recipe not in library.files:
        found.problem(f"config={recipe}: no such recipe{suggest_recipe(recipe, library)}", compose.COMMAND_LINE)
        recipe = None
    presets = []
    for preset in request.presets:
        if preset in library.files:
            presets.append(preset)
            continue
        group, _, option = preset.rpartition("/")
        found.problem(
            f"+config/{group}={option}: no such preset{suggest_recipe(preset, library)}", compose.COMMAND_LINE
        )
    return recipe, presets


def _merge_order(names: Sequence[str], library: Library, found: _Findings) -> list[Recipe]:
    """The recipes involved, each after those that it builds on (or before, if its _self_ comes first)."""
    order: list[Recipe] = []

    def visit(name: str, chain: tuple[str, ...]) -> None:
        recipe = library.read(name)
        for problem in recipe.problems:
            found.problem(problem)
        before, after = ([recipe], []) if recipe.self_first else ([], [recipe])
        order.extend(before)
        for parent, place in recipe.parents:
            if parent in (*chain, name):
                found.problem(f"defaults: {name} builds on itself: {' -> '.join((*chain, name, parent))}.", place)
            elif parent not in library.files:
                found.problem(f"defaults: /config/{parent}: no such recipe{suggest_recipe(parent, library)}", place)
            else:
                visit(parent, (*chain, name))
        order.extend(after)

    for name in names:
        visit(name, ())
    return order


def _tree(recipe: Recipe, found: _Findings) -> dict[str, Any]:
    """A recipe with only known keys, as Hydra is to merge it."""
    known = {parent for parent, place in recipe.parents}
    tree: dict[str, Any] = compose.apply({}, accept(recipe.leaves, found, recipe))
    if known and not found.problems:
        parents = [f"/config/{parent}" for parent, _ in recipe.parents]
        tree["defaults"] = ["_self_", *parents] if recipe.self_first else [*parents, "_self_"]
    return tree


# ---------------------------------------------------------------------------------------------------------------- keys
def accept(leaves: Iterable[Leaf], found: _Findings, recipe: Recipe | None = None) -> list[tuple[KeyPath, Any]]:
    """(path, value) of every known key, old names translated. Problems and notes go into `found`."""
    direct: list[tuple[KeyPath, Any]] = []
    translated: list[tuple[KeyPath, Any]] = []
    unknown: dict[KeyPath, list[Leaf]] = {}
    for leaf in leaves:
        if "_target_" in leaf.path or _holds_target(leaf.value):
            found.problem(f"{leaf.key}: {_TARGET}", leaf.where)
            continue
        entry = reference.find(leaf.path)
        old = aliases.translate(leaf.path, compose.as_value(leaf.value)) if entry is None else None
        if entry is None and old is None:
            unknown.setdefault(_first_unknown(leaf.path), []).append(leaf)
            continue
        if entry is not None:
            old = aliases.translate_value(leaf.path, compose.as_value(leaf.value))
        if old is not None:
            translated += _translated(old, leaf, found)
        elif entry is not None and entry.is_section and not isinstance(leaf.value, dict):
            _section_as_value(entry, leaf, found)
        elif entry is not None and _check_elements(entry, leaf, found, recipe):
            direct.append((leaf.path, _as_typed(entry, leaf)))
            found.places[leaf.path] = leaf.where
    for group in unknown.values():
        _unknown(group[0], found, also=len(group) - 1)
    return translated + direct


def _translated(old: aliases.Translation, leaf: Leaf, found: _Findings) -> list[tuple[KeyPath, Any]]:
    if old.is_error:
        found.problem(old.note, leaf.where)
        return []
    if old.note:
        found.note(old.note, leaf.where)
    for path, _ in old.pairs:
        found.places[path] = leaf.where
    return [(path, _as_typed(reference.find(path), Leaf(path, value, leaf.where))) for path, value in old.pairs]


def _is_known(key: str) -> bool:
    path = tuple(key.split("."))
    is_group = key == "config" or key.startswith("config/") or path[0] == "hydra"
    return is_group or reference.find(path) is not None or aliases.translate(path, None) is not None


def _first_unknown(path: KeyPath) -> KeyPath:
    for length in range(1, len(path)):
        if reference.find(path[:length]) is None:
            return path[:length]
    return path


def _holds_target(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(map(_holds_target, value.values()))
    return isinstance(value, list) and any(map(_holds_target, value))


def _section_as_value(entry: reference.Entry, leaf: Leaf, found: _Findings) -> None:
    if leaf.value in (None, {}) and entry.nullable:
        found.places[leaf.path] = leaf.where
        return
    keys = ", ".join(option.key.rpartition(".")[2] for option in reference.options_of(entry.key)[:6])
    value = compose.as_value(leaf.value)
    found.problem(f"{leaf.key}={value!r}: this is a section, not a value. Set one of its keys: {keys}, ...", leaf.where)


def _check_elements(entry: reference.Entry, leaf: Leaf, found: _Findings, recipe: Recipe | None) -> bool:
    """Whether the keys inside list elements are known, where the schema knows them."""
    sections = _element_section(entry)
    if sections is None or not isinstance(leaf.value, list):
        return True
    good = True
    for number, element in enumerate(leaf.value):
        for path, _ in flatten(element, ()) if isinstance(element, dict) else ():
            if reference.find((*sections, *path)) is not None or "_target_" in path:
                continue
            full = (*leaf.path, str(number), *path)
            line = recipe.lines.get(full) if recipe else None
            where = f"{recipe.file}:{line}" if recipe and line else leaf.where
            _unknown(Leaf(full, None, where), found, inside=(sections, (*leaf.path, str(number))))
            good = False
    return good


def _element_section(entry: reference.Entry) -> KeyPath | None:
    """The section that this list's elements are: their own, or for children of a composite schedule the schedule."""
    if f"{entry.key}.{reference.ELEMENT}" in reference.entries():
        return (*entry.path, "0")
    return entry.path[:-1] if entry.path[-1] == "SCHEDULERS" else None


def _unknown(leaf: Leaf, found: _Findings, also: int = 0, inside: tuple[KeyPath, KeyPath] | None = None) -> None:
    """Report an unknown key with the nearest known ones, the best first."""
    typed: KeyPath = leaf.path
    prefix: KeyPath = ()
    if inside is not None:  # children of a composite schedule look like the schedule itself
        section, prefix = inside
        typed = (*section, *leaf.path[len(prefix) :])
    near = list(suggest_keys(typed))
    if inside is not None:
        near = [
            ".".join((*prefix, *key.split(".")[len(inside[0]) :]))
            for key in near
            if key.startswith(".".join(inside[0]))
        ]
    more = f" ({also} more key{'s' * (also > 1)} below {'.'.join(_first_unknown(leaf.path))})" if also else ""
    if near:
        found.problem(f"unknown key {leaf.key}; did you mean {' or '.join(near)}?{more}", leaf.where)
        return
    above = _first_unknown(leaf.path)[:-1]
    known = ".".join(above) if above and reference.find(above) else "config"
    found.problem(f"unknown key {leaf.key}. `options {known}` lists the keys of {known}.{more}", leaf.where)


def _can_reset(path: KeyPath, found: _Findings) -> bool:
    if reference.find(path) is None:
        _unknown(Leaf(path, None, compose.COMMAND_LINE), found)
        return False
    found.places[path] = compose.COMMAND_LINE
    return True


def _default_of(path: KeyPath) -> Any:
    node: Any = schema.defaults()
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return node


# --------------------------------------------------------------------------------------------------------------- types
def _as_typed(entry: reference.Entry | None, leaf: Leaf) -> Any:
    """The value as the option wants it: unquoted numbers are text where text is wanted, numbers elsewhere."""
    is_whole = entry is not None and len(entry.path) == len(leaf.path)
    wanted = _kinds(entry.annotation) if entry is not None and is_whole else set()
    if str in wanted and not isinstance(leaf.value, list):
        return str(leaf.value) if type(leaf.value) is int else compose.as_text(leaf.value)
    if list[str] in wanted and isinstance(leaf.value, list):
        return [str(item) if type(item) is int else item for item in leaf.value]
    return compose.as_value(leaf.value)


def _kinds(annotation: Any) -> set[Any]:
    return {annotation, *(() if get_origin(annotation) in (list, dict, tuple) else get_args(annotation))}


def _validated(tree: dict[str, Any], found: _Findings) -> Job | None:
    """The tree as a Job; problems of type and bounds go into `found`, and defaults stand in for the wrong values."""
    wrong = set(_misfits(tree, found))
    try:
        job = Job.model_validate(tree)
    except ValidationError as error:
        for key in dict.fromkeys(_schema_part(tuple(map(str, one["loc"]))) for one in error.errors()):
            if key not in wrong:
                wrong.add(key)
                _type_problem(key, tree, found)
        whole = {entry.path for entry in map(reference.find, wrong) if entry is not None}
        repaired = compose.apply(tree, ((path, _default_of(path)) for path in whole if "*" not in path))
        try:
            return Job.model_validate(repaired)
        except ValidationError:
            return None
    return job


def _misfits(tree: dict[str, Any], found: _Findings) -> list[KeyPath]:
    """Truth values given as numbers and numbers that are none: what pydantic lets pass."""
    wrong = []
    for path, value in flatten(tree):
        entry = reference.find(path)
        kinds = _kinds(entry.annotation) if entry is not None else set()
        is_number = bool(kinds & {int, float}) and bool not in kinds
        if is_number and (isinstance(value, bool) or (isinstance(value, float) and math.isnan(value))):
            _type_problem(path, tree, found)
            wrong.append(path)
    return wrong


def _schema_part(path: KeyPath) -> KeyPath:
    """The longest leading part of a pydantic location that is a key of ours, with list indices."""
    for length in range(len(path), 0, -1):
        if reference.find(path[:length]) is not None:
            return path[:length]
    return path


def _type_problem(path: KeyPath, tree: dict[str, Any], found: _Findings) -> None:
    entry = reference.find(path)
    value = _value_at(tree, path)
    key = ".".join(path)
    if entry is None:
        found.problem(f"{key}={value!r} does not fit the schema.", found.place(path))
        return
    if entry.is_section:
        found.problem(f"{key}={value!r}: must be a section (a mapping of its keys).", found.place(path))
        return
    is_element = len(path) > len(entry.path)
    allowed = f"an element of {entry.allowed}" if is_element else entry.allowed
    if is_element and entry.choices:
        allowed = f"one of {', '.join(map(str, entry.choices))}"
    near = nearest(str(value), map(str, entry.choices)) if isinstance(value, str) and entry.choices else []
    hint = f"; did you mean {near[0]}?" if near else "."
    if value is None:
        hint = ". Leave it out for the default" + (f" {entry.default!r}." if entry.default != "" else ".")
    elif entry.allowed.startswith("a list") and not is_element and isinstance(value, str | int | float):
        hint = f"; write [{value}]."
    elif entry.type == "text":
        hint = "; put it in quotes." if isinstance(value, bool | int | float) else "."
    found.problem(f"{key}={value!r}: must be {allowed}{hint}", found.place(path))


def _value_at(tree: Any, path: KeyPath) -> Any:
    for part in path:
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return None
    return tree


# ------------------------------------------------------------------------------------------------------------ contents
def _check_stages(job: Job, found: _Findings) -> None:
    try:
        stage_jobs(job, Path(job.config.RUN.DIR or "run"), compose_stage)
    except ConfigError as error:
        found.problem(str(error), found.place(("config", "PIPELINE", "STAGES")))


def _check_contents(job: Job, found: _Findings) -> None:
    """Names of components always; what fits together only if there is no other problem that could be the cause."""
    try:
        components.load_plugins(job.config.PLUGINS)
    except ConfigError as error:
        found.problem(str(error), found.place(("config", "PLUGINS")))
        return
    for key, text in rules.name_problems(job):
        found.problem(text, found.place(tuple(key.split("."))))
    if found.problems:
        return
    for key, text in rules.fit_problems(job):
        found.problem(text, found.place(tuple(key.split("."))))
    if job.engine_name == "pipeline":
        _check_stages(job, found)
    for key, text in rules.remarks(job):
        found.note(text, found.place(tuple(key.split("."))))
