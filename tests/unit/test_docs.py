"""The documentation agrees with the code: generated pages are fresh, links lead somewhere, named things exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from vissl_like.config import reference
from vissl_like.registry import COMPONENTS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
OWN_PAGES = [page for page in PAGES if page.name not in ("options.md", "migration.md", "LICENSE")]

spec = importlib.util.spec_from_file_location("make_docs", ROOT / "tools" / "make_docs.py")
assert spec is not None and spec.loader is not None
make_docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_docs)


def ids(path: Path) -> str:
    return path.name


def test_generated_pages_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_docs.main(["--check"]) == 0, capsys.readouterr().out


def test_check_notices_drift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("docs/migration.md", "docs/options.md", "MODEL_ZOO.md", "configs/zoo.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), encoding="utf-8")
    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    make_docs.main([])
    assert make_docs.main(["--check"]) == 0
    page = tmp_path / "docs" / "options.md"
    page.write_text(page.read_text("utf-8").replace("`NUM_EPOCHS`", "`NUM_EPOCH`"), encoding="utf-8")
    assert make_docs.main(["--check"]) == 1
    assert "docs/options.md: out of date" in capsys.readouterr().out
    assert make_docs.main([]) == 0
    assert make_docs.main(["--check"]) == 0


def test_every_option_is_documented() -> None:
    page = make_docs.options_page()
    for entry in reference.entries().values():
        assert entry.doc, entry.key
        section, _, name = entry.key.rpartition(".")
        if not entry.is_section and section:
            table = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
            assert f"\n| `{name}` | " in table, entry.key


def test_measured_numbers_come_with_their_command() -> None:
    row = {"model": "m", "data": "d", "metric": "x", "published": 1.5, "source": "paper"}
    shown = list(make_docs.zoo_section({"name": "n", "about": "a", "models": [row]}))[-2]
    assert shown == "| m | d | x | 1.5 (paper) | not measured | – |"
    row["measured"] = {"value": 2.5, "hardware": "2 cores", "date": "2026-01-01", "command": "run me"}
    assert (
        "2.5 (2 cores, 2026-01-01; `run me`)"
        in list(make_docs.zoo_section({"name": "n", "about": "a", "models": [row]}))[-2]
    )


def test_a_page_without_its_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="old names"):
        make_docs.with_block("no markers", "old names", "table")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


@pytest.mark.parametrize("page", OWN_PAGES, ids=ids)
def test_named_recipes_exist(page: Path) -> None:
    for name in re.findall(r"(?<![\w.])config=([\w/]+/\w+)", page.read_text("utf-8")):
        own = name.startswith("mine/")
        assert own or (ROOT / "configs" / "config" / f"{name}.yaml").is_file(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", OWN_PAGES, ids=ids)
def test_named_options_exist(page: Path) -> None:
    """Every `config.A.B=` of the pages is a key of the schema, but for a typo on purpose and a new one."""
    known = {"config.OPTIMIZER.NUM_EPOCH", "config.LOSS.FOCAL.GAMMA", "config.A.B"}
    for key in re.findall(r"\bconfig(?:\.[A-Z_0-9]+)+(?==)", page.read_text("utf-8")):
        assert key in known or reference.find(tuple(key.split("."))) is not None, f"{page.name}: {key}"


def test_components_of_the_docs_exist() -> None:
    text = (ROOT / "docs" / "start.md").read_text("utf-8")
    assert set(COMPONENTS["data_source"]) <= set(re.findall(r"`(\w+)`", text))
