"""A SLURM of one machine for tests: sbatch, srun, squeue, scancel and scontrol, as far as a job here needs them.

Like the real one (22.05, where this was compared) it runs the batch text by bash, gives tasks their variables, sends
signals to every process of every task, shows a cancelled job as COMPLETING, and starts a requeued one anew.
State lies in FAKE_SLURM: `N.state`, `N.tasks` (process groups), `N.requeue`, `N.exit`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ.get("FAKE_SLURM", "."))


def install(folder: Path) -> dict[str, str]:
    """Write the commands into folder/bin; returns the environment that finds them."""
    (folder / "bin").mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel", "scontrol"):
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        command.chmod(0o755)
    return {"FAKE_SLURM": str(folder), "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def sbatch(script: str) -> int:
    text = Path(script).read_text()
    if "--partition=nope" in text:
        print("sbatch: error: invalid partition specified: nope", file=sys.stderr)
        print("sbatch: error: Batch job submission failed: Invalid partition name specified", file=sys.stderr)
        return 1
    number = str(len(list(ROOT.glob("*.state"))) + 1)
    (ROOT / f"{number}.state").write_text("PENDING")
    (ROOT / f"{number}.sh").write_text(text)
    subprocess.Popen(
        [sys.executable, __file__, "daemon", number],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    print(f"Submitted batch job {number}")
    return 0


def daemon(number: str) -> int:
    """Run a job, and again as often as it is requeued."""
    text = (ROOT / f"{number}.sh").read_text()
    nodes = re.search(r"--nodes=(\d+)", text)
    assert nodes is not None
    environ = {"SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": nodes[1], "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    while True:
        (ROOT / f"{number}.state").write_text("RUNNING")
        with open(ROOT / f"{number}.out", "ab") as output:
            command = ["bash", str(ROOT / f"{number}.sh")]
            code = subprocess.run(command, env=os.environ | environ, stdout=output, stderr=output).returncode
        requeued = ROOT / f"{number}.requeue"
        if not requeued.exists():
            break
        requeued.unlink()
    (ROOT / f"{number}.state").write_text("")
    (ROOT / f"{number}.exit").write_text(str(code))
    return 0


def srun(*words: str) -> int:
    """One task per node, all of them here."""
    start = next(i for i, word in enumerate(words) if word.startswith("/") and words[i - 1] != "--output")
    output = words[words.index("--output") + 1]
    number, count = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_JOB_NUM_NODES"])
    tasks = []
    for task in range(count):
        step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": _names(count), "SLURM_STEP_TASKS_PER_NODE": f"1(x{count})"}
        place = {"SLURM_PROCID": str(task), "SLURM_NODEID": str(task), "SLURM_LOCALID": "0", "SLURM_NTASKS": str(count)}
        environ = os.environ | step | place | {"SLURM_JOB_NODELIST": _names(count)}
        with open(output.replace("%j", number).replace("%t", str(task)), "ab") as log:
            tasks.append(subprocess.Popen(words[start:], env=environ, stdout=log, stderr=log, start_new_session=True))
    (ROOT / f"{number}.tasks").write_text(" ".join(str(task.pid) for task in tasks))
    return max(task.wait() % 256 for task in tasks)


def _names(count: int) -> str:
    """Names that a machine without a network knows, all for itself."""
    return ",".join(["localhost"] * count)


def squeue(*words: str) -> int:
    state = ROOT / f"{words[words.index('--jobs') + 1]}.state"
    if not state.exists():
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    print(state.read_text())
    return 0


def scancel(*words: str) -> int:
    asked = next((word.partition("=")[2] for word in words if word.startswith("--signal=")), "")
    if not asked:
        (ROOT / f"{words[-1]}.state").write_text("COMPLETING")
    for group in (ROOT / f"{words[-1]}.tasks").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(group), getattr(signal, f"SIG{asked or 'TERM'}"))
    return 0


def scontrol(verb: str, number: str) -> int:
    assert verb == "requeue"
    (ROOT / f"{number}.requeue").touch()
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
