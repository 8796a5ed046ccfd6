"""What components exist, by kind and name, with their one-line descriptions, read from source text: no torch needed."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from vissl_like import registry
from vissl_like.config.spelling import nearest
from vissl_like.errors import ConfigError

#: Word of `list WORD` -> kind of the registry.
KINDS = {
    "engines": "engine",
    "losses": "loss",
    "trunks": "trunk",
    "models": "trunk",
    "model_kinds": "model",
    "heads": "head",
    "optimizers": "optimizer",
    "tasks": "task",
    "data_sources": "data_source",
    "schedules": "schedule",
}
#: What `list` knows.
LISTS = ("recipes", *KINDS, "transforms", "weight_presets")

#: Trunks and optimizers of libraries: NAME=<prefix>/<name of the library>.
LIBRARIES = {"trunk": ("torchvision", "timm", "hf"), "optimizer": ("timm",)}


def load_plugins(modules: list[str]) -> None:
    """Import the modules of config.PLUGINS, which may lie in the working directory. Raises ConfigError if one fails."""
    if modules and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for module in modules:
        try:
            registry.load_plugins([module])
        except ConfigError:
            raise
        except Exception as error:  # a plugin is foreign code; importing it may raise anything
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = (
                f"{error.filename}:{error.lineno}"
                if isinstance(error, SyntaxError)
                else f"{last.filename}:{last.lineno}"
            )
            what = error.msg if isinstance(error, SyntaxError) else error
            raise ConfigError(
                f"config.PLUGINS: importing {module!r} failed: {type(error).__name__}: {what} ({place})."
            ) from error


def problem(kind: str, name: str, key: str, known: Iterable[str] | None = None) -> str | None:
    """What is wrong with this component name under this key, or None."""
    names = sorted(known if known is not None else registry.names(kind))
    library, _, inner = name.partition("/")
    if name in names or (inner and library in LIBRARIES.get(kind, ())):
        return None
    near = nearest(name, names)
    hint = f"; did you mean {near[0]}?" if near else "."
    others = "".join(f", {other}/NAME" for other in LIBRARIES.get(kind, ()))
    shown = f" Known: {', '.join(names)}{others}." if len(names) <= 20 else ""
    return f"{key}={name!r}: no such {kind.replace('_', ' ')}{hint}{shown}"


def listing(word: str) -> dict[str, str]:
    """Name -> one-line description of everything that `list WORD` shows, except recipes."""
    if word == "transforms":
        return dict.fromkeys(transform_names(), "")
    if word == "weight_presets":
        from vissl_like.core.weights_rules import presets

        return {name: preset.doc for name, preset in sorted(presets().items())}
    kind = KINDS[word]
    found = {name: description(registry.COMPONENTS[kind][name]) for name in registry.names(kind)}
    for library in LIBRARIES.get(kind, ()):
        found[f"{library}/NAME"] = f"Any {kind} of {'transformers' if library == 'hf' else library} by its name."
    return found


@lru_cache(maxsize=1)
def transform_names() -> tuple[str, ...]:
    """Our own transforms and those of torchvision.transforms.v2, sorted."""
    own, refused = (
        _literal_keys("vissl_like.data.transforms", "OWN_TRANSFORMS"),
        _literal_keys("vissl_like.data.views", "_NOT_OFFERED"),
    )
    return tuple(sorted({*own, *(_torchvision_names() - set(refused))}))


def knows_torchvision() -> bool:
    """Whether the names of torchvision's transforms could be read; if not, the run itself has to judge names."""
    return bool(_torchvision_names())


def description(target: str) -> str:
    """First line of the docstring of "module:attribute", from its source; "" for other libraries."""
    module, _, attribute = target.partition(":")
    if not module.startswith("vissl_like."):
        return target.replace(":", ".")
    for node in _source(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").split("\n")[0]
    return _assigned_description(module)


def _assigned_description(module: str) -> str:
    return (ast.get_docstring(_source(module)) or "").split("\n")[0]


@lru_cache(maxsize=64)
def _source(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ast.Module(body=[], type_ignores=[])
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _literal_keys(module: str, variable: str) -> list[str]:
    """Text keys of a dict that a module assigns to a name at its top."""
    for node in _source(module).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        is_it = any(isinstance(target, ast.Name) and target.id == variable for target in targets)
        value = getattr(node, "value", None)
        if is_it and isinstance(value, ast.Dict):
            return [str(key.value) for key in value.keys if isinstance(key, ast.Constant)]
    return []


@lru_cache(maxsize=1)
def _torchvision_names() -> set[str]:
    """Classes that torchvision.transforms.v2 exports, read from its __init__.py."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return set()
    file = Path(spec.submodule_search_locations[0], "transforms", "v2", "__init__.py")
    if not file.is_file():
        return set()
    imports = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    names = {alias.asname or alias.name for node in imports for alias in node.names}
    return {name for name in names if name[:1].isupper()}
