"""A chain of stages that is killed or changed in the middle never mixes old and new."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vissl_like.config.check import compose_stage
from vissl_like.config.saved import config_hash
from vissl_like.config.schema import Job
from vissl_like.config.stages import stage_jobs
from vissl_like.engines import pipeline
from vissl_like.errors import ConfigError, DataError
from vissl_like.launch import stage_folder

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine `endings` can be imported."""
    monkeypatch.syspath_prepend(HERE)


def chain(ending: str = "", *, seed: int = 0, overwrite: bool = False) -> Job:
    """`second` reads the folder of `first` and has its own seed; RUN.NAME says how it ends."""
    reads = {"SEED_VALUE": seed, "RUN": {"NAME": ending}, "MODEL": {"WEIGHTS_INIT": {"PARAMS_FILE": "{first}"}}}
    stages: list[dict[str, Any]] = [
        {"NAME": "first", "ENGINE": "endings"},
        {"NAME": "second", "ENGINE": "endings", "CONFIG": reads},
    ]
    run = {"REPORT": False, "OVERWRITE": overwrite}
    return Job.model_validate(
        {
            "engine_name": "pipeline",
            "config": {"PLUGINS": ["launch_plugin"], "RUN": run, "PIPELINE": {"STAGES": stages}},
        }
    )


def starts(run_dir: Path) -> list[int]:
    """How often each stage ran."""
    files = [run_dir / stage / "started.txt" for stage in ("first", "second")]
    return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]


def test_finished_stages_are_skipped_and_stages_after_a_new_one_are_not(tmp_path: Path) -> None:
    pipeline.run(chain(), tmp_path)
    assert starts(tmp_path) == [1, 1]
    pipeline.run(chain(), tmp_path)
    assert starts(tmp_path) == [1, 1]
    shutil.rmtree(tmp_path / "first")
    pipeline.run(chain(), tmp_path)
    assert starts(tmp_path) == [1, 2]


def test_a_changed_stage_is_redone_alone_and_only_when_asked_for(tmp_path: Path) -> None:
    pipeline.run(chain(), tmp_path)
    with pytest.raises(ConfigError, match="SEED_VALUE: there 0, now 1"):
        pipeline.run(chain(seed=1), tmp_path)
    pipeline.run(chain(seed=1, overwrite=True), tmp_path)
    assert starts(tmp_path) == [1, 2]


def announced(job: Job, run_dir: Path) -> list[str]:
    """What a dry run says of each stage."""
    said: list[str] = []
    again: list[str] = []
    for stage in stage_jobs(job, run_dir, compose_stage):
        said.append(stage_folder.expected(stage, run_dir, overwrite=job.config.RUN.OVERWRITE, again=again))
        again += [stage.name] if said[-1].startswith("starts again") else []
    return said


def test_a_dry_run_says_what_the_start_does(tmp_path: Path) -> None:
    assert announced(chain(), tmp_path) == ["to do", "to do"]
    with pytest.raises(DataError):
        pipeline.run(chain("mistake"), tmp_path)
    assert announced(chain(), tmp_path) == ["finished", "goes on"]
    pipeline.run(chain(), tmp_path)
    assert announced(chain(), tmp_path) == ["finished", "finished"]
    changed = chain(seed=1, overwrite=True)
    assert announced(changed, tmp_path) == ["finished", "starts again: it differs from the one in its folder"]
    both = changed.model_copy(update={"config": changed.config.model_copy(update={"SEED_VALUE": 2})})
    assert [line.split(":")[0] for line in announced(both, tmp_path)] == ["starts again", "starts again"]
    shutil.rmtree(tmp_path / "first")
    assert announced(chain(), tmp_path) == ["to do", "starts again: its inputs were made anew"]


def test_another_number_of_clusters_makes_no_other_teacher() -> None:
    def job(engine: str, clusters: int, epochs: int) -> Job:
        config = {"CLUSTERFIT": {"NUM_CLUSTERS": clusters}, "OPTIMIZER": {"NUM_EPOCHS": epochs}}
        return Job.model_validate({"engine_name": engine, "config": config})

    assert config_hash(job("train", 4, 2)) == config_hash(job("train", 5, 2)) != config_hash(job("train", 4, 3))
    assert config_hash(job("cluster_features", 4, 2)) == config_hash(job("cluster_features", 4, 3))
    assert config_hash(job("cluster_features", 4, 2)) != config_hash(job("cluster_features", 5, 2))
    assert config_hash(job("endings", 4, 2)) != config_hash(job("endings", 5, 2))  # a plugin may read everything


def test_an_unfinished_stage_does_not_go_on_with_other_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        pipeline.run(chain("mistake"), tmp_path)
    saved = tmp_path / "second" / "checkpoints"
    saved.mkdir()
    known = json.loads((tmp_path / "second" / "inputs.json").read_text())
    with pytest.raises(DataError):
        pipeline.run(chain("mistake"), tmp_path)
    assert saved.is_dir()  # the same inputs: it goes on
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(DataError):
        pipeline.run(chain("mistake"), tmp_path)
    assert not saved.exists()
    assert json.loads((tmp_path / "second" / "inputs.json").read_text()) != known
