"""Images in a folder, and images named by a list."""

from __future__ import annotations

import difflib
import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image

from vissl_like.data.decode import IMAGE_EXTENSIONS, read_bytes, read_image
from vissl_like.data.labels import read_siblings
from vissl_like.data.listing import Listing, entries_of, images_below, is_image, list_folder
from vissl_like.data.npy import load_npy
from vissl_like.data.source import PathTable, SourceRequest, file_sizes, unicode_array
from vissl_like.errors import DataError

_log = logging.getLogger(__name__)
_SPLIT_WORDS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class FolderSource:
    """Every image below a folder, at any depth, sorted by path component.

    The first folder level is the class: `dogs/a.jpg` and `dogs/puppies/b.jpg` are both "dogs"; class numbers follow the
    sorted names. If some image lies directly in the folder there are no classes, and no labels. Links are followed;
    names that start with a dot are passed over. A train/val/test layout is not guessed: give the sub-folder.
    """

    def __init__(self, folder: str | Path, *, name: str = "disk_folder", key: str = "DATA_PATHS") -> None:
        self.name = name
        self.root = os.path.abspath(os.path.expanduser(str(folder)))
        _must_be_folder(self.root, given=str(folder), key=key)
        found = list_folder(self.root)
        if not len(found.paths):
            raise _empty(folder, key=key)
        self._paths, self.class_names, self.labels = found.paths, found.class_names, found.class_numbers
        _warn_of_layout(found, folder=str(folder), key=key)

    @classmethod
    def build(cls, request: SourceRequest) -> FolderSource:
        return cls(
            request.path, name=request.name or "disk_folder", key=f"{request.key('DATA_PATHS')}.{request.position}"
        )

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def paths(self) -> np.ndarray:
        return self._paths.array()

    def load(self, row: int) -> Image.Image:
        return read_image(self.file(row))

    def read(self, row: int) -> bytes:
        return read_bytes(self.file(row))

    def path(self, row: int) -> str:
        return self._paths[row]

    def file(self, row: int) -> str:
        return os.path.join(self.root, self._paths[row])

    def stamps(self) -> np.ndarray:
        return file_sizes(self.file(row) for row in range(len(self)))


def refuse_empty(folder: str | Path, *, key: str) -> None:
    """Raise DataError unless this is a folder with an image below it; stops looking at the first one."""
    _must_be_folder(os.path.abspath(os.path.expanduser(str(folder))), given=str(folder), key=key)
    if next(images_below(os.path.abspath(os.path.expanduser(str(folder)))), None) is None:
        raise _empty(folder, key=key)


def _empty(folder: str | Path, *, key: str) -> DataError:
    return DataError(
        f"{key}={str(folder)!r}: no image in this folder or below it. "
        f"Known extensions: {', '.join(IMAGE_EXTENSIONS)}. Put images there, or give another folder."
    )


def folder_classes(folder: str | Path) -> list[str] | None:
    """The class names that FolderSource finds, without listing every image; None where it finds none."""
    root = os.path.abspath(os.path.expanduser(str(folder)))
    classes = []
    for entry in entries_of(root):
        if not entry.is_dir():
            if is_image(entry.name):
                return None
        elif next(images_below(root, below=entry.name), None) is not None:
            classes.append(entry.name)
    return classes or None


def _must_be_folder(root: str, *, given: str, key: str) -> None:
    if os.path.isdir(root):
        return
    if os.path.isfile(root):
        raise DataError(
            f"{key}={given!r}: this is a file, not a folder. For a .npy or .txt list use DATA_SOURCES=[disk_filelist]."
        )
    parent = os.path.dirname(root)
    near = difflib.get_close_matches(os.path.basename(root), os.listdir(parent) if os.path.isdir(parent) else [], n=1)
    hint = f" Did you mean {os.path.join(parent, near[0])!r}?" if near else ""
    raise DataError(f"{key}={given!r}: no such folder (looked for {root}).{hint or ' Correct the path.'}")


def _warn_of_layout(found: Listing, *, folder: str, key: str) -> None:
    """Say so if the folder may be meant in another way."""
    if found.loose:
        _log.warning("%s=%r: %r lies beside sub-folders, so these are not taken as classes.", key, folder, found.loose)
    names = found.class_names or []
    if len(names) > 1 and {name.lower() for name in names} <= _SPLIT_WORDS:
        _log.warning(
            "%s=%r: the sub-folders %s are taken as classes. If they are splits, give %r.",
            key, folder, names, os.path.join(folder, names[0]),
        )  # fmt: skip


