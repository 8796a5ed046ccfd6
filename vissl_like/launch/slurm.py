"""Submit a run as a batch job, by submitit. Everything is checked before; the job runs the same command on its nodes.

Free of torch: a login node answers at once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from vissl_like.config.compose import text_override
from vissl_like.config.plan import make_plan
from vissl_like.config.rules_launch import minutes_of
from vissl_like.config.schema import Config, Job
from vissl_like.errors import ConfigError
from vissl_like.files import write_json
from vissl_like.launch import folder
from vissl_like.launch.allocation import in_job
from vissl_like.launch.folder import LaunchInfo
from vissl_like.launch.machine import Processes, processes_for
from vissl_like.launch.slurm_job import NodeCommand, started, state_of

#: RUN.DIR/slurm.json: the last job that was submitted for this run.
SUBMISSION_FILE = "slurm.json"
FINISHED, SUBMITTED = "finished", "submitted"

_GPU_REQUESTS = ("gres", "gpus", "gpus_per_node", "gpus_per_task", "gpus_per_socket", "tres_per_node", "tres_per_task")
#: Seconds that are left for queueing the job again when the run has used up its time for saving.
_REQUEUE_S = 15


@dataclass(frozen=True)
class Submission:
    """What became of a submission. `state` is submitted, finished (nothing to do) or SLURM's word for a job that lives."""

    state: str
    job_id: str = ""
    cluster: str = ""
    log: str = ""
    argv: tuple[str, ...] = ()


def is_wanted(config: Config) -> bool:
    """Whether this command submits (or shows what it would submit) instead of running."""
    return config.SLURM.DRY_RUN or (config.SLURM.USE_SLURM and not in_job())


def requested(config: Config) -> Processes:
    """Devices and processes of the job that will be asked for. Raises ConfigError if they cannot be known from here."""
    options = config.DISTRIBUTED
    if config.MACHINE.DEVICE != "cpu" and options.NUM_PROC_PER_NODE == 0:
        raise ConfigError(
            "config.DISTRIBUTED.NUM_PROC_PER_NODE=0: a batch job must say how many GPUs it wants. Give "
            "config.DISTRIBUTED.NUM_PROC_PER_NODE=N (processes and GPUs per node), or config.MACHINE.DEVICE=cpu."
        )
    local = options.NUM_PROC_PER_NODE or 1
    return Processes("cpu" if config.MACHINE.DEVICE == "cpu" else "gpu", local, local * options.NUM_NODES)


def expected(config: Config) -> Processes:
    """Devices and processes that a dry run speaks of: those of the batch job, if one is wanted, else those of a start here."""
    return requested(config) if is_wanted(config) else processes_for(config)


def submit(job: Job, run_dir: Path, info: LaunchInfo) -> Submission:
    """Submit a checked job, unless its run is finished or its last job still lives. Raises ConfigError."""
    job = folder.with_run_dir(job, run_dir)
    _check_folder(job, run_dir)
    if folder.finished(job, run_dir) is not None:
        return Submission(FINISHED)
    options = job.config.SLURM
    argv = argv_for(info, run_dir)
    alive = _alive(run_dir, argv)
    if alive is not None:
        return alive
    executor = _executor(job, run_dir)
    folder.make(run_dir)
    command = NodeCommand(
        argv=argv,
        cwd=os.getcwd(),
        run_dir=str(run_dir),
        num_nodes=job.config.DISTRIBUTED.NUM_NODES,
        port=options.PORT_ID,
        patience_s=max(options.SIGNAL_DELAY_S - _REQUEUE_S, options.SIGNAL_DELAY_S / 2),
        before=started(run_dir),
    )
    try:
        with _importable(), contextlib.redirect_stderr(io.StringIO()):  # what sbatch says is in the error, too
            sent = executor.submit(command)
    except Exception as error:
        raise ConfigError(_refusal(error)) from error
    submission = Submission(SUBMITTED, sent.job_id, options.CLUSTER, str(sent.paths.stdout), tuple(argv))
    write_json(run_dir / SUBMISSION_FILE, asdict(submission))
    return submission


