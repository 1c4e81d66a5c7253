"""Reference implementation of Forward Alignment."""

from __future__ import annotations

from itertools import pairwise

from ..reference import Arrays, conv_forward, forward, gradients, inputs, linear_forward, weighted


def forward_alignment(chain, params, feedback, x, y, c_init="xavier_uniform", plain_last=False) -> Arrays:
    """The gradient of W_l is computed from the true error g and phi(C_{l-1} h_{l-2}).

    The first layer's gradient is computed from the network's input.
    """
    own, layers, stand_ins = inputs(chain, params, x), weighted(chain), {}
    stages = {stage.name: stage for stage in chain}
    names = [stage.name for stage in chain]
    for before, layer in pairwise(layers):
        c = feedback[before]["C"]
        if stages[before].kind == "linear":
            h = linear_forward(own[before], c, None)
        else:
            h = conv_forward(stages[before], own[before], c, None)
        between = chain[names.index(before) + 1 : names.index(layer)]
        stand_ins[layer] = forward(between, params, h)[-1]
    if plain_last:
        del stand_ins[layers[-1]]
    return gradients(chain, params, x, y, activations=stand_ins)


REFERENCES = {"forward_alignment": forward_alignment}
CASES = {
    "forward-alignment": ("forward_alignment", {}),
    "forward-alignment-plain-last": ("forward_alignment", {"plain_last": True}),
}
TRAITS = {"partly_exact": {"forward_alignment"}, "untrue_output": {"forward_alignment"}}
