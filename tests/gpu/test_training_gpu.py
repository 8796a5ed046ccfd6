"""Training on a GPU: what is compiled, recomputed, saved or sharded there gives the numbers it should.

Without a GPU everything but the last test runs on the CPU, so that these tests are known to work.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.integration.training_runs import losses
from tests.integration.vit_runs import launch_vit
from vissl_like.config.schema import Config
from vissl_like.core import checkpoint, parallel, rng
from vissl_like.core.saving import HostCopies, Saver
from vissl_like.models.vision_model import VisionModel
from vissl_like.models.zoo import build_model

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
BACKEND = "inductor" if HAS_GPU else "aot_eager"
SHAPE = {"img_size": 64, "patch_size": 8, "depth": 4, "embed_dim": 64, "num_heads": 2, "proj_drop_rate": 0.1}


def arranged(*, recompute: bool = False, **machine: Any) -> VisionModel:
    section = {
        "TRUNK": {"NAME": "timm/vit_tiny_patch16_224", "OPTIONS": SHAPE},
        "ACTIVATION_CHECKPOINTING": {"USE_ACTIVATION_CHECKPOINTING": recompute},
    }
    config = Config.model_validate({"MODEL": section, "MACHINE": machine})
    rng.seed_model(0)
    model = build_model(config.MODEL, num_classes=5).to(DEVICE)
    parallel.arrange(model, config)
    return model


def course(model: VisionModel, *, steps: int = 4) -> list[float]:
    """Losses of a short training in bf16."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    images = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels = torch.arange(32, device=DEVICE) % 5
    found = []
    for step in range(steps):
        rng.seed_step(0, step, 0)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images)[0], labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_recomputed_is_the_same_in_less_memory() -> None:
    """Dropout is drawn by the GPU's own generator, which is put back for the second pass."""
    plain, again = arranged(), arranged(recompute=True)
    assert course(again) == pytest.approx(course(plain), rel=1e-3)
    if not HAS_GPU:
        return
    peaks = []
    for model in (plain, again):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        course(model, steps=1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] / 2


@pytest.mark.parametrize("how", ["blocks", "model"])
def test_compiled_is_close(how: str) -> None:
    """Its dropout draws other numbers, so it is compared without training mode."""
    plain, compiled = arranged(), arranged(COMPILE=how, COMPILE_BACKEND=BACKEND)
    images = torch.randn(8, 3, 64, 64, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        expected, found = (model.eval()(images)[0].float() for model in (plain, compiled))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    first = course(compiled.train())
    assert first[-1] < first[0] and list(compiled.state_dict()) == list(plain.state_dict())


def test_a_save_in_the_background_holds_the_state_of_its_moment(tmp_path: Path) -> None:
    model = arranged()
    expected = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    saver = Saver(tmp_path, keep=1)
    saver.save(step=1, model_state=model.state_dict(), training_state={"step": 1})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    saver.finish()
    saver.close()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    assert all(torch.equal(value, expected[name]) for name, value in saved.model_state().items())
    copy = HostCopies().take({"file": {"w": torch.ones(3, device=DEVICE)}})["file"]["w"]
    assert copy.device.type == "cpu" and copy.is_pinned() == HAS_GPU


def test_resumed_exactly(tmp_path: Path) -> None:
    """A training that was stopped equals one that was not, bit for bit (deterministic kernels)."""
    options = ["config.MACHINE.DETERMINISTIC=true", "config.MACHINE.PRECISION=bf16"]
    assert launch_vit(tmp_path / "whole", *options).returncode == 0
    stopped = launch_vit(tmp_path / "run", *options, env={"SIGNAL_AFTER": "5"})
    assert stopped.returncode == 75, stopped.stderr
    assert launch_vit(tmp_path / "run", *options).returncode == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
    sys.modules.pop("train", None)
    import train

    assert train.main(["--tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(("ours", "bare loop"))]) == 6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sharded_over_two_gpus(tmp_path: Path) -> None:
    for name, strategy in (("ddp", "ddp"), ("fsdp", "fsdp")):
        options = [f"config.DISTRIBUTED.STRATEGY={strategy}", "config.OPTIMIZER.NAME=sgd"]
        done = launch_vit(tmp_path / name, *options, ranks=2)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-3)
