"""Labels in .npy files, tied to their images by path and fingerprint, never by position alone.

A label stage writes, under one prefix, `<prefix>_labels.npy` with `<prefix>_images.npy` (the paths, in the same
order) and `<prefix>_manifest.json` (root of the paths, fingerprint of the images, number of clusters) beside it; with
an empty prefix `labels.npy`, `images.npy`, `manifest.json`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vissl_like.data.npy import load_npy
from vissl_like.data.source import Source, SubsetSource, fingerprint, unicode_array
from vissl_like.errors import DataError
from vissl_like.files import damage, record_of, refusals_explained, replacing, write_array, write_json

_log = logging.getLogger(__name__)

_KIND = "labels"
#: Ends of the names of files that labels are read from; centroids and distances are for the user.
_READ = ("labels.npy", "images.npy", "sizes.npy")
#: Paths that are hashed at a time.
_AT_ONCE = 8192


@dataclass(frozen=True)
class Labels:
    """int64 (N,) class numbers, -1 for none; or (N, K) multi-hot, -1 for unknown."""

    values: np.ndarray
    num_classes: int
    class_names: list[str] | None = None

    def take(self, rows: np.ndarray) -> Labels:
        """The labels of some rows."""
        return Labels(self.values[rows], self.num_classes, self.class_names)


@dataclass(frozen=True)
class Siblings:
    """The files of one prefix that exist."""

    images: Path | None = None
    sizes: Path | None = None
    manifest: dict[str, Any] = field(default_factory=dict)


def read_siblings(file: str | Path) -> Siblings:
    """What lies beside x_labels.npy or x_images.npy (or labels.npy, images.npy). Other names have no siblings."""
    path = Path(os.path.expanduser(str(file)))
    stem = next((path.stem[: -len(end)] for end in ("labels", "images") if path.stem.endswith(end)), None)
    if stem is None or path.suffix != ".npy" or (stem and stem[-1].isalnum()):
        return Siblings()
    images, sizes, manifest = (path.with_name(stem + end) for end in ("images.npy", "sizes.npy", "manifest.json"))
    return Siblings(
        images=images if images.is_file() else None,
        sizes=sizes if sizes.is_file() else None,
        manifest=_read_manifest(manifest),
    )


def _read_manifest(file: Path) -> dict[str, Any]:
    """The manifest of a label stage; empty where there is none or the file belongs to something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: cannot be read ({error}), so nothing says whether the labels beside it are whole. Remove it and run the "
            "stage that writes them again; without it, labels and images are taken as they are."
        ) from error
    return found if isinstance(found, dict) and found.get("kind") == _KIND else {}


# --------------------------------------------------------------------------------------------- writing
def write_label_files(
    folder: str | Path,
    *,
    prefix: str,
    labels: np.ndarray,
    paths: np.ndarray,
    root: str,
    fingerprint: str,
    num_clusters: int,
    stamps: np.ndarray | None = None,
    centroids: np.ndarray | None = None,
    distances: np.ndarray | None = None,
    extra: dict[str, Any] | None = None,
    also_plain: bool = False,
) -> Path:
    """Write one label stage's files; returns the label file.

    labels int (N,), paths unicode (N,) as the dataset names its rows, root and fingerprint of that dataset; stamps
    int64 (N,) of the dataset let a reader name the image that changed. The manifest comes last and marks completeness.
    Arrays may be mapped: no copy of all is made. `also_plain`: a second set under the empty prefix, without centroids
    and distances.
    """
    target = Path(folder)
    with refusals_explained(target):
        target.mkdir(parents=True, exist_ok=True)
    base = f"{prefix}_" if prefix else ""
    paths = unicode_array(paths)
    label_file = target / f"{base}labels.npy"
    if len(labels) != len(paths):
        raise DataError(
            f"{label_file}: {len(labels)} labels for {len(paths)} images: the feature files do not fit together. Extract again."
        )
    _refuse_duplicates(paths, file=label_file)
    arrays = {
        "labels": np.asarray(labels, dtype=np.int64),
        "images": paths,
        "sizes": None if stamps is None else np.asarray(stamps, dtype=np.int64),
        "centroids": centroids,
        "distances": distances,
    }
    about = {
        "kind": _KIND,
        "root": root,
        "fingerprint": fingerprint,
        "num_clusters": int(num_clusters),
        "rows": len(paths),
        **(extra or {}),
    }
    _write_set(target, base, arrays, about)
    if also_plain and base:
        is_copied = {name: array is not None and f"{name}.npy" in _READ for name, array in arrays.items()}
        copies = {name: target / f"{base}{name}.npy" if wanted else None for name, wanted in is_copied.items()}
        _write_set(target, "", copies, about)
    return label_file


