"""Real trainings: several processes, accumulated batches, frozen trunks, rotations, tests alone, losses that explode."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.integration.training_runs import launch, losses, records, results
from vissl_like.core import checkpoint

#: A model without batch statistics or noise, so that processes can be compared.
PLAIN = ["config.MODEL.TRUNK.NAME=raw_pixels", "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[auto,32,auto]}]]",
         "config.OPTIMIZER.PARAM_SCHEDULERS.LR.START_VALUE=0.002", "config.DATA.TRAIN.NUM_SYNTHETIC=44"]  # fmt: skip
#: What each of two processes takes for the batch of one.
HALF = "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=4"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, 8 images a step, 44 images: the last step has 4."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    done = launch(run_dir, *PLAIN)
    assert done.returncode == 0, done.stderr
    return run_dir


def test_two_processes_equal_one(tmp_path: Path, alone: Path) -> None:
    profile = [
        "config.PROFILE.ENABLED=true",
        "config.PROFILE.RANKS=[1]",
        "config.PROFILE.WAIT=1",
        "config.PROFILE.STEPS=3",
    ]
    done = launch(tmp_path / "two", *PLAIN, HALF, *profile, ranks=2)
    assert done.returncode == 0, done.stderr
    assert_profiled(tmp_path / "two" / "profile")
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=1e-6)
    one, both = results(alone), results(tmp_path / "two")
    for key in ("train_top_1", "test_top_1"):
        assert both[key] == one[key]
    assert both["test_loss"] == pytest.approx(one["test_loss"], rel=1e-5)
    assert both["train_loss"] == pytest.approx(one["train_loss"], rel=1e-6)


def assert_profiled(folder: Path) -> None:
    """By the second process alone; its speed is that of both."""
    assert {file.name for file in folder.iterdir()} == {
        "profile_rank_1.json", "summary_rank_1.txt", "trace_rank_1.json.gz",
    }  # fmt: skip
    found = json.loads((folder / "profile_rank_1.json").read_text())
    assert (found["rank"], found["processes"], found["steps"]) == (1, 2, [2, 4])
    assert found["images_per_s"] * found["step_ms"] / 1000 == pytest.approx(8, rel=1e-9)


def test_accumulation_equals_the_larger_batch(tmp_path: Path, alone: Path) -> None:
    parts = ["config.OPTIMIZER.ACCUMULATE_STEPS=4", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=2"]
    done = launch(tmp_path / "parts", *PLAIN, *parts)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "parts") == pytest.approx(losses(alone), rel=1e-5)


def test_two_processes_stop_together_and_resume_as_one(tmp_path: Path, alone: Path) -> None:
    """SIGTERM to all, loader processes too: both save at the same step. Then one goes on with the same global batch."""
    run_dir = tmp_path / "run"
    loaders = "config.DATA.NUM_DATALOADER_WORKERS=1"
    stopped = launch(run_dir, *PLAIN, HALF, loaders, env={"SIGNAL_AFTER": "3"}, ranks=2)
    assert stopped.returncode == 75, stopped.stderr
    step = checkpoint.saved_steps(run_dir)[-1]
    assert 3 <= step <= 6
    saved = checkpoint.newest(run_dir)
    assert saved is not None and len(saved.training_state()["ranks"]) == 2
    done = launch(run_dir, *PLAIN)
    assert done.returncode == 0, done.stderr
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-6)
    assert results(run_dir)["train_top_1"] == results(alone)["train_top_1"]


def test_another_global_batch_is_no_resumption(tmp_path: Path) -> None:
    assert launch(tmp_path / "run", *PLAIN, env={"KILL_AFTER": "8"}).returncode == -9
    other = launch(tmp_path / "run", *PLAIN, HALF)
    assert other.returncode == 2
    assert "there 8, now 4" in other.stderr and "Traceback" not in other.stderr


def test_heads_on_a_frozen_trunk(tmp_path: Path, alone: Path) -> None:
    """Linear evaluation of several layers at once: the trunk and its statistics do not move, each head has its meter."""
    teacher = tmp_path / "teacher"
    assert launch(teacher).returncode == 0
    pools = "[[conv1,[AvgPool2d,[[4,4],4,0]]],[res4avg,[Identity,[]]]]"
    done = launch(
        tmp_path / "probe",
        f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={teacher}",
        "config.MODEL.FEATURE_EVAL_SETTINGS.EVAL_MODE_ON=true",
        "config.MODEL.FEATURE_EVAL_SETTINGS.FREEZE_TRUNK_ONLY=true",
        f"config.MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP={pools}",
        "config.MODEL.HEAD.PARAMS=[[eval_mlp,{in_channels:16,dims:[auto,auto]}],[mlp,{dims:[auto,auto]}]]",
    )
    assert done.returncode == 0, done.stderr
    assert {"test_top_1_conv1", "test_top_1_res4avg"} <= results(tmp_path / "probe").keys()
    before, after = (
        load_file(folder / "checkpoints" / "last" / "model.safetensors") for folder in (teacher, tmp_path / "probe")
    )
    trunk = [name for name in before if name.startswith("trunk.") and "num_batches_tracked" not in name]
    assert trunk and all(before[name].equal(after[name]) for name in trunk)
    report = json.loads((tmp_path / "probe" / "weights_report.json").read_text())
    assert report["trunk"]["share"] == 1.0


def test_rotations_give_four_classes(tmp_path: Path) -> None:
    size = "{name: Resize, size: [28, 28]}, {name: ToTensor}]"
    rotate = f"[{{name: ImgRotatePil, num_angles: 4, num_rotations_per_img: 1}}, {size}"
    splits = [f"config.DATA.{split}.TRANSFORMS={rotate}" for split in ("TRAIN", "TEST")]
    done = launch(tmp_path / "run", *splits, "config.OPTIMIZER.NUM_EPOCHS=1")
    assert done.returncode == 0, done.stderr
    state = load_file(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors")
    last = [value for name, value in state.items() if name.startswith("heads.") and name.endswith("bias")][-1]
    assert len(last) == 4


def test_tests_alone_repeat_the_last_test(tmp_path: Path) -> None:
    assert launch(tmp_path / "run").returncode == 0
    done = launch(
        tmp_path / "again", "config.TEST_ONLY=true", f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={tmp_path / 'run'}"
    )
    assert done.returncode == 0, done.stderr
    first, again = results(tmp_path / "run"), results(tmp_path / "again")
    assert again["test_top_1"] == first["test_top_1"] and again["test_loss"] == first["test_loss"]
    assert not os.path.exists(tmp_path / "again" / "checkpoints")


def test_augmentation_on_the_device(tmp_path: Path) -> None:
    """The same images with two processes, loader processes or after a kill: their numbers come from row and epoch."""
    colours = "{name: ColorJitter, brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1}, {name: RandomGrayscale}"
    blur = "{name: RandomApply, transforms: [{name: GaussianBlur, kernel_size: 5}], p: 0.5}"
    transforms = f"[{{name: RandomResizedCrop, size: 28}}, {colours}, {blur}, {{name: ToTensor}}]"
    wanted = [*PLAIN, f"config.DATA.TRAIN.TRANSFORMS={transforms}", "config.DATA.AUGMENT_ON_DEVICE=true"]
    for name in ("one", "plain"):
        done = launch(tmp_path / name, *wanted, f"config.DATA.AUGMENT_ON_DEVICE={str(name == 'one').lower()}")
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "one"), rel=0.05)
    done = launch(tmp_path / "two", *wanted, HALF, ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    loaders = "config.DATA.NUM_DATALOADER_WORKERS=1"
    assert launch(tmp_path / "killed", *wanted, loaders, env={"KILL_AFTER": "5"}).returncode == -9
    assert launch(tmp_path / "killed", *wanted, loaders).returncode == 0
    one, killed = (
        load_file(tmp_path / name / "checkpoints" / "last" / "model.safetensors") for name in ("one", "killed")
    )
    assert all(one[name].equal(killed[name]) for name in one)


def test_exploding_loss_leaves_a_bundle(tmp_path: Path) -> None:
    done = launch(tmp_path / "run", *PLAIN, "config.OPTIMIZER.PARAM_SCHEDULERS.LR.START_VALUE=1e18")
    assert done.returncode == 2
    assert "loss is" in done.stderr and "Traceback" not in done.stderr
    (bundle,) = (tmp_path / "run" / "replay").iterdir()
    assert sorted(file.name for file in bundle.iterdir()) == ["batch.safetensors", "info.json", "model.safetensors"]


def test_wrong_label_names_the_numbers(tmp_path: Path) -> None:
    done = launch(tmp_path / "run", *PLAIN, "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[auto,3]}]]")
    assert done.returncode == 2
    assert "3 outputs, but the labels have 4 classes" in done.stderr


def test_best_and_epoch_records(alone: Path) -> None:
    kinds = [line["kind"] for line in records(alone)]
    assert kinds.count("train_epoch") == kinds.count("test") == 2
    tests = {line["step"]: line["test_top_1"] for line in records(alone) if line["kind"] == "test"}
    found = results(alone)
    assert found["best_test_top_1"] == max(tests.values()) and tests[found["best_step"]] == max(tests.values())
