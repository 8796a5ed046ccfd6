"""Data sets with masks of parts or of the object: PartImageNet (COCO annotations) and Oxford Flowers; TurtleReID."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vissl_like.data.annotated import ImageFiles, required_folder
from vissl_like.data.decode import Unreadable, read_image
from vissl_like.data.source import SourceRequest
from vissl_like.data.tables import read_csv
from vissl_like.errors import ConfigError, DataError

_FLOWERS_SPLITS = {"TRAIN": "trnid", "VAL": "valid", "TEST": "tstid"}
_TURTLE_SPLITS = {"TRAIN": "train", "VAL": "valid", "TEST": "test"}


class PartImageNetSource(ImageFiles):
    """Images and part masks of one COCO file. The class is the WordNet id at the start of a file name.

    `part_names`: the COCO categories in the order of their ids. Images without annotations are left out. Needs the
    extra [parts] (pycocotools).
    """

    def __init__(self, root: Path, *, annotations: Path, image_folder: str, name: str = "part_imagenet") -> None:
        self._annotations = annotations
        content = read_coco(annotations)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.part_names = [str(category["name"]) for category in categories]
        self._part_number = {category["id"]: number for number, category in enumerate(categories)}
        of_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in content["annotations"]:
            of_image.setdefault(annotation["image_id"], []).append(annotation)
        images = sorted(
            (image for image in content["images"] if image["id"] in of_image), key=lambda image: image["id"]
        )
        if not images:
            raise DataError(f"{annotations}: no image of this file has annotations.")
        self._sizes = [(int(image["height"]), int(image["width"])) for image in images]
        self._of_row = [of_image[image["id"]] for image in images]
        synsets = [synset_of(image["file_name"], file=annotations) for image in images]
        class_names, labels = np.unique(synsets, return_inverse=True)
        paths = [f"{image_folder}/{image['file_name']}" if image_folder else image["file_name"] for image in images]
        super().__init__(root, paths, labels, name=name, class_names=class_names.tolist())

    @classmethod
    def build(cls, request: SourceRequest) -> PartImageNetSource:
        _coco_masks()
        root = required_folder(request)
        return cls(
            root,
            annotations=root / cls._file(request),
            image_folder=request.options.IMAGE_SUB_PATH,
            name=request.name or "part_imagenet",
        )

    @classmethod
    def classes(cls, request: SourceRequest) -> list[str] | None:
        """The class names of a split, None where its annotations are not there."""
        file = Path(request.path).expanduser() / cls._file(request)
        if not file.is_file():
            return None
        content = read_coco(file)
        annotated = {annotation["image_id"] for annotation in content["annotations"]}
        names = [image["file_name"] for image in content["images"] if image["id"] in annotated]
        return sorted({synset_of(name, file=file) for name in names})

    @staticmethod
    def _file(request: SourceRequest) -> str:
        return request.options.ANNOTATION_PATH or f"{request.split.lower()}.json"

    def part_masks(self, row: int) -> np.ndarray:
        """bool (G, H, W), one mask per category; crowds and empty annotations do not count."""
        height, width = self._sizes[row]
        masks = np.zeros((len(self.part_names), height, width), dtype=bool)
        for annotation in self._of_row[row]:
            if annotation.get("iscrowd") or not annotation.get("area", 1):
                continue
            number = self._part_number.get(annotation["category_id"])
            if number is None:
                raise DataError(f"{self._annotations}: annotation {annotation.get('id')} has an unknown category.")
            masks[number] |= _decoded(annotation, height=height, width=width, file=self._annotations)
        return masks

    def mask(self, row: int) -> np.ndarray:
        """bool (H, W), the union of the parts."""
        return np.logical_or.reduce(self.part_masks(row))


def read_coco(file: Path) -> dict[str, Any]:
    """A COCO annotation file. Raises DataError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a readable COCO annotation file ({error}).") from error
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    if missing:
        raise DataError(f"{file}: a COCO annotation file has a list {missing[0]!r}; this one has not.")
    return content


def synset_of(file_name: str, *, file: Path) -> str:
    """The WordNet id that the name of an image starts with. Raises DataError."""
    word = Path(file_name).name.partition("_")[0]
    if not (word.startswith("n") and word[1:].isdigit()):
        raise DataError(f"{file}: the image {file_name!r} does not start with a WordNet id such as n01440764_.")
    return word


def _coco_masks() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ConfigError('COCO masks need the package pycocotools: pip install "vissl_like[parts]".') from error
    return mask


