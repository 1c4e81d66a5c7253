"""Recurrent networks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.errors import OptionError
from fa_bench.models.base import Architecture
from fa_bench.registry.kinds import CLASSES, IMAGES, POSITIONS, TOKENS, VALUES
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES
from fa_bench.utils.lazy import nn

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ARCHITECTURES.register("lstm")
@dataclasses.dataclass(eq=False)
class LSTM(Architecture):
    """LSTM, GRU or plain recurrent network, for tokens and for images read row by row or pixel by pixel.

    For tokens, the layers are embedding - rnn - head at every position. For images, the time steps are rows or pixels, and the
    layers are rnn - head at the last step.

    The weights and biases of the recurrent layers are initialised with PyTorch's default, U(-1 / √width, 1 / √width), and the
    embedding from N(0, 1); `init` and `linear_init` apply only to the head. The model's only block ends at its only cut point,
    ``states``, which outputs the last recurrent layer's hidden states at all steps. Errors pass from step to step through the
    recurrent weights, so cut rules need ``within=block``.
    """

    tasks = ((IMAGES, CLASSES), (IMAGES, VALUES), (TOKENS, POSITIONS))

    layers: int = option(1, "recurrent layers", minimum=1, maximum=100)
    width: int = option(128, "neurons of the hidden state of each layer, and features of a token", minimum=1)
    dropout: float = option(0.0, "dropout rate between recurrent layers", minimum=0, below=1)
    cell: str = option("lstm", "kind of recurrent layer; rnn uses tanh", choices=["lstm", "gru", "rnn"])
    scan: str = option(
        "rows", "how images are read: rows (C W numbers per step) or pixels (C numbers per step)", choices=["rows", "pixels"]
    )

    def check(self) -> None:
        if self.dropout and self.layers == 1:
            raise OptionError("dropout", f"={self.dropout} needs layers=2 or more: it acts between recurrent layers")

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        from fa_bench.models.nets.recurrent import Pixels, Recurrent, Rows

        is_text = len(input_shape) == 1
        if is_text:
            read, features = nn.Embedding(classes, self.width), self.width
        else:
            colours, _, width = input_shape
            read, features = (Rows(), colours * width) if self.scan == "rows" else (Pixels(), colours)
        model: Any = Recurrent(read, features, self.cell, self.layers, self.width, self.dropout, classes, last=not is_text)
        model.cut_points = model.blocks = ["states"]
        return model
