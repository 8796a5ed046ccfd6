"""Part maps drawn over their images: RUN.DIR/part_maps/<epoch>_<batch>.jpg, with a JSON file of the same name beside it.

A part has the same colour in every picture of every run; the background is left clear. Parts are counted from 0, as in
REMOVE_PARTS. Letters: B images, H W pixels, K parts, h w cells of the maps; the background is the last of K+1 maps.
"""

from __future__ import annotations

import colorsys
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from vissl_like.config.schema import Config
from vissl_like.config.schema_parts import PartMaps
from vissl_like.core import rng
from vissl_like.errors import DataError
from vissl_like.files import beside
from vissl_like.outputs.run_folder import PART_MAPS_FOLDER

#: The colours of parts 0, 1, ...: far from each other, and neighbours in the list are not of one hue.
COLOURS = (
    "#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#fabed4",
    "#469990", "#dcbeff", "#9a6324", "#fffac8", "#800000", "#aaffc3", "#808000", "#ffd8b1", "#000075", "#a9a9a9",
)  # fmt: skip
ALPHA = 0.5
#: Longer side of an image in a picture: with its overlay only, and with a heat map for each part.
SIDE, HEAT_SIDE = 192, 128
#: A part gets its number written on it where it covers at least this share of an image.
NUMBERED_FROM = 0.012
_COLUMNS = 4
_GAP, _SPACE, _CAPTION = 3, 14, 18
_PAPER, _INK, _FAINT = "#ffffff", "#334155", "#7c8798"
_BACKGROUND = (235, 235, 235)
#: Which batches are drawn must not follow from numbers that are drawn for anything else.
_PURPOSE = 0x9A27


def is_drawn(options: PartMaps, *, seed: int, epoch: int, num_epochs: int, batch: int) -> bool:
    """Whether the maps of a test batch are drawn; follows from these numbers alone.

    `epoch`: how many epochs the model has been trained for, 0 outside of a training; `batch`: the number of the batch in
    the whole split, which does not depend on the number of processes.
    """
    if options.SAVING_PROB == 0 or not (epoch in (0, 1, num_epochs) or epoch % options.EVERY_EPOCHS == 0):
        return False
    return batch == 0 or rng.mix(_PURPOSE, seed, epoch, batch) < options.SAVING_PROB * 2**63


