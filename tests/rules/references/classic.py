"""Reference implementations of bp and its floors, of dfa, and of the rules that propagate errors with one tensor per layer."""

from __future__ import annotations

import math

import numpy as np

from ..reference import Arrays, Stage, forward, gradients, weighted


def bp(chain, params, feedback, x, y):
    return gradients(chain, params, x, y)


def frozen(chain, params, feedback, x, y):
    """The exact gradients of the output layer, which is the only one that learns."""
    last = weighted(chain)[-1]
    return {name: grad for name, grad in gradients(chain, params, x, y).items() if name.rsplit(".", 1)[0] == last}


def bp_fc(chain, params, feedback, x, y):
    """Fully connected layers and their BatchNorm learn by exact BP, while convolutions and their BatchNorm stay fixed."""
    fixed = {stage.name for stage in chain if stage.kind in ("conv", "bn2d")}
    return {name: grad for name, grad in gradients(chain, params, x, y).items() if name.rsplit(".", 1)[0] not in fixed}


def frozen_blocks(chain, params, feedback, x, y, blocks=()):
    """The layers up to and including `blocks[-1]` stay fixed, and the later layers learn by exact BP."""
    names = [stage.name for stage in chain]
    fixed = names[: names.index(blocks[-1]) + 1]
    return {name: grad for name, grad in gradients(chain, params, x, y).items() if name.rsplit(".", 1)[0] not in fixed}


def fa(chain, params, feedback, x, y, derivative="exact", beta=0.01, **_):
    """The input error is e_in = g B."""
    dual = beta if derivative == "dual" else None
    return gradients(chain, params, x, y, carry={layer: tensors["B"] for layer, tensors in feedback.items()}, dual=dual)


def usf_scale(shape: tuple[int, ...], scale: str) -> float:
    """The factor s in a layer's feedback s sign(W)."""
    area = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * area, shape[0] * area
    if scale == "xiao":
        return math.sqrt(2 / fan_out) if len(shape) > 2 else 1 / math.sqrt(fan_in)
    return {"xavier": math.sqrt(2 / (fan_in + fan_out)), "pytorch": 1 / math.sqrt(3 * fan_in), "none": 1.0}[scale]


def usf(chain, params, feedback, x, y, scale="xavier", plain_last=False):
    """The input error is e_in = g (s sign(W)), with the current W."""
    layers = weighted(chain)[:-1] if plain_last else weighted(chain)
    weights = {layer: params[f"{layer}.weight"] for layer in layers}
    return gradients(chain, params, x, y, carry={layer: usf_scale(w.shape, scale) * np.sign(w) for layer, w in weights.items()})


def magnitude_sf(chain, params, feedback, x, y, **_):
    """The input error is e_in = g (|M| sign(W)). The rules brsf and frsf differ only in when M is sampled."""
    carry = {layer: np.abs(tensors["M"]) * np.sign(params[f"{layer}.weight"]) for layer, tensors in feedback.items()}
    return gradients(chain, params, x, y, carry=carry)


def kp(chain, params, feedback, x, y, **options):
    """The gradients of FA, plus a gradient of B that equals that of W."""
    grads = fa(chain, params, feedback, x, y, **options)
    return grads | {f"{layer}.B": grads[f"{layer}.weight"].copy() for layer in feedback}


def feature_count(chain: list[Stage], params: Arrays, x: np.ndarray, cut: str) -> int:
    """The number of features per sample at a stage's output."""
    outputs = dict(zip((stage.name for stage in chain), forward(chain, params, x)[1:], strict=True))
    return outputs[cut][0].size


def dfa(chain, params, feedback, x, y, form="neuron", cuts=(), normalise=True, **_):
    """The signal delta_out B_l replaces the error at the cut (forms neuron and shared) or at the layer's input (form kernel)."""
    if form == "neuron":
        return gradients(chain, params, x, y, inject={cut: tensors["B"] for cut, tensors in feedback.items()})
    if form == "kernel":
        return gradients(chain, params, x, y, deliver={layer: tensors["B"] for layer, tensors in feedback.items()})
    widths = {cut: feature_count(chain, params, x, cut) for cut in cuts}
    widest = max(widths.values())
    shared = max((tensors["B"] for tensors in feedback.values()), key=lambda b: b.shape[1])
    assert shared.shape[1] == widest, f"the shared matrix has {shared.shape[1]} columns, the widest cut {widest} features"
    factor = 1 / math.sqrt(widest) if normalise else 1.0
    return gradients(chain, params, x, y, inject={cut: factor * shared[:, :width] for cut, width in widths.items()})


REFERENCES = {
    "bp": bp,
    "frozen": frozen,
    "bp_fc": bp_fc,
    "frozen_blocks": frozen_blocks,
    "fa": fa,
    "usf": usf,
    "brsf": magnitude_sf,
    "frsf": magnitude_sf,
    "kp": kp,
    "dfa": dfa,
}

CASES = {
    "bp": ("bp", {}),
    "frozen": ("frozen", {}),
    "bp_fc": ("bp_fc", {}),
    "frozen_blocks": ("frozen_blocks", {}),
    "fa": ("fa", {}),
    "fa-sparse": ("fa", {"density": 0.5}),
    "usf": ("usf", {}),
    "usf-pytorch": ("usf", {"scale": "pytorch"}),
    "usf-xiao": ("usf", {"scale": "xiao"}),
    "usf-none": ("usf", {"scale": "none"}),
    "usf-plain-last": ("usf", {"plain_last": True}),
    "brsf": ("brsf", {}),
    "frsf": ("frsf", {}),
    "kp": ("kp", {}),
    "dfa": ("dfa", {"form": "neuron"}),
    "dfa-kernel": ("dfa", {"form": "kernel"}),
    "dfa-shared": ("dfa", {"form": "shared"}),
    "dfa-shared-raw": ("dfa", {"form": "shared", "normalise": False}),
}

TRAITS = {"exact": {"bp", "frozen", "bp_fc", "frozen_blocks"}, "redrawn": {"brsf"}}
