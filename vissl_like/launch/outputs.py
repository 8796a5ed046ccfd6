"""What a run has made and later stages read: recorded when it is finished, looked for before it counts as finished."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vissl_like.config.schema import Job

#: Copies for the user that nothing reads, one file per image.
_COPIES = "features_to_image"
#: Files of a checkpoint that nothing reads once the training is finished; they may be removed to save space.
_FOR_RESUMING = "training."


def record(job: Job, run_dir: Path) -> dict[str, int]:
    """Path (below the run folder a relative one) -> bytes of every file that the run has made for later stages."""
    wanted = [file for file in _files(job, run_dir) if not file.name.startswith(_FOR_RESUMING)]
    return {_name(file, run_dir): file.stat().st_size for file in wanted}


def lost(recorded: dict[str, int], run_dir: Path) -> list[str]:
    """What of a record is not there any more, or has another size, in words."""
    found = []
    for name, size in recorded.items():
        file = run_dir / name
        if not file.is_file():
            found.append(f"{file} is missing")
        elif file.stat().st_size != size:
            found.append(f"{file} has {file.stat().st_size} bytes, not {size}")
    return found


def content(job: Job, run_dir: Path) -> str:
    """16 hex digits that are equal where runs have made the same; empty where they say nothing about what they made.

    The manifests of features, labels and checkpoints hold checksums of everything beside them.
    """
    manifests = [file for file in _files(job, run_dir) if file.name.endswith("manifest.json")]
    if not manifests:
        return ""
    digest = hashlib.sha256()
    for file in manifests:
        digest.update(f"{_name(file, run_dir)}\0".encode("utf-8", "surrogateescape") + file.read_bytes())
    return digest.hexdigest()[:16]


def identity(manifest: dict[str, Any]) -> str:
    """What a finished run is known by: its configuration, and what it made (else when)."""
    return f"{manifest.get('config_hash')}@{manifest.get('content') or manifest.get('finished')}"


def _files(job: Job, run_dir: Path) -> Iterator[Path]:
    for folder in _folders(job, run_dir):
        for file in sorted(folder.rglob("*")) if folder.is_dir() else []:
            if file.is_file() and _COPIES not in file.relative_to(folder).parts and file.suffix != ".part":
                yield file


def _folders(job: Job, run_dir: Path) -> Iterator[Path]:
    config = job.config
    if job.engine_name in ("extract_features", "cluster_features", "evaluate"):
        given = config.EXTRACT_FEATURES.OUTPUT_DIR if job.engine_name != "evaluate" else ""
        is_made = job.engine_name != "cluster_features" or config.CLUSTERFIT.FEATURES.EXTRACT
        yield from [Path(given).expanduser() if given else run_dir / "features"] if is_made else []
    if job.engine_name == "cluster_features":
        yield Path(config.CLUSTERFIT.OUTPUT_DIR).expanduser() if config.CLUSTERFIT.OUTPUT_DIR else run_dir / "clusters"
    if job.engine_name == "extract_label_predictions":
        yield run_dir / "predictions"
    if job.engine_name == "train":
        yield (run_dir / "checkpoints" / "last").resolve()


def _name(file: Path, run_dir: Path) -> str:
    for base in (run_dir, run_dir.resolve()):
        if file.is_relative_to(base):
            return file.relative_to(base).as_posix()
    return str(file.absolute())
