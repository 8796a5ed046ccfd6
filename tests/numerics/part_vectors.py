"""What the tests against recorded part models share: files, tolerances, models filled through WEIGHTS_INIT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vissl_like.config.schema_model import FeatureEval, Model
from vissl_like.core.weights import WeightsReport, load_initial_weights
from vissl_like.core.weights_plan import Status
from vissl_like.core.weights_rules import find_preset, rules_of
from vissl_like.models.part_zoo import build_part_model

DATA = Path(__file__).parents[1] / "data"


class Vectors:
    """One recorded topic: arrays by name, and settings."""

    def __init__(self, topic: str) -> None:
        self.arrays = np.load(DATA / f"{topic}.npz", allow_pickle=False)
        self.record: dict[str, Any] = json.loads((DATA / f"{topic}.json").read_text())
        self.settings: dict[str, Any] = self.record["settings"]

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.arrays else None

    @property
    def num_classes(self) -> int:
        return self.settings["classes"]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        given, patch = self.settings, self.settings["patch"]
        side = given.get("img", given.get("image"))
        return tuple(patch * cells for cells in given["grid"]) if side is None else _pair(side)

    @property
    def trunk(self) -> dict[str, Any]:
        """The section of the backbone that was recorded."""
        given = self.settings
        if "layer_norm_eps" in given:
            return {
                "NAME": "hf/dinov2",
                "OPTIONS": {
                    "hidden_size": given["dim"],
                    "num_attention_heads": given["heads"],
                    "num_hidden_layers": given["depth"],
                    "patch_size": given["patch"],
                    "image_size": given["image"],
                    "mlp_ratio": given["mlp_ratio"],
                    "layer_norm_eps": given["layer_norm_eps"],
                    "use_swiglu_ffn": given["swiglu"],
                },
            }
        names = {
            "embed_dim": "dim", "depth": "depth", "num_heads": "heads", "patch_size": "patch", "mlp_ratio": "mlp_ratio",
            "qkv_bias": "qkv_bias", "no_embed_class": "no_embed_class", "reg_tokens": "registers",
        }  # fmt: skip
        found = {name: given[key] for name, key in names.items() if key in given}
        if "prefix" in given:
            found["reg_tokens"] = given["prefix"] - 1
        if not given.get("layer_scale", True):
            found["init_values"] = None
        return {"NAME": "timm/vit_base_patch14_reg4_dinov2", "OPTIONS": found}

    def below(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): self[name] for name in self.arrays if name.startswith(prefix)}


def _pair(side: int | list[int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def options(
    trunk: dict[str, Any], parts: dict[str, Any] | None = None, *, preset: str = "", file: Path | str = ""
) -> Model:
    weights = {"PRESET": preset, "PARAMS_FILE": str(file), "MIN_LOADED": 1.0}
    return Model.model_validate({"TRUNK": trunk, "PARTS": parts or {}, "WEIGHTS_INIT": weights})


def build(kind: str, model: Model, *, num_classes: int, image_size: tuple[int, int]) -> Any:
    torch.manual_seed(0)
    return build_part_model(kind, model, num_classes=num_classes, image_size=image_size)


def load(module: nn.Module, state: dict[str, Tensor], folder: Path, *, preset: str) -> WeightsReport:
    """Fill the model from a file of these tensors through WEIGHTS_INIT; every tensor of both must be used."""
    file = folder / "snapshot_best.pt"
    torch.save({"model_state": state, "finished_epoch": 3}, file)
    wanted = options({}, preset=preset, file=file).WEIGHTS_INIT
    report = load_initial_weights(module, wanted, feature_eval=FeatureEval())
    assert {row.status for row in report.rows} <= {Status.LOADED, Status.REMAPPED}, report.table()
    assert report.trunk.value == report.heads.value == 1
    return report


def our_names(names: list[str], *, preset: str) -> dict[str, str]:
    """Name in the original -> name in our model."""
    rules = rules_of(options({}, preset=preset).WEIGHTS_INIT)
    return {name: rules.apply(name) for name in names}


def divided(tensors: dict[str, Tensor], *, preset: str) -> dict[str, Tensor]:
    """The tensors of the original under the names of their parts, where several of ours are one there."""
    rules = find_preset(preset)
    assert rules is not None
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = rules.parts_of(name)
        found |= dict(zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else [tensor]))
    return found


def close(value: Tensor, expected: Tensor, kind: str, what: str = "") -> None:
    """Compare within the tolerance of this kind of quantity: map, feature, gradient, distance."""
    rtol, atol = {
        "map": (1e-5, 1e-6),
        "feature": (1e-4, 1e-5),
        "distance": (1e-4, 1e-3),
        "gradient": (1e-3, 1e-5 * float(expected.abs().max()) + 1e-12),
    }[kind]
    torch.testing.assert_close(
        value.detach(), expected, rtol=rtol, atol=atol, msg=lambda text: f"{what or kind}: {text}"
    )


def check_gradients(module: nn.Module, expected: dict[str, Tensor], *, preset: str) -> None:
    """Recorded gradients under the original's names."""
    assert expected
    expected = divided(expected, preset=preset)
    parameters = dict(module.named_parameters())
    names = our_names(list(expected), preset=preset)
    for name, gradient in expected.items():
        ours = parameters[names[name]].grad
        assert ours is not None, name
        close(ours, gradient, "gradient", name)
