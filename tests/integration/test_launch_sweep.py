"""Sweeps: every point checked first, each in its own folder, a ledger, finished points skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.forks import Ended, run_ranks
from vissl_like.config.check import load_sweep
from vissl_like.launch.main import main
from vissl_like.launch.sweep import LEDGER, make_points, read

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOOL = ROOT / "tools/run_distributed_engines.py"
ENDINGS = ["-m", "engine_name=endings", "config.PLUGINS=[launch_plugin]", "config.RUN.REPORT=false", "config.RUN.DIR=s"]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE)


def sweep(*overrides: str) -> Ended:
    """A sweep to its end, each point in a process of its own."""
    (done,) = run_ranks([*ENDINGS, *overrides], cwd=Path.cwd(), env={"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"})
    return done


def test_a_sweep_goes_on_after_a_failure_and_is_taken_up_again() -> None:
    overrides = ["config.SEED_VALUE=2", "config.RUN.NAME=mistake,ok"]
    done = sweep(*overrides)
    assert done.returncode == 3
    lines = read(Path("s") / LEDGER)
    assert [(line["status"], line["exit"]) for line in lines] == [("failed", 3), ("done", 0)]
    assert [line["metrics"].get("seed") for line in lines] == [None, 2]
    assert [line["run_dir"] for line in lines] == ["s/RUN.NAME-mistake", "s/RUN.NAME-ok"]
    assert "config.SEED_VALUE=2" in lines[1]["overrides"]
    assert "error: config.RUN.NAME=mistake: config.DATA: these images are wrong." in done.stderr
    assert done.stdout.count("failed (3)") == 1 and done.stdout.count("done") == 1
    assert json.loads(Path("s/RUN.NAME-ok/results.json").read_text())["seed"] == 2

    again = sweep(*overrides)
    assert again.returncode == 3  # finished points are skipped, failed ones are tried again
    lines = read(Path("s") / LEDGER)
    assert [line["status"] for line in lines] == ["failed", "done", "failed"]
    assert again.stderr.count("finished before") == 1


def test_a_mistake_in_any_point_stops_the_sweep_before_its_first_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ENDINGS, "config.SEED_VALUE=1,-2"]) == 2
    said = capsys.readouterr().err
    assert "error: point 2 of the sweep (config.SEED_VALUE=-2): command line: config.SEED_VALUE=-2: must be" in said
    assert main([*ENDINGS, "config.SEED_VALUE=1,2", "config.LABEL_PATHS=1"]) == 2
    assert main([*ENDINGS, "config.MODEL.WEIGHTS_INIT.PARAMS_FILE=none.pth", "config.SEED_VALUE=1,2"]) == 3
    assert not Path("s").exists()


def test_lost_data_are_named_with_their_point(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("full").mkdir()
    Image.new("RGB", (9, 9)).save("full/a.png")
    given = ["config.DATA.TRAIN.DATA_SOURCES=[disk_folder]", "config.SEED_VALUE=1,2"]
    assert main([*ENDINGS, *given, "config.DATA.TRAIN.DATA_PATHS=[full],[empty],[none]"]) == 3
    lines = capsys.readouterr().err.splitlines()
    where = "points {1} of the sweep (config.DATA.TRAIN.DATA_PATHS=[{0}]): config.DATA.TRAIN.DATA_PATHS.0='{0}': "
    assert lines[0].startswith("error: " + where.format("empty", "2, 5") + "no image in this folder")
    assert lines[1].startswith(where.format("none", "3, 6") + "no such file or folder")
    assert not Path("s").exists()


def test_a_sweep_of_one_run_says_so_and_one_of_twins_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    done = sweep("config.SEED_VALUE=4")
    assert done.returncode == 0
    assert "warning: -m: no key has several values, so this is a sweep of one run." in done.stderr
    assert "Its folder: s/only." in done.stderr and "the only point" in done.stdout
    assert json.loads(Path("s/only/results.json").read_text())["seed"] == 4
    assert main([*ENDINGS, "config.SEED_VALUE=4,5,4"]) == 2
    assert "-m: config.SEED_VALUE=4 is there twice; give each value once." in capsys.readouterr().err


def test_points_have_folders_of_their_own() -> None:
    names = [point.run_dir.name for point in make_points(load_sweep([*ENDINGS[1:], "config.RUN.NAME=a/b,a_b,c"]))]
    assert len(set(names)) == 3 and names[2] == "RUN.NAME-c" and names[0].startswith("RUN.NAME-a_b_")


def test_a_killed_point_does_not_take_the_sweep_with_it() -> None:
    assert sweep("config.RUN.NAME=killed,ok").returncode == 137
    lines = read(Path("s") / LEDGER)
    assert [(line["status"], line["exit"]) for line in lines] == [("failed", 137), ("done", 0)]


def test_a_signal_lets_the_running_point_save_and_starts_no_other() -> None:
    """To the sweep alone, as a scheduler may send it."""
    command = subprocess.Popen(
        [sys.executable, str(TOOL), *ENDINGS, "config.RUN.NAME=stop", "config.SEED_VALUE=1,2"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    listening, deadline = Path("s/SEED_VALUE-1/listening"), time.monotonic() + 150
    while not listening.exists() and command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    command.terminate()
    _, error = command.communicate(timeout=60)
    assert command.returncode == 75, error
    assert "stopped by SIGTERM after step 1." in error and "the other runs of the sweep were not started" in error
    assert [(line["status"], line["exit"]) for line in read(Path("s") / LEDGER)] == [("stopped", 75)]
    assert not Path("s/SEED_VALUE-2").exists()


def test_a_dry_run_of_a_sweep_lists_the_points(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ENDINGS, "config.SEED_VALUE=1,2", "config.RUN.NAME=a,b", "config.RUN.DRY_RUN=true"]) == 0
    text = capsys.readouterr().out
    folders = [f"-> s/SEED_VALUE-{seed}__RUN.NAME-{name}" for seed in (1, 2) for name in ("a", "b")]
    assert [line[line.index("-> ") :].strip() for line in text.splitlines() if "-> s/" in line] == folders
    assert "config.SEED_VALUE=2 config.RUN.NAME=a -> s/" in text and "nothing was started" in text
    assert not Path("s").exists()


def test_a_torn_ledger_line_is_left_out(tmp_path: Path) -> None:
    ledger = tmp_path / LEDGER
    ledger.write_text('{"status": "done"}\n{"status": "do')
    assert read(ledger) == [{"status": "done"}]
