"""Reference implementation of mixed synapses, where every entry of the feedback is computed according to its own kind."""

from __future__ import annotations

import numpy as np

from ..reference import Arrays, conv_weight_gradient, gradients, inputs, linear_weight_gradient
from .pfa import first_hop, path


def mixed(chain, params, feedback, x, y, **_) -> Arrays:
    """The input error is e_in = g E, where each entry of E is that of B R, F or K, depending on the entry's kind.

    The gradient of R is computed like that of a weight, from x and ē = g B. The gradient of K equals that of W. Both gradients
    are unmasked.
    """
    stages = {stage.name: stage for stage in chain}
    carry: Arrays = {}
    for layer, tensors in feedback.items():
        values = {kind: tensors[name] for kind, name in (("fa", "F"), ("kp", "K")) if name in tensors}
        if "R" in tensors:
            values["pfa"] = path(stages[layer], tensors["B"], tensors["R"])
        effective = np.full(params[f"{layer}.weight"].shape, np.nan)
        for index in np.ndindex(effective.shape):
            (kind,) = (kind for kind in values if tensors[f"mask_{kind}"][index] == 1)
            effective[index] = values[kind][index]
        carry[layer] = effective
    errors: Arrays = {}
    grads = gradients(chain, params, x, y, carry=carry, errors=errors)
    true_inputs = inputs(chain, params, x)
    for layer, tensors in feedback.items():
        stage = stages[layer]
        if "K" in tensors:
            grads[f"{layer}.K"] = grads[f"{layer}.weight"].copy()
        if "R" not in tensors:
            continue
        between = first_hop(stage, errors[layer], tensors["B"])
        if stage.kind == "linear":
            grads[f"{layer}.R"] = linear_weight_gradient(true_inputs[layer], between)
        else:
            grads[f"{layer}.R"] = conv_weight_gradient(stage, true_inputs[layer], between, tensors["R"].shape)
    return grads


REFERENCES = {"mixed": mixed}
CASES = {
    "mixed": ("mixed", {"ratio": 2.0}),
    "mixed-even": ("mixed", {"pfa": 0.3, "fa": 0.3, "kp": 0.4, "ratio": 3.0}),
    "mixed-two": ("mixed", {"pfa": 0.0, "fa": 0.5, "kp": 0.5}),
    "mixed-pfa": ("mixed", {"pfa": 1.0, "fa": 0.0, "kp": 0.0, "ratio": 2.0}),
    "mixed-kp": ("mixed", {"pfa": 0.0, "fa": 0.0, "kp": 1.0}),
}
