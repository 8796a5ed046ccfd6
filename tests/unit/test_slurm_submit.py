"""The batch text and what comes before it: every option appears, nothing slips out of its line, errors come first."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vissl_like.config.compose import parse
from vissl_like.config.rules_launch import slurm_problems
from vissl_like.config.schema import Config, Job
from vissl_like.errors import ConfigError
from vissl_like.launch import slurm, slurm_job
from vissl_like.launch.folder import LaunchInfo
from vissl_like.launch.main import main

ROOT = Path(__file__).resolve().parents[2]
CPU = {"DEVICE": "cpu"}
SMALL = ["config=debug/supervised_synthetic", "config.MACHINE.DEVICE=cpu", "config.SLURM.USE_SLURM=true"]


def job(*, machine: dict[str, Any] | None = None, nodes: int = 1, processes: int = 1, **options: Any) -> Job:
    distributed = {"NUM_NODES": nodes, "NUM_PROC_PER_NODE": processes}
    return Job(config=Config(SLURM=options, MACHINE=machine or {}, DISTRIBUTED=distributed))


def flags(text: str) -> dict[str, str]:
    """The options of a batch text, as bash's rules of quoting read them. Repeated ones are an error."""
    words = [shlex.split(line.removeprefix("#SBATCH ")) for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert all(len(word) == 1 for word in words), words
    pairs = [word[0].removeprefix("--").partition("=")[::2] for word in words]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def commands(text: str) -> list[list[str]]:
    """The lines that bash runs, as words."""
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


# ---------------------------------------------------------------------------------------------------------- batch text
def test_every_option_is_in_the_batch_text(tmp_path: Path) -> None:
    wanted = job(
        machine={"DEVICE": "gpu"},
        nodes=4,
        processes=8,
        NAME="rotnet",
        COMMENT="for the paper; 2nd try",
        PARTITION="gpu,big",
        ACCOUNT="vision",
        QOS="high",
        CONSTRAINT="a100|h100",
        TIME_HOURS=48,
        TIME_MINUTES=30,
        MEM_GB=400,
        NUM_CPU_PER_PROC=6,
        SIGNAL_DELAY_S=300,
        LOG_FOLDER=str(tmp_path / "logs"),
        ADDITIONAL_PARAMETERS={"exclude": ["node7", "node9"], "mail-type": "END", "exclusive": True, "nice": 100},
    )
    text = slurm.batch_text(wanted, Path("runs/x"))
    assert flags(text) == {
        "job-name": "rotnet",
        "comment": "for the paper; 2nd try",
        "partition": "gpu,big",
        "account": "vision",
        "qos": "high",
        "constraint": "a100|h100",
        "time": str(48 * 60 + 30),
        "mem": "400GB",
        "nodes": "4",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "cpus-per-task": "48",
        "signal": "USR2@300",
        "output": str(tmp_path / "logs/%j_0_log.out"),
        "open-mode": "append",
        "requeue": "",
        "exclude": "node7,node9",
        "mail-type": "END",
        "exclusive": "",
        "nice": "100",
    }
    *exports, srun = commands(text)
    path = f"PYTHONPATH={ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"
    assert exports == [["export", path], ["export", "SUBMITIT_EXECUTOR=slurm"]]
    assert srun[0] == "srun" and {"--cpus-per-task=48", "--kill-on-bad-exit=0"} <= set(srun)
    assert srun[-5:] == [sys.executable, "-u", "-m", "submitit.core._submit", str(tmp_path / "logs")]


def test_what_is_left_out_is_left_to_the_cluster() -> None:
    named = flags(slurm.batch_text(job(machine=CPU), Path("runs/x")))
    left = {"partition", "account", "qos", "constraint", "comment", "mem", "gpus-per-node", "wckey"}
    assert not left & set(named)
    assert named["job-name"] == "x" and named["time"] == "4320" and named["cpus-per-task"] == "8"


@pytest.mark.parametrize("name", ["gres", "gpus-per-task", "gpus_per_node"])
def test_a_request_for_gpus_of_the_users_own_replaces_ours(name: str) -> None:
    own = job(processes=2, ADDITIONAL_PARAMETERS={name: "gpu:a100:2"})
    named = flags(slurm.batch_text(own, Path("runs/x")))
    assert {key: value for key, value in named.items() if key.startswith("g")} == {name.replace("_", "-"): "gpu:a100:2"}


odd_characters = st.characters(codec="utf-8", exclude_categories=("C", "Z"), include_characters=" '\"$`\\;&|<>#%!*~")
odd = st.text(odd_characters, max_size=30)


@settings(max_examples=60, deadline=None)
@given(comment=odd, name=odd, value=odd)
def test_odd_values_stay_in_their_line(comment: str, name: str, value: str) -> None:
    wanted = job(machine=CPU, COMMENT=comment, NAME=name, ADDITIONAL_PARAMETERS={"reservation": value})
    assert not list(slurm_problems(wanted.config))
    text = slurm.batch_text(wanted, Path("runs/x"))
    plain = slurm.batch_text(job(machine=CPU), Path("runs/x"))
    named = flags(text)
    assert (named.get("comment", ""), named["reservation"]) == (comment, value)
    assert named["job-name"] == (name or "x")
    assert commands(text) == commands(plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"COMMENT": "a\nrm -rf /"}, "config.SLURM.COMMENT='a\\nrm -rf /': must be one line"),
        ({"LOG_FOLDER": "a\tb"}, "config.SLURM.LOG_FOLDER"),
        ({"TIME_HOURS": 0, "TIME_MINUTES": 2}, "the time limit of 2 min"),
        ({"ADDITIONAL_PARAMETERS": {"nodes": 3}}, "this follows from config.DISTRIBUTED.NUM_NODES"),
        ({"ADDITIONAL_PARAMETERS": {"ntasks-per-node": 3}}, "NUM_PROC_PER_NODE"),
        ({"ADDITIONAL_PARAMETERS": {"cpus_per_task": 3}}, "config.SLURM.NUM_CPU_PER_PROC"),
        ({"ADDITIONAL_PARAMETERS": {"--exclude": "a"}}, "without dashes before it"),
        ({"ADDITIONAL_PARAMETERS": {"x y": "a"}}, "must be the long name"),
        ({"ADDITIONAL_PARAMETERS": {"exclude": "a\nb"}}, "must be one line of text"),
        ({"ADDITIONAL_PARAMETERS": {"exclude": ["a\nb"]}}, "must be one line of text"),
        ({"ADDITIONAL_PARAMETERS": {"exclude": {"a": 1}}}, "must be one line of text"),
        ({"ADDITIONAL_PARAMETERS": {"exclusive": False}}, "must be one line of text"),
        ({"ADDITIONAL_PARAMETERS": {"exclude": None}}, "must be one line of text"),
        ({"ADDITIONAL_PARAMETERS": {"exclude": []}}, "must be one line of text"),
    ],
)
def test_what_no_batch_job_can_have(options: dict[str, Any], words: str) -> None:
    problems = list(slurm_problems(Config(SLURM=options)))
    assert len(problems) == 1 and problems[0][1].startswith(problems[0][0]) and words in problems[0][1]


