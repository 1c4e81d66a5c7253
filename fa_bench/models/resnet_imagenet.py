"""ResNet-18 and ResNet-50 for large images, with batch normalisation before or after the ReLU."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from fa_bench.models.base import StagedArchitecture
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ARCHITECTURES.register("resnet18_imagenet")
@dataclasses.dataclass(eq=False)
class ResNet18ImageNet(StagedArchitecture):
    """ResNet-18 for large images; bn=after for batch normalisation behind the ReLU.

    7x7 stem with pooling, stages of 64-128-256-512 channels (He et al. 2016).

    ``bn=before`` is torchvision's net: the ReLU comes last, behind the sum. ``bn=after`` normalises the signals behind the ReLU,
    as Akrout et al. 2019 do; their appendix with the details is not available, so the block is read as conv - ReLU - BN twice,
    plus the shortcut, with nothing behind the sum; projections are 1x1 convolution - BN.
    """

    bn: str = option("before", "batch normalisation before or after the ReLU", choices=["before", "after"])

    bottleneck: ClassVar[bool] = False

    def make(self, input_shape: tuple[int, int, int], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.residual import ResNet

        return ResNet(input_shape[0], classes, self.widths, self.blocks, "project",
                      large=True, bottleneck=self.bottleneck, norm_after=self.bn == "after")


@ARCHITECTURES.register("resnet50_imagenet")
@dataclasses.dataclass(eq=False)
class ResNet50ImageNet(ResNet18ImageNet):
    """ResNet-50 for large images; bn=after for batch normalisation behind the ReLU.

    As resnet18_imagenet, with 3, 4, 6 and 3 bottleneck blocks (He et al. 2016).

    A block is 1x1 - 3x3 - 1x1 convolutions, the last one with four times the stage's channels; the 3x3 one has the stride, as in
    torchvision.
    """

    blocks: list[int] = option([3, 4, 6, 3], "blocks in each stage", minimum=1, maximum=1000)

    bottleneck: ClassVar[bool] = True
