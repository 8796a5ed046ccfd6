"""What annotated data sets have in common: rows that are files below a root, and what may be known of each row.

A source may have, beside what every source has:
    keypoint_names, keypoints(row) -> float64 (P, 3): x, y in pixels of the original image, and 1 where visible
    box(row) -> float64 (4,): x, y, width, height in pixels of the original image
    mask_file(row) -> grey image above 0 on the object, or mask(row) -> bool (H, W)
    part_masks(row) -> bool (G, H, W)
    groups int64 (N,), group_names: who is compared by the accuracy of the worst group
Everything returned is a copy: moving it into another frame changes nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vissl_like.data.decode import Unreadable, read_bytes, read_image
from vissl_like.data.source import ConcatSource, PathTable, Source, SourceRequest, SubsetSource, file_sizes
from vissl_like.errors import ConfigError, DataError

#: Where a source says what its annotations of several kinds are.
_KINDS = {"keypoints": "keypoint_names", "part_masks": "part_names"}


class ImageFiles:
    """Rows that are files below a root, with classes. What the sources of this family have in common."""

    def __init__(
        self, root: Path, paths: list[str], labels: np.ndarray, *, name: str, class_names: list[str] | None
    ) -> None:
        self.root, self.name, self.class_names = str(root), name, class_names
        self.labels: np.ndarray | None = labels.astype(np.int64)
        self._paths = PathTable(paths)

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def paths(self) -> np.ndarray:
        return self._paths.array()

    def path(self, row: int) -> str:
        return self._paths[row]

    def file(self, row: int) -> str:
        return str(Path(self.root, self._paths[row]))

    def load(self, row: int) -> Image.Image:
        return read_image(self.file(row))

    def read(self, row: int) -> bytes | None:
        return read_bytes(self.file(row))

    def stamps(self) -> np.ndarray:
        return file_sizes(self.file(row) for row in range(len(self)))


def origin(source: Any, row: int) -> tuple[Any, int]:
    """The source that a row comes from, and the number that it has there: neither a subset nor several in a row."""
    while isinstance(source, SubsetSource | ConcatSource):
        source, row = source.locate(row)
    return source, row


def origins(source: Any) -> list[Any]:
    """The sources that a subset, or several in a row, are made of."""
    if isinstance(source, SubsetSource):
        return origins(source.whole)
    return [one for part in source.parts for one in origins(part)] if isinstance(source, ConcatSource) else [source]


def has_annotation(source: Any, name: str) -> bool:
    """Whether every row's source knows such a thing."""
    return all(hasattr(one, name) or (name == "mask" and hasattr(one, "mask_file")) for one in origins(source))


def annotation(source: Any, name: str, row: int) -> Any:
    """What a source knows of a row (keypoints, box, mask, part_masks); raises DataError if it knows no such thing.

    `source` may be a subset, or several sources in a row. A mask is read from its file where there is one.
    """
    source, row = origin(source, row)
    if name == "mask" and not hasattr(source, "mask") and hasattr(source, "mask_file"):
        return read_mask(source.mask_file(row))
    if not hasattr(source, name):
        raise DataError(f"{source.name}: these images have no {name}. Use a data set that has them (`cub`, ...).")
    return getattr(source, name)(row)


def refuse_missing_annotations(source: Any, names: Iterable[str], *, key: str, protocol: str) -> None:
    """Raises ConfigError unless all rows have these annotations, of the same keypoints and part masks."""
    parts = origins(source)
    for name in names:
        without = [one.name for one in parts if not has_annotation(one, name)]
        if without:
            raise ConfigError(
                f"{key}: {without[0]} has no {name}, which {protocol} of config.EVALUATE_PARTS.PROTOCOLS needs. Leave it out."
            )
        kinds = [list(getattr(one, _KINDS[name], ())) for one in parts if name in _KINDS]
        other = next((one for one, kind in zip(parts, kinds) if kind != kinds[0]), None)
        if other is not None:
            raise ConfigError(
                f"{key}: the {name} of {other.name} are others than those of {parts[0].name}, so they cannot be measured "
                "together. Evaluate one after the other."
            )


def groups_of(source: Any) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """(groups int64 (N,), their names), or None where the source has no groups, or several have different ones."""
    if isinstance(source, SubsetSource):
        found = groups_of(source.whole)
        return None if found is None else (found[0][source.rows], found[1])
    if isinstance(source, ConcatSource):
        parts = [groups_of(part) for part in source.parts]
        known = [part for part in parts if part is not None]
        is_same = len(known) == len(parts) and len({names for _, names in known}) == 1
        return (np.concatenate([groups for groups, _ in known]), known[0][1]) if is_same else None
    return (source.groups, tuple(source.group_names)) if hasattr(source, "groups") else None


def read_mask(file: str) -> np.ndarray:
    """bool (H, W): where a grey image is above 0. Raises DataError."""
    try:
        return np.asarray(read_image(file).convert("L")) > 0
    except Unreadable as reason:
        raise DataError(f"{file}: this mask cannot be read ({reason}).") from reason


def refuse_missing_masks(source: Source, *, key: str) -> None:
    """Raises DataError unless every row's mask is there. What is in the files is seen when they are read."""
    asked: set[int] = set()  # sources that give masks without files: one row speaks for all
    missing = []
    for row in range(len(source)):
        whole, inner = origin(source, row)
        if hasattr(whole, "mask_file"):
            file = whole.mask_file(inner)
            missing += [] if Path(file).is_file() else [file]
        elif id(whole) not in asked:
            asked.add(id(whole))
            annotation(whole, "mask", inner)
    if missing:
        more = f", nor are {len(missing) - 1} more" * (len(missing) > 1)
        raise DataError(
            f"{missing[0]}: this mask is not there{more}. Every image needs one; set {key}.MASK_SUB_PATH to the folder of "
            "the masks."
        )


def required_folder(request: SourceRequest) -> Path:
    """The folder of DATA_PATHS, which must be there."""
    key = f"{request.key('DATA_PATHS')}.{request.position}"
    if not request.path:
        raise ConfigError(f"{key} is not given: set it to the folder of the data set.")
    folder = Path(request.path).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"{key}={request.path!r}: no such folder. Set it to the folder of the data set.")
    return folder
