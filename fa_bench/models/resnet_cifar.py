"""ResNet-18 and ResNet-34 for small images, with and without shortcuts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.models.base import StagedArchitecture
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ARCHITECTURES.register("resnet18")
@dataclasses.dataclass(eq=False)
class ResNet18(StagedArchitecture):
    """ResNet-18 for small images; shortcuts=false for the nets without shortcuts.

    3x3 stem, stages of 64-128-256-512 channels (appendix C of Woo et al. 2021).

    Stem of stride 1 and padding 1 without pooling, blocks of two 3x3 convolutions, 1x1 convolutions with batch normalisation
    where the shape changes, average pooling over the map, and batch normalisation of the logits. ``shortcuts=false`` leaves out
    the identities and the 1x1 convolutions: the paper's "nsc" nets. Convolutions have no bias, as in the nets behind the paper's
    backpropagation; those behind its other rules have one, which the normalisation takes away.
    """

    shortcuts: bool = option(True, "shortcuts beside the blocks' convolutions")
    output_norm: bool = option(True, "batch normalisation of the logits, as in all nets of the paper")

    def make(self, input_shape: tuple[int, int, int], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.residual import ResNet

        shortcut = "project" if self.shortcuts else "none"
        return ResNet(input_shape[0], classes, self.widths, self.blocks, shortcut, output_norm=self.output_norm)


@ARCHITECTURES.register("resnet34")
@dataclasses.dataclass(eq=False)
class ResNet34(ResNet18):
    """ResNet-34 for small images; shortcuts=false for the nets without shortcuts.

    As resnet18, with 3, 4, 6 and 3 blocks (appendix C of Woo et al. 2021).
    """

    blocks: list[int] = option([3, 4, 6, 3], "blocks in each stage", minimum=1, maximum=1000)
