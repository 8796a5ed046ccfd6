"""How names of a weights file become names of a model: renames, REMOVE_PREFIX, APPEND_PREFIX, base_model: so ordered.

Free of torch. Named rule sets stand in weight_presets.yaml beside this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from vissl_like.config.schema_model import WeightsInit
from vissl_like.errors import ConfigError
from vissl_like.registry import suggest

KEY = "config.MODEL.WEIGHTS_INIT"
PRESET_FILE = Path(__file__).parent / "weight_presets.yaml"
TRUNK, HEADS = "trunk.", "heads."
BLOCKS = "trunk._feature_blocks."


@dataclass(frozen=True)
class KeyRules:
    """One way of renaming; `apply` gives the model's name for a name of the file."""

    renames: tuple[tuple[str, str], ...] = ()
    remove: str = ""
    append: str = ""

    def rename(self, key: str) -> str:
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key

    def strip(self, key: str) -> tuple[str, bool]:
        """Renames, then REMOVE_PREFIX (at the beginning, once); and whether the renames gave a model's name."""
        renamed = self.rename(key)
        if renamed != key and renamed.startswith((TRUNK, HEADS)):
            return renamed, True
        return renamed.removeprefix(self.remove), False

    def apply(self, key: str) -> str:
        """The canonical model name for a name of the file. APPEND_PREFIX goes before all names but completed ones."""
        name, complete = self.strip(key)
        return canonical(name if complete else self.append + name)


def canonical(key: str) -> str:
    """`trunk.base_model.` and `trunk.` are the same place; applying this twice changes nothing.

    VISSL models of the feature-extractor mode had base_model in their names, ours never do. Both documented prefixes
    (`trunk.base_model._feature_blocks.`, `trunk._feature_blocks.`) therefore work in both modes.
    """
    while True:
        shorter = key.replace("trunk.base_model.", TRUNK)
        if shorter == key:
            return key
        key = shorter


@dataclass(frozen=True)
class Preset:
    """A named rule set: what a published family of files needs."""

    name: str
    doc: str
    rules: KeyRules
    state_dict_key: str | None = None
    #: Patterns of tensors that hold several of the model's, and what the pattern becomes in the name of each.
    divisions: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def parts_of(self, key: str) -> list[str]:
        """Names of the equal parts, along the first axis, of a tensor of the file; of most the tensor itself."""
        for pattern, replacements in self.divisions:
            if re.search(pattern, key):
                return [re.sub(pattern, replacement, key) for replacement in replacements]
        return [key]


@lru_cache(maxsize=1)
def presets() -> dict[str, Preset]:
    """All presets by name."""
    tables: Mapping[str, Any] = yaml.safe_load(PRESET_FILE.read_text(encoding="utf-8"))
    return {name: _preset(name, table) for name, table in tables.items()}


def _preset(name: str, table: Mapping[str, Any]) -> Preset:
    rules = KeyRules(
        renames=tuple((pattern, replacement) for pattern, replacement in table.get("rename", [])),
        remove=table.get("remove_prefix", ""),
        append=table.get("append_prefix", ""),
    )
    divisions = tuple((pattern, tuple(names)) for pattern, names in table.get("divide", []))
    return Preset(
        name=name, doc=table["doc"], rules=rules, state_dict_key=table.get("state_dict_key"), divisions=divisions
    )


def preset_names() -> list[str]:
    """Names for `list weight_presets`."""
    return sorted(presets())


def find_preset(name: str) -> Preset | None:
    """The preset of this name, None for the empty name; ConfigError for an unknown one."""
    if not name:
        return None
    known = presets()
    if name not in known:
        hint = suggest(name, sorted(known)) or "."
        raise ConfigError(f"{KEY}.PRESET={name!r}: no such rule set{hint} Known: {', '.join(sorted(known))}.")
    return known[name]


def rules_of(options: WeightsInit, *, default_append: str = "") -> KeyRules:
    """The rules of a WEIGHTS_INIT section: the preset's renames, then RENAME; its prefixes win over the preset's.

    default_append is used if neither the section nor a preset says anything about names.
    """
    preset = find_preset(options.PRESET)
    own = tuple((_compiles(rule.PATTERN, index), rule.REPLACE) for index, rule in enumerate(options.RENAME))
    rules = preset.rules if preset else KeyRules()
    rules = replace(
        rules,
        renames=rules.renames + own,
        remove=options.REMOVE_PREFIX or rules.remove,
        append=options.APPEND_PREFIX or rules.append,
    )
    return replace(rules, append=default_append) if rules == KeyRules() else rules


def _compiles(pattern: str, index: int) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{KEY}.RENAME[{index}].PATTERN={pattern!r}: not a regular expression ({error}).") from error
    return pattern


def state_dict_key(options: WeightsInit) -> str | list[str]:
    """STATE_DICT_KEY_NAME; where it is left at auto, the preset's."""
    preset = find_preset(options.PRESET)
    if options.STATE_DICT_KEY_NAME == "auto" and preset and preset.state_dict_key is not None:
        return preset.state_dict_key
    return options.STATE_DICT_KEY_NAME
