"""Drawn images whose class can be learnt: no files needed. For tests and first tries."""

from __future__ import annotations

import colorsys
import math
import zlib

import numpy as np
from PIL import Image, ImageDraw

from vissl_like.data.source import SourceRequest, unicode_array

_SPLITS = {"TRAIN": 0, "VAL": 1, "TEST": 2}
_SHAPES = ("disk", "square", "triangle", "ring", "cross")


class SyntheticSource:
    """`count` square images of `side` pixels. Row r is of class r % classes, whatever the seed of the run.

    The class sets shape and colour; place, size and background noise differ from row to row and split to split.
    """

    root = ""

    def __init__(self, *, split: str, count: int, classes: int, side: int, name: str = "synthetic") -> None:
        self.name, self._split, self._count, self._classes, self._side = name, split, count, classes, side
        self.labels = np.arange(count, dtype=np.int64) % classes
        self.class_names: list[str] | None = [f"{_SHAPES[k % len(_SHAPES)]}_{k}" for k in range(classes)]

    @classmethod
    def build(cls, request: SourceRequest) -> SyntheticSource:
        options = request.options
        return cls(
            split=request.split,
            count=options.NUM_SYNTHETIC,
            classes=options.SYNTHETIC_CLASSES,
            side=options.SYNTHETIC_SIZE,
            name=request.name or "synthetic",
        )

    def __len__(self) -> int:
        return self._count

    @property
    def paths(self) -> np.ndarray:
        return unicode_array(self.path(row) for row in range(self._count))

    def path(self, row: int) -> str:
        return f"synthetic/{self._split.lower()}/{row}"

    def file(self, row: int) -> str | None:
        return None

    def stamps(self) -> np.ndarray:
        """Every image follows from these settings."""
        settings = f"{self._split} {self._classes} {self._side}".encode()
        return np.full(self._count, zlib.crc32(settings), dtype=np.int64)

    def load(self, row: int) -> Image.Image:
        # RandomState: its streams are frozen, so a row looks the same with every numpy.
        random = np.random.RandomState([_SPLITS[self._split], row, self._classes, self._side])
        side, kind = self._side, int(self.labels[row])
        noise = random.randint(0, 96, size=(side, side, 3)).astype(np.uint8)
        image = Image.fromarray(noise)
        hue = (kind / self._classes + random.uniform(-0.1, 0.1) / self._classes) % 1.0
        colour = tuple(
            round(255 * part) for part in colorsys.hsv_to_rgb(hue, random.uniform(0.6, 1), random.uniform(0.7, 1))
        )
        radius = side * random.uniform(0.2, 0.35)
        centre = tuple(random.uniform(radius, side - radius) for _ in range(2))
        _draw(ImageDraw.Draw(image), _SHAPES[kind % len(_SHAPES)], centre=centre, radius=radius, colour=colour)
        return image


def _draw(
    canvas: ImageDraw.ImageDraw, shape: str, *, centre: tuple[float, ...], radius: float, colour: tuple[int, ...]
) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    thin = radius * 0.3
    if shape == "disk":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    elif shape == "triangle":
        angles = [math.radians(degrees) for degrees in (-90, 30, 150)]
        canvas.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=colour)
    elif shape == "ring":
        canvas.ellipse(box, outline=colour, width=max(1, round(thin)))
    else:
        canvas.rectangle((x - thin, y - radius, x + thin, y + radius), fill=colour)
        canvas.rectangle((x - radius, y - thin, x + radius, y + thin), fill=colour)
