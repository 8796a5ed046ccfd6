"""Starting, refusing, finishing and continuing runs, in this process and through the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vissl_like.launch.main import main

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENDINGS = ["engine_name=endings", "config.PLUGINS=[launch_plugin]", "config.RUN.REPORT=false"]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; the plugin with the test engine can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE)
    return tmp_path


def run(*overrides: str) -> int:
    return main([*ENDINGS, *overrides])


def read(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def command(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/run_distributed_engines.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(HERE), **(env or {})},
    )


# ---------------------------------------------------------------------------------------------------------- the folder
def test_a_run_leaves_the_files_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config.RUN.DIR=runs/a", "config.SEED_VALUE=3") == 0
    folder = Path("runs/a")
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["engine_name"] == "endings" and resolved["config"]["RUN"]["DIR"] == "runs/a"
    assert resolved["config"]["OPTIMIZER"]["NUM_EPOCHS"] == 90  # every option, defaults too
    launch = read("runs/a/launch.json")
    assert launch["recipe"] is None and "config.SEED_VALUE=3" in launch["overrides"] and launch["version"]
    assert read("runs/a/results.json") == {"ranks": 1, "seed": 3, "loss": 0.5}
    manifest = read("runs/a/manifest.json")
    assert manifest["engine"] == "endings" and manifest["complete"] is True and manifest["inputs"] == {}
    assert len(manifest["config_hash"]) == 16 and manifest["seconds"] >= 0 and manifest["finished"]
    assert read("runs/a/plan.json")["values"]["world_size"] == 1
    assert {"python", "packages", "cpu", "gpus", "cores"} <= set(read("runs/a/environment.json"))
    assert "starting endings in runs/a" in (folder / "log.txt").read_text()
    printed = capsys.readouterr()
    assert "results: loss=0.5, ranks=1, seed=3" in printed.out and "MACHINE.DEVICE" in printed.err


def test_the_folder_is_named_after_the_recipe(workplace: Path) -> None:
    page = workplace / "configs/config/mine/page.yaml"
    page.parent.mkdir(parents=True)
    page.write_text(
        "# @package _global_\nengine_name: endings\nconfig: {PLUGINS: [launch_plugin], RUN: {REPORT: false}}\n"
    )
    assert main(["config=mine/page"]) == 0
    assert read("runs/mine/page/launch.json")["recipe"] == "mine/page"
    assert run() == 0
    assert read("runs/endings/manifest.json")["complete"]


def test_environment_variables_are_written_nowhere(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2hunter2")
    assert run("config.RUN.DIR=a") == 0
    for file in (workplace / "a").rglob("*"):
        if file.is_file():
            assert "hunter2" not in file.read_text(errors="replace"), file


def test_a_finished_run_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config.RUN.DIR=a") == 0
    assert run("config.RUN.DIR=a", "config.LOG_FREQUENCY=3") == 0
    assert "this run is finished" in capsys.readouterr().err
    assert len(Path("a/started.txt").read_text().splitlines()) == 1


def test_a_folder_with_another_run_is_refused_key_by_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config.RUN.DIR=a") == 0
    assert run("config.RUN.DIR=a", "config.SEED_VALUE=5", "config.OPTIMIZER.NUM_EPOCHS=4") == 2
    error = capsys.readouterr().err
    assert "config.RUN.DIR='a' holds a run with another configuration:" in error
    assert "  config.SEED_VALUE: there 0, now 5" in error and "  config.OPTIMIZER.NUM_EPOCHS: there 90, now 4" in error
    assert "config.RUN.OVERWRITE=true" in error
    assert read("a/results.json")["seed"] == 0


def test_a_run_that_computed_nothing_does_not_keep_its_folder() -> None:
    assert run("config.RUN.DIR=a", "config.RUN.NAME=mistake") == 3
    assert run("config.RUN.DIR=a", "config.RUN.NAME=", "config.SEED_VALUE=5") == 0
    assert read("a/results.json")["seed"] == 5


def test_the_folder_of_the_images_is_no_run_folder(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = workplace / "images" / "a"
    images.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(images / "1.png")
    data = ["config.DATA.TRAIN.DATA_SOURCES=[disk_folder]", "config.DATA.TRAIN.DATA_PATHS=[images]"]
    assert run("config.RUN.DIR=images", *data) == 2
    assert "this is a folder of images (config.DATA.TRAIN.DATA_PATHS)" in capsys.readouterr().err
    assert os.listdir("images") == ["a"]


def test_another_engine_is_never_taken_for_finished(capsys: pytest.CaptureFixture[str]) -> None:
    data = ["config.DATA.TRAIN.DATA_SOURCES=[synthetic]", "config.RUN.DIR=a", "config.PLUGINS=[launch_plugin]"]
    assert main(["engine_name=endings", "config.RUN.REPORT=false", *data]) == 0
    assert main(["engine_name=train", *data]) == 2
    assert "engine_name: there 'endings', now 'train'" in capsys.readouterr().err


def test_overwrite_starts_anew_and_touches_only_what_runs_write() -> None:
    assert run("config.RUN.DIR=a") == 0
    Path("a/notes.txt").write_text("mine")
    Path("a/checkpoints").mkdir()
    Path("a/train_label_to_index_map.json").write_text("{}")
    assert run("config.RUN.DIR=a", "config.SEED_VALUE=5", "config.RUN.OVERWRITE=true") == 0
    assert read("a/results.json")["seed"] == 5
    assert Path("a/notes.txt").read_text() == "mine" and not Path("a/checkpoints").exists()
    assert not Path("a/train_label_to_index_map.json").exists()


def test_overwrite_removes_nothing_from_a_folder_that_is_no_run() -> None:
    Path("a/checkpoints").mkdir(parents=True)
    assert run("config.RUN.DIR=a", "config.RUN.OVERWRITE=true") == 0
    assert Path("a/checkpoints").is_dir()


def test_an_interrupted_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config.RUN.DIR=a", "config.RUN.NAME=mistake") == 3
    assert not Path("a/manifest.json").exists()
    assert run("config.RUN.DIR=a") == 0  # RUN.NAME does not belong to the identity of a run
    assert "continuing endings in a" in capsys.readouterr().err


def test_inputs_that_changed_since_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = tmp_path / "labels.npy"
    labels.write_bytes(b"one")
    overrides = [
        "config.RUN.DIR=a",
        "config.DATA.TRAIN.DATA_SOURCES=[synthetic]",
        f"config.DATA.TRAIN.LABEL_PATHS=[{labels}]",
    ]
    assert run(*overrides) == 0
    assert list(read("a/manifest.json")["inputs"]) == [str(labels)]
    assert run(*overrides) == 0
    labels.write_bytes(b"two")
    assert run(*overrides) == 3
    assert f"what it was made from has changed since: {labels}" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vissl_like.launch import folder

    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (workplace / "a").mkdir()
    folder.write_json(workplace / "a/.running", folder._identity(other.pid))
    assert run("config.RUN.DIR=a") == 2
    assert f"another run is going on in this folder (process {other.pid})" in capsys.readouterr().err
    other.communicate(b"\n")
    assert run("config.RUN.DIR=a") == 0  # the mark of a process that has ended means nothing
    assert not (workplace / "a/.running").exists()


MEANWHILE = """
import sys, time
from pathlib import Path
from vissl_like.errors import ConfigError
from vissl_like.launch import folder

