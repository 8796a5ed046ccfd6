"""What a job reads: that all of it is there, and fingerprints that tell whether it has changed since."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from vissl_like.config.check import compose_stage, report
from vissl_like.config.rules import check_files, used_splits
from vissl_like.config.schema import Job
from vissl_like.config.stages import stage_jobs
from vissl_like.data.mask_rules import MODELS_WITH_MASKS
from vissl_like.errors import ConfigError
from vissl_like.files import read_json
from vissl_like.launch import outputs

MANIFEST_FILE = "manifest.json"
#: Engines that put images through a model.
MODEL_ENGINES = (
    "train",
    "extract_features",
    "extract_label_predictions",
    "evaluate",
    "cluster_features",
    "evaluate_parts",
)

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


def check_transforms(job: Job) -> None:
    """Names and arguments of all TRANSFORMS that the job uses, for a pipeline those of all its stages; raises ConfigError.

    Once, and before any process starts. It makes the transforms, so it imports torch and what they come from.
    """
    jobs = [job]
    if job.engine_name == "pipeline":
        jobs = [stage.job for stage in stage_jobs(job, Path(job.config.RUN.DIR or "run"), compose_stage)]
    problems: dict[str, None] = {}
    for config, split in ((one.config, split) for one in jobs for split in splits_to_open(one)):
        transforms = getattr(config.DATA, split).TRANSFORMS
        if transforms:
            from vissl_like.data.views import check_transforms as problems_of

            key, kind = f"config.DATA.{split}.TRANSFORMS", config.MODEL.INPUT_TYPE
            with_masks = config.MODEL.NAME in MODELS_WITH_MASKS
            problems.update(dict.fromkeys(problems_of(transforms, key, input_type=kind, with_masks=with_masks)))
    if problems:
        raise ConfigError(report(list(problems)))


def splits_to_open(job: Job) -> list[str]:
    """Splits whose images the job reads: none where it starts from features."""
    config = job.config
    reads_features = (job.engine_name == "evaluate" and config.EVALUATE.FEATURES_PATH) or (
        job.engine_name == "cluster_features" and not config.CLUSTERFIT.FEATURES.EXTRACT
    )
    return [] if reads_features or job.engine_name not in MODEL_ENGINES else used_splits(job)


def input_fingerprints(job: Job) -> dict[str, str]:
    """Path -> fingerprint of everything the job reads. A file's changes with its bytes, a folder's with its entries."""
    own = str(Path(job.config.RUN.DIR or ".").absolute())
    return {
        path: fingerprint(Path(path).expanduser())
        for path in check_inputs(job)
        if not str(Path(path).expanduser().absolute()).startswith(own + os.sep)
    }


def fingerprint(path: Path) -> str:
    """16 hex digits. A run folder counts as what came out of it, another folder as the names and sizes of its files.

    Not as their times: a copy of a data set is the same data set. So an image that is replaced by one of exactly the same
    size goes unnoticed.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        manifest = path / MANIFEST_FILE
        for piece in [_of_manifest(manifest)] if manifest.is_file() else _entries(path):
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


def _of_manifest(file: Path) -> bytes:
    """A finished run that is made again and comes out the same is the same; any other manifest counts as it stands."""
    content = file.read_bytes()
    found = read_json(file) or {}
    return outputs.identity(found).encode() if found.get("content") else content


def _entries(folder: Path, below: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[bytes]:
    """Name and size of every file in and below a folder, in a fixed order; names that start with a dot do not count.

    `above`: folders on the way, so that circles of links end. One look at each file: some seconds for a million of them.
    """
    state = os.stat(folder)
    here = (state.st_dev, state.st_ino)
    if here in above:
        return
    with os.scandir(folder) as scan:
        entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        name = f"{below}{entry.name}"
        if entry.is_dir():
            yield from _entries(Path(entry.path), f"{name}/", above | {here})
            continue
        try:
            size = entry.stat().st_size
        except OSError:  # a link to nothing
            size = -1
        yield f"{name}\0{size}\n".encode("utf-8", "surrogateescape")