@dataclass(frozen=True)
class Pixels:
    """The way back from what a model sees to pixels, for one list of TRANSFORMS."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 255.0
    is_lab: bool = False

    @classmethod
    def of(cls, transforms: Sequence[Mapping[str, Any]]) -> Pixels:
        """From TRANSFORMS of the split: its own Normalize and scale."""
        by_name = {entry.get("name"): entry for entry in transforms}
        given = by_name.get("Normalize", {})
        return cls(
            mean=tuple(given.get("mean", (0.0,))),
            std=tuple(given.get("std", (1.0,))),
            scale=1.0 if "ImgPilToRawTensor" in by_name else 255.0,
            is_lab="ImgPil2LabTensor" in by_name,
        )

    def __call__(self, images: Tensor) -> np.ndarray:
        """(B, C, H, W), normalised, or uint8 as the loader gives them -> uint8 (B, H, W, 3). Of Lab images, L."""
        pixels = images.detach().cpu()
        if pixels.dtype != torch.uint8:
            mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (self.mean, self.std))
            pixels = (pixels.float() * std + mean).nan_to_num(0.0)
            pixels = pixels[:, :1] * 2.55 if self.is_lab else pixels * self.scale
            pixels = pixels.round().clamp(0, 255).to(torch.uint8)
        return np.ascontiguousarray(pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())


@dataclass(frozen=True)
class Drawing:
    """How the part maps of a run's test batches get into its folder: which of them, and from what pixels.

    `num_epochs` of the training; `batch_rows`: images of a test batch. Every process draws the batches that it has.
    """

    run_dir: Path
    options: PartMaps
    seed: int
    num_epochs: int
    batch_rows: int
    pixels: Pixels

    @classmethod
    def of(cls, config: Config, run_dir: Path) -> Drawing:
        """As the configuration says."""
        test = config.DATA.TEST
        return cls(
            run_dir=run_dir,
            options=config.PART_MAPS,
            seed=config.SEED_VALUE,
            num_epochs=config.OPTIMIZER.NUM_EPOCHS,
            batch_rows=test.BATCHSIZE_PER_REPLICA,
            pixels=Pixels.of(test.TRANSFORMS),
        )

    def draw(self, images: Tensor, maps: Tensor, *, rows: Sequence[int], epoch: int) -> Path | None:
        """Draw a batch if it is one of those that are; returns the picture's file. Raises DataError.

        images (B, C, H, W) as the model sees them or as the loader gives them, maps (B, K+1, h, w), rows (B,) of the split.
        `epoch` as in is_drawn().
        """
        batch = rows[0] // self.batch_rows
        if not is_drawn(self.options, seed=self.seed, epoch=epoch, num_epochs=self.num_epochs, batch=batch):
            return None
        shown = self.pixels(images[: self.options.MAX_IMAGES])
        return save_part_maps(self.run_dir, shown, maps, rows=rows, epoch=epoch, batch=batch, options=self.options)


def save_part_maps(
    run_dir: Path,
    images: np.ndarray,
    maps: Tensor,
    *,
    rows: Sequence[int],
    epoch: int,
    batch: int,
    options: PartMaps,
) -> Path:
    """Draw the first MAX_IMAGES of a batch; returns the picture's file. Raises DataError if it cannot be written.

    images uint8 (B, H, W, 3), see Pixels; maps (B, K+1, h, w); rows (B,) of the split. `epoch` and `batch` as in
    is_drawn(): each batch is drawn by the one process that has it, so no two write the same file.
    """
    count = min(options.MAX_IMAGES, len(images))
    maps = finite(maps[:count].detach().float().cpu())
    sheet = draw_part_maps(images[:count], maps, rows=rows[:count], heat_maps=options.HEAT_MAPS)
    about = {
        "epoch": epoch,
        "batch": batch,
        "rows": [int(row) for row in rows[:count]],
        "num_parts": maps.shape[1] - 1,
        "area": [round(share, 4) for share in _areas(maps.argmax(dim=1), maps.shape[1]).tolist()],
    }
    file = run_dir / PART_MAPS_FOLDER / f"{epoch:04d}_{batch:05d}.jpg"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with beside(file) as stream:
            sheet.save(stream, format="JPEG", quality=90, subsampling=0)
        with beside(file.with_suffix(".json")) as stream:
            stream.write(json.dumps(about).encode())
    except OSError as error:
        raise DataError(f"{file}: the part maps cannot be written ({error.strerror}).") from error
    return file


def _areas(labels: Tensor, number: int) -> Tensor:
    """Share of all cells that belongs to each part, and to the background, (K+1,)."""
    return torch.bincount(labels.flatten(), minlength=number) / labels.numel()


def finite(maps: Tensor) -> Tensor:
    """Maps (B, K+1, h, w) without inf and NaN, which resizing would spread.

    A cell of +inf belongs to that part alone, -inf is 0, and a cell with a NaN is background.
    """
    maps = torch.where(maps == -torch.inf, 0, maps)
    is_sure = maps == torch.inf
    is_lost = maps.isnan().any(dim=1, keepdim=True)
    is_sure = is_sure & ~is_lost
    is_sure[:, -1:] |= is_lost
    return torch.where(is_sure.any(dim=1, keepdim=True), is_sure.to(maps.dtype), maps)


def part_colour(part: int) -> tuple[int, int, int]:
    """RGB of a part, the same everywhere."""
    if part < len(COLOURS):
        value = int(COLOURS[part][1:], 16)
        return value >> 16, value >> 8 & 255, value & 255
    hue, step = part * 0.618034 % 1, part % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, (1.0, 0.55, 0.8)[step], (0.85, 1.0, 0.6)[step])
    return round(255 * red), round(255 * green), round(255 * blue)


# ------------------------------------------------------------------------------------------------------------- drawing
def draw_part_maps(images: np.ndarray, maps: Tensor, *, rows: Sequence[int], heat_maps: bool = False) -> Image.Image:
    """The sheet: each image beside its overlay and, `heat_maps`, beside a map for each part; the legend below.

    images uint8 (B, H, W, 3), maps (B, K+1, h, w) finite, in [0, 1].
    """
    size = _tile_size(images.shape[1:3], HEAT_SIDE if heat_maps else SIDE)
    large = F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False, antialias=True).numpy()
    num_parts = maps.shape[1] - 1
    strips = [_strip(image, part_maps, heat_maps=heat_maps) for image, part_maps in zip(images, large)]
    columns = 1 if heat_maps else min(_COLUMNS, len(strips))
    top = _CAPTION + 4 if heat_maps else 0
    height, width = strips[0].height + _CAPTION, strips[0].width + _SPACE
    num_lines = -(-len(strips) // columns)
    legend = _legend(num_parts, columns * width)
    sheet = Image.new(
        "RGB", (columns * width + _SPACE, top + num_lines * (height + 6) + legend.height + _SPACE * 2), _PAPER
    )
    pen = ImageDraw.Draw(sheet)
    if heat_maps:
        _titles(pen, ["image", "parts", *map(str, range(num_parts)), "background"], step=size[1] + _GAP, tile=size[1])
    for number, (strip, row) in enumerate(zip(strips, rows)):
        left, line = _SPACE + number % columns * width, number // columns
        y = _SPACE + top + line * (height + 6)
        sheet.paste(strip, (left, y))
        pen.text((left, y + strip.height + 2), f"row {int(row)}", fill=_FAINT, font=_font(11))
    sheet.paste(legend, (_SPACE, sheet.height - legend.height - _SPACE // 2))
    return sheet


def _tile_size(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """Height and width of an image in the sheet: its own aspect ratio, the longer side is `side`."""
    scale = side / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _strip(image: np.ndarray, maps: np.ndarray, *, heat_maps: bool) -> Image.Image:
    """One image, its overlay, and its maps side by side. image (H, W, 3), maps (K+1, height, width) of a tile."""
    height, width = maps.shape[1:]
    # Few pixels are enlarged without blurring: what the model sees is what is drawn.
    how = Image.Resampling.NEAREST if image.shape[0] < height else Image.Resampling.LANCZOS
    picture = np.asarray(Image.fromarray(image).resize((width, height), how))
    tiles = [picture, overlay(picture, maps)]
    if heat_maps:
        tiles += [_heat(picture, one, part=part, is_background=part == len(maps) - 1) for part, one in enumerate(maps)]
    strip = Image.new("RGB", (len(tiles) * (width + _GAP) - _GAP, height), _PAPER)
    for number, tile in enumerate(tiles):
        strip.paste(Image.fromarray(tile), (number * (width + _GAP), 0))
    _number_parts(strip, maps, left=width + _GAP)
    return strip


def overlay(picture: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3), grey under the colour of the strongest part of each pixel; where that is the background, as it was.

    maps (K+1, H, W). Grey, since a yellow part on a blue wing would look like neither.
    """
    labels = maps.argmax(axis=0)
    palette = np.array([part_colour(part) for part in range(len(maps) - 1)] + [(0, 0, 0)], dtype=np.float32)
    tinted = picture.mean(axis=2, keepdims=True) * (1 - ALPHA) + palette[labels] * ALPHA
    is_part = (labels < len(maps) - 1)[..., None]
    return np.where(is_part, np.rint(tinted), picture).astype(np.uint8)


