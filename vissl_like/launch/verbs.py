"""What the command line answers without starting anything: help, options, lists, reports."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path

from vissl_like.config import components, reference
from vissl_like.config.recipes import Library
from vissl_like.config.spelling import nearest
from vissl_like.config.suggest import suggest_keys
from vissl_like.errors import ConfigError

PROGRAM = "vissl-like"
VERBS = ("options", "list", "report", "data", "translate")
#: Those of them that read their words themselves.
_FIRST = ("data", "translate")


def help_text() -> str:
    """The text of --help."""
    return f"""\
{PROGRAM}: one engine for vision representation learning and interpretability.

Run a recipe, and override what you need by dotted keys:
  {PROGRAM} config=pretrain/rotnet/rotnet_mnist5k
  {PROGRAM} config=pretrain/clusterfit/clusterfit_mnist5k config.RUN.DIR=runs/demo
  {PROGRAM} config=pretrain/rotnet/rotnet_8gpu_resnet config.DATA.TRAIN.DATA_PATHS=[images] config.OPTIMIZER.NUM_EPOCHS=5
(python tools/run_distributed_engines.py ... is the same command.)

  config=a/b                     the recipe configs/config/a/b.yaml
  +config/a/b/models=c           a preset that comes after it; several are merged from left to right
  config.A.B=value               an option; lists are replaced whole, config.A.LIST.0=value sets one element
  ~config.A.B                    back to the default
  engine_name=NAME               another engine than the recipe's
  config.RUN.DRY_RUN=true        check everything, print plan, model and memory; start nothing

Questions:
  {PROGRAM} options [KEY]        type, default, bounds and meaning of an option, or of all options of a section
  {PROGRAM} list WORD            {", ".join(components.LISTS[:5])},
                                 {", ".join(components.LISTS[5:])}
  {PROGRAM} report RUN_DIR       make report.html of a run folder again
  {PROGRAM} data VERB ...        shrink or index images, prepare or draw data sets (`data --help`)
  {PROGRAM} translate ifam -- COMMAND
                                 a command of iFAM or PDiscoFormer in our words (`translate --help`)

Flags:
  -m, --multirun                 a run for each combination of comma lists: config.SEED_VALUE=1,2,3
                                 (RUN.DIR/sweep.jsonl keeps the results; started again, finished points are skipped)
  --config-dir DIR               further recipes, in DIR/config or DIR; ./configs/config is searched anyway
  --shell-completion SHELL       print the completion script for bash, zsh or fish
  --version, --help

