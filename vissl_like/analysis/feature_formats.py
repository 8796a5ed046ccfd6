"""Copies of finished features in other formats: safetensors, parquet, and one .npy per image. Each is made shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vissl_like.analysis.features import FeatureStore, layer_folder
from vissl_like.analysis.rows import spans
from vissl_like.errors import ConfigError, DataError
from vissl_like.files import refusals_explained, replacing


def check_formats(formats: list[str]) -> None:
    """Raises ConfigError if a format needs a package that is not installed; before anything is computed."""
    if "parquet" in formats:
        _pyarrow()


def write_formats(store: FeatureStore, formats: list[str]) -> list[Path]:
    """Write the copies that are not there yet, beside the shards. Returns their files."""
    files: list[Path] = []
    if "safetensors" in formats:
        files += _write_safetensors(store)
    if "parquet" in formats:
        files.append(_write_parquet(store))
    return files


def _write_safetensors(store: FeatureStore) -> list[Path]:
    """shard_00000.safetensors ... with one tensor `features` each."""
    from safetensors.numpy import save

    folder = store.folder / layer_folder(store.layer)
    files = []
    for number, (start, stop) in enumerate(spans(store.rows, store.shard_rows)):
        file = folder / f"shard_{number:05d}.safetensors"
        if not file.exists():
            array = store.read(start, stop).reshape(-1, *store.shape).astype(store.dtype, copy=False)
            content = save({"features": array}, metadata={"first_row": str(start), "layer": store.layer})
            with replacing(file) as stream:
                stream.write(content)
        files.append(file)
    return files


def _write_parquet(store: FeatureStore) -> Path:
    """features.parquet with the columns id, path, label and vector; one row group per shard."""
    pyarrow, parquet = _pyarrow()
    file = store.folder / layer_folder(store.layer) / "features.parquet"
    if file.exists():
        return file
    kind = pyarrow.float16() if store.dtype == "float16" else pyarrow.float32()
    paths, labels = store.paths, store.labels
    label_kind = pyarrow.int64() if labels is None or labels.ndim == 1 else pyarrow.list_(pyarrow.int64())
    schema = pyarrow.schema(
        [
            ("id", pyarrow.int64()),
            ("path", pyarrow.string()),
            ("label", label_kind),
            ("vector", pyarrow.list_(kind, store.dim)),
        ]
    )
    with replacing(file) as stream, parquet.ParquetWriter(stream, schema) as writer:
        for start, stop in spans(store.rows, store.shard_rows):
            flat = pyarrow.array(store.read(start, stop).astype(store.dtype).ravel(), type=kind)
            label = [None] * (stop - start) if labels is None else labels[start:stop].tolist()
            columns = [
                pyarrow.array(np.arange(start, stop)),
                pyarrow.array(paths[start:stop].tolist(), type=pyarrow.string()),
                pyarrow.array(label, type=label_kind),
                pyarrow.FixedSizeListArray.from_arrays(flat, store.dim),
            ]
            writer.write_table(pyarrow.table(columns, schema=schema))
    return file


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "config.EXTRACT_FEATURES.FORMATS=[parquet]: needs pyarrow. pip install 'vissl_like[parquet]', or leave it out."
        ) from error
    return pyarrow, pyarrow.parquet


def write_per_image(store: FeatureStore, folder: Path) -> int:
    """folder/<layer>/<path of the image>.npy, shape (1, ...), by the image's whole relative path. Returns their number."""
    target, paths = folder / layer_folder(store.layer), store.paths
    for start, stop in spans(store.rows, 4096):
        block = store.read(start, stop).reshape(-1, *store.shape).astype(store.dtype)
        for row, path in enumerate(paths[start:stop]):
            file = target / f"{_inside(str(path))}.npy"
            with refusals_explained(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, block[row : row + 1], allow_pickle=False)
    return store.rows


def _inside(path: str) -> str:
    """The path of an image as a path below a folder: without a leading slash or drive, and never leading out of it."""
    parts = [part for part in path.replace("\\", "/").replace(":", "").split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise DataError(
            f"{path!r}: cannot be a file name below a folder, so MAP_FEATURES_TO_IMG_NAME cannot be used here."
        )
    return "/".join(parts)
