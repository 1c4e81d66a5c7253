"""One weight of a compound module, as a linear layer.

Shapes: I inputs, O outputs; ``...`` any number of leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class Projection(nn.Module):
    """A linear layer y = x Wᵀ + b whose weight and bias are parameters of a compound module.

    While a rule is attached, this layer is a child of the compound module, so hooks, feedback and metrics treat it like any
    linear layer. This layer adds only its feedback to the model's state_dict.

    Args:
        owner: the compound module.
        weight: the name of the owner's weight, (O, I); a weight with more dimensions, (O, I1, I2), is flattened to (O, I1 I2).
        bias: the name of the owner's bias; None for a layer without a bias.
        bias_rows: the part of the bias that belongs to this weight; None for all of it.
    """

    def __init__(self, owner: nn.Module, weight: str, bias: str | None, bias_rows: slice | None = None) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not a child: the owner contains this module
        self.weight_name, self.bias_name, self.bias_rows = weight, bias, bias_rows

    owner: nn.Module

    @property
    def parameter(self) -> nn.Parameter | None:
        """The owner's weight, or None if it is computed from other parameters, for example by pruning."""
        return self.owner._parameters.get(self.weight_name)

    @property
    def weight(self) -> Any:
        """The weight in the shape (O, I)."""
        parameter = self.parameter
        return parameter if parameter is None or parameter.dim() == 2 else parameter.flatten(1)

    @property
    def out_features(self) -> int:
        """The number of outputs, O."""
        return len(self.weight)

    @property
    def bias(self) -> Any:
        """The bias (O,), or None if the layer has no bias."""
        bias = None if self.bias_name is None else getattr(self.owner, self.bias_name)
        return bias if bias is None or self.bias_rows is None else bias[self.bias_rows]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The feedback parameters of this layer, and the owner's parameters that the layer uses."""
        yield from super().named_parameters(*args, **kwargs)
        for name, key in (("weight", self.weight_name), ("bias", self.bias_name)):
            if key is not None and (parameter := self.owner._parameters.get(key)) is not None:
                yield name, parameter

    def forward(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """The output (..., O) for the input x (..., I); with `rows`, only the outputs of these rows of the weight."""
        weight, bias = self.weight, self.bias
        if rows is None:
            return F.linear(x, weight, bias)
        return F.linear(x, weight[rows], None if bias is None else bias[rows])
