"""report.html: self-contained, complete, honest about what is missing, and safe against any text in the run folder."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vissl_like.config.schema import Job
from vissl_like.config.schema_parts import PartMaps
from vissl_like.outputs import figures
from vissl_like.outputs.part_figures import save_part_maps
from vissl_like.outputs.report import write_report
from vissl_like.outputs.report_sections import headline_keys, lines_of
from vissl_like.outputs.run_folder import RunFolder, flatten


class Page(HTMLParser):
    """A page taken apart: the text, the attributes of every tag, and whether the tags nest."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.tags, self.open = [], [], []
        self.html = path.read_text("utf-8")
        self.feed(self.html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attrs[name] for found, attrs in self.tags if found == tag and name in attrs]

    @property
    def headings(self) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", self.html)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_run(run_dir: Path, *, engine: str = "train", steps: int = 12, **config: object) -> Path:
    """A folder with what a short, finished training leaves behind; `steps` 0: nothing that takes time to draw."""
    job = Job.model_validate({"engine_name": engine, "config": config}).model_dump(mode="json")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(job))
    launch = {
        "recipe": "debug/x",
        "presets": [],
        "overrides": ["config.SEED_VALUE=3", "config.RUN.DIR=a b"],
        "version": "1",
    }
    write_json(run_dir / "launch.json", launch)
    write_json(run_dir / "results.json", {"test_top_1": 93.25, "train_loss": 0.5, "labels": list(range(40))})
    write_json(run_dir / "manifest.json", {"complete": True, "seconds": 83.0, "finished": "2026-01-02T03:04:05"})
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {
                "kind": "train",
                "step": step,
                "epoch": step / 6,
                "loss": 1 / step,
                "lr": 0.1,
                "images_per_s": 100.0,
            }
            file.write(json.dumps(line) + "\n")
        for step in (steps // 2, steps) if steps else ():
            file.write(json.dumps({"kind": "test", "step": step, "epoch": step / 6, "test_top_1": 93.25}) + "\n")
    return run_dir


def test_a_finished_run_has_every_section(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "my run", SEED_VALUE=3)
    row = {"key": "LR", "given": "0.1", "used": "0.2", "reason": "batch 512 / 256"}
    write_json(run_dir / "plan.json", {"values": {}, "rows": [row], "warnings": ["one step is dropped"]})
    write_json(run_dir / "environment.json", {"python": "3.11", "host": {"cores": 2}})
    (run_dir / "bad_images.txt").write_text("a/b.jpg\ttruncated file\n")
    page = Page(write_report(run_dir))
    assert page.headings == ["Results", "Curves", "Configuration", "Inferred values", "Bad images", "Environment"]
    text = " ".join(page.text)
    for expected in (
        "93.25",
        "finished",
        "1:23 min",
        "2026-01-02 03:04",
        "batch 512 / 256",
        "truncated file",
        "host.cores",
    ):
        assert expected in text
    assert "vissl-like config=debug/x config.SEED_VALUE=3 'config.RUN.DIR=a b'" in text


def test_one_test_at_the_end_is_no_curve(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=2)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[-1]]) + "\n")
    write_report(run_dir)
    assert (run_dir / "figures/loss.png").exists() and not (run_dir / "figures/test.png").exists()


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)))
    images = page.attributes("img", "src")
    assert len(images) == 4  # loss, test, lr, throughput
    for source in images:
        data = source.removeprefix("data:image/png;base64,")
        assert Image.open(io.BytesIO(base64.b64decode(data, validate=True))).width > 500
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|@import|url\(", page.html)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "loss.png",
        "test.png",
        "lr.png",
        "images_per_s.png",
    }


def test_the_terms_of_a_loss_have_a_chart(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    names = ("tv", "presence", "orth", "equiv", "classification", "classification_stage_1")
    terms = [
        {"kind": "train", "step": s, "epoch": s / 4, "loss": 6 / s} | {f"loss_{name}": 1 / s for name in names}
        for s in range(1, 9)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in terms))
    page = Page(write_report(run_dir))
    assert "Terms of the loss of training steps, with their weights." in page.text
    chart = np.asarray(Image.open(run_dir / "figures" / "loss_terms.png").convert("RGB")).reshape(-1, 3)
    for colour in figures.COLOURS[: len(names)]:
        assert (chart == tuple(bytes.fromhex(colour[1:]))).all(axis=1).any(), colour


