"""Residual blocks and nets for small images."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """conv1 - bn1 - relu1 - conv2 - bn2, plus the shortcut if there is one, - relu2.

    Maps (N, C_in, H, W) to (N, C_out, H/stride, W/stride).
    """

    def __init__(self, channels_in: int, channels: int, stride: int, shortcut: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.stride, self.added, self.shortcut = stride, channels - channels_in, shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if not self.shortcut:
            return self.relu2(y)
        if self.stride != 1 or self.added:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return self.relu2(y + x)


class ResNet(nn.Module):
    """A stem of the first width, stages of blocks that halve the image from the second on, and one linear layer.

    Maps (N, C, H, W) to logits (N, classes). Its cut points are the activations: the stem's, and two in every block. Its blocks
    are the stem and the residual blocks.
    """

    def __init__(self, colours: int, classes: int, widths: list[int], blocks: int, shortcuts: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(colours, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.stages = nn.Sequential(OrderedDict(
            (f"layer{number}", nn.Sequential(*(
                Block(widths[max(number - 2, 0)] if block == 0 else width, width, 2 if block == 0 and number > 1 else 1,
                      shortcuts)
                for block in range(blocks)
            )))
            for number, width in enumerate(widths, start=1)
        ))
        self.fc = nn.Linear(widths[-1], classes)
        self.cut_points = ["relu", "stages.*.relu1", "stages.*.relu2"]
        self.blocks = ["relu", *(path for path, module in self.named_modules() if isinstance(module, Block))]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
