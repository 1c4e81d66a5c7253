"""What a layer's forward pass hands to its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Learn(NamedTuple):
    """How the gradient of learned feedback is made; that of the weight, unless `activation` or `hop`, never both, says otherwise.

    Attributes:
        receive: called with the gradient, in the learned tensor's layout; the weight's own gradient is handed over as it is, and
            not at all where the weight is frozen.
        activation: returns what enters the gradient in place of the layer's input, in its shape; None for the input itself.
        hop: B, the first of a product's two hops, where R, the second, learns: ē = g B enters the gradient in place of g. See
            `fa_bench.mechanisms.product` for its layout.
    """

    receive: Callable[[Tensor], None]
    activation: Callable[[], Tensor] | None = None
    hop: Tensor | None = None


class Carry(NamedTuple):
    """What one forward pass hands to a layer's backward pass.

    Attributes:
        feedback: carries the error, in the weight's layout; with `second` only the first of a linear layer's two hops.
        make: makes it of the weight, in the backward pass, in place of `feedback`.
        second: carries the error on from where `feedback` left it.
        activation: returns what enters the weight gradient in place of the layer's input.
        learn: for each learned tensor, what makes its gradient and takes it.
    """

    feedback: Tensor | None = None
    make: Callable[[Tensor], Tensor] | None = None
    second: Tensor | None = None
    activation: Callable[[], Tensor] | None = None
    learn: tuple[Learn, ...] = ()
