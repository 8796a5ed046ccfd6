"""The two-stage model on timm and transformers backbones as the original computes it: every recorded run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.numerics.part_vectors import Vectors, build, check_gradients, close, divided, load, options
from vissl_like.errors import DataError
from vissl_like.models.parts import PartNoise
from vissl_like.models.two_stage import TwoStage, TwoStageOutput

TIMM, HF = Vectors("parts_model"), Vectors("hf_dinov2")
LIBRARIES = {"timm": TIMM, "hf": HF}


def as_recorded(vectors: Vectors) -> dict[str, Any]:
    """The original draws noise twice and at evaluation too. Recorded runs are without dropout but for one."""
    layers = {
        name.upper(): vectors.settings[name]
        for name in ("modulation_type", "classifier_type")
        if name in vectors.settings
    }
    return {
        **layers,
        "NUM_PARTS": vectors.settings["K"], "SOFTMAX_TEMPERATURE": vectors.settings["tau"], "EVAL_GUMBEL": True,
        "SHARED_GUMBEL": False, "PART_DROPOUT": 0.0, "PART_DROPOUT_STAGE_2": 0.0,
    }  # fmt: skip


def two_stage(library: str, folder: Path, **parts: Any) -> TwoStage:
    vectors = LIBRARIES[library]
    wanted = options(vectors.trunk, as_recorded(vectors) | parts)
    model = build("two_stage", wanted, num_classes=vectors.num_classes, image_size=vectors.image_size)
    report = load(model, vectors.below("sd/"), folder, preset="ifam")
    assert len(report.rows) == len(divided(vectors.below("sd/"), preset="ifam"))
    return model


def noise_of(vectors: Vectors, run: str) -> PartNoise:
    """Recorded noise, else zeros; recorded dropout, if there is any."""
    zero = torch.zeros_like(vectors["eval/zero/maps"])
    first, second = vectors.get(f"{run}/noise_0"), vectors.get(f"{run}/noise_1")
    return PartNoise(
        maps=zero if first is None else first,
        mask=zero if second is None else second,
        keep_mask=vectors.get(f"{run}/drop_0"),
        keep_scores=vectors.get(f"{run}/drop_1"),
    )


def check_output(output: TwoStageOutput, vectors: Vectors, run: str) -> None:
    one = output.stage_one
    close(output.logits, vectors[f"{run}/logits_stage2"], "feature", "logits_stage2")
    close(one.maps, vectors[f"{run}/maps"], "map", "maps")
    close(one.features, vectors[f"{run}/features_mod"], "feature", "features")
    close(one.scores, vectors[f"{run}/scores"], "feature", "scores")
    close(one.part_dot, vectors[f"{run}/part_dot"], "feature", "part_dot")
    close(output.mask_soft, vectors[f"{run}/mask_soft"], "map", "mask_soft")
    assert torch.equal(output.mask_hard, (vectors[f"{run}/mask_hard"] > 0.5).float())


@pytest.mark.parametrize("run", ["eval/zero", "eval/rec"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_evaluation(library: str, run: str, tmp_path: Path) -> None:
    vectors = LIBRARIES[library]
    model = two_stage(library, tmp_path).eval()
    with torch.no_grad():
        check_output(model(vectors["image"], noise=noise_of(vectors, run)), vectors, run)


def test_evaluation_without_noise_needs_no_option(tmp_path: Path) -> None:
    """By default evaluation is free of noise; the original's runs with noise set to zero are the same."""
    model = two_stage("timm", tmp_path, EVAL_GUMBEL=False, SHARED_GUMBEL=True).eval()
    with torch.no_grad():
        check_output(model(TIMM["image"]), TIMM, "eval/zero")
        check_output(model(TIMM["image"]), TIMM, "eval/nogumbel")


def test_without_gumbel_only_the_mask_has_noise(tmp_path: Path) -> None:
    model = two_stage("timm", tmp_path, GUMBEL_SOFTMAX=False).eval()
    noise = PartNoise(mask=torch.zeros_like(TIMM["eval/zero/maps"]))
    with torch.no_grad():
        check_output(model(TIMM["image"], noise=noise), TIMM, "eval/nogumbel")
        one, two = model(TIMM["image"]), model(TIMM["image"])
    assert torch.equal(one.stage_one.maps, two.stage_one.maps)
    assert not torch.equal(one.mask_soft, two.mask_soft)


@pytest.mark.parametrize(
    ("run", "parts"), [(f"eval/remove_{i}", parts) for i, parts in enumerate(TIMM.settings["remove"])]
)
def test_removed_parts(run: str, parts: list[int], tmp_path: Path) -> None:
    """The original writes infinities into the returned maps; here they stay as they are."""
    model = two_stage("timm", tmp_path).eval()
    with torch.no_grad():
        output = model(TIMM["image"], noise=noise_of(TIMM, "eval/zero"), remove=parts)
    close(output.logits, TIMM[f"{run}/logits_stage2"], "feature")
    assert torch.equal(output.mask_hard, TIMM[f"{run}/mask_hard"])
    close(output.stage_one.maps, TIMM["eval/zero/maps"], "map")
    assert torch.isfinite(output.mask_soft).all()
    by_option = two_stage("timm", tmp_path, REMOVE_PARTS=parts, EVAL_GUMBEL=False, SHARED_GUMBEL=True).eval()
    with torch.no_grad():
        assert torch.equal(by_option(TIMM["image"]).mask_hard, output.mask_hard)


def thresholds(folder: Path) -> dict[str, Any]:
    file = folder / "0.9.json"
    file.write_text(json.dumps({str(k): float(theta) for k, theta in enumerate(TIMM["eval/threshold/theta"])}))
    return {"PART_LOGITS_THRESHOLD_PATH": str(file)}


