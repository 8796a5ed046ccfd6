"""`data VERB ...`: what the command line does with data sets, apart from training on them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from vissl_like.errors import ConfigError
from vissl_like.registry import suggest

#: Below this many pixels a side the parts of a drawn bird can vanish.
_SMALLEST_BIRD = 16


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}. `{self.prog} --help` shows how it is called.")


def main(argv: Sequence[str]) -> int:
    """The words after `data`. Returns the exit code; what the user can mend is raised as UserError."""
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: vissl-like data VERB ...\n\n" + "\n".join(f"  {name:<20}{_WORDS[name]}" for name in _VERBS))
        return 0
    verb = words[0]
    if verb not in _VERBS:
        raise ConfigError(f"data {verb}: no such verb{suggest(verb, list(_VERBS)) or '.'} Known: {', '.join(_VERBS)}.")
    return _VERBS[verb](words)


def _shrink(words: list[str]) -> int:
    from vissl_like.data.shrink import main as shrink

    return shrink(words[1:])


def _index(words: list[str]) -> int:
    from vissl_like.data.publish import main as index

    return index(words[1:])


def _siim_acr(words: list[str]) -> int:
    parser = _Parser(prog="vissl-like data siim_acr", description=_WORDS["siim_acr"])
    parser.add_argument("source", metavar="SRC", help="the download: train-rle.csv, dicom-images-train/")
    parser.add_argument(
        "tubes", metavar="TUBES", help="which test images show a chest tube: {id: 0 or 1}, .json/.csv/.pkl"
    )
    parser.add_argument("target", metavar="DST", help="where train_set, full_test_set, ... and all_masks go")
    given = parser.parse_args(words[1:])
    from vissl_like.data.medical import prepare

    counts = prepare(Path(given.source), Path(given.tubes), Path(given.target))
    return _say(given.target, counts)


def _say(target: str, counts: Mapping[str, int]) -> int:
    """Tell what was made, and return the exit code."""
    print(f"{target}: " + ", ".join(f"{count} images in {name}" for name, count in counts.items()))
    return 0


def _part_imagenet_ood(words: list[str]) -> int:
    parser = _Parser(prog="vissl-like data part_imagenet_ood", description=_WORDS["part_imagenet_ood"])
    parser.add_argument("annotations", metavar="TRAIN_JSON", help="the download's annotations of the training images")
    parser.add_argument(
        "table", metavar="TABLE", help="tab-separated: image_id, is_test, label_id, label_name, image_name"
    )
    parser.add_argument("target", metavar="DST", help="the folder that train_train.json and train_test.json go into")
    given = parser.parse_args(words[1:])
    from vissl_like.data.part_imagenet_ood import resplit

    counts = resplit(Path(given.annotations), Path(given.table), Path(given.target))
    return _say(given.target, counts)


def _toy(words: list[str], *, which: str) -> int:
    parser = _Parser(prog=f"vissl-like data {which}", description=_WORDS[which])
    parser.add_argument("target", metavar="DST", help="the new folder")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other birds; default 0")
    parser.add_argument("--size", type=int, default=72, help="side of the images in pixels, at least 16; default 72")
    given = parser.parse_args(words[1:])
    if given.size < _SMALLEST_BIRD:
        raise ConfigError(
            f"vissl-like data {which}: --size {given.size}: a bird needs at least {_SMALLEST_BIRD} pixels."
        )
    from vissl_like.data import toybirds

    folder = Path(given.target).absolute()
    if folder.exists():
        raise ConfigError(f"vissl-like data {which}: {given.target} exists; name a new folder.")
    write = toybirds.write_cub if which == "toybirds" else toybirds.write_waterbirds
    toybirds.make_folder(folder, lambda target: write(target, seed=given.seed, size=given.size))
    print(f"{given.target}: drawn.")
    return 0


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "shrink": _shrink,
    "index": _index,
    "siim_acr": _siim_acr,
    "part_imagenet_ood": _part_imagenet_ood,
    "toybirds": partial(_toy, which="toybirds"),
    "toy_waterbirds": partial(_toy, which="toy_waterbirds"),
}
_WORDS = {
    "index": "SHARDS: lists of what tar shards hold, for those who fetch them",
    "shrink": "SRC DST: a smaller copy of a folder of images, or shards of them",
    "siim_acr": "SRC TUBES DST: the SIIM-ACR download in the layout of the data source siim_acr",
    "part_imagenet_ood": "TRAIN_JSON TABLE DST: PartImageNet's training annotations, cut into training and test",
    "toybirds": "DST: drawn birds with parts, in the files of CUB-200-2011",
    "toy_waterbirds": "DST: drawn birds on telling backgrounds, in the files of Waterbirds",
}
