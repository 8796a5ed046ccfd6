"""The plan: every inferred value has a row with a reason, and the configuration is not touched."""

import json
from pathlib import Path

import pytest

from vissl_like.config.check import load_job
from vissl_like.config.plan import Plan, describe, make_plan, table, write_plan
from vissl_like.config.schema import Config
from vissl_like.config.schema_model import Schedule

CLUSTERFIT = "config=pretrain/clusterfit/clusterfit_resnet_8gpu_imagenet"


def config(*overrides: str, recipe: str = CLUSTERFIT) -> Config:
    return load_job([recipe, *overrides]).job.config


def plan(
    given: Config, processes: int = 1, *, device: str = "cpu", num_train: int | None = 1000, cores: int = 64
) -> Plan:
    return make_plan(given, num_processes=processes, device=device, num_train=num_train, cores=cores)


def row(found: Plan, key: str) -> tuple[str, str]:
    rows = [(one.used, one.reason) for one in found.rows if one.key == key]
    assert len(rows) == 1, key
    return rows[0]


@pytest.mark.parametrize(
    ("nodes", "processes", "lr"),
    [
        (1, 1, "multistep 0.0125, 0.00125 from 30, 0.000125 from 60, 1.25e-05 from 90, 1.25e-06 from 100"),
        (1, 8, "multistep 0.1, 0.01 from 30, 0.001 from 60, 0.0001 from 90, 1e-05 from 100"),
        (2, 16, "linear 0.1 to 0.2, then multistep 0.2, 0.02 from 30, 0.002 from 60, 0.0002 from 90, 2e-05 from 100"),
        (4, 32, "linear 0.1 to 0.4, then multistep 0.4, 0.04 from 30, 0.004 from 60, 0.0004 from 90, 4e-05 from 100"),
    ],
)
def test_learning_rate_of_four_layouts(nodes: int, processes: int, lr: str) -> None:
    """The layouts whose learning rates were recorded from VISSL."""
    given = config(f"config.DISTRIBUTED.NUM_NODES={nodes}")
    found = plan(given, processes)
    assert describe(found.lr) == lr == row(found, "OPTIMIZER.PARAM_SCHEDULERS.LR")[0]
    assert given.OPTIMIZER.PARAM_SCHEDULERS.LR.NAME == "composite"  # the configuration stays as it was
    assert bool(found.warnings) == (processes != 8)
    removed = "the warm-up would not rise and is left out" in row(found, "OPTIMIZER.PARAM_SCHEDULERS.LR")[1]
    assert removed == (nodes == 1)


def test_a_changed_learning_rate_is_a_warning_with_the_numbers() -> None:
    (warning,) = plan(config()).warnings
    assert "is 0.0125 instead of 0.1, because a step takes 32 images, not 256 (linear scaling" in warning


def test_values_that_scaling_changes_in_form_are_named() -> None:
    """VISSL goes on by the ratio of the first two values; nobody should find that out from the curve."""
    given = config(
        "config.OPTIMIZER.PARAM_SCHEDULERS.LR={NAME: multistep, VALUES: [0.1, 0.03, 0.02], MILESTONES: [2, 5], "
        "AUTO_LR_SCALING: {AUTO_SCALE: true, BASE_VALUE: 0.1, BASE_LR_BATCH_SIZE: 256}}"
    )
    (warning, *_) = plan(given, 2).warnings
    assert "the values [0.1, 0.03, 0.02] do not fall by one factor; scaling puts [0.025, 0.0075, 0.00225]" in warning


def test_heads_follow_the_learning_rate_unless_they_have_their_own() -> None:
    found = plan(config())
    assert found.lr_head == found.lr
    own = config(
        "config.OPTIMIZER.HEAD_OPTIMIZER_PARAMS.USE_DIFFERENT_LR=true",
        "config.OPTIMIZER.PARAM_SCHEDULERS.LR_HEAD={NAME: constant, VALUE: 3.0}",
    )
    assert plan(own).lr_head.VALUE == 3.0


