"""RUN.DRY_RUN=true: everything that can be known before a run starts. Starts nothing and writes nothing."""

from __future__ import annotations

from pathlib import Path

import yaml

from vissl_like.config.components import load_plugins
from vissl_like.config.plan import Plan, table
from vissl_like.config.saved import plain
from vissl_like.config.schema import Job, defaults
from vissl_like.config.stages import changed
from vissl_like.errors import ConfigError
from vissl_like.launch import folder, slurm
from vissl_like.launch.dry_run_parts import describe_split, model_parts, open_split, refuse_few_images
from vissl_like.launch.dry_run_stages import stage_lines
from vissl_like.launch.endpoint import endpoint_of
from vissl_like.launch.inputs import MODEL_ENGINES, check_inputs, check_transforms, splits_to_open
from vissl_like.launch.local import plan_for
from vissl_like.launch.machine import started_by_torchrun


def dry_run(job: Job, run_dir: Path, info: folder.LaunchInfo) -> str:
    """The report of a dry run. Raises the same errors as a start would."""
    load_plugins(job.config.PLUGINS)
    job = folder.with_run_dir(job, run_dir)
    files = check_inputs(job)
    check_transforms(job)
    is_batch_job = slurm.is_wanted(job.config)
    meets = job.config.DISTRIBUTED.NUM_NODES > 1 and not is_batch_job and not started_by_torchrun()
    if meets and job.config.DISTRIBUTED.ENDPOINT:
        endpoint_of(job.config.DISTRIBUTED)
    processes = slurm.expected(job.config)
    sets = {split: open_split(job, split) for split in splits_to_open(job)}
    num_train = len(sets["TRAIN"]) if job.engine_name == "train" and "TRAIN" in sets else None
    job, plan = plan_for(job, processes, num_train=num_train)
    for dataset in sets.values():
        refuse_few_images(job, plan, dataset)
    parts = [
        (
            "Run",
            [f"engine {job.engine_name}, recipe {info.recipe or '(none)'}", f"folder {run_dir}: {_state(job, plan)}"],
        ),
        ("Configuration (what differs from the defaults; config.VERBOSE=true prints all)", _configuration(job)),
        ("Inferred values", [*table(plan).splitlines(), *(f"warning: {text}" for text in plan.warnings)]),
        ("Files", [f"found {path}" for path in files] or ["none are named in the configuration"]),
    ]
    if meets and not job.config.DISTRIBUTED.ENDPOINT:
        parts.append(("To start it", ["the same command on every machine, with config.DISTRIBUTED.ENDPOINT=HOST:PORT"]))
    if is_batch_job:
        parts.append(("Batch job", slurm.batch_text(job, run_dir).splitlines()))
    if job.engine_name == "pipeline":
        parts.append(("Stages", list(stage_lines(job, run_dir))))
    if sets:
        parts.append(("Data", [describe_split(split, dataset) for split, dataset in sets.items()]))
    if sets and job.engine_name in MODEL_ENGINES:
        parts += model_parts(job, plan, sets)
    text = "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in parts)
    return f"{text}\n\nDry run: nothing was started, nothing was written."


def _state(job: Job, plan: Plan) -> str:
    """What a start would find there."""
    run_dir = Path(job.config.RUN.DIR)
    if not folder.is_run(run_dir):
        return "new"
    if job.config.RUN.OVERWRITE:
        return "holds a run that would be replaced (RUN.OVERWRITE)"
    try:
        folder.check_reuse(job, plan, run_dir)
    except ConfigError as error:
        return f"cannot be used: {error}"
    done = folder.finished(job, run_dir) is not None
    return "holds this run, finished" if done else "holds this run, which would go on"


def _configuration(job: Job) -> list[str]:
    tree = plain(job)
    shown = tree if job.config.VERBOSE else changed(tree, defaults())
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=110).splitlines()
