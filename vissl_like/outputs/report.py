"""One self-contained page per run: report.html. It reads only files of the run folder, at any time."""

from __future__ import annotations

import json
import os
import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vissl_like.outputs.writers import read_metrics

REPORT_FILE = "report.html"
STYLE_FILE = Path(__file__).with_name("report.css")


@dataclass
class RunFolder:
    """The files of a run folder, read when first asked for. A damaged one is named and counts as missing."""

    path: Path
    damaged: list[str] = field(default_factory=list)

    def json(self, name: str) -> Any:
        """The content of a JSON file, or None."""
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            self.damaged.append(f"{name}: {error}")
            return None

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of an .npz file by name; empty without it."""
        file = self.path / name
        if not file.is_file():
            return {}
        try:
            with np.load(file) as content:
                return dict(content)
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            self.damaged.append(f"{name}: {error}")
            return {}

    @cached_property
    def job(self) -> dict[str, Any]:
        """{"engine_name": ..., "config": {...}} as the run resolved it."""
        import yaml

        file = self.path / "config.yaml"
        try:
            return yaml.safe_load(file.read_text(encoding="utf-8")) or {} if file.is_file() else {}
        except yaml.YAMLError as error:
            self.damaged.append(f"config.yaml: {error}")
            return {}

    @cached_property
    def launch(self) -> dict[str, Any]:
        return self.json("launch.json") or {}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return self.json("manifest.json") or {}

    @cached_property
    def results(self) -> dict[str, Any]:
        return self.json("results.json") or {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    @cached_property
    def stages(self) -> list[RunFolder]:
        """The folders of a pipeline's stages that have been started, in order."""
        stages = self.job.get("config", {}).get("PIPELINE", {}).get("STAGES", [])
        folders = [RunFolder(self.path / stage["NAME"]) for stage in stages]
        return [folder for folder in folders if (folder.path / "config.yaml").is_file()]

    @property
    def title(self) -> str:
        name = self.job.get("config", {}).get("RUN", {}).get("NAME")
        return name or self.path.resolve().name

    @property
    def engine(self) -> str:
        return str(self.job.get("engine_name", "run"))

    @cached_property
    def stage(self) -> dict[str, Any] | None:
        """What the pipeline above says about this folder, if it is one of its stages."""
        above = RunFolder(self.path.resolve().parent)
        if above.engine != "pipeline":
            return None
        stages = above.job.get("config", {}).get("PIPELINE", {}).get("STAGES", [])
        return next((stage for stage in stages if stage.get("NAME") == self.path.resolve().name), None)

    @property
    def changes(self) -> dict[str, Any]:
        """What the command line, or the pipeline for its stage, changed in the recipe: {dotted key: value}."""
        if self.stage:
            return flatten(self.stage.get("CONFIG") or {}, "config.")
        pairs = [str(text).partition("=") for text in self.launch.get("overrides") or []]
        return {key: value for key, _, value in pairs if key != "config" and not key.startswith("+config/")}

    @property
    def command_line(self) -> str:
        """The command that repeats this run, quoted for a shell; empty if the recipe is not known or this is a stage."""
        launch, overrides = self.launch, [str(text) for text in self.launch.get("overrides") or []]
        if not launch.get("recipe") or self.stage:
            return ""
        words = [f"--config-dir={folder}" for folder in launch.get("config_dirs") or []]
        if not any(text.startswith("config=") for text in overrides):
            words.append(f"config={launch['recipe']}")
        return shlex.join(["vissl-like", *words, *overrides])

    @property
    def status(self) -> tuple[str, str]:
        """(style, text): good, bad or open."""
        if self.manifest.get("complete") or (self.path / "results.json").is_file():
            return "good", "finished"
        if (self.path / "replay").is_dir():
            return "bad", "stopped: the loss was not finite"
        steps = [record["step"] for record in self.metrics if "step" in record]
        return "open", f"not finished (last recorded step {steps[-1]})" if steps else "not finished"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {"a.b.c": leaf}; lists and empty mappings are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


@dataclass(frozen=True)
class Section:
    """A titled block of the page; `body` is HTML."""

    title: str
    body: str

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def write_report(run_dir: Path) -> Path:
    """Write RUN.DIR/report.html, and RUN.DIR/figures, from what the folder holds. Returns the page's path."""
    from vissl_like.outputs import report_sections

    run = RunFolder(run_dir)
    sections = [section for make in report_sections.SECTIONS if (section := make(run)) is not None]
    page = _page(run, sections, headline=report_sections.headline(run))
    beside = run_dir / (REPORT_FILE + ".new")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, run_dir / REPORT_FILE)
    return run_dir / REPORT_FILE


def _page(run: RunFolder, sections: list[Section], *, headline: str) -> str:
    style, text = run.status
    links = "".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in sections)
    blocks = "".join(
        f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>{section.body}</section>'
        for section in sections
    )
    damaged = "".join(f"<li>{escape(line)}</li>" for line in dict.fromkeys(run.damaged))
    note = f'<section class="warn"><h2>Files that could not be read</h2><ul>{damaged}</ul></section>' if damaged else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(run.title)}</title>'
        f"<style>{STYLE_FILE.read_text(encoding='utf-8')}</style></head><body><main><header>"
        f'<p class="engine">{escape(run.engine.replace("_", " "))}</p><h1>{escape(run.title)}</h1>'
        f'<p><span class="pill {style}">{escape(text)}</span> {headline}</p>{_repeat(run)}</header>'
        f"<nav>{links}</nav>{blocks}{note}"
        f"<footer>vissl_like {escape(str(run.launch.get('version', '')))} · pictures lie in <code>figures/</code>, "
        f"every number in <code>metrics.jsonl</code> and <code>results.json</code>.</footer></main></body></html>\n"
    )


def _repeat(run: RunFolder) -> str:
    """How this run is repeated: its command line, or the pipeline that it is a stage of."""
    if run.stage:
        name = escape(run.path.resolve().parent.name)
        return f'<p>A stage of <a href="../{REPORT_FILE}">{name}</a>.</p>'
    return f"<pre>{escape(run.command_line)}</pre>" if run.command_line else ""
