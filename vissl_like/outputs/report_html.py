"""Pieces of HTML that the blocks of report.html are made of: pictures, tables, numbers."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any


def picture(path: Path, caption: str) -> str:
    """A figure element with the PNG or JPEG inside the page."""
    style = "" if image_class(path) else ' class="natural"'
    return (
        f'<figure{style}><img class="{image_class(path)}" src="{data_uri(path)}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def data_uri(path: Path) -> str:
    """The content of a picture as the address of an image."""
    kind = "jpeg" if path.suffix == ".jpg" else "png"
    return f"data:image/{kind};base64," + base64.b64encode(path.read_bytes()).decode()


def image_class(path: Path) -> str:
    """Charts are inverted in dark mode; photographs are not."""
    return "" if "montage" in path.name or path.suffix == ".jpg" else "chart"


def bar_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose percentages carry a bar: columns of numbers that all lie within 0..100 and reach beyond 1."""
    is_share = []
    for c in range(len(columns)):
        numbers = [row[c] for row in rows if isinstance(row[c], int | float)]
        is_share.append(bool(numbers) and c > 0 and min(numbers) >= 0 and 1 < max(numbers) <= 100)
    head = "".join(f'<th class="{"n" if c else ""}">{escape(str(name))}</th>' for c, name in enumerate(columns))
    lines = []
    for row in rows:
        cells = [f"<td>{escape(str(row[0]))}</td>"]
        for c, cell in enumerate(row[1:], 1):
            has_bar = is_share[c] and isinstance(cell, int | float)
            bar = f' style="--share:{cell:.1f}%"' if has_bar else ""
            cells.append(f'<td class="n{" bar" if has_bar else ""}"{bar}>{one_decimal(cell)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table class="result"><tr>{head}</tr>{"".join(lines)}</table></div>'


def folded_table(columns: Sequence[str], rows: Sequence[str], *, open_rows: int, what: str = "{} more") -> str:
    """A table of ready cells; everything beyond `open_rows` rows stands in a fold, called `what`."""
    head = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in columns)}</tr>" if columns else ""

    def table(part: Sequence[str]) -> str:
        return f'<div class="scroll"><table>{head}{"".join(f"<tr>{row}</tr>" for row in part)}</table></div>'

    shown, hidden = rows[:open_rows], rows[open_rows:]
    if not hidden:
        return table(shown) if shown else ""
    fold = f"<details><summary>{what.format(len(hidden))}</summary>{table(hidden)}</details>"
    return (table(shown) if shown else "") + fold


def spaced(key: str) -> str:
    """The name of a metric in words."""
    return key.replace("_", " ")


def one_decimal(value: Any) -> str:
    """One number of a summary table: one decimal."""
    if value is None:
        return "–"
    return f"{value:.1f}" if isinstance(value, float) else escape(str(value))


def four_digits(value: float) -> str:
    """A number in about four digits."""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2f}" if 0.1 <= abs(value) < 10000 else f"{value:.4g}"


def as_text(value: Any) -> str:
    """Any leaf as text; long lists are shortened."""
    if isinstance(value, float):
        return escape(f"{value:.6g}")
    if isinstance(value, list) and len(value) > 12 and all(isinstance(item, int | float) for item in value):
        return escape(f"[{', '.join(f'{item:.4g}' for item in value[:6])}, … {len(value)} numbers]")
    return escape(str(value))