class FilelistSource:
    """Images named by a .npy array of unicode paths, or by a text file with one path per line.

    Relative entries are taken relative to `root`: by default the root in the manifest beside a label stage's list, else
    the folder of the list. With such a root the entries themselves are the identity, else the absolute path is.
    REMOVE_IMG_PATH_PREFIX and NEW_IMG_PATH_PREFIX are applied first. The array is mapped, not read.
    """

    def __init__(
        self,
        file: str | Path,
        *,
        name: str = "disk_filelist",
        remove_prefix: str = "",
        new_prefix: str = "",
        mmap: bool = True,
        key: str = "DATA_PATHS",
    ) -> None:
        self.name, self._list_file, self._key, self._mmap = (
            name,
            os.path.abspath(os.path.expanduser(str(file))),
            key,
            mmap,
        )
        self._remove, self._new = remove_prefix, new_prefix
        self.class_names: list[str] | None = None
        self.labels: np.ndarray | None = None
        self._entries: np.ndarray | PathTable | None = None
        if len(self.entries) == 0:
            raise DataError(
                f"{key}={str(file)!r}: the list is empty. It names one image per row (.npy) or line (.txt)."
            )
        manifest = read_siblings(self._list_file).manifest
        self._base = str(manifest.get("root") or os.path.dirname(self._list_file))
        rewritten = remove_prefix or new_prefix
        is_relative = not os.path.isabs(self._rewrite(str(self.entries[0])))
        self.root = self._base if is_relative and not rewritten else ""

    @classmethod
    def build(cls, request: SourceRequest) -> FilelistSource:
        return cls(
            request.path,
            name=request.name or "disk_filelist",
            remove_prefix=request.options.REMOVE_IMG_PATH_PREFIX,
            new_prefix=request.options.NEW_IMG_PATH_PREFIX,
            mmap=request.options.MMAP_MODE,
            key=f"{request.key('DATA_PATHS')}.{request.position}",
        )

    def __getstate__(self) -> dict[str, object]:
        # A worker process maps the file itself instead of receiving a copy of it.
        return {**self.__dict__, "_entries": None}

    @property
    def entries(self) -> np.ndarray | PathTable:
        """The list as it stands in the file."""
        if self._entries is None:
            self._entries = read_list(self._list_file, key=self._key, mmap=self._mmap)
        return self._entries

    def __len__(self) -> int:
        return len(self.entries)

    def _rewrite(self, entry: str) -> str:
        if self._remove and entry.startswith(self._remove):
            entry = entry[len(self._remove) :]
        return self._new + entry

    @property
    def paths(self) -> np.ndarray:
        return unicode_array(self.path(row) for row in range(len(self)))

    def load(self, row: int) -> Image.Image:
        return read_image(self.file(row))

    def read(self, row: int) -> bytes:
        return read_bytes(self.file(row))

    def path(self, row: int) -> str:
        entry = self._rewrite(str(self.entries[row]))
        return os.path.normpath(entry) if self.root and not os.path.isabs(entry) else self.file(row)

    def file(self, row: int) -> str:
        entry = os.path.expanduser(self._rewrite(str(self.entries[row])))
        return os.path.normpath(os.path.join(self._base, entry))

    def stamps(self) -> np.ndarray:
        return file_sizes(self.file(row) for row in range(len(self)))


def read_list(file: str, *, key: str, mmap: bool = True) -> np.ndarray | PathTable:
    """Paths of a .npy unicode array (N,) or of a text file with one per line; empty lines do not count."""
    if file.endswith(".txt"):
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(
                f"{key}={file!r}: cannot be read ({error.strerror}). Give a .npy or .txt list of images."
            ) from error
        return PathTable(line.strip() for line in lines if line.strip())
    if os.path.isdir(file):
        raise DataError(
            f"{key}={file!r}: this is a folder, not a list. For a folder of images use DATA_SOURCES=[disk_folder]."
        )
    if not file.endswith(".npy"):
        raise DataError(
            f"{key}={file!r}: a list of images is a .npy array of paths or a .txt file with one path per line."
        )
    entries = load_npy(file, key=key, mmap=mmap)
    if entries.dtype.kind not in "US" or entries.ndim != 1:
        raise DataError(
            f"{key}={file!r}: holds {entries.dtype} of shape {entries.shape}, not a list of paths. "
            "Save it with numpy.save(file, numpy.array(paths, dtype=str))."
        )
    return entries.astype(np.str_) if entries.dtype.kind == "S" else entries
