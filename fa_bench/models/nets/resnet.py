"""Residual blocks and nets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Kinds of shortcuts. If the shape changes, ``pad`` keeps every second pixel and fills the added channels with zeros, whereas
#: ``project`` applies a 1x1 convolution with batch normalisation. With ``none``, blocks have no shortcuts.
SHORTCUTS = ("pad", "project", "none")


class Block(nn.Module):
    """A residual block of a ResNet.

    The block maps (N, C_in, H, W) to (N, C_out, H/stride, W/stride). The layers of the block are conv1 - bn1 - relu1 - ... -
    convK - bnK; the shortcut is added to the output of bnK, and reluK follows the sum. With `norm_after`, the layers are conv1 -
    relu1 - bn1 - ... - convK - reluK - bnK; the shortcut is added at the end, and no layer follows the sum.

    Args:
        channels_in: C_in.
        channels: the channels of the convolutions; the last number is C_out.
        kernels: the kernels of the convolutions: (3, 3), or (1, 3, 1) for a bottleneck.
        stride: the stride of the first 3x3 convolution and the shortcut.
        shortcut: one of SHORTCUTS.
        norm_after: whether batch normalisation comes after the ReLUs.
    """

    def __init__(
        self, channels_in: int, channels: Sequence[int], kernels: Sequence[int], stride: int, shortcut: str, norm_after: bool
    ) -> None:
        super().__init__()
        self.depth, self.norm_after, self.stride = len(kernels), norm_after, stride
        strided, width = kernels.index(3) + 1, channels_in
        for number, (out, kernel) in enumerate(zip(channels, kernels, strict=True), start=1):
            step = stride if number == strided else 1
            self.add_module(f"conv{number}", nn.Conv2d(width, out, kernel, step, padding=kernel // 2, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(out))
            self.add_module(f"relu{number}", nn.ReLU())
            width = out
        self.plain, self.added = shortcut == "none", width - channels_in
        changes = stride != 1 or self.added != 0
        self.padded = shortcut == "pad" and changes
        self.shortcut = (
            nn.Sequential(OrderedDict(conv=nn.Conv2d(channels_in, width, 1, stride, bias=False), bn=nn.BatchNorm2d(width)))
            if shortcut == "project" and changes
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.depth + 1):
            y = getattr(self, f"conv{number}")(y)
            bn, relu = getattr(self, f"bn{number}"), getattr(self, f"relu{number}")
            if not self.norm_after:
                y = bn(y)
            if self.norm_after or number < self.depth:
                y = relu(y)
            if self.norm_after:
                y = bn(y)
        if self.padded:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        elif self.shortcut is not None:
            x = self.shortcut(x)
        if not self.plain:
            y = y + x
        return y if self.norm_after else getattr(self, f"relu{self.depth}")(y)


class ResNet(nn.Module):
    """A residual network: a stem, stages of residual blocks, and one linear layer. Every stage except the first halves the image
    size.

    The network maps (N, C, H, W) to logits (N, classes). The cut points are the output of the stem and, in every residual block,
    the activation after each convolution; the last of these is the output of the block. The model's blocks are the stem and the
    residual blocks.

    Args:
        colours: C.
        classes: width of the output.
        widths: channels of the stages.
        blocks: blocks in each stage.
        shortcut: one of SHORTCUTS.
        large: whether the stem is for large images: 7x7 with stride 2 and max-pooling by 2, instead of 3x3 with stride 1.
        bottleneck: whether blocks have 1x1, 3x3 and 1x1 convolutions, the last one four times as wide, instead of two 3x3 ones.
        norm_after: whether batch normalisation comes after the ReLUs instead of before them.
        output_norm: whether the logits are batch-normalised.
    """

    def __init__(
        self,
        colours: int,
        classes: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        shortcut: str = "pad",
        *,
        large: bool = False,
        bottleneck: bool = False,
        norm_after: bool = False,
        output_norm: bool = False,
    ) -> None:
        super().__init__()
        kernels, factors = ((1, 3, 1), (1, 1, 4)) if bottleneck else ((3, 3), (1, 1))
        self.norm_after = norm_after
        kernel, stride = (7, 2) if large else (3, 1)
        self.conv1 = nn.Conv2d(colours, widths[0], kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, padding=1) if large else None
        self.stages = nn.Sequential()
        channels = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            made = nn.Sequential()
            for number in range(count):
                out = [width * factor for factor in factors]
                made.append(Block(channels, out, kernels, 2 if stage and not number else 1, shortcut, norm_after))
                channels = out[-1]
            self.stages.add_module(f"layer{stage + 1}", made)
        self.fc = nn.Linear(channels, classes)
        self.bn_out = nn.BatchNorm1d(classes) if output_norm else None

        stem = "pool" if large else "bn1" if norm_after else "relu"
        ends = [path for path, module in self.named_modules() if isinstance(module, Block)]
        activation, inner = ("bn", len(kernels) - 1) if norm_after else ("relu", len(kernels))
        self.cut_points = [stem, *(f"stages.*.{activation}{number}" for number in range(1, inner + 1))]
        if norm_after:  # no module except the block outputs the sum
            self.cut_points += ends
        self.blocks = [stem, *ends]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(self.relu(x)) if self.norm_after else self.relu(self.bn1(x))
        if self.pool is not None:
            x = self.pool(x)
        x = self.fc(torch.flatten(F.adaptive_avg_pool2d(self.stages(x), 1), 1))
        return x if self.bn_out is None else self.bn_out(x)
