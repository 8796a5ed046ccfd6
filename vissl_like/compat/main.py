"""`translate SYSTEM -- COMMAND`: the command of a program that users come from, in our words."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Sequence

from vissl_like.errors import ConfigError, UserError, show_error
from vissl_like.registry import suggest

#: System -> module with translate(text, script=...).
SYSTEMS = {"ifam": "vissl_like.compat.ifam"}
USAGE = """\
usage: vissl-like translate SYSTEM [--script NAME] -- COMMAND ...
       vissl-like translate SYSTEM [--script NAME] < FILE

Prints the command of this program that does what COMMAND does, as comments what was repaired and which flags have no
counterpart. SYSTEM: ifam (train_net.py of iFAM; --script train_net_pdisco for PDiscoFormer, train_net_baseline,
train_net_decoupled)."""


def main(argv: Sequence[str]) -> int:
    """Translate; returns the exit code."""
    try:
        return _translate(list(argv))
    except UserError as error:
        return show_error(error)


def _translate(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    system, rest = words[0], words[1:]
    if system not in SYSTEMS:
        raise ConfigError(f"translate {system}: no such system{suggest(system, list(SYSTEMS)) or '.'} Known: ifam.")
    options, command = (rest[: rest.index("--")], rest[rest.index("--") + 1 :]) if "--" in rest else (rest, [])
    script = ""
    if options[:1] == ["--script"] and len(options) == 2:
        script = options[1]
    elif options:
        raise ConfigError(f"translate: {options[0]!r} is not understood; the command comes after `--`.")
    if not command and sys.stdin.isatty():
        raise ConfigError(f"translate {system}: give the command after `--`, or in a file: translate {system} < FILE.")
    text = " ".join(shlex.quote(word) for word in command) if command else sys.stdin.read()
    print(importlib.import_module(SYSTEMS[system]).translate(text, script=script).text())
    return 0
