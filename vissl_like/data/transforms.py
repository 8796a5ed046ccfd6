"""Our own transforms: what VISSL calls by name and torchvision does not have. Each takes one PIL image, RGB or grey;
CropOnMask a mask, too.

Randomness comes from the global generators, which the dataset seeds by (seed, epoch, row) around each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps


def image_to_uint8(image: Image.Image) -> torch.Tensor:
    """PIL -> uint8 (C, H, W), contiguous."""
    pixels = np.array(image, dtype=np.uint8)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class ToTensor:
    """PIL -> float32 (C, H, W) in [0, 1]: pixels / 255."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return image_to_uint8(image).to(torch.float32).div(255)


class ImgPilToRawTensor:
    """PIL -> float32 (C, H, W) in [0, 255]: pixels as they are."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return image_to_uint8(image).to(torch.float32)


class ImgPil2LabTensor:
    """RGB PIL -> CIE Lab float32 (3, H, W): L in [0, 100], a and b about [-128, 127]. sRGB, D65, 2 degrees.

    VISSL goes through 8-bit Lab; this keeps the fractions.
    """

    _XYZ_FROM_RGB = np.array(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    )
    _WHITE = np.array([0.95047, 1.0, 1.08883])

    def __call__(self, image: Image.Image) -> torch.Tensor:
        rgb = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
        linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
        xyz = linear @ self._XYZ_FROM_RGB.T / self._WHITE
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        x, y, z = f[..., 0], f[..., 1], f[..., 2]
        lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])
        return torch.from_numpy(lab.astype(np.float32))


class ImgRotatePil:
    """Rotate by a random multiple of 360 / num_angles degrees; the multiple becomes the label. RotNet,
    arXiv:1803.07728.

    Label k turns counter-clockwise by k * 360 / num_angles; for quarter turns of square images this is
    np.rot90(image, k). The canvas keeps its size, so other images get black borders. The label replaces the one there
    was, if any.
    """

    def __init__(self, num_angles: int = 4, num_rotations_per_img: int = 1) -> None:
        if num_rotations_per_img != 1:
            raise ValueError(
                f"num_rotations_per_img={num_rotations_per_img}: each image is rotated once; only 1 is allowed"
            )
        if num_angles < 1:
            raise ValueError(f"num_angles={num_angles}: at least 1")
        self.num_classes = num_angles
        self.class_names = [f"{360 * k / num_angles:g}" for k in range(num_angles)]

    def __call__(self, image: Image.Image) -> tuple[Image.Image, int]:
        label = int(torch.randint(self.num_classes, [1]))
        return image.rotate(label * 360 / self.num_classes), label


class ImgPilColorDistortion:
    """SimCLR's colour distortion: jitter with probability 0.8, then grey with probability 0.2. arXiv:2002.05709, A."""

    def __init__(self, strength: float) -> None:
        from torchvision.transforms import v2

        jitter = v2.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
        self.distort = v2.Compose([v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(p=0.2)])

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.distort(image)


class ImgPilRandomColorJitter:
    """Jitter of brightness, contrast, saturation (0.8 * strength) and hue (0.2 * strength) with probability `prob`."""

    def __init__(self, strength: float = 1.0, prob: float = 0.8) -> None:
        from torchvision.transforms import v2

        jitter = v2.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
        self.distort = v2.RandomApply([jitter], p=_probability(prob, "prob"))

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.distort(image)


class ImgPilGaussianBlur:
    """Gaussian blur with probability p; the radius (deviation in pixels) is uniform in [radius_min, radius_max]."""

    def __init__(self, p: float, radius_min: float = 0.1, radius_max: float = 2.0) -> None:
        if not 0 <= radius_min <= radius_max:
            raise ValueError(f"radius_min={radius_min}, radius_max={radius_max}: needs 0 <= radius_min <= radius_max")
        self._p, self._low, self._high = _probability(p, "p"), radius_min, radius_max

    def draw(self) -> float | None:
        """The radius for one image, or None for no blur."""
        if torch.rand(1).item() >= self._p:
            return None
        return self._low + (self._high - self._low) * torch.rand(1).item()

    def __call__(self, image: Image.Image) -> Image.Image:
        radius = self.draw()
        return image if radius is None else image.filter(ImageFilter.GaussianBlur(radius=radius))


