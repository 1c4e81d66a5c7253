"""Fully connected networks."""

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


@ARCHITECTURES.register("mlp")
@dataclasses.dataclass(eq=False)
class MLP(Architecture):
    """Multilayer perceptron with input and output sizes that fit the data; 784-512-512-10 on MNIST (section 3 of Li and Benna
    2024).

    The layers are fc1 - (bn1) - act1 - fc2 - ... - fcK.

    The network that the DKP paper uses to measure alignment has five fully connected layers with batch normalisation. The paper
    does not give the widths; we use ``widths=[512,512,512,512] batch_norm=true``. The networks of Forward Alignment (appendix A
    of Woo et al. 2021) have ``widths=[10,10,10]``, with either ``activation=identity`` or ``batch_norm=true output_norm=true``.
    The appendix of that paper does not give the width of the input.
    """

    tasks = ((IMAGES, CLASSES), (IMAGES, VALUES), (FEATURES, CLASSES), (FEATURES, VALUES))

    widths: list[int] = option([512, 512], "neurons of each hidden layer", minimum=1)
    activation: str = option("relu", "activation function of the hidden layers", choices=list(ACTIVATIONS))
    batch_norm: bool = option(False, "batch normalisation before every activation")
    output_norm: bool = option(False, "batch normalisation of the logits, as in the nets of Woo et al. 2021")

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        parts: OrderedDict[str, torch_nn.Module] = OrderedDict(flatten=nn.Flatten())
        width = math.prod(input_shape)
        for number, units in enumerate(self.widths, start=1):
            parts[f"fc{number}"] = nn.Linear(width, units)
            if self.batch_norm:
                parts[f"bn{number}"] = nn.BatchNorm1d(units)
            parts[f"act{number}"] = ACTIVATIONS[self.activation]()
            width = units
        parts[f"fc{len(self.widths) + 1}"] = nn.Linear(width, classes)
        if self.output_norm:
            parts[f"bn{len(self.widths) + 1}"] = nn.BatchNorm1d(classes)
        model: Any = nn.Sequential(parts)
        model.cut_points = model.blocks = [name for name in parts if name.startswith("act")]
        return model
