"""Losses of part discovery: what a good set of part maps looks like (PDiscoFormer, arXiv 2407.04538; iFAM, 2506.08915).

B images, K parts, H W grid, D width. Maps (B, K+1, H, W) are probabilities over channels at each position; the last
channel is the background. Every loss is a scalar, computed in float32 or better. Where the original errs, the corrected
form is the default and the original's stands behind a keyword.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Values of LOSS.PARTS.PRESENCE_LOSS_TYPE and ENFORCED_PRESENCE_LOSS_TYPE.
PRESENCE_TYPES = ("original", "soft_constraint", "tanh", "soft_tanh")
BACKGROUND_TYPES = ("enforced_presence", "log", "linear", "mse")


def total_variation(maps: Tensor, *, reduction: str = "mean") -> Tensor:
    """Sum of absolute differences of neighbours, all channels of maps (B, K+1, H, W); mean: divided by B*H*W."""
    maps = full(maps)
    total = maps.diff(dim=2).abs().sum() + maps.diff(dim=3).abs().sum()
    batch, _, height, width = maps.shape
    return total / (batch * height * width) if reduction == "mean" else total


def centroids(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column, each (B, K), of the centre of mass of maps (B, K, H, W), in grid indices.

    The mass that divides takes no gradient. A map without mass has its centre at 0.
    """
    maps = full(maps)
    rows, columns = _indices(maps)
    mass = maps.sum(dim=(2, 3)).detach().clamp(min=torch.finfo(maps.dtype).tiny)
    return (maps * rows).sum(dim=(2, 3)) / mass, (maps * columns).sum(dim=(2, 3)) / mass


def concentration(maps: Tensor, *, square: bool = False) -> Tensor:
    """Mean over all values of part maps (B, K, H, W) of value times squared distance to the part's centre.

    Distances count in sides of the grid. square: rows are divided by the width and columns by the height, as in the
    original; the same on square grids.
    """
    maps = full(maps)
    height, width = maps.shape[2:]
    across_rows, across_columns = (width, height) if square else (height, width)
    row, column = (centre[:, :, None, None] for centre in centroids(maps))
    rows, columns = _indices(maps)
    distance = ((row - rows) / across_rows) ** 2 + ((column - columns) / across_columns) ** 2
    return (distance * maps).mean()


def _indices(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Row (H, 1) and column (1, W) numbers."""
    height, width = maps.shape[2:]
    rows = torch.arange(height, dtype=maps.dtype, device=maps.device)
    columns = torch.arange(width, dtype=maps.dtype, device=maps.device)
    return rows[:, None], columns[None, :]


def enforced_presence(background: Tensor, *, kind: str = "enforced_presence") -> Tensor:
    """The background (B, H, W) must be there. enforced_presence: near the border; the others: by its mean share a.

    With s the largest locally averaged value times radial_weight(): mean of -log s. log: mean of -log a; linear: mean of
    1 - a; mse: mean of (1 - a)^2.
    """
    background = full(background)
    if kind == "enforced_presence":
        pooled = local_mean(background)
        weight = radial_weight(*pooled.shape[1:], like=pooled)
        return _surely((pooled * weight).amax(dim=(1, 2)))
    share = background.mean(dim=(1, 2))
    if kind == "log":
        return _surely(share)
    if kind == "linear":
        return (1 - share).mean()
    assert kind == "mse", kind
    return (1 - share).square().mean()


def radial_weight(height: int, width: int, *, like: Tensor) -> Tensor:
    """(H, W): squared distance from the centre, 1 at the corners. 1 everywhere if there is only one position."""
    down = torch.linspace(-1, 1, height, dtype=like.dtype, device=like.device) if height > 1 else like.new_zeros(1)
    right = torch.linspace(-1, 1, width, dtype=like.dtype, device=like.device) if width > 1 else like.new_zeros(1)
    squared = down[:, None] ** 2 + right[None, :] ** 2
    return squared / squared.max() if height * width > 1 else torch.ones_like(squared)


def local_mean(maps: Tensor) -> Tensor:
    """Mean over 3x3 windows that lie inside of maps (..., H, W) -> (..., H-2, W-2); smaller windows on smaller grids."""
    window = (min(3, maps.shape[-2]), min(3, maps.shape[-1]))
    return F.avg_pool2d(maps, window, stride=1)


def part_peaks(maps: Tensor) -> Tensor:
    """Part maps (B, K, H, W) -> the largest local mean of each part in each image (B, K)."""
    return local_mean(full(maps)).amax(dim=(2, 3))


def presence(peaks: Tensor, *, kind: str = "original", beta: float = 0.1) -> Tensor:
    """Each part must be seen in some image of the batch: peaks (B, K) of part_peaks(), those of all images that count.

    original: 1 - mean over parts of the largest peak M. soft_constraint: mean of (1 - M) * sg((1 - beta) M + beta).
    With T = tanh(sum of peaks over images): tanh: mean of -log T; soft_tanh: mean of 1 - T.
    """
    peaks = full(peaks)
    if kind == "original":
        return 1 - peaks.amax(dim=0).mean()
    if kind == "soft_constraint":
        largest = peaks.amax(dim=0)
        return ((1 - largest) * ((1 - beta) * largest + beta).detach()).mean()
    seen = torch.tanh(peaks.sum(dim=0))
    if kind == "tanh":
        return _surely(seen)
    assert kind == "soft_tanh", kind
    return (1 - seen).mean()


def _surely(probability: Tensor) -> Tensor:
    """Mean of -log p: binary cross-entropy against 1, whose logarithm ends at -100. Not a number where p is not finite.

    PyTorch raises there (on a GPU the device is lost), before the loop could say in which step the loss went wrong.
    """
    with exact(probability):
        finite = torch.where(probability.isfinite(), probability, 1.0)
        lost = (probability - finite).detach()  # 0, or not finite
        return F.binary_cross_entropy(finite, torch.ones_like(finite)) + (lost * 0).sum()


def pixel_wise_entropy(maps: Tensor) -> Tensor:
    """Mean over images and positions of the entropy (natural logarithm) over the channels of maps (B, K+1, H, W)."""
    maps = full(maps)
    shares = maps / maps.sum(dim=1, keepdim=True)
    eps = torch.finfo(shares.dtype).eps
    return -(shares * shares.clamp(min=eps, max=1 - eps).log()).sum(dim=1).mean()


def orthogonality(features: Tensor, *, transposed: bool = False) -> Tensor:
    """Mean squared difference of the parts' cosine similarities from the unit matrix; features (B, D, K+1).

    transposed: similarities of the D dimensions over parts, which iFAM's trainer computes by mistake.
    """
    features = full(features)
    vectors = F.normalize(features.transpose(1, 2) if transposed else features, dim=1)
    with exact(vectors):
        gram = vectors.transpose(1, 2) @ vectors
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).square().mean()


def equivariance(maps: Tensor, warped_back: Tensor, *, inside: Tensor | None = None) -> Tensor:
    """1 - mean cosine similarity of part maps (B, K, H, W) with those of the transformed image, warped back.

    inside (H, W) or (B, 1, H, W): positions that count, 1 or 0; None: all.
    """
    maps, warped_back = full(maps), full(warped_back)
    if inside is not None:
        maps, warped_back = maps * inside, warped_back * inside
    return 1 - F.cosine_similarity(maps.flatten(2), warped_back.flatten(2), dim=2).mean()


def full(tensor: Tensor) -> Tensor:
    """At least float32: half precision is too coarse for probabilities and their logarithms."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def exact(tensor: Tensor) -> torch.autocast:
    """A block in which autocast does not lower the precision of what is computed on this tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)
