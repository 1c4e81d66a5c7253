"""Reference implementations of asap and asfp, in which layers share activations."""

from __future__ import annotations

from itertools import product

import numpy as np

from ..reference import Arrays, conv_weight_gradient, gradients, inputs, linear_weight_gradient, weighted


def matched(h: np.ndarray, shape: tuple[int, ...], match: str, mixing: np.ndarray | None) -> np.ndarray:
    """The activation h, resized to `shape` either by copying channels and pooling, or by a fixed random 1x1 convolution."""
    if h.ndim != len(shape):
        h = h.reshape(len(h), -1)
    if mixing is not None:
        strides = [-(-have // want) for have, want in zip(h.shape[2:], shape[2:], strict=True)]
        picked = h[(slice(None), slice(None), *(slice(None, None, stride) for stride in strides))]
        out = np.zeros(shape)
        for o, i in product(range(shape[1]), range(h.shape[1])):
            out[:, o] += mixing.reshape(mixing.shape[:2])[o, i] * picked[:, i]
        return out
    if shape[1] > h.shape[1]:
        h = np.concatenate([h] * (shape[1] // h.shape[1]), axis=1)
    sizes = [-(-have // want) for have, want in zip(h.shape[1:], shape[1:], strict=True)]
    out = np.zeros(shape)
    for place in product(*map(range, shape)):
        window = h[(place[0], *(slice(at * size, (at + 1) * size) for at, size in zip(place[1:], sizes, strict=True)))]
        out[place] = window.max() if match == "max_pool" else window.mean()
    return out


def shared(chain, params, feedback, x, k, match, linear) -> tuple[list[str], Arrays]:
    """The layers after the stem that share activations, and {layer: the activation that replaces its input}.

    The first layer that shares activations keeps its true input.
    """
    kinds = {stage.name: stage.kind for stage in chain}
    layers, own = weighted(chain), inputs(chain, params, x)
    everywhere = linear == "share" or (linear == "auto" and "conv" not in kinds.values())
    sharing = [layer for layer in layers[1:] if everywhere or kinds[layer] == "conv"]
    stand_ins = {}
    for p, layer in enumerate(sharing, start=1):
        if p > 1:
            s = 1 + k * ((p - 2) // k)
            stand_ins[layer] = matched(own[sharing[s - 1]], own[layer].shape, match, feedback[layer].get("P"))
    return sharing, stand_ins


def carried(feedback) -> Arrays:
    """The feedback tensors B of all layers that have one. Layers without a B use their weight instead."""
    return {layer: tensors["B"] for layer, tensors in feedback.items() if "B" in tensors}


def asap(chain, params, feedback, x, y, k=2, match="max_pool", linear="auto", freeze_stem=True, **_) -> Arrays:
    """The gradients of W and B are both computed from the shared activation and g, and the error passes through B."""
    sharing, stand_ins = shared(chain, params, feedback, x, k, match, linear)
    grads = gradients(chain, params, x, y, carry=carried(feedback), activations=stand_ins)
    learning = sharing if freeze_stem else weighted(chain)[:1] + sharing
    grads |= {f"{layer}.B": grads[f"{layer}.weight"].copy() for layer in learning if "B" in feedback.get(layer, {})}
    return without_stem(chain, grads) if freeze_stem else grads


def asfp(chain, params, feedback, x, y, k=2, match="max_pool", linear="auto", freeze_stem=True, **_) -> Arrays:
    """The gradient of W is computed from the true input, and that of B from the shared activation."""
    sharing, stand_ins = shared(chain, params, feedback, x, k, match, linear)
    errors: Arrays = {}
    grads = gradients(chain, params, x, y, carry=carried(feedback), errors=errors)
    grads |= of_feedback(chain, grads, errors, sharing if freeze_stem else weighted(chain)[:1] + sharing, stand_ins)
    return without_stem(chain, grads) if freeze_stem else grads


def of_feedback(chain, grads: Arrays, errors: Arrays, learning: list[str], stand_ins: Arrays) -> Arrays:
    """The gradient of each layer's B, from the error at the layer's output and the activation that replaces the layer's input.

    If a layer's input is not replaced, its B has the gradient of the weight.
    """
    stages, found = {stage.name: stage for stage in chain}, {}
    for layer in learning:
        if layer not in stand_ins:
            found[f"{layer}.B"] = grads[f"{layer}.weight"].copy()
        elif stages[layer].kind == "linear":
            found[f"{layer}.B"] = linear_weight_gradient(stand_ins[layer], errors[layer])
        else:
            shape = grads[f"{layer}.weight"].shape
            found[f"{layer}.B"] = conv_weight_gradient(stages[layer], stand_ins[layer], errors[layer], shape)
    return found


def without_stem(chain, grads: Arrays) -> Arrays:
    """The gradients without those of the first layer, which is random and fixed."""
    stem = weighted(chain)[0]
    return {name: grad for name, grad in grads.items() if name.rsplit(".", 1)[0] != stem}


REFERENCES = {"asap": asap, "asfp": asfp}
ANY_WIDTH = {"match": "random", "linear": "share"}
CASES = {
    "asap": ("asap", ANY_WIDTH),
    "asap-stem": ("asap", {**ANY_WIDTH, "freeze_stem": False}),
    "asap-transport": ("asap", {**ANY_WIDTH, "transport": True}),
    "asfp": ("asfp", ANY_WIDTH),
}
TRAITS = {"untrue_output": {"asap"}, "partly_exact": {"asap"}}
