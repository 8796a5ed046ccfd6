"""Annotated bird images: the files of CUB-200-2011 (and NABirds), and Waterbirds, which lies inside such a folder.

Image ids are words (NABirds) and class ids whole numbers with gaps; classes are numbered by their sorted ids over the
whole data set, so that a number means the same in every split.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from vissl_like.config.schema_data import TrainSplit
from vissl_like.core import rng
from vissl_like.data.annotated import ImageFiles, required_folder
from vissl_like.data.datasets import stratified_split
from vissl_like.data.decode import Unreadable, read_image
from vissl_like.data.source import SourceRequest
from vissl_like.data.tables import Table, aligned, index_of, read_csv, read_table
from vissl_like.errors import ConfigError, DataError

WATERBIRDS = "waterbird_complete95_forest2water2"
_WATERBIRDS_SPLITS = {"TRAIN": 0, "VAL": 1, "TEST": 2}
_METADATA = ("img_id", "img_filename", "y", "split", "place")


class CubFolder:
    """The tables of one folder, read when they are needed. Rows are those of images.txt, `order` that of the split's file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = read_table(root / "images.txt", image_id="s", path="r")
        self.ids = [str(value) for value in self.images["image_id"]]
        self.paths = [str(value) for value in self.images["path"]]
        classes, rows = self._of_images("image_class_labels.txt", class_id="i")
        self.class_ids, self.labels = np.unique(classes["class_id"][rows], return_inverse=True)
        self.is_train, self.order = self._split()

    def _of_images(self, name: str, **fields: str) -> tuple[Table, np.ndarray]:
        """A table with one line per image, and its rows in the order of images.txt."""
        table = read_table(self.root / name, image_id="s", **fields)
        return table, aligned(table, "image_id", self.images)

    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        """bool (N,), and the rows in the order of train_test_split.txt, int64 (N,)."""
        table, rows = self._of_images("train_test_split.txt", is_train="i")
        for row in np.flatnonzero(~np.isin(table["is_train"], (0, 1))):
            raise table.problem(int(row), f"is_train is {table['is_train'][row]}, not 1 (train) or 0 (test).")
        return table["is_train"][rows] == 1, np.argsort(rows)

    @functools.cached_property
    def class_names(self) -> list[str]:
        """From classes.txt where there is one, else the ids as text."""
        file = self.root / "classes.txt"
        if not file.exists():
            return [str(number) for number in self.class_ids.tolist()]
        table = read_table(file, class_id="i", name="r")
        index_of(table, "class_id")  # an id that stands there twice is an error
        names = dict(zip(table["class_id"].tolist(), table["name"].tolist()))
        missing = [number for number in self.class_ids.tolist() if number not in names]
        if missing:
            raise DataError(f"{file}: has no line for class_id {missing[0]}, which image_class_labels.txt uses.")
        return [str(names[number]) for number in self.class_ids.tolist()]

    @functools.cached_property
    def boxes(self) -> np.ndarray:
        """float64 (N, 4): x, y, width, height in pixels of the original image."""
        table, rows = self._of_images("bounding_boxes.txt", x="f", y="f", width="f", height="f")
        for row in np.flatnonzero((table["width"] <= 0) | (table["height"] <= 0)):
            raise table.problem(int(row), "width and height of a box must be above 0.")
        return np.stack([table[name][rows] for name in ("x", "y", "width", "height")], axis=1)

    @functools.cached_property
    def keypoint_names(self) -> list[str]:
        return [str(name) for name in self._parts["name"]]

    @functools.cached_property
    def _parts(self) -> Table:
        table = read_table(self.root / "parts" / "parts.txt", part_id="i", name="r")
        index_of(table, "part_id")
        return table

    @functools.cached_property
    def keypoints(self) -> np.ndarray:
        """float64 (N, P, 3): x, y in pixels of the original image, and 1 where visible (else 0 0 0)."""
        ids = self._parts["part_id"].tolist()
        table = read_table(self.root / "parts" / "part_locs.txt", image_id="s", part_id="i", x="f", y="f", visible="i")
        number_of_part = {part: number for number, part in enumerate(ids)}
        number_of_image = {image: number for number, image in enumerate(self.ids)}
        points = np.zeros((len(self.ids), len(ids), 3))
        seen = np.zeros(points.shape[:2], dtype=bool)
        for row, (image, part) in enumerate(zip(table["image_id"].tolist(), table["part_id"].tolist())):
            place = _place(table, row, number_of_image.get(image), number_of_part.get(part))
            if seen[place]:
                raise table.problem(row, f"part {part} of image {image} stands there a second time.")
            seen[place] = True
            if table["visible"][row]:
                points[place] = table["x"][row], table["y"][row], 1
        if not seen.all():
            image, part = np.argwhere(~seen)[0]
            where = f"{self.images.file}, line {int(self.images.lines[image])}"
            raise DataError(
                f"{table.file}: has no line for part {ids[part]} of image {self.ids[image]}, which {where} lists."
            )
        return points

    def rows(self, split: str, options: TrainSplit) -> np.ndarray:
        """Rows of TRAIN, VAL or TEST as train_test_split.txt lists them. VAL is what FRACTION leaves of the training images."""
        if split == "TEST":
            return self.order[~self.is_train[self.order]]
        train = self.order[self.is_train[self.order]]
        kept = kept_rows(self.labels[train], options)
        return train[kept if split == "TRAIN" else np.setdiff1d(np.arange(len(train)), kept)]


