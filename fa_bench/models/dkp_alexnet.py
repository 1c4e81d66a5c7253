"""The AlexNet of the direct Kolen-Pollack paper, for large images."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.models.base import Architecture
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ARCHITECTURES.register("dkp_alexnet")
@dataclasses.dataclass(eq=False)
class DKPAlexNet(Architecture):
    """AlexNet of the direct Kolen-Pollack paper, for 224x224 images.

    torchvision's AlexNet with batch normalisation in front of every ReLU (section 3.2 of the DKP paper), for 224x224 images.

    Channels 64-192-384-256-256, then 9216-4096-4096-classes on 224x224 images; other sizes, from 63x63 on, give other numbers of
    features. The paper normalises in front of every activation but the output, the code behind it convolutions only
    (``linear_norm=false``). Dropout is where torchvision's is: in front of both hidden fully connected layers.
    """

    width: int = option(64, "channels of the first convolution; the others have 3, 6, 4 and 4 times as many", minimum=1)
    hidden: int = option(4096, "neurons of the two hidden fully connected layers", minimum=1)
    linear_norm: bool = option(True, "batch normalisation behind the hidden fully connected layers too")
    dropout: float = option(0.5, "rate of the two dropouts", minimum=0, below=1)

    def make(self, input_shape: tuple[int, int, int], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.alexnet import ConvStage, alexnet

        w = self.width
        stages = [
            ConvStage(w, 11, stride=4, padding=2, pool=3),
            ConvStage(3 * w, 5, padding=2, pool=3),
            ConvStage(6 * w, 3, padding=1),
            ConvStage(4 * w, 3, padding=1),
            ConvStage(4 * w, 3, padding=1, pool=3),
        ]
        return alexnet(input_shape, classes, stages, [self.hidden] * 2, linear_norm=self.linear_norm, dropout=self.dropout)