class ImgPilRandomSolarize:
    """Invert the pixels of 128 and above with probability `prob`."""

    def __init__(self, prob: float) -> None:
        self._prob = _probability(prob, "prob")

    def draw(self) -> bool:
        """Whether one image is inverted."""
        return torch.rand(1).item() < self._prob

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if self.draw() else image


class ImgPilPlanckianJitter:
    """With probability p the light of a random black body, arXiv:2202.07993: red by R/G and blue by B/G, clipped.

    The 25 bodies are of 3000 K to 15000 K, in steps of 500 K.
    """

    _RGB = np.array(
        [
            [0.6743, 0.4029, 0.0013], [0.6281, 0.4241, 0.1665], [0.5919, 0.4372, 0.2513], [0.5623, 0.4457, 0.3154],
            [0.5376, 0.4515, 0.3672], [0.5163, 0.4555, 0.4103], [0.4979, 0.4584, 0.4468], [0.4816, 0.4604, 0.4782],
            [0.4672, 0.4619, 0.5053], [0.4542, 0.4630, 0.5289], [0.4426, 0.4638, 0.5497], [0.4320, 0.4644, 0.5681],
            [0.4223, 0.4648, 0.5844], [0.4135, 0.4651, 0.5990], [0.4054, 0.4653, 0.6121], [0.3980, 0.4654, 0.6239],
            [0.3911, 0.4655, 0.6346], [0.3847, 0.4656, 0.6444], [0.3787, 0.4656, 0.6532], [0.3732, 0.4656, 0.6613],
            [0.3680, 0.4655, 0.6688], [0.3632, 0.4655, 0.6756], [0.3586, 0.4655, 0.6820], [0.3544, 0.4654, 0.6878],
            [0.3503, 0.4653, 0.6933],
        ]
    )  # fmt: skip

    def __init__(self, p: float = 0.8) -> None:
        self._p = _probability(p, "p")

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(1).item() >= self._p:
            return image
        red, green, blue = self._RGB[int(torch.randint(len(self._RGB), [1]))]
        factors = (red / green, 1.0, blue / green)
        table = [min(255, round(level * factor)) for factor in factors for level in range(256)]
        return image.convert("RGB").point(table)


class ImgPilResizeLargerSide:
    """Resize so that the larger side has `size` pixels; the aspect ratio stays. Bilinear, antialiased."""

    def __init__(self, size: int) -> None:
        if int(size) < 1:
            raise ValueError(f"size={size}: at least 1")
        self._size = int(size)

    def __call__(self, image: Image.Image) -> Image.Image:
        factor = self._size / max(image.size)
        size = tuple(max(1, round(side * factor)) for side in image.size)
        return image.resize((size[0], size[1]), Image.Resampling.BILINEAR)


