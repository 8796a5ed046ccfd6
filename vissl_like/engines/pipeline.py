"""Run the stages of a recipe one after the other; a finished stage whose inputs did not change is skipped.

Runs in the launching process: every stage is a launch of its own, with its own folder, ranks and report.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from vissl_like.config.check import compose_stage
from vissl_like.config.schema import Job, Table
from vissl_like.config.stages import StageJob, stage_jobs
from vissl_like.files import write_json
from vissl_like.launch import folder, stage_folder
from vissl_like.launch.endpoint import is_writer
from vissl_like.launch.local import LaunchInfo, launch

logger = logging.getLogger(__name__)

_RESULT = re.compile(r"\{(\w+):(\w+)\}")


def run(job: Job, run_dir: Path) -> dict[str, Any]:
    """Run all stages below `run_dir`. Returns {"<stage>/<key>": value} of every stage's results."""
    stages = stage_jobs(job, run_dir, compose_stage)
    writes = is_writer(job.config.DISTRIBUTED)
    results: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(stages, 1):
        logger.info("stage %d of %d: %s", number, len(stages), stage.name)
        if writes:
            results[stage.name] = _run_stage(stage, run_dir, overwrite=job.config.RUN.OVERWRITE)
        else:  # the first machine knows whether the stage has to start again
            results[stage.name] = launch(stage.job, stage.run_dir, LaunchInfo(recipe=stage.recipe))
    table = summary(job.config.PIPELINE.TABLE, results)
    if table["rows"] and writes:
        write_json(run_dir / "table.json", table)
        print(format_table(table), flush=True)
    return {f"{name}/{key}": value for name, values in results.items() for key, value in values.items()}


def _run_stage(stage: StageJob, run_dir: Path, *, overwrite: bool) -> dict[str, Any]:
    """Launch one stage. It starts anew if a stage it reads from was made anew since, or if it differs and may be redone."""
    job = stage.job
    if why := stage_folder.why_again(stage, run_dir, overwrite=overwrite):
        logger.info("stage %s: %s; it starts again", stage.name, why)
        folder.remove_outputs(stage.run_dir)
        fresh = job.config.RUN.model_copy(update={"OVERWRITE": True})
        job = job.model_copy(update={"config": job.config.model_copy(update={"RUN": fresh})})
    stage_folder.begin(stage, run_dir)
    return launch(job, stage.run_dir, LaunchInfo(recipe=stage.recipe))


def summary(table: Table, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The table of the recipe, filled with numbers: {columns, rows, notes}. A missing number is None."""
    rows = [[row.TITLE, *(results.get(row.STAGE, {}).get(key) for key in table.COLUMNS.values())] for row in table.ROWS]
    notes = [_RESULT.sub(lambda m: _show(results.get(m[1], {}).get(m[2])), note) for note in table.NOTES]
    return {"columns": ["", *table.COLUMNS], "rows": rows, "notes": notes}


def format_table(table: dict[str, Any]) -> str:
    """The summary as aligned text."""
    cells = [table["columns"], *([_show(cell) for cell in row] for row in table["rows"])]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row))
        for row in cells
    ]
    rule = "-" * len(lines[0])
    return "\n".join(["", lines[0], rule, *lines[1:], *(f"\n{note}" for note in table["notes"]), ""])


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
