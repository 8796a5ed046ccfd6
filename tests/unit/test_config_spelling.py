"""Edit distances, and which known key is meant by a mistyped one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vissl_like.config.spelling import FAR, distance, nearest, nearest_paths

WORDS = st.text("ABCDEFG_", min_size=1, max_size=10)


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [
        ("NAME", "NAME", 0),
        ("NAME", "NAMES", 1),
        ("NAME", "NAE", 1),
        ("NAME", "NAXE", 1),
        ("NAME", "NMAE", 1),
        ("NAME", "NX", 3),
        ("", "NAM", 3),
        ("NUM_EPOCHS", "DATALOADER_WORKERS", FAR),
    ],
)
def test_one_edit_is_an_insertion_deletion_substitution_or_swap(a: str, b: str, edits: float) -> None:
    assert distance(a, b) == edits


def test_slips_of_writing_cost_less_than_other_edits() -> None:
    assert 0 < distance("num_epochs", "NUM_EPOCHS") == pytest.approx(0.9)
    assert distance("NUM-EPOCHS", "NUM_EPOCHS") == pytest.approx(0.2)
    assert distance("MOMENTUN", "MOMENTUM") == pytest.approx(0.9)
    assert distance("MOMENTUX", "MOMENTUM") == 1


@given(WORDS, WORDS)
def test_distance_is_symmetric_and_bounded(a: str, b: str) -> None:
    assert distance(a, b) == pytest.approx(distance(b, a))
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, b) <= min(FAR, max(len(a), len(b)))


@given(WORDS, WORDS, WORDS)
def test_an_edit_more_never_brings_words_closer_than_an_edit(a: str, b: str, c: str) -> None:
    assert abs(distance(a, b) - distance(a + c[0], b)) <= 1.0 + 1e-9


def test_nearest_words() -> None:
    known = ["sgd", "adam", "adamw", "lars"]
    assert nearest("admaw", known) == ["adamw"]
    assert nearest("SGD", known) == ["sgd"]
    assert nearest("completely_else", known) == []
    assert nearest("rotnet", ["rotnet_mnist5k", "probe"]) == ["rotnet_mnist5k"]


PATHS = [
    ("config", "OPTIMIZER", "NUM_EPOCHS"),
    ("config", "OPTIMIZER", "GROUPS", "*", "MATCH"),
    ("config", "DATA", "TRAIN", "DATA_LIMIT"),
    ("config", "DATA", "TEST", "DATA_LIMIT"),
]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("config.OPTIMZER.NUM_EPOCHS", "config.OPTIMIZER.NUM_EPOCHS"),
        ("config.NUM_EPOCHS", "config.OPTIMIZER.NUM_EPOCHS"),
        ("OPTIMIZER.NUM_EPOCHS", "config.OPTIMIZER.NUM_EPOCHS"),
        ("config.OPTIMIZERNUM_EPOCHS", "config.OPTIMIZER.NUM_EPOCHS"),
        ("config.OPTIMIZER.GROUPS.3.MACTH", "config.OPTIMIZER.GROUPS.3.MATCH"),
        ("config.DATA.TSET.DATA_LIMIT", "config.DATA.TEST.DATA_LIMIT"),
        ("config.DATA.DATA_LIMIT", "config.DATA.TRAIN.DATA_LIMIT"),
    ],
)
def test_nearest_path(typed: str, meant: str) -> None:
    assert ".".join(nearest_paths(typed.split("."), PATHS)[0][1]) == meant