write = folder.write_json

def write_late(*arguments):
    time.sleep(0.5)
    write(*arguments)

folder.write_json = write_late
print("ready", flush=True)
input()
try:
    with folder.occupied(Path("a")):
        print("in", flush=True)
        input()
except ConfigError as error:
    print(error, flush=True)
"""


def test_of_two_starts_in_the_same_moment_one_gets_the_folder(workplace: Path) -> None:
    """Both once looked before either had marked it."""
    (workplace / "a").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", MEANWHILE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment,
        )
        for _ in range(2)
    ]  # fmt: skip
    streams = [(one.stdin, one.stdout) for one in both if one.stdin is not None and one.stdout is not None]
    assert [said.readline() for _, said in streams] == ["ready\n"] * 2
    for told, _ in streams:
        told.write("\n")
    answers = [said.readline() for _, said in streams]
    winner = answers.index("in\n")
    assert f"another run is going on in this folder (process {both[winner].pid})" in answers[1 - winner]
    for one in both:
        one.communicate("\n")
    assert not (workplace / "a/.running").exists()


def test_the_mark_of_another_machine_stays(workplace: Path) -> None:
    """A job that is queued again may begin elsewhere while this process is still ending."""
    from vissl_like.launch import folder

    elsewhere = {"pid": os.getpid(), "host": "another machine"}
    with folder.occupied(workplace):
        folder.write_json(workplace / ".running", elsewhere)
    assert folder.read_json(workplace / ".running") == elsewhere


def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("x")
    assert run("config.RUN.DIR=file") == 2
    assert run("config.RUN.DIR=file/below") == 2
    assert "config.RUN.DIR='file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- endings
def test_a_mistake_and_a_defect_inside_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config.RUN.DIR=a", "config.RUN.NAME=mistake") == 3
    assert capsys.readouterr().err.endswith("error: config.DATA: these images are wrong.\n")
    assert run("config.RUN.DIR=b", "config.RUN.NAME=defect") == 1
    error = capsys.readouterr().err
    assert "error: ZeroDivisionError: oops (" in error and "launch_plugin.py:" in error and "Traceback" not in error
    assert "Traceback" in Path("b/log.txt").read_text()


def test_what_this_machine_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if not torch.cuda.is_available():
        assert run("config.MACHINE.DEVICE=gpu") == 2
        assert "config.MACHINE.DEVICE='gpu': PyTorch finds no GPU" in capsys.readouterr().err
    assert run("config.DISTRIBUTED.NUM_NODES=4", "config.MACHINE.DEVICE=cpu") == 2
    assert "config.DISTRIBUTED.NUM_NODES=4 machines need a place to meet" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_lost_files_are_reported_before_anything_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config.MODEL.WEIGHTS_INIT.PARAMS_FILE=/no/such.pth") == 3
    assert "config.MODEL.WEIGHTS_INIT.PARAMS_FILE='/no/such.pth': no such file" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_wrong_arguments_of_transforms_are_reported_once_and_before_anything_is_made(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = "config.DATA.TRAIN.TRANSFORMS=[{name: Resize, sise: 28}, {name: ColorJitter, hue: 7}, {name: ToTensor}]"
    assert main(["config=debug/supervised_synthetic", wrong, "config.DISTRIBUTED.NUM_PROC_PER_NODE=2"]) == 2
    text = capsys.readouterr().err
    assert text.count("TRANSFORMS.0.sise: unknown argument; did you mean 'size'?") == 1
    assert "TRANSFORMS.1: ColorJitter does not take these values" in text and "rank" not in text
    assert not Path("runs").exists()


def test_old_names_of_keys_are_noted_on_the_terminal_and_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config.OPTIMIZER.num_epochs=0") == 0
    note = "OPTIMIZER.num_epochs"
    assert capsys.readouterr().err.count(note) == 1
    [log] = Path("runs").rglob("log.txt")
    assert log.read_text().count(note) == 1


# ------------------------------------------------------------------------------------------------------------- dry run
def test_a_dry_run_tells_everything_and_makes_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["config=debug/supervised_synthetic", "config.RUN.DRY_RUN=true", "config.OPTIMIZER.ACCUMULATE_STEPS=2"]
    assert main(overrides) == 0
    text = capsys.readouterr().out
    assert "folder runs/debug/supervised_synthetic: new" in text
    assert "images per optimizer step" in text and "16 x 1 process x 2 accumulated" in text
    assert "64 images / 32" in text and "2 x 2 epochs" in text
    assert "TRAIN: 64 images, 4 classes, tensors 3x28x28" in text
    assert "trunk resnet_small: 78,160 parameters" in text and "heads: 260 parameters in 1" in text
    assert "gradients: 0.3 MB" in text and "activations" in text
    assert "nothing was started, nothing was written" in text
    assert list(workplace.iterdir()) == []


def test_a_dry_run_for_several_machines(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["config=debug/supervised_synthetic", "config.RUN.DRY_RUN=true", "config.DISTRIBUTED.NUM_NODES=2"]
    assert main([*overrides, "config.DISTRIBUTED.NUM_PROC_PER_NODE=2", "config.MACHINE.DEVICE=cpu"]) == 0
    shown = capsys.readouterr().out
    assert "16 x 4 processes" in shown and "config.DISTRIBUTED.ENDPOINT=HOST:PORT" in shown
    assert main([*overrides, "config.DISTRIBUTED.ENDPOINT=nowhere"]) == 2


def test_a_dry_run_finds_the_same_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["config=debug/supervised_synthetic", "config.RUN.DRY_RUN=true"]
    assert main([*base, "config.MODEL.HEAD.PARAMS=[[mlp,{dims: [5, 4]}]]"]) == 2
    assert main([*base, "config.DATA.TRAIN.TRANSFORMS=[{name: Resize, sise: 3}]"]) == 2
    assert "sise" in capsys.readouterr().err


def test_a_dry_run_of_a_pipeline_lists_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config=debug/clusterfit_digits", "config.RUN.DRY_RUN=true"]) == 0
    text = capsys.readouterr().out
    assert "clusters: cluster_features of this page, after teacher (to do)" in text
    assert "20 classes from runs/debug/clusterfit_digits/clusters/clusters/labels.npy" in text
    assert "heads: 1,300 parameters in 1" in text  # of the student: 64 x 20 + 20
    wrong = "config.PIPELINE.STAGES.2.CONFIG.MODEL.HEAD.PARAMS=[[mlp,{dims: [5, 20]}]]"
    assert main(["config=debug/clusterfit_digits", "config.RUN.DRY_RUN=true", wrong]) == 2
    assert "stage 'student': config.MODEL.HEAD.PARAMS[0]" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ questions
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["config=a/b", "Exit codes", "list WORD"]),
        (["--version"], ["vissl_like "]),
        (["options", "config.OPTIMIZER.NUM_EPOCHS"], ["a whole number", "90", "at least 0", "Epochs of training."]),
        (["options", "OPTIMIZER.NUM_EPOCHS"], ["config.OPTIMIZER.NUM_EPOCHS"]),
        (["options", "LINEAR_PROBE"], ["STANDARDIZE", "[true]"]),
        (["options"], ["WEIGHTS", "OPTIMIZER"][1:]),
        (["list", "recipes"], ["debug/supervised_synthetic", "Supervised training on drawn images"]),
        (["list", "losses"], ["cross_entropy"]),
        (["list", "weight_presets"], ["moco"]),
        (["--shell-completion", "bash"], ["complete -o default -F _vissl_like vissl-like"]),
        (["--shell-completion=zsh"], ["#compdef"]),
        (["--shell-completion", "fish"], ["complete -c vissl-like"]),
        (["--complete", "config.OPTIMIZER.NUM"], ["config.OPTIMIZER.NUM_EPOCHS="]),
        (["--complete", "config=pretrain/rot"], ["config=pretrain/rotnet/"]),
        (["--complete", "config.MACHINE.DEVICE=g"], ["config.MACHINE.DEVICE=gpu"]),
        (["--complete", "config.LOSS.NAME="], ["config.LOSS.NAME=cross_entropy"]),
        (["--complete", "list", "rec"], ["recipes"]),
        (["--complete", "options", "config.RUN.D"], ["config.RUN.DIR"]),
        (["--complete", "opt"], ["options"]),
    ],
)  # fmt: skip
def test_questions(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert all(word in printed.out for word in words) and not printed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage: vissl-like config=RECIPE"),
        (["optoins"], "did you mean `options`?"),
        (["debug/supervised_synthetic"], "did you mean config=debug/supervised_synthetic?"),
        (["config.SEED_VALUE"], "an override needs a value"),
        (["--multrun"], "did you mean --multirun?"),
        (["--config-dir"], "--config-dir needs a value"),
        (["--shell-completion", "tcsh"], "known shells are bash, zsh, fish"),
        (["list", "recipe"], "did you mean recipes?"),
        (["list"], "list: say what"),
        (["options", "OPTIMIZER.NUM_EPOCH"], "did you mean config.OPTIMIZER.NUM_EPOCHS?"),
        (["report", "nowhere"], "not a run folder"),
        (["report"], "give one run folder"),
    ],
)
def test_questions_that_are_not_understood(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_every_completed_key_is_an_option() -> None:
    from vissl_like.config import reference
    from vissl_like.launch.completion import complete

    open_words, seen = ["config."], []
    while open_words:
        for word in complete([open_words.pop()]):
            (open_words if word.endswith(".") else seen).append(word)
    assert set(seen) == {
        f"{entry.key}=" for entry in reference.entries().values()
        if not entry.is_section and "*" not in entry.key and entry.key != "engine_name"
    }  # fmt: skip


def test_report_is_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config.RUN.DIR=a") == 0
    assert not Path("a/report.html").exists()
    assert main(["report", "a"]) == 0
    assert Path("a/report.html").stat().st_size > 1000 and "wrote a/report.html" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- the command
def test_the_command_from_another_folder_with_own_recipes(workplace: Path) -> None:
    page = workplace / "pages/config/mine/page.yaml"
    page.parent.mkdir(parents=True)
    page.write_text(
        "# @package _global_\nengine_name: endings\nconfig: {PLUGINS: [launch_plugin], RUN: {REPORT: false}}\n"
    )
    done = command("--config-dir", "pages", "config=mine/page", "hydra.verbose=true")
    assert done.returncode == 0, done.stderr
    assert read("runs/mine/page/results.json")["ranks"] == 1
    assert read("runs/mine/page/launch.json")["config_dirs"] == ["pages"]


def test_a_plugin_of_the_working_directory(workplace: Path) -> None:
    (workplace / "my_plugin.py").write_text(
        (HERE / "launch_plugin.py").read_text().replace("launch_plugin", "my_plugin")
    )
    done = command(
        "engine_name=endings", "config.PLUGINS=[my_plugin]", "config.RUN.REPORT=false", env={"PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr


def test_a_pipe_that_closes_early_is_no_error() -> None:
    text = f"{sys.executable} {ROOT / 'tools/run_distributed_engines.py'} list transforms | head -1"
    done = subprocess.run(text, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr
