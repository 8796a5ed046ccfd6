"""Overrides and recipes become one plain tree. Everything that touches Hydra and OmegaConf stands in this file.

Hydra reads the override grammar, expands sweeps, resolves which recipe and presets come in which order, and merges them
over the schema's defaults (the base node of its ConfigStore). Dotted overrides are applied last. Nothing is checked
against the schema here: that is check.py, which hands over recipes that have been cleaned.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vissl_like.config import schema
from vissl_like.config.recipes import KeyPath, Leaf, flatten, packaged_configs
from vissl_like.errors import ConfigError

COMMAND_LINE = "command line"

_INDEX = re.compile(r"\[(\d+)\]")
_PLAIN = re.compile(r"[\w./:@%+$?*~-]+")


@dataclass(frozen=True)
class Request:
    """What the overrides ask for: a recipe, presets in order, values in order, keys to reset to their defaults."""

    recipe: str | None = None
    presets: tuple[str, ...] = ()
    values: tuple[Leaf, ...] = ()
    resets: tuple[KeyPath, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()
    """(key as typed, what is wrong with the override)."""


@dataclass(frozen=True)
class Parsed:
    """One override: `kind` is recipe, preset, value, reset, ignored or wrong (then `value` is the problem)."""

    kind: str
    key: str
    value: Any = None


def parse(overrides: Iterable[str]) -> Request:
    """Read `key=value` overrides. Problems of the grammar are collected, not raised."""
    recipe: str | None = None
    presets: list[str] = []
    values: list[Leaf] = []
    resets: list[KeyPath] = []
    problems: list[tuple[str, str]] = []
    for one in (parse_one(text) for text in overrides):
        if one.kind == "recipe":
            if recipe is not None and recipe != one.value:
                problems.append(("config", f"config= is given twice ({recipe}, {one.value}); presets are +config/...="))
            recipe = one.value
        elif one.kind == "preset":
            presets += one.value
        elif one.kind == "value":
            values += _leaves(one)
        elif one.kind == "reset":
            resets.append(tuple(one.key.split(".")))
        elif one.kind == "wrong":
            problems.append((one.key, one.value))
    return Request(recipe, tuple(presets), tuple(values), tuple(resets), tuple(problems))


def _leaves(one: Parsed) -> list[Leaf]:
    path = tuple(one.key.split("."))
    if isinstance(one.value, dict) and one.value:
        return [Leaf(inner, value, COMMAND_LINE) for inner, value in flatten(one.value, path)]
    return [Leaf(path, one.value, COMMAND_LINE)]


def parse_one(text: str) -> Parsed:
    """One override, by Hydra's grammar."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        return Parsed("wrong", text.partition("=")[0].lstrip("+~"), _grammar_problem(text, error))
    key = override.key_or_group
    if override.is_sweep_override():
        return Parsed("wrong", key, _comma_problem(text))
    if override.package:
        return Parsed("wrong", key, f"{text!r}: packages (@) are not used here; recipes are global.")
    value = override.value()
    if key == "config" and not isinstance(value, dict):
        return Parsed("recipe", key, _recipe_name(value)) if value else Parsed("ignored", key)
    if key.startswith("config/"):
        options = value if isinstance(value, list) else [value]
        names = [f"{key.removeprefix('config/')}/{_recipe_name(option)}" for option in options]
        return Parsed("preset", key, names)
    if key.split(".")[0] == "hydra":
        return _hydra_habit(key, text)
    if key.split(".")[0] in schema.Config.model_fields:
        key = f"config.{key}"  # the root holds nothing of these names, so there is no doubt what is meant
    if override.is_delete():
        return Parsed("reset", key)
    return Parsed("value", key, _keep_text(value, text))


def _recipe_name(value: Any) -> str:
    return str(value).removeprefix("config/").removesuffix(".yaml").removesuffix(".yml").strip("/")


class _Number(str):
    """The text of an unquoted number or truth value, so that an option that wants text gets it as it was typed."""

    value: Any


def _keep_text(value: Any, text: str) -> Any:
    if isinstance(value, bool | int | float):
        typed = _Number(text.split("=", 1)[1])
        typed.value = value
        return typed
    return value


def as_text(value: Any) -> Any:
    """A number from the command line as it was typed; anything else as it is."""
    return str(value) if isinstance(value, _Number) else value


