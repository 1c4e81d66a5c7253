"""The VGG networks of the predictive-coding papers, and VGG-16."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.errors import OptionError, names
from fa_bench.models.base import ACTIVATIONS, Architecture
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES

if TYPE_CHECKING:
    from torch import nn as torch_nn

#: Depth -> the 3x3 convolutions. A number is the ratio of a convolution's channels to those of the first one; p stands for
#: max-pooling by 2 after the convolution, and v for no padding.
CONVOLUTIONS = {
    5: "1p 2p 4p 4p",
    7: "1p 1 2p 2v 4p 4v",
    9: "1p 1 2p 2 4p 4 4p 4",
    16: "1 1p 2 2p 4 4 4p 8 8 8p 8 8 8p",
}


@ARCHITECTURES.register("vgg")
@dataclasses.dataclass(eq=False)
class VGG(Architecture):
    """VGG-5, VGG-7 and VGG-9 from the predictive-coding papers, and VGG-16 with one linear layer.

    The networks have 3x3 convolutions with bias, activations, max-pooling by 2, and one linear layer. `depth` is the number of
    layers with weights, except that the network of depth 16 has 14 of them, as explained below.

    The networks of depth 5, 7 and 9 have 128 to 512 channels and GELU, as in the published code of ePC (Goemaere et al. 2025,
    arXiv 2505.20137). The code of the PCX benchmark (Pinchetti et al. 2025, arXiv 2407.01163) has the same VGG-5 and VGG-7. The
    fourth and the last convolution of VGG-7 have no padding. The VGG-9 that PCX lists is a different one, with 64 to 512 channels
    and three fully connected layers.

    The network of depth 16 has the 13 convolutions of configuration D in Simonyan and Zisserman 2015, with 64 to 512 channels,
    each followed by a ReLU. One linear layer replaces the three fully connected layers of that paper, and ``batch_norm=true``
    normalises before every activation. A single linear layer and batch normalisation are common practice for CIFAR but are not in
    that paper.
    """

    depth: int = option(5, "the number in the name of the network: 5, 7, 9 or 16")
    width: int | None = option(None, "channels of the first convolution; null: 128 (64 for depth 16)", minimum=1)
    activation: str | None = option(None, "activation function; null: gelu (relu for depth 16)", choices=list(ACTIVATIONS))
    batch_norm: bool = option(False, "batch normalisation before every activation")

    def check(self) -> None:
        if self.depth not in CONVOLUTIONS:
            raise OptionError("depth", f"={self.depth} is not one of {names(map(str, CONVOLUTIONS))}")

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.convnet import ConvStage, convnet

        width = self.width or (64 if self.depth == 16 else 128)
        stages = [
            ConvStage(width * int(word[0]), 3, padding=0 if "v" in word else 1, pool=2 if "p" in word else 0)
            for word in CONVOLUTIONS[self.depth].split()
        ]
        activation = self.activation or ("relu" if self.depth == 16 else "gelu")
        return convnet(
            input_shape, classes, stages, [], activation=activation, conv_norm=self.batch_norm, name=f"VGG-{self.depth}"
        )
