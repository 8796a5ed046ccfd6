"""Loading decisions of the original's MODEL.WEIGHTS_INIT, all recorded cases, and its position-table values.

Where we decide otherwise on purpose, the case is listed here by reason and our documented behaviour is checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vissl_like.config.schema_model import FeatureEval, WeightsInit
from vissl_like.core.weights import load_initial_weights, resample_positions, state_shapes
from vissl_like.core.weights_files import WeightsFile, find_state_dict
from vissl_like.core.weights_plan import LoadPlan, Status, plan_loading
from vissl_like.core.weights_rules import KeyRules
from vissl_like.errors import WeightsError

DATA = Path(__file__).parents[1] / "data"
ARRAYS = np.load(DATA / "weights_init.npz", allow_pickle=False)
CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads((DATA / "weights_init.json").read_text())["cases"]
}

#: base_model is not part of a name: keys with and without it are the same, in both modes.
BASE_MODEL = {
    "documented_prefix_in_extractor_mode",
    "documented_prefix_in_train_mode",
    "documented_prefix_in_extractor_mode_strict",
    "trunk_dot_twice_extractor",
    "classy_mixed_base_model_to_extractor",
    *(f"random_{n:02d}" for n in (6, 8, 10, 12, 17, 18, 20, 23, 24, 25, 27, 28, 29, 31, 33, 34, 36)),
}
#: The same, but what differs is only which tensors count as skipped or unexpected.
BASE_MODEL_UNUSED = {"random_07", "random_11", "random_16"}
#: Two names of the file become one once base_model does not count: the second is used, and the report says so.
BASE_MODEL_CLASH = {"random_04"}
#: Every position table is resampled, whatever it is called and whatever trunk it belongs to.
POSITIONS = {"pos_without_hook", "pos_embed_name_is_not_covered"}
DIFFERENT = BASE_MODEL | BASE_MODEL_UNUSED | BASE_MODEL_CLASH | POSITIONS

#: The original's errors, in our words.
ERRORS = {"Exception": "incompatible", "AssertionError": "shape", "RuntimeError": "shape"}


def tensors(node: dict[str, Any]) -> dict[str, Any]:
    return {key: tensors(value) if isinstance(value, dict) else torch.zeros(value) for key, value in node.items()}


def opened(case: dict[str, Any]) -> WeightsFile:
    return find_state_dict(tensors(case["checkpoint"]), key_name=case["weights_init"]["STATE_DICT_KEY_NAME"])


def decided(case: dict[str, Any]) -> tuple[LoadPlan, dict[str, str]]:
    """Our plan for a case, and {model key: path in the checkpoint} as the vectors write it."""
    options, feature_eval = case["weights_init"], case["feature_eval_settings"]
    file = opened(case)
    prefixes = KeyRules(remove=options["REMOVE_PREFIX"], append=options["APPEND_PREFIX"])
    plan = plan_loading(
        state_shapes(file.tensors),
        {key: tuple(shape) for key, shape in case["model"].items()},
        rules=KeyRules() if file.is_classy else prefixes,
        skip=options["SKIP_LAYERS"],
        load_heads=not feature_eval["EVAL_MODE_ON"] or feature_eval["EVAL_TRUNK_AND_HEAD"],
    )
    return plan, {key: path_of(file, name) for key, name in plan.loaded.items()}


def path_of(file: WeightsFile, name: str) -> str:
    if not file.is_classy:
        return "::".join([*file.path, name])
    part, _, rest = name.partition(".")
    return "::".join([*file.path, "base_model", "model", part, rest])


def error_of(case: dict[str, Any], plan: LoadPlan) -> str | None:
    if plan.incompatible:
        return "incompatible"
    assert_heads = case["feature_eval_settings"]["ASSERT_HEAD_LAYER_SHAPE_INIT"]
    return "shape" if plan.errors_in_shape(assert_heads=assert_heads) else None


def keys(plan: LoadPlan, status: Status) -> list[str]:
    return [row.model_key for row in plan.of(status)]


@pytest.mark.parametrize("name", sorted(set(CASES) - DIFFERENT))
def test_same_decisions(name: str) -> None:
    case = CASES[name]
    expected = case["expected"]
    error = expected["error"] or {"type": "", "message": ""}
    if error["message"].startswith("Unknown state dict key"):
        with pytest.raises(WeightsError, match="there is no key .*Keys there: "):
            opened(case)
        return
    plan, loaded = decided(case)
    assert error_of(case, plan) == ERRORS.get(error["type"])
    if error["type"] in ERRORS:  # the original stops in the middle; we decide on everything first, then copy nothing
        assert expected["loaded"].items() <= loaded.items() or plan.incompatible
        return
    resampled = expected["loaded_with_changed_values"]
    assert {key: path for key, path in loaded.items() if key not in resampled} == expected["loaded"]
    assert set(resampled) <= set(loaded)
    assert keys(plan, Status.SKIPPED) == expected["ignored"]
    assert keys(plan, Status.MISSING) == expected["not_found"]
    if expected["extra_checkpoint_keys"] is not None:
        assert len(plan.of(Status.UNEXPECTED)) == len(expected["extra_checkpoint_keys"])


@pytest.mark.parametrize("name", sorted(BASE_MODEL | BASE_MODEL_UNUSED))
def test_base_model_is_not_part_of_a_name(name: str) -> None:
    """All that the original loads, and beyond it only pairs that are equal but for base_model."""
    case = CASES[name]
    plan, loaded = decided(case)
    assert case["expected"]["loaded"].items() <= loaded.items()
    options = case["weights_init"]
    added = set(loaded.items()) - set(case["expected"]["loaded"].items())
    assert bool(added) == (name in BASE_MODEL)
    for key, path in added:
        file_name = path.removeprefix("classy_state_dict::base_model::model::").replace("trunk::", "trunk.")
        renamed = options["APPEND_PREFIX"] + file_name.removeprefix(options["REMOVE_PREFIX"])
        assert key.replace("base_model.", "") == renamed.replace("base_model.", "")
    ignored = set(case["expected"]["ignored"])
    assert all(key in ignored or "heads" in key for key in keys(plan, Status.SKIPPED))


def test_clash_of_names_is_said() -> None:
    plan, loaded = decided(CASES["random_04"])
    assert plan.notes == ("enc.a and enc.base_model.a both become trunk.a; the second is used",)
    assert loaded == {"trunk.base_model.a": "enc.base_model.a"}
    assert [row.model_key for row in plan.errors_in_shape(assert_heads=True)] == ["trunk.a"]


@pytest.mark.parametrize("name", sorted(POSITIONS))
def test_every_position_table_is_resampled(name: str) -> None:
    plan, _ = decided(CASES[name])
    assert [row.status for row in plan.rows] == [Status.RESAMPLED]


class Fake(nn.Module):
    """A model with given tensors under trunk.* and heads.*."""

    def __init__(self, shapes: dict[str, Any]) -> None:
        super().__init__()
        for key, shape in shapes.items():
            module: nn.Module = self
            *path, last = key.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            value = torch.full(shape, -1.0)
            if shape:
                module.register_parameter(last, nn.Parameter(value))
            else:
                module.register_buffer(last, value)


def load(case: dict[str, Any], content: Any, folder: Path, *, min_loaded: float) -> Fake:
    model = Fake(case["model"])
    path = folder / "weights.pth"
    torch.save(content, path)
    options = WeightsInit(PARAMS_FILE=str(path), MIN_LOADED=min_loaded, **case["weights_init"])
    load_initial_weights(model, options, feature_eval=FeatureEval(**case["feature_eval_settings"]))
    return model


@pytest.mark.parametrize("name", ["pos_up", "pos_down", "pos_same"])
def test_position_values(name: str, tmp_path: Path) -> None:
    table = torch.from_numpy(ARRAYS[f"{name}__in"])
    model = load(CASES[name], {"trunk.pos_embedding": table}, tmp_path, min_loaded=0.9)
    torch.testing.assert_close(
        model.state_dict()["trunk.pos_embedding"], torch.from_numpy(ARRAYS[f"{name}__out"]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["vit_forward_up", "vit_forward_up2"])
def test_position_values_with_class_token(name: str) -> None:
    table, expected = (torch.from_numpy(ARRAYS[f"{name}__{what}"]) for what in ("in", "out"))
    side = round((expected.shape[1] - 1) ** 0.5)
    torch.testing.assert_close(resample_positions(table, prefix=1, grid=(side, side)), expected, rtol=0, atol=1e-5)


def test_numpy_and_half_precision_are_copied(tmp_path: Path) -> None:
    case = CASES["numpy_checkpoint"]
    model = load(case, {"trunk.a": np.arange(4.0, dtype=np.float32).reshape(2, 2)}, tmp_path, min_loaded=1.0)
    assert torch.equal(model.state_dict()["trunk.a"], torch.arange(4.0).reshape(2, 2))
    case = CASES["half_precision_checkpoint"]
    model = load(case, {"trunk.a": torch.tensor([1.5, 2.5], dtype=torch.float16)}, tmp_path, min_loaded=1.0)
    assert torch.equal(model.state_dict()["trunk.a"], torch.tensor([1.5, 2.5]))


@pytest.mark.parametrize("name", ["moco_style_remove_not_set", "ddp_module", "strict_missing"])
def test_too_little_is_an_error(name: str, tmp_path: Path) -> None:
    """Without strict the original starts training with nothing loaded; with us MIN_LOADED decides, in every mode."""
    case = CASES[name]
    content = tensors(case["checkpoint"])
    with pytest.raises(WeightsError, match="fewer than config.MODEL.WEIGHTS_INIT.MIN_LOADED=0.9"):
        load(case, content, tmp_path, min_loaded=0.9)
    loaded = load(case, content, tmp_path, min_loaded=0.0).state_dict()
    copied = {key for key, value in loaded.items() if not value.numel() or value.flatten()[0] != -1}
    assert copied == set(CASES[name]["expected"]["loaded"])


def test_untouched_heads_need_no_weights(tmp_path: Path) -> None:
    """The original's strict mode asked for heads that it would not have loaded."""
    case = CASES["strict_missing_heads_only"]
    load(case, tensors(case["checkpoint"]), tmp_path, min_loaded=1.0)


def test_nothing_is_copied_before_an_error(tmp_path: Path) -> None:
    case = CASES["shape_mismatch_trunk"]
    model = Fake(case["model"])
    path = tmp_path / "weights.pth"
    torch.save(tensors(case["checkpoint"]), path)
    options = WeightsInit(PARAMS_FILE=str(path), MIN_LOADED=0.1, **case["weights_init"])
    with pytest.raises(WeightsError, match=r"another shape than in the model: trunk.b \(file 3x2, model 2x3\)"):
        load_initial_weights(model, options, feature_eval=FeatureEval())
    assert all((value == -1).all() for value in model.state_dict().values())
