"""Stages of a pipeline: inheritance, references to earlier folders, all problems at once."""

from pathlib import Path
from typing import Any

import pytest

from vissl_like.config.schema import Job, defaults
from vissl_like.config.stages import changed, stage_jobs
from vissl_like.errors import ConfigError


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


def _compose(recipe: str | None, inherited: dict[str, Any], own: dict[str, Any], *, where: str) -> Job:
    """Composes from a table of two recipes."""
    recipes = {None: {}, "supervised": {"config": {"OPTIMIZER": {"NUM_EPOCHS": 7}, "LOG_FREQUENCY": 3}}}
    return Job(**_merge(_merge(_merge(defaults(), recipes[recipe]), inherited), own))


def _pipeline(stages: list[dict[str, Any]], **config: Any) -> Job:
    return Job(engine_name="pipeline", config={"PIPELINE": {"STAGES": stages}, **config})


def test_a_stage_takes_its_recipe_then_the_pipelines_values_then_its_own(tmp_path: Path) -> None:
    job = _pipeline(
        [
            {"NAME": "a", "RECIPE": "supervised", "CONFIG": {"SEED_VALUE": 5}},
            {"NAME": "b", "ENGINE": "evaluate"},
        ],
        OPTIMIZER={"NUM_EPOCHS": 2},
        SEED_VALUE=4,
    )
    first, second = stage_jobs(job, tmp_path, _compose)
    assert (first.job.engine_name, second.job.engine_name) == ("train", "evaluate")
    assert first.job.config.OPTIMIZER.NUM_EPOCHS == 2
    assert first.job.config.LOG_FREQUENCY == 3
    assert (first.job.config.SEED_VALUE, second.job.config.SEED_VALUE) == (5, 4)
    assert first.job.config.RUN.DIR == str(tmp_path / "a")
    assert first.job.config.PIPELINE.STAGES == []


def test_a_name_in_braces_is_the_folder_of_an_earlier_stage(tmp_path: Path) -> None:
    job = _pipeline(
        [
            {"NAME": "teacher"},
            {"NAME": "clusters", "CONFIG": {"MODEL": {"WEIGHTS_INIT": {"PARAMS_FILE": "{teacher}/weights.pth"}}}},
        ]
    )
    _, clusters = stage_jobs(job, tmp_path, _compose)
    assert clusters.job.config.MODEL.WEIGHTS_INIT.PARAMS_FILE == str(tmp_path / "teacher" / "weights.pth")
    assert clusters.needs == ("teacher",)


def test_every_problem_of_every_stage_is_reported_at_once(tmp_path: Path) -> None:
    job = _pipeline(
        [
            {"NAME": "teacher"},
            {"NAME": "teacher"},
            {"NAME": "a/b"},
            {"NAME": "late", "CONFIG": {"RUN": {"NAME": "{teachr}"}}},
        ]
    )
    with pytest.raises(ConfigError) as caught:
        stage_jobs(job, tmp_path, _compose)
    message = str(caught.value)
    assert "'teacher' is used twice" in message
    assert "'a/b' must be letters" in message
    assert "did you mean 'teacher'?" in message


def test_a_stage_that_is_a_pipeline_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be a pipeline itself"):
        stage_jobs(_pipeline([{"NAME": "a", "ENGINE": "pipeline"}]), tmp_path, _compose)


def test_an_empty_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one stage"):
        stage_jobs(_pipeline([]), tmp_path, _compose)


def test_changed_keeps_only_what_differs() -> None:
    base = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "e": {}}
    values = {"a": 1, "b": {"c": 3, "d": [1, 2]}, "e": {"x": 1}}
    assert changed(values, base) == {"b": {"c": 3}, "e": {"x": 1}}
