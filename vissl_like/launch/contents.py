"""What the images and features of a job hold, seen before any process starts: folders are listed, headers read.

Files that are missing altogether have been named before (inputs.py).
"""

from __future__ import annotations

import os
from pathlib import Path

from vissl_like.config.check import compose_stage
from vissl_like.config.rules import used_splits
from vissl_like.config.schema import Job
from vissl_like.config.schema_data import Split
from vissl_like.config.stages import stage_jobs
from vissl_like.errors import DataError, UserError


def check_contents(job: Job, run_dir: Path) -> None:
    """Raise for folders without images, features that cannot be used, and fewer images than clusters.

    Of a pipeline in every stage, except for what earlier stages make; the message then names the stage.
    """
    if job.engine_name != "pipeline":
        _check(job, run_dir)
        return
    for stage in stage_jobs(job, run_dir, compose_stage):
        try:
            _check(stage.job, stage.run_dir, made_in=run_dir)
        except UserError as error:
            raise type(error)(f"stage {stage.name!r}: {error}") from error


def is_below(path: str | Path, folder: Path | None) -> bool:
    """Whether a path lies in a folder. An empty path, and no folder: no."""
    return (
        folder is not None
        and bool(path)
        and os.path.abspath(path).startswith(os.path.join(os.path.abspath(folder), ""))
    )


def _check(job: Job, run_dir: Path, *, made_in: Path | None = None) -> None:
    """Check one job; what lies below `made_in` is made, or made again, by an earlier stage."""
    config = job.config
    _look_at_places(job, made_in=made_in)
    if job.engine_name == "cluster_features" and config.CLUSTERFIT.FEATURES.EXTRACT:
        _count_images(job, run_dir, made_in=made_in)
    elif job.engine_name == "cluster_features":
        from vissl_like.engines.cluster_features import check_features, features_to_read

        if not is_below(features_to_read(config, run_dir), made_in):
            check_features(config, run_dir)
    elif job.engine_name == "evaluate" and config.EVALUATE.FEATURES_PATH:
        from vissl_like.engines.evaluate import check_features as check_to_evaluate

        folder = Path(config.EVALUATE.FEATURES_PATH).expanduser()
        if not is_below(folder, made_in):
            check_to_evaluate(config, folder)


def _look_at_places(job: Job, *, made_in: Path | None) -> None:
    """Folders of images hold some, and lists name some."""
    from vissl_like.data.folder import FilelistSource, refuse_empty

    problems: list[str] = []
    for split in used_splits(job):
        options: Split = getattr(job.config.DATA, split)
        for number, (kind, path) in enumerate(zip(options.DATA_SOURCES, options.DATA_PATHS)):
            key = f"config.DATA.{split}.DATA_PATHS.{number}"
            if is_below(path, made_in):
                continue
            try:
                if kind == "disk_folder" and path:
                    refuse_empty(path, key=key)
                elif kind == "disk_filelist" and path:
                    FilelistSource(path, key=key)
            except DataError as error:
                problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def _count_images(job: Job, run_dir: Path, *, made_in: Path | None) -> None:
    """As many images as clusters, where they can be counted without earlier stages and without fetching anything."""
    from vissl_like.data.dataset import build_dataset
    from vissl_like.data.shard_names import is_url
    from vissl_like.engines.cluster_features import check_rows, features_to_read

    features_to_read(job.config, run_dir)  # raises where the options contradict each other
    config, split = job.config, job.config.CLUSTERFIT.FEATURES.DATA_PARTITION
    options: Split = getattr(config.DATA, split)
    files = [*options.DATA_PATHS, *(file for file in options.LABEL_PATHS if isinstance(file, str))]
    if any(is_url(file) or is_below(file, made_in) for file in files):
        return
    check_rows(config, build_dataset(config.DATA, split, seed=config.SEED_VALUE, input_type=config.MODEL.INPUT_TYPE))
