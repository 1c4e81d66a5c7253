"""A naive reference implementation of every rule, which computes the gradients of weights, biases and learned feedback tensors.

A reference takes (chain, params, feedback, x, y, **options), where ``feedback`` is {layer or cut: {tensor name: array}} and
``options`` are the rule's options. A reference returns {"layer.weight": ..., "layer.bias": ..., "layer.B": ...}. A tensor without
an entry must not learn.

Every module of this package defines REFERENCES {rule: function} and CASES {case: (rule, options)}. A module may also define
AFTER_UPDATE {rule: function} and TRAITS {trait: rules}. The functions in AFTER_UPDATE take (chain, params) and change learned
feedback in place after every update.

TRAITS assigns rules to the following traits.

exact: the gradients are those of backpropagation for all parameters that the rule trains
redrawn: the feedback changes without an optimizer, so the reference gets the current tensors
learned_from_noise: the feedback learns from the rule's own noise, which the reference does not have
unscaled: the signals are not computed from the loss, so they do not scale with it
partly_exact: hidden layers may have the gradients of backpropagation
untrue_output: the gradient of the output layer differs from that of the loss
noisy: the rule samples noise for every update, and the reference gets the same random numbers as ``draws``
delayed: the rule uses errors from a sample's previous pass, which the reference keeps in the dictionary ``kept``
last_module: the last hidden layers learn by backpropagation together with the output layer
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

REFERENCES: dict[str, Callable] = {}
CASES: dict[str, tuple[str, dict]] = {}
AFTER_UPDATE: dict[str, Callable] = {}
TRAITS: dict[str, set[str]] = {
    trait: set()
    for trait in (
        "exact",
        "redrawn",
        "unscaled",
        "partly_exact",
        "untrue_output",
        "noisy",
        "learned_from_noise",
        "delayed",
        "last_module",
    )
}

for _found in pkgutil.iter_modules(__path__, f"{__name__}."):
    _module = importlib.import_module(_found.name)
    assert not REFERENCES.keys() & _module.REFERENCES.keys() and not CASES.keys() & _module.CASES.keys(), _found.name
    REFERENCES |= _module.REFERENCES
    CASES |= _module.CASES
    AFTER_UPDATE |= getattr(_module, "AFTER_UPDATE", {})
    for _trait, _rules in getattr(_module, "TRAITS", {}).items():
        TRAITS[_trait] |= _rules