def test_bounds() -> None:
    for options in ({"SIGNAL_DELAY_S": 5}, {"PORT_ID": 70000}, {"MEM_GB": -1}, {"CLUSTER": "pbs"}):
        with pytest.raises(ValidationError):
            Config(SLURM=options)


# --------------------------------------------------------------------------------------------------------- what is run
folders = odd.filter(lambda text: text.strip(" ./") != "").map(lambda text: f"runs/{text}")


@settings(max_examples=60, deadline=None)
@given(folders)
def test_the_job_gets_the_same_folder_whatever_its_name(name: str) -> None:
    info = LaunchInfo("a/b", [], ["config=a/b", "config.RUN.DIR=elsewhere", "config.SEED_VALUE=3"], ["my configs"])
    argv = slurm.argv_for(info, Path(name))
    assert argv[:4] == ["--config-dir", "my configs", "config=a/b", "config.SEED_VALUE=3"] and len(argv) == 5
    request = parse(argv[2:])
    assert not request.problems and request.recipe == "a/b"
    assert {leaf.key: leaf.value for leaf in request.values}["config.RUN.DIR"] == str(Path(name))


def test_waiting_for_a_child_leaves_it_for_others() -> None:
    """A signal's handler waits for the child while the code that it interrupted does, too."""
    child = subprocess.Popen([sys.executable, "-c", "input(); raise SystemExit(7)"], stdin=subprocess.PIPE)
    assert slurm_job._wait(child.pid, seconds=0) is None
    assert child.stdin is not None
    child.stdin.close()
    assert slurm_job._wait(child.pid) == 1  # EOFError
    assert slurm_job._wait(child.pid) == 1 and child.wait() == 1
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    killed.kill()
    assert slurm_job._wait(killed.pid) == 137
    killed.communicate()


def test_the_last_error_of_this_start_is_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: of the start before\n")
    begin = log.stat().st_size
    assert slurm_job._last_error(log, begin) == ""
    with open(log, "ab") as file:
        file.write(b"x" * 100_000 + b"\nerror: first\nerror: second \xff\nmore\n")
    assert slurm_job._last_error(log, begin) == "error: second \ufffd"
    assert slurm_job._last_error(tmp_path / "none", 0) == ""


