"""A small convolutional trunk for part discovery on a CPU: sees 23 pixels around each of its cells of 4x4 pixels."""

from __future__ import annotations

from torch import Tensor, nn


class ConvStem(nn.Module):
    """A small convolutional trunk with feature maps of a quarter of the side: images (B, C, H, W) -> (B, D).

    Two strided 3x3 convolutions, one 1x1, `blocks` residual blocks of two 3x3, a LayerNorm over channels; the output is
    the mean over positions. maps(images) has all positions: (B, D, H/4, W/4).
    """

    def __init__(
        self,
        *,
        width: int = 32,
        stem: tuple[int, int] = (24, 48),
        blocks: int = 1,
        groups: int = 8,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        first, second = stem
        wrong = [size for size in (first, second, width) if size % groups]
        if wrong:
            raise ValueError(f"groups={groups} does not divide the width {wrong[0]}")
        self.in_channels = in_channels
        self.stem = nn.Sequential(
            _convolution(in_channels, first, groups=groups, stride=2),
            _convolution(first, second, groups=groups, stride=2),
            nn.Conv2d(second, width, 1),
        )
        self.blocks = nn.ModuleList(ResidualBlock(width, groups=groups) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def maps(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, D, H/4, W/4)."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.maps(images).mean(dim=(2, 3))


class ResidualBlock(nn.Module):
    """Maps (B, D, H, W) -> the same shape: two 3x3 convolutions beside the identity."""

    def __init__(self, width: int, *, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(width, width, groups=groups), nn.Conv2d(width, width, 3, padding=1, bias=False)
        )
        self.norm = nn.GroupNorm(groups, width)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x + self.norm(self.body(x)))


def _convolution(inputs: int, outputs: int, *, groups: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, group normalisation (the same in training and evaluation), ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(groups, outputs),
        nn.ReLU(inplace=True),
    )
