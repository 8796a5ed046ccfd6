"""SIIM-ACR pneumothorax: chest radiographs as DICOM files, masks as PNG, and the step that makes those from the download.

Needs the extra [medical] (pydicom).
"""

from __future__ import annotations

import csv
import json
import logging
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vissl_like.data.annotated import ImageFiles, required_folder
from vissl_like.data.decode import reasons
from vissl_like.data.source import SourceRequest
from vissl_like.data.tables import read_csv
from vissl_like.errors import ConfigError, DataError

log = logging.getLogger(__name__)

SIDE = 1024
_FOLDERS = {"TRAIN": "train_set", "VAL": "full_test_set", "TEST": "full_test_set"}
_MASKS = "all_masks"


class SiimAcrSource(ImageFiles):
    """<root>/{train_set,full_test_set,robust_test_set,non_robust_test_set}/{0,1}/*.dcm; class 1 has a pneumothorax."""

    def __init__(self, root: Path, *, folder: str, mask_folder: str = _MASKS, name: str = "siim_acr") -> None:
        files = sorted((root / folder).rglob("*.dcm"))
        if not files:
            raise DataError(
                f"{root / folder}: no .dcm file here or below. Make this layout from the download with "
                "`vissl-like data siim_acr --help`."
            )
        wrong = [file for file in files if file.parent.name not in ("0", "1")]
        if wrong:
            raise DataError(f"{wrong[0]}: lies in {wrong[0].parent.name!r}; the class is the folder, 0 or 1.")
        self._mask_folder = root / mask_folder
        super().__init__(
            root,
            [str(file.relative_to(root).as_posix()) for file in files],
            np.array([int(file.parent.name) for file in files]),
            name=name,
            class_names=["no pneumothorax", "pneumothorax"],
        )

    @classmethod
    def build(cls, request: SourceRequest) -> SiimAcrSource:
        _pydicom()
        return cls(
            required_folder(request),
            folder=request.options.IMAGE_SUB_PATH or _FOLDERS[request.split],
            mask_folder=request.options.MASK_SUB_PATH or _MASKS,
            name=request.name or "siim_acr",
        )

    def load(self, row: int) -> Image.Image:
        return read_dicom(self.file(row))

    def read(self, row: int) -> None:
        """Nothing to decode ahead: a DICOM file is no image file."""
        return None

    def mask_file(self, row: int) -> str:
        """Grey image (1024 x 1024), 255 on the pneumothorax."""
        return str(self._mask_folder / f"{Path(self.path(row)).stem}.png")


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise ConfigError('DICOM files need the package pydicom: pip install "vissl_like[medical]".') from error
    return pydicom


def read_dicom(file: str) -> Image.Image:
    """The pixels of a DICOM file, taken as 8 bits, as RGB. Raises Unreadable."""
    read = _pydicom().dcmread
    with reasons(file):
        pixels = read(file).pixel_array
    return Image.fromarray(np.asarray(pixels).astype(np.uint8)).convert("RGB")


# --------------------------------------------------------------------------------------------------------- preparation
def decode_mask(runs: list[str], *, side: int = SIDE) -> np.ndarray:
    """uint8 (side, side), 255 where any of the masks is. A mask is pairs of offset and length.

    An offset counts from the end of the run before; pixels run down the columns, column by column.
    """
    mask = np.zeros(side * side, dtype=bool)
    for text in runs:
        numbers = [int(word) for word in text.split()]
        if len(numbers) % 2 or min(numbers, default=0) < 0:
            raise ValueError(f"{text[:40]!r} is not pairs of offset and length")
        position = 0
        for offset, length in zip(numbers[::2], numbers[1::2]):
            position += offset
            mask[position : position + length] = True
            position += length
        if position > mask.size:
            raise ValueError(f"a run ends at pixel {position} of {mask.size}")
    return mask.reshape(side, side).T.astype(np.uint8) * 255


