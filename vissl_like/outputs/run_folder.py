"""The files of a run folder as the report sees them, and the blocks that its page is made of."""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vissl_like.files import read_yaml
from vissl_like.outputs.writers import read_metrics

REPORT_FILE = "report.html"
PART_MAPS_FOLDER = "part_maps"


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
            return read_yaml(file) or {} if file.is_file() else {}
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
