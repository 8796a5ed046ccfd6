"""TRANSFORMS: a list of names and arguments -> what workers do to one image, and what is left for the device.

A ToTensor (or ImgToTensor, ImgPilToRawTensor) at the end, with or without a Normalize after it, is done on batches on
the device: workers hand over uint8, a quarter of the bytes of float32. A list that ends with a PIL image ends in an
implied ToTensor. Colour and blur before it can be done there, too (data/photometric.py); the numbers for them are drawn
in the worker. A crop, resize and flip at the beginning are one step (data/geometry.py). Everything else is done per
image in the worker. Names are ours (data/transforms.py) or those of torchvision.transforms.v2.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from vissl_like.data import photometric
from vissl_like.data.decode import Encoded, Unreadable
from vissl_like.data.geometry import FusedGeometry, find_fused
from vissl_like.data.mask_rules import mask_problems
from vissl_like.data.transforms import OWN_TRANSFORMS, image_to_uint8, interpolation_mode
from vissl_like.errors import ConfigError
from vissl_like.registry import quick_imports, suggest

# Classes of torchvision.transforms.v2 that make no sense for one image in a list of names, and why.
_NOT_OFFERED = {
    "Transform": "it is a base class",
    "Lambda": "it needs a Python function",
    "LinearTransformation": "it needs a matrix",
    "CutMix": "it mixes the images of a batch",
    "MixUp": "it mixes the images of a batch",
    "FiveCrop": "it makes several images of one",
    "TenCrop": "it makes several images of one",
    "UniformTemporalSubsample": "it is for videos",
    "ClampBoundingBoxes": "it is for boxes",
    "ClampKeyPoints": "it is for key points",
    "ConvertBoundingBoxFormat": "it is for boxes",
    "RandomIoUCrop": "it is for boxes",
    "SanitizeBoundingBoxes": "it is for boxes",
    "SanitizeKeyPoints": "it is for key points",
    "SetClampingMode": "it is for boxes",
}

# What each step needs and makes: "pil", "uint8" tensor or "float" tensor. Others take any and keep it.
_PIL_TO_PIL = (
    "ImgPilColorDistortion",
    "ImgPilGaussianBlur",
    "ImgPilPlanckianJitter",
    "ImgPilRandomColorJitter",
    "ImgPilRandomSolarize",
    "ImgPilResizeLargerSide",
    "ImgRotatePil",
    "MNISTImgPil2RGB",
    "TimmTrain",
    "VisslAutoAugment",
)
_FROM_PIL = {
    **dict.fromkeys(_PIL_TO_PIL, "pil"),
    **dict.fromkeys(("ToTensor", "ImgToTensor", "ImgPilToRawTensor", "ImgPil2LabTensor"), "float"),
    **dict.fromkeys(("ToImage", "PILToTensor"), "uint8"),
}
_NEEDS_FLOAT = {"Normalize"}
_NEEDS_TENSOR = {"RandomErasing", "GaussianNoise", "ToDtype", "ConvertImageDtype", "ToPILImage"}
_CONTAINERS = {"Compose", "RandomApply", "RandomChoice", "RandomOrder"}
_MOVABLE = {"ToTensor": True, "ImgToTensor": True, "ImgPilToRawTensor": False}  # -> whether pixels are divided by 255


class TransformFailed(Exception):
    """A transform could not treat one image; the message names the transform."""


class DeviceTransform(torch.nn.Module):
    """Batches (B, C, H, W), uint8 or float, on any device -> float32, augmented, scaled and normalised.

    Float batches were scaled and normalised in the worker. The order of channels is left alone: the model itself knows
    which one it takes (MODEL.INPUT_TYPE).
    """

    def __init__(
        self,
        *,
        divide_by_255: bool = True,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augment: Sequence[photometric.Step] = (),
    ) -> None:
        super().__init__()
        self.divide_by_255, self.augment = divide_by_255, list(augment)
        self.is_normalizing = mean is not None
        self.register_buffer("mean", torch.tensor(mean or [0.0]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or [1.0]).view(-1, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """`draws`: the batch's random numbers (B, R) on the host, where there is something to augment."""
        if images.dtype == torch.uint8:
            # Whatever the order in memory that the loader found cheapest, the model always gets the same one.
            images = images.to(torch.float32, memory_format=torch.contiguous_format)
            if self.divide_by_255 or self.augment:
                images.div_(255)
            if self.augment:
                if draws is None:
                    raise ValueError("the batch's `draws` are missing: its images would not be augmented")
                images = photometric.apply(self.augment, images, draws.numpy())
                if not self.divide_by_255:
                    images.mul_(255)
            if self.is_normalizing:
                images.sub_(self.mean.to(images.device)).div_(self.std.to(images.device))
        return images


