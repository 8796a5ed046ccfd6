"""Colour, blur and solarisation on whole batches, each image with numbers of its own; arithmetic on floats in [0, 1].

Two halves. A worker draws the numbers of an image (`draw`), with torchvision's own transforms in their own order, so the
same seed gives the same augmentation wherever it is computed. The device applies them to a batch (`apply`): B images and
their numbers (B, width). What an image becomes does not depend, to the bit, on the others of its batch.

Against the same list on PIL images: those round to 8 bits after each operation and these do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vissl_like.data.transforms import (
    ImgPilColorDistortion,
    ImgPilGaussianBlur,
    ImgPilRandomColorJitter,
    ImgPilRandomSolarize,
)

#: Weights of red, green and blue in grey (ITU-R BT.601), as in torchvision.
_GREY = (0.2989, 0.587, 0.114)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)


class Step(Protocol):
    """One operation. Numbers of all zeros leave an image as it is."""

    #: How many numbers an image needs.
    width: int

    def draw(self) -> list[float]:
        """The numbers of one image, from torch's global generator."""

    def apply(self, images: Tensor, numbers: np.ndarray) -> Tensor:
        """float32 (B, C, H, W) in [0, 1] and float32 (B, width) -> (B, C, H, W). May change `images`."""


def find_steps(transforms: Sequence[Any]) -> list[Step]:
    """The batch form of the transforms that a list ends with; as many as have one.

    It begins with colour or blur: a flip before that is cheaper in the worker, see geometry.py.
    """
    found: list[Step] = []
    for transform in reversed(transforms):
        step = _step_of(transform)
        if step is None:
            break
        found.insert(0, step)
    while found and isinstance(found[0], Mirror):
        found.pop(0)
    return found


def _step_of(transform: Any) -> Step | None:
    from torchvision.transforms import v2

    kind = type(transform)
    if kind in (v2.Compose, v2.RandomApply):
        inner = [_step_of(one) for one in transform.transforms]
        steps = [step for step in inner if step is not None]
        if len(steps) < len(inner):
            return None
        return Together(steps, probability=transform.p if kind is v2.RandomApply else None)
    if kind in (ImgPilColorDistortion, ImgPilRandomColorJitter):
        return _step_of(transform.distort)
    made: dict[Any, Any] = {
        v2.ColorJitter: Jitter,
        v2.GaussianBlur: Blur,
        v2.RandomGrayscale: Grey,
        v2.RandomHorizontalFlip: Mirror,
        v2.RandomSolarize: Solarize,
        ImgPilGaussianBlur: PillowBlur,
        ImgPilRandomSolarize: PillowSolarize,
    }
    return made[kind](transform) if kind in made else None


def draw(steps: Sequence[Step]) -> np.ndarray:
    """The numbers of one image for all steps, float32 (sum of widths,)."""
    return np.array([number for step in steps for number in step.draw()], dtype=np.float32)


def apply(steps: Sequence[Step], images: Tensor, numbers: np.ndarray) -> Tensor:
    """All steps one after the other. images float32 (B, C, H, W) in [0, 1], numbers (B, sum of widths)."""
    for step, part in zip(steps, np.split(numbers, np.cumsum([step.width for step in steps])[:-1], axis=1)):
        images = step.apply(images, part)
    return images


# ------------------------------------------------------------------------------------------------ steps
class Together:
    """Several steps, for an image all or none with this probability (None: always). RandomApply and Compose."""

    def __init__(self, steps: Sequence[Step], *, probability: float | None) -> None:
        self._steps, self._probability = list(steps), probability
        self.width = sum(step.width for step in steps)

    def draw(self) -> list[float]:
        if self._probability is not None and torch.rand(1) >= self._probability:
            return [0.0] * self.width
        return [number for step in self._steps for number in step.draw()]

    def apply(self, images: Tensor, numbers: np.ndarray) -> Tensor:
        return apply(self._steps, images, numbers)


class _Chosen:
    """A step that some images undergo: its first number says whether."""

    width = 1

    def apply(self, images: Tensor, numbers: np.ndarray) -> Tensor:
        rows = np.flatnonzero(numbers[:, 0])
        if len(rows) == len(images):
            return self.change(images, numbers)
        if len(rows):
            index = _to_device(rows, images)
            images[index] = self.change(images[index], numbers[rows])
        return images

    def change(self, images: Tensor, numbers: np.ndarray) -> Tensor:
        """The images that it is done to."""
        raise AssertionError("every step defines it")