def test_only_the_folder_is_touched_and_twice_gives_the_same(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("name", ["results.json", "launch.json", "metrics.jsonl", "config.yaml", "plan.json"])
def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path: Path, name: str) -> None:
    run_dir = make_run(tmp_path)
    (run_dir / name).write_text('{"a: [')
    page = Page(write_report(run_dir))
    damaged = [line for line in page.text if line.startswith(f"{name}: ")]
    assert bool(damaged) == (name != "metrics.jsonl")  # a torn last line is normal there


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert page.headings == []
    assert "not finished" in page.text


def test_the_state_of_a_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    assert RunFolder(run_dir).status == ("good", "finished")
    (run_dir / "manifest.json").unlink()
    (run_dir / "results.json").unlink()
    assert RunFolder(run_dir).status == ("open", "not finished (last recorded step 12)")
    (run_dir / "replay").mkdir()
    assert RunFolder(run_dir).status == ("bad", "stopped: the loss was not finite")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.just("<script>alert(1)</script>\"'&"))
def test_any_text_is_shown_as_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"engine_name": text, "config": {"RUN": {"NAME": text}}}))
    write_json(tmp_path / "launch.json", {"recipe": text, "presets": [], "overrides": [f"{text}=1"], "version": text})
    write_json(tmp_path / "results.json", {text: text, text + "_top_1": 1.5})
    write_json(tmp_path / "table.json", {"title": text, "columns": ["", text], "rows": [[text, 3.25]], "notes": [text]})
    page = Page(write_report(tmp_path))
    assert {tag for tag, _ in page.tags} <= ALLOWED_TAGS
    if text.strip() == text and "\r" not in text and "\x00" not in text:
        assert text in " ".join(page.text)


ALLOWED_TAGS = frozenset(
    "html head meta title style body main header p h1 span pre nav a section h2 h3 div table tr th td details summary "
    "footer code b".split()
)


def test_a_pipeline_shows_its_table_and_its_stages(tmp_path: Path) -> None:
    run_dir = make_run(
        tmp_path, steps=0, engine="pipeline", PIPELINE={"STAGES": [{"NAME": "teacher"}, {"NAME": "later"}]}
    )
    write_report(make_run(run_dir / "teacher", steps=0))
    table = {"columns": ["", "linear"], "rows": [["raw <pixels>", 90.5], ["teacher", None]], "notes": ["One seed."]}
    write_json(run_dir / "table.json", table)
    page = Page(write_report(run_dir))
    assert page.headings[:3] == ["Summary", "Stages", "Results"]
    assert page.attributes("a", "href")[-1] == "teacher/report.html"
    assert (run_dir / page.attributes("a", "href")[-1]).is_file()
    text = " ".join(page.text)
    assert "raw <pixels>" in text and "90.5" in text and "–" in text and "One seed." in text
    assert "--share:90.5%" in page.html


def test_a_stage_says_whose_stage_it_is(tmp_path: Path) -> None:
    stage = {"NAME": "clusters", "RECIPE": "a/b", "CONFIG": {"CLUSTERFIT": {"NUM_CLUSTERS": 3}}}
    run_dir = make_run(tmp_path / "chain", steps=0, engine="pipeline", PIPELINE={"STAGES": [stage]})
    make_clusters(make_run(run_dir / "clusters", steps=0, engine="cluster_features"), labels=np.full(30, -1))
    page = Page(write_report(run_dir / "clusters"))
    assert "../report.html" in page.attributes("a", "href")
    text = " ".join(page.text)
    assert "A stage of  chain" in text and "vissl-like config=" not in text
    assert "config.CLUSTERFIT.NUM_CLUSTERS" in text and "config.SEED_VALUE" not in text
    assert "Clusters" in Page(write_report(run_dir)).headings


@pytest.mark.parametrize(
    ("launch", "command"),
    [
        ({"recipe": "a/b", "overrides": ["config.X=[1,2]"]}, "vissl-like config=a/b 'config.X=[1,2]'"),
        (
            {"recipe": "a/b", "overrides": ["config=a/b", "+config/a/m=c"], "config_dirs": ["my dir"]},
            "vissl-like '--config-dir=my dir' config=a/b +config/a/m=c",
        ),
        ({"recipe": None, "overrides": ["config.X=1"]}, ""),
    ],
)
def test_the_command_is_ready_for_a_shell(tmp_path: Path, launch: dict, command: str) -> None:
    write_json(tmp_path / "launch.json", launch)
    assert RunFolder(tmp_path).command_line == command


