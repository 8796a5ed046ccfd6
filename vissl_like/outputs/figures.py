"""Pictures of a run as PNG files: curves, cluster montage, cluster sizes, 2-D projection.

Charts are dark on white, so that they can go into a paper; report.html inverts the charts in dark mode.
Letters: R clusters shown, M images per cluster, H W pixels, N points, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b", "#db2777", "#4d7c0f")
TEXT = "#334155"
GRID = "#e2e8f0"
#: Legible on white and on black: the montage has a transparent ground.
MONTAGE_TEXT = "#7c8798"

#: From this many points on a noisy curve is drawn faint, with its running mean on top.
SMOOTH_FROM = 40
#: The names of more curves than this stand beside the chart.
MANY_CURVES = 4
#: A curve is thinned to about this many points before it is drawn.
MAX_POINTS = 2000

Curve = tuple[Sequence[float], Sequence[float]]


def curves(
    path: Path,
    lines: Mapping[str, Curve],
    *,
    xlabel: str,
    ylabel: str,
    smooth: bool = False,
    from_zero: bool = False,
) -> Path:
    """One chart of several named curves (x, y). `smooth`: long ones get a running mean; `from_zero`: y starts at 0."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _chart()
    for (name, (x, y)), colour in zip(lines.items(), _cycle(len(lines))):
        _draw(axes, np.asarray(x, float), np.asarray(y, float), name=name, colour=colour, smooth=smooth)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=all(max(x) - min(x) >= 1 for x, _ in lines.values())))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if len(lines) > MANY_CURVES:
        axes.legend(frameon=False, fontsize=8, labelcolor=TEXT, loc="center left", bbox_to_anchor=(1, 0.5))
    elif len(lines) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=TEXT)
    return _save(figure, path)


def sizes(path: Path, counts: Sequence[int] | np.ndarray) -> Path:
    """Cluster sizes from the largest to the smallest; the dashed line is their mean. counts (K,)."""
    from matplotlib.ticker import MaxNLocator

    ordered = np.sort(np.asarray(counts))[::-1]
    figure, axes = _chart()
    axes.fill_between(np.arange(len(ordered)), ordered, step="mid", color=COLOURS[0], alpha=0.85, linewidth=0)
    axes.axhline(ordered.mean(), color=TEXT, linewidth=1, linestyle="--")
    axes.annotate(
        f"mean {ordered.mean():.1f}",
        (len(ordered) - 1, ordered.mean()),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=TEXT,
    )
    axes.set_xlim(-0.5, len(ordered) - 0.5)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("clusters, largest first")
    axes.set_ylabel("images")
    return _save(figure, path)


def projection(path: Path, xy: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str] = ()) -> Path:
    """Points in two dimensions, coloured by label. xy (N, 2), labels (N,) integers or None."""
    figure, axes = _chart(height=4)
    size = float(np.clip(6000 / max(len(xy), 1), 2, 24))
    if labels is None:
        axes.scatter(xy[:, 0], xy[:, 1], s=size, color=COLOURS[0], alpha=0.6, linewidths=0)
    else:
        known = np.unique(labels)
        for value, colour in zip(known, _cycle(len(known))):
            rows = labels == value
            axes.scatter(
                xy[rows, 0], xy[rows, 1], s=size, color=colour, alpha=0.7, linewidths=0, label=_name(class_names, value)
            )
        if len(known) <= 20:
            axes.legend(
                frameon=False, fontsize=8, labelcolor=TEXT, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5)
            )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    return _save(figure, path)


def montage(path: Path, images: Sequence[Sequence[np.ndarray]], titles: Sequence[str], *, side: int = 64) -> Path:
    """One row of pictures per cluster, its title at the left. images: R rows of up to M uint8 arrays (H, W, 3)."""
    from PIL import Image, ImageDraw, ImageFont

    gap, margin = 4, 108
    columns = max((len(row) for row in images), default=0)
    sheet = Image.new("RGBA", (margin + columns * (side + gap), len(images) * (side + gap) + gap), (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for r, (row, title) in enumerate(zip(images, titles)):
        top = gap + r * (side + gap)
        pen.multiline_text((6, top + side // 2), title, fill=MONTAGE_TEXT, font=font, anchor="lm", spacing=2)
        for m, array in enumerate(row):
            sheet.paste(_tile(array, side), (margin + m * (side + gap), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    return path


def running_mean(y: np.ndarray, *, window: int) -> np.ndarray:
    """Mean over `window` neighbours, over fewer at the ends; values that are not finite do not count. (N,) -> (N,)."""
    finite = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(y))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(y))
    number = count[high] - count[low]
    return np.where(number > 0, (total[high] - total[low]) / np.maximum(number, 1), np.nan)


def _draw(axes: Axes, x: np.ndarray, y: np.ndarray, *, name: str, colour: Any, smooth: bool) -> None:
    every = max(1, len(x) // MAX_POINTS)
    is_noisy = smooth and len(x) >= SMOOTH_FROM
    if is_noisy:
        axes.plot(x[::every], y[::every], color=colour, linewidth=0.8, alpha=0.3)
        y = running_mean(y, window=max(5, len(y) // 25))
    marker = "o" if len(x) <= 25 else None
    axes.plot(x[::every], y[::every], color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=name)


def _tile(array: np.ndarray, side: int) -> Any:
    """`array` (H, W, 3) or (H, W) as a square picture; small ones are enlarged without blurring."""
    from PIL import Image

    image = Image.fromarray(np.asarray(array, np.uint8)).convert("RGB")
    scale = side / max(image.size)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _chart(*, height: float = 3.4) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, height), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#94a3b8")
    axes.tick_params(colors=TEXT, labelsize=8)
    axes.xaxis.label.set(color=TEXT, size=9)
    axes.yaxis.label.set(color=TEXT, size=9)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    return path


def _cycle(number: int) -> list[Any]:
    """`number` distinct colours: ours while they last, then evenly spaced hues."""
    if number <= len(COLOURS):
        return list(COLOURS[:number])
    from matplotlib import colormaps

    return list(colormaps["turbo"](np.linspace(0.05, 0.95, number)))


def _name(class_names: Sequence[str], value: Any) -> str:
    return class_names[int(value)] if 0 <= int(value) < len(class_names) else str(value)