class Jitter(_Chosen):
    """torchvision's ColorJitter. Numbers: 1; the operation in each of four places; the four factors (without effect: 1, 1,
    1, 0).
    """

    width = 9

    def __init__(self, transform: Any) -> None:
        self._transform = transform

    def draw(self) -> list[float]:
        drawn = self._transform.make_params([])
        neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
        factors = [(drawn[f"{name}_factor"], without) for name, without in neutral.items()]
        return [1.0, *drawn["fn_idx"].tolist(), *(without if factor is None else factor for factor, without in factors)]

    def change(self, images: Tensor, numbers: np.ndarray) -> Tensor:
        for place in range(4):
            operation = numbers[:, 1 + place].astype(np.int64)
            factor = numbers[np.arange(len(numbers)), 5 + operation]
            images = _blend(images, operation, factor)
            rows = np.flatnonzero((operation == _HUE) & (factor != 0))
            if len(rows) and images.shape[1] == 3:
                index = _to_device(rows, images)
                images[index] = shift_hue(images[index], _column(factor[rows], images)[:, 0])
        return images


class Grey(_Chosen):
    """RandomGrayscale: the grey value in all channels."""

    def __init__(self, transform: Any) -> None:
        self._probability = transform.p

    def draw(self) -> list[float]:
        return [float(torch.rand(1) < self._probability)]

    def change(self, images: Tensor, numbers: np.ndarray) -> Tensor:
        return grey(images).expand_as(images).contiguous()


class Mirror(_Chosen):
    """RandomHorizontalFlip."""

    def __init__(self, transform: Any) -> None:
        self._probability = transform.p

    def draw(self) -> list[float]:
        return [float(torch.rand(1) < self._probability)]

    def change(self, images: Tensor, numbers: np.ndarray) -> Tensor:
        return images.flip(-1)


class Solarize(_Chosen):
    """RandomSolarize: pixels of the threshold (of 255) and above are inverted."""

    def __init__(self, transform: Any) -> None:
        self._probability, self._threshold = transform.p, transform.threshold

    def draw(self) -> list[float]:
        return [float(torch.rand(1) < self._probability)]

    def change(self, images: Tensor, numbers: np.ndarray) -> Tensor:
        # A GPU divides by 255 to within a bit, so a level may come back a little below itself.
        return torch.where(images * 255 >= self._threshold - 1e-3, 1 - images, images)


class PillowSolarize(Solarize):
    """ImgPilRandomSolarize."""

    def __init__(self, transform: ImgPilRandomSolarize) -> None:
        self._transform, self._threshold = transform, 128

    def draw(self) -> list[float]:
        return [float(self._transform.draw())]


