"""Named layers of every kind of trunk: right values, early stop, shapes without computing, clear errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from vissl_like.config.schema_model import Trunk as TrunkSection
from vissl_like.errors import ConfigError
from vissl_like.models.trunk import Adapter, Trunk
from vissl_like.models.zoo import build_trunk

TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
TINY_DINO = {"image_size": 28, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def trunk(name: str, **options: Any) -> Trunk:
    torch.manual_seed(0)
    return build_trunk(TrunkSection(NAME=name, OPTIONS=options)).eval()


def resnet18() -> Trunk:
    torch.manual_seed(0)
    return build_trunk(TrunkSection.model_validate({"NAME": "resnet", "RESNETS": {"DEPTH": 18}})).eval()


def test_resnet_is_torchvisions() -> None:
    """Same state keys (but for fc), same outputs with the same weights."""
    ours, theirs = resnet18(), torchvision.models.resnet18().eval()
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert list(ours.state_dict()) == [f"_feature_blocks.{key}" for key in state]
    ours.backbone.load_state_dict(state)
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images)["flatten"], theirs(images))


@pytest.mark.parametrize("depth", [34, 50, 101, 152])
def test_deeper_resnets_have_torchvisions_shapes(depth: int) -> None:
    with torch.device("meta"):
        ours = build_trunk(TrunkSection.model_validate({"NAME": "resnet", "RESNETS": {"DEPTH": depth}}))
        theirs = torchvision.models.get_model(f"resnet{depth}", weights=None)
    expected = {key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.backbone.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"DEPTH": 50, "GROUPS": 32, "WIDTH_PER_GROUP": 4}, lambda: torchvision.models.resnext50_32x4d()),
        ({"DEPTH": 50, "WIDTH_PER_GROUP": 128}, lambda: torchvision.models.wide_resnet50_2()),
    ],
)
def test_wide_and_grouped_resnets_are_torchvisions(options: dict[str, Any], reference: Any) -> None:
    with torch.device("meta"):
        ours = build_trunk(TrunkSection.model_validate({"NAME": "resnet", "RESNETS": options}))
        expected = {k: v.shape for k, v in reference().state_dict().items() if not k.startswith("fc.")}
    assert {key: value.shape for key, value in ours.backbone.state_dict().items()} == expected


def test_resnet_options() -> None:
    options = {"DEPTH": 50, "WIDTH_MULTIPLIER": 2, "NORM": "GroupNorm", "LAYER4_STRIDE": 1, "ZERO_INIT_RESIDUAL": True}
    options["STANDARDIZE_CONVOLUTIONS"] = True
    with torch.device("meta"):
        wide = build_trunk(TrunkSection.model_validate({"NAME": "resnet", "RESNETS": options}))
    assert wide.feature_shapes(["res5", "flatten"]) == {"res5": (4096, 14, 14), "flatten": (4096,)}
    assert not list(wide.buffers())
    norm = build_trunk(TrunkSection.model_validate({"NAME": "resnet", "RESNETS": {"DEPTH": 18, "NORM": "LayerNorm"}}))
    assert isinstance(norm.backbone.bn1, nn.GroupNorm) and norm.backbone.bn1.num_groups == 1
    with pytest.raises(ConfigError, match="GROUPS and WIDTH_PER_GROUP need bottleneck blocks"):
        build_trunk(TrunkSection.model_validate({"NAME": "resnet", "RESNETS": {"DEPTH": 18, "GROUPS": 2}}))


def test_zero_init_makes_blocks_the_identity() -> None:
    options = {"DEPTH": 18, "ZERO_INIT_RESIDUAL": True}
    net = build_trunk(TrunkSection.model_validate({"NAME": "resnet", "RESNETS": options})).backbone.eval()
    maps = torch.rand(1, 64, 8, 8)
    torch.testing.assert_close(net.layer1(maps), maps)


def test_standardised_filters_have_mean_zero_and_deviation_one() -> None:
    from vissl_like.models.resnet import StandardizedConv2d

    conv = StandardizedConv2d(3, 4, 3, bias=False)
    probe = torch.zeros(27, 3, 3, 3).view(27, -1).fill_diagonal_(1.0).view(27, 3, 3, 3)
    filters = conv(probe).flatten(1)  # (27, 4): the effective weight of every input pixel
    torch.testing.assert_close(filters.mean(0), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(filters.std(0, unbiased=False), torch.ones(4))


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18"])
def test_named_layers_of_library_resnets(name: str) -> None:
    named = trunk(name)
    net = named.backbone
    images = torch.randn(2, 3, 64, 64)
    layers = ["conv1", "res1", "res2", "res3", "res4", "res5", "res5avg", "flatten"]
    with torch.no_grad():
        found = named(images, layers)
        conv1 = torch.relu(net.bn1(net.conv1(images)))
        res2 = net.layer1(net.maxpool(conv1))
        res5 = net.layer4(net.layer3(net.layer2(res2)))
    assert list(found) == layers
    expected = {"conv1": conv1, "res2": res2, "res5": res5, "res5avg": res5.mean((2, 3), keepdim=True)}
    for layer, value in (expected | {"flatten": res5.mean((2, 3))}).items():
        torch.testing.assert_close(found[layer], value)


def test_small_resnet() -> None:
    small = trunk("resnet_small")
    assert sum(p.numel() for p in small.parameters()) + 65 * 4 == 78420
    shapes = small.feature_shapes(["conv1", "res2", "res3", "res4", "res4avg", "flatten"], image_size=28)
    assert shapes == {
        "conv1": (16, 14, 14),
        "res2": (16, 14, 14),
        "res3": (32, 7, 7),
        "res4": (64, 4, 4),
        "res4avg": (64, 1, 1),
        "flatten": (64,),
    }
    grey = trunk("resnet_small", in_channels=1, widths=[4, 8], stem=[3, 1])
    assert grey(torch.randn(2, 1, 12, 12), ["res3", "flatten"])["res3"].shape == (2, 8, 6, 6)


@pytest.mark.parametrize(
    ("name", "options", "layer", "shape", "width"),
    [
        ("timm/vit_tiny_patch16_224", TINY_VIT, "blocks.1", (17, 24), 24),
        ("timm/efficientnet_lite0", {}, "blocks.2", (40, 8, 8), 1280),
        ("torchvision/squeezenet1_1", {}, "features.3", (128, 15, 15), 512),
        ("torchvision/mobilenet_v3_small", {}, "features.3", (24, 8, 8), 1024),
        ("hf/dinov2", TINY_DINO, "encoder.layer.0", (5, 16), 16),
        ("hf/Dinov2Config", TINY_DINO, "layernorm", (5, 16), 16),
        (
            "hf/resnet",
            {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]},
            "encoder.stages.0",
            (8, 16, 16),
            8,
        ),
    ],
)
def test_dotted_layers(name: str, options: dict[str, Any], layer: str, shape: tuple[int, ...], width: int) -> None:
    """Any module by its dotted name; tokens are (B, N, C); what meta says is what comes out."""
    named = trunk(name, **options)
    size = 28 if "dino" in name.lower() else 32 if "vit" in name else 64
    assert layer in named.layer_names()
    shapes = named.feature_shapes([layer, "flatten"], image_size=size)
    assert shapes == {layer: shape, "flatten": (width,)}
    with torch.no_grad():
        found = named(torch.randn(2, 3, size, size), [layer, "flatten"])
    assert {key: tuple(value.shape[1:]) for key, value in found.items()} == shapes


def test_timm_flatten_is_the_input_of_its_classifier() -> None:
    import timm

    ours = trunk("timm/vit_tiny_patch16_224", **TINY_VIT)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY_VIT).eval()
    ours.backbone.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("head.")})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs.head(ours(images)["flatten"]), theirs(images))


def test_transformers_flatten_is_the_class_token() -> None:
    """A pooler with parameters is left out: most published weights lack it."""
    vit = trunk("hf/vit", image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=32)  # fmt: skip
    images = torch.randn(2, 3, 48, 48)  # another size: the position table is interpolated
    with torch.no_grad():
        hidden = vit.backbone(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(vit(images)["flatten"], hidden[:, 0])
    assert not [key for key in vit.state_dict() if "pooler" in key]


def test_masked_autoencoder_sees_the_whole_image_in_order() -> None:
    options = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    mae = trunk("hf/vit_mae", intermediate_size=32, **options)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        first, second = (mae(images, ["layernorm"])["layernorm"] for _ in range(2))
    assert first.shape == (1, 5, 16)
    assert torch.equal(first, second)


class Counter(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight


class Shared(nn.Module):
    """Two blocks with one ReLU between them and in place, then a last block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = Counter(), Counter(), Counter()
        self.act = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.first(images))
        x = self.act(self.second(x) - 1.0)
        return self.last(x).flatten(1)


