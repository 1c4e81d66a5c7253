"""The base of all architectures: options, and how to build a plain model from them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.errors import OptionError
from fa_bench.registry.options import Options, option
from fa_bench.utils.lazy import nn
from fa_bench.utils.sampling import INITIALISERS, fill

if TYPE_CHECKING:
    from torch import nn as torch_nn

#: Names of initialisers of weights before they shared a table with those of feedback; configs may still use them.
OLD_NAMES = {"kaiming_normal": "kaiming_normal_fan_out"}


@dataclasses.dataclass(eq=False)
class Architecture(Options):
    """Base of the architectures. Models are plain PyTorch and know nothing of rules.

    A model may name its cut points in an attribute ``cut_points``: the modules whose outputs are its hidden activations. It may
    name its blocks, parts of one or more layers, in an attribute ``blocks``: the last module of each, in order.
    """

    init: str = option("pytorch", "initialiser of the weights; all except pytorch, PyTorch's default, set biases to zero",
                       choices=[*INITIALISERS, *OLD_NAMES])
    linear_init: str | None = option(None, "initialiser of the weights of fully connected layers; null: init",
                                     choices=list(INITIALISERS))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init = OLD_NAMES.get(self.init, self.init)

    def build(self, input_shape: tuple[int, int, int], classes: int) -> torch_nn.Module:
        """A model whose weights are sampled from torch's global random state.

        Args:
            input_shape: (C, H, W) of one image.
            classes: width of the output.

        Raises:
            OptionError: if the options do not fit the data.
        """
        model = self.make(input_shape, classes)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                init = self.linear_init if isinstance(module, nn.Linear) and self.linear_init is not None else self.init
                if init != "pytorch":  # `make` has sampled it already
                    fill(module.weight, init)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        return model

    def make(self, input_shape: tuple[int, int, int], classes: int) -> torch_nn.Module:
        """The model with torch's own initial values; implemented by each architecture."""
        raise NotImplementedError


@dataclasses.dataclass(eq=False)
class StagedArchitecture(Architecture):
    """Base of the residual nets whose stages double their channels; subclasses declare how many blocks each stage has."""

    width: int = option(64, "channels of the first stage; they double from stage to stage", minimum=1)
    blocks: list[int] = option([2, 2, 2, 2], "blocks in each stage", minimum=1, maximum=1000)

    def check(self) -> None:
        if not self.blocks:
            raise OptionError("blocks", "=[] leaves no stage; pass the number of blocks of each, for example [2,2,2,2]")

    @property
    def widths(self) -> list[int]:
        """Channels of each stage."""
        return [self.width * 2**stage for stage in range(len(self.blocks))]
