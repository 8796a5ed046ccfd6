"""Stage 1, backbones and baseline poolings: every switch, against formulas and other libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.part_models import HF, STEM, VIT, build, images, section
from vissl_like.errors import ConfigError
from vissl_like.models.part_zoo import PART_MODELS
from vissl_like.models.parts import PartLayers, PartNoise
from vissl_like.models.two_stage import leave_one_out

#: Of a Swin transformer, whose maps have their channels last.
SMALL = {"img_size": 16, "patch_size": 1, "window_size": 2, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 1)}


def layers(*, num_parts: int = 3, width: int = 6, **parts: Any) -> PartLayers:
    torch.manual_seed(0)
    made = PartLayers(width, section(VIT, NUM_PARTS=num_parts, **parts).PARTS, num_classes=5).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def features(size: tuple[int, int] = (4, 5)) -> Tensor:
    return torch.randn(2, 6, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------------------------------------------- stage 1
@pytest.mark.parametrize("num_parts", [1, 3])
def test_maps_and_features_by_the_definition(num_parts: int) -> None:
    """Written out position by position, on a grid that is not square."""
    stage, x = layers(num_parts=num_parts, MODULATION_TYPE="none", SOFTMAX_TEMPERATURE=0.7).eval(), features()
    found = stage(x)
    prototypes = stage.prototypes.weight.flatten(1)
    for row in range(4):
        for column in range(5):
            distance = (x[:, None, :, row, column] - prototypes[None]).square().sum(2)  # (B, K+1)
            torch.testing.assert_close(found.distances[:, :, row, column], distance, rtol=1e-10, atol=1e-10)
            probability = torch.softmax(-distance / 0.7, dim=1)
            torch.testing.assert_close(found.maps[:, :, row, column], probability, rtol=1e-10, atol=1e-12)
    pooled = torch.einsum("bkhw,bdhw->bdk", found.maps, x) / 20
    torch.testing.assert_close(found.features, pooled, rtol=1e-10, atol=1e-12)
    scores = torch.einsum("cd,bdk->bck", stage.classifier.weight, pooled[:, :, :-1])
    torch.testing.assert_close(found.scores, scores, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.logits, scores.sum(2) / num_parts, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "kind", ["parallel_mlp", "parallel_mlp_no_bias", "parallel_mlp_no_act", "parallel_mlp_no_act_no_bias"]
)
def test_modulation_by_networks_per_part(kind: str) -> None:
    stage = layers(MODULATION_TYPE=kind)
    z = torch.randn(2, 6, 4, dtype=torch.float64)
    weights = dict(stage.modulation.named_parameters())
    expected = []
    for k in range(4):
        x = torch.nn.functional.layer_norm(
            z[:, :, k], (6,), weights[f"layers.{k}.0.weight"], weights[f"layers.{k}.0.bias"]
        )
        x = x @ weights[f"layers.{k}.1.weight"].T + weights.get(f"layers.{k}.1.bias", 0.0)
        expected.append(x if "no_act" in kind else torch.nn.functional.gelu(x))
    torch.testing.assert_close(stage.modulation(z), torch.stack(expected, 2), rtol=1e-10, atol=1e-12)
    assert ("layers.0.1.bias" in weights) == ("no_bias" not in kind)


def test_modulation_by_scale_and_by_joint_norm() -> None:
    z = torch.randn(2, 6, 4, dtype=torch.float64)
    scale = layers(MODULATION_TYPE="original").modulation
    torch.testing.assert_close(scale(z), z * scale.weight)
    norm = layers(MODULATION_TYPE="layer_norm").modulation
    standard = (z - z.mean((1, 2), keepdim=True)) / (z.var((1, 2), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(z), standard * norm.weight + norm.bias, rtol=1e-10, atol=1e-12)


def test_independent_classifiers_see_their_own_part() -> None:
    stage, x = layers(CLASSIFIER_TYPE="independent_mlp").eval(), features()
    found = stage(x)
    scores = [network(found.features[:, :, k]) for k, network in enumerate(stage.classifier.layers)]
    torch.testing.assert_close(found.scores, torch.stack(scores, dim=2), rtol=1e-10, atol=1e-12)


def test_which_features_orthogonality_sees() -> None:
    x = features()
    stage = layers(MODULATION_ORTH=False).eval()
    plain = stage(x).features
    torch.testing.assert_close(plain, torch.einsum("bkhw,bdhw->bdk", stage(x).maps, x) / 20)
    torch.testing.assert_close(layers().eval()(x).features, stage.modulation(plain))


def test_noise_is_for_training_and_shared() -> None:
    x = features()
    stage = layers(PART_DROPOUT_STAGE_2=0.0)
    stage.eval()
    assert torch.equal(stage(x).maps, stage(x).maps)
    stage.train()
    first = stage(x)
    assert not torch.equal(first.maps, stage(x).maps)
    assert torch.equal(stage.mask_maps(first), first.maps)
    own = layers(SHARED_GUMBEL=False, PART_DROPOUT_STAGE_2=0.0).train()
    found = own(x)
    assert not torch.equal(own.mask_maps(found), found.maps)
    own.eval()
    found = own(x)
    assert torch.equal(own.mask_maps(found), found.maps)
    noisy = layers(EVAL_GUMBEL=True).eval()
    assert not torch.equal(noisy(x).maps, noisy(x).maps)


def test_drawn_noise_is_gumbel() -> None:
    """Equal distances and noise give each channel the largest value equally often, with the known mean of the noise."""
    stage = layers().train()
    torch.manual_seed(0)
    noise = stage._gumbel(torch.zeros(200_000, dtype=torch.float64), None, wanted=True)
    assert noise is not None
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.std()) == pytest.approx(torch.pi / 6**0.5, abs=0.01)


def test_hard_maps_are_one_hot_with_the_gradient_of_soft_ones() -> None:
    x, noise = features(), PartNoise(maps=torch.randn(2, 4, 4, 5, dtype=torch.float64))
    hard, soft = layers(GUMBEL_SOFTMAX_HARD=True).eval(), layers().eval()
    maps, smooth = hard(x, noise=noise).maps, soft(x, noise=noise).maps
    assert torch.equal(maps.argmax(1), smooth.argmax(1))
    torch.testing.assert_close(maps, torch.nn.functional.one_hot(maps.argmax(1), 4).movedim(3, 1).double())
    cotangent = torch.randn_like(maps)
    gradients = []
    for stage, value in ((hard, maps), (soft, smooth)):
        (value * cotangent).sum().backward()
        gradients.append(stage.prototypes.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_maps_without_gumbel_are_soft() -> None:
    plain = {"GUMBEL_SOFTMAX": False}
    found = layers(GUMBEL_SOFTMAX_HARD=True, **plain).train()(features()).maps
    assert torch.equal(found, layers(**plain).train()(features()).maps)


def test_temperature_without_gumbel_as_in_pdiscoformer() -> None:
    x, same = features(), {"SOFTMAX_TEMPERATURE": 0.2, "GUMBEL_SOFTMAX": False}
    plain = layers(GUMBEL_SOFTMAX=False).eval()(x).maps
    torch.testing.assert_close(layers(TEMPERATURE_NEEDS_GUMBEL=True, **same).eval()(x).maps, plain)
    assert not torch.allclose(layers(**same).eval()(x).maps, plain)


def test_part_dropout() -> None:
    """Scores: whole parts go, the others are scaled up, the mean stays over all parts. Mask: the others stay as they are."""
    stage, x = layers(PART_DROPOUT=0.5, PART_DROPOUT_STAGE_2=0.5, GUMBEL_SOFTMAX=False), features()
    whole = stage.eval()(x)
    stage.train()
    torch.manual_seed(0)
    kept = []
    for _ in range(200):
        found = stage(x)
        gone = (found.scores == 0).all(dim=1)  # (B, K)
        torch.testing.assert_close(found.scores, torch.where(gone[:, None, :], 0.0, 2 * whole.scores))
        torch.testing.assert_close(found.logits, found.scores.mean(2))
        mask_maps = stage.mask_maps(found)
        lost = (mask_maps[:, :-1] == 0).all(dim=3).all(dim=2)
        torch.testing.assert_close(mask_maps[:, :-1], torch.where(lost[:, :, None, None], 0.0, whole.maps[:, :-1]))
        assert torch.equal(mask_maps[:, -1], whole.maps[:, -1])
        kept += [(~gone).double(), (~lost).double()]
    assert float(torch.stack(kept).mean()) == pytest.approx(0.5, abs=0.04)


def test_noise_on_features_has_the_deviation_of_noise_on_every_position() -> None:
    stage, x = layers(NOISE_VARIANCE=0.5, MODULATION_TYPE="none", GUMBEL_SOFTMAX=False), features()
    quiet = stage.eval()(x).features
    stage.train()
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.stack([stage(x).features - quiet for _ in range(400)])
    assert float(drawn.std()) == pytest.approx(0.5 * float(x.std()) / 20**0.5, rel=0.03)
    given = torch.ones_like(quiet)
    moved = stage.eval()(x, noise=PartNoise(features=given)).features - quiet
    torch.testing.assert_close(moved, 0.5 * x.std() / 20**0.5 * given)


def test_autocast_does_not_reach_the_distances() -> None:
    stage, x = layers().float().eval(), features().float()
    expected = stage(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = stage(x)
    assert torch.equal(found.maps, expected.maps) and torch.equal(found.scores, expected.scores)
    assert stage(x.bfloat16()).maps.dtype == torch.float32  # what a backbone under autocast hands on
    assert torch.isfinite(stage.bfloat16().train()(x.bfloat16()).maps).all()


# ----------------------------------------------------------------------------------------------------------- backbones
@pytest.mark.parametrize("no_embed_class", [True, False])
@pytest.mark.parametrize("registers", [0, 3])
def test_both_position_conventions_of_timm(no_embed_class: bool, registers: int) -> None:
    trunk = VIT | {"OPTIONS": VIT["OPTIONS"] | {"no_embed_class": no_embed_class, "reg_tokens": registers}}
    made = build("parts", trunk, size=(16, 24)).eval().trunk
    table = made.backbone.pos_embed.shape[1]
    assert table == 24 + (0 if no_embed_class else 1 + registers)
    whole = made.backbone.forward_features(images(size=(16, 24)))  # the library's own pass
    expected = whole[:, 1 + registers :].transpose(1, 2).reshape(2, 24, 4, 6)
    torch.testing.assert_close(made.maps(images(size=(16, 24))), expected)


@pytest.mark.parametrize("size", [(16, 16), (24, 20)])
@pytest.mark.parametrize("name", ["hf/dinov2", "hf/dinov2_with_registers"])
def test_transformers_fit_their_positions_to_every_image(name: str, size: tuple[int, int]) -> None:
    made = build("parts", HF | {"NAME": name}, size=size).eval().trunk
    whole = made.backbone(pixel_values=images(size=size)).last_hidden_state  # the library's own pass
    prefix = whole.shape[1] - (size[0] // 4) * (size[1] // 4)
    assert made.num_prefix == prefix == (1 if name.endswith("dinov2") else 5)
    expected = whole[:, prefix:].transpose(1, 2).reshape(2, 24, size[0] // 4, size[1] // 4)
    torch.testing.assert_close(made.maps(images(size=size)), expected)
    assert not [key for key in made.state_dict() if "mask_token" in key]


@pytest.mark.parametrize(
    ("name", "options", "width", "cells"),
    [
        ("timm/resnet18", {}, 768, 4),
        ("timm/convnext_atto", {}, 480, 4),
        ("torchvision/resnet18", {}, 768, 4),
        ("torchvision/convnext_tiny", {}, 1152, 4),
        ("resnet_small", {}, 96, 16),
        ("conv_stem", {}, 32, 16),
    ],
)
def test_cnns_give_their_last_two_stages(name: str, options: dict[str, Any], width: int, cells: int) -> None:
    model = build("parts", {"NAME": name, "OPTIONS": options}, size=64)
    maps = model.trunk.maps(images(2, (64, 64)))
    assert maps.shape == (2, width, cells, cells)
    model(images(2, (64, 64))).logits.sum().backward()
    assert not [key for key, value in model.named_parameters() if value.grad is None]  # nothing idle


def test_the_last_stage_is_enlarged_and_comes_first() -> None:
    model = build("parts", {"NAME": "torchvision/resnet18"}, size=64).eval()
    net, x = model.trunk.backbone, images(2, (64, 64))
    before = net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))))
    last = torch.nn.functional.interpolate(net.layer4(before), size=(4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.trunk.maps(x), torch.cat([last, before], dim=1))


def test_output_stride() -> None:
    model = build("parts", {"NAME": "timm/resnet18"}, size=64, OUTPUT_STRIDE=8)
    assert model.trunk.maps(images(1, (64, 64))).shape == (1, 768, 8, 8)
    for kind, trunk in (
        ("parts", {"NAME": "torchvision/resnet18"}),
        ("pooled", {"NAME": "torchvision/resnet18"}),
        ("two_stage", VIT),
        ("parts", HF),
    ):
        with pytest.raises(ConfigError, match="OUTPUT_STRIDE=8"):
            build(
                kind, trunk, size=64 if trunk["NAME"].startswith("torch") else 16, OUTPUT_STRIDE=8, POOLING_TYPE="gap"
            )
    pooled = build("pooled", {"NAME": "timm/resnet18"}, size=64, POOLING_TYPE="gap", OUTPUT_STRIDE=8)
    assert pooled.trunk.backbone.forward_features(images(1, (64, 64))).shape == (1, 512, 8, 8)


def test_stochastic_depth_reaches_each_stage() -> None:
    model = build("two_stage", VIT, DROP_PATH_STAGE_1=0.2, DROP_PATH_STAGE_2=0.4)
    rates = [model.trunk[stage].backbone.blocks[-1].drop_path1.drop_prob for stage in ("stage_1", "stage_2")]
    assert rates == pytest.approx([0.2, 0.4])
    assert build("parts", HF, DROP_PATH_STAGE_1=0.3).trunk.backbone.encoder.layer[0].drop_path.drop_prob == 0.3
    with pytest.raises(ConfigError, match="DROP_PATH_STAGE_1=0.1: conv_stem"):
        build("parts", STEM, DROP_PATH_STAGE_1=0.1)


@pytest.mark.parametrize(
    ("kind", "trunk", "parts", "message"),
    [
        ("parts", {"NAME": "raw_pixels"}, {}, "feature maps are not known"),
        ("parts", {"NAME": "timm/swin_tiny_patch4_window7_224", "OPTIONS": SMALL}, {}, "feature maps are not known"),
        (
            "parts",
            {"NAME": "timm/beit_base_patch16_224", "OPTIONS": {"img_size": 16, "depth": 2}},
            {},
            "feature maps are not known",
        ),
        ("parts", {"NAME": "timm/vit_small_r26_s32_224"}, {}, "a network that sees beyond"),
        ("decoupled", {"NAME": "timm/vit_base_mci_224", "OPTIONS": {"depth": 2}}, {}, "a network that sees beyond"),
        (
            "decoupled",
            VIT | {"OPTIONS": VIT["OPTIONS"] | {"class_token": False}},
            {},
            "with a class token can be masked",
        ),
        ("pooled", VIT | {"OPTIONS": VIT["OPTIONS"] | {"class_token": False}}, {}, "has no class token"),
        ("parts", {"NAME": "hf/vit"}, {}, "DINOv2 models only"),
        ("parts", VIT | {"OPTIONS": VIT["OPTIONS"] | {"patch_size": 5}}, {}, "not made of whole patches"),
        ("parts", VIT | {"OPTIONS": VIT["OPTIONS"] | {"img_size": 32}}, {}, "img_size=32"),
        ("two_stage", STEM, {}, "STAGE_TWO_TRUNK.NAME"),
        ("two_stage", VIT, {"LATE_MASKING": True}, "decoupled model alone"),
        ("two_stage", VIT, {"GUMBEL_SOFTMAX_HARD": True}, "single-stage model alone"),
        ("two_stage", VIT, {"USE_SOFT_MASKS": True, "MASK_GRADIENT": "straight_through"}, "set none"),
        ("two_stage", VIT, {"REMOVE_PARTS": [3]}, "there is no part 3"),
        ("decoupled", {"NAME": "timm/resnet18"}, {}, "can be masked"),
        ("decoupled", {"NAME": "timm/resnet18"}, {"LATE_MASKING": True}, "only a Vision Transformer can be masked"),
        ("decoupled", VIT, {"USE_SOFT_MASKS": True}, "hard masks"),
        ("pooled", STEM, {"POOLING_TYPE": "cls"}, "has no tokens"),
        ("pooled", VIT, {"POOLING_TYPE": "aim", "NUM_PARTS": 1}, ""),
        ("pooled", VIT, {"POOLING_TYPE": "ep"}, "32 queries do not divide"),
    ],
)
def test_what_does_not_fit_is_said(kind: str, trunk: dict[str, Any], parts: dict[str, Any], message: str) -> None:
    if not message:
        build(kind, trunk, **parts)
        return
    with pytest.raises(ConfigError, match=message):
        build(kind, trunk, **parts)


@pytest.mark.parametrize("kind", PART_MODELS)
def test_every_kind_can_be_built_without_memory(kind: str) -> None:
    with torch.device("meta"):
        model = build(kind, VIT)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# ------------------------------------------------------------------------------------------------------------ baseline
@pytest.mark.parametrize("trunk", [VIT, HF], ids=["timm", "hf"])
@pytest.mark.parametrize("kind", ["cls", "gap", "gap_cls"])
def test_simple_poolings(kind: str, trunk: dict[str, Any]) -> None:
    model = build("pooled", trunk, POOLING_TYPE=kind).eval()
    tokens = model.trunk.tokens(images())
    first, mean = tokens[:, 0], tokens[:, model.trunk.num_prefix :].mean(1)
    pooled = {"cls": first, "gap": mean, "gap_cls": torch.cat([first, mean], 1)}[kind]
    expected = pooled @ model.heads.classifier.weight.T + model.heads.classifier.bias
    torch.testing.assert_close(model(images()), expected)


def test_efficient_probing_is_attention_per_slice() -> None:
    model = build("pooled", VIT | {"OPTIONS": VIT["OPTIONS"] | {"embed_dim": 64}}, POOLING_TYPE="ep").eval()
    pool, patches = model.heads.pool, model.trunk.tokens(images())[:, 3:]
    slices = []
    for i in range(32):
        attention = torch.softmax(patches @ pool.queries[i] / 8, dim=1)  # (B, n); 8 is the root of the width
        values = patches @ pool.values.weight[2 * i : 2 * i + 2].T
        slices.append((attention[:, :, None] * values).sum(1))
    expected = model.heads.classifier(pool.fc_norm(torch.cat(slices, 1)))
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)


def test_attention_pooling_is_attention_of_one_query() -> None:
    model = build("pooled", VIT, POOLING_TYPE="aim").eval()
    pool, patches = model.heads.pool, model.trunk.tokens(images())[:, 3:]
    normal = patches / (1 + 1e-6) ** 0.5  # running statistics of a new model
    query, keys, values = pool.query[0], normal @ pool.keys.weight.T, normal @ pool.values.weight.T
    heads = []
    for i in range(12):
        part = slice(2 * i, 2 * i + 2)
        attention = torch.softmax(keys[:, :, part] @ query[part] / 2**0.5, dim=1)
        heads.append((attention[:, :, None] * values[:, :, part]).sum(1))
    torch.testing.assert_close(model(images()), model.heads.classifier(torch.cat(heads, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/convnext_tiny", "conv_stem"])
def test_cnns_keep_their_own_pooling(name: str) -> None:
    model = build("pooled", {"NAME": name}, size=64, POOLING_TYPE="gap")
    assert model(images(2, (64, 64))).shape == (2, 5)
    if name.startswith("timm"):
        deep = build("pooled", {"NAME": name}, size=64, POOLING_TYPE="gap", DROP_PATH_STAGE_1=0.2)
        assert deep.trunk.backbone.layer4[-1].drop_path.drop_prob == pytest.approx(0.2)


# ------------------------------------------------------------------------------------------------------- interventions
def test_parts_to_leave_out() -> None:
    assert leave_one_out(3) == [(0,), (1,), (2,)]
    assert leave_one_out(3, fixed=[1]) == [(1, 0), (1, 2)]
    with pytest.raises(ConfigError, match="no part 7"):
        leave_one_out(3, fixed=[7])
