"""Blocks that are found, computed again and compiled: the same numbers, the same names, less memory, one program."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tests.unit.test_distributed import SHARDING, run_ranks
from vissl_like.config.schema import Config
from vissl_like.config.schema_model import Model
from vissl_like.core import parallel, rng
from vissl_like.errors import ConfigError
from vissl_like.models.vision_model import VisionModel
from vissl_like.models.zoo import build_model, build_on_meta

VIT = {
    "NAME": "timm/vit_tiny_patch16_224",
    "OPTIONS": {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2, "proj_drop_rate": 0.2},
}
RESNET = {"NAME": "resnet_small", "OPTIONS": {"widths": [8, 8]}}
RECOMPUTE = {"ACTIVATION_CHECKPOINTING": {"USE_ACTIVATION_CHECKPOINTING": True}}


def config(model: dict[str, Any], **machine: Any) -> Config:
    return Config.model_validate({"MODEL": model, "MACHINE": machine})


def build(model: dict[str, Any]) -> VisionModel:
    rng.seed_model(0)
    return build_model(Model.model_validate(model), num_classes=5)


@pytest.mark.parametrize(
    ("trunk", "count", "kind"),
    [
        ({"NAME": "timm/vit_tiny_patch16_224"}, 12, "Block"),
        ({"NAME": "timm/swin_tiny_patch4_window7_224"}, 12, "SwinTransformerBlock"),
        ({"NAME": "timm/convnext_atto"}, 12, "ConvNeXtBlock"),
        ({"NAME": "timm/efficientnet_b0"}, 15, "InvertedResidual"),
        ({"NAME": "torchvision/vit_b_16"}, 12, "EncoderBlock"),
        ({"NAME": "torchvision/resnet18"}, 8, "BasicBlock"),
        ({"NAME": "torchvision/vgg11"}, 0, ""),
        ({"NAME": "resnet"}, 16, "Block"),
        ({"NAME": "resnet_small"}, 3, "Block"),
        ({"NAME": "hf/facebook/dinov2-small"}, 12, "Dinov2Layer"),
    ],
    ids=lambda value: value["NAME"] if isinstance(value, dict) else "",
)
def test_blocks_of_many_trunks(trunk: dict[str, Any], count: int, kind: str) -> None:
    if trunk["NAME"].startswith("hf/"):
        from transformers import Dinov2Config, Dinov2Model

        with torch.device("meta"):
            found = parallel.blocks(Dinov2Model(Dinov2Config(hidden_size=48, num_attention_heads=2)))
    else:
        model = build_on_meta(Model.model_validate({"TRUNK": trunk}), num_classes=5)
        found = parallel.blocks(model)
        assert all(model.get_submodule(name) is block for name, block in found.items())
    assert len(found) == count and {type(block).__name__ for block in found.values()} == ({kind} if kind else set())


def course(model: VisionModel, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final state of a short training with noise."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(steps):
        rng.seed_step(0, step, 0)
        loss = nn.functional.cross_entropy(model(images)[0], torch.arange(6) % 5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("trunk", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("how", ["recompute", "compile", "both"])
def test_same_bits_and_names(trunk: dict[str, Any], how: str) -> None:
    """aot_eager runs the same kernels; BatchNorm statistics move once per step although it is computed twice."""
    expected_losses, expected = course(build({"TRUNK": trunk}))
    compiled = {} if how == "recompute" else {"COMPILE": "blocks", "COMPILE_BACKEND": "aot_eager"}
    options = config({"TRUNK": trunk} | ({} if how == "compile" else RECOMPUTE), **compiled)
    model = build({"TRUNK": trunk})
    parallel.arrange(model, options)
    losses, state = course(model)
    exact = how == "recompute"
    assert losses == expected_losses if exact else losses == pytest.approx(expected_losses, rel=1e-4)
    assert list(state) == list(expected)
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=0 if exact else 1e-3, atol=0 if exact else 1e-5)
    assert parallel.is_replicable(model) == exact


def kept_bytes(model: VisionModel) -> int:
    """What a forward pass leaves in memory for the backward pass outside of what will be computed again."""
    sizes = []
    images = torch.randn(16, 3, 32, 32)
    with saved_tensors_hooks(lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        model(images)
    return sum(sizes)


def test_little_is_kept() -> None:
    plain, again = build({"TRUNK": VIT}), build({"TRUNK": VIT})
    parallel.arrange(again, config({"TRUNK": VIT} | RECOMPUTE))
    assert kept_bytes(again) < kept_bytes(plain) / 4


def test_blocks_share_one_program() -> None:
    model = build({"TRUNK": VIT})
    parallel.arrange(model, config({"TRUNK": VIT}, COMPILE="blocks", COMPILE_BACKEND="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    course(model, steps=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class TwoBlocks(nn.Module):
    """As little as there is to compile: each block is x + gelu(linear(x))."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + nn.functional.gelu(self.linear(x))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def test_machine_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backend writes C++ and compiles it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inductor = importlib.import_module("torch._inductor.config")  # one file: no headers, processes and trials for many
    monkeypatch.setattr(inductor, "cpp_cache_precompile_headers", False)
    monkeypatch.setattr(inductor, "compile_threads", 1)
    monkeypatch.setattr(inductor.cpp, "vec_isa_ok", False)
    model, x = TwoBlocks(), torch.randn(8, 4)
    with torch.no_grad():
        expected = model(x)
        parallel.arrange(model, config({}, COMPILE="blocks"))
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert any(tmp_path.rglob("*.so"))


