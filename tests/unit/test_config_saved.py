"""config.yaml: written, read, compared."""

import resource
from pathlib import Path

import pytest
import yaml

from vissl_like.config.check import load_job
from vissl_like.config.saved import config_hash, differences, read_job, relevant, write_job
from vissl_like.config.schema import Job
from vissl_like.errors import ConfigError, DataError
from vissl_like.files import read_yaml


def job(*overrides: str) -> Job:
    return load_job(["config=debug/supervised_synthetic", *overrides]).job


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    given = job(
        "config.OPTIMIZER.EPS=1e-12",
        "config.RUN.NAME='ä: #x'",
        "config.MODEL.GRAD_CLIP.NORM_TYPE=inf",
        "config.OPTIMIZER.PARAM_SCHEDULERS.WEIGHT_DECAY.NAME=cosine",
    )
    write_job(given, tmp_path)
    assert read_job(tmp_path) == given


def test_libyaml_reads_what_python_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that look like numbers, dates and marks; numbers at their ends; and with a PyYAML that has no libyaml."""
    texts = [
        "",
        "1e-3",
        "2026-01-02",
        "1:30",
        "0x1",
        "yes",
        "~",
        "a: b #c",
        "- x",
        "'\"",
        "ä漢😀\u2028",
        " a \n\n\tb " * 30,
    ]
    values = {"texts": texts, "numbers": [1e-300, -0.0, float("inf"), 2**70, True, None], "empty": [{}, []]}
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True, width=120), encoding="utf-8")
    assert read_yaml(file) == values
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert read_yaml(file) == values


def test_what_is_no_run_folder_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run folder"):
        read_job(tmp_path)
    (tmp_path / "config.yaml").write_text("config: {A: 1}\n")
    with pytest.raises(ConfigError, match="cannot be read as the configuration of a run"):
        read_job(tmp_path)


@pytest.mark.parametrize(
    "override",
    [
        "config.LOG_FREQUENCY=7",
        "config.RUN.PROGRESS=none",
        "config.DATA.NUM_DATALOADER_WORKERS=3",
        "config.DISTRIBUTED.NUM_PROC_PER_NODE=2",
        "config.CHECKPOINT.KEEP=9",
        "config.LOGGERS.WANDB.PROJECT=x",
        "config.MACHINE.NUM_THREADS=1",
    ],
)
def test_keys_that_change_no_result_may_differ(override: str) -> None:
    assert config_hash(job()) == config_hash(job(override))


def test_keys_that_change_results_are_named() -> None:
    other = job("config.SEED_VALUE=4", "config.MODEL.TRUNK.OPTIONS.width=8")
    assert config_hash(job()) != config_hash(other)
    assert differences(relevant(job()), relevant(other)) == [
        "config.SEED_VALUE: there 0, now 4",
        "config.MODEL.TRUNK.OPTIONS: there {}, now nothing",
        "config.MODEL.TRUNK.OPTIONS.width: there nothing, now 8",
    ]


def test_the_same_steps_by_other_numbers_are_the_same_run() -> None:
    """16 images on one process, or 8 on two: the same images per optimizer step."""
    halves = job("config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=8", "config.DISTRIBUTED.NUM_PROC_PER_NODE=2")
    assert config_hash(job(), global_batch=16) == config_hash(halves, global_batch=16)
    assert config_hash(job(), global_batch=16) != config_hash(job(), global_batch=32)
    assert config_hash(job()) != config_hash(halves)


def test_another_engine_is_another_run() -> None:
    assert config_hash(job()) != config_hash(job("engine_name=extract_features"))


def test_a_write_that_breaks_off_leaves_the_former_file(tmp_path: Path) -> None:
    """A launch that was killed while it wrote config.yaml left half of it, and the next one refused the folder."""
    write_job(job(), tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(DataError, match=r"config\.yaml"):
            write_job(job("config.RUN.NAME=other"), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert read_job(tmp_path) == job()
