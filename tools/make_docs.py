"""Generate docs/options.md, docs/parts_flags.md, MODEL_ZOO.md and the table of old names in docs/migration.md.

python tools/make_docs.py            write them
python tools/make_docs.py --check    exit 1 if one of them is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vissl_like.compat import ifam_table  # noqa: E402
from vissl_like.compat.ifam_flags import TWO_STAGE  # noqa: E402
from vissl_like.config import aliases, reference  # noqa: E402

BEGIN, END = "<!-- generated:begin {} -->", "<!-- generated:end -->"


def main(argv: list[str] | None = None) -> int:
    """Write the pages, or with --check compare them. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    check = parser.parse_args(argv).check
    stale = {path: text for path, text in pages(ROOT).items() if not path.exists() or path.read_text("utf-8") != text}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)}: {'out of date; run: make docs' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


def pages(root: Path) -> dict[Path, str]:
    """Every generated page and the text that it should have."""
    migration = root / "docs" / "migration.md"
    return {
        root / "docs" / "options.md": options_page(),
        root / "docs" / "parts_flags.md": flags_page(),
        root / "MODEL_ZOO.md": zoo_page(yaml.safe_load((root / "configs" / "zoo.yaml").read_text("utf-8"))),
        migration: with_block(migration.read_text("utf-8"), "old names", old_names_table()),
    }


def options_page() -> str:
    """docs/options.md: one table per section of the schema, in its order."""
    sections = [entry for entry in reference.entries().values() if entry.is_section]
    lines = [
        "# Options",
        "",
        "Generated from the schema by `make docs`; do not edit. In the terminal: `vissl-like options KEY`.",
        "Each option is set by its dotted key, e.g. `config.OPTIMIZER.NUM_EPOCHS=10`; `*` stands for a list index.",
        "",
        "| option | type | default | meaning |",
        "|---|---|---|---|",
        option_row(reference.entries()["engine_name"]),
        "",
    ]
    for section in sections:
        options = [entry for entry in reference.options_of(section.key) if not entry.is_section]
        if not options:
            continue
        lines += [f"## {section.key}", "", *([section.doc, ""] if section.doc else [])]
        lines += ["| option | type | default | meaning |", "|---|---|---|---|", *map(option_row, options), ""]
    return "\n".join(lines)


def option_row(entry: reference.Entry) -> str:
    name = entry.key.rsplit(".", 1)[-1]
    return f"| `{name}` | {cell(entry.allowed)} | {default(entry.default)} | {cell(entry.doc)} |"


def default(value: Any) -> str:
    """A default as YAML writes it, in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return f"`{cell(text)}`"


def cell(text: str) -> str:
    """Text that may stand in a table cell."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


FLAGS_INTRODUCTION = """\
# Flags of iFAM and PDiscoFormer

Generated from the translator by `make docs`; do not edit. A command of theirs is translated by

```bash
vissl-like translate ifam -- train_net.py --dataset cub --data_path CUB_200_2011 --num_parts 8 --gumbel_softmax
```

which prints our command, ready to be pasted, and as comments what was repaired in theirs and which flags have no
counterpart, or no effect beside the others. (From a checkout: `python tools/translate.py ifam -- ...`; a file:
`vissl-like translate ifam < FILE`.) What a command does not say is filled in with the defaults of its parser, as the recipe
`parts/ifam` has them (of the other scripts few are known: they get the two-stage trainer's, and a comment says so); the
settings of the papers are the recipes `parts/ifam_*` and `parts/pdiscoformer_*`.

*Default there* is that of the parser, *default here* that of the option in the schema. Keys stand below `config.`; {TRAIN,TEST}
stands for both. Where a key is a list of transforms, the flag sets what stands in it.
"""


def flags_page() -> str:
    """docs/parts_flags.md: what becomes of each flag."""
    rows = ifam_table.rows()
    parts = {
        "train_net (two stages)": [row for row in rows if row.script == TWO_STAGE],
        "Further flags of the other trainers": [row for row in rows if row.script != TWO_STAGE],
    }
    lines = [FLAGS_INTRODUCTION]
    for title, found in parts.items():
        lines += [f"## {title}", "", "| flag | option | default there | default here | note |", "|---|---|---|---|---|"]
        lines += [*map(flag_row, found), ""]
    return "\n".join(lines)


def flag_row(row: ifam_table.Row) -> str:
    names = [key.removeprefix("config.") for key in row.keys]
    ours: dict[str, str] = {}
    for name, value in zip(names, row.ours):
        of_train, of_test = name.replace(".TEST.", ".TRAIN."), name.replace(".TRAIN.", ".TEST.")
        is_both = of_train != of_test and {of_train, of_test} <= set(names)
        ours[of_train.replace(".TRAIN.", ".{TRAIN,TEST}.") if is_both else name] = default(value)
    there = ("on" if row.original else "off") if isinstance(row.original, bool) else default(row.original)
    options = "<br>".join(f"`{name}`" for name in ours) or "none"
    return f"| `{row.flag}` | {options} | {there} | {'<br>'.join(ours.values()) or '–'} | {cell(row.note)} |"


def zoo_page(zoo: dict[str, Any]) -> str:
    """MODEL_ZOO.md."""
    lines = [
        "# Model zoo",
        "",
        "Generated from `configs/zoo.yaml` by `make docs`; do not edit.",
        "",
        "*Published* numbers are those of the named source, not ours. *Measured* numbers come from the command given",
        "beside them; everything else says `not measured`. " + zoo["licence_note"],
        "",
        "How to use a file: [docs/weights.md](docs/weights.md). How to repeat the published protocol:",
        "",
        "```bash",
        zoo["evaluate"].replace(" config.", " \\\n    config."),
        "```",
        "",
    ]
    for section in zoo["sections"]:
        lines += zoo_section(section)
    return "\n".join(lines)


def zoo_section(section: dict[str, Any]) -> Iterator[str]:
    yield f"## {section['name']}"
    yield ""
    paper = f" [Paper]({section['paper']})." if "paper" in section else ""
    yield section["about"] + paper
    yield ""
    if "recipes" in section:
        yield "Recipes: " + ", ".join(f"[`{name}`](configs/config/{name}.yaml)" for name in section["recipes"])
        yield ""
    yield "| model | pre-trained on | metric | published | measured here | weights |"
    yield "|---|---|---|---|---|---|"
    for row in section["models"]:
        published = f"{row['published']} ({row['source']})" if "published" in row else "–"
        weights = f"[file]({row['weights']})" if "weights" in row else "–"
        cells = (row["model"], row["data"], row["metric"], published, measured(row.get("measured")), weights)
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""


def measured(value: dict[str, Any] | None) -> str:
    """A measured number with everything needed to repeat it, or the words `not measured`."""
    if value is None:
        return "not measured"
    return f"{value['value']} ({value['hardware']}, {value['date']}; `{value['command']}`)"


def old_names_table() -> str:
    """The names of VISSL's options and what became of each: moved, ignored or refused."""
    moved = [(old, f"`{new}`") for old, new in (aliases.MOVED | aliases.MOVED_SECTIONS).items()]
    moved += [(old, "converted; a warning names the new keys") for old in aliases.CONVERTED]
    ignored = [(old, cell(reason)) for old, reason in aliases.IGNORED.items()]
    refused = []
    for old, (harmless, reason) in aliases.REFUSED.items():
        unless = f" (`{'`, `'.join(map(str, harmless))}` is ignored)" if harmless else ""
        refused.append((old, cell(reason) + unless))
    values = [
        (f"{key}={value}", cell(reason))
        for key, found in aliases.REFUSED_VALUES.items()
        for value, reason in found.items()
    ]
    return "\n".join(
        [
            "### Renamed: accepted, with a warning",
            *two_columns("here", moved),
            "### Ignored, with a warning: the results are the same without it",
            *two_columns("why", ignored),
            "### Refused, with the reason: it would change what is computed",
            *two_columns("why", refused),
            "### Values that are refused, with the reason",
            *two_columns("why", values),
        ]
    )


#: Keys that exist once per split or per schedule take one row.
FAMILIES = (
    (r"DATA\.(TRAIN|VAL|TEST)\.", "DATA.<split>."),
    (r"param_schedulers\.(lr|lr_head|weight_decay)\.", "param_schedulers.<name>."),
    (r"PARAM_SCHEDULERS\.(LR|LR_HEAD|WEIGHT_DECAY)\.", "PARAM_SCHEDULERS.<NAME>."),
)


def two_columns(title: str, rows: list[tuple[str, str]]) -> list[str]:
    """A sorted table without repetitions."""
    lines = {f"| `{old}` | {text} |" for old, text in rows}
    for pattern, family in FAMILIES:
        lines = {re.sub(pattern, family, line) for line in lines}
    return ["", f"| VISSL | {title} |", "|---|---|", *sorted(lines), ""]


def with_block(page: str, name: str, block: str) -> str:
    """`page` with the text between the markers of the block `name` replaced. Raises ValueError without the markers."""
    begin = BEGIN.format(name)
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"the page has no block {begin} ... {END}")
    return f"{before}{begin}\n{block}\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