def test_forward_stops_after_the_last_wanted_layer() -> None:
    net = Shared()
    named = Trunk(net, Adapter(name="shared"))
    images = torch.tensor([[-1.0, 2.0]])
    assert torch.equal(named(images, ["first"])["first"], images)
    assert (net.first.calls, net.second.calls, net.last.calls) == (1, 0, 0)
    named(images, ["second", "first"])
    assert (net.second.calls, net.last.calls) == (1, 0)
    named(images, ["first", "flatten"])
    assert net.last.calls == 1


def test_values_are_not_changed_by_what_follows_in_place() -> None:
    named = Trunk(Shared(), Adapter(name="shared"))
    found = named(torch.tensor([[-1.0, 2.0]]), ["first", "flatten"])
    assert torch.equal(found["first"], torch.tensor([[-1.0, 2.0]]))


def test_a_shared_activation_gives_its_last_output() -> None:
    named = Trunk(Shared(), Adapter(name="shared"))
    assert torch.equal(named(torch.tensor([[-1.0, 3.0]]), ["act"])["act"], torch.tensor([[0.0, 2.0]]))


def test_hooks_do_not_stay() -> None:
    """Repeated calls, an error inside, training and eval mode leave nothing behind and agree."""
    named = resnet18()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first = named(images, ["res3", "res5avg"])
        with pytest.raises(RuntimeError):
            named(torch.randn(2, 4, 32, 32), ["res3"])
        second = named(images, ["res5avg", "res3", "res3"])
    assert list(second) == ["res5avg", "res3"]
    assert torch.equal(first["res3"], second["res3"])
    assert not any(module._forward_hooks for module in named.modules())
    named.train()
    assert named.feature_shapes(["res3"], image_size=32) == {"res3": (128, 4, 4)}
    assert all(module.training for module in named.modules())
    assert not named.backbone.bn1.num_batches_tracked.item()


def test_autocast() -> None:
    named = resnet18()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = named(torch.randn(1, 3, 32, 32), ["conv1", "res5avg"])
    assert found["res5avg"].shape == (1, 512, 1, 1)


def test_gradients_flow_to_a_named_layer() -> None:
    named = resnet18().train()
    named(torch.randn(2, 3, 32, 32), ["res2"])["res2"].sum().backward()
    assert named.backbone.conv1.weight.grad is not None
    assert named.backbone.layer2[0].conv1.weight.grad is None


def test_unknown_layers() -> None:
    with pytest.raises(ConfigError, match="'res6'.*did you mean 'res[1-5]'.*Known: conv1, res1, res2"):
        resnet18()(torch.randn(1, 3, 32, 32), ["res6"])
    with pytest.raises(ConfigError, match="did you mean 'blocks.1'"):
        trunk("timm/vit_tiny_patch16_224", **TINY_VIT).check_layers(["bloks.1"], key="KEY")


def test_images_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"cannot take images of 48x48 with 3 channels .*MODEL.TRUNK.OPTIONS"):
        trunk("timm/vit_tiny_patch16_224", **TINY_VIT).feature_shapes(image_size=48)