Exit codes: 0 done, 2 configuration, 3 data or weights, 75 stopped by a signal after saving, 1 defect or killed process,
128+n ended by signal n while starting (143 SIGTERM, 130 Ctrl-C).
A run that was interrupted goes on when the same command is started again."""


def short_help() -> str:
    """What a bare command says."""
    return (
        f"usage: {PROGRAM} config=RECIPE [config.KEY=VALUE ...]\n"
        f"       {PROGRAM} list recipes | options [KEY] | --help\n"
        f"for example: {PROGRAM} config=pretrain/clusterfit/clusterfit_mnist5k"
    )


def answer(verb: str, words: list[str], *, config_dirs: list[str]) -> str:
    """The answer to `verb words`."""
    if verb == "options":
        return "\n\n".join(describe(word) for word in words) if words else overview()
    if verb == "list":
        if len(words) != 1:
            raise ConfigError(f"list: say what: {', '.join(components.LISTS)}.")
        return listing(words[0], config_dirs=config_dirs)
    if verb in _FIRST:
        raise ConfigError(f"{verb}: comes first on the command line: {PROGRAM} {verb} ...")
    if len(words) != 1:
        raise ConfigError("report: give one run folder: report runs/NAME.")
    return make_report(Path(words[0]).expanduser())


def check_words(words: list[str], *, config_dirs: list[str]) -> None:
    """Words that are neither verbs nor overrides: what may be meant by them."""

    for word in words:
        if "=" in word or word.startswith("~"):
            continue
        names = Library(config_dirs).files
        plain = word.removesuffix(".yaml")
        near = nearest(word, VERBS)
        if plain in names:
            raise ConfigError(f"{word!r}: did you mean config={plain}?")
        if word.startswith("config."):
            raise ConfigError(f"{word!r}: an override needs a value: {word}=VALUE. `options {word}` describes it.")
        hint = (
            f"did you mean `{near[0]}`?" if near else "a recipe is given as config=NAME, an option as config.KEY=VALUE."
        )
        raise ConfigError(f"{word!r} is not understood; {hint}")


# ------------------------------------------------------------------------------------------------------------- options
def overview() -> str:
    """All sections at the top."""
    lines = ["engine_name and these, each below config. (`options SECTION` lists a section):"]
    for entry in reference.options_of("config"):
        name = entry.key.removeprefix("config.")
        lines.append(f"  {name:<26}{_value_of(entry)}{entry.doc}")
    return "\n".join(lines)


def describe(word: str) -> str:
    """One option, or every option of a section."""
    entry = _entry(word)
    if not entry.is_section:
        return _option(entry)
    below = [one for one in reference.entries().values() if one.key.startswith(f"{entry.key}.")]
    lines = [f"{entry.key}: {entry.doc}"]
    width = max((len(one.key) - len(entry.key) for one in below), default=0) + 1
    for one in below:
        if not one.is_section:
            name = one.key.removeprefix(f"{entry.key}.")
            lines.append(f"  {name:<{width}}{_value_of(one)}{one.doc}")
    return "\n".join(lines)


def _entry(word: str) -> reference.Entry:
    path = tuple(word.strip(".").split("."))
    for full in (path, ("config", *path)):
        entry = reference.find(full)
        if entry is not None:
            return entry
    typed = path if path[0] == "config" else ("config", *path)
    near = suggest_keys(typed)
    hint = f"; did you mean {' or '.join(near)}?" if near else ". `options` shows all sections."
    raise ConfigError(f"options: unknown key {'.'.join(typed)}{hint}")


def _value_of(entry: reference.Entry) -> str:
    return "" if entry.is_section else f"[{_short(entry.default)}] "


def _short(value: object) -> str:
    text = _shown(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _shown(value: object) -> str:
    """A default as YAML writes it."""
    if value == "":
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _option(entry: reference.Entry) -> str:
    default = "(empty)" if entry.default == "" else _shown(entry.default)
    rows = [("type", entry.type + (", or null" if entry.nullable else "")), ("default", default)]
    rows += [("bounds", entry.bounds)] if entry.bounds else []
    lines = [entry.key, *(f"  {name:<8}  {value}" for name, value in rows)]
    return "\n".join([*lines, *textwrap.wrap(entry.doc, _width(), initial_indent="  ", subsequent_indent="  ")])


def _width() -> int:
    return max(60, shutil.get_terminal_size((110, 24)).columns - 2)


# --------------------------------------------------------------------------------------------------------------- lists
def listing(word: str, *, config_dirs: list[str]) -> str:
    """Names of one kind with a line about each."""
    if word not in components.LISTS:
        near = nearest(word, components.LISTS)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"list {word}: no such list{hint} Known: {', '.join(components.LISTS)}.")
    if word == "recipes":
        library = Library(config_dirs)
        found = {name: library.description(name) for name in library.files}
    else:
        found = components.listing(word)
    width = max((len(name) for name in found), default=0) + 2
    return "\n".join(f"{name:<{width}}{text}".rstrip() for name, text in found.items())


# -------------------------------------------------------------------------------------------------------------- report
def make_report(run_dir: Path) -> str:
    """Write report.html of a run folder again; returns what was written."""
    if not (run_dir / "config.yaml").is_file():
        siblings = [path.name for path in run_dir.parent.iterdir()] if run_dir.parent.is_dir() else []
        near = nearest(run_dir.name, siblings)
        hint = f"; did you mean {run_dir.parent / near[0]}?" if near and near[0] != run_dir.name else "."
        raise ConfigError(f"report {run_dir}: not a run folder (no config.yaml in it){hint}")
    from vissl_like.outputs.report import write_report

    return f"wrote {write_report(run_dir)}"
