"""Recipes, presets and overrides: what is found where, and what wins."""

from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore

from vissl_like.config import compose
from vissl_like.config.check import Loaded, load_job, load_sweep
from vissl_like.config.recipes import Library, flatten
from vissl_like.errors import ConfigError

RESIZE = {"name": "Resize", "size": 8}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with recipes of its own below configs/config."""
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "configs",
        "mine/base",
        """\
engine_name: extract_features
config:
  SEED_VALUE: 1
  DATA:
    TRAIN: {DATA_SOURCES: [synthetic], TRANSFORMS: [{name: Resize, size: 8}, {name: ToTensor}]}
  MODEL: {TRUNK: {NAME: resnet_small, OPTIONS: {width: 8}}}
""",
    )
    write(
        tmp_path / "configs",
        "mine/child",
        """\
defaults:
  - /config/mine/base
  - _self_
config:
  SEED_VALUE: 2
  DATA: {TRAIN: {TRANSFORMS: [{name: ToTensor}]}}
""",
    )
    write(
        tmp_path / "configs", "mine/models/small", "config: {MODEL: {TRUNK: {OPTIONS: {depth: 2}}}, LOG_FREQUENCY: 3}\n"
    )
    write(tmp_path / "configs", "mine/models/late", "config: {SEED_VALUE: 9, LOG_FREQUENCY: 4}\n")
    return tmp_path


def write(configs: Path, name: str, text: str) -> None:
    file = configs / "config" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("# @package _global_\n" + text, encoding="utf-8")


def load(*overrides: str, **options: Any) -> Loaded:
    return load_job(overrides, **options)


def test_a_recipe_of_the_working_directory(folder: Path) -> None:
    loaded = load("config=mine/base")
    assert (loaded.job.engine_name, loaded.recipe) == ("extract_features", "mine/base")
    assert loaded.job.config.SEED_VALUE == 1
    assert loaded.job.config.LOG_FREQUENCY == 10  # a default of the schema


def test_a_yaml_ending_is_tolerated(folder: Path) -> None:
    assert load("config=mine/base.yaml").recipe == "mine/base"


def test_packaged_recipes_are_found_from_anywhere(folder: Path) -> None:
    assert load("config=debug/supervised_synthetic").job.config.MODEL.TRUNK.NAME == "resnet_small"


def test_a_recipe_builds_on_another_and_lists_are_replaced_whole(folder: Path) -> None:
    config = load("config=mine/child").job.config
    assert config.SEED_VALUE == 2
    assert config.DATA.TRAIN.TRANSFORMS == [{"name": "ToTensor"}]
    assert config.DATA.TRAIN.DATA_SOURCES == ["synthetic"]
    assert load("config=mine/child").job.engine_name == "extract_features"


def test_self_first_lets_the_parent_win(folder: Path) -> None:
    text = "defaults:\n  - _self_\n  - /config/mine/base\nconfig: {SEED_VALUE: 2, LOG_FREQUENCY: 7}\n"
    write(folder / "configs", "mine/under", text)
    config = load("config=mine/under").job.config
    assert (config.SEED_VALUE, config.LOG_FREQUENCY) == (1, 7)


def test_presets_come_after_the_recipe_from_left_to_right_and_overrides_last(folder: Path) -> None:
    presets = ["+config/mine/models=small", "+config/mine/models=late"]
    loaded = load("config=mine/base", presets[0])
    assert loaded.job.config.MODEL.TRUNK.OPTIONS == {"width": 8, "depth": 2}
    assert loaded.job.config.LOG_FREQUENCY == 3
    write(folder / "configs", "mine/more/late", "config: {SEED_VALUE: 9, LOG_FREQUENCY: 4}\n")
    both = load("config=mine/base", "config.SEED_VALUE=5", presets[0], "+config/mine/more=late")
    assert both.presets == ("mine/models/small", "mine/more/late")
    assert (both.job.config.LOG_FREQUENCY, both.job.config.SEED_VALUE) == (4, 5)


def test_presets_of_one_folder_merge_too(folder: Path) -> None:
    config = load("config=mine/base", "+config/mine/models=[small,late]").job.config
    assert (config.LOG_FREQUENCY, config.SEED_VALUE) == (4, 9)
    config = load("config=mine/base", "+config/mine/models=late", "+config/mine/models=small").job.config
    assert (config.LOG_FREQUENCY, config.SEED_VALUE) == (3, 9)


def test_config_dir_comes_first_with_or_without_the_inner_folder(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", "mine/base", "engine_name: extract_label_predictions\nconfig: {SEED_VALUE: 77}\n")
    overrides = ("config=mine/base", "config.DATA.TEST.DATA_SOURCES=[synthetic]")
    assert load(*overrides, config_dirs=[str(tmp_path / "other")]).job.config.SEED_VALUE == 77
    assert load(*overrides, config_dirs=[str(tmp_path / "other" / "config")]).job.config.SEED_VALUE == 77
    with pytest.raises(ConfigError, match=r"no such folder; did you mean '.*other'"):
        load(*overrides, config_dirs=[str(tmp_path / "othr")])


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("config.OPTIMIZER.NUM_EPOCHS=3", "OPTIMIZER.NUM_EPOCHS", 3),
        ("+config.OPTIMIZER.NUM_EPOCHS=3", "OPTIMIZER.NUM_EPOCHS", 3),
        ("++config.OPTIMIZER.NUM_EPOCHS=3", "OPTIMIZER.NUM_EPOCHS", 3),
        ("config.OPTIMIZER.PARAM_SCHEDULERS.LR.START_VALUE=1e-3", "OPTIMIZER.PARAM_SCHEDULERS.LR.START_VALUE", 0.001),
        ("config.RUN.NAME=007", "RUN.NAME", "007"),
        ("config.RUN.NAME=1e3", "RUN.NAME", "1e3"),
        ("config.RUN.NAME=true", "RUN.NAME", "true"),
        ("config.RUN.NAME='a,b=c'", "RUN.NAME", "a,b=c"),
        ("config.RUN.NAME=", "RUN.NAME", ""),
        ("config.RUN.NAME=${config.LOSS.NAME}", "RUN.NAME", "cross_entropy"),
        ("config.DATA.TRAIN.DATASET_NAMES=[1]", "DATA.TRAIN.DATASET_NAMES", ["1"]),
        ("config.DATA.TRAIN.LABEL_PATHS=['/x/y=1.npy']", "DATA.TRAIN.LABEL_PATHS", ["/x/y=1.npy"]),
        ("config.DATA.TRAIN.TRANSFORMS.1.x=9", "DATA.TRAIN.TRANSFORMS", [RESIZE, {"name": "ToTensor", "x": 9}]),
        ("config.MODEL.TRUNK.OPTIONS.depth=3", "MODEL.TRUNK.OPTIONS", {"width": 8, "depth": 3}),
        ("config.MODEL.TRUNK.OPTIONS={depth: 3}", "MODEL.TRUNK.OPTIONS", {"width": 8, "depth": 3}),
        ("~config.MODEL.TRUNK.OPTIONS", "MODEL.TRUNK.OPTIONS", {}),
        ("~config.SEED_VALUE", "SEED_VALUE", 0),
        ("config.OPTIMIZER.BETAS=[0.5,0.9]", "OPTIMIZER.BETAS", (0.5, 0.9)),
        ("config.MACHINE={DEVICE: cpu, PRECISION: bf16}", "MACHINE.PRECISION", "bf16"),
    ],
)  # fmt: skip
def test_overrides(folder: Path, override: str, key: str, value: Any) -> None:
    found: Any = load("config=mine/base", override).job.config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_an_optional_section_can_be_set_by_its_keys(folder: Path) -> None:
    schedule = load(
        "config=mine/base", "config.OPTIMIZER.PARAM_SCHEDULERS.WEIGHT_DECAY.NAME=cosine"
    ).job.config.OPTIMIZER.PARAM_SCHEDULERS.WEIGHT_DECAY
    assert schedule is not None and schedule.NAME == "cosine" and schedule.UPDATE_INTERVAL == "epoch"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("config.DATA.TRAIN.LABEL_PATHS=[/x/y=1.npy]", ["^", "\"config.DATA.TRAIN.LABEL_PATHS=['/x/y=1.npy']\""]),
        ("config.RUN.DIR=run(1)", ["^", "\"config.RUN.DIR='run(1)'\""]),
        ("config.RUN.DIR=/a/b,c", ["add -m", "\"config.RUN.DIR='/a/b,c'\""]),
        ("config.OPTIMIZER.GROUPS[0].MATCH=x", ["by a dot", "config.OPTIMIZER.GROUPS.0.MATCH=x"]),
        ("config.DATA.TRAIN.TRANSFORMS.7.size=3", ["2 elements", "whole list"]),
        ("config.SEED_VALUE", ["key=value"]),
        ("hydra.run.dir=x", ["config.RUN.DIR"]),
        ("config=mine/other", ["no such recipe", "config=mine/other"]),
        ("config.RUN.NAME=${config.NOTHING}", ["${...}", "NOTHING"]),
    ],
)
def test_what_the_grammar_refuses_comes_with_a_form_that_works(folder: Path, override: str, words: list[str]) -> None:
    recipe = [] if override.startswith("config=") else ["config=mine/base"]
    with pytest.raises(ConfigError) as caught:
        load(*recipe, override)
    for word in words:
        assert word in str(caught.value)


def test_advice_on_quoting_can_be_pasted(folder: Path) -> None:
    """What the error recommends is accepted."""
    assert load("config=mine/base", "config.RUN.DIR='run(1)'").job.config.RUN.DIR == "run(1)"
    assert load("config=mine/base", "config.RUN.DIR='/a/b,c'").job.config.RUN.DIR == "/a/b,c"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("config: {A: [1\n", "bad.yaml:3:"),
        ("config:\n  SEED_VALUE: 1\n  SEED_VALUE: 2\n", "bad.yaml:4: config.SEED_VALUE stands twice (first in line 3)"),
        ("- a\n", "must be a mapping"),
        ("defaults: [/config/mine/bse]\n", "bad.yaml:2: defaults: /config/mine/bse: no such recipe; did you mean mine/base?"),
        ("defaults: [mine/base]\n", "bad.yaml:2: defaults: 'mine/base' is not understood; each entry is"),
        ("defaults: [/config/mine/bad]\n", "builds on itself: mine/bad -> mine/bad"),
        ("config:\n  DATA:\n", "bad.yaml:3: config.DATA=None: this is a section"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_comes_with_its_line(folder: Path, text: str, words: str) -> None:
    write(folder / "configs", "mine/bad", text)
    with pytest.raises(ConfigError) as caught:
        load("config=mine/bad")
    assert words in str(caught.value)


def test_another_package_in_the_header_is_refused(folder: Path) -> None:
    (folder / "configs/config/mine/local.yaml").write_text("# @package config\nSEED_VALUE: 1\n")
    with pytest.raises(ConfigError, match="must be '@package _global_'"):
        load("config=mine/local")


def test_an_empty_recipe_sets_nothing(folder: Path) -> None:
    write(folder / "configs", "mine/empty", "engine_name: extract_features\nconfig:\n")
    loaded = load("config=mine/empty", "config.DATA.TRAIN.DATA_SOURCES=[synthetic]")
    assert loaded.job.config.SEED_VALUE == 0


def test_anchors_and_merge_keys_work(folder: Path) -> None:
    text = "config:\n  DATA:\n    TRAIN: &a {DATA_SOURCES: [synthetic], DATA_LIMIT: 5}\n    TEST: {<<: *a, DATA_LIMIT: 6}\n"
    write(folder / "configs", "mine/anchors", text)
    data = load("config=mine/anchors").job.config.DATA
    assert (data.TRAIN.DATA_LIMIT, data.TEST.DATA_LIMIT, data.TEST.DATA_SOURCES) == (5, 6, ["synthetic"])


@pytest.mark.parametrize(
    ("overrides", "seeds"),
    [
        (["config.SEED_VALUE=1,2,3"], [1, 2, 3]),
        (["config.SEED_VALUE=choice(4,5)"], [4, 5]),
        (["config.SEED_VALUE=range(1,7,2)"], [1, 3, 5]),
        (["config.SEED_VALUE=6"], [6]),
    ],
)
def test_sweeps_use_the_grammar_of_hydra(folder: Path, overrides: list[str], seeds: list[int]) -> None:
    points = load_sweep(["config=mine/base", *overrides])
    assert [point.job.config.SEED_VALUE for point in points] == seeds


def test_a_sweep_is_the_grid(folder: Path) -> None:
    points = load_sweep(["config=mine/base,mine/child", "config.LOG_FREQUENCY=1,2", "config.RUN.NAME='a,b'"])
    grid = [(point.recipe, point.job.config.LOG_FREQUENCY, point.job.config.RUN.NAME) for point in points]
    assert grid == [(name, n, "a,b") for name in ("mine/base", "mine/child") for n in (1, 2)]


def test_glob_sweeps_over_recipes(folder: Path) -> None:
    points = load_sweep(["config=glob(mine/*,exclude=*models*)"])
    assert [point.recipe for point in points] == ["mine/base", "mine/child"]
    with pytest.raises(ConfigError, match="no point"):
        load_sweep(["config=glob(nothing/*)"])


def test_library_lists_names_and_descriptions(folder: Path) -> None:
    library = Library()
    assert {"mine/base", "mine/models/small", "debug/supervised_synthetic"} <= set(library.files)
    assert library.description("debug/supervised_synthetic").startswith("Supervised training on drawn images")
    assert library.description("mine/base") == ""


def test_flatten_keeps_lists_and_empty_mappings_as_values() -> None:
    tree = {"a": {"b": 1, "c": {}}, "d": [{"e": 1}]}
    assert list(flatten(tree)) == [(("a", "b"), 1), (("a", "c"), {}), (("d",), [{"e": 1}])]


def test_shell_quoting() -> None:
    assert compose.shell_quoted('a="$x"') == '"a=\\"\\$x\\""'


def test_a_merge_leaves_the_store_of_hydra_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra copies its whole store for each merge; a caller's program may hold recipes of its own there."""
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", dict(store.repo))
    store.store(group="config/mine", name="base", node={"config": {"SEED_VALUE": 99}})
    former = dict(store.repo)
    write(folder / "configs", "mine/new", "config: {LOG_FREQUENCY: 7}\n")
    assert load("config=mine/child", "+config/mine=new").job.config.SEED_VALUE == 2
    assert store.repo == former and list(store.repo["config"]["mine"]) == ["base.yaml"]