def make_clusters(run_dir: Path, *, labels: np.ndarray, images: int = 6) -> None:
    """What cluster_features leaves for the report: three clusters of 20, 10 and 0 images."""
    random = np.random.default_rng(0)
    kmeans = {
        "num_clusters": 3,
        "rows": 30,
        "sizes": [20, 10, 0],
        "empty": [2],
        "backend": "torch",
        "objective": [3.0, 2.0],
    }
    write_json(run_dir / "clusters" / "kmeans.json", kmeans)
    np.savez(
        run_dir / "clusters" / "report.npz",
        sizes=np.array([20, 10, 0]),
        montage_images=random.integers(0, 255, (images, 64, 64, 3), dtype=np.uint8),
        montage_cluster=np.array([1, 1, 0, 0, 0, 0])[:images],
        projection=random.normal(size=(30, 2)).astype(np.float32),
        projection_label=labels,
        projection_cluster=np.arange(30) % 2,
    )


@pytest.mark.parametrize("is_labelled", [True, False])
def test_clusters_are_shown(tmp_path: Path, is_labelled: bool) -> None:
    run_dir = make_run(tmp_path, steps=0, engine="cluster_features")
    make_clusters(run_dir, labels=np.arange(30) % 3 if is_labelled else np.full(30, -1))
    write_json(run_dir / "results.json", {"nmi": 46.55, "num_clusters": 3} if is_labelled else {"num_clusters": 3})
    page = Page(write_report(run_dir))
    text = " ".join(page.text)
    assert "Clusters" in page.headings
    assert "0 / 10 / 20" in text and "empty clusters" in text
    assert ("NMI with the classes" in text) == is_labelled
    assert ("coloured by class" in text) == is_labelled
    sheet = Image.open(run_dir / "figures" / "cluster_montage.png")
    assert sheet.size == (108 + 4 * 68, 2 * 68 + 4)  # two clusters, at most four images


def test_clusters_without_images_have_no_montage(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=0)
    make_clusters(run_dir, labels=np.full(30, -1), images=0)
    assert "Clusters" in Page(write_report(run_dir)).headings
    assert not (run_dir / "figures" / "cluster_montage.png").exists()


def test_evaluation_has_a_row_per_layer_and_protocol(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=0, engine="evaluate")
    values = {"linear_top1_res4": 91.5, "linear_top5_res4": 99.0, "linear_total_res4": 1200, "linear_c_res4": 0.1}
    write_json(run_dir / "results.json", values | {"knn_20_top1": 80.25, "low_shot_10_top1_res4": 70.0})
    text = " ".join(Page(write_report(run_dir)).text)
    assert "knn 20" in text and "linear res4" in text and "low shot 10 res4" in text
    assert "80.2" in text and "1200" in text


def test_weights_are_listed(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=0)
    tensor = {"status": "remapped", "model": "trunk.a", "file": "module.a", "model_shape": [3, 4], "file_shape": [3, 4]}
    share = {"loaded": 12, "total": 12, "share": 1.0}
    report = {"source": "w.pth", "trunk": share, "heads": {"loaded": 0, "total": 0, "share": 1.0}}
    write_json(
        run_dir / "weights_report.json", report | {"counts": {"remapped": 1}, "notes": ["n"], "tensors": [tensor]}
    )
    text = " ".join(Page(write_report(run_dir)).text)
    assert "100.0 %" in text and "module.a" in text and "3 × 4" in text and "w.pth" in text
    write_json(run_dir / "weights_report.json", {"source": "", "notes": []})
    assert "Randomly initialised" in " ".join(Page(write_report(run_dir)).text)


def test_headline_metrics_come_first_and_training_does_not() -> None:
    values = {
        "train_top_1": 99.0,
        "loss": 1.0,
        "a/knn_top1": 2.0,
        "nmi": 3.0,
        "test_top_1": 1.0,
        "name": "x",
        "flag": True,
    }
    assert headline_keys(values) == ["test_top_1", "a/knn_top1", "nmi"]


def test_lines_skip_what_is_no_number() -> None:
    records = [{"step": 1, "a": 2.0, "b": "x"}, {"step": 2, "a": float("nan"), "list": [1]}]
    lines = lines_of(records, x="step", take=lambda key: True)
    assert list(lines) == ["a"]
    assert lines["a"][0] == [1, 2] and np.isnan(lines["a"][1][1])


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


