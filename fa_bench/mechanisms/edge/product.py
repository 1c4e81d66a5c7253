"""Product feedback, ē = g B and e_in = ē R, in terms of operations on weights: the product B R, and the gradient of R.

In a convolution, B is the same at every pixel, so e_in is the input gradient of g with the weight B R, and the correlation of x
with ē is Bᵀ times the correlation of x with g. The activity ē of the intermediate units is therefore not computed.

Shapes, for M intermediate units per group and G groups: B (O, M), in which the rows of each group belong to that group's part of
R; R (G M, I/G, K...), the layout of a weight with G M outputs. In a transposed convolution, the weight is (I, O/G, K...) and R is
(I, M, K...).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def effective_product(first: Tensor, second: Tensor, groups: int, transposed: bool) -> Tensor:
    """B R, in the weight's layout."""
    return _mix(first.view(groups, len(first) // groups, -1), second, transposed)


def gradient_of_second(first: Tensor, gradient: Tensor, groups: int, transposed: bool) -> Tensor:
    """The gradient of R, in R's layout, computed from the weight's gradient."""
    mixing = first.view(groups, len(first) // groups, -1).transpose(1, 2)
    return _mix(mixing, gradient.to(first.dtype), transposed)


def _mix(mixing: Tensor, tensor: Tensor, transposed: bool) -> Tensor:
    """The product A T in every group, with the mixing matrices A (G, P, Q). The tensor T is laid out like a weight with Q outputs
    per group, and the result like a weight with P outputs per group."""
    groups, outputs, inputs = mixing.shape
    if transposed:
        mixed = mixing.unsqueeze(1) @ tensor.reshape(groups, len(tensor) // groups, inputs, -1)
        return mixed.reshape(len(tensor), outputs, *tensor.shape[2:])
    return mixing.bmm(tensor.reshape(groups, inputs, -1)).reshape(groups * outputs, *tensor.shape[1:])
