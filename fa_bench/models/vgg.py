"""VGG nets: those of the predictive-coding papers, and VGG-16."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.errors import OptionError, names
from fa_bench.models.base import ACTIVATIONS, Architecture
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES

if TYPE_CHECKING:
    from torch import nn as torch_nn

#: Depth -> the 3x3 convolutions, by their channels as multiples of the first one's; p: max-pooling by 2 follows; v: no padding.
CONVOLUTIONS = {
    5: "1p 2p 4p 4p",
    7: "1p 1 2p 2v 4p 4v",
    9: "1p 1 2p 2 4p 4 4p 4",
    16: "1 1p 2 2p 4 4 4p 8 8 8p 8 8 8p",
}


@ARCHITECTURES.register("vgg")
@dataclasses.dataclass(eq=False)
class VGG(Architecture):
    """VGG-5, VGG-7, VGG-9 of the predictive-coding papers, and VGG-16 with one linear layer.

    3x3 convolutions with bias, activations, max-pooling by 2, one linear layer (`depth`: the layers with weights).

    Depths 5, 7 and 9 have 128 to 512 channels and GELU, after the published code of ePC (Goemaere et al. 2025, arXiv 2505.20137);
    that of the PCX benchmark (Pinchetti et al. 2025, arXiv 2407.01163) has the same VGG-5 and VGG-7. The fourth and the last
    convolution of VGG-7 have no padding. PCX lists another VGG-9, with 64 to 512 channels and three fully connected layers.

    Depth 16 has the 13 convolutions of configuration D of Simonyan and Zisserman 2015, 64 to 512 channels, and ReLU. Their three
    fully connected layers are replaced by one, which is common practice for CIFAR and not in the paper; so is
    ``batch_norm=true``, which normalises before every activation.
    """

    depth: int = option(5, "number of layers with weights: 5, 7, 9 or 16")
    width: int | None = option(None, "channels of the first convolution; null: 128, for depth 16: 64", minimum=1)
    activation: str | None = option(None, "activation function; null: gelu, for depth 16: relu", choices=list(ACTIVATIONS))
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