# ------------------------------------------------------------------------------------------------------------- parts
def draw_parts(run_dir: Path, *, epoch: int, batch: int) -> None:
    maps = torch.softmax(torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(epoch)), dim=1)
    images = np.full((2, 12, 12, 3), 80, np.uint8)
    save_part_maps(run_dir, images, maps, rows=[3, 4], epoch=epoch, batch=batch, options=PartMaps())


def test_parts_show_the_newest_maps_and_what_they_are_worth(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "eval", steps=0, engine="evaluate_parts")
    found = {
        "nmi": 47.25,
        "random_nmi": 11.0,
        "oracle_nmi": 95.5,
        "keypoint_error": 6.5,
        "keypoint_error_of_mean": 9.75,
    }
    write_json(run_dir / "results.json", {**found, "foreground_iou": 61.0, "epoch0_foreground_iou": 44.0})
    for epoch, batch in ((1, 0), (10, 0), (10, 2), (10, 5), (10, 9)):
        draw_parts(run_dir, epoch=epoch, batch=batch)
    (run_dir / "part_maps" / "0011_00000.jpg").write_bytes(b"without its index")
    page = Page(write_report(run_dir))
    assert page.headings[0] == "Parts"
    block = page.html[page.html.index('id="parts"') : page.html.index('id="results"')]
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", block)
    files = [f"{name}.jpg" for name in ("0010_00000", "0010_00002", "0010_00005", "0001_00000")]
    assert [base64.b64decode(data) for data in pictures] == [
        (run_dir / "part_maps" / name).read_bytes() for name in files
    ]
    assert "After epoch 10, test batch 2: " in block and "1 more in" in block and "how it began" in block
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", block)]
    assert cells[0] == ["", "this model", "before training", "random maps", "annotated parts", "mean position"]
    assert cells[1][1:] == ["47.2", "–", "11.0", "95.5", "–"]
    assert cells[2] == ["keypoint error, % of the box\N{NO-BREAK SPACE}↓", "6.5", "–", "–", "–", "9.8"]
    assert cells[3] == ["foreground IoU\N{NO-BREAK SPACE}↑", "61.0", "44.0", "–", "–", "–"]


def test_what_each_part_is_worth_to_stage_2(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "eval", steps=0, engine="evaluate_parts")
    found = {"test_top_1": 80.0, "test_worst_group": 60.0, "without_0_top_1": 71.5, "without_0_worst_group": 40.0}
    write_json(run_dir / "results.json", {**found, "without_1_0_top_1": 85.0, "without_1_0_top_1_stage_1": 1.0})
    page = Page(write_report(run_dir))
    block = page.html[page.html.index('id="parts"') : page.html.index('id="results"')]
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", block)]
    assert cells == [
        ["parts in the mask", "top 1", "change", "worst group"],
        ["all parts", "80.0", "–", "60.0"],
        ["without 0", "71.5", "-8.5", "40.0"],
        ["without 1, 0", "85.0", "5.0", "–"],
    ]


def test_a_pipelines_parts_are_those_of_its_last_stages(tmp_path: Path) -> None:
    stages = {"STAGES": [{"NAME": "train"}, {"NAME": "measure_epoch_0"}, {"NAME": "measure"}]}
    run_dir = make_run(tmp_path / "whole", steps=0, engine="pipeline", PIPELINE=stages)
    draw_parts(make_run(run_dir / "train", steps=0), epoch=8, batch=0)
    before, measured = (
        make_run(run_dir / name, steps=0, engine="evaluate_parts") for name in ("measure_epoch_0", "measure")
    )
    write_json(before / "results.json", {"ari": 21.0})
    write_json(measured / "results.json", {"ari": 30.0, "test_top_1": 55.0, "test_macro_top_1": 54.0})
    page = Page(write_report(run_dir))
    assert "Parts" in page.headings and "After epoch 8" in page.html
    block = page.html[page.html.index('id="parts"') : page.html.index('id="results"')]
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", block)]
    assert cells[0] == ["", "this model", "before training"] and cells[1][1:] == ["30.0", "21.0"]
    cards = page.html[page.html.index('id="stages"') : page.html.index('id="parts"')]
    assert "test top 1 <b>55.00</b>" in cards and "ari <b>30.00</b>" in cards and "macro" not in cards


def test_an_nmi_of_clusters_is_none_of_parts(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, steps=0, engine="cluster_features")
    write_json(run_dir / "results.json", {"nmi": 50.0, "ari": 30.0, "purity": 60.0})
    assert "Parts" not in Page(write_report(run_dir)).headings
