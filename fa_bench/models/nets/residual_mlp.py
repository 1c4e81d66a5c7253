"""Blocks of residual fully connected networks."""

from __future__ import annotations

from torch import Tensor, nn

from fa_bench.models.base import ACTIVATIONS


class ResidualBlock(nn.Module):
    """A residual block that maps x (N, width) to x + fc2(act(fc1(norm(x)))).

    Args:
        width: the width of input and output.
        hidden: neurons between the two layers.
        activation: one of ACTIVATIONS.
    """

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))
