"""Batch jobs that really run: by submitit's local executor, by a small stand-in for SLURM, and below srun's variables."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration import fake_slurm
from tests.integration.forks import Fork
from tests.integration.training_runs import SMALL, launch, losses, records
from vissl_like.launch.main import main
from vissl_like.launch.slurm import SUBMISSION_FILE
from vissl_like.launch.sweep import LEDGER, read

HERE = Path(__file__).parent
SUBMIT = ["config.SLURM.USE_SLURM=true", "config.MACHINE.DEVICE=cpu"]
LOCAL = [*SUBMIT, "config.SLURM.CLUSTER=local"]
ENDINGS = ["engine_name=endings", "config.PLUGINS=[launch_plugin]", "config.RUN.REPORT=false"]
PATIENT = [
    *(word for word in SMALL if not word.startswith(("config.PLUGINS", "config.TASK"))),
    *("config.PLUGINS=[slurm_plugin]", "config.TASK.NAME=supervised_patient", "config.OPTIMIZER.NUM_EPOCHS=3"),
    *("config.CHECKPOINT.EVERY_EPOCHS=0", "config.DATA.NUM_DATALOADER_WORKERS=2"),
]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, outside of any job; jobs find the plugins."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("PATIENT_FOLDER", str(tmp_path))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for SLURM; returns the folder of its state."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, value in fake_slurm.install(folder).items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training of PATIENT, undisturbed and without a job."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    done = launch(run_dir, "config.OPTIMIZER.NUM_EPOCHS=3", "config.CHECKPOINT.EVERY_EPOCHS=0")
    assert done.returncode == 0, done.stderr
    return run_dir


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen")


def submission(run_dir: str) -> dict[str, Any]:
    return json.loads((Path(run_dir) / SUBMISSION_FILE).read_text())


def log_of(run_dir: str) -> str:
    return Path(submission(run_dir)["log"]).read_text()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(run_dir: str, *, cluster: Path | None = None) -> int | None:
    """Wait for the end of a job; the exit code that a cluster saw."""
    job_id = submission(run_dir)["job_id"]
    if cluster is None:
        status = Path(f"/proc/{job_id}/stat")
        wait_for(lambda: status.read_text().rpartition(")")[2].split()[0] == "Z", "the end of the job")
        return None
    file = cluster / f"{job_id}.exit"
    wait_for(lambda: file.exists() and file.read_text(), "the end of the job")
    return int(file.read_text())


def assert_equals_undisturbed(run_dir: Path, reference: Path) -> None:
    assert losses(run_dir) == losses(reference)
    assert [line for line in records(run_dir) if line["kind"] == "test"] == [
        line for line in records(reference) if line["kind"] == "test"
    ]
    weights = "checkpoints/last/model.safetensors"
    assert (run_dir / weights).read_bytes() == (reference / weights).read_bytes()


# ------------------------------------------------------------------------------------------- submitit's local executor
def test_requeued_after_a_signal_it_equals_the_undisturbed_run(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder holds another run: RUN.OVERWRITE replaces that one, and not what the job itself has done so far."""
    assert main([*ENDINGS, "config.RUN.DIR=run"]) == 0
    capsys.readouterr()
    words = [*PATIENT, *LOCAL, "config.RUN.DIR=run", "config.RUN.OVERWRITE=true"]
    (tmp_path / "wait").touch()
    assert main(words) == 0
    told = capsys.readouterr().out
    job_id = submission("run")["job_id"]
    assert f"submitted process {job_id}" in told and f"tail -F {submission('run')['log']}" in told
    wait_for((tmp_path / "waiting").exists, "step 5")
    assert main(words) == 0 and "nothing was submitted" in capsys.readouterr().out
    assert main([*words, "config.LOG_FREQUENCY=3"]) == 2
    assert f"job {job_id} (RUNNING) was submitted for this folder with other options" in capsys.readouterr().err
    (tmp_path / "wait").unlink()
    [task] = children(int(job_id))
    os.kill(task, signal.SIGUSR2)  # as before a time limit
    ended("run")
    log = log_of("run")
    assert log.count("[job] job ") == 2 and "back into the queue" in log and "continuing after step 5" in log
    assert log.rstrip().count("[job] finished") == 1
    assert_equals_undisturbed(tmp_path / "run", reference)
    assert main([word for word in words if "OVERWRITE" not in word]) == 0
    assert "this run is finished" in capsys.readouterr().out


def test_a_failed_command_is_shown_with_its_error_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ENDINGS, *LOCAL, "config.RUN.DIR=a", "config.RUN.NAME=mistake"]) == 0
    ended("a")
    log = log_of("a")
    assert (
        log.splitlines()[-1] == "[job] the command ended with exit code 3: error: config.DATA: these images are wrong."
    )
    assert "Traceback" not in log and not Path("a/manifest.json").exists()


