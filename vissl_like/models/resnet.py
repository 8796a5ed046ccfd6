"""ResNets with the options of VISSL and the state keys of torchvision, and the small one of the demo.

arXiv:1512.03385 (ResNet), arXiv:1611.05431 (ResNeXt: groups), arXiv:1605.07146 (wide), arXiv:1903.10520 (weights
standardised).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]

#: depth -> (blocks per stage, bottleneck blocks)
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}


class StandardizedConv2d(nn.Conv2d):
    """Convolution whose filters have mean 0 and deviation 1. arXiv:1903.10520."""

    def forward(self, images: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = self.weight.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-10)
        return self._conv_forward(images, weight, self.bias)


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 (`bottleneck`); the stride is in the 3x3 as in torchvision."""

    def __init__(
        self,
        inputs: int,
        planes: int,
        *,
        stride: int,
        bottleneck: bool,
        width: int,
        groups: int,
        norm: Norm,
        conv: type[nn.Conv2d],
    ) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        outputs = planes * 4 if bottleneck else planes
        three = {"kernel_size": 3, "padding": 1, "bias": False}
        if bottleneck:
            self.conv1 = conv(inputs, width, 1, bias=False)
            self.bn1 = norm(width)
            self.conv2 = conv(width, width, stride=stride, groups=groups, **three)
            self.bn2 = norm(width)
            self.conv3 = conv(width, outputs, 1, bias=False)
            self.bn3 = norm(outputs)
        else:
            self.conv1 = conv(inputs, outputs, stride=stride, **three)
            self.bn1 = norm(outputs)
            self.conv2 = conv(outputs, outputs, **three)
            self.bn2 = norm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride=stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.bottleneck:
            x = self.bn3(self.conv3(self.relu(x)))
        return self.relu(x + shortcut)

    def last_norm(self) -> nn.Module:
        return self.bn3 if self.bottleneck else self.bn2


class ResNet(nn.Module):
    """images (B, in_channels, H, W) -> (B, D), the average over the last stage."""

    def __init__(
        self,
        *,
        blocks: Sequence[int],
        planes: Sequence[int],
        strides: Sequence[int],
        bottleneck: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        norm: Norm = nn.BatchNorm2d,
        conv: type[nn.Conv2d] = nn.Conv2d,
        zero_init_residual: bool = False,
        in_channels: int = 3,
        stem: tuple[int, int, int] = (64, 7, 2),
        maxpool: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        width, kernel, stride = stem
        self.conv1 = conv(in_channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        if maxpool:
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        inputs = width
        for name, depth, plane, stage_stride in zip(self.stages, blocks, planes, strides):
            layers = []
            for index in range(depth):
                inner = plane * width_per_group // 64 * groups
                layers.append(
                    Block(
                        inputs,
                        plane,
                        stride=stage_stride if index == 0 else 1,
                        bottleneck=bottleneck,
                        width=inner,
                        groups=groups,
                        norm=norm,
                        conv=conv,
                    )
                )
                inputs = plane * 4 if bottleneck else plane
            self.add_module(name, nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        """He initialisation of convolutions by fan out; normalisation starts at one and zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if zero_init_residual and isinstance(module, Block):
                nn.init.zeros_(module.last_norm().weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        if hasattr(self, "maxpool"):
            x = self.maxpool(x)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return torch.flatten(self.avgpool(x), 1)


def _norm(name: str, groups: int) -> Norm:
    def group_norm(channels: int) -> nn.Module:
        return nn.GroupNorm(groups if name == "GroupNorm" else 1, channels)

    return nn.BatchNorm2d if name == "BatchNorm" else group_norm


def resnet(
    *,
    depth: int = 50,
    width_multiplier: int = 1,
    width_per_group: int = 64,
    groups: int = 1,
    norm: str = "BatchNorm",
    groupnorm_groups: int = 32,
    zero_init_residual: bool = False,
    standardize_convolutions: bool = False,
    layer4_stride: int = 2,
    in_channels: int = 3,
) -> ResNet:
    """VISSL's `resnet`: options of MODEL.TRUNK.RESNETS. With the defaults, state keys and outputs are torchvision's."""
    blocks, bottleneck = DEPTHS[depth]
    if not bottleneck and (groups != 1 or width_per_group != 64):
        raise ValueError(f"GROUPS and WIDTH_PER_GROUP need bottleneck blocks: DEPTH 50 or more, not {depth}")
    width = 64 * width_multiplier
    return ResNet(
        blocks=blocks,
        planes=[width, width * 2, width * 4, width * 8],
        strides=[1, 2, 2, layer4_stride],
        bottleneck=bottleneck,
        groups=groups,
        width_per_group=width_per_group,
        norm=_norm(norm, groupnorm_groups),
        conv=StandardizedConv2d if standardize_convolutions else nn.Conv2d,
        zero_init_residual=zero_init_residual,
        in_channels=in_channels,
        stem=(width, 7, 2),
    )


def resnet_small(*, in_channels: int = 3, widths: Sequence[int] = (16, 32, 64), stem: Sequence[int] = (5, 2)) -> ResNet:
    """The demo's network: one basic block per stage, strides 1-2-2; `stem`: kernel and stride of the first convolution.

    78k parameters with a head of four classes. Layers: conv1, res2, res3, res4, res4avg, flatten.
    """
    if len(widths) < 1 or len(stem) != 2:
        raise ValueError(f"widths={list(widths)} needs a width per stage and stem={list(stem)} a kernel and a stride")
    kernel, stride = stem
    return ResNet(
        blocks=[1] * len(widths),
        planes=list(widths),
        strides=[1] + [2] * (len(widths) - 1),
        in_channels=in_channels,
        stem=(widths[0], kernel, stride),
        maxpool=False,
    )
