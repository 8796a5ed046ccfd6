"""The base of every configuration section, and the shorthand for one documented field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen group of options. Unknown keys are errors; field names are the upper-case keys of the YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


def option(default: Any, doc: str, **bounds: Any) -> Any:
    """One option: its default, its doc line and its bounds (pydantic's ge, gt, le, lt, min_length)."""
    if isinstance(default, list | dict):
        return Field(default_factory=lambda: type(default)(default), description=doc, **bounds)
    return Field(default, description=doc, **bounds)


def group(section: type[Section], doc: str, **values: Any) -> Any:
    """A named sub-section with its defaults, or with the given values instead of some of them."""
    return Field(default_factory=lambda: section(**values), description=doc)
