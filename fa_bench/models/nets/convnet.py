"""Networks of convolutions followed by fully connected layers."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from fa_bench.errors import ConfigError
from fa_bench.models.base import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class ConvStage:
    """A convolution with square kernels, optionally followed by max-pooling.

    Attributes:
        channels, kernel, stride, padding: the channels, kernel, stride and padding of the convolution.
        pool: kernel of the max-pooling with stride 2; 0 for none.
        ceil: whether the pooling keeps an incomplete last window.
    """

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    pool: int = 0
    ceil: bool = False

    def size(self, length: int) -> int:
        """The height or width of the stage's output for an input of `length` pixels; below 1 if nothing is left of the image."""
        length = (length + 2 * self.padding - self.kernel) // self.stride + 1
        if not self.pool:
            return length
        rounded = math.ceil if self.ceil else math.floor
        return rounded((length - self.pool) / 2) + 1 if length >= (1 if self.ceil else self.pool) else 0


def convnet(
    input_shape: tuple[int, ...],
    classes: int,
    stages: Sequence[ConvStage],
    hidden: Sequence[int],
    *,
    activation: str = "relu",
    conv_norm: bool = True,
    linear_norm: bool = True,
    dropout: float | None = None,
    output_norm: bool = False,
    name: str = "AlexNet",
) -> nn.Sequential:
    """A network with the layers conv1 (- bn1) - act1 (- pool1) - conv2 - ... - flatten - (dropN -) fcN (- bnN) - actN - ... - fcK
    (- bnK).

    Fully connected layers are numbered consecutively after the convolutions. The cut points are the hidden activations, after
    pooling and dropout if there are any; the published code of both AlexNet papers delivers errors there, too. The blocks end at
    the cut points.

    Args:
        input_shape: (C, H, W) of one image.
        classes: number of outputs.
        stages: the convolutions.
        hidden: neurons of the hidden fully connected layers.
        activation: one of ACTIVATIONS.
        conv_norm: whether batch normalisation follows the convolutions.
        linear_norm: whether batch normalisation follows the hidden fully connected layers.
        dropout: rate of the dropout before every hidden fully connected layer; None for no dropout.
        output_norm: whether the logits are batch-normalised.
        name: the name of the net in error messages.

    Raises:
        ConfigError: for images that are too small for the stages.
    """
    channels, *size = input_shape
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    ends: list[str] = []
    for number, stage in enumerate(stages, start=1):
        parts[f"conv{number}"] = nn.Conv2d(channels, stage.channels, stage.kernel, stage.stride, stage.padding)
        if conv_norm:
            parts[f"bn{number}"] = nn.BatchNorm2d(stage.channels)
        parts[f"act{number}"] = ACTIVATIONS[activation]()
        if stage.pool:
            parts[f"pool{number}"] = nn.MaxPool2d(stage.pool, 2, ceil_mode=stage.ceil)
        ends.append(next(reversed(parts)))
        channels, size = stage.channels, [stage.size(length) for length in size]
        if min(size) < 1:
            height, width = input_shape[1:]
            raise ConfigError(f"architecture: {height}x{width} images are too small for {ends[-1]} of this {name}; enlarge them")
    parts["flatten"] = nn.Flatten()
    width = channels * math.prod(size)
    for number, units in enumerate(hidden, start=len(stages) + 1):
        if dropout is not None:
            # This dropout belongs to the preceding activation, so the cut point is the output of the dropout.
            ends[-1] = f"drop{number}"
            parts[ends[-1]] = nn.Dropout(dropout)
        parts[f"fc{number}"] = nn.Linear(width, units)
        if linear_norm:
            parts[f"bn{number}"] = nn.BatchNorm1d(units)
        parts[f"act{number}"] = ACTIVATIONS[activation]()
        ends.append(f"act{number}")
        width = units
    last = len(stages) + len(hidden) + 1
    parts[f"fc{last}"] = nn.Linear(width, classes)
    if output_norm:
        parts[f"bn{last}"] = nn.BatchNorm1d(classes)
    model: Any = nn.Sequential(parts)
    model.cut_points = model.blocks = ends
    return model