def test_layers_inside_blocks_are_still_read() -> None:
    """Two layers are read, one of them inside a block: that block is left alone, the others are computed again."""
    pooling = [["blocks.1.attn", ["Identity", []]], ["blocks.2", ["Identity", []]]]
    head = [["mlp", {"dims": ["auto", 5]}], ["mlp", {"dims": ["auto", 5]}]]
    section = {
        "TRUNK": VIT,
        "HEAD": {"PARAMS": head},
        "FEATURE_EVAL_SETTINGS": {"LINEAR_EVAL_FEAT_POOL_OPS_MAP": pooling},
    }
    plain, arranged = build(section), build(section)
    inner = arranged.read_modules()
    assert inner == ["trunk._feature_blocks.blocks.1.attn", "trunk._feature_blocks.blocks.2"]
    parallel.arrange(arranged, config(section | RECOMPUTE, COMPILE="blocks", COMPILE_BACKEND="aot_eager"), inner=inner)
    blocks = arranged.trunk.backbone.blocks
    assert [type(block) is type(plain.trunk.backbone.blocks[0]) for block in blocks] == [False, True, False]
    for model in (plain, arranged):
        for index in plain.idle_parameters((32, 32)):
            model.get_parameter(index).requires_grad_(False)
    assert course(arranged)[0] == pytest.approx(course(plain)[0], rel=1e-5)
    with pytest.raises(ConfigError, match=r"COMPILE='model'.*Use blocks"):
        parallel.arrange(build(section), config(section, COMPILE="model", COMPILE_BACKEND="eager"), inner=inner)


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"TRUNK": {"NAME": "resnet_small", "OPTIONS": {"widths": [8]}}}
    with pytest.raises(ConfigError, match=r"ACTIVATION_CHECKPOINTING.*resnet_small.*Leave it off"):
        parallel.arrange(build(section), config(section | RECOMPUTE))
    with pytest.raises(ConfigError, match=r"COMPILE.*not to be found"):
        parallel.arrange(build(section), config(section, COMPILE="blocks"))
    with pytest.raises(ConfigError, match=r"COMPILE_BACKEND='fast': PyTorch has .*inductor"):
        parallel.arrange(build(section), config(section, COMPILE="model", COMPILE_BACKEND="fast"))
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        parallel.arrange(build(section), config(section, COMPILE="model"))


def test_rows_and_what_cannot_be_sharded(tmp_path: Path) -> None:
    """A weight of 5, 2 and 1 rows on three processes; gathered, put back, averaged, clipped; a single number is refused."""
    outputs = run_ranks(
        """
        from torch import nn
        from vissl_like.config.schema import Config
        from vissl_like.config.schema_model import Ema as EmaOptions, GradClip
        from vissl_like.errors import ConfigError
        from vissl_like.models.ema import Ema
        from vissl_like.optim.clipping import clip_gradients
        world = distributed.start(device="cpu")
        config = Config.model_validate({"DISTRIBUTED": {"STRATEGY": "fsdp"}})
        def net():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(2, 1))
        model, plain = net(), net()
        parallel.arrange(model, config)
        assert parallel.is_sharded(model) and not parallel.is_sharded(plain)
        state = {name: value.clone() for name, value in plain.state_dict().items()}
        for name, weight in model.state_dict().items():
            start, stop = parallel.rows_of_ranks(len(weight))[world.rank]
            rows = parallel.local(weight)
            assert torch.equal(rows, state[name][start:stop]) and torch.equal(parallel.whole(weight), state[name])
            assert torch.equal(parallel.rows_like(state[name], weight), rows)
            again = parallel.as_part(rows.clone(), like=weight)
            assert again.shape == weight.shape and torch.equal(parallel.whole(again), state[name])
        inputs = torch.arange(6.0).reshape(2, 3)
        for one in (model, plain):
            one(inputs).sum().backward()
        options = GradClip(USE_GRAD_CLIP=True, MAX_NORM=0.5)
        norms = [clip_gradients(list(one.parameters()), options).item() for one in (model, plain)]
        assert abs(norms[0] - norms[1]) < 1e-5 * norms[1]
        averages = [Ema(one, options=EmaOptions(DECAY=0.5, WARMUP=0), total_steps=9) for one in (model, plain)]
        for one, ema in zip((model, plain), averages):
            torch.optim.SGD(one.parameters(), lr=1.0).step()
            ema.update(1)
        found, expected = (ema.state_dict() for ema in averages)
        for name in expected:
            torch.testing.assert_close(parallel.whole(found[name]), expected[name])
        with averages[0].in_place():
            torch.testing.assert_close(model(inputs), nn.utils.stateless.functional_call(plain, expected, (inputs,)))
        torch.testing.assert_close(model(inputs), plain(inputs))
        averages[0].load_state_dict(state)
        assert torch.equal(parallel.whole(averages[0].state_dict()["0.weight"]), state["0.weight"])
        scalar = net()
        scalar.temperature = nn.Parameter(torch.tensor(1.0))
        try:
            parallel.arrange(scalar, config)
        except ConfigError as error:
            print(error)
        distributed.shutdown()
        """,
        size=3,
        folder=tmp_path,
        imports=SHARDING,
    )
    assert all("weight 'temperature' is a single number" in output for output in outputs)
