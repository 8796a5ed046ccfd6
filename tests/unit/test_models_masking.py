"""Stage 2 sees its mask's foreground and nothing else: exactness, pruning, gradients through masks, odd cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vissl_like.config.schema import Config
from vissl_like.config.schema_model import Model
from vissl_like.core import parallel
from vissl_like.models.masked_vit import Decoupled, MaskGradient, prune
from vissl_like.models.part_zoo import build_part_model
from vissl_like.models.two_stage import TwoStage, hard_mask, soft_mask, token_mask

VIT: dict[str, Any] = {
    "NAME": "timm/vit_tiny_patch16_224",
    "OPTIONS": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 2, "no_embed_class": True},
}
HF = {
    "NAME": "hf/dinov2_with_registers",
    "OPTIONS": {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 4, "image_size": 16},
}
STEM = {"NAME": "conv_stem", "OPTIONS": {"width": 16, "stem": [8, 16]}}
TRUNKS = pytest.mark.parametrize("trunk", [VIT, HF], ids=["timm", "hf"])


def build(kind: str, trunk: dict[str, Any], *, size: int | tuple[int, int] = 16, **parts: Any) -> Any:
    torch.manual_seed(0)
    model = Model.model_validate({"TRUNK": trunk, "PARTS": {"NUM_PARTS": 3} | parts})
    built = build_part_model(kind, model, num_classes=5, image_size=size)
    with torch.no_grad():
        for parameter in built.parameters():  # LayerScale and small initial weights would hide differences
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1))
    return built


def images(count: int = 4, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def masks() -> Tensor:
    """Four 4x4 grids: random, nothing, one token, everything."""
    random = (torch.rand(4, 4, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    one = torch.zeros(4, 4)
    one[2, 1] = 1
    return torch.stack([random, torch.zeros(4, 4), one, torch.ones(4, 4)])


def pixels(mask: Tensor) -> Tensor:
    """(B, h, w) of patches -> (B, 1, H, W) of pixels."""
    return mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]


# ----------------------------------------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("training", [False, True])
@TRUNKS
def test_masked_pixels_have_no_influence_at_all(trunk: dict[str, Any], training: bool) -> None:
    """Whatever stands in the background, the logits are the same to the last bit, and its gradient is exactly zero."""
    model: Decoupled = build("decoupled", trunk, PRUNE_TOKENS=False).train(training)
    x, shown = images(), pixels(masks())
    for strength in (1.0, 1e3):
        changed = torch.where(shown.bool(), x, strength * torch.randn_like(x))
        assert torch.equal(model(x, masks()), model(changed, masks()))
    seen = x.clone().requires_grad_()
    model(seen, masks()).square().sum().backward()
    assert seen.grad is not None
    assert (seen.grad[shown.expand_as(x) == 0] == 0).all()
    shown_gradient = seen.grad[shown.expand_as(x) == 1]
    assert (shown_gradient != 0).double().mean() > 0.99


@TRUNKS
def test_two_stages_with_a_frozen_mask(trunk: dict[str, Any]) -> None:
    """The same in the two-stage model; stage 1 does see the background."""
    model: TwoStage = build("two_stage", trunk, PRUNE_TOKENS=False).eval()
    x = images()
    with torch.no_grad():  # prototypes amid the features, so that all of them win somewhere
        corners = model.trunk["stage_1"].maps(x)[0, :, ::3, ::3].flatten(1).T
        model.heads["stage_1"].prototypes.weight.copy_(corners[:, :, None, None])
    found = model(x)
    assert 0 < float(found.mask_hard[:, 0].mean()) < 1
    shown = pixels(found.mask_hard[:, 0])
    changed = torch.where(shown.bool(), x, torch.randn_like(x))
    with torch.no_grad():
        kept = model.stage_two(changed, soft=found.mask_soft, hard=found.mask_hard)
    assert torch.equal(kept, found.logits)
    assert not torch.equal(model.stage_one(changed).maps, found.stage_one.maps)


@TRUNKS
def test_pruned_is_masked(trunk: dict[str, Any]) -> None:
    whole, pruned = (build("decoupled", trunk, PRUNE_TOKENS=on).eval() for on in (False, True))
    with torch.no_grad():
        for rows in ([0, 1, 2, 3], [0], [1], [2], [3], [1, 2], [0, 2]):
            expected, found = whole(images()[rows], masks()[rows]), pruned(images()[rows], masks()[rows])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert torch.isfinite(found).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_pruning_keeps_foreground_in_order(rows: list[list[bool]]) -> None:
    hard = torch.tensor(rows)
    tokens = torch.arange(len(rows) * 8.0).reshape(len(rows), 8, 1)  # two prefix tokens and six patches
    kept, mask = prune(tokens, hard, num_prefix=2)
    assert mask.shape[1] == max(1, max(sum(row) for row in rows))
    assert torch.equal(kept[:, :2], tokens[:, :2])
    for i, row in enumerate(rows):
        assert kept[i, 2:, 0][mask[i]].tolist() == [float(tokens[i, 2 + j, 0]) for j, on in enumerate(row) if on]
        assert kept[i, 2:, 0].tolist() == sorted(kept[i, 2:, 0].tolist())


@pytest.mark.parametrize(("class_token", "registers"), [(True, 2), (False, 2), (False, 0)])
def test_late_masking_averages_final_patches_over_all_positions(class_token: bool, registers: int) -> None:
    """With a class token or without: no attention is masked."""
    trunk = VIT | {"OPTIONS": VIT["OPTIONS"] | {"class_token": class_token, "reg_tokens": registers}}
    model: Decoupled = build("decoupled", trunk, LATE_MASKING=True).eval()
    patches = model.trunk.tokens(images())[:, class_token + registers :]
    mean = (patches * masks().flatten(1)[:, :, None]).sum(1) / 16
    expected = mean @ model.heads.classifier.weight.T + model.heads.classifier.bias
    torch.testing.assert_close(model(images(), masks()), expected)


# ------------------------------------------------------------------------------------------------ gradients of masks
def explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention with weights m_j e^s_ij, written out."""
    weights = mask[:, None, None, :] * (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).exp()
    return weights @ value / weights.sum(dim=-1, keepdim=True)


