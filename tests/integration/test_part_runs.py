"""Part models on a handful of toy birds: maps drawn while they train, evaluations at one and two ranks, odd inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.integration.test_engines import job_of, run, run_ranks
from vissl_like.config.schema import Job
from vissl_like.config.schema_parts import PartsLoss
from vissl_like.data import toybirds
from vissl_like.errors import ConfigError, UserError
from vissl_like.outputs.report_parts import part_pictures
from vissl_like.outputs.run_folder import RunFolder
from vissl_like.outputs.writers import read_metrics

SIDE = 32
TRANSFORMS = [
    {"name": "Resize", "size": SIDE},
    {"name": "CenterCrop", "size": SIDE},
    {"name": "ToTensor"},
    {"name": "Normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
]
VIT = {"NAME": "timm/vit_tiny_patch16_224", "OPTIONS": {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}}


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 20 test images of 72 pixels."""
    folder = tmp_path_factory.mktemp("birds") / "cub"
    toybirds.make_folder(folder, lambda target: toybirds.write_cub(target, train=24, test=20))
    return folder


def job(engine: str, birds: Path, **changes: Any) -> Job:
    """A job on the toy birds; changes are {"DATA__TRAIN__X": value}."""
    split = {
        "DATA_SOURCES": ["cub"],
        "DATA_PATHS": [str(birds)],
        "BATCHSIZE_PER_REPLICA": 6,
        "TRANSFORMS": TRANSFORMS,
    }
    config: dict[str, Any] = {
        "RUN": {"PROGRESS": "none", "REPORT": False},
        "MACHINE": {"NUM_THREADS": 1},
        "TASK": {"NAME": "parts"},
        "DATA": {"NUM_DATALOADER_WORKERS": 0, "TRAIN": dict(split), "TEST": dict(split)},
        "MODEL": {"NAME": "parts", "TRUNK": {"NAME": "conv_stem"}, "PARTS": {"NUM_PARTS": 3}},
        "OPTIMIZER": {"NUM_EPOCHS": 3, "NAME": "adamw", "PARAM_SCHEDULERS": {"LR": {"START_VALUE": 0.001}}},
    }
    return job_of(engine, config, changes)


def drawn(run_dir: Path) -> list[str]:
    return sorted(file.name for file in (run_dir / "part_maps").iterdir())


# ------------------------------------------------------------------------------------------------- maps in a training
def test_maps_are_drawn_while_a_model_trains(birds: Path, tmp_path: Path) -> None:
    """Of epochs 1, 2 and 3 the first and every second; all four test batches, the same at any number of ranks."""
    wanted = {"PART_MAPS": {"SAVING_PROB": 1.0, "EVERY_EPOCHS": 2, "MAX_IMAGES": 2}, "MODEL__EMA": {"ENABLED": True}}
    run(job("train", birds, **wanted), tmp_path / "one")
    names = [f"{epoch:04d}_{batch:05d}.{kind}" for epoch in (1, 2, 3) for batch in range(4) for kind in ("jpg", "json")]
    assert drawn(tmp_path / "one") == names
    halves = job("train", birds, DATA__TRAIN__BATCHSIZE_PER_REPLICA=3, **wanted)
    assert run_ranks([(halves, tmp_path / "two")], tmp_path / "ranks", ranks=2) == [0, 0]
    assert drawn(tmp_path / "two") == names
    for name in names[1::2]:
        one, two = (json.loads((tmp_path / ranks / "part_maps" / name).read_text()) for ranks in ("one", "two"))
        assert one["rows"] == two["rows"] == [6 * one["batch"], 6 * one["batch"] + 1]
    newest = part_pictures(RunFolder(tmp_path / "one"))[-1]
    assert (newest.epoch, newest.batch) == (3, 3)


