"""Renaming of keys: order and idempotence of the rules, presets as data, the suggestion of the right prefix."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vissl_like.config.schema_model import WeightsInit
from vissl_like.core.weights_plan import Status, plan_loading, prefix_tokens, suggest_rules
from vissl_like.core.weights_rules import BLOCKS, KeyRules, canonical, preset_names, presets, rules_of, state_dict_key
from vissl_like.errors import ConfigError

WORDS = st.sampled_from(["trunk", "base_model", "heads", "module", "enc", "conv1", "weight", "_feature_blocks"])
KEYS = st.lists(WORDS, min_size=1, max_size=6).map(".".join)
PREFIXES = st.one_of(st.just(""), KEYS.map(lambda key: f"{key}."))


def init(**options: object) -> WeightsInit:
    return WeightsInit.model_validate(options)


@given(KEYS)
def test_canonical_is_idempotent_and_only_drops_base_model(key: str) -> None:
    once = canonical(key)
    assert canonical(once) == once
    assert "trunk.base_model." not in once
    assert once.replace("base_model.", "") == key.replace("base_model.", "")


@given(KEYS, PREFIXES)
def test_both_documented_prefixes_are_one(key: str, remove: str) -> None:
    plain = KeyRules(remove=remove, append="trunk._feature_blocks.")
    documented = KeyRules(remove=remove, append="trunk.base_model._feature_blocks.")
    assert plain.apply(key) == documented.apply(key)


@given(KEYS, PREFIXES, PREFIXES)
def test_remove_then_append(key: str, remove: str, append: str) -> None:
    """The original's order: the beginning is taken off once where it stands, then every name gets the prefix."""
    name = KeyRules(remove=remove, append=append).apply(key)
    rest = key[len(remove) :] if key.startswith(remove) else key
    assert name == canonical(append + rest)


@given(KEYS, PREFIXES, PREFIXES)
def test_a_prefix_that_was_added_can_be_removed(key: str, prefix: str, append: str) -> None:
    assert KeyRules(remove=prefix, append=append).apply(prefix + key) == KeyRules(append=append).apply(key)


@given(st.dictionaries(KEYS, st.tuples(st.integers(1, 4)), max_size=6), PREFIXES, PREFIXES)
def test_every_tensor_has_one_line(file: dict[str, tuple[int, ...]], remove: str, append: str) -> None:
    """Each model tensor is decided once, each file tensor is used or unexpected, and shares are consistent."""
    model = {"trunk.conv1.weight": (2,), "trunk.enc.weight": (3,), "heads.0.weight": (2,)}
    plan = plan_loading(file, model, rules=KeyRules(remove=remove, append=append), skip=["enc"])
    assert [row.model_key for row in plan.rows if row.model_key] == list(model)
    mentioned = {row.file_key for row in plan.rows if row.file_key}
    clashed = len(file) - len({KeyRules(remove=remove, append=append).apply(key) for key in file})
    assert len(mentioned) == len(file) - clashed
    assert 0.0 <= plan.trunk.value <= 1.0
    assert plan.trunk.total == 2
    assert [row.status for row in plan.rows if row.model_key == "trunk.enc.weight"] == [Status.SKIPPED]


def test_words_to_skip_may_have_base_model_in_them() -> None:
    """A trunk is called trunk.base_model in VISSL's extractor mode; SKIP_LAYERS from its recipes works all the same."""
    shapes = {"trunk._feature_blocks.a": (2,), "trunk._feature_blocks.b": (3,), "heads.0.w": (2,)}
    words = ["num_batches_tracked", "trunk.base_model._feature_blocks.a", "heads", "fc."]
    plan = plan_loading(shapes, shapes, rules=KeyRules(), skip=words)
    assert [row.model_key for row in plan.of(Status.SKIPPED)] == ["trunk._feature_blocks.a", "heads.0.w"]
    assert len(plan.notes) == 1 and plan.notes[0].startswith(
        "config.MODEL.WEIGHTS_INIT.SKIP_LAYERS: 'fc.' is in no name"
    )


def test_a_trunk_that_is_taken_for_heads_is_named() -> None:
    shapes = {"trunk.multiheads.w": (2,), "trunk.b": (3,), "heads.0.w": (2,)}
    (note,) = plan_loading(shapes, shapes, rules=KeyRules(), load_heads=False).notes
    assert note.startswith("1 tensors of the trunk have 'heads' in their names") and "trunk.multiheads.w" in note
    assert not plan_loading(shapes, shapes, rules=KeyRules()).notes


def test_renames_come_first_and_in_order() -> None:
    rules = rules_of(
        init(
            RENAME=[
                {"PATTERN": r"^enc\.(\d+)\.", "REPLACE": r"blocks.\1."},
                {"PATTERN": r"^blocks\.0\.", "REPLACE": "stem."},
            ],
            REMOVE_PREFIX="stem.",
            APPEND_PREFIX="trunk.",
        )
    )
    assert rules.apply("enc.1.w") == "trunk.blocks.1.w"
    assert rules.apply("enc.0.w") == "trunk.w"


def test_a_rename_to_a_model_name_takes_no_prefix() -> None:
    rules = rules_of(init(RENAME=[{"PATTERN": r"^fc\.", "REPLACE": "heads.0.clf.0."}], APPEND_PREFIX=BLOCKS))
    assert rules.apply("fc.weight") == "heads.0.clf.0.weight"
    assert rules.apply("conv1.weight") == f"{BLOCKS}conv1.weight"
    assert rules.apply("trunk.conv1.weight") == f"{BLOCKS}trunk.conv1.weight"