def batch_text(job: Job, run_dir: Path) -> str:
    """The text that sbatch would be given. Raises ConfigError."""
    module = _submitit("submitit.slurm.slurm")
    make = getattr(module, "_make_sbatch_string", None)
    if make is None:
        raise ConfigError(
            "config.SLURM.DRY_RUN=true: this version of submitit does not show the batch text. Install another one "
            "(pip install 'submitit>=1.5,<1.6'), or submit and read *_submission.sh in config.SLURM.LOG_FOLDER."
        )
    logs = log_folder(job, run_dir)
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(logs))}"
    text: str = make(command=command, folder=logs, **parameters(job, run_dir))
    return text


def describe(submission: Submission, run_dir: Path) -> str:
    """What a user does next, in a few lines."""
    if submission.state == FINISHED:
        return f"{run_dir}: this run is finished; its results are in {folder.RESULTS_FILE}. Nothing was submitted."
    job_id, is_local = submission.job_id, submission.cluster == "local"
    kind = "process" if is_local else "SLURM job"
    first = (
        f"submitted {kind} {job_id}"
        if submission.state == SUBMITTED
        else (f"nothing was submitted: {kind} {job_id} of this run is {submission.state}")
    )
    rows = [
        ("run folder", str(run_dir)),
        ("follow", f"tail -F {shlex.quote(submission.log)}"),
        ("status", f"ps {job_id}" if is_local else f"squeue -j {job_id}"),
        ("cancel", f"kill -INT {job_id}" if is_local else f"scancel {job_id}"),
    ]
    return "\n".join([first, *(f"  {name:<11} {text}" for name, text in rows)])


# ------------------------------------------------------------------------------------------------------ what is submitted
def parameters(job: Job, run_dir: Path) -> dict[str, Any]:
    """The job as submitit's SlurmExecutor wants it: one task per node, which starts the processes there."""
    config, options = job.config, job.config.SLURM
    processes = requested(config)
    num_cpus = options.NUM_CPU_PER_PROC * processes.local
    further = {name.replace("-", "_"): _plain(value) for name, value in options.ADDITIONAL_PARAMETERS.items()}
    asks_itself = any(name in further for name in _GPU_REQUESTS)
    named = {
        "partition": options.PARTITION,
        "account": options.ACCOUNT,
        "qos": options.QOS,
        "constraint": options.CONSTRAINT,
        "comment": options.COMMENT,
        "mem": f"{options.MEM_GB}GB" if options.MEM_GB else "",
        "gpus_per_node": processes.local if processes.device == "gpu" and not asks_itself else 0,
    }
    return {
        **{name: value for name, value in named.items() if value},
        "job_name": options.NAME or config.RUN.NAME or run_dir.name,
        "nodes": config.DISTRIBUTED.NUM_NODES,
        "ntasks_per_node": 1,
        "cpus_per_task": num_cpus,
        "time": minutes_of(options),
        "signal_delay_s": options.SIGNAL_DELAY_S,
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's own default is a word that clusters with accounting by wckey refuse
        "setup": [f"export PYTHONPATH={path}" for path in _python_path()],
        # srun has its own idea of cores since SLURM 22.05; a node that fails must not end the others while they save.
        "srun_args": [f"--cpus-per-task={num_cpus}", "--kill-on-bad-exit=0"],
        "additional_parameters": {"requeue": True, **further},
    }


def argv_for(info: LaunchInfo, run_dir: Path) -> list[str]:
    """The words of the command that the job runs: those of this one, and where."""
    dirs = [word for path in info.config_dirs for word in ("--config-dir", path)]
    words = [word for word in info.overrides if not word.startswith("config.RUN.DIR=")]
    return [*dirs, *words, text_override("config.RUN.DIR", str(run_dir))]


def log_folder(job: Job, run_dir: Path) -> Path:
    """Where submitit keeps the batch text, its own files and the logs."""
    given = job.config.SLURM.LOG_FOLDER
    return Path(given).expanduser().absolute() if given else run_dir.absolute() / "slurm"


