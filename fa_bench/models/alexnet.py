"""The AlexNet variants of two papers, with convolutions followed by fully connected layers."""

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
    """The AlexNet variant of the activation-sharing paper, for small images.

    The network has three convolutions with max-pooling, followed by fully connected layers of widths 4096-1024-1024-classes
    (appendix C and published code of Woo et al. 2021).

    The convolutions have 64, 128 and 256 channels, 5x5 kernels and padding 2. Batch normalisation and ReLU follow every hidden
    layer, and the logits are also batch-normalised. Pooling rounds up, so 28x28 and 32x32 images both lead to 256 x 4 x 4
    features. The network is that of the published code. The text of the paper states 3x3 kernels, which with padding 2 would not
    lead to its 4096 features.
    """

    width: int = option(64, "channels of the first convolution; the others have two and four times as many", minimum=1)
    hidden: int = option(1024, "neurons of each hidden fully connected layer", minimum=1)
    output_norm: bool = option(True, "batch normalisation of the logits, as in all nets of the paper")

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.convnet import ConvStage, convnet

        stages = [ConvStage(self.width * factor, 5, padding=2, pool=2, ceil=True) for factor in (1, 2, 4)]
        return convnet(input_shape, classes, stages, [self.hidden] * 2, output_norm=self.output_norm)


@ARCHITECTURES.register("dkp_alexnet")
@dataclasses.dataclass(eq=False)
class DKPAlexNet(Architecture):
    """The AlexNet variant of the direct Kolen-Pollack (DKP) paper, for 224x224 images.

    The network is torchvision's AlexNet with batch normalisation before every ReLU (section 3.2 of the paper).

    The convolutions have 64, 192, 384, 256 and 256 channels. For 224x224 images, the fully connected layers have widths
    9216-4096-4096-classes; the first of these numbers depends on the image size, which must be at least 63x63. The paper
    normalises before every activation except the output; its published code normalises only after convolutions
    (``linear_norm=false``). As in torchvision, dropout precedes both hidden fully connected layers.
    """

    width: int = option(64, "channels of the first convolution; the others have 3, 6, 4 and 4 times as many", minimum=1)
    hidden: int = option(4096, "neurons of each hidden fully connected layer", minimum=1)
    linear_norm: bool = option(True, "batch normalisation after the hidden fully connected layers, too")
    dropout: float = option(0.5, "rate of the two dropout layers", minimum=0, below=1)

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.convnet import ConvStage, convnet

        w = self.width
        stages = [
            ConvStage(w, 11, stride=4, padding=2, pool=3),
            ConvStage(3 * w, 5, padding=2, pool=3),
            ConvStage(6 * w, 3, padding=1),
            ConvStage(4 * w, 3, padding=1),
            ConvStage(4 * w, 3, padding=1, pool=3),
        ]
        return convnet(input_shape, classes, stages, [self.hidden] * 2, linear_norm=self.linear_norm, dropout=self.dropout)
