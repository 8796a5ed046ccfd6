"""The block of report.html on discovered parts: pictures of part maps, and what the parts are worth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from vissl_like.outputs.report_html import one_decimal, picture
from vissl_like.outputs.run_folder import PART_MAPS_FOLDER, RunFolder, Section

#: Pictures of the newest epoch that are shown.
MAX_PICTURES = 3
#: Key of results.json -> what it is, and the arrow of the better direction. All are in percent.
MEASURES = {
    "nmi": ("NMI of parts and keypoints", "↑"),
    "ari": ("adjusted Rand index of parts and keypoints", "↑"),
    "keypoint_error": ("keypoint error, % of the box", "↓"),
    "keypoint_pck": ("keypoints within 10 % of the box", "↑"),
    "foreground_iou": ("foreground IoU", "↑"),
    "foreground_dice": ("foreground Dice", "↑"),
    "foreground_iou_per_image": ("foreground IoU, mean of images", "↑"),
    "background_iou": ("background IoU", "↑"),
    "pixel_nmi": ("NMI of parts and annotated pixels", "↑"),
    "pixel_ari": ("adjusted Rand index of parts and annotated pixels", "↑"),
}
#: Prefix of a key -> the column: the model, then what it is compared with.
COLUMNS = {"": "this model", "epoch0_": "before training", "random_": "random maps", "oracle_": "annotated parts"}
#: The keypoint error of no parts at all stands in a column of its own.
MEAN_KEY, MEAN_COLUMN = "keypoint_error_of_mean", "mean position"

#: Key of results.json -> the parts that are left out.
REMOVAL = re.compile(r"(?P<prefix>without_(?P<parts>\d+(_\d+)*))_top_1")

#: What is added to the name of a stage to name the one that measures the same model before its training.
EPOCH_0 = "_epoch_0"


@dataclass(frozen=True)
class PartPicture:
    """One drawn test batch; `about` is what part_figures.py wrote beside it."""

    file: Path
    epoch: int
    batch: int
    about: Mapping[str, Any]


def parts(run: RunFolder) -> Section | None:
    """Pictures of the newest maps and the table of measures; of a pipeline, those of its last stages that have them."""
    folders = [*reversed(run.stages), run]
    found = next((pictures for folder in folders if (pictures := part_pictures(folder))), [])
    measured = [folder for folder in folders if _measures_parts(folder)]
    table = next((text for folder in measured if (text := measures_table(_with_epoch_0(folder, measured)))), "")
    removals = next((text for folder in measured if (text := removals_table(folder.results))), "")
    if not found and not table and not removals:
        return None
    return Section("Parts", _pictures(found) + table + removals)


def _measures_parts(run: RunFolder) -> bool:
    """Whether results are of parts: an NMI is measured of clusters, too."""
    return run.engine == "evaluate_parts" or (run.path / PART_MAPS_FOLDER).is_dir()


def _with_epoch_0(run: RunFolder, others: list[RunFolder]) -> dict[str, Any]:
    """Results of a stage NAME, and as epoch0_* those of the stage NAME_epoch_0, the same model before its training."""
    before = next((other.results for other in others if other.path.name == f"{run.path.name}{EPOCH_0}"), {})
    return {f"epoch0_{name}": value for name, value in before.items()} | run.results


def part_pictures(run: RunFolder) -> list[PartPicture]:
    """The drawn batches of a run, by epoch and batch."""
    found = []
    for file in sorted((run.path / PART_MAPS_FOLDER).glob("*.jpg")):
        about = run.json(f"{PART_MAPS_FOLDER}/{file.stem}.json")
        if isinstance(about, dict) and {"epoch", "batch", "area"} <= set(about):
            found.append(PartPicture(file, int(about["epoch"]), int(about["batch"]), about))
    return sorted(found, key=lambda one: (one.epoch, one.batch))


def _pictures(found: list[PartPicture]) -> str:
    if not found:
        return ""
    newest = [one for one in found if one.epoch == found[-1].epoch]
    shown = "".join(picture(one.file, _caption(one)) for one in newest[:MAX_PICTURES])
    older = [one for one in found if one.epoch < found[-1].epoch]
    if older:
        first = picture(older[0].file, _caption(older[0]))
        shown += f"<details><summary>how it began</summary>{first}</details>"
    rest = len(found) - len(newest[:MAX_PICTURES]) - bool(older)
    more = f'<p class="muted">{rest} more in <code>{PART_MAPS_FOLDER}/</code>.</p>' if rest else ""
    note = "Beside each image, the strongest part of each pixel. A colour stands for the same part everywhere."
    return f'<p class="muted">{note}</p>{shown}{more}'


def _caption(one: PartPicture) -> str:
    when = f"After epoch {one.epoch}" if one.epoch else "As loaded"
    background = 100 * float(one.about["area"][-1])
    return f"{when}, test batch {one.batch}: {background:.0f} % of the area is background."


def removals_table(results: Mapping[str, Any]) -> str:
    """Accuracies of stage 2 without some of the parts (leave_one_out), and what is lost by that; "" without any."""
    rows = []
    for key, value in results.items():
        match = REMOVAL.fullmatch(key)
        if not match:
            continue
        worst, whole = results.get(f"{match['prefix']}_worst_group"), results.get("test_top_1")
        change = None if whole is None else value - whole
        rows.append((f"without {match['parts'].replace('_', ', ')}", [value, change, worst]))
    if not rows:
        return ""
    whole = [results.get("test_top_1"), None, results.get("test_worst_group")]
    rows = ([("all parts", whole)] if whole[0] is not None else []) + rows
    shown = [i for i in range(3) if any(numbers[i] is not None for _, numbers in rows)]
    columns = [("top 1", "change", "worst group")[i] for i in shown]
    return _table("parts in the mask", columns, [(title, [numbers[i] for i in shown]) for title, numbers in rows])


def measures_table(results: Mapping[str, Any]) -> str:
    """The measures of results.json with floors and oracle where they are there; "" without any."""
    rows = []
    for name, (title, arrow) in MEASURES.items():
        numbers = {column: results.get(prefix + name) for prefix, column in COLUMNS.items()}
        if name == "keypoint_error":
            numbers[MEAN_COLUMN] = results.get(MEAN_KEY)
        if any(isinstance(value, int | float) for value in numbers.values()):
            rows.append((f"{title}\N{NO-BREAK SPACE}{arrow}", numbers))
    if not rows or not any(numbers[COLUMNS[""]] is not None for _, numbers in rows):
        return ""
    order = [*COLUMNS.values(), MEAN_COLUMN]
    columns = [column for column in order if any(numbers.get(column) is not None for _, numbers in rows)]
    return _table("", columns, [(title, [numbers.get(column) for column in columns]) for title, numbers in rows])


def _table(corner: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[Any]]]) -> str:
    """A table of numbers with one decimal; `corner` stands above the titles of the rows."""
    head = "".join(f'<th class="n">{escape(column)}</th>' for column in columns)
    lines = "".join(
        f"<tr><td>{escape(title)}</td>"
        + "".join(f'<td class="n">{one_decimal(number)}</td>' for number in numbers)
        + "</tr>"
        for title, numbers in rows
    )
    return f'<div class="scroll"><table class="result"><tr><th>{escape(corner)}</th>{head}</tr>{lines}</table></div>'