def test_batches_and_steps() -> None:
    given = config("config.OPTIMIZER.ACCUMULATE_STEPS=2", "config.OPTIMIZER.NUM_EPOCHS=3")
    found = plan(given, 4, num_train=1000)
    assert (found.batch_per_rank, found.global_batch, found.accumulate) == (32, 256, 2)
    assert (found.steps_per_epoch, found.total_steps) == (4, 12)
    assert row(found, "images per optimizer step") == ("256", "32 x 4 processes x 2 accumulated")
    assert row(found, "steps per epoch") == ("4", "1000 images / 256, the last step is shorter")
    dropped = plan(config("config.DATA.TRAIN.DROP_LAST=true"), 1, num_train=65)
    assert row(dropped, "steps per epoch") == ("2", "65 images / 32; 1 image is left out in each epoch (DROP_LAST)")


def test_without_data_no_steps_are_promised() -> None:
    found = plan(config(), num_train=None)
    assert found.steps_per_epoch is None and found.total_steps is None


@pytest.mark.parametrize(
    ("device", "processes", "cores", "workers", "threads"),
    [
        ("cpu", 1, 2, 0, 2),
        ("cpu", 1, 16, 4, 16),
        ("cpu", 2, 16, 2, 8),
        ("gpu", 1, 16, 8, 16),
        ("gpu", 8, 16, 1, 2),
        ("gpu", 4, 2, 1, 1),
    ],
)
def test_workers_and_threads_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, device: str, processes: int, cores: int, workers: int, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    given = config("config.DATA.NUM_DATALOADER_WORKERS=-1")
    found = plan(given, processes, device=device, cores=cores)
    assert (found.num_workers, found.num_threads) == (workers, threads)
    fixed = plan(config("config.DATA.NUM_DATALOADER_WORKERS=3", "config.MACHINE.NUM_THREADS=5"), cores=cores)
    assert (fixed.num_workers, fixed.num_threads) == (3, 5)


def test_threads_respect_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert plan(config()).num_threads == 3
    assert row(plan(config()), "MACHINE.NUM_THREADS")[1] == "the environment says OMP_NUM_THREADS"


def test_device_processes_and_backend_are_explained() -> None:
    found = plan(config("config.DISTRIBUTED.NUM_PROC_PER_NODE=0"), 4, device="gpu")
    assert row(found, "MACHINE.DEVICE") == ("gpu", "PyTorch finds a GPU")
    assert row(found, "DISTRIBUTED.NUM_PROC_PER_NODE") == ("4", "one per GPU")
    assert row(found, "DISTRIBUTED.BACKEND") == ("nccl", "the device is gpu")
    assert (found.backend, found.world_size) == ("nccl", 4)


def test_other_engines_have_no_training_rows() -> None:
    found = make_plan(config(), num_processes=1, device="cpu", num_train=None, cores=2, engine_name="extract_features")
    assert not [one.key for one in found.rows if "LR" in one.key or "step" in one.key] and not found.warnings


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Schedule(NAME="constant", VALUE=0.5), "constant 0.5"),
        (Schedule(NAME="cosine", START_VALUE=0.1, END_VALUE=0), "cosine 0.1 to 0"),
        (Schedule(NAME="step", VALUES=[3, 2]), "step 3, 2"),
        (Schedule(NAME="step_with_fixed_gamma", BASE_VALUE=0.3), "step_with_fixed_gamma from 0.3"),
        (Schedule(NAME="inverse_sqrt", START_VALUE=0.2), "inverse_sqrt 0.2"),
    ],
)
def test_schedules_in_words(schedule: Schedule, words: str) -> None:
    assert describe(schedule) == words


def test_table_and_file(tmp_path: Path) -> None:
    found = plan(config()).with_row("RUN.DIR", "", "runs/x", "the recipe's name")
    assert table(found).splitlines()[1].split() == ["RUN.DIR", "runs/x", "the", "recipe's", "name"]
    write_plan(found, tmp_path)
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["rows"][0] == {"key": "RUN.DIR", "given": "", "used": "runs/x", "reason": "the recipe's name"}
    assert content["values"]["global_batch"] == 32 and content["warnings"] == list(found.warnings)


def test_more_processes_than_cores_are_a_warning() -> None:
    (first, *_) = plan(config(), 8, cores=2).warnings
    assert first.startswith("config.DISTRIBUTED.NUM_PROC_PER_NODE=8: so many processes share 2 CPU cores")
    assert not plan(config(), 8, cores=2, device="gpu").warnings
