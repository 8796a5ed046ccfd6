"""A model that predicts local colours: the warm-up of a trunk before part discovery."""

from __future__ import annotations

from torch import Tensor, nn

from vissl_like.models.part_backbones import MapTrunk, TokenTrunk
from vissl_like.models.part_inputs import PartInputs

#: Sides of the neighbourhoods whose mean colour is predicted, in cells of the feature map.
SCALES = (1, 3, 5)


class ColourModel(PartInputs):
    """Images (B, 3, H, W) -> predicted colours (B, 3 * scales, h, w). State keys: trunk._feature_blocks.*, heads.*"""

    def __init__(self, trunk: MapTrunk | TokenTrunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.Conv2d(trunk.width, 3 * len(SCALES), 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.heads(self.trunk.maps(images))