def _heat(picture: np.ndarray, one: np.ndarray, *, part: int, is_background: bool) -> np.ndarray:
    """One map (H, W) in [0, 1] as the share of the part's colour over the darkened grey image."""
    grey = picture.mean(axis=2, keepdims=True) * 0.35
    share = one.clip(0, 1)[..., None]
    colour = np.array(_BACKGROUND if is_background else part_colour(part), dtype=np.float32)
    return np.rint(grey * (1 - share) + colour * share).astype(np.uint8)


def _number_parts(strip: Image.Image, maps: np.ndarray, *, left: int) -> None:
    """Write the number of each larger part onto it."""
    labels, pen = maps.argmax(axis=0), ImageDraw.Draw(strip)
    for part in range(len(maps) - 1):
        if np.count_nonzero(labels == part) >= max(1, NUMBERED_FROM * labels.size):
            x, y = _middle(labels == part)
            place = (left + x, y)
            pen.text(
                place, str(part), font=_font(12), anchor="mm", fill="#ffffff", stroke_width=1, stroke_fill="#000000"
            )


def _middle(is_part: np.ndarray) -> tuple[int, int]:
    """x, y of the pixel of a part (H, W) that has most of the part around it; the middle one of several."""
    margin = max(is_part.shape) // 8 + 1  # nothing is around the image
    padded = Image.fromarray(np.pad(is_part.astype(np.uint8) * 255, margin))
    around = np.asarray(padded.filter(ImageFilter.GaussianBlur(margin / 2)))[margin:-margin, margin:-margin] * is_part
    ys, xs = np.nonzero(around >= 0.98 * around.max())
    best = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
    return int(xs[best]), int(ys[best])


def _titles(pen: ImageDraw.ImageDraw, titles: Sequence[str], *, step: int, tile: int) -> None:
    for number, title in enumerate(titles):
        pen.text((_SPACE + number * step + tile // 2, _SPACE), title, fill=_INK, font=_font(12), anchor="mt")


def _legend(num_parts: int, width: int) -> Image.Image:
    """A square of its colour for each part, with its number; as many lines as are needed."""
    entry, line = 46, 24
    first = 44  # the word before them
    per_line = max(1, (width - first) // entry)
    sheet = Image.new("RGB", (width, line * -(-num_parts // per_line)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((0, line // 2), "part", fill=_INK, font=_font(13), anchor="lm")
    for part in range(num_parts):
        x, y = first + part % per_line * entry, part // per_line * line + line // 2
        pen.rounded_rectangle((x, y - 7, x + 14, y + 7), radius=3, fill=part_colour(part), outline="#94a3b8")
        pen.text((x + 20, y), str(part), fill=_INK, font=_font(13), anchor="lm")
    return sheet


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)
