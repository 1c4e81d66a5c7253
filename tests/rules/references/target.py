"""References of target propagation."""

from __future__ import annotations

from ..reference import gradients


def ddtp_linear(chain, params, feedback, x, y, **_):
    """As dfa; B learns from noise, see tests/rules/test_target_propagation.py."""
    return gradients(chain, params, x, y, inject={cut: tensors["B"] for cut, tensors in feedback.items()})


REFERENCES = {"ddtp_linear": ddtp_linear}
CASES = {"ddtp_linear": ("ddtp_linear", {}), "ddtp_linear-sparse": ("ddtp_linear", {"density": 0.5})}
TRAITS = {"redrawn": {"ddtp_linear"}, "learned_from_noise": {"ddtp_linear"}}