class Blur(_Chosen):
    """torchvision's GaussianBlur. Numbers: 1, the deviations in pixels along x and y. Edges are mirrored."""

    width = 3

    def __init__(self, transform: Any) -> None:
        self._transform = transform
        self._radii = [int(side) // 2 for side in transform.kernel_size]  # along x and y

    def draw(self) -> list[float]:
        return [1.0, *(float(sigma) for sigma in self._transform.make_params([])["sigma"])]

    def change(self, images: Tensor, numbers: np.ndarray) -> Tensor:
        for axis, radius, sigma in ((3, self._radii[0], numbers[:, 1]), (2, self._radii[1], numbers[:, 2])):
            images = _convolve(images, gaussian_weights(sigma, radius=radius), axis=axis, edges="reflect")
        return images


class PillowBlur(_Chosen):
    """ImgPilGaussianBlur. Numbers: 1, the deviation. As Pillow makes it: three box blurs; edges are repeated."""

    width = 2

    def __init__(self, transform: ImgPilGaussianBlur) -> None:
        self._transform = transform

    def draw(self) -> list[float]:
        radius = self._transform.draw()
        return [0.0, 0.0] if radius is None else [1.0, radius]

    def change(self, images: Tensor, numbers: np.ndarray) -> Tensor:
        weights = box_weights(box_radius(numbers[:, 1]))
        for axis in (3, 3, 3, 2, 2, 2):
            images = _convolve(images, weights, axis=axis, edges="replicate")
        return images


# ------------------------------------------------------------------------------------------- arithmetic
def grey(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W); grey images as they are."""
    if images.shape[1] != 3:
        return images
    red, green, blue = images.split(1, dim=1)
    return red.mul(_GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


def mean_grey(images: Tensor) -> Tensor:
    """Mean of grey() over each image, (B, 1, 1, 1). Summed in whole numbers, so the order of summation is no matter."""
    steps = 1 << 22
    whole = grey(images).mul(steps).add_(0.5).to(torch.int32)
    total = whole.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
    return total.double().div_(steps * whole[0].numel()).to(images.dtype)


def _blend(images: Tensor, operation: np.ndarray, factor: np.ndarray) -> Tensor:
    """factor * image + (1 - factor) * other: black for brightness, mean grey for contrast, grey for saturation.

    One pass over the batch for all three; images that undergo another operation have the factor 1.
    """
    is_changed = (factor != 1) & (operation != _HUE)
    if images.shape[1] != 3:
        is_changed &= operation != _SATURATION
    if not is_changed.any():
        return images
    used = np.where(is_changed, factor, 1).astype(np.float32)
    # For a factor of 1 the weight of the other image is 0, whatever the operation.
    rest = [np.where(operation == kind, 1 - used, 0) for kind in (_CONTRAST, _SATURATION)]
    contrast, saturation = (_column(weight, images) for weight in rest)
    made = images * _column(used, images)
    if rest[0].any():
        made.add_(mean_grey(images) * contrast)
    if rest[1].any():
        made.add_(grey(images) * saturation)
    return made.clamp_(0, 1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images (B, 3, H, W) by `shift` (B, 1, 1) of a full turn, [-0.5, 0.5]; through HSV."""
    red, green, blue = images.unbind(1)
    low, high = torch.aminmax(images, dim=1)
    spread = high - low
    divisor = torch.where(spread == 0, torch.ones_like(spread), spread)
    hue = torch.where(
        high == red,
        (green - blue) / divisor,
        torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    # Channel n of HSV to RGB is v - v s max(0, min(k, 4 - k, 1)) with k = (n + 6 h) mod 6; v s is `spread`.
    sector = (hue + 6 * shift).unsqueeze(1) + torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    sector.remainder_(6)
    weight = torch.minimum(sector, 4 - sector).clamp_(0, 1)
    return high.unsqueeze(1) - spread.unsqueeze(1) * weight


def gaussian_weights(sigma: np.ndarray, *, radius: int) -> np.ndarray:
    """(B,) deviations in pixels -> (B, 2 radius + 1) weights that sum to 1."""
    offset = np.arange(-radius, radius + 1)
    logits = -0.5 * (offset / np.maximum(sigma[:, None].astype(np.float64), 1e-6)) ** 2
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def box_radius(sigma: np.ndarray) -> np.ndarray:
    """Radius, with its fraction, of the box of which three in a row have this deviation; Gwosdek et al. 2011, eq. 7-11."""
    variance = np.asarray(sigma, dtype=np.float64) ** 2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return whole + part


def box_weights(radius: np.ndarray) -> np.ndarray:
    """(B,) radii with fractions -> (B, 2 n + 1) weights: equal ones, and a part of that at both ends."""
    reach = int(np.ceil(radius.max()))
    offset = np.abs(np.arange(-reach, reach + 1))
    return np.clip(radius[:, None] - offset + 1, 0, 1) / (2 * radius[:, None] + 1)


def _convolve(images: Tensor, weights: np.ndarray, *, axis: int, edges: str) -> Tensor:
    """Along axis 2 (y) or 3 (x) with each image's own weights (B, 2 radius + 1).

    As a sum of shifted images: a convolution would be computed in bfloat16 or TF32 wherever that is switched on.
    """
    radius = weights.shape[1] // 2
    padding = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
    padded = torch.nn.functional.pad(images, padding, mode=edges)
    length = images.shape[axis]
    column = _column(weights, images)  # (B, K, 1, 1)
    total = padded.narrow(axis, 0, length) * column[:, :1]
    for shift in range(1, weights.shape[1]):
        total.addcmul_(padded.narrow(axis, shift, length), column[:, shift : shift + 1])
    return total


def _column(values: np.ndarray, images: Tensor) -> Tensor:
    """(B,) or (B, K) numbers as (B, 1 or K, 1, 1) beside the images."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(len(values), -1, 1, 1)
    return tensor.to(images.device, non_blocking=True)


def _to_device(rows: np.ndarray, images: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(images.device, non_blocking=True)
