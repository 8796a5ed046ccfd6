"""Data sets by name: a JSON file {name: {"train": [images, labels], "val": [images, labels]}}.

Found by config.DATA.CATALOG, else the environment variable VISSL_DATASET_CATALOG_PATH, else the first of
configs/config/dataset_catalog.json and dataset_catalog.json in the working directory. Relative paths in it are
relative to the catalog's folder. TRAIN looks up "train", VAL "val", and TEST "test" where the entry has it, else "val".
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from vissl_like.data.shard_names import is_url
from vissl_like.errors import ConfigError, DataError

ENVIRONMENT_VARIABLE = "VISSL_DATASET_CATALOG_PATH"
DEFAULT_PLACES = ("configs/config/dataset_catalog.json", "dataset_catalog.json")
_SPLIT_NAMES = {"TRAIN": ("train",), "VAL": ("val",), "TEST": ("test", "val")}


@dataclass(frozen=True)
class CatalogEntry:
    """Where one split of a data set lies. `labels` is "" where the catalog names none."""

    images: str
    labels: str


def find_catalog(option: str) -> Path | None:
    """The catalog file in use, or None. A file that was asked for and is missing is an error."""
    for given, key in (
        (option, "config.DATA.CATALOG"),
        (os.environ.get(ENVIRONMENT_VARIABLE, ""), ENVIRONMENT_VARIABLE),
    ):
        if given:
            file = Path(os.path.expanduser(given))
            if not file.is_file():
                raise DataError(f"{key}={given!r}: no such file. Give the JSON file of a catalog, or leave it empty.")
            return file
    return next((Path(place) for place in DEFAULT_PLACES if Path(place).is_file()), None)


def look_up(name: str, *, split: str, catalog: str) -> CatalogEntry:
    """The entry of a data set's split. Raises DataError with near names and the cure."""
    key = f"config.DATA.{split}.DATASET_NAMES"
    cure = f"Set config.DATA.{split}.DATA_PATHS=[FOLDER_OR_LIST], or add the name to a catalog (config.DATA.CATALOG)."
    file = find_catalog(catalog)
    if file is None:
        raise DataError(f"{key}={name!r}: there is no catalog to look this up in, and no DATA_PATHS. {cure}")
    known = _read(file)
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(repr(word) for word in near)}?" if near else "."
        raise DataError(f"{key}={name!r}: not in the catalog {file}{hint} Known: {', '.join(sorted(known))}. {cure}")
    splits = known[name]
    found = next((splits[word] for word in _SPLIT_NAMES[split] if word in splits), None)
    if found is None:
        raise DataError(f"{key}={name!r}: {file} has {sorted(splits)} of it, not {_SPLIT_NAMES[split][0]!r}. {cure}")
    return _entry(found, file=file, name=name)


def _read(file: Path) -> dict[str, dict[str, list[str]]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: not a readable JSON catalog ({error}). Mend it, or name another by config.DATA.CATALOG."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise DataError(f'{file}: a catalog is {{name: {{"train": [images, labels], "val": [images, labels]}}}}.')
    return found


def _entry(found: list[str] | str, *, file: Path, name: str) -> CatalogEntry:
    words = [found] if isinstance(found, str) else found
    if not isinstance(words, list) or not 1 <= len(words) <= 2 or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{file}: entry {name!r} should hold [images, labels], not {found!r}.")
    images, labels = (*words, "")[:2]
    folder = file.resolve().parent

    def absolute(path: str) -> str:
        return str(folder / os.path.expanduser(path)) if path and not is_url(path) else path

    return CatalogEntry(images=absolute(images), labels=absolute(labels))