def _write_set(target: Path, base: str, arrays: Mapping[str, np.ndarray | Path | None], about: dict[str, Any]) -> None:
    """Write the files of one prefix: arrays, or copies of the files that hold them already."""
    manifest_file = target / f"{base}manifest.json"
    manifest_file.unlink(missing_ok=True)
    records = {}
    for name, array in arrays.items():
        file = target / f"{base}{name}.npy"
        file.unlink(missing_ok=True)  # also one of an earlier stage that is not written this time
        if isinstance(array, Path):
            with array.open("rb") as source, replacing(file) as copy:
                shutil.copyfileobj(source, copy)
        elif array is not None:
            write_array(file, array)
        if array is not None:
            records[file.name] = record_of(file)
    write_json(manifest_file, {**about, "files": records, "complete": True})


def _refuse_duplicates(paths: np.ndarray, *, file: str | Path) -> None:
    twice = _repeated(paths)
    if len(twice):
        raise DataError(
            f"{file}: {len(twice)} images are named more than once, the first is {str(twice[0])!r}. "
            "Labels are tied to images by path, so each may stand there once; take the others out."
        )


def _repeated(strings: np.ndarray) -> np.ndarray:
    """The strings (N,) that came before, sorted. Holds 64 bits of each beside those: no sorted copy of all."""
    width = max(1, strings.dtype.itemsize // np.dtype("U1").itemsize)
    factors = np.random.Generator(np.random.PCG64(0)).integers(1 << 64, size=width, dtype=np.uint64)
    hashes = np.empty(len(strings), dtype=np.uint64)
    for start in range(0, len(strings), _AT_ONCE):
        part = np.ascontiguousarray(strings[start : start + _AT_ONCE], dtype=f"U{width}")
        hashes[start : start + len(part)] = part.view(np.uint32).reshape(-1, width).astype(np.uint64) @ factors
    ordered = np.sort(hashes)
    suspects = np.sort(strings[np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]])])
    return suspects[1:][suspects[1:] == suspects[:-1]]


# --------------------------------------------------------------------------------------------- reading
def read_labels(
    file: str | Path, *, source: Source, alignment: str = "path", mmap: bool = True, key: str = "LABEL_PATHS"
) -> Labels:
    """The labels of a source's images, in its order, from a .npy label file.

    The images file beside it says which label is whose. A bare label file is an error unless `alignment` is "position",
    and then its length must be that of the source. An image without a label, a label file with a path twice, images that
    changed since they were labelled, and labelled images that are gone are errors. Labels of further images, which the
    source leaves out, are a warning.
    """
    siblings = read_siblings(file)
    if siblings.manifest and not siblings.manifest.get("complete"):
        raise DataError(f"{key}={str(file)!r}: the stage that writes these labels has not finished; run it again.")
    refuse_damaged(siblings, file=file, key=key)
    array = load_npy(os.path.expanduser(str(file)), key=key, mmap=mmap)
    labels = parse_labels(array, file=file, key=key, num_classes=int(siblings.manifest.get("num_clusters", 0)))
    if siblings.images is None:
        return _by_position(labels, file=file, source=source, alignment=alignment, key=key)
    listed = load_npy(siblings.images, key=key, mmap=mmap)
    if len(listed) != len(array):
        raise DataError(
            f"{key}={str(file)!r}: {len(array)} labels, but {siblings.images} beside it names {len(listed)} images. "
            "They are not from the same run; write both again."
        )
    rows = _rows_by_path(listed, root=str(siblings.manifest.get("root", "")), source=source, file=file, key=key)
    _look_at_the_rest(siblings, listed=listed, rows=rows, source=source, file=file, key=key)
    _refuse_changed_images(siblings, listed=listed, rows=rows, source=source, file=file, key=key)
    return labels.take(rows)


def refuse_damaged(siblings: Siblings, *, file: str | Path, key: str) -> None:
    """An error if one of the files that belong to these labels is not as the stage left it."""
    folder = Path(os.path.expanduser(str(file))).parent
    for name, record in siblings.manifest.get("files", {}).items():
        problem = damage(folder / name, record) if name.endswith(_READ) else ""
        if problem:
            raise DataError(
                f"{key}={str(file)!r}: {folder / name}: {problem}. Remove this file and run the stage that writes these labels "
                "again, with the same configuration."
            )


