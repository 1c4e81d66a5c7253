"""Residual fully connected networks."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from fa_bench.models.base import ACTIVATIONS, Architecture
from fa_bench.registry.kinds import CLASSES, FEATURES, IMAGES, VALUES
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES
from fa_bench.utils.lazy import nn

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ARCHITECTURES.register("residual_mlp")
@dataclasses.dataclass(eq=False)
class ResidualMLP(Architecture):
    """Residual MLP with LayerNorm at the start of every block.

    The layers are embed - blocks - final_norm - head, where each block maps x to x + fc2(act(fc1(norm(x)))). The default of 4
    blocks of width 256 comes from the faeval protocol (spring 2026).

    We know the protocol's depth and width but not its code. Our own choices are hidden layers of 4 times the width, as in
    transformers, and GELU. ``final_norm=false`` removes the final LayerNorm, as in the protocol's student network.

    The cut points are the outputs of embed, of every activation and of every block; for the last block, the output of the final
    LayerNorm is used instead if there is one. A cut at the output of a block also cuts the identity path: the error there trains
    the block's second layer, and no error from later blocks reaches earlier ones. Only the gains and biases of the LayerNorms
    within blocks receive an error through a weight, because there is no cut between them and the next layer.
    """

    tasks = ((IMAGES, CLASSES), (IMAGES, VALUES), (FEATURES, CLASSES), (FEATURES, VALUES))

    width: int = option(256, "neurons of the residual stream", minimum=1)
    blocks: int = option(4, "residual blocks", minimum=1, maximum=1000)
    expansion: float = option(4.0, "neurons of a block's hidden layer, as a multiple of width", above=0, maximum=100)
    activation: str = option("gelu", "activation function of the hidden layers", choices=list(ACTIVATIONS))
    final_norm: bool = option(True, "whether there is a LayerNorm before the output layer")

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.residual_mlp import ResidualBlock

        hidden = max(1, round(self.width * self.expansion))
        parts: OrderedDict[str, torch_nn.Module] = OrderedDict(
            flatten=nn.Flatten(),
            embed=nn.Linear(math.prod(input_shape), self.width),
            layers=nn.Sequential(*(ResidualBlock(self.width, hidden, self.activation) for _ in range(self.blocks))),
        )
        if self.final_norm:
            parts["final_norm"] = nn.LayerNorm(self.width)
        parts["head"] = nn.Linear(self.width, classes)
        model: Any = nn.Sequential(parts)
        model.blocks = [f"layers.{number}" for number in range(self.blocks)]
        model.cut_points = ["embed", "layers.*.act", *model.blocks]
        if self.final_norm:
            model.cut_points[-1] = "final_norm"
        return model
