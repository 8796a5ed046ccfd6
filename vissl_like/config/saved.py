"""A job as it lies in its run folder (config.yaml): written, read, compared. Free of Hydra, so ranks can use it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vissl_like.config.recipes import flatten
from vissl_like.config.schema import Job
from vissl_like.errors import ConfigError
from vissl_like.files import read_yaml, write_text

CONFIG_FILE = "config.yaml"

#: Keys and sections that change how a run goes but not what comes out of it. A run may be continued with other values.
IRRELEVANT = (
    "config.VERBOSE",
    "config.LOG_FREQUENCY",
    "config.MULTI_PROCESSING_METHOD",
    "config.RUN",
    "config.DISTRIBUTED",
    "config.SLURM",
    "config.MACHINE.NUM_THREADS",
    "config.MACHINE.COMPILE",
    "config.MACHINE.COMPILE_BACKEND",
    "config.MODEL.ACTIVATION_CHECKPOINTING",
    "config.CHECKPOINT",
    "config.LOGGERS",
    "config.DATA.NUM_DATALOADER_WORKERS",
    "config.DATA.PIN_MEMORY",
    "config.DATA.TRAIN.MMAP_MODE",
    "config.DATA.VAL.MMAP_MODE",
    "config.DATA.TEST.MMAP_MODE",
    "config.PIPELINE.TABLE",
)


#: Engines that put each image through a fixed network: what comes out is the image's, whatever else is in the batch (but for
#: the last bit of a convolution). Finished features keep the batches that they were made with.
BATCH_IS_IRRELEVANT = ("extract_features", "cluster_features", "extract_label_predictions")

#: Sections that only these engines read. In a pipeline each stage has them all: another number of clusters makes no
#: other teacher.
_READ_BY = {
    "config.CLUSTERFIT": ("cluster_features",),
    "config.EXTRACT_FEATURES": ("extract_features", "cluster_features", "evaluate"),
    "config.EVALUATE": ("evaluate",),
    "config.NEAREST_NEIGHBOR": ("evaluate",),
    "config.LINEAR_PROBE": ("evaluate",),
    "config.LOW_SHOT": ("evaluate",),
    "config.EVALUATE_PARTS": ("evaluate_parts",),
    "config.OPTIMIZER": ("train", "evaluate_parts"),
}
#: Engines whose reading the table knows; another one, of a plugin, may read everything.
_KNOWN_ENGINES = (
    "train",
    "extract_features",
    "cluster_features",
    "extract_label_predictions",
    "evaluate",
    "evaluate_parts",
)


def plain(job: Job) -> dict[str, Any]:
    """The job as plain data."""
    return job.model_dump(mode="json")


def write_job(job: Job, run_dir: Path) -> None:
    """Write RUN.DIR/config.yaml."""
    text = yaml.safe_dump(plain(job), sort_keys=False, allow_unicode=True, width=120)
    write_text(run_dir / CONFIG_FILE, text)


def read_job(run_dir: Path) -> Job:
    """The job of a run folder."""
    file = run_dir / CONFIG_FILE
    try:
        return Job.model_validate(read_yaml(file))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; {run_dir} is not a run folder.") from None
    except (OSError, yaml.YAMLError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{file}: cannot be read as the configuration of a run ({first}).") from error


def relevant(job: Job, *, global_batch: int | None = None) -> dict[str, Any]:
    """Dotted key -> value of everything that decides about the results.

    With `global_batch` (images per optimizer step of a training), that number stands for the options it is made from: the
    same steps may be made by other numbers of processes, accumulated batches and images per process.
    """
    names = {".".join(path): value for path, value in flatten(plain(job))}
    found = {name: value for name, value in names.items() if not _is_irrelevant(name, job.engine_name)}
    if job.engine_name in BATCH_IS_IRRELEVANT:
        for split in ("TRAIN", "VAL", "TEST"):
            found.pop(f"config.DATA.{split}.BATCHSIZE_PER_REPLICA")
    if global_batch is not None:
        found.pop("config.DATA.TRAIN.BATCHSIZE_PER_REPLICA")
        found.pop("config.OPTIMIZER.ACCUMULATE_STEPS")
        found["images per optimizer step"] = global_batch
    return found


def _is_irrelevant(key: str, engine: str) -> bool:
    unread = [name for name, readers in _READ_BY.items() if engine in _KNOWN_ENGINES and engine not in readers]
    return any(key == name or key.startswith(f"{name}.") for name in (*IRRELEVANT, *unread))


def config_hash(job: Job, *, global_batch: int | None = None) -> str:
    """16 hex digits that are equal for jobs with the same results."""
    text = json.dumps(relevant(job, global_batch=global_batch), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line per key that differs between two results of `relevant`."""
    return [
        f"{key}: there {_show(before, key)}, now {_show(now, key)}"
        for key in dict.fromkeys([*before, *now])
        if (key in before) != (key in now) or before.get(key) != now.get(key)
    ]


def _show(values: dict[str, Any], key: str) -> str:
    text = repr(values[key]) if key in values else "nothing"
    return text if len(text) <= 200 else text[:197] + "..."