def test_thresholds_of_the_original(tmp_path: Path) -> None:
    model = two_stage("timm", tmp_path, PART_LOGITS_THRESHOLD_METRIC="dot", **thresholds(tmp_path)).eval()
    with torch.no_grad():
        output = model(TIMM["image"], noise=noise_of(TIMM, "eval/zero"))
    check_output(output, TIMM, "eval/threshold")


def test_thresholds_leave_other_tokens_alone(tmp_path: Path) -> None:
    """By distance: where every part passes, the maps are those without thresholds; where one fails, it has none."""
    model = two_stage("timm", tmp_path, EVAL_GUMBEL=False, SHARED_GUMBEL=True, **thresholds(tmp_path)).eval()
    with torch.no_grad():
        found = model(TIMM["image"])
    dot, plain = found.stage_one.part_dot[:, :-1], TIMM["eval/zero/maps"]
    below = dot < TIMM["eval/threshold/theta"][:, None, None]
    assert below.any() and not below.all()
    assert (found.stage_one.maps[:, :-1][below] == 0).all()
    kept = torch.cat([plain[:, :-1].masked_fill(below, 0), plain[:, -1:]], dim=1)
    close(found.stage_one.maps, kept / kept.sum(dim=1, keepdim=True), "map")
    assert torch.isfinite(found.stage_one.maps).all() and torch.isfinite(found.logits).all()
    model.train()  # thresholds are for evaluation
    with torch.no_grad():
        close(model(TIMM["image"], noise=noise_of(TIMM, "train/zero")).stage_one.maps, TIMM["train/zero/maps"], "map")


@pytest.mark.parametrize(
    "text", ["", "[1, 2, 3, 4]", '{"0": 1, "1": 1, "2": 1}', '{"0": 1, "1": 1, "2": 1, "3": "x"}', '{"0":1,"1":1,"2":1,"4":1}']
)  # fmt: skip
def test_malformed_thresholds_name_the_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "theta.json"
    file.write_text(text)
    with pytest.raises(DataError, match=str(file)):
        two_stage("timm", tmp_path, PART_LOGITS_THRESHOLD_PATH=str(file))


@pytest.mark.parametrize("library", LIBRARIES)
def test_given_masks(library: str, tmp_path: Path) -> None:
    vectors = LIBRARIES[library]
    model = two_stage(library, tmp_path).eval()

    def logits(mask: torch.Tensor) -> torch.Tensor:
        both = torch.stack([mask, 1 - mask], dim=1).unflatten(2, vectors["eval/zero/maps"].shape[2:])
        with torch.no_grad():
            return model.stage_two(vectors["image"], soft=both, hard=both)

    close(logits(vectors["given/mask"]), vectors["given/logits_stage2"], "feature")
    nothing = vectors.get("given/logits_stage2_allbg")
    if nothing is not None:
        close(logits(torch.zeros_like(vectors["given/mask"])), nothing, "feature")


def test_soft_masks(tmp_path: Path) -> None:
    model = two_stage("timm", tmp_path, USE_SOFT_MASKS=True).eval()
    with torch.no_grad():
        output = model(TIMM["image"], noise=noise_of(TIMM, "eval/zero"))
    close(output.logits, TIMM["eval/softmask/logits_stage2"], "feature")


@pytest.mark.parametrize("library", LIBRARIES)
def test_backbone_features(library: str, tmp_path: Path) -> None:
    vectors = LIBRARIES[library]
    trunk = two_stage(library, tmp_path).eval().trunk["stage_1"]
    with torch.no_grad():
        if library == "timm":
            close(trunk.maps(vectors["image"]).flatten(2).transpose(1, 2), vectors["eval/patch_features"], "feature")
        else:
            close(trunk.tokens(vectors["image"]), vectors["library/last_hidden_state"], "feature")


RUNS = {
    "timm": ["train/zero", "train/rec", "train/rec_drop", "train/softmask_zero"],
    "hf": ["train/zero"],
}


@pytest.mark.parametrize(("library", "run"), [(library, run) for library, runs in RUNS.items() for run in runs])
def test_training(library: str, run: str, tmp_path: Path) -> None:
    vectors = LIBRARIES[library]
    dropout = vectors.settings["dropout2"] if run.endswith("drop") else 0.0
    parts = {"PART_DROPOUT": dropout, "PART_DROPOUT_STAGE_2": dropout, "USE_SOFT_MASKS": "softmask" in run}
    model = two_stage(library, tmp_path, **parts).train()
    output = model(vectors["image"], noise=noise_of(vectors, run))
    check_output(output, vectors, run)
    losses = [
        F.cross_entropy(output.logits, vectors["label"]),
        F.cross_entropy(output.stage_one.logits, vectors["label"]),
    ]
    if library == "timm":
        losses.append(output.stage_one.maps.square().mean())
        close(torch.stack(losses), vectors[f"{run}/loss"], "map")
    torch.stack(losses).sum().backward()
    check_gradients(model, vectors.below(f"{run}/grad/"), preset="ifam")


@pytest.mark.parametrize(
    ("soft", "reached"), [(False, 0), (True, TIMM.record["stage1_params_reached_by_stage2_loss_soft_mask"])]
)
def test_what_the_second_loss_reaches(soft: bool, reached: int, tmp_path: Path) -> None:
    model = two_stage("timm", tmp_path, USE_SOFT_MASKS=soft).train()
    output = model(TIMM["image"], noise=noise_of(TIMM, "train/zero"))
    F.cross_entropy(output.logits, TIMM["label"]).backward()
    found = [
        name
        for name, value in model.named_parameters()
        if "stage_1" in name and value.grad is not None and value.grad.any()
    ]
    assert len(found) == reached
