"""Every option by its dotted key: type, default, bounds and doc line, read from the schema's fields.

`options KEY`, shell completion, docs/options.md and the wording of errors all come from here.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from vissl_like.config.schema import Job
from vissl_like.config.section import Section

Path = tuple[str, ...]

#: Stands for the index of a list element in keys such as config.OPTIMIZER.GROUPS.*.MATCH.
ELEMENT = "*"

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "anything"}
_PLURALS = {int: "whole numbers", float: "numbers", bool: "true or false values", str: "texts", Any: "anything"}
_BOUNDS = (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than"))


@dataclass(frozen=True)
class Entry:
    """One option or section. `key` is dotted and full: config.OPTIMIZER.NUM_EPOCHS."""

    key: str
    is_section: bool
    type: str
    """In words: "a whole number", "one of sgd, adam", "a list of texts", "section"."""
    default: Any
    """Plain data; None for a section."""
    bounds: str
    """In words, e.g. "at least 0, less than 1"; "" if there are none."""
    doc: str
    choices: tuple[Any, ...] = ()
    """Allowed values of the option, or of its elements."""
    nullable: bool = False
    annotation: Any = None

    @property
    def path(self) -> Path:
        """The key's parts."""
        return tuple(self.key.split("."))

    @property
    def allowed(self) -> str:
        """What the value must be, for messages: "a whole number, at least 1"."""
        return self.type + (f", {self.bounds}" if self.bounds else "") + (", or null" if self.nullable else "")


@lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """All options and sections by key, in the order of the schema."""
    return {entry.key: entry for entry in _walk(Job, ())}


@lru_cache(maxsize=1)
def paths() -> tuple[Path, ...]:
    """The paths of all entries."""
    return tuple(entry.path for entry in entries().values())


def options_of(key: str) -> list[Entry]:
    """The direct children of a section, in order."""
    depth = key.count(".") + 1
    return [entry for name, entry in entries().items() if name.startswith(f"{key}.") and name.count(".") == depth]


def find(path: Path) -> Entry | None:
    """The entry of a path, list indices allowed. Inside a free-form option it is that option's entry; else None."""
    table = entries()
    for length in range(1, len(path) + 1):
        found = table.get(_starred(path[:length], table))
        if found is None:
            return None
        if length < len(path) and is_open(found, path[length:]):
            return found
    return found


def is_open(entry: Entry, rest: Path) -> bool:
    """Whether keys or indices may follow this option that the schema says nothing about."""
    if entry.is_section:
        return False
    if f"{entry.key}.{ELEMENT}" in entries():  # a list of sections: its elements have entries of their own
        return False
    bare = _without_none(entry.annotation)
    if get_origin(bare) is dict:
        return True
    return get_origin(bare) in (list, tuple) and rest[0].isdigit()


def _starred(path: Path, table: dict[str, Entry]) -> str:
    key = ""
    for part in path:
        plain = f"{key}.{part}" if key else part
        starred = f"{key}.{ELEMENT}"
        key = starred if part.isdigit() and plain not in table and starred in table else plain
    return key


def _walk(section: type[Section], above: Path) -> Iterator[Entry]:
    for name, field in section.model_fields.items():
        path = (*above, name)
        inner = section_in(field.annotation)
        if inner is not None and get_origin(_without_none(field.annotation)) is not list:
            yield _section_entry(path, field)
            yield from _walk(inner, path)
            continue
        yield _option_entry(path, field)
        if inner is not None:
            element = ".".join((*path, ELEMENT))
            yield Entry(element, True, "section", None, "", "One element of the list.", annotation=inner)
            yield from _walk(inner, (*path, ELEMENT))


def _section_entry(path: Path, field: FieldInfo) -> Entry:
    kind, doc = field.annotation, field.description or ""
    is_optional = _without_none(kind) is not kind
    return Entry(".".join(path), True, "section", None, "", doc, nullable=is_optional, annotation=kind)


def _option_entry(path: Path, field: FieldInfo) -> Entry:
    bare = _without_none(field.annotation)
    return Entry(
        key=".".join(path),
        is_section=False,
        type=in_words(bare),
        default=_plain(field.get_default(call_default_factory=True)),
        bounds=_bounds(field),
        doc=field.description or "",
        choices=_choices(bare),
        nullable=bare is not field.annotation,
        annotation=field.annotation,
    )


def section_in(annotation: Any) -> type[Section] | None:
    """The section that this annotation is, may be, or is a list of."""
    bare = _without_none(annotation)
    if get_origin(bare) is list:
        bare = get_args(bare)[0]
    return bare if isinstance(bare, type) and issubclass(bare, Section) else None


def _without_none(annotation: Any) -> Any:
    """X for `X | None`; anything else as it is."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    rest = [part for part in get_args(annotation) if part is not type(None)]
    return rest[0] if len(rest) == 1 and len(rest) < len(get_args(annotation)) else annotation


def in_words(annotation: Any) -> str:
    """A type as a user would say it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(_show_choice, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(part) for part in arguments if part is not type(None))
    if origin is list:
        return _list_in_words(arguments[0])
    if origin is tuple:
        return f"a list of {len(arguments)} {_PLURALS.get(arguments[0], 'values')}"
    if origin is dict:
        return "a mapping {key: value}"
    return _WORDS.get(annotation, "a section")


def _list_in_words(element: Any) -> str:
    if get_origin(element) is Literal:
        return f"a list; each one of {', '.join(map(_show_choice, get_args(element)))}"
    if get_origin(element) is dict:
        return "a list of mappings {key: value}"
    if section_in(element) is not None:
        return "a list of sections"
    return "a list" if element is Any else f"a list of {_PLURALS.get(element, 'values')}"


def _show_choice(value: Any) -> str:
    return "'' (empty)" if value == "" else str(value)


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return (True, False) if annotation is bool else ()


def _bounds(field: FieldInfo) -> str:
    found = []
    for metadata in field.metadata:
        for name, words in _BOUNDS:
            value = getattr(metadata, name, None)
            if value is not None:
                found.append(f"{words} {value:g}")
        length = getattr(metadata, "min_length", None)
        if length is not None:
            found.append(f"of at least {length} elements")
    return ", ".join(found)


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
