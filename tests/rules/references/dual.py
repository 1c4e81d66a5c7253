"""Reference implementation of dual propagation, which replaces derivatives by finite differences."""

from __future__ import annotations

from ..reference import gradients


def dual_propagation(chain, params, feedback, x, y, beta=0.01):
    """Backpropagation with a finite difference in place of the derivative of every nonlinearity."""
    return gradients(chain, params, x, y, dual=beta)


REFERENCES = {"dual_propagation": dual_propagation}
# With a beta of 3, the finite differences deviate clearly from the derivatives.
CASES = {
    "dual_propagation": ("dual_propagation", {"beta": 3.0}),
    "fa-dual": ("fa", {"derivative": "dual", "beta": 3.0}),
    "kp-dual": ("kp", {"derivative": "dual"}),
}
