"""Finished runs read back: models that give the logits of training, exports that load elsewhere and come back whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml

from vissl_like.api import export_state_dict, load_model, load_run
from vissl_like.config.schema import Job
from vissl_like.core.saving import Saver
from vissl_like.core.weights import load_initial_weights
from vissl_like.errors import ConfigError, DataError, WeightsError
from vissl_like.models.vision_model import VisionModel
from vissl_like.models.zoo import build_model

IMAGES = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def job(**model: Any) -> Job:
    return Job.model_validate({"config": {"MODEL": {"TRUNK": {"NAME": "resnet_small"}, **model}}})


def trained(section: Any, *, num_classes: int = 4, size: int = 28) -> VisionModel:
    """A model whose weights and statistics have moved."""
    torch.manual_seed(0)
    model = build_model(section, num_classes=num_classes, image_size=size).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(output.square().mean() for output in model(torch.randn(4, 3, size, size))).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, VisionModel]:
    """A run folder with one checkpoint, and the model that was saved in it."""
    settings = job(HEAD={"PARAMS": [["mlp", {"dims": ["auto", 16, "auto"], "use_bn": True, "use_relu": True}]]})
    model = trained(settings.config.MODEL)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    average = {key: value + 1 for key, value in model.state_dict().items()}
    saver = Saver(tmp_path, keep=1)
    saver.save(step=7, model_state=model.state_dict(), training_state={"step": 7}, ema_state=average)
    saver.mark_best(7)
    saver.finish()
    return tmp_path, model


def test_loaded_model_gives_the_logits_of_training(run: tuple[Path, VisionModel]) -> None:
    folder, model = run
    with torch.no_grad():
        expected = model(IMAGES)[0]
        for source in (folder, folder / "checkpoints" / "best", folder / "checkpoints/last/model.safetensors"):
            again = load_model(source)
            assert not again.training
            assert torch.equal(again(IMAGES)[0], expected)
    average = load_model(folder, averaged=True)
    assert torch.equal(average.heads[0].clf[0].bias, model.heads[0].clf[0].bias + 1)


def test_a_run_initialises_another_model(run: tuple[Path, VisionModel]) -> None:
    """Run folders, checkpoint folders and model.safetensors are weights files without any prefix option."""
    folder, model = run
    for source in (folder, folder / "checkpoints/best", folder / "checkpoints/last/model.safetensors"):
        options = job(
            WEIGHTS_INIT={"PARAMS_FILE": str(source), "SKIP_LAYERS": ["heads"], "MIN_LOADED": 1.0}
        ).config.MODEL
        other = build_model(options, num_classes=9)
        report = load_initial_weights(other, options.WEIGHTS_INIT, feature_eval=options.FEATURE_EVAL_SETTINGS)
        assert report.trunk.value == 1.0
        states = (other.trunk.state_dict(), model.trunk.state_dict())
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_load_run(run: tuple[Path, VisionModel]) -> None:
    folder, _ = run
    (folder / "results.json").write_text('{"test_top_1": 93.5}')
    lines = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "test", "step": 1, "test_top_1": 93.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = load_run(folder)
    assert read.engine_name == "train" and read.config.MODEL.TRUNK.NAME == "resnet_small"
    assert read.results == {"test_top_1": 93.5}
    assert read.metrics() == lines and read.metrics("test") == lines[1:]
    assert isinstance(read.model(), VisionModel)


def test_wrong_folders(run: tuple[Path, VisionModel], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, _ = run
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(WeightsError, match="there is no such run or checkpoint"):
        load_model(empty / "absent")
    with pytest.raises(WeightsError, match=r"no config.yaml here or above it"):
        load_model(empty)
    with pytest.raises(DataError, match="not a run folder"):
        load_run(empty)
    (folder / "config.yaml").write_text(
        yaml.safe_dump(job(TRUNK={"NAME": "resnet_small", "OPTIONS": {"widths": [4]}}).model_dump())
    )
    with pytest.raises(WeightsError, match="the weights do not belong to the model in"):
        load_model(folder)
    (folder / "config.yaml").write_text("config: {MODLE: 1}")
    with pytest.raises(DataError, match="not a configuration of this version"):
        load_run(folder)


RESNET = {"TRUNK": {"NAME": "resnet", "RESNETS": {"DEPTH": 18}}}


@pytest.mark.parametrize("names", ["torchvision", "timm", "vissl"])
def test_export_round_trip(names: Any, tmp_path: Path) -> None:
    """Our ResNet-18 under the names of torchvision, timm and VISSL: it loads there, works there, and comes back whole."""
    model = trained(job(**RESNET).config.MODEL, size=32)
    exported = export_state_dict(model, names=names)
    images = torch.randn(2, 3, 32, 32)
    if names != "vissl":
        make = torchvision.models.resnet18 if names == "torchvision" else timm.models.resnet18
        other = make(num_classes=4).eval()
        other.load_state_dict(exported)
        with torch.no_grad():
            torch.testing.assert_close(other(images), model(images)[0])
        exported = other.state_dict()
    torch.save(exported, tmp_path / "w.pth")
    preset = "vissl_resnet" if names == "vissl" else "torchvision_resnet_head"
    weights = {"PARAMS_FILE": str(tmp_path / "w.pth"), "PRESET": preset, "MIN_LOADED": 1.0, "SKIP_LAYERS": []}
    options = job(WEIGHTS_INIT=weights, **RESNET).config.MODEL
    again = build_model(options, num_classes=4)
    report = load_initial_weights(again, options.WEIGHTS_INIT, feature_eval=options.FEATURE_EVAL_SETTINGS)
    assert report.trunk.value == report.heads.value == 1.0
    assert report.count(*[row.status for row in report.rows]) == len(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_export_of_library_models() -> None:
    for name, library, classifier in (
        ("timm/efficientnet_lite0", "timm", "classifier"),
        ("torchvision/vit_b_16", "torchvision", "heads.head"),
    ):
        with torch.device("meta"):
            model = build_model(job(TRUNK={"NAME": name}).config.MODEL, num_classes=5)
            make = timm.create_model if library == "timm" else torchvision.models.get_model
            expected = make(name.partition("/")[2], num_classes=5).state_dict()
        exported = export_state_dict(model, names=library)  # type: ignore[arg-type]
        assert {key: value.shape for key, value in exported.items()} == {
            key: value.shape for key, value in expected.items()
        }
        assert f"{classifier}.weight" in exported
        with pytest.raises(ConfigError, match=rf"has no names there. Possible: {library}, vissl"):
            export_state_dict(model, names="hf")
