"""Values and gradients of the classification losses against VISSL's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vissl_like.losses.classification import bce_logits, cross_entropy

DATA = Path(__file__).parents[1] / "data"
CASES = {
    case["name"]: case
    for case in json.loads((DATA / "vissl_losses.json").read_text())["cases"]
    if case["name"].startswith(("ce_", "bce_"))
}
ARRAYS = np.load(DATA / "vissl_losses.npz", allow_pickle=False)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str) -> None:
    settings = CASES[name]["settings"]
    count = sum(key.startswith(f"{name}__in") for key in ARRAYS.files)
    outputs = [torch.tensor(ARRAYS[f"{name}__in{i}"], requires_grad=True) for i in range(count)]
    target = torch.tensor(ARRAYS[f"{name}__target"])
    if name.startswith("bce"):
        loss = bce_logits(outputs, target, reduction=settings["reduction"])
    else:
        options = {key: value for key, value in settings.items() if key != "reduction"}  # upstream ignores it
        loss = cross_entropy(outputs, target, **options)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(ARRAYS[f"{name}__loss"]), rtol=1e-5, atol=1e-6)
    for i, output in enumerate(outputs):
        torch.testing.assert_close(output.grad, torch.tensor(ARRAYS[f"{name}__grad{i}"]), rtol=1e-5, atol=1e-6)


def test_every_case_is_there() -> None:
    assert len(CASES) == 11
