"""Reading .npy files that come from elsewhere: never unpickled, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vissl_like.errors import DataError

_MAGIC = b"\x93NUMPY"


def load_npy(file: str | Path, *, key: str, mmap: bool = True) -> np.ndarray:
    """The array of a .npy file, mapped or read. `key` names the option the file came from."""
    try:
        with open(file, "rb") as stream:
            is_npy = stream.read(len(_MAGIC)) == _MAGIC
        if not is_npy:
            raise DataError(f"{key}={str(file)!r}: not a .npy file. Write it with numpy.save.")
        return np.load(file, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{key}={str(file)!r}: no such file.") from error
    except (ValueError, OSError, EOFError) as error:
        if "Python objects" in str(error) or "Object arrays" in str(error):
            raise DataError(
                f"{key}={str(file)!r}: holds Python objects, which could run code when read. Save it again as plain "
                "numbers or as numpy.array(paths, dtype=str)."
            ) from error
        raise DataError(
            f"{key}={str(file)!r}: not a readable .npy file ({error}). Write it again with numpy.save."
        ) from error