def parse_labels(array: np.ndarray, *, file: str | Path, key: str, num_classes: int = 0) -> Labels:
    """Class numbers (N,), names (N,) mapped to their sorted order, or multi-hot (N, K). Anything else is an error."""
    where = f"{key}={str(file)!r}"
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind in "US" and array.ndim == 1:
        names, numbers = np.unique(array.astype(np.str_), return_inverse=True)
        return Labels(numbers.astype(np.int64), len(names), [str(name) for name in names])
    if array.dtype.kind not in "iubf" or array.ndim not in (1, 2):
        raise DataError(
            f"{where}: holds {array.dtype} of shape {array.shape}. Labels are integers or names (N,), "
            "or multi-hot (N, K)."
        )
    values = array.astype(np.int64)
    if array.dtype.kind == "f" and not np.array_equal(values, array):
        raise DataError(
            f"{where}: holds fractions ({array.dtype}); labels are whole numbers. Write class numbers there."
        )
    lowest, highest = (int(values.min()), int(values.max())) if values.size else (0, -1)
    if lowest < -1:
        raise DataError(
            f"{where}: the smallest label is {lowest}. Labels count from 0, and -1 means none; number the classes so."
        )
    if values.ndim == 2:
        if highest > 1:
            raise DataError(
                f"{where}: 2-D labels are multi-hot (0, 1, or -1 for unknown), but one is {highest}. Class numbers are 1-D."
            )
        return Labels(values, values.shape[1])
    return Labels(values, max(highest + 1, num_classes))


def _by_position(labels: Labels, *, file: str | Path, source: Source, alignment: str, key: str) -> Labels:
    count = len(labels.values)
    if alignment != "position":
        stem = Path(file).stem
        sibling = stem[: -len("labels")] + "images.npy" if stem.endswith("labels") else f"{stem}_images.npy"
        raise DataError(
            f"{key}={str(file)!r}: nothing says which label belongs to which image ({sibling} is not beside it). "
            "Put the list of image paths there"
            + ("" if stem.endswith("labels") else f" (and call this file {stem}_labels.npy)")
            + ", or, if row k of this file is image k of the data, set "
            + key.split(".LABEL_PATHS")[0]
            + ".LABEL_ALIGNMENT=position."
        )
    if count != len(source):
        raise DataError(
            f"{key}={str(file)!r}: {count} labels for {len(source)} images. LABEL_ALIGNMENT=position needs one per "
            "image, in the order of the data."
        )
    return labels


def _rows_by_path(listed: np.ndarray, *, root: str, source: Source, file: str | Path, key: str) -> np.ndarray:
    """Row of the label file for each image of the source, int64 (N,): by identity, else by absolute file."""
    listed = _texts(listed)
    _refuse_duplicates(listed, file=file)
    wanted = source.paths
    rows = _find(wanted, among=listed)
    if (rows >= 0).all():
        return rows
    absolute = unicode_array(os.path.normpath(os.path.join(root, path)) for path in listed)
    by_file = _find(unicode_array(source.file(row) or "" for row in range(len(source))), among=absolute)
    if (by_file >= 0).all():
        return by_file
    missing = np.flatnonzero((rows if (rows >= 0).sum() >= (by_file >= 0).sum() else by_file) < 0)
    raise DataError(
        f"{key}={str(file)!r}: {len(missing)} of {len(wanted)} images have no label there, the first is "
        f"{str(wanted[missing[0]])!r}; the label file names {len(listed)} images, the first is {str(listed[0])!r}. "
        "Label all images of this split, or leave DATA_PATHS empty to use the images that the labels came with."
    )


def _texts(listed: np.ndarray) -> np.ndarray:
    return unicode_array(listed if listed.dtype.kind == "U" else (str(path) for path in listed))


def _find(wanted: np.ndarray, *, among: np.ndarray) -> np.ndarray:
    """Position of each string in `among` (no duplicates), -1 where it is not."""
    if not len(among):
        return np.full(len(wanted), -1, dtype=np.int64)
    order = np.argsort(among, kind="stable")
    place = np.minimum(np.searchsorted(among, wanted, sorter=order), len(among) - 1)
    rows = order[place]
    return np.where(among[rows] == wanted, rows, -1).astype(np.int64)


