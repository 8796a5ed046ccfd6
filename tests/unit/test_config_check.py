"""Every mistake is found before a run, all at once, in plain words, with its place and the nearest right key."""

from pathlib import Path

import pytest

from vissl_like.config.check import load_job, load_sweep
from vissl_like.config.recipes import Library
from vissl_like.config.suggest import suggest_keys, suggest_recipe
from vissl_like.errors import ConfigError

BASE = "config=debug/supervised_synthetic"


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_job([BASE, *overrides])
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("config.OPTIMIZER.NUM_EPOCH=3", "unknown key config.OPTIMIZER.NUM_EPOCH; did you mean config.OPTIMIZER.NUM_EPOCHS?"),
        ("+config.OPTIMIZER.MOMENTUN=1", "unknown key config.OPTIMIZER.MOMENTUN; did you mean config.OPTIMIZER.MOMENTUM?"),
        ("++config.SEED=1", "unknown key config.SEED; did you mean config.SEED_VALUE?"),
        ("~config.SEED_VALU", "unknown key config.SEED_VALU; did you mean config.SEED_VALUE?"),
        ("config.MODLE.TRUNK.NAME=x", "did you mean config.MODEL.TRUNK.NAME?"),
        ("config.LOSS.ignore_index=1", "did you mean config.LOSS.CROSS_ENTROPY.IGNORE_INDEX?"),
        ("config.CLUSTERFIT.N_ITR=1", "did you mean config.CLUSTERFIT.NUM_ITER?"),
        ("config.TRUNK.NAME=resnet", "did you mean config.MODEL.TRUNK.NAME?"),
        ("config.OPTIMIZER.lr=1", "did you mean config.OPTIMIZER.PARAM_SCHEDULERS.LR?"),
        ("OPTIMIZER.NUM_EPOCH=3", "did you mean config.OPTIMIZER.NUM_EPOCHS?"),
        ("config.OPTIMIZER.NUM EPOCHS=3", "did you mean config.OPTIMIZER.NUM_EPOCHS?"),
        ("config.OPTIMIZER.NUM-EPOCHS=3", "did you mean config.OPTIMIZER.NUM_EPOCHS?"),
        ("config.OPTIMIZER={NUM_EPOCH: 3}", "did you mean config.OPTIMIZER.NUM_EPOCHS?"),
        ("config.OPTIMIZER.GROUPS=[{MTCH: x}]", "GROUPS.0.MTCH; did you mean config.OPTIMIZER.GROUPS.0.MATCH?"),
        ("config.OPTIMIZER.PARAM_SCHEDULERS.LR.SCHEDULERS=[{NAME: linear, STRT_VALUE: 1}]",
         "did you mean config.OPTIMIZER.PARAM_SCHEDULERS.LR.SCHEDULERS.0.START_VALUE?"),
        ("config.XYZQW=1", "`options config` lists the keys of config."),
        ("engine_nam=train", "did you mean engine_name?"),
    ],
)  # fmt: skip
def test_unknown_keys(override: str, message: str) -> None:
    assert message in problems(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("config.OPTIMIZER.NUM_EPOCHS=many", "config.OPTIMIZER.NUM_EPOCHS='many': must be a whole number, at least 0."),
        ("config.OPTIMIZER.NUM_EPOCHS=2.5", "config.OPTIMIZER.NUM_EPOCHS=2.5: must be a whole number, at least 0."),
        ("config.OPTIMIZER.NUM_EPOCHS=-1", "config.OPTIMIZER.NUM_EPOCHS=-1: must be a whole number, at least 0."),
        ("config.OPTIMIZER.NUM_EPOCHS=true", "config.OPTIMIZER.NUM_EPOCHS=True: must be a whole number, at least 0."),
        ("config.OPTIMIZER.NUM_EPOCHS=null", "must be a whole number, at least 0. Leave it out for the default 90."),
        ("config.OPTIMIZER.NUM_EPOCHS=[3]", "config.OPTIMIZER.NUM_EPOCHS=[3]: must be a whole number, at least 0."),
        ("config.OPTIMIZER.WEIGHT_DECAY=nan", "config.OPTIMIZER.WEIGHT_DECAY=nan: must be a number, at least 0."),
        ("config.OPTIMIZER.MOMENTUM=1", "config.OPTIMIZER.MOMENTUM=1: must be a number, at least 0, less than 1."),
        ("config.DATA.TRAIN.DATA_PATHS=images", "DATA_PATHS='images': must be a list of texts; write [images]."),
        ("config.RUN.DRY_RUN=maybe", "config.RUN.DRY_RUN='maybe': must be true or false."),
        ("config.MACHINE.DEVICE=gup", "must be one of auto, cpu, gpu; did you mean gpu?"),
        ("config.EVALUATE.PROTOCOLS=[knn,liner]", "PROTOCOLS.1='liner': must be one of knn, linear, low_shot; did you mean"),
        ("config.OPTIMIZER.BETAS=[0.9]", "config.OPTIMIZER.BETAS"),
        ("config.OPTIMIZER=3", "config.OPTIMIZER=3: this is a section, not a value. Set one of its keys: NAME,"),
        ("config.CHECKPOINT=null", "config.CHECKPOINT=None: this is a section, not a value."),
        ("config.LOSS.CROSS_ENTROPY.WEIGHT=heavy", "must be a list of numbers, or null"),
        ("config.OPTIMIZER.GROUPS=[{LR_FACTOR: -1}]", "config.OPTIMIZER.GROUPS.0.LR_FACTOR=-1: must be a number, at least 0."),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_or_out_of_bounds(override: str, message: str) -> None:
    found = problems(override)
    assert message in found and found.startswith("command line: ")


def test_everything_is_reported_at_once() -> None:
    found = problems(
        "config.SEED_VALU=1",
        "config.OPTIMIZER.NUM_EPOCHS=x",
        "config.LOSS.NAME=cross_entropi",
        "config.RUN.DIR=(",
        "config.A=[",
    )
    assert found.startswith("6 problems in the configuration:\n")  # an unknown key that cannot be read counts twice
    for key in ("SEED_VALUE?", "NUM_EPOCHS='x'", "RUN.DIR=('", "config.A=['"):
        assert key in found


def test_wrong_names_and_wrong_types_and_wrong_keys_together() -> None:
    found = problems("config.SEED_VALU=1", "config.LOSS.NAME=cross_entropi", "engine_name=trian")
    assert found.startswith("3 problems")
    assert "config.LOSS.NAME='cross_entropi': no such loss; did you mean cross_entropy?" in found
    assert "engine_name='trian': no such engine; did you mean train?" in found


@pytest.mark.parametrize(
    "override",
    [
        "config.MODEL.TRUNK.OPTIONS._target_=os.system",
        "config.MODEL.TRUNK._target_=os.system",
        "config.DATA.TRAIN.TRANSFORMS=[{_target_: os.system}]",
        "config.MODEL.HEAD.PARAMS=[[mlp,{dims: [{_target_: x}]}]]",
    ],
)
def test_a_target_is_refused_with_the_reason(override: str) -> None:
    assert "`_target_` is not accepted. A configuration travels with checkpoints" in problems(override)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of the working directory, to be written by the test."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "configs/config/mine/page.yaml"
    file.parent.mkdir(parents=True)
    return file


def page_problems(file: Path, text: str, *overrides: str) -> list[str]:
    file.write_text("# @package _global_\n" + text)
    with pytest.raises(ConfigError) as caught:
        load_job(["config=mine/page", *overrides])
    return str(caught.value).splitlines()


def test_problems_of_a_file_have_its_line(recipe: Path) -> None:
    found = page_problems(
        recipe,
        """\
defaults: [/config/debug/supervised_synthetic, _self_]
config:
  SEED_VALU: 1
  OPTIMIZER:
    NUM_EPOCHS: x
    GROUPS:
      - MATCH: a
      - MTCH: b
  CLUSTERFIT: {N_ITER: 3}
""",
    )
    assert found[0] == "3 problems in the configuration:"
    assert found[1:] == [
        "  configs/config/mine/page.yaml:4: unknown key config.SEED_VALU; did you mean config.SEED_VALUE?",
        "  configs/config/mine/page.yaml:6: config.OPTIMIZER.NUM_EPOCHS='x': must be a whole number, at least 0.",
        "  configs/config/mine/page.yaml:9: unknown key config.OPTIMIZER.GROUPS.1.MTCH; did you mean "
        "config.OPTIMIZER.GROUPS.1.MATCH?",
    ]


def test_a_mistyped_section_is_reported_once_by_its_first_key(recipe: Path) -> None:
    found = page_problems(recipe, "config:\n  OPTIMZER:\n    NUM_EPOCHS: 1\n    MOMENTUM: 0.5\n    NAME: sgd\n")
    unknown = [line for line in found if "unknown" in line]
    assert len(unknown) == 1
    assert (
        "page.yaml:4: unknown key config.OPTIMZER.NUM_EPOCHS; did you mean config.OPTIMIZER.NUM_EPOCHS?" in unknown[0]
    )
    assert unknown[0].endswith("(2 more keys below config.OPTIMZER)")


def test_the_place_of_a_value_is_where_it_was_set_last(recipe: Path) -> None:
    text = "defaults: [/config/debug/supervised_synthetic]\nconfig: {SEED_VALUE: -1}\n"
    assert page_problems(recipe, text)[0].startswith("configs/config/mine/page.yaml:3: config.SEED_VALUE=-1")
    assert page_problems(recipe, text, "config.SEED_VALUE=-2")[0].startswith("command line: config.SEED_VALUE=-2")


def test_keys_beside_config_are_unknown(recipe: Path) -> None:
    found = page_problems(recipe, "OPTIMIZER: {NUM_EPOCHS: 3}\n")
    assert found[0].startswith(
        "configs/config/mine/page.yaml:2: unknown key OPTIMIZER.NUM_EPOCHS; did you mean config.OPTI"
    )


def test_sweeps_are_checked_at_every_point() -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep([BASE, "config.SEED_VALU=1,2", "config.OPTIMIZER.NUM_EPOCHS=1,-1,x"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 problems in the configuration:"
    assert lines[1] == "  command line: unknown key config.SEED_VALU; did you mean config.SEED_VALUE?"
    assert lines[2].startswith("  points 2, 5 of the sweep (config.OPTIMIZER.NUM_EPOCHS=-1): command line: config.")
    assert lines[3].startswith("  points 3, 6 of the sweep (config.OPTIMIZER.NUM_EPOCHS=x): command line: config.")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("pretrain/rotnet/rotnet_8gpu_resnt", "pretrain/rotnet/rotnet_8gpu_resnet"),
        ("pretrian/rotnet/rotnet_8gpu_resnet", "pretrain/rotnet/rotnet_8gpu_resnet"),
        ("rotnet_8gpu_resnet", "pretrain/rotnet/rotnet_8gpu_resnet"),
        ("pretrain/rotnet_8gpu_resnet", "pretrain/rotnet/rotnet_8gpu_resnet"),
        ("pretrain/clusterfit/cluster_features_resnet_8gpu_imagenet", "pretrain/clusterfit/cluster"),
    ],
)
def test_recipe_names(name: str, meant: str) -> None:
    assert suggest_recipe(name, Library()).startswith(f"; did you mean {meant}")


def test_no_suggestion_where_nothing_is_near() -> None:
    assert suggest_keys(("config", "QQQQQQ")) == ()
    assert suggest_recipe("qqqqqq", Library()).startswith(". `list recipes` shows all")


def test_plugins_are_named_when_they_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("x = 1\ny = 1 / 0\n")
    (tmp_path / "unreadable_plugin.py").write_text("def (\n")
    assert "importing 'broken_plugin' failed: ZeroDivisionError: division by zero" in problems(
        "config.PLUGINS=[broken_plugin]"
    )
    assert "broken_plugin.py:2" in problems("config.PLUGINS=[broken_plugin]")
    assert "unreadable_plugin.py:1" in problems("config.PLUGINS=[unreadable_plugin]")
    assert "cannot import 'no_such_plugin_at_all'" in problems("config.PLUGINS=[no_such_plugin_at_all]")