def _decoded(annotation: dict[str, Any], *, height: int, width: int, file: Path) -> np.ndarray:
    """bool (H, W) of COCO polygons or run lengths. Four numbers are no polygon: the annotation's `bbox` counts instead."""
    coco, segmentation = _coco_masks(), annotation["segmentation"]
    if isinstance(segmentation, dict):
        runs = segmentation
        if isinstance(runs["counts"], list):
            runs = coco.frPyObjects(runs, height, width)
        return coco.decode(runs).astype(bool)
    whole = np.zeros((height, width), dtype=bool)
    for polygon in segmentation:
        corners = _box_corners(annotation, file=file) if len(polygon) == 4 else polygon
        whole |= coco.decode(coco.merge(coco.frPyObjects([corners], height, width))).astype(bool)
    return whole


def _box_corners(annotation: dict[str, Any], *, file: Path) -> list[float]:
    """The polygon of an annotation's `bbox`: x, y, width, height. Raises DataError where it has none."""
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)):
        raise DataError(
            f"{file}: annotation {annotation.get('id')} has a polygon of four numbers, and for its bbox {box!r} instead of "
            "[x, y, width, height]. Give it a polygon of three points or more, or its bbox."
        )
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


class FlowersSource(ImageFiles):
    """Oxford Flowers 102 in torchvision's layout: <root>/flowers-102/{jpg,imagelabels.mat,setid.mat}, masks in segmim/.

    TRAIN 1,020, VAL 1,020, TEST 6,149 images.
    """

    def __init__(self, root: Path, *, split: str, name: str = "flowers102") -> None:
        from scipy.io import loadmat

        base = root / "flowers-102"
        try:
            numbers = loadmat(base / "setid.mat")[_FLOWERS_SPLITS[split]].ravel()
            labels = loadmat(base / "imagelabels.mat")["labels"].ravel().astype(np.int64) - 1
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{base}: not the files of Oxford Flowers 102 ({error}).") from error
        self._numbers = numbers.astype(np.int64)
        paths = [f"flowers-102/jpg/image_{number:05d}.jpg" for number in self._numbers]
        lost = next((path for path in paths if not (root / path).is_file()), None)
        if lost:
            raise DataError(f"{root / lost}: is not there, but setid.mat lists it.")
        names = [str(number) for number in range(1, int(labels.max()) + 2)]
        super().__init__(root, paths, labels[self._numbers - 1], name=name, class_names=names)

    @classmethod
    def build(cls, request: SourceRequest) -> FlowersSource:
        root = required_folder(request)
        if request.download:
            from torchvision.datasets import Flowers102

            Flowers102(str(root), download=True)
        return cls(root, split=request.split, name=request.name or "flowers102")

    def mask(self, row: int) -> np.ndarray:
        """bool (H, W): not blue. The segmented images are blue where the background was; specks are filtered out."""
        from scipy.ndimage import median_filter

        file = Path(self.root, "flowers-102", "segmim", f"segmim_{self._numbers[row]:05d}.jpg")
        try:
            red, green, blue = np.asarray(read_image(str(file)), dtype=np.float64).transpose(2, 0, 1)
        except Unreadable as reason:
            raise DataError(f"{file}: this mask cannot be read ({reason}).") from reason
        return median_filter((blue / (green + red + 1e-6) <= 100).astype(np.uint8), size=5).astype(bool)


class TurtleReidSource(ImageFiles):
    """Sea turtles by identity: metadata_base.csv (identity, file_name, and a column per way to split)."""

    def __init__(self, root: Path, *, split: str, column: str = "split_closed", name: str = "turtle_reid") -> None:
        file = root / "metadata_base.csv"
        records = [record for _, record in read_csv(file, needs=("identity", "file_name", column))]
        identities = sorted({record["identity"] for record in records})
        kept = [record for record in records if record[column] == _TURTLE_SPLITS[split]]
        if not kept:
            raise DataError(f"{file}: no record has {column}={_TURTLE_SPLITS[split]!r}.")
        number = {identity: position for position, identity in enumerate(identities)}
        labels = np.array([number[record["identity"]] for record in kept])
        super().__init__(root, [record["file_name"] for record in kept], labels, name=name, class_names=identities)

    @classmethod
    def build(cls, request: SourceRequest) -> TurtleReidSource:
        column = request.options.SPLIT_COLUMN
        return cls(required_folder(request), split=request.split, column=column, name=request.name or "turtle_reid")
