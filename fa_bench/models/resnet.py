"""Residual networks for small and large images."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from fa_bench.errors import OptionError
from fa_bench.models.base import Architecture
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ARCHITECTURES.register("resnet20")
@dataclasses.dataclass(eq=False)
class ResNet20(Architecture):
    """ResNet-20 for small images.

    The network is conv1 - bn1 - relu - three stages of 3 blocks - average pooling - fc (He et al. 2016, section 4.2).

    The stages have 16, 32 and 64 channels. Shortcuts have no parameters: where the shape changes, they keep every second pixel
    and fill the added channels with zeros.
    """

    width: int = option(16, "channels of the first stage", minimum=1)
    blocks: int = option(3, "blocks in each of the three stages", minimum=1, maximum=1000)
    shortcuts: bool = option(True, "add each block's input to its output; false: a plain net with the same layers")

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.resnet import ResNet

        shortcut = "pad" if self.shortcuts else "none"
        return ResNet(input_shape[0], classes, [self.width, 2 * self.width, 4 * self.width], [self.blocks] * 3, shortcut)


@ARCHITECTURES.register("resnet_cifar_small")
@dataclasses.dataclass(eq=False)
class ResNetCifarSmall(Architecture):
    """ResNet-20, -32, -44, -56, -110 and so on for small images: resnet20 with any depth of 6n + 2.

    Each of the three stages has n blocks (He et al. 2016, section 4.2).
    """

    depth: int = option(32, "layers with weights on the longest path, 6n + 2 for n blocks in each stage", minimum=8, maximum=6002)
    width: int = option(16, "channels of the first stage", minimum=1)
    shortcuts: bool = option(True, "add each block's input to its output; false: a plain net with the same layers")

    def check(self) -> None:
        if self.depth % 6 != 2:
            raise OptionError(
                "depth",
                f"={self.depth} is not of the form 6n + 2 (such as 20, 32, 44, 56 or 110)",
                f"={6 * round((self.depth - 2) / 6) + 2}",
            )

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        return ResNet20(width=self.width, blocks=(self.depth - 2) // 6, shortcuts=self.shortcuts).make(input_shape, classes)


@dataclasses.dataclass(eq=False)
class StagedArchitecture(Architecture):
    """Base class of residual networks in which every stage has twice the channels of the previous one."""

    width: int = option(64, "channels of the first stage; they double from stage to stage", minimum=1)
    blocks: list[int] = option([2, 2, 2, 2], "blocks in each stage", minimum=1, maximum=1000)

    def check(self) -> None:
        if not self.blocks:
            raise OptionError(
                "blocks", "=[]: at least one stage is required; pass the number of blocks in each, for example [2,2,2,2]"
            )

    @property
    def widths(self) -> list[int]:
        """Channels of each stage."""
        return [self.width * 2**stage for stage in range(len(self.blocks))]


@ARCHITECTURES.register("resnet18")
@dataclasses.dataclass(eq=False)
class ResNet18(StagedArchitecture):
    """ResNet-18 for small images; shortcuts=false removes the shortcuts.

    The network has a 3x3 stem and stages of 64, 128, 256 and 512 channels (appendix C of Woo et al. 2021).

    The stem has stride 1, padding 1 and no pooling. Blocks have two 3x3 convolutions, and their shortcuts are 1x1 convolutions
    with batch normalisation where the shape changes. Global average pooling precedes the linear layer, and the logits are
    batch-normalised. Without shortcuts, the network is the paper's "nsc" network. Convolutions have no bias, as in the paper's
    networks for backpropagation; in its networks for the other rules, they have one, but the normalisation cancels it.
    """

    shortcuts: bool = option(True, "add a shortcut around the convolutions of each block")
    output_norm: bool = option(True, "batch normalisation of the logits, as in all nets of the paper")

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.resnet import ResNet

        shortcut = "project" if self.shortcuts else "none"
        return ResNet(input_shape[0], classes, self.widths, self.blocks, shortcut, output_norm=self.output_norm)


@ARCHITECTURES.register("resnet34")
@dataclasses.dataclass(eq=False)
class ResNet34(ResNet18):
    """ResNet-34 for small images; shortcuts=false removes the shortcuts.

    The network is like resnet18, but its stages have 3, 4, 6 and 3 blocks (appendix C of Woo et al. 2021).
    """

    blocks: list[int] = option([3, 4, 6, 3], "blocks in each stage", minimum=1, maximum=1000)


@ARCHITECTURES.register("resnet18_imagenet")
@dataclasses.dataclass(eq=False)
class ResNet18ImageNet(StagedArchitecture):
    """ResNet-18 for large images; bn=after places batch normalisation after the ReLU.

    The network has a 7x7 stem with pooling and stages of 64, 128, 256 and 512 channels (He et al. 2016).

    ``bn=before`` is torchvision's network, in which the last ReLU of a block follows the sum. ``bn=after`` normalises after the
    ReLU, as Akrout et al. 2019 do. The appendix with the details of their network is not available. With ``bn=after``, a block is
    conv - ReLU - BN twice, plus the shortcut, and no layer follows the sum. With both settings, a
    shortcut is a 1x1 convolution followed by BN where the shape changes.
    """

    bn: str = option("before", "batch normalisation before or after the ReLU", choices=["before", "after"])

    bottleneck: ClassVar[bool] = False

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.resnet import ResNet

        return ResNet(
            input_shape[0],
            classes,
            self.widths,
            self.blocks,
            "project",
            large=True,
            bottleneck=self.bottleneck,
            norm_after=self.bn == "after",
        )


@ARCHITECTURES.register("resnet50_imagenet")
@dataclasses.dataclass(eq=False)
class ResNet50ImageNet(ResNet18ImageNet):
    """ResNet-50 for large images; bn=after places batch normalisation after the ReLU.

    The network is like resnet18_imagenet, but its stages have 3, 4, 6 and 3 bottleneck blocks (He et al. 2016).

    A block has 1x1, 3x3 and 1x1 convolutions, and the last one has four times the channels of the stage. The 3x3 convolution is
    the strided one, as in torchvision.
    """

    blocks: list[int] = option([3, 4, 6, 3], "blocks in each stage", minimum=1, maximum=1000)

    bottleneck: ClassVar[bool] = True
