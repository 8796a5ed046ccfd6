"""Files that are whole or not there, whatever happens while they are written; and how to tell that they still are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vissl_like.errors import explained

if TYPE_CHECKING:
    import numpy as np

_CHUNK = 1 << 20


@contextlib.contextmanager
def refusals_explained(place: Path) -> Iterator[None]:
    """An OSError within becomes the DataError that names `place` (or the file that the error itself names) and the cure."""
    try:
        yield
    except OSError as error:
        known = explained(error, place=place)
        if known is None:
            raise
        raise known from error


def read_yaml(file: Path) -> Any:
    """What a YAML file says. libyaml, where PyYAML has it, reads the same five times as quickly.

    Raises OSError, UnicodeDecodeError and yaml.YAMLError.
    """
    import yaml

    return yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@contextlib.contextmanager
def replacing(file: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """A stream for the new content of `file`, which takes its place at once, and on the disk, when the block ends well.

    Otherwise the old content stays and nothing is left behind; only a killed process leaves `<name>.part`, which the next
    one writes over. `shared`: several processes may write this file at a time; the last one wins. Raises DataError for what
    the system refuses.
    """
    with refusals_explained(file), beside(file, shared=shared) as stream:
        yield stream


@contextlib.contextmanager
def beside(file: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """The same for those who have an answer of their own when the system refuses: raises OSError."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part" if shared else f"{file.name}.part")
    try:
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Write a text file (UTF-8), whole or not at all."""
    with replacing(file) as stream:
        stream.write(text.encode())


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all. Numbers of numpy and torch become plain ones, paths texts."""
    write_text(file, f"{json.dumps(content, indent=1, default=_plain)}\n")


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def write_array(file: Path, array: np.ndarray) -> None:
    """Write a .npy file, whole or not at all."""
    import numpy as np

    with replacing(file) as stream:
        np.save(stream, array, allow_pickle=False)


def read_json(file: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file; None if there is none or it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def record_of(file: Path) -> dict[str, Any]:
    """{"bytes": size, "blake2b": checksum} of a file as it lies on the disk."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "blake2b": digest.hexdigest()}


def damage(file: Path, record: dict[str, Any], *, with_content: bool = True) -> str:
    """What is wrong with a file of which this record was taken; empty if nothing is. Without its content: a quick look."""
    if not file.is_file():
        return "missing"
    size = file.stat().st_size
    if size != record.get("bytes"):
        return f"{size} bytes long, not {record.get('bytes')}"
    return (
        ""
        if not with_content or record_of(file) == record
        else "its content is not what was written (another checksum)"
    )
