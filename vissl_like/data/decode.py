"""From a file to an RGB image: the one place where image files are opened.

This is also the seam of the fast path: a fused decode, crop, resize and flip on uint8 replaces `read_image` and the
first transforms of a list, and must give the same pixels.
"""

from __future__ import annotations

import errno
import os
import warnings
from typing import IO

import numpy as np
from PIL import Image

from vissl_like.errors import DataError

#: What a folder is searched for. Upper case counts too.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")


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
    try:
        with warnings.catch_warnings():
            # Damaged metadata beside good pixels is no reason to print a warning per image from each worker.
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                image.load()
                return to_rgb(image)
    except MemoryError:
        raise
    except OSError as error:
        raise _reason_of(error, file) from error
    except Exception as error:
        # Pillow's plugins raise almost anything on damaged files: SyntaxError, ValueError, struct.error, zlib.error.
        raise Unreadable(f"{type(error).__name__}: {_one_line(error)}") from error


def _reason_of(error: OSError, file: str | IO[bytes]) -> Exception:
    """What an OSError says about the image; a DataError when it speaks of the machine instead."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return DataError(
            f"{file}: this process may open no more files ({error.strerror}). Raise the limit (ulimit -n 65536) "
            "or lower config.DATA.NUM_DATALOADER_WORKERS."
        )
    if isinstance(error, FileNotFoundError):
        return Unreadable("no such file")
    if isinstance(file, str) and os.path.isfile(file) and os.path.getsize(file) == 0:
        return Unreadable("empty file")
    if type(error).__name__ == "UnidentifiedImageError":
        return Unreadable("not an image, or of an unknown format")
    return Unreadable(_one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
