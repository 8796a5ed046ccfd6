"""Annotated data sets whose classes are folders: MetaShift's cats and dogs, and the relatives of ImageNet."""

from __future__ import annotations

import functools
import importlib.resources
from pathlib import Path

import numpy as np

from vissl_like.data.annotated import required_folder
from vissl_like.data.folder import FolderSource, folder_classes
from vissl_like.data.source import SourceRequest
from vissl_like.errors import DataError

_SPLIT_FOLDERS = {"TRAIN": "train", "VAL": "test", "TEST": "test"}


class MetaShiftSource(FolderSource):
    """MetaDatasetCatDog/{train,test}/{cat,dog}/<context>/*.jpg; the classes are the groups. VAL is TEST.

    Masks, where there are any, form the same tree of .png files below MASK_SUB_PATH.
    """

    def __init__(self, root: Path, *, folder: str, mask_folder: str = "", name: str = "meta_shift") -> None:
        super().__init__(root / folder, name=name, key="DATA_PATHS")
        if self.labels is None or self.class_names is None:
            raise DataError(f"{root / folder}: expected a sub-folder for each class (cat, dog), with images below.")
        self._mask_root = root / mask_folder if mask_folder else None
        self.groups, self.group_names = self.labels, tuple(self.class_names)

    @classmethod
    def build(cls, request: SourceRequest) -> MetaShiftSource:
        mask_folder, name = request.options.MASK_SUB_PATH, request.name or "meta_shift"
        return cls(required_folder(request), folder=cls._folder(request), mask_folder=mask_folder, name=name)

    @classmethod
    def classes(cls, request: SourceRequest) -> list[str] | None:
        """The class names of a split, None where its folder is not there."""
        folder = Path(request.path).expanduser() / cls._folder(request)
        return folder_classes(folder) if folder.is_dir() else None

    @staticmethod
    def _folder(request: SourceRequest) -> str:
        return request.options.IMAGE_SUB_PATH or _SPLIT_FOLDERS[request.split]

    def mask_file(self, row: int) -> str:
        """Grey image, above 0 on the animal."""
        if self._mask_root is None:
            raise DataError(f"{self.name}: no masks; set MASK_SUB_PATH to their folder beside the images.")
        return str((self._mask_root / self.path(row)).with_suffix(".png"))


class ImageNetV2Source(FolderSource):
    """ImageNet-V2: the folders are the class numbers 0..999, in numerical order. Classes are named by WordNet ids."""

    def __init__(self, root: Path, *, name: str = "imagenet_v2") -> None:
        super().__init__(root, name=name, key="DATA_PATHS")
        names = self.class_names or []
        if self.labels is None or not names or not all(word.isdigit() for word in names):
            wrong = next((word for word in names if not word.isdigit()), "no folders")
            raise DataError(f"{root}: the folders of ImageNet-V2 are class numbers, but here is {wrong!r}.")
        self.class_names = list(imagenet_synsets())
        beyond = [word for word in names if int(word) >= len(self.class_names)]
        if beyond:
            raise DataError(f"{root}: ImageNet has no class {beyond[0]}, which is a folder here.")
        self.labels = np.array([int(word) for word in names], dtype=np.int64)[self.labels]

    @classmethod
    def build(cls, request: SourceRequest) -> ImageNetV2Source:
        return cls(required_folder(request), name=request.name or "imagenet_v2")


class ImageNetSubsetSource(FolderSource):
    """ImageNet-A and ImageNet-R: folders named by WordNet ids, 200 of the 1000 classes.

    Labels are numbers among the 1000. `known_classes` bool (1000,): the predictions that count.
    """

    def __init__(self, root: Path, *, which: str) -> None:
        super().__init__(root, name=f"imagenet_{which}", key="DATA_PATHS")
        synsets = imagenet_synsets()
        number = {synset: position for position, synset in enumerate(synsets)}
        names = self.class_names or []
        wrong = [word for word in names if word not in number]
        if self.labels is None or wrong or not names:
            raise DataError(
                f"{root}: expected folders named by WordNet ids of ImageNet, got {(wrong or ['none'])[0]!r}."
            )
        self.labels = np.array([number[word] for word in names], dtype=np.int64)[self.labels]
        self.class_names = list(synsets)
        self.known_classes = np.isin(synsets, imagenet_synsets(f"imagenet_{which}_synsets.txt"))

    @classmethod
    def build(cls, request: SourceRequest) -> ImageNetSubsetSource:
        kind = request.options.DATA_SOURCES[request.position]
        return cls(required_folder(request), which=kind.removeprefix("imagenet_"))


@functools.cache
def imagenet_synsets(file: str = "imagenet_synsets.txt") -> tuple[str, ...]:
    """WordNet ids in the order of the class numbers; the lists come with timm."""
    text = (importlib.resources.files("timm.data") / "_info" / file).read_text(encoding="utf-8")
    return tuple(text.split())