def prepare(root: Path, tubes: Path, out: Path) -> dict[str, int]:
    """Make the layout of SiimAcrSource in `out` from the download in `root`; returns how many images each folder has.

    `root` holds train-rle.csv and dicom-images-train/*/*/*.dcm; `tubes` says of each test image whether a chest tube
    can be seen: a JSON object, a CSV of id,0/1, or a pickle of {id: 0 or 1}. Robust test images are those where the
    tube says the opposite of the class. Images that are listed without a DICOM file are left out, with a warning.
    """
    masks = read_masks(root / "train-rle.csv")
    files = {file.stem: file for file in sorted((root / "dicom-images-train").rglob("*.dcm"))}
    has_tube = read_tubes(tubes)
    unknown = [name for name in has_tube if name not in masks]
    if unknown:
        raise DataError(f"{root / 'train-rle.csv'}: no line for {unknown[0]!r}, which {tubes} names.")
    lost = [name for name in masks if name not in files]
    if len(lost) == len(masks):
        raise DataError(f"{root / 'dicom-images-train'}: no DICOM file of any image of train-rle.csv.")
    if lost:
        log.warning("%s: %d images are listed without a DICOM file and left out, the first is %r",
                    root / "train-rle.csv", len(lost), lost[0])  # fmt: skip
    counts: dict[str, int] = {}
    for name, runs in ((name, runs) for name, runs in masks.items() if name in files):
        label = int(bool(runs))
        for folder in _folders_of(name, label, has_tube):
            target = out / folder / str(label)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files[name], target / f"{name}.dcm")
            counts[folder] = counts.get(folder, 0) + 1
        (out / _MASKS).mkdir(parents=True, exist_ok=True)
        Image.fromarray(_mask_of(name, runs, root)).save(out / _MASKS / f"{name}.png")
    return counts


def _folders_of(name: str, label: int, has_tube: Mapping[str, int]) -> list[str]:
    if name not in has_tube:
        return ["train_set"]
    return ["full_test_set", "robust_test_set" if has_tube[name] != label else "non_robust_test_set"]


def _mask_of(name: str, runs: list[str], root: Path) -> np.ndarray:
    try:
        return decode_mask(runs)
    except ValueError as error:
        raise DataError(f"{root / 'train-rle.csv'}: {name}: {error}.") from error


def read_masks(file: Path) -> dict[str, list[str]]:
    """{image id: its masks; none for a healthy lung} of train-rle.csv (columns ImageId and EncodedPixels)."""
    found: dict[str, list[str]] = {}
    for _, record in read_csv(file, needs=("ImageId", "EncodedPixels")):
        runs = record["EncodedPixels"]
        found.setdefault(record["ImageId"], []).extend([] if runs == "-1" else [runs])
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Dictionaries, texts and numbers only: a pickle that names any code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def read_tubes(file: Path) -> dict[str, int]:
    """{image id: 0 or 1} of a JSON, CSV or (harmless) pickle file."""
    try:
        found = _tubes(file)
    except (OSError, ValueError, pickle.UnpicklingError, EOFError, IndexError) as error:
        raise DataError(
            f"{file}: cannot be read as {{image id: 0 or 1}} ({error}). Save it as JSON, or as CSV lines id,0/1."
        ) from error
    wrong = [name for name, value in found.items() if value not in (0, 1)]
    if wrong:
        raise DataError(f"{file}: the entry of {wrong[0]!r} is {found[wrong[0]]!r}, not 0 or 1.")
    return {str(name): int(value) for name, value in found.items()}


def _tubes(file: Path) -> dict[Any, Any]:
    if file.suffix == ".json":
        found = json.loads(file.read_text(encoding="utf-8"))
    elif file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8") as handle:
            found = {row[0].strip(): int(row[1]) for row in csv.reader(handle) if row and row[1].strip() in ("0", "1")}
    else:
        with file.open("rb") as binary:
            found = _PlainUnpickler(binary).load()
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    return found
