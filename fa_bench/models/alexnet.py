"""The AlexNets of two papers: convolutions, then fully connected layers."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fa_bench.errors import ConfigError
from fa_bench.models.base import Architecture
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES
from fa_bench.utils.lazy import nn

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ARCHITECTURES.register("asap_alexnet")
@dataclasses.dataclass(eq=False)
class ASAPAlexNet(Architecture):
    """AlexNet of the activation-sharing paper, for small images.

    Three convolutions with max-pooling, then 4096-1024-1024-classes (appendix C and published code of Woo et al. 2021).

    5x5 kernels, padding 2, channels 64-128-256; batch normalisation and ReLU after every hidden layer, and batch normalisation
    of the logits. Pooling rounds up, so that 28x28 and 32x32 images both give 256 x 4 x 4 features. This is the net of the code;
    the paper's text has 3x3 kernels, which contradict its 4096 features.
    """

    width: int = option(64, "channels of the first convolution; the others have two and four times as many", minimum=1)
    hidden: int = option(1024, "neurons of the two hidden fully connected layers", minimum=1)
    output_norm: bool = option(True, "batch normalisation of the logits, as in all nets of the paper")

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        stages = [ConvStage(self.width * factor, 5, padding=2, pool=2, ceil=True) for factor in (1, 2, 4)]
        return alexnet(input_shape, classes, stages, [self.hidden] * 2, output_norm=self.output_norm)


@ARCHITECTURES.register("dkp_alexnet")
@dataclasses.dataclass(eq=False)
class DKPAlexNet(Architecture):
    """AlexNet of the direct Kolen-Pollack paper, for 224x224 images.

    torchvision's AlexNet with batch normalisation before every ReLU (section 3.2 of the DKP paper).

    Channels 64-192-384-256-256, then 9216-4096-4096-classes for 224x224 images; other sizes, from 63x63, give other numbers of
    features. The paper normalises before every activation except the output, its published code only after convolutions
    (``linear_norm=false``). Dropout is applied before both hidden fully connected layers, as in torchvision.
    """

    width: int = option(64, "channels of the first convolution; the others have 3, 6, 4 and 4 times as many", minimum=1)
    hidden: int = option(4096, "neurons of the two hidden fully connected layers", minimum=1)
    linear_norm: bool = option(True, "batch normalisation after the hidden fully connected layers too")
    dropout: float = option(0.5, "rate of the two dropouts", minimum=0, below=1)

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        w = self.width
        stages = [
            ConvStage(w, 11, stride=4, padding=2, pool=3),
            ConvStage(3 * w, 5, padding=2, pool=3),
            ConvStage(6 * w, 3, padding=1),
            ConvStage(4 * w, 3, padding=1),
            ConvStage(4 * w, 3, padding=1, pool=3),
        ]
        return alexnet(input_shape, classes, stages, [self.hidden] * 2, linear_norm=self.linear_norm, dropout=self.dropout)


@dataclasses.dataclass(frozen=True)
class ConvStage:
    """A convolution with square kernels, followed by max-pooling.

    Attributes:
        channels, kernel, stride, padding: of the convolution.
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
        """Height or width after the stage; below 1 if nothing remains."""
        length = (length + 2 * self.padding - self.kernel) // self.stride + 1
        if not self.pool:
            return length
        rounded = math.ceil if self.ceil else math.floor
        return rounded((length - self.pool) / 2) + 1 if length >= (1 if self.ceil else self.pool) else 0


def alexnet(
    input_shape: tuple[int, ...],
    classes: int,
    stages: Sequence[ConvStage],
    hidden: Sequence[int],
    *,
    linear_norm: bool = True,
    dropout: float | None = None,
    output_norm: bool = False,
) -> torch_nn.Sequential:
    """conv1 - bn1 - act1 (- pool1) - conv2 - ... - flatten - (dropN -) fcN - (bnN) - actN - ... - fcK (- bnK).

    Numbers continue from the convolutions to the fully connected layers. The cut points are the hidden activations, after pooling
    and dropout if present, where the code of both papers delivers the error. The blocks end at the same modules.

    Args:
        input_shape: (C, H, W) of one image.
        classes: number of outputs.
        stages: the convolutions.
        hidden: neurons of the hidden fully connected layers.
        linear_norm: batch normalisation after hidden fully connected layers; convolutions always have it.
        dropout: rate of the dropout before every hidden fully connected layer; None for no such modules.
        output_norm: batch normalisation of the logits.

    Raises:
        ConfigError: for images that are too small for the stages.
    """
    channels, *size = input_shape
    parts: OrderedDict[str, torch_nn.Module] = OrderedDict()
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
            raise ConfigError(f"architecture: {height}x{width} images are too small for {ends[-1]} of this AlexNet; enlarge them")
    parts["flatten"] = nn.Flatten()
    width = channels * math.prod(size)
    for number, units in enumerate(hidden, start=len(stages) + 1):
        if dropout is not None:
            # Dropout of the activation before; the error is delivered after it.
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
