"""Recurrent networks for sequences of tokens and for images read step by step.

In shapes, N is the batch size, T the number of steps, and D the width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

#: Kind of recurrent layer -> its module.
CELLS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Recurrent(nn.Module):
    """A recurrent network with the layers read - rnn - states - (last step -) head.

    Args:
        read: maps an input to its steps (N, T, features).
        features: the number of features per step.
        cell: one of CELLS.
        layers: the number of recurrent layers.
        width: D, the width of the hidden state.
        dropout: dropout rate between the recurrent layers.
        classes: the number of outputs.
        last: whether the head sees only the last step, with outputs (N, classes), instead of every step, with outputs (N, T,
            classes).
    """

    def __init__(
        self, read: nn.Module, features: int, cell: str, layers: int, width: int, dropout: float, classes: int, last: bool
    ) -> None:
        super().__init__()
        self.last = last
        self.read = read
        self.rnn = CELLS[cell](features, width, layers, batch_first=True, dropout=dropout)
        self.states = nn.Identity()  # its output is the states, so that errors can be delivered there
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        states = self.states(self.rnn(self.read(x))[0])
        return self.head(states[:, -1] if self.last else states)


class Rows(nn.Module):
    """Maps images (N, C, H, W) to sequences of their rows, from top to bottom, (N, H, C W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class Pixels(nn.Module):
    """Maps images (N, C, H, W) to sequences of their pixels, row by row, (N, H W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)
