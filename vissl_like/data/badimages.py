"""Unreadable images: counted, listed in bad_images.txt, and an error once there are too many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vissl_like.errors import DataError
from vissl_like.files import replacing

FILE_NAME = "bad_images.txt"
_HEADER = "# split\tpath\treason"


def too_many(
    bad: Mapping[str, str], *, rows: int, max_fraction: float, split: str, list_file: Path | None
) -> DataError:
    """The error for more bad images than allowed. `bad`: path -> reason."""
    shown = "".join(f"\n  {path}: {reason}" for path, reason in list(bad.items())[:5])
    where = f" Those found so far are listed in {list_file}." if list_file else ""
    return DataError(
        f"config.DATA.{split}: at least {len(bad)} of {rows} images cannot be read, more than "
        f"config.DATA.MAX_BAD_FRACTION={max_fraction:g} allows.{where} Mend or remove them, or raise the limit.{shown}"
    )


def replaced(count: int, *, rows: int, split: str, list_file: Path | None) -> str:
    """What is said of the bad images where there are few."""
    where = f"; {list_file} lists them" if list_file else ""
    return f"config.DATA.{split}: {count} of {rows} images cannot be read, others stand in for them{where}"


def add_to_list(run_dir: Path, *, split: str, bad: Mapping[str, str]) -> Path | None:
    """Add one split's bad images to RUN.DIR/bad_images.txt, each image once; no file if there are none."""
    file = run_dir / FILE_NAME
    if not bad:
        return file if file.exists() else None
    old = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if file.exists() else []
    listed = dict(line.rsplit("\t", 1) for line in old if line and not line.startswith("#"))
    listed.update({f"{split}\t{path}": reason for path, reason in bad.items()})
    text = "\n".join([_HEADER, *(f"{image}\t{reason}" for image, reason in sorted(listed.items()))]) + "\n"
    with replacing(file, shared=True) as stream:
        stream.write(text.encode("utf-8", "surrogateescape"))
    return file
