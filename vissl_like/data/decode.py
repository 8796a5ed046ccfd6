"""From a file to an RGB image: the one place where image files are opened.

Two ways lead to the same pixels: `read_image` is Pillow alone, `Encoded` leaves JPEG to simplejpeg, which takes two
thirds of the time. What is an image and what is damaged is Pillow's decision in both.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import warnings
from collections.abc import Iterator
from typing import IO

import numpy as np
import simplejpeg
from PIL import Image

from vissl_like.errors import DataError

#: What a folder is searched for. Upper case counts too.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")


#: What the storage or the memory of the machine answers, whatever the image: no sign that one is bad.
_FAULTS = frozenset(
    getattr(errno, name)
    for name in ("EIO", "ENOMEM", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EREMOTEIO", "EHOSTDOWN", "EHOSTUNREACH")
    if hasattr(errno, name)
)


class Unreadable(Exception):
    """One image cannot be read; the message is the reason. Such images are listed and replaced, see badimages.py."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB. Alpha is dropped, as in Pillow; 16-bit and float images are scaled to 8 bits, not clipped."""
    if image.mode == "RGB":
        return image
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns about a palette with transparent entries unless it goes this way; the colours are the same.
        return image.convert("RGBA").convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """(H, W) uint16, int32 or float -> uint8. Integers are read as 16 bits; floats as 0..1, or as 0..255 if some
    exceed 1.
    """
    if values.dtype.kind == "f":
        finite = np.nan_to_num(values, nan=0.0, posinf=255.0, neginf=0.0)
        scaled = finite * (255.0 if finite.size and finite.max() <= 1.0 else 1.0)
    else:
        scaled = values / 257.0
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def read_image(file: str | IO[bytes]) -> Image.Image:
    """An image file as RGB, first frame. Raises Unreadable with the reason.

    The orientation tag of cameras (EXIF) is not applied: pixels are taken as stored, as Pillow and VISSL do, so that
    features and labels made elsewhere stay comparable.
    """
    with reasons(file), Image.open(file) as image:
        image.load()
        return to_rgb(image)


def read_bytes(file: str) -> bytes:
    """The content of an image file. Raises Unreadable with the reason, DataError where the machine is at fault."""
    try:
        with open(file, "rb", buffering=0) as stream:
            return stream.readall()
    except OSError as error:
        raise reason_of(error, file) from error


class Encoded:
    """An image file in memory with its header read: the size is known, pixels are decoded when they are asked for."""

    def __init__(self, data: bytes) -> None:
        """Raises Unreadable with the reason, here and when pixels are asked for."""
        self._data = data
        self._opened: Image.Image | None = None
        size = _plain_jpeg_size(data)
        self._is_jpeg = size is not None
        if size is None:
            opened = self._open()
            size = opened.size
            # Grey files are decoded to RGB. CMYK is left to Pillow, and so are pictures of several (MPO): rare, and
            # Pillow's idea of the first one counts.
            self._is_jpeg = opened.format == "JPEG" and opened.mode in ("RGB", "L")
        #: Width and height, as Pillow has it.
        self.size: tuple[int, int] = size

    def _open(self) -> Image.Image:
        if self._opened is None:
            with reasons(self._data):
                self._opened = Image.open(io.BytesIO(self._data))
        return self._opened

    def image(self) -> Image.Image:
        """RGB, first frame: what read_image() gives."""
        opened = self._open()
        with reasons(self._data):
            opened.load()
            return to_rgb(opened)

    def pixels(self, *, reduce: int = 1) -> np.ndarray:
        """uint8 (H, W, 3), equal to image(). `reduce` 2, 4, 8: a JPEG at this part of its size, rounded up; others whole.

        A reduced JPEG is the mean of blocks of pixels, nearly: fewer coefficients are transformed.
        """
        if self._is_jpeg:
            width, height = (-(-side // reduce) for side in self.size)
            wanted = {"min_height": height, "min_width": width, "min_factor": float(reduce)} if reduce > 1 else {}
            try:
                found = simplejpeg.decode_jpeg(self._data, "RGB", **wanted)
            except ValueError:
                pass  # damaged, or of a rare kind: Pillow knows what can be saved of it
            else:
                if found.shape[:2] == (height, width):
                    return found
        return np.array(self.image(), dtype=np.uint8)


#: Start of frame: baseline, extended, progressive.
_FRAMES = (0xC0, 0xC1, 0xC2)
_SCAN, _JFIF, _ADOBE = 0xDA, 0xE0, 0xEE
#: Beside these: Huffman and quantisation tables, restart interval, comment.
_PLAIN = (*_FRAMES, _SCAN, _JFIF, _ADOBE, 0xC4, 0xDB, 0xDD, 0xFE)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG with a header so plain that Pillow would not refuse it; None: ask Pillow.

    Pillow reads metadata too (EXIF, ICC, Photoshop) and refuses a file over some kinds of damage there, so a file with
    such parts is opened by Pillow first. That takes ten times as long as this does.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    position, size = 2, None
    while data[position : position + 1] == b"\xff" and position + 12 < len(data):
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker not in _PLAIN or (length < 16 and marker in (_JFIF, _ADOBE)):
            return None
        if marker == _SCAN:
            return size
        if marker in _FRAMES:
            if size is not None:
                return None
            size = _frame_size(data, position + 4, length)
        position += 2 + max(length, 2)
    return None


def _frame_size(data: bytes, start: int, length: int) -> tuple[int, int] | None:
    """Width and height from a frame header of 8 bits and 1 or 3 components."""
    height, width = (int.from_bytes(data[start + offset : start + offset + 2], "big") for offset in (1, 3))
    components = data[start + 5]
    limit = Image.MAX_IMAGE_PIXELS or height * width
    is_plain = data[start] == 8 and components in (1, 3) and length == 8 + 3 * components
    return (width, height) if is_plain and 0 < height * width <= limit else None


@contextlib.contextmanager
def reasons(file: str | bytes | IO[bytes]) -> Iterator[None]:
    """Whatever a library raises within becomes Unreadable, or a DataError where the machine is at fault."""
    try:
        with warnings.catch_warnings():
            # Damaged metadata beside good pixels is no reason to print a warning per image from each worker.
            warnings.simplefilter("ignore")
            yield
    except MemoryError:
        raise
    except OSError as error:
        raise reason_of(error, file) from error
    except Exception as error:
        # Pillow's plugins (and pydicom) raise almost anything on damaged files: SyntaxError, ValueError, struct.error.
        raise Unreadable(f"{type(error).__name__}: {_one_line(error)}") from error


def reason_of(error: OSError, file: str | bytes | IO[bytes]) -> Exception:
    """What an OSError says about the image; a DataError when it speaks of the machine instead."""
    where = error.filename or (file if isinstance(file, str) else "an image")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return DataError(
            f"{where}: this process may open no more files ({error.strerror}). Raise the limit (ulimit -n 65536) "
            "or lower config.DATA.NUM_DATALOADER_WORKERS."
        )
    if error.errno in _FAULTS:
        return DataError(
            f"{where}: cannot be read ({error.strerror}). Mend the storage, or take this file out if it alone is lost; then "
            "start the same command again."
        )
    if isinstance(error, FileNotFoundError):
        return Unreadable("no such file")
    if file == b"" or (isinstance(file, str) and os.path.isfile(file) and os.path.getsize(file) == 0):
        return Unreadable("empty file")
    if type(error).__name__ == "UnidentifiedImageError":
        return Unreadable("not an image, or of an unknown format")
    return Unreadable(_one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
