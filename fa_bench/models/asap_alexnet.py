"""The AlexNet of the activation-sharing paper, for small images."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.models.base import Architecture
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ARCHITECTURES.register("asap_alexnet")
@dataclasses.dataclass(eq=False)
class ASAPAlexNet(Architecture):
    """AlexNet of the activation-sharing paper, for small images.

    Three convolutions with max-pooling, then 4096-1024-1024-classes (appendix C of Woo et al. 2021 and the code behind it).

    5x5 kernels, padding 2, channels 64-128-256; batch normalisation and ReLU behind every hidden layer, and batch normalisation
    of the logits. Pooling rounds up, so that 28x28 and 32x32 images both end as 256 x 4 x 4. The paper's text has 3x3 kernels,
    which 4096 features contradict; this is the code's net.
    """

    width: int = option(64, "channels of the first convolution; the others have two and four times as many", minimum=1)
    hidden: int = option(1024, "neurons of the two hidden fully connected layers", minimum=1)
    output_norm: bool = option(True, "batch normalisation of the logits, as in all nets of the paper")

    def make(self, input_shape: tuple[int, int, int], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.alexnet import ConvStage, alexnet

        stages = [ConvStage(self.width * factor, 5, padding=2, pool=2, ceil=True) for factor in (1, 2, 4)]
        return alexnet(input_shape, classes, stages, [self.hidden] * 2, output_norm=self.output_norm)
