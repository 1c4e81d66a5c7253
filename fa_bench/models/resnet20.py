"""The residual net of 20 layers for small images."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.models.base import Architecture
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ARCHITECTURES.register("resnet20")
@dataclasses.dataclass(eq=False)
class ResNet20(Architecture):
    """Residual net of 20 layers for small images.

    conv1 - bn1 - relu - layer1..3 of 3 blocks - average pool - fc (He et al. 2016, section 4.2).

    Stages of 16, 32 and 64 channels, shortcuts without parameters: every second pixel, and zeros for the added channels.
    """

    width: int = option(16, "channels of the first stage", minimum=1)
    blocks: int = option(3, "blocks in each of the three stages", minimum=1, maximum=1000)
    shortcuts: bool = option(True, "add each block's input to its output; false: a plain net of the same layers")

    def make(self, input_shape: tuple[int, int, int], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.residual import ResNet

        shortcut = "pad" if self.shortcuts else "none"
        return ResNet(input_shape[0], classes, [self.width, 2 * self.width, 4 * self.width], [self.blocks] * 3, shortcut)
