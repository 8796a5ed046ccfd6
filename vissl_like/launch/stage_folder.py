"""The folder of a stage of a pipeline: what its inputs were when it began, and whether it must start again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from vissl_like.config.stages import StageJob
from vissl_like.files import write_json
from vissl_like.launch import folder, outputs

INPUTS_FILE = "inputs.json"


def why_again(stage: StageJob, run_dir: Path, *, overwrite: bool) -> str:
    """Why a stage cannot go on, or count as finished, with what is in its folder; empty if it can."""
    if overwrite and folder.holds_other(stage.job, stage.run_dir):
        return "it differs from the one in its folder"
    record = stage.run_dir / INPUTS_FILE
    if record.exists() and folder.read_json(record) != _inputs(stage, run_dir):
        return "its inputs were made anew"
    return ""


def expected(stage: StageJob, run_dir: Path, *, overwrite: bool, again: Collection[str]) -> str:
    """What a start will do with this stage, if those called `again` start again: for a dry run."""
    if why := why_again(stage, run_dir, overwrite=overwrite):
        return f"starts again: {why}"
    if not folder.is_run(stage.run_dir):
        return "to do"
    if earlier := [name for name in stage.needs if name in again]:
        return f"starts again if {' or '.join(earlier)} comes out otherwise"
    return "finished" if folder.read_json(stage.run_dir / folder.MANIFEST_FILE).get("complete") else "goes on"


def begin(stage: StageJob, run_dir: Path) -> None:
    """Make the folder and record the inputs. Once former outputs are gone: a killed stage must not go on with others."""
    folder.make(stage.run_dir)
    write_json(stage.run_dir / INPUTS_FILE, _inputs(stage, run_dir))


def _inputs(stage: StageJob, run_dir: Path) -> dict[str, str]:
    """Earlier stage -> what it is known by: its configuration, and what came out."""
    return {name: outputs.identity(folder.read_json(run_dir / name / folder.MANIFEST_FILE)) for name in stage.needs}