# ------------------------------------------------------------------------------------------------------- the login node
@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder on a machine without SLURM's commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_"))]:
        monkeypatch.delenv(name)


def test_gpus_must_be_known_before(no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word for word in SMALL if "DEVICE" not in word]) == 2
    assert "a batch job must say how many GPUs it wants" in capsys.readouterr().err


def test_without_slurm_it_says_so(no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: config.SLURM.USE_SLURM=true: this machine has no commands srun and sbatch.")
    assert error.count("\n") == 1 and not os.listdir()


def test_without_submitit_it_says_what_to_install(
    no_slurm: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("submitit", "submitit.slurm.slurm"):
        monkeypatch.setitem(sys.modules, name, None)
    for more in ("config.SLURM.DRY_RUN=false", "config.SLURM.DRY_RUN=true"):
        assert main([*SMALL, more]) == 2
        error = capsys.readouterr().err
        assert "pip install 'vissl_like[slurm]'" in error and error.count("\n") == 1


def test_a_submitit_that_does_not_show_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import submitit.slurm.slurm

    monkeypatch.delattr(submitit.slurm.slurm, "_make_sbatch_string")
    with pytest.raises(ConfigError, match="does not show the batch text"):
        slurm.batch_text(job(machine=CPU), Path("x"))


@pytest.mark.parametrize("dry", ["config.SLURM.DRY_RUN=true", "config.RUN.DRY_RUN=true"])
def test_a_dry_run_shows_the_text_and_leaves_nothing(
    no_slurm: None, dry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, dry, "config.SLURM.PARTITION=gpu"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --partition=gpu\n" in text and "submitit.core._submit" in text and not os.listdir()


def test_a_dry_run_knows_the_processes_of_the_nodes(no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    """On a login node without a GPU, of a job with sixteen."""
    words = [word for word in SMALL if "DEVICE" not in word]
    more = ["config.DISTRIBUTED.NUM_NODES=2", "config.DISTRIBUTED.NUM_PROC_PER_NODE=8", "config.RUN.DRY_RUN=true"]
    assert main([*words, *more]) == 0
    text = capsys.readouterr().out
    assert "16 x 16 processes" in text and "#SBATCH --gpus-per-node=8\n" in text and "--nodes=2\n" in text


def test_a_dry_run_knows_the_nodes_of_every_stage(no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    """GPUs that only the nodes have are no reason to refuse a pipeline on a login node."""
    words = ["config=debug/clusterfit_digits", "config.SLURM.USE_SLURM=true", "config.MACHINE.DEVICE=gpu"]
    more = ["config.DISTRIBUTED.NUM_NODES=2", "config.DISTRIBUTED.NUM_PROC_PER_NODE=4", "config.RUN.DRY_RUN=true"]
    assert main([*words, *more]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=4\n" in text and "student: train" in text and not os.listdir()


def test_a_dry_run_of_several_machines_says_that_a_start_must_know_where_they_meet(
    no_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["config=debug/supervised_synthetic", "config.DISTRIBUTED.NUM_NODES=2"]
    assert main([*words, "config.RUN.DRY_RUN=true"]) == 0
    assert "config.DISTRIBUTED.ENDPOINT" in capsys.readouterr().out
    assert main(words) == 2
    assert "config.DISTRIBUTED.ENDPOINT=''" in capsys.readouterr().err and not os.listdir()
    assert main([*words, "config.RUN.DRY_RUN=true", "config.DISTRIBUTED.ENDPOINT=10.0.0.1:29500"]) == 0


def test_errors_of_the_configuration_come_before_everything(no_slurm: None, capsys: pytest.CaptureFixture[str]) -> None:
    lost = "config.MODEL.WEIGHTS_INIT.PARAMS_FILE=none.pth"
    assert main([*SMALL, lost]) == 3
    assert "no such file" in capsys.readouterr().err
    assert main([*SMALL, "config.SLURM.PARTITON=gpu"]) == 2
    assert "did you mean config.SLURM.PARTITION?" in capsys.readouterr().err
    assert main(["-m", *SMALL, "config.SLURM.TIME_HOURS=0,1"]) == 2
    assert "point 1 of the sweep" in capsys.readouterr().err and not os.listdir()


def test_submitting_needs_no_torch(no_slurm: None) -> None:
    words = [*SMALL, "config.SLURM.DRY_RUN=true"]
    program = "import sys; from vissl_like.launch.main import main; "
    program += f"code = main({words!r}); print(code, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
