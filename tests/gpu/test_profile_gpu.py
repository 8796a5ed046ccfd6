"""The profile of a training on a GPU: the phases are those of the GPU's own clock."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.test_loop import make, same, weights
from vissl_like.config.schema import Profile
from vissl_like.core import distributed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def on_gpu() -> Iterator[None]:
    distributed.start(device="gpu")
    yield
    distributed.shutdown()


def test_phases_and_kernels(tmp_path: Path) -> None:
    trained = []
    for name, options in (("off", {}), ("on", {"ENABLED": True, "WAIT": 2, "STEPS": 4, "WARMUP": 1})):
        training, _ = make(tmp_path / name, profile=Profile(**options))
        training.model.to("cuda")
        training.run()
        trained.append(weights(training))
    assert same(*trained)
    found = json.loads((tmp_path / "on" / "profile" / "profile.json").read_text())
    assert found["device"] == "cuda"
    assert sum(found["phases_ms"].values()) == pytest.approx(found["step_ms"], rel=1e-6)
    assert found["phases_ms"]["backward"] > 0
    with gzip.open(tmp_path / "on" / "profile" / "trace.json.gz", "rt") as file:
        kinds = Counter(event.get("cat") for event in json.load(file)["traceEvents"])
    assert kinds["kernel"] > 0