def _place(table: Table, row: int, image: int | None, part: int | None) -> tuple[int, int]:
    if image is None:
        raise table.problem(row, f"image_id {table['image_id'][row]} is not in images.txt.")
    if part is None:
        raise table.problem(row, f"part_id {table['part_id'][row]} is not in parts.txt.")
    return image, part


def kept_rows(labels: np.ndarray, options: TrainSplit) -> np.ndarray:
    """Ascending rows of the FRACTION that is trained on: of every class its share, or simply the first in the file."""
    count = int(options.FRACTION * len(labels))
    if options.ORDER == "file":
        return np.arange(count)
    sizes = {"kept": count, "left": len(labels) - count}
    return stratified_split(labels, sizes=sizes, seed=rng.mix(options.SEED, 17) % 2**32)["kept"]


class CubSource(ImageFiles):
    """One split of a CUB folder, with keypoints, boxes and, where they lie beside the images, masks."""

    def __init__(
        self, folder: CubFolder, rows: np.ndarray, *, name: str, image_folder: str = "images", mask_folder: str = ""
    ) -> None:
        self.folder, self.rows = folder, rows
        self._mask_folder = mask_folder or "segmentations"
        self._num_part_ids = 5
        paths = [f"{image_folder}/{folder.paths[row]}" for row in rows]
        self._refuse_missing(folder, rows, paths)
        super().__init__(folder.root, paths, folder.labels[rows], name=name, class_names=folder.class_names)

    @staticmethod
    def _refuse_missing(folder: CubFolder, rows: np.ndarray, paths: list[str]) -> None:
        missing = [(row, path) for row, path in zip(rows, paths) if not (folder.root / path).is_file()]
        if missing:
            row, path = missing[0]
            more = f", nor are {len(missing) - 1} more" * (len(missing) > 1)
            raise folder.images.problem(int(row), f"{folder.root / path} is not there{more}.")

    @classmethod
    def build(cls, request: SourceRequest) -> CubSource:
        root = required_folder(request)
        folder = CubFolder(root)
        for is_train, what in ((True, "training images (1)"), (False, "test images (0)")):
            if is_train == (request.split != "TEST") and not (folder.is_train == is_train).any():
                raise DataError(f"{root / 'train_test_split.txt'}: has no {what}.")
        rows = folder.rows(request.split, request.train_split)
        if not len(rows):
            raise ConfigError(
                f"config.DATA.TRAIN_SPLIT.FRACTION={request.train_split.FRACTION}: leaves no image for "
                f"{request.split}. Set it below 1 for a VAL split, and above 0."
            )
        return cls(
            folder,
            rows,
            name=request.name or "cub",
            image_folder=request.options.IMAGE_SUB_PATH or "images",
            mask_folder=request.options.MASK_SUB_PATH,
        )

    @property
    def keypoint_names(self) -> list[str]:
        return self.folder.keypoint_names

    def keypoints(self, row: int) -> np.ndarray:
        """float64 (P, 3), a copy: x, y in pixels of the original image, and 1 where visible."""
        return self.folder.keypoints[self.rows[row]].copy()

    def box(self, row: int) -> np.ndarray:
        """float64 (4,), a copy: x, y, width, height in pixels of the original image."""
        return self.folder.boxes[self.rows[row]].copy()

    def mask_file(self, row: int) -> str:
        """Grey image, above 0 where the bird is."""
        path = Path(self.folder.root, self._mask_folder, self.folder.paths[self.rows[row]])
        return str(path.with_suffix(".png"))

    def part_masks(self, row: int) -> np.ndarray:
        """bool (G, H, W) from part_segmentations/, grey images of part ids 1 to G; CUB itself has none, toy birds have."""
        path = Path(self.folder.root, "part_segmentations", self.folder.paths[self.rows[row]]).with_suffix(".png")
        try:
            ids = np.asarray(read_image(str(path)).convert("L"))
        except Unreadable as reason:
            raise DataError(f"{path}: these part ids cannot be read ({reason}).") from reason
        return ids[None] == np.arange(1, self._num_part_ids + 1)[:, None, None]


