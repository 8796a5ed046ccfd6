"""Learning rates against those that VISSL computed for its own and for made-up configurations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vissl_like.config.schema_model import Schedule
from vissl_like.errors import ConfigError
from vissl_like.optim.scaling import scale_schedule
from vissl_like.optim.schedules import build_curve, from_vissl, where_at

DATA = Path(__file__).parents[1] / "data"
CASES = {case["name"]: case for case in json.loads((DATA / "vissl_schedules.json").read_text())["cases"]}
ARRAYS = np.load(DATA / "vissl_schedules.npz", allow_pickle=False)

#: The learning-rate blocks of VISSL's recipes: [base value, base batch, the schedule].
SHIPPED = {
    "pretrain/rotnet/rotnet_8gpu_resnet": ("multistep", 0.1, 256, [30, 60, 90, 100]),
    "pretrain/clusterfit/clusterfit_resnet_8gpu_imagenet": ("warmup_multistep", 0.1, 256, [30, 60, 90, 100]),
    "pretrain/simclr/simclr_8node_resnet": ("warmup_cosine", 0.3, 256, (0.1, 0.0)),
    "benchmark/linear_image_classification/imagenet1k/eval_resnet_8gpu_transfer_in1k_linear": (
        "multistep", 0.01, 256, [8, 16, 24],
    ),
    "pretrain/swav/swav_8node_resnet": ("warmup_cosine", 0.3, 256, (0.025, 0.001)),
    "pretrain/moco/moco_1node_resnet": ("multistep", 0.03, 256, [120, 160]),
    "pretrain/barlow_twins/barlow_twins_4node_resnet": ("warmup_cosine", 0.2, 256, (0.01, 0.01)),
}  # fmt: skip


def shipped_schedule(case: dict) -> Schedule:
    """The block as the recipe has it, before any inference."""
    kind, base, batch, rest = SHIPPED[case["shipped_config"]]
    block = {
        "auto_lr_scaling": {"auto_scale": True, "base_value": base, "base_lr_batch_size": batch},
        "update_interval": case["update_interval"],
    }
    if kind == "warmup_cosine":
        length, end_share = rest
        children = [
            {"name": "linear", "start_value": 0.6, "end_value": 4.8},
            {"name": "cosine", "start_value": 4.8, "end_value": 4.8 * end_share},
        ]
    else:
        length = 0.047619
        values = [base * 0.1**i for i in range(len(rest) + 1)]
        multistep = {"name": "multistep", "values": values, "milestones": rest}
        if kind == "multistep":
            return from_vissl(block | multistep)
        children = [{"name": "linear", "start_value": 0.25, "end_value": 0.1}, multistep]
    composite = {"name": "composite", "schedulers": children, "interval_scaling": ["rescaled", "fixed"]}
    return from_vissl(block | composite | {"lengths": [length, 1 - length]})


def scaled_for(schedule: Schedule, case: dict) -> Schedule:
    per_node = case["batch_per_replica"] * case["gpus_per_node"]
    return scale_schedule(schedule, global_batch=per_node * case["nodes"], batch_per_node=per_node)


def curve_of(schedule: Schedule, case: dict, *, num_steps: int) -> np.ndarray:
    """The learning rate of every step after scaling."""
    scaled, epochs = scaled_for(schedule, case), case["num_epochs"]
    curve = build_curve(scaled, num_epochs=epochs)
    spe = num_steps // epochs
    return np.array([curve(where_at(scaled, step=s, steps_per_epoch=spe, num_epochs=epochs)) for s in range(num_steps)])


MADE_UP = [name for name in CASES if not name.startswith("shipped") and name != "unknown_name_auto"]


@pytest.mark.parametrize("name", MADE_UP)
def test_made_up_configuration(name: str) -> None:
    case = CASES[name]
    for block, array in (("lr", "lr_array"), ("lr_head", "lr_head_array")):
        if not case[block]:
            continue
        expected = ARRAYS[case[array]]
        ours = curve_of(from_vissl(case[block]), case, num_steps=len(expected))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("shipped")])
def test_shipped_configuration(name: str) -> None:
    case = CASES[name]
    expected = ARRAYS[case["lr_array"]]  # the function of `where`, before the update interval is applied
    curve = build_curve(scaled_for(shipped_schedule(case), case), num_epochs=case["num_epochs"])
    ours = [curve(k / len(expected)) for k in range(len(expected))]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)


def test_polynomial_cannot_be_scaled() -> None:
    case = CASES["unknown_name_auto"]
    assert case["error"]["type"] == "RuntimeError"
    with pytest.raises(ConfigError, match=r"NAME='polynomial'.*AUTO_SCALE=false"):
        scale_schedule(from_vissl(case["lr"]), global_batch=32, batch_per_node=32)


def test_every_case_is_covered() -> None:
    shipped = {case["shipped_config"] for case in CASES.values() if "shipped_config" in case}
    assert shipped == set(SHIPPED)
    assert len(MADE_UP) + 1 + sum(name.startswith("shipped") for name in CASES) == len(CASES) == 42