def _plain(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _python_path() -> list[str]:
    """For a package that is not installed: where it lies, before what PYTHONPATH says on the node."""
    root = Path(__file__).resolve().parents[2]
    if root.name in ("site-packages", "dist-packages"):
        return []
    return [shlex.quote(str(root)) + "${PYTHONPATH:+:$PYTHONPATH}"]


# ------------------------------------------------------------------------------------------------------------ submission
def _check_folder(job: Job, run_dir: Path) -> None:
    """The run folder may be used by this job; what a node would find out hours later."""
    processes = requested(job.config)
    plan = make_plan(
        job.config,
        num_processes=processes.world,
        device=processes.device,
        num_train=None,
        engine_name=job.engine_name,
    )
    folder.check_reuse(job, plan, run_dir)


def _alive(run_dir: Path, argv: list[str]) -> Submission | None:
    """The job of this run that waits or runs, if there is one. Raises ConfigError if it runs another command."""
    known = folder.read_json(run_dir / SUBMISSION_FILE)
    job_id = str(known.get("job_id", ""))
    state = _local_state(job_id) if known.get("cluster") == "local" else state_of(job_id) if job_id else ""
    if not state:
        return None
    if known.get("argv") != argv:
        raise ConfigError(
            f"config.RUN.DIR={str(run_dir)!r}: job {job_id} ({state}) was submitted for this folder with other options: "
            f"{' '.join(known.get('argv', []))}. Cancel it (scancel {job_id}), or choose another config.RUN.DIR."
        )
    return Submission(state, job_id, str(known.get("cluster")), str(known.get("log")), tuple(argv))


def _local_state(pid: str) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return "RUNNING" if b"submitit.local" in words else ""


def _executor(job: Job, run_dir: Path) -> Any:
    """submitit's executor with this job's parameters. Raises ConfigError if this machine cannot submit."""
    options, submitit = job.config.SLURM, _submitit("submitit")
    wanted, logs = parameters(job, run_dir), log_folder(job, run_dir)
    if options.CLUSTER == "slurm" and not (shutil.which("srun") and shutil.which("sbatch")):
        raise ConfigError(
            "config.SLURM.USE_SLURM=true: this machine has no commands srun and sbatch. Submit on a login node of the "
            "cluster, look at the job by config.SLURM.DRY_RUN=true, or try it here by config.SLURM.CLUSTER=local."
        )
    try:
        if options.CLUSTER == "slurm":
            executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=options.MAX_REQUEUES)
            executor.update_parameters(**wanted)
            return executor
        executor = submitit.LocalExecutor(folder=logs, max_num_timeout=options.MAX_REQUEUES)
    except OSError as error:
        raise ConfigError(f"config.SLURM.LOG_FOLDER={str(logs)!r}: cannot be made ({error}).") from error
    executor.update_parameters(
        timeout_min=wanted["time"],
        tasks_per_node=wanted["nodes"],  # each stands for a node
        gpus_per_node=wanted.get("gpus_per_node", 0),
        signal_delay_s=options.SIGNAL_DELAY_S,
        stderr_to_stdout=True,
    )
    return executor


def _submitit(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            "config.SLURM: jobs are submitted by the package submitit, which is not installed: "
            "pip install 'vissl_like[slurm]' (or pip install submitit)."
        ) from error


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """For the processes of a local job: this package is found where it lies, as a batch text says for those of SLURM."""
    before = os.environ.get("PYTHONPATH")
    root = [str(Path(__file__).resolve().parents[2])] if _python_path() else []
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*root, before]))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _refusal(error: Exception) -> str:
    """What sbatch said, in one line."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = [line.removeprefix("sbatch: error: ") for line in said if line.startswith("sbatch: error")] or said[-1:]
    return f"the job was refused: {'; '.join(words)}. `config.SLURM.DRY_RUN=true` shows what is submitted."
