"""What the command line of another program becomes: a recipe, overrides, and what has to be said about them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

#: Texts that need no quotes.
_PLAIN = r"[A-Za-z_/.][\w./:+@-]*"


@dataclass
class Translation:
    """What a command becomes. `notices` say what was repaired or differs, `without` which flags have no counterpart."""

    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    without: dict[str, str] = field(default_factory=dict)

    def words(self) -> list[str]:
        """The words of our command line."""
        return [f"config={self.recipe}", *(f"{key}={as_override(value)}" for key, value in self.overrides.items())]

    def text(self) -> str:
        """Our command, ready to be pasted, and the notices as comments."""
        lines = [f"# {line}" for line in self.notices]
        lines += [f"# --{flag}: {reason}" for flag, reason in self.without.items()]
        command = ["vissl-like", *(shlex.quote(word) for word in self.words())]
        return "\n".join([*lines, " \\\n  ".join(command)])


def as_override(value: Any) -> str:
    """A value as Hydra's override grammar takes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_override(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(as_override(item) for item in value) + "]"
    if isinstance(value, str) and not _is_plain(value):
        # In quotes a backslash is itself, unless a quote follows.
        escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ("\\" + found[2] if found[2] else ""), value)
        return f'"{escaped}"'
    return str(value)


def _is_plain(text: str) -> bool:
    """Whether Hydra takes the text as a text without quotes."""
    if text.lower() in ("true", "false", "null") or not re.fullmatch(_PLAIN, text):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False
