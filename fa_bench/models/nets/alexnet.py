"""Convolutions in a row, then fully connected layers: the two papers' AlexNets."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from fa_bench.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ConvStage:
    """A convolution of square kernels and the max-pooling behind it.

    Attributes:
        channels, kernel, stride, padding: of the convolution.
        pool: kernel of the max-pooling of stride 2; 0 for none.
        ceil: whether the pooling keeps an incomplete last window.
    """

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    pool: int = 0
    ceil: bool = False

    def size(self, length: int) -> int:
        """Height or width behind the stage; below 1 where it leaves nothing."""
        length = (length + 2 * self.padding - self.kernel) // self.stride + 1
        if not self.pool:
            return length
        rounded = math.ceil if self.ceil else math.floor
        return rounded((length - self.pool) / 2) + 1 if length >= (1 if self.ceil else self.pool) else 0


def alexnet(
    input_shape: tuple[int, int, int],
    classes: int,
    stages: Sequence[ConvStage],
    hidden: Sequence[int],
    *,
    linear_norm: bool = True,
    dropout: float | None = None,
    output_norm: bool = False,
) -> nn.Sequential:
    """conv1 - bn1 - act1 (- pool1) - conv2 - ... - flatten - (dropN -) fcN - (bnN) - actN - ... - fcK (- bnK).

    Numbers run on from the convolutions to the fully connected layers. The cut points are the hidden activations, behind pooling
    and dropout where they follow: there both papers' codes deliver the error. The blocks are the same.

    Args:
        input_shape: (C, H, W) of one image.
        classes: width of the output.
        stages: the convolutions.
        hidden: neurons of the hidden fully connected layers.
        linear_norm: batch normalisation behind hidden fully connected layers; convolutions always have it.
        dropout: rate of the dropout in front of every hidden fully connected layer; None for no such modules.
        output_norm: batch normalisation of the logits.

    Raises:
        ConfigError: for images that the stages leave nothing of.
    """
    channels, *size = input_shape
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    ends: list[str] = []
    for number, stage in enumerate(stages, start=1):
        parts[f"conv{number}"] = nn.Conv2d(channels, stage.channels, stage.kernel, stage.stride, stage.padding)
        parts[f"bn{number}"] = nn.BatchNorm2d(stage.channels)
        parts[f"act{number}"] = nn.ReLU()
        if stage.pool:
            parts[f"pool{number}"] = nn.MaxPool2d(stage.pool, 2, ceil_mode=stage.ceil)
        ends.append(next(reversed(parts)))
        channels, size = stage.channels, [stage.size(length) for length in size]
        if min(size) < 1:
            height, width = input_shape[1:]
            raise ConfigError(f"architecture: {ends[-1]} of this AlexNet leaves nothing of {height}x{width} images; enlarge them")
    parts["flatten"] = nn.Flatten()
    width = channels * math.prod(size)
    for number, units in enumerate(hidden, start=len(stages) + 1):
        if dropout is not None:
            # What is dropped is the activation before; the error is delivered behind it.
            ends[-1] = f"drop{number}"
            parts[ends[-1]] = nn.Dropout(dropout)
        parts[f"fc{number}"] = nn.Linear(width, units)
        if linear_norm:
            parts[f"bn{number}"] = nn.BatchNorm1d(units)
        parts[f"act{number}"] = nn.ReLU()
        ends.append(f"act{number}")
        width = units
    last = len(stages) + len(hidden) + 1
    parts[f"fc{last}"] = nn.Linear(width, classes)
    if output_norm:
        parts[f"bn{last}"] = nn.BatchNorm1d(classes)
    model: Any = nn.Sequential(parts)
    model.cut_points = model.blocks = ends
    return model