class WaterbirdsSource(ImageFiles):
    """One split of Waterbirds: birds (y: 0 land, 1 water) on backgrounds (place: 0 land, 1 water).

    `groups` int64 (N,): 2 y + place, named by `group_names`.
    """

    group_names = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")

    def __init__(
        self,
        root: Path,
        *,
        split: str,
        subset: str = "",
        image_folder: str = WATERBIRDS,
        mask_folder: str = "",
        name: str = "waterbirds",
    ) -> None:
        """`subset`: worst_case (y differs from place), best_case (they agree), both with waterbirds first, or "" for all."""
        y, place, of_split, files = _metadata(root / image_folder / "metadata.csv")
        kept = of_split == _WATERBIRDS_SPLITS[split]
        if subset:
            kept &= (y == place) == (subset == "best_case")
        rows = np.flatnonzero(kept)
        if subset:
            rows = rows[np.argsort(-y[rows], kind="stable")]  # as the original program lists them
        if not len(rows):
            what = f"{split} (split {_WATERBIRDS_SPLITS[split]})" + f" of {subset}" * bool(subset)
            raise DataError(f"{root / image_folder / 'metadata.csv'}: has no image of {what}.")
        self.groups = (2 * y + place)[rows]
        self._mask_folder = mask_folder or "segmentations"
        self._names = [files[row] for row in rows]
        paths = [f"{image_folder}/{path}" for path in self._names]
        super().__init__(root, paths, y[rows], name=name, class_names=["landbird", "waterbird"])

    @classmethod
    def build(cls, request: SourceRequest) -> WaterbirdsSource:
        return cls(
            required_folder(request),
            split=request.split,
            subset=request.options.SUBSET,
            image_folder=request.options.IMAGE_SUB_PATH or WATERBIRDS,
            mask_folder=request.options.MASK_SUB_PATH,
            name=request.name or "waterbirds",
        )

    def mask_file(self, row: int) -> str:
        """Grey image, above 0 where the bird is; those of CUB fit, since the birds are CUB's at the same place."""
        return str(Path(self.root, self._mask_folder, self._names[row]).with_suffix(".png"))


def _metadata(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """y, place and split, int64 (N,), and the file names of metadata.csv. Raises DataError with the line."""
    records = read_csv(file, needs=_METADATA)
    columns = {
        "y": _column(records, "y", allowed=(0, 1), file=file),
        "place": _column(records, "place", allowed=(0, 1), file=file),
        "split": _column(records, "split", allowed=(0, 1, 2), file=file),
    }
    for line, record in records:
        if not (file.parent / record["img_filename"]).is_file():
            raise DataError(f"{file}, line {line}: {file.parent / record['img_filename']} is not there.")
    return columns["y"], columns["place"], columns["split"], [record["img_filename"] for _, record in records]


def _column(
    records: list[tuple[int, dict[str, str]]], name: str, *, allowed: tuple[int, ...], file: Path
) -> np.ndarray:
    known = {str(value): value for value in allowed}
    for line, record in records:
        if record[name] not in known:
            raise DataError(f"{file}, line {line}: {name} is {record[name]!r}, not one of {', '.join(known)}.")
    return np.array([known[record[name]] for _, record in records], dtype=np.int64)
