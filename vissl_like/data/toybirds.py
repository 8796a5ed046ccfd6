"""A synthetic bird data set in the files of CUB-200-2011 and Waterbirds: drawn, seeded, with parts, boxes and masks.

A bird is a body, a head with beak and eye, a wing, a tail and two legs, in one base colour each; its class shows only in
small markings, so parts and classes are different questions. It is a test bed for part discovery, not a benchmark of real
images.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vissl_like.core import rng
from vissl_like.core.on_main import on_main
from vissl_like.data.cub import WATERBIRDS, CubSource, WaterbirdsSource
from vissl_like.data.source import SourceRequest
from vissl_like.errors import ConfigError, DataError

log = logging.getLogger(__name__)

#: CUB's keypoints, in CUB's order (ids 1..15).
KEYPOINTS = (
    *("back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape"),
    *("right eye", "right leg", "right wing", "tail", "throat"),
)
#: Ids in part_segmentations; 0 is the background.
PARTS = ("background", "head", "body", "wing", "tail", "legs")
SIZE = 72
#: Written last into a folder of toy birds; holds the version of the drawing.
DONE, VERSION = "toybirds.txt", 1
GROUPS = ("land", "water")

_FINE = 3  # everything is drawn this much larger and then averaged
_COLOURS = {"head": (200, 60, 50), "body": (215, 190, 70), "wing": (60, 90, 190), "tail": (140, 70, 170)}
_LEGS, _BEAK, _EYE = (90, 60, 30), (235, 150, 40), (15, 15, 15)
_MARKINGS = ((25, 25, 25), (245, 245, 245))
_NAMES = ("Plain", "Hooded", "Banded", "Masked", "Barred", "Crested", "Pied", "Motley")

Points = np.ndarray  # (n, 2) float64, x to the right and y down


@dataclass(frozen=True)
class Bird:
    """One picture: `image` (S, S, 3) uint8, `parts` (S, S) uint8 ids, `keypoints` (15, 3) x, y, visible."""

    image: np.ndarray
    parts: np.ndarray
    keypoints: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(S, S) bool, where the bird is."""
        return self.parts > 0

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x, y, width, height of the bird in pixels."""
        rows, columns = np.nonzero(self.mask)
        x, y = float(columns.min()), float(rows.min())
        return x, y, float(columns.max()) + 1 - x, float(rows.max()) + 1 - y


def draw(seed: Sequence[int], *, markings: Sequence[int], place: int, size: int = SIZE) -> Bird:
    """The bird of a seed. `markings`: dark (0) or light (1) on head, body, wing and tail. `place`: 0 land, 1 water."""
    chance = np.random.default_rng(rng.mix(*seed))
    pen = _Pen(chance, size=size)
    pen.background(place)
    pen.bird(dict(zip(("head", "body", "wing", "tail"), markings, strict=True)))
    return pen.finish()


class _Pen:
    """Draws in units of the bird (its body is about 0.5 long) on a canvas that is `_FINE` times too large."""

    def __init__(self, chance: np.random.Generator, *, size: int) -> None:
        self.chance, self.size = chance, size
        side = size * _FINE
        self.canvas = Image.new("RGB", (side, side))
        self.ids = Image.new("L", (side, side))
        self.keypoints = np.zeros((len(KEYPOINTS), 3))
        angle = math.radians(chance.uniform(-25, 25))
        self.mirrored = bool(chance.random() < 0.5)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        flip = np.diag([-1.0 if self.mirrored else 1.0, 1.0])
        self.matrix = turn @ flip * chance.uniform(0.85, 1.15) * side
        self.origin = side / 2 + chance.uniform(-0.1, 0.1, 2) * side

    def background(self, place: int) -> None:
        """Vertical stripes of green and brown (land) or horizontal waves of blue and green (water), with noise."""
        side = self.size * _FINE
        rows, columns = np.mgrid[0:side, 0:side] / side
        chance = self.chance
        frequency, phase = chance.uniform(3, 8), chance.uniform(0, 2 * math.pi)
        if place == 0:
            wave = np.sin(2 * math.pi * frequency * columns + phase + 0.6 * np.sin(5 * rows))
            colours = np.array([[60, 130, 50], [130, 95, 50]], dtype=float)
        else:
            wave = np.sin(2 * math.pi * frequency * rows + phase + 0.9 * np.sin(7 * columns + phase))
            colours = np.array([[40, 90, 170], [50, 150, 140]], dtype=float)
        share = (wave[..., None] + 1) / 2
        image = share * colours[0] + (1 - share) * colours[1]
        image = 0.45 * image + 0.55 * image.mean(-1, keepdims=True)
        coarse = chance.normal(0, 12, (self.size, self.size, 3))
        image = image + np.repeat(np.repeat(coarse, _FINE, 0), _FINE, 1) + chance.normal(0, 10, 3)
        self.canvas = Image.fromarray(image.clip(0, 255).astype(np.uint8))

    def bird(self, markings: dict[str, int]) -> None:
        """From the back to the front."""
        swing = self.chance.uniform
        head_turn, tail_turn, wing_turn = swing(-0.35, 0.35), swing(-0.45, 0.45), swing(-0.3, 0.5)
        neck, rump, shoulder = np.array([0.17, -0.08]), np.array([-0.20, -0.01]), np.array([0.04, -0.03])
        self._legs()
        self._tail(rump, tail_turn, markings["tail"])
        self._body(markings["body"])
        self._head(neck, head_turn, markings["head"])
        self._wing(shoulder, wing_turn, markings["wing"])

    def _legs(self) -> None:
        side = "left" if self.mirrored else "right"
        for name, x in (("", -0.05), (f"{side} leg", 0.05)):  # the far leg is drawn, but not annotated
            step = self.chance.uniform(-0.03, 0.03)
            points = np.array([[x, 0.1], [x + step, 0.25], [x + step + 0.045, 0.26]])
            self._line(points, width=0.022, colour=self._jitter(_LEGS), part="legs")
            if name:
                self._keypoint(name, points[1])

    def _tail(self, rump: Points, turn: float, marking: int) -> None:
        wedge = np.array([[0.05, -0.05], [-0.2, -0.085], [-0.23, 0.0], [-0.2, 0.085], [0.05, 0.05]])
        self._polygon(_turned(wedge, turn) + rump, colour=self._colour("tail"), part="tail")
        bar = np.array([[-0.145, -0.075], [-0.185, -0.082], [-0.185, 0.082], [-0.145, 0.075]])
        self._polygon(_turned(bar, turn) + rump, colour=_MARKINGS[marking])
        self._keypoint("tail", _turned(np.array([[-0.14, 0.0]]), turn)[0] + rump)

    def _body(self, marking: int) -> None:
        self._polygon(_ellipse(0.25, 0.15), colour=self._colour("body"), part="body")
        self._polygon(_ellipse(0.05, 0.035) + [0.1, 0.075], colour=_MARKINGS[marking])
        places = {"back": (-0.08, -0.115), "belly": (-0.03, 0.12), "breast": (0.175, 0.05)}
        for name, place in places.items():
            self._keypoint(name, np.array(place))

    def _head(self, neck: Points, turn: float, marking: int) -> None:
        def placed(points: Sequence[Sequence[float]] | Points) -> Points:
            return _turned(np.asarray(points, dtype=float) + [0.07, -0.09], turn) + neck

        beak = [[0.085, -0.03], [0.19, 0.005], [0.085, 0.035]]
        self._polygon(placed(beak), colour=self._jitter(_BEAK), part="head")
        self._polygon(placed(_ellipse(0.11, 0.11)), colour=self._colour("head"), part="head")
        self._polygon(placed(_ellipse(0.05, 0.028) + [-0.025, -0.065]), colour=_MARKINGS[marking])
        self._polygon(placed(_ellipse(0.02, 0.02) + [0.045, -0.015]), colour=_EYE)
        side = "left" if self.mirrored else "right"
        places = {
            "beak": (0.14, 0.003), "crown": (-0.005, -0.085), "forehead": (0.07, -0.06), "nape": (-0.085, 0.02),
            f"{side} eye": (0.045, -0.015), "throat": (0.045, 0.085),
        }  # fmt: skip
        for name, place in places.items():
            self._keypoint(name, placed([place])[0])

    def _wing(self, shoulder: Points, turn: float, marking: int) -> None:
        wing = _ellipse(0.15, 0.075) + [-0.1, 0.0]
        self._polygon(_turned(wing, turn) + shoulder, colour=self._colour("wing"), part="wing")
        bar = np.array([[-0.09, -0.06], [-0.13, -0.06], [-0.13, 0.06], [-0.09, 0.06]])
        self._polygon(_turned(bar, turn) + shoulder, colour=_MARKINGS[marking])
        side = "left" if self.mirrored else "right"
        self._keypoint(f"{side} wing", _turned(np.array([[-0.1, 0.0]]), turn)[0] + shoulder)

    def _colour(self, part: str) -> tuple[int, int, int]:
        return self._jitter(_COLOURS[part])

    def _jitter(self, colour: tuple[int, int, int]) -> tuple[int, int, int]:
        red, green, blue = (np.asarray(colour) + self.chance.normal(0, 10, 3)).clip(0, 255).astype(int).tolist()
        return red, green, blue

    def _placed(self, points: Points) -> Points:
        return points @ self.matrix.T + self.origin

    def _polygon(self, points: Points, *, colour: tuple[int, int, int], part: str = "") -> None:
        """Fill; `part`: also in the map of parts (a marking belongs to what it lies on)."""
        outline = [tuple(point) for point in self._placed(points)]
        ImageDraw.Draw(self.canvas).polygon(outline, fill=colour)
        if part:
            ImageDraw.Draw(self.ids).polygon(outline, fill=PARTS.index(part))

    def _line(self, points: Points, *, width: float, colour: tuple[int, int, int], part: str) -> None:
        outline = [tuple(point) for point in self._placed(points)]
        thick = max(1, round(width * self.size * _FINE))
        ImageDraw.Draw(self.canvas).line(outline, fill=colour, width=thick, joint="curve")
        ImageDraw.Draw(self.ids).line(outline, fill=PARTS.index(part), width=thick, joint="curve")

    def _keypoint(self, name: str, point: Points) -> None:
        x, y = self._placed(point[None])[0] / _FINE
        visible = 0 <= x < self.size and 0 <= y < self.size
        self.keypoints[KEYPOINTS.index(name)] = (x, y, 1) if visible else (0, 0, 0)

    def finish(self) -> Bird:
        """Averaged to the final size; part ids are those at the middle of each pixel."""
        image = np.asarray(self.canvas.reduce(_FINE)).astype(float) + self.chance.normal(
            0, 4, (self.size, self.size, 3)
        )
        middle = slice(_FINE // 2, None, _FINE)
        ids = np.asarray(self.ids)[middle, middle].copy()
        return Bird(image.clip(0, 255).astype(np.uint8), ids, self.keypoints)


def _ellipse(width: float, height: float) -> Points:
    """The outline of an ellipse with these half axes around 0."""
    angle = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return np.stack([width * np.cos(angle), height * np.sin(angle)], axis=1)


def _turned(points: Points, angle: float) -> Points:
    cos, sin = math.cos(angle), math.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


# ------------------------------------------------------------------------------------------------------------- folders
def write_cub(folder: Path, *, seed: int = 0, train: int = 1000, test: int = 400, size: int = SIZE) -> None:
    """Write a CUB-200-2011 folder of 8 balanced classes; further part_segmentations/ holds the ids of PARTS.

    The class is 3 bits: markings of head, body and wing; the tail shows their parity. The place is random.
    """
    count = train + test
    chance = np.random.default_rng(rng.mix(seed, 1))
    is_train = np.zeros(count, dtype=int)
    is_train[:train] = 1
    classes = np.concatenate([np.arange(train) % 8, np.arange(test) % 8])
    order = np.argsort(classes, kind="stable")  # CUB's files go class by class
    places = chance.integers(0, 2, count)
    tables: dict[str, list[str]] = {name: [] for name in _TABLES}
    numbers = [0] * 8
    for number, row in enumerate(order, 1):
        kind = int(classes[row])
        bits = [kind >> 2 & 1, kind >> 1 & 1, kind & 1]
        bird = draw((seed, 2, int(row)), markings=[*bits, sum(bits) % 2], place=int(places[row]), size=size)
        numbers[kind] += 1
        name = f"{_class_name(kind)}/{_NAMES[kind]}_Toybird_{numbers[kind]:04d}_{number}"
        _save(folder, name, bird)
        tables["images.txt"].append(f"{number} {name}.png")
        tables["image_class_labels.txt"].append(f"{number} {kind + 1}")
        tables["train_test_split.txt"].append(f"{number} {is_train[row]}")
        tables["bounding_boxes.txt"].append(" ".join([str(number), *(f"{value:.1f}" for value in bird.box)]))
        for keypoint, (x, y, visible) in enumerate(bird.keypoints, 1):
            tables["parts/part_locs.txt"].append(f"{number} {keypoint} {x:.2f} {y:.2f} {int(visible)}")
    tables["classes.txt"] = [f"{kind + 1} {_class_name(kind)}" for kind in range(8)]
    tables["parts/parts.txt"] = [f"{number} {name}" for number, name in enumerate(KEYPOINTS, 1)]
    for name, lines in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


_TABLES = (
    *("images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt", "parts/part_locs.txt"),
    *("classes.txt", "parts/parts.txt"),
)


def _class_name(kind: int) -> str:
    return f"{kind + 1:03d}.{_NAMES[kind]}_Toybird"


def _save(folder: Path, name: str, bird: Bird) -> None:
    pictures = {
        "images": bird.image,
        "segmentations": bird.mask.astype(np.uint8) * 255,
        "part_segmentations": bird.parts,
    }
    for sub_folder, picture in pictures.items():
        file = folder / sub_folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file, compress_level=1)


def write_waterbirds(
    folder: Path,
    *,
    seed: int = 0,
    counts: tuple[int, int, int] = (800, 200, 400),
    agreement: tuple[float, float, float] = (0.98, 0.5, 0.5),
    size: int = SIZE,
) -> None:
    """Write Waterbirds' folder and metadata.csv below `folder`, and the birds' masks in segmentations/.

    The class (y: 0 landbird, 1 waterbird) is the marking of wing and tail; those of head and body mean nothing. In each
    split (train, val, test) the background agrees with the class in the given share of each class.
    """
    root = folder / WATERBIRDS
    rows: list[list[object]] = []
    for split, (count, share) in enumerate(zip(counts, agreement, strict=True)):
        for i in range(count):
            y = i % 2
            agreeing = round(share * (count // 2 + (count % 2 and y == 0)))
            place = y if i // 2 < agreeing else 1 - y
            chance = np.random.default_rng(rng.mix(seed, 3, split, i))
            head, body = chance.integers(0, 2, 2).tolist()
            bird = draw((seed, 4, split, i), markings=[head, body, y, y], place=place, size=size)
            name = f"{y + 1:03d}.{GROUPS[y].capitalize()}_Toybird/Toybird_{split}_{i:04d}.png"
            for sub_folder, picture in (
                (root, bird.image),
                (folder / "segmentations", bird.mask.astype(np.uint8) * 255),
            ):
                file = sub_folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(file, compress_level=1)
            rows.append([len(rows) + 1, name, y, split, place, f"/{GROUPS[place]}/{i:04d}.png"])
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["img_id", "img_filename", "y", "split", "place", "place_filename"])
        writer.writerows(rows)


# -------------------------------------------------------------------------------------------------------------- source
class ToybirdsSource:
    """CUB's source on a folder that is drawn when it is not there yet; DATA_PATHS is where it goes (30 MB)."""

    @classmethod
    def build(cls, request: SourceRequest) -> CubSource:
        folder = _drawn(request, lambda target: write_cub(target))
        return CubSource.build(replace(request, path=str(folder), name=request.name or "toybirds"))


