"""The run folder: whether it may be used, what the launcher writes into it, and whether its run is finished."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vissl_like import __version__, files
from vissl_like.config.plan import PLAN_FILE, Plan, write_plan
from vissl_like.config.rules import SPLITS
from vissl_like.config.saved import CONFIG_FILE, config_hash, differences, read_job, relevant, write_job
from vissl_like.config.schema import Job
from vissl_like.errors import ConfigError, DataError, explained
from vissl_like.files import write_json
from vissl_like.launch import outputs
from vissl_like.launch.inputs import MANIFEST_FILE, input_fingerprints

LAUNCH_FILE = "launch.json"
RESULTS_FILE = "results.json"
OCCUPIED_FILE = ".running"

log = logging.getLogger(__name__)

#: What a run computes; without any of it the folder of one that failed may take a run of another configuration.
_WORK = (
    *(RESULTS_FILE, MANIFEST_FILE, "metrics.jsonl", "checkpoints", "features", "clusters", "predictions"),
    *("part_maps", "thresholds", "speed.json", "replay"),
)
#: What it writes about itself.
_RECORDS = (
    *(
        CONFIG_FILE,
        LAUNCH_FILE,
        PLAN_FILE,
        "environment.json",
        "log.txt",
        "bad_images.txt",
        "report.html",
        "table.json",
        *(f"{split}_label_to_index_map.json" for split in ("train", "val", "test")),
    ),
    *("weights_report.json", "weights_report.txt", "wandb_id.txt", "figures", "tb_logs", "profile", ".errors"),
)
#: What runs write into their folder: RUN.OVERWRITE removes these and nothing else.
OUTPUTS = (*_WORK, *_RECORDS)


@dataclass(frozen=True)
class LaunchInfo:
    """What a job was made from, for launch.json.

    `config_dirs` are the folders of --config-dir, `notes` the warnings of the composition (old names of keys).
    """

    recipe: str | None = None
    presets: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    config_dirs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def default_dir(job: Job, recipe: str | None) -> Path:
    """RUN.DIR, or runs/<recipe> where it is empty."""
    return Path(job.config.RUN.DIR).expanduser() if job.config.RUN.DIR else Path("runs", recipe or job.engine_name)


def with_run_dir(job: Job, run_dir: Path) -> Job:
    """The job with RUN.DIR filled in."""
    run = job.config.RUN.model_copy(update={"DIR": str(run_dir)})
    return job.model_copy(update={"config": job.config.model_copy(update={"RUN": run})})


def is_run(run_dir: Path) -> bool:
    """Whether a run has been started in this folder."""
    return (run_dir / CONFIG_FILE).is_file()


def holds_work(run_dir: Path) -> bool:
    """Whether a run has computed anything in this folder. Stages of a pipeline lie in folders of their own."""
    made = [run_dir / name for name in _WORK]
    has_stages = any(run_dir.glob(f"*/{CONFIG_FILE}"))
    return has_stages or any(any(path.iterdir()) if path.is_dir() else _size(path) > 0 for path in made)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def check_reuse(job: Job, plan: Plan, run_dir: Path) -> None:
    """Refuse a folder with the run of another configuration, naming every key that differs, or with the images."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"config.RUN.DIR={str(run_dir)!r}: this is a file. Choose a folder.")
    _refuse_folder_of_images(job, run_dir)
    if not is_run(run_dir) or job.config.RUN.OVERWRITE or not holds_work(run_dir):
        return
    weights = f" (to go on from these weights there: config.MODEL.WEIGHTS_INIT.PARAMS_FILE={run_dir})"
    cure = (
        f"Choose another config.RUN.DIR{weights if (run_dir / 'checkpoints').is_dir() else ''}, "
        "or start anew here with config.RUN.OVERWRITE=true."
    )
    try:
        before = read_job(run_dir)
    except ConfigError as error:
        raise ConfigError(f"config.RUN.DIR={str(run_dir)!r}: {error} {cure}") from error
    there = relevant(before, global_batch=_global_batch(before, _stored_batch(run_dir)))
    different = differences(there, relevant(job, global_batch=_global_batch(job, plan.global_batch)))
    if different:
        lines = "\n".join(f"  {line}" for line in different)
        raise ConfigError(f"config.RUN.DIR={str(run_dir)!r} holds a run with another configuration:\n{lines}\n{cure}")


def _refuse_folder_of_images(job: Job, run_dir: Path) -> None:
    """A run in the folder of its images would add its figures to them."""
    here = run_dir.resolve()
    for split in SPLITS:
        for path in getattr(job.config.DATA, split).DATA_PATHS:
            if path and Path(path).expanduser().is_dir() and Path(path).expanduser().resolve() == here:
                raise ConfigError(
                    f"config.RUN.DIR={str(run_dir)!r}: this is a folder of images (config.DATA.{split}.DATA_PATHS), and "
                    "a run's own pictures would be read as images of it. Choose another folder."
                )


def holds_other(job: Job, run_dir: Path) -> bool:
    """Whether the folder holds a run of another configuration than `job`."""
    if not is_run(run_dir):
        return False
    try:
        return bool(differences(relevant(read_job(run_dir)), relevant(job)))
    except ConfigError:
        return True


