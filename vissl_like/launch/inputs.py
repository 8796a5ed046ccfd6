"""What a job reads: that all of it is there, and fingerprints that tell whether it has changed since. Free of torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from vissl_like.config.check import compose_stage
from vissl_like.config.rules import check_files
from vissl_like.config.schema import Job
from vissl_like.config.stages import stage_jobs

MANIFEST_FILE = "manifest.json"

#: Files up to this size are hashed whole, larger ones by size and both ends.
_WHOLE_BYTES = 64 * 2**20
_END_BYTES = 2**20


def check_inputs(job: Job) -> list[str]:
    """Every file and folder that the job reads, for a pipeline those of all its stages. Raises if one is lost.

    What earlier stages make below the pipeline's folder need not be there.
    """
    if job.engine_name != "pipeline":
        return check_files(job)
    run_dir = job.config.RUN.DIR or "run"
    return check_files(*(stage.job for stage in stage_jobs(job, Path(run_dir), compose_stage)), made_in=run_dir)


def input_fingerprints(job: Job) -> dict[str, str]:
    """Path -> fingerprint of everything the job reads. A file's changes with its bytes, a folder's with its entries."""
    own = str(Path(job.config.RUN.DIR or ".").absolute())
    return {
        path: fingerprint(Path(path).expanduser())
        for path in check_inputs(job)
        if not str(Path(path).expanduser().absolute()).startswith(own + os.sep)
    }


def fingerprint(path: Path) -> str:
    """16 hex digits. A run or feature folder counts as its manifest, another folder as the names in and below it."""
    digest = hashlib.sha256()
    if path.is_dir():
        manifest = path / MANIFEST_FILE
        for piece in [manifest.read_bytes()] if manifest.is_file() else _entries(path):
            digest.update(piece)
        return digest.hexdigest()[:16]
    size = path.stat().st_size
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        if size <= _WHOLE_BYTES:
            while block := file.read(_END_BYTES):
                digest.update(block)
        else:
            digest.update(file.read(_END_BYTES))
            file.seek(-_END_BYTES, os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _entries(folder: Path) -> Iterator[bytes]:
    """Names at the top, and how many entries each sub-folder has: quick for a million images."""
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        count = len(os.listdir(entry.path)) if entry.is_dir() else 0
        yield f"{entry.name}\0{count}\n".encode("utf-8", "surrogateescape")
