"""The options that all transformers share."""

from __future__ import annotations

import dataclasses

from fa_bench.errors import OptionError
from fa_bench.models.base import ACTIVATIONS, Architecture
from fa_bench.registry.options import option


@dataclasses.dataclass(eq=False)
class TransformerArchitecture(Architecture):
    """Base class of transformers."""

    width: int = option(128, "features of a token", minimum=1)
    heads: int = option(4, "number of attention heads, a divisor of width", minimum=1)
    expansion: float = option(4.0, "neurons of a block's hidden layer, as a multiple of width", above=0, maximum=100)
    activation: str = option("gelu", "activation function of the hidden layers", choices=list(ACTIVATIONS))

    def check(self) -> None:
        if self.width % self.heads:
            divisor = max(number for number in range(1, min(self.heads, self.width) + 1) if self.width % number == 0)
            raise OptionError("heads", f"={self.heads} does not divide width={self.width}", f"={divisor}")

    @property
    def hidden(self) -> int:
        """The number of neurons in a block's hidden layer."""
        return max(1, round(self.width * self.expansion))