def _global_batch(job: Job, images: int | None) -> int | None:
    return images if job.engine_name == "train" else None


def _stored_batch(run_dir: Path) -> int | None:
    return read_json(run_dir / PLAN_FILE).get("values", {}).get("global_batch")


def finished(job: Job, run_dir: Path) -> dict[str, Any] | None:
    """The results of the finished run in this folder, or None. Its inputs must not have changed since."""
    manifest = read_json(run_dir / MANIFEST_FILE)
    if job.config.RUN.OVERWRITE or not manifest.get("complete") or manifest.get("engine") != job.engine_name:
        return None
    now = input_fingerprints(job)
    changed = [path for path, known in manifest.get("inputs", {}).items() if now.get(path) != known]
    if changed:
        raise DataError(
            f"config.RUN.DIR={str(run_dir)!r} holds a finished run, but what it was made from has changed since: "
            f"{', '.join(changed)}. Choose another config.RUN.DIR, or start anew there with config.RUN.OVERWRITE=true."
        )
    lost = outputs.lost(manifest.get("outputs", {}), run_dir)
    if lost:
        more = f" (and {len(lost) - 3} more)" if len(lost) > 3 else ""
        log.warning("%s was finished, but %s%s: what is lost is made again", run_dir, "; ".join(lost[:3]), more)
        return None
    return read_json(run_dir / RESULTS_FILE)


def make(run_dir: Path) -> None:
    """Make the run folder."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(run_dir, error) from error


def prepare(job: Job, plan: Plan, run_dir: Path, info: LaunchInfo) -> None:
    """Empty the folder of former outputs if RUN.OVERWRITE, and write what ranks and the report read."""
    try:
        if job.config.RUN.OVERWRITE and is_run(run_dir):
            remove_outputs(run_dir)
        (run_dir / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(run_dir / ".errors", ignore_errors=True)
        write_job(job, run_dir)
        content = {**asdict(info), "version": __version__, "started": _now()}
        write_json(run_dir / LAUNCH_FILE, content)
        write_plan(plan, run_dir)
    except OSError as error:
        raise _refused(run_dir, error) from error


def _refused(run_dir: Path, error: OSError) -> Exception:
    """A folder that cannot be one is a wrong value of the key; a full disk or missing rights are not."""
    if isinstance(error, NotADirectoryError | FileExistsError):
        return ConfigError(f"config.RUN.DIR={str(run_dir)!r}: cannot be made ({error}).")
    text = f"config.RUN.DIR={str(run_dir)!r}: cannot write there"
    return DataError(f"{text}: {explained(error, place=run_dir) or error}")


def remove_outputs(run_dir: Path) -> None:
    """Take away what runs write into their folder, and nothing else."""
    for name in OUTPUTS:
        path = run_dir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def complete(job: Job, plan: Plan, run_dir: Path, *, results: dict[str, Any], seconds: float) -> None:
    """Write results.json and, last, manifest.json: the run is finished."""
    write_json(run_dir / RESULTS_FILE, results)
    manifest = {
        "engine": job.engine_name,
        "config_hash": config_hash(job, global_batch=_global_batch(job, plan.global_batch)),
        "inputs": input_fingerprints(job),
        "outputs": outputs.record(job, run_dir),
        "content": outputs.content(job, run_dir),
        "complete": True,
        "finished": _now(),
        "seconds": round(seconds, 2),
    }
    write_json(run_dir / MANIFEST_FILE, manifest)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


# ------------------------------------------------------------------------------------------------------- one at a time
@contextlib.contextmanager
def occupied(run_dir: Path) -> Iterator[None]:
    """Mark the folder as in use by this process; raises ConfigError if a living process of this machine uses it."""
    mark, mine = run_dir / OCCUPIED_FILE, _identity(os.getpid())
    with _alone_in(run_dir):
        known = read_json(mark)
        pid = known.get("pid")
        if isinstance(pid, int) and pid != os.getpid() and known == _identity(pid):
            raise ConfigError(
                f"config.RUN.DIR={str(run_dir)!r}: another run is going on in this folder (process {pid}). Wait for it, "
                "end it, or choose another config.RUN.DIR."
            )
        write_json(mark, mine)
    try:
        yield
    finally:
        with _alone_in(run_dir):
            if read_json(mark) == mine:  # else another machine, which cannot see whether we live, has taken the folder
                mark.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone_in(run_dir: Path) -> Iterator[None]:
    """Between looking and marking nobody else does so: of two starts in the same moment one waits for the other."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks, or somebody has removed the folder
            handle = os.open(run_dir, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _identity(pid: int) -> dict[str, Any]:
    """What tells a process from all others, also from a later one with its number; empty if it has ended."""
    identity: dict[str, Any] = {"pid": pid, "host": platform.node()}
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except ProcessLookupError:
        return {}
    except OSError:  # another user's process, or a system without /proc
        return identity
    return {} if state[0] == "Z" else {**identity, "born": state[19]}


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if there is none or it is damaged."""
    return files.read_json(file) or {}