@dataclass
class Views:
    """What one TRANSFORMS list comes to. `label_names` is set when a transform gives the label (ImgRotatePil).

    `fused` stands for the first steps where images come encoded, for all of them if `is_fused_whole`. `with_masks`: each
    step takes and gives an image and its mask, see together().
    """

    steps: list[tuple[str, Callable[..., Any]]] = field(default_factory=list)
    device_transform: DeviceTransform = field(default_factory=DeviceTransform)
    label_names: list[str] | None = None
    fused: FusedGeometry | None = None
    with_masks: bool = False

    @property
    def is_fused_whole(self) -> bool:
        """Whether a worker has nothing to do after `fused`."""
        return self.fused is not None and self.fused.num_replaced == len(self.steps)

    def draw(self) -> np.ndarray:
        """The numbers that the device augments one image with, float32 (R,); to be drawn after its other transforms."""
        return photometric.draw(self.device_transform.augment)

    def __call__(self, image: Image.Image | Encoded) -> tuple[torch.Tensor, int | None]:
        """One image -> (tensor (C, H, W), uint8 where the rest is done on the device; label or None)."""
        label: int | None = None
        current, done = self._begin(image)
        for name, step in self.steps[done:]:
            try:
                current = step(current)
            except Exception as error:
                raise _failed(name, error) from error
            if isinstance(current, tuple):
                current, label = current
        is_final = self.is_fused_whole and isinstance(current, torch.Tensor)  # in the order in memory that is wanted
        return (current if is_final else _as_tensor(current)), label

    def together(self, image: Image.Image, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """One image and the mask of its object, bool (H, W) -> (as by calling, bool (H', W')), moved alike."""
        from vissl_like.data.masks import ObjectMask

        current: tuple[Any, ObjectMask] = (image, ObjectMask.of(mask))
        for name, step in self.steps:
            try:
                current = step(*current)
            except Exception as error:
                raise _failed(name, error) from error
        return _as_tensor(current[0]), current[1].is_object().contiguous()

    def _begin(self, image: Image.Image | Encoded) -> tuple[Any, int]:
        """What the next step takes, and how many steps are done."""
        if isinstance(image, Image.Image):
            return image, 0
        if self.fused is None:
            return image.image(), 0
        try:
            made = self.fused(image)
        except Unreadable:
            raise
        except Exception as error:
            raise _failed(self.steps[0][0], error) from error
        if made is None:
            return image.image(), 0
        next_takes = made if self.is_fused_whole else Image.fromarray(made.permute(1, 2, 0).numpy())
        return next_takes, self.fused.num_replaced


def _as_tensor(image: Any) -> torch.Tensor:
    """What the last step of a worker gave, as (C, H, W)."""
    if isinstance(image, Image.Image):
        return image_to_uint8(image)
    return image.as_subclass(torch.Tensor).contiguous()


def _failed(name: str, error: Exception) -> TransformFailed:
    return TransformFailed(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def transform_names() -> list[str]:
    """Every name that TRANSFORMS takes, sorted."""
    return sorted({*OWN_TRANSFORMS, *_torchvision_transforms()})


def transform_signature(name: str) -> str:
    """The arguments of a transform as text, for the terminal reference."""
    return str(inspect.signature(_maker_of(name)))


def check_transforms(
    transforms: list[dict[str, Any]], key: str, *, input_type: str = "rgb", with_masks: bool = False
) -> list[str]:
    """Everything wrong with a TRANSFORMS list, one message each; needs no data. `key` is its dotted key."""
    return _assemble(transforms, key=key, input_type=input_type, with_masks=with_masks)[1]


def build_views(
    transforms: list[dict[str, Any]],
    *,
    key: str,
    input_type: str = "rgb",
    augment_on_device: bool = False,
    use_reduced: bool = False,
    with_masks: bool = False,
) -> Views:
    """The views of a TRANSFORMS list. Raises ConfigError with everything wrong.

    `augment_on_device`: colour and blur at the end are left to the device. `use_reduced`: see geometry.FusedGeometry.
    `with_masks`: the masks of images are moved along.
    """
    views, problems = _assemble(
        transforms,
        key=key,
        input_type=input_type,
        augment_on_device=augment_on_device,
        use_reduced=use_reduced,
        with_masks=with_masks,
    )
    if problems:
        raise ConfigError("\n".join(problems))
    return views


def _assemble(
    transforms: list[dict[str, Any]],
    *,
    key: str,
    input_type: str,
    augment_on_device: bool = False,
    use_reduced: bool = False,
    with_masks: bool = False,
) -> tuple[Views, list[str]]:
    problems = mask_problems(transforms, key=key, with_masks=with_masks)
    made, kind = _make_list(transforms, key=key, kind="pil", problems=problems)
    if input_type == "lab" and not any(entry.get("name") == "ImgPil2LabTensor" for entry in transforms):
        problems.append(f"config.MODEL.INPUT_TYPE='lab': {key} must hold ImgPil2LabTensor, which makes Lab images.")
    if problems:
        return Views(), problems
    makers_of_labels = [step for _, step in made if hasattr(step, "class_names")]
    if len(makers_of_labels) > 1:
        problems.append(f"{key}: {len(makers_of_labels)} transforms give the label; only one can.")
    divide, mean, std, kept = _split_off_tail(transforms, made)
    ends_in_pil = len(kept) < len(made) or kind == "pil"
    augment = photometric.find_steps([step for _, step in kept]) if augment_on_device and ends_in_pil else []
    kept = kept[: len(kept) - len(augment)]
    device = DeviceTransform(divide_by_255=divide, mean=mean, std=std, augment=augment)
    names = makers_of_labels[0].class_names if makers_of_labels else None  # type: ignore[attr-defined]
    if with_masks:
        from vissl_like.data.masks import joint

        steps = [(name, joint(step)) for name, step in kept]
        return Views(steps=steps, device_transform=device, with_masks=True), problems
    fused = find_fused([step for _, step in kept], use_reduced=use_reduced)
    return Views(steps=kept, device_transform=device, label_names=names, fused=fused), problems


def _split_off_tail(
    transforms: list[dict[str, Any]], made: list[tuple[str, Any]]
) -> tuple[bool, list[float] | None, list[float] | None, list[tuple[str, Any]]]:
    """(divide by 255, mean, std, what workers keep): the tail that is the same on a batch goes to the device."""
    names = [name for name, _ in made]
    mean, std = None, None
    if len(names) >= 2 and names[-1] == "Normalize" and names[-2] in _MOVABLE:
        mean, std = ([float(value) for value in transforms[-1][word]] for word in ("mean", "std"))
        made, names = made[:-1], names[:-1]
    if names and names[-1] in _MOVABLE:
        return _MOVABLE[names[-1]], mean, std, made[:-1]
    return True, None, None, made


# ------------------------------------------------------------------------------------ names to objects
def _make_list(
    entries: list[dict[str, Any]], *, key: str, kind: str | None, problems: list[str]
) -> tuple[list[tuple[str, Any]], str | None]:
    """([(name, transform)], kind of image after the last). A kind of None means unknown: something before is wrong."""
    made = []
    for position, entry in enumerate(entries):
        where = f"{key}.{position}"
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            problems.append(f"{where}={entry!r}: a transform is {{name: NAME, argument: value, ...}}.")
            kind = None
            continue
        before = len(problems)
        transform = _make_one(name, entry, where=where, kind=kind, problems=problems)
        if len(problems) > before:
            kind = None
            continue
        made.append((name, transform))
        try:
            kind = _kind_after(name, entry, kind)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            kind = None
    return made, kind


def _make_one(name: str, entry: dict[str, Any], *, where: str, kind: str | None, problems: list[str]) -> Any:
    """The transform itself, or None with something added to `problems`."""
    maker = _maker_of(name)
    if maker is None:
        because = f": {_NOT_OFFERED[name]}." if name in _NOT_OFFERED else (suggest(name, transform_names()) or ".")
        problems.append(f"{where}.name={name!r}: no such transform{because} `list transforms` shows all.")
        return None
    if entry.get("indices") and 0 not in entry["indices"]:
        problems.append(f"{where}.indices={entry['indices']}: a sample has one image, number 0.")
    arguments = {word: value for word, value in entry.items() if word not in ("name", "indices")}
    before = len(problems)
    problems += _argument_problems(name, maker, arguments, where=where)
    if len(problems) == before and name in _CONTAINERS:
        arguments["transforms"] = _make_inner(name, arguments["transforms"], where=where, kind=kind, problems=problems)
    if len(problems) > before:
        return None
    try:
        return maker(**_converted(name, arguments))
    except Exception as error:
        problems.append(f"{where}: {name} does not take these values ({type(error).__name__}: {error}).")
        return None


def _argument_problems(name: str, maker: Any, arguments: dict[str, Any], *, where: str) -> list[str]:
    """Unknown and missing arguments."""
    parameters = inspect.signature(maker).parameters
    takes = f"{name} takes {', '.join(parameters)}." if parameters else f"{name} takes no arguments."
    stray = [word for word in arguments if word not in parameters]
    missing = [
        word
        for word, parameter in parameters.items()
        if parameter.default is parameter.empty
        and word not in arguments
        # A misspelt argument is reported once, as unknown.
        and not any(suggest(other, list(parameters)) == suggest(word, [word]) for other in stray)
    ]
    unknown = [f"{where}.{word}: unknown argument{suggest(word, list(parameters)) or '.'} {takes}" for word in stray]
    return unknown + [f"{where}: {name} needs the argument {word!r}. {takes}" for word in missing]


def _make_inner(name: str, entries: Any, *, where: str, kind: str | None, problems: list[str]) -> list[Any]:
    """The transforms inside of Compose, RandomApply, RandomChoice, RandomOrder."""
    before = len(problems)
    made, after = _make_list(entries or [], key=f"{where}.transforms", kind=kind, problems=problems)
    if len(problems) == before and after != kind and name != "Compose":
        problems.append(f"{where}: {name} may not turn images into tensors or back; do that outside of it.")
    if any(hasattr(transform, "class_names") for _, transform in made):
        problems.append(f"{where}: a transform that gives the label cannot stand inside of {name}.")
    return [transform for _, transform in made]


def _kind_after(name: str, entry: dict[str, Any], kind: str | None) -> str | None:
    """What the image is after this transform. Raises ValueError if it stands in the wrong place."""
    if kind is None:
        return None
    if name in _FROM_PIL:
        if kind != "pil":
            raise ValueError(
                f"{name} takes an image, but a transform before it has made a tensor; put it before that one."
            )
        return _FROM_PIL[name]
    if name in _NEEDS_FLOAT and kind != "float":
        raise ValueError(f"{name} takes a float tensor; put ToTensor before it.")
    if name in _NEEDS_TENSOR and kind == "pil":
        raise ValueError(f"{name} takes a tensor; put ToTensor before it.")
    if name in ("ToDtype", "ConvertImageDtype"):
        return "float" if _dtype(entry.get("dtype", "float32")).is_floating_point else "uint8"
    if name == "ToPILImage":
        return "pil"
    if name == "Compose":
        for inner in entry["transforms"]:
            kind = _kind_after(inner["name"], inner, kind)
    return kind


@functools.lru_cache(maxsize=1)
def _torchvision_transforms() -> dict[str, Any]:
    with quick_imports():
        from torchvision.transforms import v2

    found = {name: getattr(v2, name) for name in dir(v2) if name not in _NOT_OFFERED}
    return {name: thing for name, thing in found.items() if isinstance(thing, type) and issubclass(thing, v2.Transform)}


def _maker_of(name: str) -> Any:
    return OWN_TRANSFORMS[name] if name in OWN_TRANSFORMS else _torchvision_transforms().get(name)


def _converted(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Words of the YAML that stand for Python objects: interpolation, dtype, policy."""
    made = dict(arguments)
    if "interpolation" in made and name != "TimmTrain":  # timm has words of its own
        made["interpolation"] = interpolation_mode(made["interpolation"])
    if "dtype" in made:
        made["dtype"] = _dtype(made["dtype"])
    if name == "AutoAugment" and "policy" in made:
        from torchvision.transforms import AutoAugmentPolicy

        made["policy"] = AutoAugmentPolicy(str(made["policy"]).lower())
    if name == "Normalize":
        _check_normalize(made)
    return made


def _check_normalize(arguments: dict[str, Any]) -> None:
    mean, std = arguments["mean"], arguments["std"]
    if not isinstance(mean, list | tuple) or not isinstance(std, list | tuple) or len(mean) != len(std):
        raise ValueError("mean and std are lists of the same length, one number per channel")
    if any(value <= 0 for value in std):
        raise ValueError("each std is above 0")


def _dtype(value: Any) -> torch.dtype:
    found = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={value!r}: the name of a torch type, such as float32")
    return found
