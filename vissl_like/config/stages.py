"""The stages of a pipeline as jobs of their own, all composed and checked before the first one starts.

A stage starts from its RECIPE (or from the pipeline's own page), takes over whatever the pipeline's page and command
line set outside PIPELINE, and then applies its own OVERRIDES, in which {name} stands for the folder of an earlier stage.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vissl_like.config.schema import Job, Stage, defaults
from vissl_like.errors import ConfigError
from vissl_like.registry import suggest

_PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_]+)\}")
_NAME = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class StageJob:
    """One stage: its job, its folder, and the earlier stages whose folders it reads."""

    name: str
    job: Job
    run_dir: Path
    recipe: str
    overrides: tuple[str, ...]
    needs: tuple[str, ...]


#: (recipe or None, values that go over it, overrides) -> Job; config.compose has the real one.
Compose = Callable[[str | None, dict[str, Any], list[str]], Job]


def stage_jobs(job: Job, run_dir: Path, compose: Compose) -> list[StageJob]:
    """All stages of `job`, in order. Raises ConfigError that lists the problems of every stage."""
    stages = job.config.PIPELINE.STAGES
    inherited = _inherited(job)
    result: list[StageJob] = []
    problems = _name_problems(stages)
    for stage in stages:
        earlier = {done.name: done.run_dir for done in result}
        try:
            result.append(_stage_job(stage, inherited, run_dir / stage.NAME, earlier, compose))
        except ConfigError as error:
            problems.append(f"stage {stage.NAME!r}: {error}")
            result.append(StageJob(stage.NAME, job, run_dir / stage.NAME, stage.RECIPE, (), ()))
    if problems:
        raise ConfigError("\n".join(problems))
    return result


def _stage_job(
    stage: Stage, inherited: dict[str, Any], run_dir: Path, earlier: dict[str, Path], compose: Compose
) -> StageJob:
    overrides = [_fill(text, earlier) for text in stage.OVERRIDES]
    engine = [f"engine_name={stage.ENGINE}"] if stage.ENGINE else []
    composed = compose(stage.RECIPE or None, inherited, engine + overrides)
    if composed.engine_name == "pipeline":
        raise ConfigError("a stage cannot be a pipeline itself; list its stages here, or set ENGINE.")
    run = composed.config.RUN.model_copy(update={"DIR": str(run_dir)})
    pipeline = type(composed.config.PIPELINE)()
    config = composed.config.model_copy(update={"RUN": run, "PIPELINE": pipeline})
    needs = tuple(dict.fromkeys(name for text in stage.OVERRIDES for name in _PLACEHOLDER.findall(text)))
    return StageJob(
        stage.NAME, composed.model_copy(update={"config": config}), run_dir, stage.RECIPE, tuple(overrides), needs
    )


def _fill(text: str, folders: dict[str, Path]) -> str:
    """`text` with each {name} replaced by that stage's folder, quoted for the override grammar."""

    def folder(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in folders:
            raise ConfigError(
                f"{text!r}: {{{name}}} is no earlier stage{suggest(name, list(folders))} Earlier: {', '.join(folders) or 'none'}."
            )
        return str(folders[name])

    return _PLACEHOLDER.sub(folder, text)


def _name_problems(stages: list[Stage]) -> list[str]:
    if not stages:
        return ["config.PIPELINE.STAGES=[]: a pipeline needs at least one stage."]
    names = [stage.NAME for stage in stages]
    problems = [
        f"config.PIPELINE.STAGES: the name {name!r} must be letters, digits and underscores."
        for name in names
        if not _NAME.fullmatch(name)
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    return problems + [f"config.PIPELINE.STAGES: the name {name!r} is used twice." for name in twice]


def _inherited(job: Job) -> dict[str, Any]:
    """What the pipeline's page and command line set, without what belongs to the pipeline alone."""
    given = changed(job.config.model_dump(mode="json"), defaults()["config"])
    given.pop("PIPELINE", None)
    given.get("RUN", {}).pop("DIR", None)
    given.get("RUN", {}).pop("NAME", None)
    return {"config": given}


def changed(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The part of the nested `values` that differs from `base`. Lists count as one value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict) and base[key]:
            inner = changed(value, base[key])
            if inner:
                result[key] = inner
        elif key not in base or value != base[key]:
            result[key] = value
    return result