class MNISTImgPil2RGB:
    """Paste a small image into a black RGB square of `size` pixels, its top left corner at `box`; None: in the
    middle.
    """

    def __init__(self, size: int = 32, box: Sequence[int] | None = None) -> None:
        if box is not None and len(box) not in (2, 4):
            raise ValueError(f"box={list(box)}: two numbers, left and top, or four")
        self._size, self._box = int(size), None if box is None else tuple(int(side) for side in box)

    def __call__(self, image: Image.Image) -> Image.Image:
        square = Image.new("RGB", (self._size, self._size))
        left, top = self._box[:2] if self._box else ((self._size - image.width) // 2, (self._size - image.height) // 2)
        square.paste(image.convert("RGB"), (left, top))
        return square


class CropOnMask:
    """A random crop of `size` (one side, or height and width) that holds some of the mask, any such crop with the same
    probability; of an image without an object any crop at all.
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        sides = [int(size)] * 2 if isinstance(size, int | float) else [int(side) for side in size]
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"size={size}: one side or height and width, at least 1")
        self._size = (sides[0], sides[1])

    def __call__(self, image: Any, mask: Any) -> tuple[Any, Any]:
        """`image` PIL or (C, H, W), `mask` masks.ObjectMask of the same height and width."""
        from torchvision.transforms.v2 import functional

        places = np.argwhere(self._holding(mask.is_object().numpy()))
        top, left = places[int(torch.randint(len(places), [1]))].tolist()
        return functional.crop(image, top, left, *self._size), functional.crop(mask, top, left, *self._size)

    def _holding(self, mask: np.ndarray) -> np.ndarray:
        """bool (H - height + 1, W - width + 1): whether the crop that begins there holds some of mask (H, W)."""
        height, width = self._size
        if mask.shape[0] < height or mask.shape[1] < width:
            raise ValueError(
                f"a crop of {height}x{width} of an image of {mask.shape[0]}x{mask.shape[1]}; Resize it first"
            )
        sums = np.pad(mask, ((1, 0), (1, 0))).cumsum(0, dtype=np.int64).cumsum(1)  # of the rectangle above and left
        inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
        return inside > 0 if mask.any() else np.ones_like(inside, dtype=bool)


def rand_augment(
    num_ops: int = 2,
    magnitude: int = 9,
    num_magnitude_bins: int = 31,
    interpolation: Any = "nearest",
    fill: Any = None,
    magnitude_std: float = 0.0,
    increasing_severity: bool = False,
) -> Any:
    """RandAugment, arXiv:1909.13719: torchvision's, or timm's where noise on the magnitude is asked for (VISSL's
    options).
    """
    if magnitude_std or increasing_severity:
        from timm.data.auto_augment import rand_augment_transform

        config = f"rand-m{magnitude}-n{num_ops}-mstd{magnitude_std}-inc{int(increasing_severity)}"
        made = rand_augment_transform(config, {})
        _mend_posterize(made.ops)
        return made
    from torchvision.transforms import v2

    mode = interpolation_mode(interpolation)
    return v2.RandAugment(num_ops, magnitude, num_magnitude_bins, interpolation=mode, fill=fill)


def vissl_auto_augment(policy_name: str = "v0", magnitude_std: float = 0.0) -> Any:
    """AutoAugment, arXiv:1805.09501, with noise on the magnitude; policies v0, v0r, original, originalr (timm)."""
    from timm.data.auto_augment import auto_augment_transform

    if policy_name not in ("v0", "v0r", "original", "originalr"):
        raise ValueError(f"policy_name={policy_name!r}: one of v0, v0r, original, originalr")
    made = auto_augment_transform(f"{policy_name}-mstd{magnitude_std}", {})
    _mend_posterize([operation for sub_policy in made.policy for operation in sub_policy])
    return made


def _mend_posterize(operations: list[Any]) -> None:
    """timm draws 0 bits now and then: a black image with older versions of Pillow, an error with 13."""
    from timm.data.auto_augment import posterize

    for operation in operations:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


def timm_train(
    size: int,
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float = 0.4,
    auto_augment: str = "rand-m6-mstd0.5",
    interpolation: str = "bicubic",
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> Any:
    """timm's training policy up to the tensor: random resized crop, flips, and AutoAugment/RandAugment or jitter."""
    from timm.data.transforms_factory import transforms_imagenet_train
    from torchvision.transforms import Compose

    geometry, colour, _ = transforms_imagenet_train(
        img_size=size, scale=tuple(scale), ratio=tuple(ratio), hflip=hflip, vflip=vflip, color_jitter=color_jitter,
        auto_augment=auto_augment or None, interpolation=interpolation, separate=True,
    )  # fmt: skip
    for step in colour.transforms:
        _mend_posterize(getattr(step, "ops", []))
    return Compose([*geometry.transforms, *colour.transforms])


def interpolation_mode(value: Any) -> Any:
    """torchvision's InterpolationMode for its name in any case; Pillow's numbers pass through."""
    from torchvision.transforms import InterpolationMode

    return InterpolationMode(value.lower().replace("_", "-")) if isinstance(value, str) else value


def _probability(value: float, name: str) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: a probability lies between 0 and 1")
    return value


#: name in TRANSFORMS -> how it is made.
OWN_TRANSFORMS: dict[str, Any] = {
    "CropOnMask": CropOnMask,
    "ImgPil2LabTensor": ImgPil2LabTensor,
    "ImgPilColorDistortion": ImgPilColorDistortion,
    "ImgPilGaussianBlur": ImgPilGaussianBlur,
    "ImgPilPlanckianJitter": ImgPilPlanckianJitter,
    "ImgPilRandomColorJitter": ImgPilRandomColorJitter,
    "ImgPilRandomSolarize": ImgPilRandomSolarize,
    "ImgPilResizeLargerSide": ImgPilResizeLargerSide,
    "ImgPilToRawTensor": ImgPilToRawTensor,
    "ImgRotatePil": ImgRotatePil,
    "ImgToTensor": ToTensor,
    "MNISTImgPil2RGB": MNISTImgPil2RGB,
    "RandAugment": rand_augment,
    "TimmTrain": timm_train,
    "ToTensor": ToTensor,
    "VisslAutoAugment": vissl_auto_augment,
}