def test_presets() -> None:
    assert {"torchvision_resnet", "vissl_resnet", "moco", "ddp", "timm", "efficientnet_lite0"} <= set(preset_names())
    assert all(preset.doc for preset in presets().values())
    for preset in presets().values():
        for pattern, _ in preset.rules.renames:
            re.compile(pattern)
    moco = init(PRESET="moco")
    assert rules_of(moco).apply("module.encoder_q.layer1.0.conv1.weight") == f"{BLOCKS}layer1.0.conv1.weight"
    assert state_dict_key(moco) == "state_dict"
    assert state_dict_key(init(PRESET="moco", STATE_DICT_KEY_NAME="model")) == "model"
    own = init(PRESET="moco", REMOVE_PREFIX="module.encoder_k.")
    assert rules_of(own).apply("module.encoder_k.bn1.bias") == f"{BLOCKS}bn1.bias"
    dino = rules_of(init(PRESET="dino"))
    assert {dino.apply(f"{start}blocks.0.w") for start in ("", "module.", "module.backbone.", "backbone.")} == {
        f"{BLOCKS}blocks.0.w"
    }


def test_wrong_rules() -> None:
    with pytest.raises(ConfigError, match="PRESET='mocov2': no such rule set; did you mean 'moco"):
        rules_of(init(PRESET="mocov2"))
    with pytest.raises(ConfigError, match=r"RENAME\[0\].PATTERN='\(': not a regular expression"):
        rules_of(init(RENAME=[{"PATTERN": "("}]))


FILE = {
    "conv1.weight": (8, 3, 3, 3),
    "layer1.0.bn1.weight": (8,),
    "layer1.0.conv1.weight": (8, 8, 3, 3),
    "fc.weight": (9, 8),
}
MODEL = {f"{BLOCKS}{key}": shape for key, shape in FILE.items() if key != "fc.weight"} | {
    "heads.0.clf.0.weight": (4, 8)
}


@pytest.mark.parametrize("start", ["", "module.", "backbone.", "encoder.", "module.encoder_q.", "a.b.c."])
@pytest.mark.parametrize("current", [KeyRules(), KeyRules(remove="modul.", append="trunk.")])
def test_suggestion_over_prefixes(start: str, current: KeyRules) -> None:
    """What is suggested loads everything, whatever the file's names begin with and whatever was set before."""
    file = {f"{start}{key}": shape for key, shape in FILE.items()} | {"queue": (128, 8)}
    found = suggest_rules(file, MODEL, rules=current)
    assert found is not None and found.share == 1.0
    options = {
        key.rpartition(".")[2]: value.strip("'") for key, _, value in (o.partition("=") for o in found.overrides)
    }
    base = {"REMOVE_PREFIX": current.remove, "APPEND_PREFIX": current.append}
    plan = plan_loading(file, MODEL, rules=rules_of(init(**(base | options))))
    assert plan.trunk.value == 1.0


def test_suggestion_is_the_smallest_change() -> None:
    file = {f"module.{key}": shape for key, shape in FILE.items()}
    found = suggest_rules(file, MODEL, rules=KeyRules(append=BLOCKS))
    assert found is not None
    assert str(found) == "config.MODEL.WEIGHTS_INIT.REMOVE_PREFIX=module. would load 100.0 % of the trunk"
    found = suggest_rules(dict(MODEL), MODEL, rules=KeyRules(append=BLOCKS))
    assert found is not None and found.overrides == ("config.MODEL.WEIGHTS_INIT.APPEND_PREFIX=''",)


def test_no_suggestion_where_nothing_helps() -> None:
    assert suggest_rules(FILE, MODEL, rules=KeyRules(append=BLOCKS)) is None
    assert suggest_rules({"a": (1,)}, MODEL, rules=KeyRules()) is None


@pytest.mark.parametrize(
    ("key", "file", "model", "grid", "expected"),
    [
        ("trunk.pos_embed", (1, 197, 8), (1, 577, 8), None, 1),
        ("trunk.pos_embed", (1, 196, 8), (1, 256, 8), None, 0),
        ("trunk.pos_embed", (1, 198, 8), (1, 50 + 1, 8), None, 2),
        ("trunk.embeddings.position_embedding.weight", (50, 8), (197, 8), None, 1),
        ("trunk.embeddings.position_embeddings", (1, 1370, 8), (1, 257, 8), None, 1),
        ("trunk.pos_embed", (1, 197, 8), (1, 1 + 6 * 10, 8), (6, 10), 1),
        ("trunk.pos_embed", (1, 197, 8), (1, 1 + 6 * 10, 8), None, None),
        ("trunk.pos_embed", (1, 197, 8), (1, 577, 9), None, None),
        ("trunk.pos_embed", (1, 10, 8), (1, 16, 8), None, None),
        ("trunk.weight", (1, 16, 8), (1, 9, 8), None, None),
    ],
)
def test_prefix_tokens(
    key: str, file: tuple[int, ...], model: tuple[int, ...], grid: tuple[int, int] | None, expected: int | None
) -> None:
    assert prefix_tokens(key, file, model, grid=grid) == expected