def test_learning_rates_of_all_groups_are_logged(birds: Path, tmp_path: Path) -> None:
    optimizer = {
        "NUM_EPOCHS": 1, "NAME": "adamw", "PARAM_GROUP_CONSTRUCTOR": "parts",
        "PARAM_SCHEDULERS": {"LR": {"NAME": "timm_cosine", "START_VALUE": 1e-6}},
        "PARTS": {"FINER_LR_FACTOR": 10, "MODULATION_LR_FACTOR": 100, "SCRATCH_LR_FACTOR": 1000},
    }  # fmt: skip
    run(job("train", birds, OPTIMIZER=optimizer, TEST_MODEL=False), tmp_path)
    first = next(line for line in read_metrics(tmp_path) if line["kind"] == "train")
    rates = {key: value for key, value in first.items() if key.startswith("lr")}
    expected = {"lr": 1, "lr_backbone": 1, "lr_prototypes": 10, "lr_modulation": 100, "lr_head": 1000}
    assert rates == pytest.approx({key: 1e-6 * factor for key, factor in expected.items()}, rel=1e-9)


def test_only_the_chosen_epochs_are_drawn(birds: Path, tmp_path: Path) -> None:
    rarely = {"SAVING_PROB": 1e-9, "EVERY_EPOCHS": 2}
    run(job("train", birds, OPTIMIZER__NUM_EPOCHS=5, PART_MAPS=rarely), tmp_path)
    assert [name for name in drawn(tmp_path) if name.endswith("jpg")] == [f"000{e}_00000.jpg" for e in (1, 2, 4, 5)]


def test_a_picture_that_cannot_be_written_does_not_end_a_training(
    birds: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "part_maps").write_text("in the way")
    found = run(job("train", birds, OPTIMIZER__NUM_EPOCHS=1), tmp_path)
    assert "test_top_1" in found
    assert "part_maps" in caplog.text and "goes on without" in caplog.text


