"""Feature files: exact rows across shards and writers, restart, damage, refusals, and other formats."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vissl_like.analysis import features as module
from vissl_like.analysis.feature_formats import write_formats, write_per_image
from vissl_like.analysis.features import FeatureStore, FeatureWriter, Subject, layer_folder
from vissl_like.analysis.npy_file import create_array
from vissl_like.analysis.shards import row_sums
from vissl_like.errors import ConfigError, DataError

ROWS, BLOCK, SHARD = 23, 4, 7
LAYERS = {"res4": (3, 2, 2), "blocks.3": (5,)}


def subject(rows: int = ROWS, *, paths: list[str] | None = None, **identity: object) -> Subject:
    return Subject(
        split="TRAIN",
        paths=np.array(paths or [f"a/{i}.jpg" for i in range(rows)]),
        stamps=np.arange(rows),
        labels=np.arange(rows) % 3,
        root="/data",
        name="toy",
        fingerprint="f00",
        class_names=None,
        identity={"weights": "w1", **identity},
    )


def values(rows: int = ROWS) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=(rows, *shape)).astype(np.float32) for name, shape in LAYERS.items()}


def prepare(
    folder: Path, *, dtype: str = "float32", overwrite: bool = False, block_rows: int = BLOCK, **about: Any
) -> bool:
    return FeatureWriter.prepare(
        folder / "TRAIN",
        subject(**about),
        layers=LAYERS,
        dtype=dtype,
        shard_rows=SHARD,
        block_rows=block_rows,
        overwrite=overwrite,
    )


def write(folder: Path, blocks: list[int] | None = None, *, close: bool = True) -> FeatureWriter:
    writer = FeatureWriter(folder / "TRAIN")
    for block in writer.pending() if blocks is None else blocks:
        start, stop = writer.blocks[block]
        writer.write(block, {name: array[start:stop] for name, array in values().items()})
    if close:
        writer.close()
    return writer


def extract(folder: Path, **options: object) -> None:
    assert prepare(folder, **options)  # type: ignore[arg-type]
    write(folder)
    FeatureWriter.finish(folder / "TRAIN")


def test_rows_come_back_in_order_from_any_span(tmp_path: Path) -> None:
    extract(tmp_path)
    for layer, array in values().items():
        store = FeatureStore.open(tmp_path, "TRAIN", layer)
        flat = array.reshape(ROWS, -1)
        assert len(store) == ROWS and store.dim == flat.shape[1] and store.shape == LAYERS[layer]
        for start, stop in [(0, ROWS), (0, 0), (5, 9), (6, 8), (7, 14), (13, 23), (22, 23)]:
            assert np.array_equal(store.read(start, stop), flat[start:stop])
        picked = np.array([0, 6, 7, 8, 20, 22])
        assert np.array_equal(store.take(picked), flat[picked])
    assert store.paths.tolist() == subject().paths.tolist() and store.fingerprint == "f00"
    assert store.labels is not None and store.labels.tolist() == (np.arange(ROWS) % 3).tolist()
    names = sorted(file.name for file in (tmp_path / "TRAIN" / "res4").iterdir())
    assert names == [*(f"shard_0000{i}.npy" for i in range(4)), "sums.npy"]
    assert not (tmp_path / "TRAIN" / "done.npy").exists()


def test_several_writers_share_shards(tmp_path: Path) -> None:
    prepare(tmp_path)
    writers = [write(tmp_path, blocks, close=False) for blocks in ([0, 1], [2, 3], [4, 5])]
    for writer in writers:
        writer.close()
    FeatureWriter.finish(tmp_path / "TRAIN")
    assert np.array_equal(FeatureStore.open(tmp_path, "TRAIN", "blocks.3").read(0, ROWS), values()["blocks.3"])


def test_float16_is_stored_and_read_as_float32(tmp_path: Path) -> None:
    extract(tmp_path, dtype="float16")
    store = FeatureStore.open(tmp_path, "TRAIN", "blocks.3")
    assert np.load(tmp_path / "TRAIN" / "blocks.3" / "shard_00000.npy").dtype == np.float16
    assert store.read(0, 3).dtype == np.float32
    assert np.array_equal(store.read(0, ROWS), values()["blocks.3"].astype(np.float16).astype(np.float32))


def test_the_same_extraction_is_recognised(tmp_path: Path) -> None:
    extract(tmp_path)
    assert not prepare(tmp_path)


def test_an_interrupted_one_goes_on(tmp_path: Path) -> None:
    prepare(tmp_path)
    write(tmp_path, [0, 1, 4])
    assert prepare(tmp_path)
    assert FeatureWriter(tmp_path / "TRAIN").pending() == [2, 3, 5]
    with pytest.raises(DataError, match="interrupted"):
        FeatureStore.open(tmp_path, "TRAIN", "res4")
    with pytest.raises(DataError, match="3 blocks of rows were not written"):
        FeatureWriter.finish(tmp_path / "TRAIN")
    write(tmp_path)
    FeatureWriter.finish(tmp_path / "TRAIN")
    assert np.array_equal(FeatureStore.open(tmp_path, "TRAIN", "blocks.3").read(0, ROWS), values()["blocks.3"])


def test_blocks_that_were_not_forced_to_disk_are_not_marked(tmp_path: Path) -> None:
    prepare(tmp_path)
    writer = write(tmp_path, [0, 1], close=False)  # as if killed here
    assert FeatureWriter(tmp_path / "TRAIN").pending() == [0, 1, 2, 3, 4, 5]
    writer.flush()
    assert FeatureWriter(tmp_path / "TRAIN").pending() == [2, 3, 4, 5]


@pytest.mark.parametrize("damage", ["truncate", "remove", "garbage"])
def test_a_damaged_shard_is_an_error_and_made_anew(tmp_path: Path, damage: str) -> None:
    extract(tmp_path)
    shard = tmp_path / "TRAIN" / "blocks.3" / "shard_00001.npy"
    if damage == "truncate":
        os.truncate(shard, shard.stat().st_size - 8)
    elif damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"shard_00001\.npy: .*Run the extraction again"):
        FeatureStore.open(tmp_path, "TRAIN", "blocks.3")
    assert prepare(tmp_path)
    assert FeatureWriter(tmp_path / "TRAIN").pending() == [1, 2, 3]  # rows 7..13, in blocks of four
    write(tmp_path)
    FeatureWriter.finish(tmp_path / "TRAIN")
    for layer, array in values().items():
        assert np.array_equal(FeatureStore.open(tmp_path, "TRAIN", layer).read(0, ROWS), array.reshape(ROWS, -1))


@pytest.mark.parametrize("shard", [0, 2])
def test_changed_bytes_are_noticed_when_their_rows_are_read(tmp_path: Path, shard: int) -> None:
    extract(tmp_path)
    file = tmp_path / "TRAIN" / "res4" / f"shard_0000{shard}.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 16  # in its last row
    file.write_bytes(content)
    store, row = FeatureStore.open(tmp_path, "TRAIN", "res4"), shard * SHARD + 6
    assert np.array_equal(store.read(0, row), values()["res4"].reshape(ROWS, -1)[:row])
    message = rf"shard_0000{shard}\.npy: 1 of \d+ rows, the first is row {row} of TRAIN, .*Remove this file and run"
    with pytest.raises(DataError, match=message):
        store.read(row - 1, row + 1)
    with pytest.raises(DataError, match=message):
        store.take(np.array([2, row]))
    assert not prepare(tmp_path)  # a start reads no rows: a terabyte of features would take an hour
    file.unlink()
    assert prepare(tmp_path)
    rows = np.arange(shard * SHARD, (shard + 1) * SHARD)
    assert FeatureWriter(tmp_path / "TRAIN").pending() == np.unique(rows // BLOCK).tolist()
    write(tmp_path)
    FeatureWriter.finish(tmp_path / "TRAIN")
    assert np.array_equal(
        FeatureStore.open(tmp_path, "TRAIN", "res4").read(0, ROWS), values()["res4"].reshape(ROWS, -1)
    )


@pytest.mark.parametrize("name", ["images.npy", "sizes.npy", "labels.npy", "res4/sums.npy"])
@pytest.mark.parametrize("is_removed", [True, False])
def test_damaged_files_beside_the_shards_are_noticed_and_made_anew(tmp_path: Path, name: str, is_removed: bool) -> None:
    extract(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.npy")}
    file = tmp_path / "TRAIN" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    if is_removed:
        file.unlink()
    with pytest.raises(DataError, match=rf"{name}: .*run the extraction again"):
        store = FeatureStore.open(tmp_path, "TRAIN", "res4")
        _ = store.paths, store.stamps, store.labels
    assert prepare(tmp_path)
    write(tmp_path)
    FeatureWriter.finish(tmp_path / "TRAIN")
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*.npy")}


@given(
    arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 40))),
    st.tuples(st.integers(0, 200), st.integers(1, 255)),
)
def test_any_changed_byte_changes_the_sum_of_its_row_alone(rows: np.ndarray, change: tuple[int, int]) -> None:
    changed, (place, mask) = rows.copy(), change
    place %= rows.size
    changed.reshape(-1)[place] ^= mask
    differ = row_sums(changed) != row_sums(rows)
    assert np.flatnonzero(differ).tolist() == [place // rows.shape[1]]
    assert (row_sums(np.zeros_like(rows)) != 0).all()


def test_a_shard_of_zeros_that_was_made_for_an_extraction_that_died_is_not_taken_for_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(tmp_path)
    shard = tmp_path / "TRAIN" / "res4" / "shard_00001.npy"
    shard.unlink()

    def create_and_die(file: Path, **form: Any) -> None:
        create_array(file, **form)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "create_array", create_and_die)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path)
    assert not np.load(shard).any()
    with pytest.raises(DataError, match="interrupted"):
        FeatureStore.open(tmp_path, "TRAIN", "res4")
    assert prepare(tmp_path)
    assert FeatureWriter(tmp_path / "TRAIN").pending() == [1, 2, 3]


def test_another_batch_size_takes_what_is_finished_and_refuses_what_is_not(tmp_path: Path) -> None:
    assert prepare(tmp_path, block_rows=5)  # nothing done yet: a new size is fine
    assert prepare(tmp_path)
    write(tmp_path, [0])
    with pytest.raises(DataError, match=r"in batches of 4 images. Set config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=4"):
        prepare(tmp_path, block_rows=5)
    write(tmp_path)
    assert FeatureWriter.finish(tmp_path / "TRAIN")["block_rows"] == 4
    assert not prepare(tmp_path, block_rows=5)
    (tmp_path / "TRAIN" / "res4" / "shard_00003.npy").unlink()
    assert prepare(tmp_path, block_rows=5)  # mended with the blocks that the others were made with
    assert FeatureWriter(tmp_path / "TRAIN").pending() == [5]


def test_features_of_something_else_are_refused_unless_overwritten(tmp_path: Path) -> None:
    extract(tmp_path)
    with pytest.raises(DataError, match="different: transforms, weights.*RUN.OVERWRITE"):
        prepare(tmp_path, weights="w2", transforms="t")
    (tmp_path / "TRAIN" / "mine.txt").write_text("keep")
    assert prepare(tmp_path, weights="w2", overwrite=True)
    assert FeatureWriter(tmp_path / "TRAIN").pending() == list(range(6))
    assert (tmp_path / "TRAIN" / "mine.txt").exists()


def test_unreadable_images_are_kept_in_mind(tmp_path: Path) -> None:
    prepare(tmp_path)
    writer = FeatureWriter(tmp_path / "TRAIN")
    for block, (start, stop) in enumerate(writer.blocks):
        rows = np.arange(start, stop)
        writer.write(
            block, {name: array[start:stop] for name, array in values().items()}, valid=~np.isin(rows, [5, 21])
        )
    writer.close()
    manifest = FeatureWriter.finish(tmp_path / "TRAIN")
    assert manifest["bad_rows"] == [5, 21]
    labels = FeatureStore.open(tmp_path, "TRAIN", "res4").labels
    assert labels is not None and np.flatnonzero(labels < 0).tolist() == [5, 21]
    (
        tmp_path / "TRAIN" / "res4" / "shard_00000.npy"
    ).unlink()  # making that shard again forgets nothing about the others
    prepare(tmp_path)
    write(tmp_path)
    assert FeatureWriter.finish(tmp_path / "TRAIN")["bad_rows"] == [5, 21]


def test_images_of_another_size_are_an_error(tmp_path: Path) -> None:
    prepare(tmp_path)
    writer = FeatureWriter(tmp_path / "TRAIN")
    with pytest.raises(DataError, match=r"rows 4\.\.7 have shape \(4, 3, 2, 3\).*Resize"):
        writer.write(1, {"res4": np.zeros((4, 3, 2, 3)), "blocks.3": np.zeros((4, 5))})


def test_values_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    prepare(tmp_path, dtype="float16")
    writer = FeatureWriter(tmp_path / "TRAIN")
    large = {"res4": np.zeros((4, 3, 2, 2)), "blocks.3": np.full((4, 5), 1e6)}
    with pytest.raises(DataError, match="row 4 hold NaN or infinity. They overflow float16"):
        writer.write(1, large)
    large["blocks.3"][:] = 0
    large["res4"][2, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="row 6 hold NaN or infinity. Look at the weights"):
        writer.write(1, large)


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    rows, layers = 300, {"trunk": (2,)}
    x = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
    folder = tmp_path / "TRAIN"
    FeatureWriter.prepare(folder, subject(rows), layers=layers, dtype="float32", shard_rows=1, block_rows=150)
    writer, before = FeatureWriter(folder), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 100, before[1]))
    try:
        for block in range(2):
            writer.write(block, {"trunk": x[150 * block : 150 * (block + 1)]})
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    FeatureWriter.finish(folder)
    assert np.array_equal(FeatureStore.open(tmp_path, "TRAIN").read(0, rows), x)


def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DataError, match=r"\.npy: the disk is full.*what is finished is kept"):
        write(tmp_path, [0])


def test_opening_what_is_not_there(tmp_path: Path) -> None:
    extract(tmp_path)
    with pytest.raises(DataError, match=r"no extracted features of split TEST there \(found: TRAIN\)"):
        FeatureStore.open(tmp_path, "TEST")
    with pytest.raises(DataError, match=r"LAYER_NAME='': .*Extracted: res4, blocks.3"):
        FeatureStore.open(tmp_path, "TRAIN")
    with pytest.raises(DataError, match="did you mean 'blocks.3'"):
        FeatureStore.open(tmp_path, "TRAIN", "block.3")


def test_layer_folders_are_safe_names() -> None:
    assert layer_folder("blocks.3") == "blocks.3" and layer_folder("a/b c") == "a_b_c" and layer_folder("..") == "layer"


# -------------------------------------------------------------------------------------------------------- other formats
def test_safetensors_and_parquet_hold_the_same(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet
    from safetensors.numpy import load_file

    extract(tmp_path)
    store = FeatureStore.open(tmp_path, "TRAIN", "res4")
    files = write_formats(store, ["safetensors", "parquet"])
    parts = [load_file(file)["features"] for file in files if file.suffix == ".safetensors"]
    assert np.array_equal(np.concatenate(parts), values()["res4"])
    table = parquet.read_table(files[-1])
    assert table.column_names == ["id", "path", "label", "vector"]
    assert table["path"].to_pylist() == subject().paths.tolist() and table["id"].to_pylist() == list(range(ROWS))
    assert table["label"].to_pylist() == (np.arange(ROWS) % 3).tolist()
    vectors = np.array(table["vector"].to_pylist(), dtype=np.float32)
    assert np.array_equal(vectors, values()["res4"].reshape(ROWS, -1))
    assert write_formats(store, ["safetensors", "parquet"]) == files


def test_parquet_without_pyarrow_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from vissl_like.analysis.feature_formats import check_formats

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    check_formats(["safetensors"])
    with pytest.raises(ConfigError, match="pip install"):
        check_formats(["parquet"])


def test_one_file_per_image_never_collides_or_escapes(tmp_path: Path) -> None:
    paths = [f"{'ab'[i % 2]}/{i // 2}.{'jpg' if i < 20 else 'png'}" for i in range(ROWS)]
    extract(tmp_path, paths=["/" + paths[0], *paths[1:]])
    store = FeatureStore.open(tmp_path, "TRAIN", "blocks.3")
    assert write_per_image(store, tmp_path / "out") == ROWS
    files = [tmp_path / "out" / "blocks.3" / f"{path}.npy" for path in paths]
    assert np.array_equal(np.concatenate([np.load(file) for file in files]), values()["blocks.3"])
    extract(tmp_path / "other", paths=["../x.jpg", *paths[1:]])
    with pytest.raises(DataError, match="below a folder"):
        write_per_image(FeatureStore.open(tmp_path / "other", "TRAIN", "blocks.3"), tmp_path / "out")


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    extract(tmp_path)
    manifest = json.loads((tmp_path / "TRAIN" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["rows"] == ROWS
    assert manifest["layers"]["res4"]["shape"] == [3, 2, 2] and manifest["layers"]["res4"]["dim"] == 12
    assert manifest["dataset"]["fingerprint"] == "f00"