class ToyWaterbirdsSource:
    """Waterbirds' source on a folder that is drawn when it is not there yet; DATA_PATHS is where it goes (30 MB)."""

    @classmethod
    def build(cls, request: SourceRequest) -> WaterbirdsSource:
        folder = _drawn(request, lambda target: write_waterbirds(target))
        return WaterbirdsSource.build(replace(request, path=str(folder), name=request.name or "toy_waterbirds"))


def _drawn(request: SourceRequest, write: Callable[[Path], None]) -> Path:
    if not request.path:
        raise ConfigError(f"{request.key('DATA_PATHS')}: say where the drawn images are to be kept.")
    folder = Path(request.path).expanduser().absolute()
    on_main(lambda: make_folder(folder, write))
    if not (folder / DONE).exists():
        raise DataError(f"{request.key('DATA_PATHS')}={request.path!r}: holds something else; name a new folder.")
    version = (folder / DONE).read_text(encoding="utf-8", errors="replace").strip()
    if version != str(VERSION):
        raise DataError(
            f"{folder / DONE}: these birds are of version {version!r}; this program draws version {VERSION}. Remove the "
            "folder, or name a new one."
        )
    return folder


def make_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `folder`, then give it its name: a half-written one is never found."""
    if folder.exists():
        return
    log.info("drawing toy birds into %s", folder)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        write(beside)
        (beside / DONE).write_text(f"{VERSION}\n", encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was faster: its folder has the same files
            beside.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: the toy birds cannot be written ({error.strerror}).") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