def test_points_of_a_sweep_are_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", *ENDINGS, *LOCAL, "config.RUN.DIR=my runs", "config.SEED_VALUE=1,2"]
    assert main(words) == 0
    jobs = [submission(f"my runs/SEED_VALUE-{seed}")["job_id"] for seed in (1, 2)]
    lines = read(Path("my runs") / LEDGER)
    assert [(line["status"], line["job_id"], line["exit"]) for line in lines] == [("submitted", job, 0) for job in jobs]
    assert f"submitted ({jobs[1]})" in capsys.readouterr().out
    for seed in (1, 2):
        ended(f"my runs/SEED_VALUE-{seed}")
    for _ in range(2):
        assert main(words) == 0
    lines = read(Path("my runs") / LEDGER)
    assert [line["status"] for line in lines] == ["submitted", "submitted", "done", "done"]
    assert [line["metrics"].get("seed") for line in lines] == [None, None, 1, 2]
    assert [submission(f"my runs/SEED_VALUE-{seed}")["job_id"] for seed in (1, 2)] == jobs


# ---------------------------------------------------------------------------------------------------- the batch text runs
def test_signals_to_every_process_of_a_job(tmp_path: Path, cluster: Path, reference: Path) -> None:
    """A time limit (SIGUSR2), a preemption (SIGTERM), each to every process, loaders included; then to the end."""
    (tmp_path / "wait").touch()
    assert main([*PATIENT, *SUBMIT, "config.RUN.DIR=run"]) == 0
    for number, name in enumerate(("USR2", "TERM"), 1):
        wait_for((tmp_path / "waiting").exists, f"step 5 of start {number}")
        (tmp_path / "waiting").unlink()
        if name == "TERM":
            (tmp_path / "wait").unlink()
        assert submission("run")["state"] == "submitted" and (cluster / "1.state").read_text() == "RUNNING"
        subprocess.run(["scancel", f"--signal={name}", "1"], check=True)
    assert ended("run", cluster=cluster) == 0
    log = log_of("run")
    assert log.count("back into the queue") == 2 and log.count("[job] job 1, node 0 of 1") == 3, log
    assert_equals_undisturbed(tmp_path / "run", reference)


def test_two_nodes(tmp_path: Path, cluster: Path) -> None:
    """Both nodes get a signal and come back together; cancelled, they stay away. Then another job runs to its end."""
    words = [*ENDINGS, *SUBMIT, "config.DISTRIBUTED.NUM_NODES=2", "config.DISTRIBUTED.JOIN_TIMEOUT_S=120"]
    assert main([*words, "config.RUN.DIR=a", "config.RUN.NAME=stop"]) == 0
    listening = tmp_path / "a/listening"
    for number, asked in enumerate((["--signal=USR2"], []), 1):
        ranks = 2 * number
        wait_for(lambda ranks=ranks: listening.exists() and listening.read_text().count("\n") == ranks, "listening")
        subprocess.run(["scancel", *asked, "1"], check=True)
    assert ended("a", cluster=cluster) == 75
    logs = [Path(submission("a")["log"].replace("_0_log", f"_{node}_log")).read_text() for node in (0, 1)]
    assert logs[0].count("back into the queue") == 1
    assert [log.count(f"[job] job 1, node {node} of 2") for node, log in enumerate(logs)] == [2, 2]
    assert logs[0].splitlines()[-1].startswith("[job] stopped by a signal; the same command, submitted again, goes on")
    assert sorted(listening.read_text().split()) == ["0", "0", "1", "1"]
    assert main([*words, "config.RUN.DIR=b"]) == 0
    assert ended("b", cluster=cluster) == 0
    assert json.loads(Path("b/results.json").read_text())["ranks"] == 2


def test_the_exit_code_of_a_failed_command_is_the_jobs(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ENDINGS, *SUBMIT, "config.RUN.DIR=a", "config.RUN.NAME=mistake"]) == 0
    assert capsys.readouterr().out.startswith("submitted SLURM job 1\n")
    assert ended("a", cluster=cluster) == 3
    assert main([*ENDINGS, *SUBMIT, "config.RUN.DIR=b", "config.SLURM.PARTITION=nope"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: the job was refused: invalid partition specified: nope; Batch job submission failed"
    )
    assert error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------- tasks of srun
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}


def test_a_sweep_does_not_run_once_per_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**STEP, "SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["-m", *ENDINGS, "config.SEED_VALUE=1,2"]) == 2
    assert "with one task per node" in capsys.readouterr().err


def test_tasks_of_srun_are_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real processes with the variables that srun gives to two tasks on one node."""
    step = {**STEP, "SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_PER_TASK": "3"}  # the port follows from the job
    words = [*ENDINGS, "config.MACHINE.DEVICE=cpu", "config.RUN.DIR=a", "config.SLURM.USE_SLURM=true"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    places = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    with contextlib.ExitStack() as running:
        tasks = [running.enter_context(Fork(words, cwd=tmp_path, env=step | place)) for place in places]
        said = [task.communicate() for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert json.loads(Path("a/results.json").read_text())["ranks"] == 2
    started = sorted(line.partition(",")[0] for line in Path("a/started.txt").read_text().splitlines())
    assert started == ["0 of 2", "1 of 2"]
    plan = json.loads(Path("a/plan.json").read_text())
    assert plan["rows"][0]["used"] == "1 x 2" and plan["rows"][0]["reason"] == "started by srun"
    assert plan["values"]["num_threads"] == 3
