"""The network with two convolutions from the direct Kolen-Pollack paper."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from fa_bench.errors import OptionError
from fa_bench.models.base import Architecture
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES
from fa_bench.utils.lazy import nn

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ARCHITECTURES.register("conv2")
@dataclasses.dataclass(eq=False)
class Conv2(Architecture):
    """Two convolutions and two linear layers, from the direct Kolen-Pollack (DKP) paper.

    The layers are conv1 - bn1 - act1 - conv2 - bn2 - act2 - pool - fc1 - bn3 - act3 - fc2 (Table 3 of the DKP paper).

    The convolutions have 3x3 kernels and stride 1, and the max-pooling window is 2x2. ``padding=null`` selects padding 0 for
    32x32 images and padding 1 for all others, so 28x28 and 32x32 images both lead to the paper's 6272 features (32 x 14 x 14).
    """

    channels: int = option(32, "channels of both convolutions", minimum=1)
    hidden: int = option(128, "neurons of the hidden fully connected layer", minimum=1)
    padding: int | None = option(
        None, "padding of both convolutions; null: 0 for 32x32 images, otherwise 1", minimum=0, maximum=2
    )

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        colours, height, width = input_shape
        padding = self.padding if self.padding is not None else int((height, width) != (32, 32))
        pooled = [(size + 2 * (2 * padding - 2)) // 2 for size in (height, width)]
        if min(pooled) < 1:
            raise OptionError("padding", f"={padding}: {height}x{width} images are too small")
        model: Any = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(colours, self.channels, 3, padding=padding),
                bn1=nn.BatchNorm2d(self.channels),
                act1=nn.ReLU(),
                conv2=nn.Conv2d(self.channels, self.channels, 3, padding=padding),
                bn2=nn.BatchNorm2d(self.channels),
                act2=nn.ReLU(),
                pool=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(self.channels * pooled[0] * pooled[1], self.hidden),
                bn3=nn.BatchNorm1d(self.hidden),
                act3=nn.ReLU(),
                fc2=nn.Linear(self.hidden, classes),
            )
        )
        model.cut_points = ["act1", "act2", "act3"]
        model.blocks = ["act1", "pool", "act3"]
        return model
