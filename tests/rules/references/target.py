"""Reference implementations of target propagation.

How the feedback learns from noise is tested in tests/rules/test_target_propagation.py.
"""

from __future__ import annotations

import numpy as np

from ..reference import Arrays, Stage, conv_forward, forward, gradients, linear_forward, output_error


def ddtp_linear(chain, params, feedback, x, y, **_):
    """The gradients of dfa with the same B."""
    return gradients(chain, params, x, y, inject={cut: tensors["B"] for cut, tensors in feedback.items()})


def through_map(weight: np.ndarray, above: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The error G e' in the given shape, where G is a linear layer, or a 3x3 convolution of e' after resizing."""
    if weight.ndim == 2:
        return linear_forward(above.reshape(len(above), -1), weight, None).reshape(len(above), *shape)
    rows, columns = (np.arange(size) * given // size for size, given in zip(shape[1:], above.shape[2:], strict=True))
    return conv_forward(Stage("map", "conv", padding=(1, 1)), above[:, :, rows][:, :, :, columns], weight, None)


def ldrl(chain, params, feedback, x, y, **_) -> Arrays:
    """The error at a cut is e = G e', where e' is the error at the next cut or, after the last cut, at the logits.

    Within a block, errors are propagated exactly.
    """
    values = forward(chain, params, x)
    outputs = dict(zip((stage.name for stage in chain), values[1:], strict=True))
    given, error = {}, output_error(values[-1], y)
    for stage in reversed(chain):
        if stage.name in feedback:
            given[stage.name] = error = through_map(feedback[stage.name]["map.weight"], error, outputs[stage.name].shape[1:])
    return gradients(chain, params, x, y, given=given)


REFERENCES = {"ddtp_linear": ddtp_linear, "ldrl": ldrl}
CASES = {
    "ddtp_linear": ("ddtp_linear", {}),
    "ddtp_linear-sparse": ("ddtp_linear", {"density": 0.5}),
    "ldrl": ("ldrl", {"b_lr_scale": 1.0}),
}
TRAITS = {"redrawn": {"ddtp_linear", "ldrl"}, "learned_from_noise": {"ddtp_linear", "ldrl"}}