def test_a_test_alone_draws_what_was_loaded(birds: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(job("train", birds, PART_MAPS={"SAVING_PROB": 1e-9}, TEST_ONLY=True), tmp_path)
    assert drawn(tmp_path) == ["0000_00000.jpg", "0000_00000.json"]
    assert "what is measured are random weights" in caplog.text


# ----------------------------------------------------------------------------------------------------- terms of the loss
def test_two_processes_train_as_one(birds: Path, tmp_path: Path) -> None:
    """Two stages, nothing drawn at random: both processes together have the batch of the one, and presence sees all of it.

    And where terms have no weight: DistributedDataParallel would wait in vain for what nothing has a gradient for.
    """
    calm = {
        "DEGREES": 0,
        "TRANSLATE_X": 0,
        "TRANSLATE_Y": 0,
        "SCALE_L": 1.25,
        "SCALE_U": 1.25,
        "PRESENCE_BATCH": "global",
    }
    drawn = {"GUMBEL_SOFTMAX": False, "PART_DROPOUT": 0, "PART_DROPOUT_STAGE_2": 0}
    plain = {"NAME": "sgd", "NUM_EPOCHS": 1, "PARAM_SCHEDULERS": {"LR": {"NAME": "constant", "VALUE": 0.01}}}
    shared: dict[str, Any] = {"OPTIMIZER": plain, "MODEL__TRUNK": VIT, "TEST_MODEL": False}
    two_stage: dict[str, Any] = shared | {
        "MODEL__NAME": "two_stage", "LOSS": {"PARTS": calm}, "LOG_FREQUENCY": 1,
        "MODEL__PARTS": {"NUM_PARTS": 3, "MASK_GRADIENT": "straight_through", **drawn},
    }  # fmt: skip
    masks_alone = {"LOSS": {"PARTS": {"CLASSIFICATION_LOSS": 0, "ORTHOGONALITY_LOSS_LANDMARKS": 0}}}
    networks = {"NUM_PARTS": 3, "MODULATION_TYPE": "parallel_mlp", "MODULATION_ORTH": False}
    runs = [
        (job("train", birds, DATA__TRAIN__BATCHSIZE_PER_REPLICA=3, **two_stage), tmp_path / "two"),
        (job("train", birds, MODEL__NAME="two_stage", **shared, **masks_alone), tmp_path / "masks_alone"),
        (job("train", birds, **shared, MODEL__PARTS=networks), tmp_path / "networks"),
    ]
    assert run_ranks(runs, tmp_path / "ranks", ranks=2) == [0, 0]
    run(job("train", birds, **two_stage), tmp_path / "one")
    one, two = ([line for line in read_metrics(tmp_path / name) if line["kind"] == "train"] for name in ("one", "two"))
    assert len(one) == 4
    for ours, theirs in zip(two, one, strict=True):
        terms = {key: value for key, value in theirs.items() if key.startswith("loss")}
        assert {key: ours[key] for key in terms} == pytest.approx(terms, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["parts", "two_stage", "pooled"])
def test_a_loss_without_terms_is_refused(kind: str, birds: Path, tmp_path: Path) -> None:
    nothing = {name: 0 for name in PartsLoss.model_fields if name.endswith(("_LOSS", "_LANDMARKS", "_STAGE_2"))} | {
        "USE_BCE_LOSS": False
    }
    with pytest.raises(ConfigError, match=r"nothing to learn.*=1"):
        run(job("train", birds, MODEL__NAME=kind, MODEL__TRUNK=VIT, LOSS={"PARTS": nothing}), tmp_path)


# --------------------------------------------------------------------------------------------------------- evaluations
@pytest.fixture(scope="module")
def challenge(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet-9's folders: pieces of birds on pieces of birds; the eight classes of the model are the first of nine."""
    root = tmp_path_factory.mktemp("challenge")
    files = sorted((birds / "images").glob("*/*.*"))
    mask = np.zeros((72, 72), dtype=bool)
    mask[16:56, 16:56] = True
    for number in range(18):
        image = np.asarray(Image.open(files[number]).convert("RGB"))
        kind = f"{number % 9:02}_kind"
        for shift, variant in enumerate(("original", "mixed_same", "mixed_rand", "only_bg_t")):
            file = root / variant / "val" / kind / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(image, 20 * shift, axis=0)).save(file)
        (root / "fg_mask" / "val" / kind).mkdir(parents=True, exist_ok=True)
        np.save(root / "fg_mask" / "val" / kind / f"{number}.npy", mask)
    (root / "in_to_in9.json").write_text(json.dumps({str(c): c for c in range(8)}))
    return root


def test_everything_is_measured_alike_at_one_and_two_ranks(birds: Path, challenge: Path, tmp_path: Path) -> None:
    """A two-stage model with random weights; K = 1, since a single part is the least there can be."""
    jobs = []
    for parts in (1, 3):
        jobs.append(
            job(
                "evaluate_parts",
                birds,
                MODEL__NAME="two_stage",
                MODEL__TRUNK=VIT,
                MODEL__PARTS={"NUM_PARTS": parts},
                EVALUATE_PARTS={
                    "PROTOCOLS": [
                        *("classification", "keypoints", "regression", "foreground"),
                        *("leave_one_out", "thresholds", "in9", "background_challenge", "speed"),
                    ],
                    "BACKGROUNDS": {"PATH": str(challenge)},
                    "SPEED": {"REPEATS": 2, "WARMUP": 0, "SHARES": [0.5]},
                },
            )
        )
    found = [run(one, tmp_path / f"1_{number}") for number, one in enumerate(jobs)]
    runs = [(one, tmp_path / f"2_{number}") for number, one in enumerate(jobs)]
    assert run_ranks(runs, tmp_path / "ranks", ranks=2) == [0, 0]
    for number, one in enumerate(found):
        two = json.loads((tmp_path / f"2_{number}" / "results.json").read_text())
        speeds = {key: one.pop(key) for key in list(one) if key.startswith("speed_images")}
        assert len(speeds) == 2 and all(value > 0 for value in speeds.values())
        assert one == {key: value for key, value in two.items() if key not in speeds}
        assert one["bg_gap"] == pytest.approx(one["in9_mixed_same"] - one["in9_mixed_rand"])
        assert one["bg_gap_stage_1"] == pytest.approx(one["in9_mixed_same_stage_1"] - one["in9_mixed_rand_stage_1"])
        assert one["background_challenge"] <= one["in9_original"] <= 100 * 16 / 18  # nothing is the ninth class
        for file in (tmp_path / f"1_{number}" / "thresholds").iterdir():
            assert file.read_bytes() == (tmp_path / f"2_{number}" / "thresholds" / file.name).read_bytes()
        spread = json.loads((tmp_path / f"1_{number}" / "thresholds" / "histograms.json").read_text())
        assert {sum(part["own"]) + sum(part["others"]) for part in spread.values()} == {24 * 16}  # images and cells
        table = json.loads((tmp_path / f"1_{number}" / "speed.json").read_text())
        assert [row["foreground"] for row in table["rows"]] == ["own", 0.5]
        assert table["rows"][1]["kept_tokens"] == 0.5 and table["batch"] == 6
        assert table["rows"][0]["kept_tokens"] == pytest.approx(one["speed_kept_tokens"] / 100)


def test_backgrounds_alone_need_no_other_images(birds: Path, challenge: Path, tmp_path: Path) -> None:
    """The map of classes says how many the model has, as the images that it was trained on would."""
    asked = {"PROTOCOLS": ["in9", "background_challenge"], "BACKGROUNDS": {"PATH": str(challenge)}}
    expected = run(job("evaluate_parts", birds, EVALUATE_PARTS=asked), tmp_path / "with")
    alone = {"DATA__TRAIN": {}, "DATA__TEST": {"TRANSFORMS": TRANSFORMS, "BATCHSIZE_PER_REPLICA": 6}}
    assert run(job("evaluate_parts", birds, EVALUATE_PARTS=asked, **alone), tmp_path / "without") == expected
    measured = asked | {"PROTOCOLS": ["in9", "classification"]}
    with pytest.raises(ConfigError, match=r"TEST.DATA_SOURCES=\[\]"):
        run(job("evaluate_parts", birds, EVALUATE_PARTS=measured, **alone), tmp_path / "no")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"EVALUATE_PARTS": {"PROTOCOLS": ["in9"]}}, "BACKGROUNDS.PATH is not given"),
        (
            {"MODEL__NAME": "pooled", "MODEL__TRUNK": VIT, "EVALUATE_PARTS": {"PROTOCOLS": ["thresholds"]}},
            "has no part maps, which thresholds",
        ),
        ({"MODEL__NAME": "decoupled", "MODEL__TRUNK": VIT, "EVALUATE_PARTS": {"PROTOCOLS": ["in9"]}}, "no masks for"),
        ({"EVALUATE_PARTS": {"PROTOCOLS": ["classification", "leave_one_out"]}}, "'parts' has none. Use two_stage"),
        (
            {
                "MODEL__NAME": "two_stage",
                "MODEL__TRUNK": VIT,
                "EVALUATE_PARTS": {"PROTOCOLS": ["classification", "leave_one_out"], "FIXED_PARTS": [9]},
            },
            r"FIXED_PARTS=\[9\]: there is no part 9",
        ),
        (
            {"MODEL__NAME": "pooled", "MODEL__TRUNK": VIT, "EVALUATE_PARTS": {"PROTOCOLS": ["thresholds"]}},
            "has no part maps, which thresholds of",
        ),
        (
            {"EVALUATE_PARTS": {"PROTOCOLS": ["classification", "in9"], "BACKGROUNDS": {"PATH": "."}}},
            "original/val: no such folder",
        ),
    ],
)
def test_evaluations_that_cannot_be(birds: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Said before anything is measured or drawn."""
    with pytest.raises(UserError, match=message):
        run(job("evaluate_parts", birds, **changes), tmp_path)
    assert not (tmp_path / "part_maps").exists() and not (tmp_path / "weights_report.json").exists()
