"""Which transforms go with masks. Free of torchvision, whose import takes longer and more memory than all of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Kinds of models (MODEL.NAME) that are given the masks of their images.
MODELS_WITH_MASKS = ("decoupled",)
#: Transforms that would move the image without its mask, and what to use.
_WOULD_PART: dict[str, str] = {
    **dict.fromkeys(
        ("AugMix", "AutoAugment", "RandAugment", "TrivialAugmentWide", "VisslAutoAugment"),
        "RandomAffine and ColorJitter",
    ),
    "ImgPilResizeLargerSide": "Resize with size: null and max_size",
    "ImgRotatePil": "RandomRotation",
    "MNISTImgPil2RGB": "Pad",
    "TimmTrain": "RandomResizedCrop, RandomHorizontalFlip and ColorJitter",
}


def mask_problems(transforms: Sequence[Any], *, key: str, with_masks: bool) -> list[str]:
    """What in a TRANSFORMS list does not go with masks or, `with_masks` false, without them; one message each."""
    problems: list[str] = []
    for position, entry in enumerate(transforms):
        if not isinstance(entry, dict):
            continue
        where, name = f"{key}.{position}", entry.get("name")
        if with_masks and name in _WOULD_PART:
            problems.append(
                f"{where}.name={name!r}: it would move the image but not its mask, which this model is given, too. "
                f"Use {_WOULD_PART[name]}."
            )
        if not with_masks and name == "CropOnMask":
            problems.append(
                f"{where}.name='CropOnMask': there are no masks, which only decoupled models get. Use RandomCrop."
            )
        inner = entry.get("transforms")
        if isinstance(inner, list):
            problems += mask_problems(inner, key=f"{where}.transforms", with_masks=with_masks)
    return problems