def test_straight_through_is_the_derivative_of_weighted_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    soft = torch.rand(2, 6, dtype=torch.float64)
    soft[:, 0] = 0.9
    hard = (soft > 0.5).double()
    cotangent = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    weights = hard.clone().requires_grad_()
    wanted = torch.autograd.grad((explicit(q, k, v, weights) * cotangent).sum(), [q, k, v, weights])
    surrogate = soft.clone().requires_grad_()
    keys = hard.bool()[:, None, None, :]
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
    with MaskGradient(keys, surrogate[:, None, None, :]):
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
    assert torch.equal(output, plain)
    found = torch.autograd.grad((output * cotangent).sum(), [q, k, v, surrogate])
    for ours, expected in zip(found, wanted):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@TRUNKS
def test_straight_through_moves_the_prototypes_and_nothing_else_changes(trunk: dict[str, Any]) -> None:
    logits, gradients, second = {}, {}, {}
    for kind in ("none", "straight_through"):
        model: TwoStage = build("two_stage", trunk, MASK_GRADIENT=kind).train()
        model.check_input((3, 16, 16), key="config.DATA.TRAIN.TRANSFORMS")  # by way of the library's own forward pass
        torch.manual_seed(5)
        output = model(images())
        logits[kind] = output.logits
        F.cross_entropy(output.logits, torch.tensor([0, 1, 2, 3])).backward()
        gradients[kind] = model.heads["stage_1"].prototypes.weight.grad
        second[kind] = (
            model.trunk["stage_2"].backbone.get_parameter("cls_token" if trunk is VIT else "embeddings.cls_token").grad
        )
    assert torch.equal(logits["none"], logits["straight_through"])
    torch.testing.assert_close(second["none"], second["straight_through"])
    assert gradients["none"] is None
    moved = gradients["straight_through"]
    assert torch.isfinite(moved).all() and (moved.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("how", ["recompute", "recompute_and_compile"])
def test_straight_through_where_blocks_are_computed_again(how: str) -> None:
    """The second pass of a block has to see the soft mask as the first one did."""
    gradients = []
    for recompute in (False, True):
        model: TwoStage = build("two_stage", VIT, MASK_GRADIENT="straight_through", GUMBEL_SOFTMAX=False).train()
        if recompute:
            machine = {} if how == "recompute" else {"COMPILE": "blocks", "COMPILE_BACKEND": "aot_eager"}
            section = {"ACTIVATION_CHECKPOINTING": {"USE_ACTIVATION_CHECKPOINTING": True}}
            parallel.arrange(model, Config.model_validate({"MODEL": section, "MACHINE": machine}))
        torch.manual_seed(5)
        F.cross_entropy(model(images()).logits, torch.tensor([0, 1, 2, 3])).backward()
        gradients.append(model.heads["stage_1"].prototypes.weight.grad)
    assert gradients[0] is not None and gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_straight_through_under_autocast_is_finite() -> None:
    model: TwoStage = build("two_stage", VIT, MASK_GRADIENT="straight_through").train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(100 * images())
    F.cross_entropy(output.logits.float(), torch.tensor([0, 1, 2, 3])).backward()
    assert torch.isfinite(model.heads["stage_1"].prototypes.weight.grad).all()


def test_soft_masks_reach_every_parameter_of_stage_one() -> None:
    model: TwoStage = build("two_stage", VIT, USE_SOFT_MASKS=True).train()
    F.cross_entropy(model(images()).logits, torch.tensor([0, 1, 2, 3])).backward()
    without = [name for name, value in model.named_parameters() if "stage_1" in name and value.grad is None]
    assert all(name.startswith(("heads.stage_1.modulation", "heads.stage_1.classifier")) for name in without)


# ---------------------------------------------------------------------------------------------------------------- masks
def test_ties_are_foreground_and_absent_parts_are_not() -> None:
    maps = torch.tensor([[0.5, 0.2, 0.0], [0.5, 0.8, 0.0]])[None, :, None, :]  # one part, background, three positions
    assert hard_mask(soft_mask(maps))[0, 0, 0].tolist() == [1.0, 0.0, 0.0]


def test_removed_parts_become_background() -> None:
    maps = torch.tensor([[0.6, 0.1, 0.3, 0.1], [0.3, 0.6, 0.3, 0.2], [0.1, 0.3, 0.4, 0.7]])[None, :, None, :]
    assert hard_mask(soft_mask(maps))[0, 0, 0].tolist() == [1, 1, 0, 0]
    assert hard_mask(soft_mask(maps, remove=[0]))[0, 0, 0].tolist() == [0, 1, 0, 0]
    assert hard_mask(soft_mask(maps, remove=[0, 1]))[0, 0, 0].tolist() == [0, 0, 0, 0]
    assert torch.isfinite(soft_mask(maps, remove=[0, 1])).all()


def test_removed_parts_are_those_of_the_maps_that_are_shown() -> None:
    """Where maps and mask have noise of their own, parts are taken out of the maps, as the original does."""
    model: TwoStage = build("two_stage", VIT, SHARED_GUMBEL=False, EVAL_GUMBEL=True).eval()
    with torch.no_grad():  # prototypes amid the features, so that all of them win somewhere
        corners = model.trunk["stage_1"].maps(images())[0, :, ::3, ::3].flatten(1).T
        model.heads["stage_1"].prototypes.weight.copy_(corners[:, :, None, None])
        found = model(images(), remove=[1])
    strongest = found.stage_one.maps.argmax(dim=1)
    assert torch.equal(found.mask_hard[:, 0] > 0, (strongest == 0) | (strongest == 2))


@pytest.mark.parametrize("num_parts", [1, 3])
def test_removing_all_parts_leaves_an_empty_foreground(num_parts: int) -> None:
    model: TwoStage = build("two_stage", VIT, NUM_PARTS=num_parts).eval()
    with torch.no_grad():
        found = model(images(), remove=range(num_parts))
        elsewhere = model.stage_two(torch.randn(4, 3, 16, 16), soft=found.mask_soft, hard=found.mask_hard)
    assert found.mask_hard[:, 0].sum() == 0 and torch.isfinite(found.logits).all()
    torch.testing.assert_close(found.logits, elsewhere)  # without foreground every image looks the same


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_two_stages_pruned_are_two_stages_masked(num_parts: int, size: tuple[int, int]) -> None:
    """Whatever parts are removed, down to an empty foreground, for a batch and for single images."""
    model: TwoStage = build("two_stage", VIT, size=size, NUM_PARTS=num_parts).eval()
    x = images(3, size)
    with torch.no_grad():  # prototypes amid the features, so that all of them win somewhere
        spots = model.trunk["stage_1"].maps(x)[0].flatten(1).T[:: 16 // (num_parts + 1)][: num_parts + 1]
        model.heads["stage_1"].prototypes.weight.copy_(spots[:, :, None, None])
        for rows in ([0, 1, 2], [0], [1], [2]):
            for removed in ([], [0], list(range(num_parts))):
                found = []
                for on in (True, False):
                    model.options = model.options.model_copy(update={"PRUNE_TOKENS": on})
                    found.append(model(x[rows], remove=removed))
                assert torch.isfinite(found[0].logits).all()
                torch.testing.assert_close(found[0].logits, found[1].logits, rtol=1e-5, atol=1e-5)
                assert torch.equal(found[0].mask_hard, found[1].mask_hard)


def test_the_mask_may_lie_on_another_grid() -> None:
    """A CNN before a transformer: a patch is foreground if any position in it is."""
    soft = torch.rand(2, 2, 8, 6)
    hard = hard_mask(soft)
    finer = token_mask(soft, hard, grid=(16, 12))
    assert torch.equal(finer.hard, (hard[:, 0] > 0).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1))
    coarser = token_mask(soft, hard, grid=(4, 3))
    assert torch.equal(coarser.hard, hard[:, 0].reshape(2, 4, 2, 3, 2).amax((2, 4)).flatten(1) > 0)
    torch.testing.assert_close(coarser.soft, soft[:, 0].reshape(2, 4, 2, 3, 2).amax((2, 4)).flatten(1))


@pytest.mark.parametrize("gradient", ["none", "straight_through"])
@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_a_cnn_before_a_transformer(size: tuple[int, int], gradient: str) -> None:
    second = {"NAME": VIT["NAME"], "OPTIONS": VIT["OPTIONS"] | {"patch_size": 8}}
    model: TwoStage = build("two_stage", STEM, size=size, STAGE_TWO_TRUNK=second, MASK_GRADIENT=gradient).train()
    found = model(images(2, size), twin=images(2, size).flip(3))
    assert found.mask_hard.shape == (2, 2, size[0] // 4, size[1] // 4)
    assert found.twin is not None and found.twin.maps.shape == found.stage_one.maps.shape
    F.cross_entropy(found.logits, torch.tensor([0, 1])).backward()
    prototypes = model.heads["stage_1"].prototypes.weight.grad
    assert (prototypes is None) == (gradient == "none")


def test_the_twin_runs_stage_one_only() -> None:
    model: TwoStage = build("two_stage", VIT).train()
    ran: list[str] = []
    for stage in ("stage_1", "stage_2"):
        model.trunk[stage].backbone.blocks[0].register_forward_hook(lambda *_, stage=stage: ran.append(stage))
    model(images(), twin=images())
    assert sorted(ran) == ["stage_1", "stage_1", "stage_2"]


def test_a_mask_of_tokens_is_what_the_head_was_trained_with() -> None:
    """In training background tokens are computed but unseen: the class token is the same as at evaluation."""
    model: Decoupled = build("decoupled", VIT)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(images(), masks()), model.eval()(images(), masks()))
