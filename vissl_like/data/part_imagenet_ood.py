"""PartImageNet-OOD's own split: its training annotations, cut in two by a table of images.

The download's training file is the only one whose classes are in both parts; the table says which images are tested.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vissl_like.data.part_sets import read_coco, synset_of
from vissl_like.data.tables import Table, read_table
from vissl_like.errors import DataError
from vissl_like.files import refusals_explained, write_text

#: What is written: name of the file -> is_test in the table.
FILES = {"train_train.json": 0, "train_test.json": 1}


def resplit(annotations: Path, table: Path, out: Path) -> dict[str, int]:
    """Write FILES into the folder `out`; returns how many images each has. Raises DataError.

    annotations: COCO file; table: lines of image_id, is_test, label_id, label_name and image_name, with or without a line of
    titles. Images are found by name; they are numbered from 0 in each file, and lie in folders of their WordNet ids.
    """
    content = read_coco(annotations)
    is_test = _tested(table)
    known = {Path(image["file_name"]).stem for image in content["images"]}
    lost = [name for name in is_test if name not in known]
    if lost:
        raise DataError(f"{annotations}: has no image {lost[0]!r}, which {table} lists (and {len(lost) - 1} more).")
    counts = {}
    for name, wanted in FILES.items():
        images = [image for image in content["images"] if is_test.get(Path(image["file_name"]).stem) == wanted]
        part = _part(content, images, file=annotations)
        with refusals_explained(out):
            out.mkdir(parents=True, exist_ok=True)
        write_text(out / name, json.dumps(part))
        counts[name] = len(images)
    return counts


def _tested(file: Path) -> dict[str, int]:
    """{image name without its ending: is_test}."""
    found: dict[str, int] = {}
    table = _read(file)
    for row, (word, name) in enumerate(zip(table["is_test"].tolist(), table["image_name"].tolist())):
        if word not in ("0", "1"):
            raise table.problem(row, f"is_test is {word!r}, not 1 (test) or 0 (train).")
        if found.setdefault(Path(name).stem, int(word)) != int(word):
            raise table.problem(row, f"{name} stands there a second time, in the other part.")
    return found


def _read(file: Path) -> Table:
    fields = {"image_id": "s", "is_test": "s", "label_id": "s", "label_name": "s", "image_name": "s"}
    table = read_table(file, separator="\t", **fields)
    if table["is_test"][0] != "is_test":
        return table
    return Table(file, {name: column[1:] for name, column in table.columns.items()}, table.lines[1:])


def _part(content: dict[str, Any], images: list[dict[str, Any]], *, file: Path) -> dict[str, Any]:
    number = {image["id"]: position for position, image in enumerate(images)}
    kept = [annotation for annotation in content["annotations"] if annotation["image_id"] in number]
    moved = [
        image | {"id": number[image["id"]], "file_name": f"{synset_of(image['file_name'], file=file)}/{name}"}
        for image in images
        for name in [Path(image["file_name"]).name]
    ]
    numbered = [annotation | {"image_id": number[annotation["image_id"]]} for annotation in kept]
    return content | {"images": moved, "annotations": numbered}
