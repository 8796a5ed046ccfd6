"""Schedules and their scaling: what the reference vectors do not cover."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vissl_like.config.schema_model import AutoLrScaling, Schedule
from vissl_like.errors import ConfigError
from vissl_like.optim.scaling import scale_schedule
from vissl_like.optim.schedules import Rates, build_curve, from_vissl, unreached_milestones
from vissl_like.registry import names

AUTO = AutoLrScaling(AUTO_SCALE=True, BASE_VALUE=0.1, BASE_LR_BATCH_SIZE=256)
LINEAR, COSINE = {"NAME": "linear", "START_VALUE": 0.0, "END_VALUE": 1.0}, {"NAME": "cosine", "START_VALUE": 1.0}


def curve(**options: object):
    return build_curve(Schedule(**options), num_epochs=10)


def test_closed_forms() -> None:
    assert curve(NAME="polynomial", BASE_VALUE=0.2, POWER=2.0)(0.5) == pytest.approx(0.05)
    assert curve(NAME="exponential", START_VALUE=0.2, DECAY=0.01)(0.5) == pytest.approx(0.02)
    assert curve(NAME="cosine", START_VALUE=1.0, END_VALUE=0.2)(0.5) == pytest.approx(0.6)


@given(where=st.floats(0, 1, exclude_max=True))
@pytest.mark.parametrize("name", [name for name in names("schedule") if name != "composite"])
def test_every_schedule_is_finite_everywhere(name: str, where: float) -> None:
    options = Schedule(NAME=name, WARMUP_INTERVAL_LENGTH=0.1, RESTART_INTERVAL_LENGTH=0.3)
    assert math.isfinite(build_curve(options, num_epochs=90)(where))


@given(st.floats(0, 1, exclude_max=True))
def test_composite_is_continuous_where_its_children_meet(where: float) -> None:
    value = curve(NAME="composite", SCHEDULERS=[LINEAR, COSINE], LENGTHS=[0.25, 0.75])
    near = min(where + 1e-5, 0.999999)
    assert abs(value(near) - value(where)) < 1e-3
    assert value(0.25) == pytest.approx(1.0)


def test_milestones_beyond_the_end_are_reported_not_refused() -> None:
    """Shortening a recipe by NUM_EPOCHS alone must work."""
    options = Schedule(NAME="multistep", VALUES=[1.0, 0.1, 0.01], MILESTONES=[2, 60])
    assert build_curve(options, num_epochs=4)(0.99) == 0.1
    assert unreached_milestones(options, num_epochs=4) == [60]
    inside = Schedule(NAME="composite", SCHEDULERS=[LINEAR, options.model_dump()], LENGTHS=[0.5, 0.5])
    assert unreached_milestones(inside, num_epochs=4) == [60]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"NAME": "multistep", "VALUES": [1.0, 0.1], "MILESTONES": [1, 2]}, r"2 MILESTONES need 3 values, not 2"),
        ({"NAME": "multistep", "VALUES": [1.0, 0.1, 0.2], "MILESTONES": [4, 2]}, "epochs must rise"),
        ({"NAME": "step", "VALUES": []}, "at least one value"),
        ({"NAME": "inverse_sqrt"}, "WARMUP_INTERVAL_LENGTH"),
        ({"NAME": "composite"}, "at least one child"),
        ({"NAME": "composite", "SCHEDULERS": [LINEAR, COSINE], "LENGTHS": [1.0]}, "as many LENGTHS"),
        ({"NAME": "composite", "SCHEDULERS": [LINEAR, COSINE], "LENGTHS": [0.5, 0.6]}, r"add up to 1, not 1\.1"),
        ({"NAME": "composite", "SCHEDULERS": [{"NAM": "linear"}], "LENGTHS": [1.0]}, r"SCHEDULERS\[0\].*NAM"),
        ({"NAME": "composite", "SCHEDULERS": [{"NAME": "composite"}], "LENGTHS": [1.0]}, "cannot stand in another"),
        ({"NAME": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_mistakes_are_explained(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        curve(**options)


def test_unscaled_schedule_is_the_same_object() -> None:
    schedule = Schedule()
    assert scale_schedule(schedule, global_batch=8, batch_per_node=8) is schedule


@given(st.floats(1e-4, 1), st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4), st.integers(1, 4096))
def test_every_multistep_goes_on_as_its_first_two_values(first: float, shares: list[float], batch: int) -> None:
    values = [first, *(first * share for share in shares)]
    schedule = Schedule(VALUES=values, AUTO_LR_SCALING=AUTO)
    scaled = scale_schedule(schedule, global_batch=batch, batch_per_node=batch)
    start = 0.1 * batch / 256
    series = [start * shares[0] ** i for i in range(len(values))]
    assert scaled.VALUES == pytest.approx(series, rel=1e-3, abs=1e-7)


def test_removed_warmup_leaves_its_span_to_the_next() -> None:
    children = [LINEAR, {"NAME": "constant"}, COSINE]
    schedule = Schedule(
        NAME="composite", SCHEDULERS=children, LENGTHS=[0.1, 0.4, 0.5], INTERVAL_SCALING=["rescaled"] * 3,
        AUTO_LR_SCALING=AUTO,
    )  # fmt: skip
    scaled = scale_schedule(schedule, global_batch=512, batch_per_node=512)
    assert [child["NAME"] for child in scaled.SCHEDULERS] == ["constant", "cosine"]
    assert scaled.LENGTHS == [0.5, 0.5] and scaled.INTERVAL_SCALING == ["rescaled", "rescaled"]
    assert build_curve(scaled, num_epochs=10)(0.0) == pytest.approx(0.2)


def test_schedule_that_starts_at_zero_cannot_be_scaled() -> None:
    for options in ({"NAME": "cosine", "START_VALUE": 0.0}, {"VALUES": [0.0, 1.0]}):
        with pytest.raises(ConfigError, match="zero"):
            scale_schedule(Schedule(AUTO_LR_SCALING=AUTO, **options), global_batch=8, batch_per_node=8)


def test_epoch_interval_holds_the_value_within_an_epoch() -> None:
    rates = Rates(
        lr=Schedule(NAME="cosine", START_VALUE=1.0),
        lr_head=Schedule(NAME="cosine", START_VALUE=1.0, UPDATE_INTERVAL="step"),
        weight_decay=Schedule(NAME="constant", VALUE=0.3),
        steps_per_epoch=4,
        num_epochs=5,
    )
    values = [rates.at(step) for step in range(8)]
    assert len({rate.lr for rate in values[:4]}) == 1 and values[4][0] < values[0][0]
    assert len({rate.lr_head for rate in values}) == 8
    assert {rate.weight_decay for rate in values} == {0.3}


def test_heads_follow_the_trunk_by_default() -> None:
    rates = Rates(lr=Schedule(NAME="linear", START_VALUE=1.0), steps_per_epoch=2, num_epochs=2)
    assert rates.at(3) == (0.5, 0.5, None, 0.0)


def test_vissl_names_are_taken() -> None:
    block = {"name": "composite", "schedulers": [{"name": "linear", "start_value": 0.5}], "lengths": [1.0]}
    schedule = from_vissl(block | {"auto_lr_scaling": {"auto_scale": True, "base_value": 0.3}})
    assert schedule.SCHEDULERS == [{"NAME": "linear", "START_VALUE": 0.5}]
    assert schedule.AUTO_LR_SCALING.BASE_VALUE == 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"NAME": "constant", "VALUE": -0.1},
        {"NAME": "cosine", "START_VALUE": 0.1, "END_VALUE": -0.01},
        {"NAME": "multistep", "VALUES": [0.1, -0.1], "MILESTONES": [5]},
    ],
)
def test_values_below_zero_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="below zero"):
        build_curve(Schedule(**options), num_epochs=10)
