"""The stages of a pipeline in a dry run: each one's data and model, as far as they can be known before earlier stages ran."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vissl_like.config.check import compose_stage
from vissl_like.config.schema import Job
from vissl_like.config.schema_data import Split
from vissl_like.config.stages import StageJob, stage_jobs
from vissl_like.errors import UserError
from vissl_like.launch import slurm, stage_folder
from vissl_like.launch.contents import is_below
from vissl_like.launch.dry_run_parts import describe_split, model_parts, open_split, refuse_few_images
from vissl_like.launch.inputs import MODEL_ENGINES, splits_to_open
from vissl_like.launch.local import plan_for

if TYPE_CHECKING:
    from vissl_like.data.images import ImageDataset

#: Opened data sets by their configuration: many stages read the same images.
_Opened = dict[str, "ImageDataset"]


def stage_lines(job: Job, run_dir: Path) -> Iterator[str]:
    """A heading for every stage, its data and its model. Raises what would stop a stage, with the name of the stage."""
    stages = stage_jobs(job, run_dir, compose_stage)
    opened: _Opened = {}
    again: list[str] = []
    for stage in stages:
        done = stage_folder.expected(stage, run_dir, overwrite=job.config.RUN.OVERWRITE, again=again)
        if done.startswith("starts again"):
            again.append(stage.name)
        after = f", after {', '.join(stage.needs)}" if stage.needs else ""
        yield f"{stage.name}: {stage.job.engine_name} of {stage.recipe or 'this page'}{after} ({done})"
        try:
            yield from (f"  {line}" for line in _details(stage, stages, run_dir, opened, again))
        except UserError as error:
            raise type(error)(f"stage {stage.name!r}: {error}") from error


def _details(
    stage: StageJob, stages: list[StageJob], run_dir: Path, opened: _Opened, again: list[str]
) -> Iterator[str]:
    job, plan = plan_for(stage.job, slurm.expected(stage.job.config))
    if job.engine_name not in MODEL_ENGINES:
        return
    sets: dict[str, ImageDataset] = {}
    clusters = 0
    for split in splits_to_open(job):
        awaited = _awaited(getattr(job.config.DATA, split), run_dir, again)
        if _images_are_awaited(getattr(job.config.DATA, split), awaited):
            yield f"{split}: the images are those of {', '.join(awaited)}"
            continue
        sets[split] = _open(_without_labels(job, split) if awaited else job, split, opened)
        clusters = _clusters(stage, stages) if awaited else clusters
        refuse_few_images(job, plan, sets[split])
        yield describe_split(split, sets[split], labels_from=", ".join(awaited), num_classes=clusters)
    if not sets:
        return
    file = job.config.MODEL.WEIGHTS_INIT.PARAMS_FILE
    has_weights = os.path.exists(file) or not is_below(file, run_dir)
    weights, model, memory = (
        lines for _, lines in model_parts(job, plan, sets, num_classes=clusters, has_weights=has_weights)
    )
    yield from (weights[0], *model, memory[-1])


def _open(job: Job, split: str, opened: _Opened) -> ImageDataset:
    config = job.config
    about = [split, job.engine_name, config.SEED_VALUE, config.MODEL.INPUT_TYPE, config.DATA.model_dump(mode="json")]
    key = json.dumps(about, sort_keys=True)
    if key not in opened:
        opened[key] = open_split(job, split)
    return opened[key]


def _awaited(options: Split, run_dir: Path, again: list[str]) -> list[str]:
    """Paths of a split that an earlier stage has still to make, or makes `again`."""
    remade = [run_dir / name for name in again]
    given = [*options.DATA_PATHS, *(path for path in options.LABEL_PATHS if isinstance(path, str))]
    return [
        path
        for path in given
        if is_below(path, run_dir)
        and (not os.path.exists(path) or any(is_below(path, stage_dir) for stage_dir in remade))
    ]


def _images_are_awaited(options: Split, awaited: list[str]) -> bool:
    """Whether it is the images that are not there yet, or the list of them beside the labels."""
    is_listed = not options.DATA_PATHS and any(name.startswith("disk_") for name in options.DATA_SOURCES)
    return any(path in awaited for path in options.DATA_PATHS) or (bool(awaited) and is_listed)


def _without_labels(job: Job, split: str) -> Job:
    """The job with the images of a split alone."""
    plain = {"LABEL_PATHS": [], "LABEL_SOURCES": [], "LABEL_TYPE": "zero"}
    options = getattr(job.config.DATA, split).model_copy(update=plain)
    data = job.config.DATA.model_copy(update={split: options})
    return job.model_copy(update={"config": job.config.model_copy(update={"DATA": data})})


def _clusters(stage: StageJob, stages: list[StageJob]) -> int:
    """How many classes the labels will have that a clustering stage makes for this one."""
    sources = [one.job for one in stages if one.name in stage.needs and one.job.engine_name == "cluster_features"]
    return max((job.config.CLUSTERFIT.NUM_CLUSTERS for job in sources), default=0)
