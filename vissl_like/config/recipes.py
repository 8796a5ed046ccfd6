"""Recipe files: where they are looked for, and what stands on which line. Free of Hydra.

A recipe is a YAML file below a folder `config/`. It starts with `# @package _global_` and has the root key `config:`,
and optionally `engine_name:`. It may build on others, in exactly this form (the order is the order of merging):

    defaults:
      - /config/pretrain/rotnet/rotnet_8gpu_resnet
      - _self_
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vissl_like.errors import ConfigError

KeyPath = tuple[str, ...]

_HEADER = re.compile(r"#\s*@package\s+(\S+)")


@dataclass(frozen=True)
class Leaf:
    """One value that somebody set. `path` is full: ("config", "OPTIMIZER", "NUM_EPOCHS"); `where` says who."""

    path: KeyPath
    value: Any
    where: str

    @property
    def key(self) -> str:
        """The dotted key."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Recipe:
    """One file, read. `parents` are names of recipes that it builds on, each with its line."""

    name: str
    file: str
    leaves: tuple[Leaf, ...] = ()
    parents: tuple[tuple[str, str], ...] = ()
    self_first: bool = False
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """Line of every key, also of those inside lists."""
    problems: tuple[str, ...] = ()


class Library:
    """All recipes that can be named: those of --config-dir, of ./configs, and the package's own, in this order."""

    def __init__(self, config_dirs: list[str] | None = None) -> None:
        self.folders = _folders(config_dirs or [])
        self._files: dict[str, Path] | None = None
        self._read: dict[str, Recipe] = {}

    @property
    def files(self) -> dict[str, Path]:
        """File of each recipe name (`pretrain/rotnet/rotnet_8gpu_resnet`), sorted by name."""
        if self._files is None:
            found: dict[str, Path] = {}
            for folder in self.folders:
                for name, file in _yaml_files(folder):
                    found.setdefault(name, file)
            self._files = dict(sorted(found.items()))
        return self._files

    def read(self, name: str) -> Recipe:
        """The recipe of this name, read once."""
        if name not in self._read:
            self._read[name] = read_recipe(name, self.files[name])
        return self._read[name]

    def description(self, name: str) -> str:
        """First comment line of a recipe, without the header."""
        with open(self.files[name], encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.startswith("#"):
                    return ""
                if not _HEADER.match(line) and line.strip("# \n"):
                    return line.strip("# \n")
        return ""


_current: list[Library] = []


def new_library(config_dirs: list[str] | None = None) -> Library:
    """A library that sees what lies in these folders now; stages of a pipeline are looked up in the newest one."""
    _current[:] = [Library(config_dirs)]
    return _current[0]


def current_library() -> Library:
    """The newest library, so that a pipeline's stages find recipes where the pipeline itself was found."""
    return _current[0] if _current else new_library()


def packaged_configs() -> Path:
    """The folder `configs` of the package: installed as vissl_like.configs, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _folders(config_dirs: list[str]) -> list[Path]:
    folders: list[Path] = []
    for text in config_dirs:
        folder = Path(text).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {text!r}: no such folder{_near_folder(folder)}.")
        folders.append(folder / "config" if (folder / "config").is_dir() else folder)
    for folder in (Path.cwd() / "configs" / "config", packaged_configs() / "config"):
        if folder.is_dir() and not any(folder.samefile(other) for other in folders):
            folders.append(folder)
    return folders


def _near_folder(folder: Path) -> str:
    siblings = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, siblings, n=1)
    return f"; did you mean {str(folder.parent / near[0])!r}?" if near else ""


def _yaml_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for above, subfolders, files in os.walk(folder, followlinks=True):
        subfolders.sort()
        for file in sorted(files):
            if file.endswith((".yaml", ".yml")):
                path = Path(above, file)
                yield path.relative_to(folder).with_suffix("").as_posix(), path


def shown(file: Path) -> str:
    """A file's path as the user would type it."""
    try:
        return file.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(file)


class _Loader(yaml.SafeLoader):
    """YAML as OmegaConf reads it: 1e-3 is a number, dates are text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)|\.[0-9_]+(?:[eE][-+][0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def read_recipe(name: str, file: Path) -> Recipe:
    """Read one recipe. What is wrong with the file as such is in `problems`, each with its line."""
    display = shown(file)
    try:
        text = file.read_text(encoding="utf-8")
        loader = _Loader(text)
        root = loader.get_single_node()
        reader = _Reader(loader, display)
        tree = reader.build(root, ()) if root is not None else {}
    except (OSError, UnicodeDecodeError) as error:
        return Recipe(name, display, problems=(f"{display}: cannot be read ({error}).",))
    except (yaml.YAMLError, RecursionError) as error:
        return Recipe(name, display, problems=(_yaml_problem(display, error),))
    problems = list(reader.problems)
    header = _HEADER.match(text)
    if header and header.group(1) != "_global_":
        problems.append(f"{display}:1: '@package {header.group(1)}' must be '@package _global_' (root key config:).")
    if not isinstance(tree, dict):
        return Recipe(name, display, problems=(*problems, f"{display}:1: must be a mapping with the key config:."))
    parents, self_first = _parents(tree.pop("defaults", None), display, reader.lines, problems)
    leaves = tuple(
        Leaf(path, value, f"{display}:{reader.lines.get(path, 1)}")
        for path, value in flatten(tree)
        if (path, value) != (("config",), None)  # an empty page sets nothing
    )
    return Recipe(name, display, leaves, parents, self_first, reader.lines, tuple(problems))


class _Reader:
    """Builds plain values from YAML nodes and remembers the line of every key."""

    def __init__(self, loader: _Loader, display: str) -> None:
        self.loader, self.display = loader, display
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[str] = []

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, str(i))) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return self.loader.construct_object(node)
        merged = any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value)
        self.loader.flatten_mapping(node)
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.loader.construct_object(key_node, deep=True)
            here = (*path, str(key))
            line = key_node.start_mark.line + 1
            if key in result and not merged:
                first = self.lines[here]
                self.problems.append(f"{self.display}:{line}: {'.'.join(here)} stands twice (first in line {first}).")
            self.lines[here] = line
            result[key] = self.build(value_node, here)
        return result


def _parents(
    given: Any, display: str, lines: dict[KeyPath, int], problems: list[str]
) -> tuple[tuple[tuple[str, str], ...], bool]:
    """(name, place) of each recipe in a `defaults:` list, and whether _self_ comes before them."""
    if given is None:
        return (), False
    place = f"{display}:{lines.get(('defaults',), 1)}"
    form = "each entry is `- /config/<recipe>` or `- _self_`"
    if not isinstance(given, list):
        problems.append(f"{place}: defaults must be a list; {form}.")
        return (), False
    names: list[tuple[str, str]] = []
    for entry in given:
        if isinstance(entry, str) and entry.startswith("/config/"):
            names.append((entry.removeprefix("/config/").removesuffix(".yaml"), place))
        elif entry != "_self_":
            problems.append(f"{place}: defaults: {entry!r} is not understood; {form}.")
    self_first = "_self_" in given and given.index("_self_") == 0 and bool(names)
    if "_self_" in given and 0 < given.index("_self_") < len(given) - 1:
        problems.append(f"{place}: defaults: put _self_ first or last.")
    return tuple(names), self_first


def flatten(tree: dict[Any, Any], above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """(path, value) of everything below; mappings are opened, lists and empty mappings are values."""
    for key, value in tree.items():
        path = (*above, str(key))
        if isinstance(value, dict) and value:
            yield from flatten(value, path)
        else:
            yield path, value


def _yaml_problem(display: str, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"{display}: an anchor contains itself."
    mark = getattr(error, "problem_mark", None)
    place = f"{display}:{mark.line + 1}:{mark.column + 1}" if mark else display
    what = getattr(error, "problem", None) or str(error)
    snippet = mark.get_snippet(indent=4, max_length=100) if mark else None
    return f"{place}: not valid YAML: {what}." + (f"\n{snippet}" if snippet else "")