def _refuse_changed_images(
    siblings: Siblings, *, listed: np.ndarray, rows: np.ndarray, source: Source, file: str | Path, key: str
) -> None:
    """An error if the images are not those that were labelled: by size of each where that was kept, else all in one."""
    known = siblings.manifest.get("fingerprint")
    if not known:
        return
    now = source.stamps()
    cure = "Label them again, or put the images back that the labels were made from."
    if siblings.sizes is not None:
        changed = np.flatnonzero(load_npy(siblings.sizes, key=key)[rows] != now)
        if len(changed):
            what = "are gone" if (now[changed] == -1).all() else "changed"
            raise DataError(
                f"{key}={str(file)!r}: {len(changed)} of {len(rows)} images {what} since they were labelled, "
                f"the first is {source.path(int(changed[0]))!r}. {cure}"
            )
        return
    if len(np.unique(rows)) != len(listed):
        return  # a part of the labelled images: the fingerprint of all cannot be checked
    ordered = np.empty_like(now)
    ordered[rows] = now
    if fingerprint([str(path) for path in listed], ordered) != known:
        raise DataError(f"{key}={str(file)!r}: some of the {len(rows)} images changed since they were labelled. {cure}")


def _look_at_the_rest(
    siblings: Siblings, *, listed: np.ndarray, rows: np.ndarray, source: Source, file: str | Path, key: str
) -> None:
    """Labels that no image of the source has taken: an error if their images are gone, else a warning.

    DATA_LIMIT leaves images out on purpose: then the whole source counts. Where nothing says in which folder the images
    lay (a list that no stage wrote, a moved data set), nobody can tell what is gone.
    """
    is_left = np.ones(len(listed), dtype=bool)
    is_left[rows] = False
    whole = source.whole if isinstance(source, SubsetSource) else source
    if whole is not source and is_left.any():
        is_left &= ~np.isin(_texts(listed), whole.paths)
    left = [str(listed[row]) for row in np.flatnonzero(is_left)]
    if not left:
        return
    root = str(siblings.manifest.get("root", ""))
    gone = [path for path in left if not os.path.exists(os.path.join(root, path))] if os.path.isdir(root) else []
    if gone:
        raise DataError(
            f"{key}={str(file)!r}: {len(gone)} of {len(listed)} images are gone since they were labelled, the first is "
            f"{os.path.join(root, gone[0])!r}. Put them back, or label the images that are left again."
        )
    _log.warning(
        "%s=%r: %d of the %d images that it names are not among these %d, the first is %r; their labels are not used.",
        key, str(file), len(left), len(listed), len(whole), left[0],
    )  # fmt: skip


def join_labels(parts: list[Labels], *, key: str = "LABEL_PATHS") -> Labels:
    """Labels of several sources one after the other; names are numbered anew over all of them."""
    if len(parts) == 1:
        return parts[0]
    _refuse_mixture(parts, key=key)
    if parts[0].class_names is None:
        return Labels(np.concatenate([part.values for part in parts]), max(part.num_classes for part in parts))
    names = sorted({name for part in parts for name in part.class_names or []})
    return Labels(np.concatenate([renumber(part, names).values for part in parts]), len(names), names)


def _refuse_mixture(parts: list[Labels], *, key: str) -> None:
    widths = {part.values.shape[1:] for part in parts}
    if len(widths) > 1 or len({part.class_names is None for part in parts}) > 1:
        raise DataError(
            f"{key}: the files mix class numbers, class names and multi-hot rows, or multi-hot rows of different length. "
            "Write all of them in one form."
        )


def renumber(labels: Labels, names: list[str]) -> Labels:
    """The same classes, numbered by another list of names that holds all of them."""
    number = {name: k for k, name in enumerate(names)}
    new = np.array([number[name] for name in labels.class_names or []], dtype=np.int64)
    values = np.where(labels.values < 0, labels.values, new[np.maximum(labels.values, 0)])
    return Labels(values, len(names), names)


def multi_hot(parts: list[Labels], *, key: str = "LABEL_PATHS") -> Labels:
    """Several labels of the same images (N,) -> (N, K): an image has every class that one of the files gives it."""
    if any(part.values.ndim != 1 for part in parts):
        raise DataError(
            f"{key}: a list of files for one source takes files with one class per image (N,). Give a multi-hot file alone."
        )
    _refuse_mixture(parts, key=key)
    if parts[0].class_names:
        names = sorted({name for part in parts for name in part.class_names or []})
        parts = [renumber(part, names) for part in parts]
    hot = np.zeros((len(parts[0].values), max(part.num_classes for part in parts)), dtype=np.int64)
    for part in parts:
        rows = np.flatnonzero(part.values >= 0)
        hot[rows, part.values[rows]] = 1
    return Labels(hot, hot.shape[1], parts[0].class_names)
