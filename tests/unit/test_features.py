"""Feature files: exact rows across shards and writers, restart, damage, refusals, and other formats."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from vissl_like.analysis import features as module
from vissl_like.analysis.feature_formats import write_formats, write_per_image
from vissl_like.analysis.features import FeatureStore, FeatureWriter, Subject, layer_folder
from vissl_like.errors import ConfigError, DataError

ROWS, BLOCK, SHARD = 23, 4, 7
LAYERS = {"res4": (3, 2, 2), "blocks.3": (5,)}


def subject(rows: int = ROWS, **identity: object) -> Subject:
    return Subject(
        split="TRAIN",
        paths=np.array([f"a/{i}.jpg" for i in range(rows)]),
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


def prepare(folder: Path, *, dtype: str = "float32", overwrite: bool = False, **identity: object) -> bool:
    return FeatureWriter.prepare(
        folder / "TRAIN",
        subject(**identity),
        layers=LAYERS,
        dtype=dtype,
        shard_rows=SHARD,
        block_rows=BLOCK,
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
    assert sorted(file.name for file in (tmp_path / "TRAIN" / "res4").iterdir()) == [
        f"shard_0000{i}.npy" for i in range(4)
    ]
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


def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "pwrite", full)
    with pytest.raises(DataError, match="the disk is full.*goes on where it stopped"):
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
    extract(tmp_path)
    images = tmp_path / "TRAIN" / "images.npy"
    paths = [f"{'ab'[i % 2]}/{i // 2}.{'jpg' if i < 20 else 'png'}" for i in range(ROWS)]
    np.save(images, np.array(["/" + paths[0], *paths[1:]]))
    store = FeatureStore.open(tmp_path, "TRAIN", "blocks.3")
    assert write_per_image(store, tmp_path / "out") == ROWS
    files = [tmp_path / "out" / "blocks.3" / f"{path}.npy" for path in paths]
    assert np.array_equal(np.concatenate([np.load(file) for file in files]), values()["blocks.3"])
    np.save(images, np.array(["../x.jpg", *paths[1:]]))
    with pytest.raises(DataError, match="below a folder"):
        write_per_image(store, tmp_path / "out")


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    extract(tmp_path)
    manifest = json.loads((tmp_path / "TRAIN" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["rows"] == ROWS
    assert manifest["layers"]["res4"]["shape"] == [3, 2, 2] and manifest["layers"]["res4"]["dim"] == 12
    assert manifest["dataset"]["fingerprint"] == "f00"
