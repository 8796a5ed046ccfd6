"""What the system refuses, in words of the user; and files that are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vissl_like.errors import ConfigError, DataError, explained, show_error
from vissl_like.files import damage, read_json, record_of, refusals_explained, replacing, write_array, write_json


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "your quota on this disk is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "no permission"),
        (errno.EPERM, "not permitted"),
        (errno.EMFILE, "may open no more files"),
        (errno.ENFILE, "may open no more files"),
        (errno.EIO, "the disk reports an error"),
        (errno.ESTALE, "the file system has lost this file"),
    ],
)
def test_refusals_name_the_file_and_the_cure(
    number: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (OSError(number, os.strerror(number), str(tmp_path / "x.npy")), OSError(number, os.strerror(number))):
        found = explained(error, place=tmp_path / "x.npy")
        assert isinstance(found, DataError)
        assert str(found).startswith(f"{tmp_path / 'x.npy'}: ") and words in str(found)
        assert "start the same command again" in str(found)
        assert show_error(error) == 3
    assert "Traceback" not in capsys.readouterr().err
    quoted = RuntimeError(f"unable to write to file </torch_7>: {os.strerror(number)} ({number})")
    assert words in str(explained(quoted, place=tmp_path))


def test_what_numpy_says_about_a_full_disk() -> None:
    assert "the disk is full" in str(explained(OSError("1000 requested and 20 written"), place="labels.npy"))


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."), "the GPU"),
        (MemoryError(), "this machine"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "this machine"),
    ],
)
def test_out_of_memory(error: Exception, where: str) -> None:
    found = explained(error)
    assert isinstance(found, ConfigError) and f"out of memory on {where}" in str(found)
    assert "BATCHSIZE_PER_REPLICA" in str(found) and "ACCUMULATE_STEPS" in str(found)


def test_memory_of_the_cpu() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert "out of memory on this machine" in str(explained(caught.value))


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("x"), ValueError("No space left"), ConnectionResetError(errno.ECONNRESET, "reset")]
)
def test_defects_stay_defects(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert explained(error, place="x") is None
    assert show_error(error) == 1 and "defect" in capsys.readouterr().err


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(ZeroDivisionError), replacing(file) as stream:
        stream.write(b"half")
        raise ZeroDivisionError
    assert read_json(file) == {"a": 1} and list(tmp_path.iterdir()) == [file]
    with pytest.raises(DataError, match=r"absent/a\.npy.*No such file or directory"):
        write_array(tmp_path / "absent" / "a.npy", np.zeros(3))
    with (
        pytest.raises(DataError, match="a file that is named here"),
        refusals_explained(Path("a file that is named here")),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_damage_is_what_differs_from_the_record(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"0123456789")
    record = record_of(file)
    assert damage(file, record) == ""
    file.write_bytes(b"0123456780")
    assert "another checksum" in damage(file, record)
    file.write_bytes(b"012345678")
    assert damage(file, record) == "9 bytes long, not 10"
    file.unlink()
    assert damage(file, record) == "missing"
