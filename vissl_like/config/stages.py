"""The stages of a pipeline as jobs of their own, all composed and checked before the first one starts.

A stage starts from its RECIPE (or from the pipeline's own page), takes over whatever the pipeline's page and command
line set outside PIPELINE, and then applies its own CONFIG, in whose texts {name} stands for an earlier stage's folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
    needs: tuple[str, ...]


class Compose(Protocol):
    """config.check.compose_stage: the recipe (or none), inherited values over it, then the stage's own."""

    def __call__(self, recipe: str | None, inherited: dict[str, Any], own: dict[str, Any], *, where: str) -> Job: ...


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
            result.append(StageJob(stage.NAME, job, run_dir / stage.NAME, stage.RECIPE, ()))
    if problems:
        raise ConfigError("\n".join(problems))
    return result


def _stage_job(
    stage: Stage, inherited: dict[str, Any], run_dir: Path, earlier: dict[str, Path], compose: Compose
) -> StageJob:
    needs: dict[str, None] = {}
    own = {"config": _fill(stage.CONFIG, earlier, needs)}
    if stage.ENGINE:
        own["engine_name"] = stage.ENGINE
    composed = compose(stage.RECIPE or None, inherited, own, where=f"stage {stage.NAME}")
    if composed.engine_name == "pipeline":
        raise ConfigError("a stage cannot be a pipeline itself; list its stages here, or set ENGINE.")
    run = composed.config.RUN.model_copy(update={"DIR": str(run_dir)})
    pipeline = type(composed.config.PIPELINE)()
    config = composed.config.model_copy(update={"RUN": run, "PIPELINE": pipeline})
    job = composed.model_copy(update={"config": config})
    return StageJob(stage.NAME, job, run_dir, stage.RECIPE, tuple(needs))


def _fill(value: Any, folders: dict[str, Path], needs: dict[str, None]) -> Any:
    """`value` with each {name} in its texts replaced by that stage's folder; the names met are added to `needs`."""
    if isinstance(value, dict):
        return {key: _fill(inner, folders, needs) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, folders, needs) for inner in value]
    if not isinstance(value, str):
        return value

    def folder(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in folders:
            known = ", ".join(folders) or "none"
            raise ConfigError(
                f"{value!r}: {match.group()} is no earlier stage{suggest(name, list(folders))} Earlier: {known}."
            )
        needs[name] = None
        return str(folders[name])

    return _PLACEHOLDER.sub(folder, value)


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
    for key in ("DIR", "NAME", "OVERWRITE"):
        given.get("RUN", {}).pop(key, None)
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
