"""ImageNet-9 (backgrounds challenge, arXiv 2006.09994): nine classes whose objects stand on other backgrounds.

ROOT/<variant>/{train,val}/<class>/* (variants: original, mixed_same, mixed_rand, only_bg_t, ...), the object's pixels in
ROOT/fg_mask/val/<class>/<name>.npy (height, width), and in_to_in9.json, which comes with the challenge's scripts: a class of
ImageNet -> one of the nine, or -1.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from vissl_like.data.annotated import required_folder
from vissl_like.data.folder import FolderSource
from vissl_like.data.npy import load_npy
from vissl_like.data.source import SourceRequest
from vissl_like.errors import DataError

NUM_CLASSES = 9
_SPLIT_FOLDERS = {"TRAIN": "train", "VAL": "val", "TEST": "val"}


class ImageNet9Source(FolderSource):
    """One variant (IMAGE_SUB_PATH, by default original). VAL is TEST. Masks belong to the variant `original`."""

    def __init__(self, root: Path, *, variant: str = "original", folder: str = "val", name: str = "imagenet_9") -> None:
        super().__init__(root / variant / folder, name=name, key="DATA_PATHS")
        if self.labels is None or self.class_names is None or len(self.class_names) != NUM_CLASSES:
            raise DataError(
                f"{root / variant / folder}: expected a sub-folder for each of the {NUM_CLASSES} classes, found "
                f"{len(self.class_names or [])}."
            )
        self.class_names = [re.sub(r"^\d+_", "", word) for word in self.class_names]
        self._mask_root = root / "fg_mask" / folder

    @classmethod
    def build(cls, request: SourceRequest) -> ImageNet9Source:
        return cls(
            required_folder(request),
            variant=request.options.IMAGE_SUB_PATH or "original",
            folder=_SPLIT_FOLDERS[request.split],
            name=request.name or "imagenet_9",
        )

    def rows_with_masks(self) -> np.ndarray:
        """The rows whose object is known, int64 (M,). Raises DataError if there is none."""
        rows = [row for row in range(len(self)) if self._mask_path(row).is_file()]
        if not rows:
            raise DataError(f"{self._mask_path(0)}: this mask is not there, nor is that of any other image.")
        return np.array(rows, dtype=np.int64)

    def mask(self, row: int) -> np.ndarray:
        """bool (H, W): the object's pixels."""
        file = self._mask_path(row)
        mask = np.asarray(load_npy(file, key="fg_mask"))
        if mask.ndim == 3:  # one mask for each colour
            mask = np.asarray(mask.any(axis=int(np.argmin(mask.shape))))
        if mask.ndim != 2 or mask.dtype.kind not in "biuf":
            raise DataError(f"{file}: expected a mask (height, width), got {mask.dtype} {mask.shape}.")
        return mask.astype(bool)

    def _mask_path(self, row: int) -> Path:
        return (self._mask_root / self.path(row)).with_suffix(".npy")


def read_class_map(file: Path) -> np.ndarray:
    """int64 (C,) of in_to_in9.json: which of the nine each class of a model is, -1 for none. Raises DataError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}). It comes with the scripts of the "
            "backgrounds challenge (github.com/MadryLab/backgrounds_challenge), not with its images: put it there, or set "
            "config.EVALUATE_PARTS.BACKGROUNDS.CLASS_MAP."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: is not JSON ({error.msg}).") from error
    if not isinstance(content, dict) or set(content) != {str(number) for number in range(len(content))}:
        raise DataError(f"{file}: expected an object with the keys 0, 1, 2, ..., one for each class of the model.")
    for key, value in content.items():
        if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < NUM_CLASSES:
            raise DataError(f"{file}: class {key} is {value!r}; expected 0 to {NUM_CLASSES - 1}, or -1 for none.")
    return np.array([content[str(number)] for number in range(len(content))], dtype=np.int64)