def as_value(value: Any) -> Any:
    """A number from the command line as a number; anything else as it is."""
    return value.value if isinstance(value, _Number) else value


def _hydra_habit(key: str, text: str) -> Parsed:
    if key == "hydra.verbose":
        return Parsed("ignored", key)
    return Parsed("wrong", key, f"{text!r}: Hydra's own options are not used. The run folder is config.RUN.DIR.")


def _grammar_problem(text: str, error: HydraException) -> str:
    """Hydra's message with a caret below the place, and a form that works."""
    cause = error.__cause__
    place = getattr(cause, "startIndex", None)
    token = getattr(cause, "offendingToken", None)
    if place is None:
        place = token.start if token is not None else text.find("=") + 1
    what = str(error).strip().splitlines()[0].removeprefix("HydraException while evaluating ")
    advice = _quoting_advice(text)
    caret = f"    {text}\n    {'^'.rjust(min(place, len(text)) + 1)}"
    return f"{text!r} cannot be read: {what}\n{caret}" + (f"\n    {advice}" if advice else "")


def _quoting_advice(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        return "An override is key=value, for example config=pretrain/rotnet/rotnet_mnist5k or config.SEED_VALUE=1."
    if _INDEX.search(key):
        return f"List elements are reached by a dot: {dotted_indices(key)}={value}"
    quoted = f"{key}={_quoted(value)}"
    try:
        OverridesParser.create().parse_override(quoted)
    except HydraException:
        return "Values with = , ( ) { } [ ] or other special characters need quotes inside the quotes of the shell."
    return f"Quote what is special, and the whole for the shell: {shell_quoted(quoted)}"


def dotted_indices(key: str) -> str:
    """`A.B.0` for `A.B[0]`."""
    return _INDEX.sub(r".\1", key)


def _quoted(value: str) -> str:
    if value.startswith("[") and value.endswith("]"):
        parts = [part.strip() for part in value[1:-1].split(",")]
        return "[" + ",".join(part if _PLAIN.fullmatch(part) else f"'{part}'" for part in parts) + "]"
    return "'" + value.replace("'", "\\'") + "'"


def text_override(key: str, value: str) -> str:
    """The override that sets an option to this text, whatever characters it holds."""
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def shell_quoted(text: str) -> str:
    """`text` in double quotes for the shell."""
    escaped = re.sub(r'([\\"$`])', r"\\\1", text)
    return f'"{escaped}"'


def _comma_problem(text: str) -> str:
    key, _, value = text.partition("=")
    one_text, one_list = shell_quoted(f"{key}='{value}'"), shell_quoted(f"{key}=[{value}]")
    return f"{text!r} is a sweep: add -m to run each value. As one text: {one_text}; as a list: {one_list}"


class _GlobTarget:
    """What Hydra's sweeper asks for the options of a group when it meets glob(...)."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def get_group_options(self, group_name: str, results_filter: ObjectType | None = None, **_: Any) -> list[str]:
        prefix = "" if group_name == "config" else group_name.removeprefix("config/") + "/"
        return [name.removeprefix(prefix) for name in self.names if name.startswith(prefix)]


def expand_sweep(overrides: list[str], recipe_names: list[str]) -> list[list[str]]:
    """Every point of a sweep as plain overrides: the grid over all comma lists, choice(), range() and glob()."""
    parsed: list[Override] = []
    problems: list[str] = []
    parser = OverridesParser.create(config_loader=_GlobTarget(recipe_names))  # type: ignore[arg-type]
    for text in overrides:
        try:
            override = parser.parse_override(text)
            override.config_loader = parser.config_loader
            parsed.append(override)
        except HydraException as error:
            problems.append(f"{COMMAND_LINE}: {_grammar_problem(text, error)}")
    if problems:
        raise ConfigError("\n".join(problems))
    fixed = {id(override): override.input_line for override in parsed if not override.is_sweep_override()}
    swept = [override for override in parsed if id(override) not in fixed]
    try:
        grid = BasicSweeper.split_arguments(swept, None)[0]
    except HydraException as error:
        raise ConfigError(f"-m: {error}. Use a comma list, choice(...), range(...) or glob(...).") from None
    if not grid:
        raise ConfigError(f"{COMMAND_LINE}: -m: the sweep has no point; glob(...) matched no recipe.")
    twice = next((point for number, point in enumerate(grid) if point in grid[:number]), None)
    if twice is not None:
        raise ConfigError(f"{COMMAND_LINE}: -m: {' '.join(twice)} is there twice; give each value once.")
    return [[text for text in fixed.values() if text is not None] + list(point) for point in grid]


#: Results of merge() by what went into it: points of a sweep and stages of a pipeline share them.
_merged: dict[tuple[str, ...], dict[str, Any]] = {}


def merge(trees: dict[str, dict[str, Any]], *, recipe: str | None, presets: Sequence[str]) -> dict[str, Any]:
    """The defaults, the recipe with what it builds on, then the presets, merged by Hydra; lists are replaced whole.

    `trees` holds every recipe involved by name: {"defaults": [...], "engine_name": ..., "config": {...}}. The result is
    not to be changed.
    """
    key = (recipe or "", *presets, repr(trees))
    if key not in _merged:
        _merged[key] = _merge(trees, recipe, presets)
    return _merged[key]


def _merge(trees: dict[str, dict[str, Any]], recipe: str | None, presets: Sequence[str]) -> dict[str, Any]:
    wanted = [f"config={_hydra_name(recipe)}"] if recipe else []
    # Hydra takes one option of a group only; each preset gets a group of its own, so that any may be combined.
    wanted += [f"+preset_{number}=chosen" for number in range(len(presets))]
    try:
        with _stored(trees, presets), initialize(version_base="1.3", config_path=None):
            composed = hydra_compose("primary", overrides=wanted)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join([recipe or '', *presets])}: these do not go together: {error}") from error
    result = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(result, dict)
    return {str(key): value for key, value in result.items()}


@contextmanager
def _stored(trees: dict[str, dict[str, Any]], presets: Sequence[str]) -> Iterator[None]:
    """Hydra's store with these recipes, for one merge: Hydra copies all that is stored each time it composes."""
    store = ConfigStore.instance()
    kept = store.repo
    store.repo = {name: node for name, node in kept.items() if name != "config"}
    try:
        store.store(name="schema", node=schema.defaults(), package="_global_")
        store.store(
            name="primary", node=yaml.safe_load((packaged_configs() / "defaults.yaml").read_text(encoding="utf-8"))
        )
        for name, tree in trees.items():
            group, _, option = f"config/{name}".rpartition("/")
            store.store(group=group, name=option, node=tree, package="_global_")
        for number, preset in enumerate(presets):
            store.store(group=f"preset_{number}", name="chosen", node=trees[preset], package="_global_")
        yield
    finally:
        store.repo = kept


def _hydra_name(name: str) -> str:
    return name if re.fullmatch(r"[\w./-]+", name) else f"'{name}'"


def apply(tree: dict[str, Any], pairs: Iterable[tuple[KeyPath, Any]]) -> dict[str, Any]:
    """A copy of the tree with these values set; a number in a path is the index of a list element.

    Raises ConfigError for an index that does not exist.
    """
    result = copy.deepcopy(tree)
    for path, value in pairs:
        _set(result, path, value)
    return result


def _set(tree: dict[str, Any], path: KeyPath, value: Any) -> None:
    node: Any = tree
    for depth, part in enumerate(path[:-1]):
        if isinstance(node, list):
            node = node[_index(node, part, path[: depth + 1])]
            continue
        if not isinstance(node.get(part), dict | list):
            node[part] = {}
        node = node[part]
    if isinstance(node, list):
        node[_index(node, path[-1], path)] = value
    elif isinstance(node, dict):
        node[path[-1]] = value
    else:
        raise ConfigError(f"{'.'.join(path)}: {'.'.join(path[:-1])} is {node!r} and has no keys.")


def _index(items: list[Any], part: str, path: KeyPath) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    count = f"{len(items)} element{'s' * (len(items) != 1)}"
    raise ConfigError(f"{'.'.join(path)}: the list has {count}, counted from 0; to lengthen it, give the whole list.")


def resolve(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with ${...} references replaced by what they refer to."""
    if "${" not in repr(tree):
        return tree
    try:
        result = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"a reference ${{...}} cannot be resolved: {str(error).splitlines()[0]}.") from None
    assert isinstance(result, dict)
    return {str(key): value for key, value in result.items()}
