"""One masked block and the whole second stage as the original computes them: hard, soft and no mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.numerics.part_vectors import Vectors, build, close, load, options
from vissl_like.models.masked_vit import Decoupled, TokenMask, masked_token
from vissl_like.models.part_backbones import TIMM

VECTORS = Vectors("parts_masked_attention")
PATCH, GRID = VECTORS.settings["patch"], VECTORS.settings["grid"]
MASK = TokenMask(hard=VECTORS["mask_hard"] > 0.5, soft=VECTORS["mask_soft"])


def empty(**parts: Any) -> Decoupled:
    wanted = options(VECTORS.trunk, parts)
    return build("decoupled", wanted, num_classes=VECTORS.num_classes, image_size=VECTORS.image_size)


def second_stage(folder: Path, kind: str, *, prune: bool = True) -> Decoupled:
    model = empty(PRUNE_TOKENS=prune)
    load(model, VECTORS.below("stage2/sd/"), folder, preset="ifam_decoupled")
    # The decoupled model is given hard masks; stage 2 of the two-stage model knows soft ones too.
    model.options = model.options.model_copy(update={"USE_SOFT_MASKS": kind == "soft"})
    return model


def features(model: Decoupled, images: torch.Tensor, mask: TokenMask) -> torch.Tensor:
    return masked_token(model.trunk, model.heads.prefix_mask, images, mask, options=model.options)


@pytest.mark.parametrize("kind", ["hard", "soft", "none"])
def test_one_block(kind: str) -> None:
    """Through the same call that the model makes for each of its blocks."""
    block = empty().trunk.backbone.blocks[0]
    block.load_state_dict(VECTORS.below("block/sd/"))
    tokens = VECTORS["block/tokens"].requires_grad_()
    soft = MASK.soft.clone().requires_grad_()
    ones = torch.ones(len(tokens), VECTORS.settings["prefix"])
    masks = {
        "none": None,
        "hard": torch.cat([ones.bool(), MASK.hard], dim=1)[:, None, None, :],
        "soft": torch.cat([ones, soft], dim=1).add(1e-10).log()[:, None, None, :],
    }
    output = TIMM.run(block, tokens, masks[kind])
    close(output, VECTORS[f"block/{kind}/output"], "feature")
    (output * VECTORS["block/cotangent"]).sum().backward()
    assert tokens.grad is not None
    close(tokens.grad, VECTORS[f"block/{kind}/grad_tokens"], "gradient")
    close(block.attn.qkv.weight.grad, VECTORS[f"block/{kind}/grad_qkv_weight"], "gradient")
    if kind == "soft":
        assert soft.grad is not None
        close(soft.grad, VECTORS["block/soft/grad_mask"], "gradient")


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_whole_stage(kind: str, mode: str, tmp_path: Path) -> None:
    model = second_stage(tmp_path, kind).train(mode == "train")
    with torch.no_grad():
        token = features(model, VECTORS["stage2/image"], MASK)
        close(token, VECTORS[f"stage2/{kind}/{mode}/features"], "feature", "features")
        close(model.heads(token), VECTORS[f"stage2/{kind}/{mode}/logits"], "feature", "logits")


@pytest.mark.parametrize("row", range(len(MASK.hard)))
def test_single_images(row: int, tmp_path: Path) -> None:
    """A batch of one is pruned further than the same image in a batch: nothing changes."""
    model = second_stage(tmp_path, "hard").eval()
    mask = TokenMask(hard=MASK.hard[row : row + 1], soft=MASK.soft[row : row + 1])
    with torch.no_grad():
        logits = model.heads(features(model, VECTORS["stage2/image"][row : row + 1], mask))
    close(logits, VECTORS[f"stage2/hard/eval_single/{row}"], "feature")


def test_given_masks_of_any_size(tmp_path: Path) -> None:
    """Masks of images are brought to the grid of patches by the nearest pixel."""
    model = second_stage(tmp_path, "hard").eval()
    masks = MASK.hard.float().unflatten(1, GRID)
    large = masks.repeat_interleave(PATCH, dim=1).repeat_interleave(PATCH, dim=2)
    with torch.no_grad():
        for given in (masks, large, large[:, None]):
            close(model(VECTORS["stage2/image"], given), VECTORS["stage2/hard/eval/logits"], "feature")
