"""Decoupled greedy learning."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from typing import TYPE_CHECKING

from fa_bench.mechanisms.coverage import batch_note
from fa_bench.mechanisms.cut.local import ModuleRule, map_module
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import nn

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ALGORITHMS.register("dgl")
@dataclasses.dataclass(eq=False)
class DGL(ModuleRule):
    """Decoupled greedy learning: each block except the last learns from its own auxiliary classifier.

    The rule is due to Belilovsky, Eickenberg and Oyallon 2020. All blocks are trained simultaneously.

    The network is a chain of modules, which are the blocks that the model declares. Each module except the last is followed by an
    auxiliary network A, and both learn by exact backpropagation of the objective's loss, such as CE(A(a), labels), where a is the
    module's output. No error passes from one module to another. The last module learns from the network's own classifier and
    loss. For a map a with C channels and size H x W, `auxiliary_net` selects A as follows:

    - mlp_sr: average pooling to ⌈H/4⌉ x ⌈W/4⌉ is followed by three stages, each with a bias-free 1x1 convolution from C to C
      channels, batch normalisation and ReLU. Average pooling to 2x2 is followed by three more stages, each with a linear layer
      from 4C to 4C features, batch normalisation and ReLU, and by a linear layer to the classes.

    - mlp: the same layers without the three convolutional stages.

    - linear: only the two pooling layers and the last linear layer.

    For a flat activation a with F features, the layers have width F, and mlp_sr is the same as mlp. The auxiliary networks learn
    with the optimizer of W. The paper trains for 50 epochs by SGD with momentum 0.9, decay 5e-4 and batches of 128. The learning
    rate is 0.1, multiplied by 0.2 every 15 epochs.

    If the model's output has positions, such as tokens, the output of every module must have the same positions. A is then
    applied to each position, which has its own label, as if it were a flat activation.

    Our choices: average pooling never enlarges a map, so a map of at most 4x4 pixels has C features after the second pooling
    instead of 4C. A is used only in training, so its batch normalisation always uses batch statistics. A therefore rejects a
    batch of one sample, except with ``auxiliary_net=linear``, and each data-parallel rank has its own statistics. The option
    ``cuts`` or, if it is not set, ``model.blocks`` lists the ends of the modules. A module that feeds the output layer is part of
    the last module.
    """

    equations = (
        r"\mathcal{L}_m &= \operatorname{CE}(A_m(a_m), y) \quad \text{for module } m",
        r"e_{a_m} &= \frac{\partial \mathcal{L}_m}{\partial a_m}",
    )

    larger_batches = "use larger batches, drop the last incomplete one, or use auxiliary_net=linear (no batch normalisation)"
    auxiliary_net: str = option("mlp_sr", "the auxiliary nets", choices=["mlp_sr", "mlp", "linear"])

    def auxiliary(self, cut: str, shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        layers: OrderedDict[str, torch_nn.Module] = OrderedDict()
        channels, size = shape[0], shape[1:]
        if size:
            pool, conv, norm = (map_module(name, cut, shape) for name in ("AdaptiveAvgPool", "Conv", "BatchNorm"))
            size = tuple(math.ceil(length / 4) for length in size)
            layers["pool1"] = pool(size)
            for number in (1, 2, 3) if self.auxiliary_net == "mlp_sr" else ():
                layers[f"conv{number}"] = conv(channels, channels, 1, bias=False)
                layers[f"conv_bn{number}"] = norm(channels, track_running_stats=False)
                layers[f"conv_relu{number}"] = nn.ReLU()
            size = tuple(min(length, 2) for length in size)
            layers["pool2"] = pool(size)
        layers["flatten"] = nn.Flatten()
        width = channels * math.prod(size)
        for number in (1, 2, 3) if self.auxiliary_net != "linear" else ():
            layers[f"fc{number}"] = nn.Linear(width, width)
            layers[f"fc_bn{number}"] = nn.BatchNorm1d(width, track_running_stats=False)
            layers[f"fc_relu{number}"] = nn.ReLU()
        layers["out"] = nn.Linear(width, classes)
        return nn.Sequential(layers)

    def notes(self) -> tuple[str, ...]:
        return () if self.auxiliary_net == "linear" else (batch_note("batch normalisation in the auxiliary nets"),)
