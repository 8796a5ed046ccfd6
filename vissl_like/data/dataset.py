"""From a DATA section to the dataset of one split: sources, labels, the rows that DATA_LIMIT leaves, views."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vissl_like import registry
from vissl_like.config.schema_data import Data, Split
from vissl_like.core import distributed
from vissl_like.data import catalog
from vissl_like.data.annotated import refuse_missing_masks
from vissl_like.data.folder import FilelistSource, folder_classes
from vissl_like.data.images import ImageDataset
from vissl_like.data.labels import (
    Labels,
    join_labels,
    multi_hot,
    parse_labels,
    read_labels,
    read_siblings,
    refuse_damaged,
    renumber,
)
from vissl_like.data.limit import limited_rows, needs_labels
from vissl_like.data.npy import load_npy
from vissl_like.data.source import ConcatSource, Source, SourceRequest, SubsetSource
from vissl_like.data.streams import shard_classes
from vissl_like.data.views import build_views
from vissl_like.errors import ConfigError, DataError

_log = logging.getLogger(__name__)
_DISK = ("disk_folder", "disk_filelist")
_SHARDS = "webdataset"
SPLITS = ("TRAIN", "VAL", "TEST")
#: Images whose paths are compared between processes.
_COMPARED = 4096


def is_used(data: Data, split: str) -> bool:
    """Whether a split has data at all."""
    return bool(getattr(data, split).DATA_SOURCES)


def build_dataset(
    data: Data,
    split: str,
    *,
    seed: int,
    train: bool = False,
    input_type: str = "rgb",
    run_dir: Path | None = None,
    class_names: list[str] | None = None,
    with_masks: bool = False,
) -> ImageDataset:
    """The dataset of TRAIN, VAL or TEST. Every process of a run calls it.

    `train`: it will be trained on, so it must have labels. `input_type`: MODEL.INPUT_TYPE. `run_dir`: where
    bad_images.txt goes. Named classes of VAL and TEST are numbered as in TRAIN (or by `class_names`), even if some are
    missing there. `with_masks`: samples carry the masks of their objects, of which none may be missing.
    """
    options: Split = getattr(data, split)
    _check_lists(options, split)
    views = build_views(
        options.TRANSFORMS,
        key=f"config.DATA.{split}.TRANSFORMS",
        input_type=input_type,
        augment_on_device=augments_on_device(data),
        use_reduced=data.REDUCED_DECODE,
        with_masks=with_masks,
    )
    opened = [_open_source(data, split, position) for position in range(len(options.DATA_SOURCES))]
    source, labels = _choose_rows(opened, options, split)
    if with_masks:
        refuse_missing_masks(source, key=f"config.DATA.{split}")
    if split != "TRAIN" and labels is not None and labels.class_names:
        labels = _numbered_as(class_names or _train_class_names(data), labels, split)
    if train and labels is None and views.label_names is None:
        raise DataError(
            f"config.DATA.{split}: these images have no labels. Put each class into a folder of its own, or give "
            f"LABEL_PATHS, a transform that makes labels (ImgRotatePil), or LABEL_TYPE=zero or sample_index."
        )
    dataset = ImageDataset(
        source,
        views=views,
        labels=labels,
        split=split,
        name=(options.DATASET_NAMES or options.DATA_SOURCES)[0],
        seed=seed,
        max_bad_fraction=data.MAX_BAD_FRACTION,
        run_dir=run_dir,
    )
    _refuse_other_images(dataset)
    return dataset


def _refuse_other_images(dataset: ImageDataset) -> None:
    """Raise DataError, on every process, unless all of them see the same images in the same order, with the same labels."""
    different = distributed.disagreement(lambda: f"{len(dataset)} images ({_digest(dataset)})")
    if different:
        raise DataError(
            f"config.DATA.{dataset.split}: the processes do not see the same images and labels: {different}. The folder "
            "was being filled, its file system lags behind, or another machine has another copy of it. Start again when "
            "all machines see the same."
        )


def _digest(dataset: ImageDataset) -> str:
    """Of the labels and of at most some thousands of the paths: an image more or less moves all that follow it."""
    digest = hashlib.blake2b(digest_size=4)
    for row in range(0, len(dataset), max(1, len(dataset) // _COMPARED)):
        digest.update(dataset.source.path(row).encode("utf-8", "surrogateescape") + b"\0")
    if dataset.labels is not None:
        digest.update(np.ascontiguousarray(dataset.labels).tobytes())
    digest.update(repr(dataset.class_names).encode())
    return digest.hexdigest()


def augments_on_device(data: Data) -> bool:
    """Whether colour and blur are left to the device: by option, else where the device is a GPU."""
    if data.AUGMENT_ON_DEVICE != "auto":
        return bool(data.AUGMENT_ON_DEVICE)
    return distributed.current().device.type == "cuda"


def _check_lists(options: Split, split: str) -> None:
    """The lists of a split are parallel: entry i of each speaks of the same source."""
    key = f"config.DATA.{split}"
    count = len(options.DATA_SOURCES)
    if count == 0:
        given = " DATA_PATHS is set: add DATA_SOURCES=[disk_folder] or [disk_filelist]." if options.DATA_PATHS else ""
        raise ConfigError(f"{key}.DATA_SOURCES is empty, so there is no data for this split.{given}")
    known = registry.names("data_source")
    problems = [registry.problem("data_source", kind, f"DATA.{split}.DATA_SOURCES") for kind in options.DATA_SOURCES]
    for kind in options.LABEL_SOURCES:
        if kind not in known:
            hint = registry.suggest(kind, known) or "."
            problems.append(f"{key}.LABEL_SOURCES={kind!r}: no such source{hint} Known: {', '.join(known)}.")
    for name in ("DATASET_NAMES", "DATA_PATHS", "LABEL_SOURCES"):
        length = len(getattr(options, name))
        if length not in (0, count):
            problems.append(
                f"{key}.{name} has {length} entries but DATA_SOURCES has {count}; give one for each source."
            )
    if options.COLLATE_FUNCTION_PARAMS:
        problems.append(
            f"{key}.COLLATE_FUNCTION_PARAMS={options.COLLATE_FUNCTION_PARAMS}: {options.COLLATE_FUNCTION} takes none."
        )
    if len(options.LABEL_PATHS) not in (0, 1, count):
        problems.append(f"{key}.LABEL_PATHS has {len(options.LABEL_PATHS)} entries but DATA_SOURCES has {count}.")
    wrong = [problem for problem in problems if problem]
    if wrong:
        raise ConfigError("\n".join(wrong))


# --------------------------------------------------------------------------------------------- sources
@dataclass(frozen=True)
class _Opened:
    """A source, and the label files that belong to it ([]: its own labels)."""

    source: Source
    label_files: list[str]


def _open_source(data: Data, split: str, position: int) -> _Opened:
    options: Split = getattr(data, split)
    kind = options.DATA_SOURCES[position]
    name = options.DATASET_NAMES[position] if options.DATASET_NAMES else ""
    path = options.DATA_PATHS[position] if options.DATA_PATHS else ""
    label_files = _label_files(options, split, position)
    if kind in (*_DISK, _SHARDS) and not path:
        siblings = read_siblings(label_files[0]) if label_files and kind in _DISK else None
        if siblings is not None:  # the list of images may be what is lost
            refuse_damaged(siblings, file=label_files[0], key=f"config.DATA.{split}.LABEL_PATHS")
        if siblings is not None and siblings.images is not None:
            return _Opened(_images_of_labels(siblings.images, options, name=name, split=split), label_files)
        entry = catalog.look_up(name, split=split, catalog=data.CATALOG)
        path = entry.images
        if (
            not label_files
            and kind in _DISK
            and entry.labels
            and not os.path.isdir(entry.labels)
            and options.label_type == "standard"
        ):
            label_files = [entry.labels]
    _check_label_source(options, split, position, label_files)
    request = SourceRequest(
        options.USE_SPLIT or split, position, name, path, options, data.TRAIN_SPLIT, data.DOWNLOAD, data.STREAM
    )
    factory = registry.resolve("data_source", kind, key=f"DATA.{split}.DATA_SOURCES")
    return _Opened(factory.build(request), label_files)


def _check_label_source(options: Split, split: str, position: int, label_files: list[str]) -> None:
    """LABEL_SOURCES may not say one thing and the files another."""
    if options.label_type != "standard" or position >= len(options.LABEL_SOURCES):
        return
    kind = options.LABEL_SOURCES[position]
    where = f"config.DATA.{split}.LABEL_SOURCES.{position}={kind!r}"
    if kind == "disk_filelist" and not label_files and not options.LABEL_PATHS:
        raise ConfigError(
            f"{where}: there is no label file. Give config.DATA.{split}.LABEL_PATHS, or leave LABEL_SOURCES empty to take "
            "the labels that the images come with."
        )
    if kind == "disk_folder" and label_files and options.LABEL_PATHS:
        raise ConfigError(
            f"{where}: labels by folder, but config.DATA.{split}.LABEL_PATHS gives {label_files[0]!r}. Leave one of them "
            "out, or write LABEL_SOURCES=[disk_filelist]."
        )


def _images_of_labels(images: Path, options: Split, *, name: str, split: str) -> FilelistSource:
    return FilelistSource(
        images,
        name=name or "disk_filelist",
        remove_prefix=options.REMOVE_IMG_PATH_PREFIX,
        new_prefix=options.NEW_IMG_PATH_PREFIX,
        mmap=options.MMAP_MODE,
        key=f"config.DATA.{split}.LABEL_PATHS",
    )


def _label_files(options: Split, split: str, position: int) -> list[str]:
    """The .npy label files of one source. A folder (VISSL's catalogs name it twice) stands for the folder's classes."""
    if options.label_type != "standard" or position >= len(options.LABEL_PATHS):
        return []
    given = options.LABEL_PATHS[position]
    files = [given] if isinstance(given, str) else list(given)
    for file in files:
        if not os.path.exists(os.path.expanduser(file)):
            raise DataError(f"config.DATA.{split}.LABEL_PATHS.{position}={file!r}: no such file.")
    folders = [file for file in files if os.path.isdir(file)]
    if not folders:
        return files
    written = [os.path.join(folder, "labels.npy") for folder in folders]
    if os.path.isfile(written[0]):
        raise ConfigError(
            f"config.DATA.{split}.LABEL_PATHS.{position}={given!r}: this is the folder of a label stage. Give its file "
            f"{written[0]!r}."
        )
    images = options.DATA_PATHS[position] if options.DATA_PATHS else folders[0]
    if len(files) > 1 or os.path.realpath(folders[0]) != os.path.realpath(images):
        raise ConfigError(
            f"config.DATA.{split}.LABEL_PATHS.{position}={given!r}: give .npy label files, or, to take sub-folders as "
            f"classes, the folder of the images itself ({images!r})."
        )
    return []


# ---------------------------------------------------------------------------------------------- labels
def _choose_rows(opened: list[_Opened], options: Split, split: str) -> tuple[Source, Labels | None]:
    """The rows of the split and their labels.

    Labels come first where the choice of rows needs them, or where they are meant for all rows; else rows come first,
    so that it is enough if those have labels.
    """
    key = f"config.DATA.{split}"
    whole: Source = opened[0].source if len(opened) == 1 else ConcatSource([part.source for part in opened])
    is_for_all = _one_label_file_each(opened, options) or options.LABEL_ALIGNMENT == "position"
    if options.label_type == "standard" and (needs_labels(options) or is_for_all):
        labels = _labels_of(whole, opened, options, split)
        rows = limited_rows(len(whole), options=options, labels=None if labels is None else labels.values, key=key)
        if rows is None:
            return whole, labels
        return SubsetSource(whole, rows), None if labels is None else labels.take(rows)
    rows = limited_rows(len(whole), options=options, labels=whole.labels if needs_labels(options) else None, key=key)
    source = whole if rows is None else SubsetSource(whole, rows)
    return source, _labels_of(source, opened, options, split)


def _one_label_file_each(opened: list[_Opened], options: Split) -> bool:
    return len(opened) > 1 and len(options.LABEL_PATHS) != 1 and any(part.label_files for part in opened)


def _labels_of(source: Source, opened: list[_Opened], options: Split, split: str) -> Labels | None:
    if options.label_type == "sample_index":
        return Labels(np.arange(len(source), dtype=np.int64), len(source))
    if options.label_type == "zero":
        return Labels(np.zeros(len(source), dtype=np.int64), 1)
    if not any(part.label_files for part in opened):
        return _own_labels(source, options, split)
    read = functools.partial(
        _read_files, alignment=options.LABEL_ALIGNMENT, mmap=options.MMAP_MODE, key=f"config.DATA.{split}.LABEL_PATHS"
    )
    if not _one_label_file_each(opened, options):
        return read(opened[0].label_files, source=source)
    parts = [
        read(part.label_files, source=part.source) if part.label_files else _own_labels(part.source, options, split)
        for part in opened
    ]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        raise DataError(
            f"config.DATA.{split}: only {len(found)} of {len(parts)} sources have labels. Give LABEL_PATHS for all."
        )
    return join_labels(found, key=f"config.DATA.{split}.LABEL_PATHS")


def _read_files(files: list[str], *, source: Source, alignment: str, mmap: bool, key: str) -> Labels:
    parts = [read_labels(file, source=source, alignment=alignment, mmap=mmap, key=key) for file in files]
    return parts[0] if len(parts) == 1 else multi_hot(parts, key=key)


def _own_labels(source: Source, options: Split, split: str) -> Labels | None:
    """Labels that the source itself knows."""
    values = source.labels
    if values is None:
        if options.LABEL_SOURCES:
            raise DataError(
                f"config.DATA.{split}.LABEL_SOURCES={options.LABEL_SOURCES}: {source.name} knows no labels. A "
                "folder has them if every image lies in a sub-folder; a file list needs LABEL_PATHS. Without labels leave "
                "LABEL_SOURCES out, and set LABEL_TYPE=zero."
            )
        return None
    if source.class_names:
        return Labels(values, len(source.class_names), list(source.class_names))
    whole = source.whole.labels if isinstance(source, SubsetSource) else values
    assert whole is not None
    return Labels(values, int(whole.max(initial=-1)) + 1)


def _numbered_as(names: list[str] | None, labels: Labels, split: str) -> Labels:
    """The labels numbered by the classes of TRAIN; classes that it does not have come after them."""
    assert labels.class_names is not None
    if not names or names == labels.class_names:
        return labels
    extra = [name for name in labels.class_names if name not in set(names)]
    if extra:
        _log.warning("config.DATA.%s: %d classes are not in TRAIN, the first is %r.", split, len(extra), extra[0])
    return renumber(labels, [*names, *extra])


def _train_class_names(data: Data) -> list[str] | None:
    """Class names of TRAIN without opening its images; None where they are fixed by the data set or there are none."""
    options = data.TRAIN
    if not options.DATA_SOURCES or options.label_type != "standard":
        return None
    names: set[str] = set()
    for position, kind in enumerate(options.DATA_SOURCES):
        found = _class_names_on_disk(data, position, kind)
        if found is None:
            return None
        names |= set(found)
    return sorted(names)


def _class_names_on_disk(data: Data, position: int, kind: str) -> list[str] | None:
    options = data.TRAIN
    files = _label_files(options, "TRAIN", position)
    key = "config.DATA.TRAIN.LABEL_PATHS"
    if files:
        found = [parse_labels(load_npy(file, key=key), file=file, key=key).class_names for file in files]
        return None if any(names is None for names in found) else [name for names in found for name in names or []]
    source = registry.resolve("data_source", kind, key="DATA.TRAIN.DATA_SOURCES")
    if kind not in ("disk_folder", _SHARDS) and not hasattr(source, "classes"):
        return None
    path = options.DATA_PATHS[position] if options.DATA_PATHS else ""
    if not path and options.DATASET_NAMES:
        try:
            path = catalog.look_up(options.DATASET_NAMES[position], split="TRAIN", catalog=data.CATALOG).images
        except DataError:
            return None  # only another split is in use; a run that trains stops at this by itself
    if kind == _SHARDS:
        return shard_classes(SourceRequest("TRAIN", position, "", path, options, stream=data.STREAM))
    if hasattr(source, "classes"):
        return source.classes(SourceRequest(options.USE_SPLIT or "TRAIN", position, "", path, options))
    return folder_classes(path) if os.path.isdir(os.path.expanduser(path)) else None
