"""The reference of options is read from the schema's fields."""

import pytest

from vissl_like.config import reference
from vissl_like.config.schema import defaults


def _find(key: str) -> reference.Entry | None:
    return reference.find(tuple(key.split(".")))


def _leaves(tree: dict, above: str = "") -> list[str]:
    keys = []
    for name, value in tree.items():
        keys += _leaves(value, f"{above}{name}.") if isinstance(value, dict) and value else [above + name]
    return keys


def test_every_default_has_an_entry_with_that_default() -> None:
    for key in _leaves(defaults()):
        entry = _find(key)
        assert entry is not None and (entry.key == key or entry.type.startswith("a mapping")), key
        assert entry.doc, key


@pytest.mark.parametrize(
    ("key", "allowed", "default"),
    [
        ("config.OPTIMIZER.NUM_EPOCHS", "a whole number, at least 0", 90),
        ("config.OPTIMIZER.MOMENTUM", "a number, at least 0, less than 1", 0.9),
        ("config.OPTIMIZER.BETAS", "a list of 2 numbers", [0.9, 0.999]),
        ("config.MACHINE.DEVICE", "one of auto, cpu, gpu", "auto"),
        ("config.RUN.DRY_RUN", "true or false", False),
        ("config.DATA.TRAIN.TRANSFORMS", "a list of mappings {key: value}", []),
        ("config.EVALUATE.PROTOCOLS", "a list; each one of knn, linear, low_shot", ["knn", "linear"]),
        ("config.LOSS.CROSS_ENTROPY.WEIGHT", "a list of numbers, or null", None),
        ("config.MODEL.WEIGHTS_INIT.STATE_DICT_KEY_NAME", "text or a list of texts", "auto"),
        ("config.CLUSTERFIT.FEATURES.TEST_PARTITION", "one of '' (empty), TRAIN, VAL, TEST", "TEST"),
    ],
)
def test_types_and_bounds_in_words(key: str, allowed: str, default: object) -> None:
    entry = _find(key)
    assert entry is not None
    assert (entry.allowed, entry.default) == (allowed, default)


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("config.OPTIMIZER.GROUPS.0.MATCH", "config.OPTIMIZER.GROUPS.*.MATCH"),
        ("config.OPTIMIZER.GROUPS.0", "config.OPTIMIZER.GROUPS.*"),
        ("config.OPTIMIZER.PARAM_SCHEDULERS.WEIGHT_DECAY.NAME", "config.OPTIMIZER.PARAM_SCHEDULERS.WEIGHT_DECAY.NAME"),
        ("config.MODEL.TRUNK.OPTIONS.img_size", "config.MODEL.TRUNK.OPTIONS"),
        ("config.DATA.TRAIN.TRANSFORMS.1.size", "config.DATA.TRAIN.TRANSFORMS"),
        ("config.OPTIMIZER.BETAS.0", "config.OPTIMIZER.BETAS"),
        ("config.OPTIMIZER.NUM_EPOCHS.x", None),
        ("config.OPTIMIZER.BETAS.x", None),
        ("config.OPTIMIZER.GROUPS.MATCH", None),
        ("config.optimizer.num_epochs", None),
        ("OPTIMIZER", None),
    ],
)
def test_find_reaches_into_lists_and_free_form_options_only(key: str, found: str | None) -> None:
    entry = _find(key)
    assert (entry and entry.key) == found
