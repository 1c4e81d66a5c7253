"""One naive reference per rule, which computes the gradients of all weights, biases and learned feedback tensors.

A reference takes (chain, params, feedback, x, y, **options), where ``feedback`` is {layer or cut: {tensor name: array}} and
``options`` are those of the rule. A reference returns {"layer.weight": ..., "layer.bias": ..., "layer.B": ...}. A tensor without
an entry must not learn.

Every module of this package has REFERENCES {rule: function} and CASES {case: (rule, options)}. A module may have AFTER_UPDATE
{rule: function of (chain, params) that changes learned feedback in place after every update} and TRAITS {trait: rules}. These are
the traits:

- exact: the rule has the gradient of backpropagation for all parameters that it trains
- redrawn: the feedback changes without being learned by the optimizer, so the reference gets the current one
- learned_from_noise: the feedback learns from the rule's own noise, which no reference has
- unscaled: the signals are not computed from the loss, so they do not scale with it
- partly_exact: hidden layers may have the gradient of backpropagation
- untrue_output: the output layer's own gradient is not that of the loss
- noisy: the rule samples noise for every update, and its reference gets the same random numbers as ``draws``
- delayed: the rule uses errors of a sample's last pass, which its reference keeps in the dictionary ``kept``
- last_module: the last hidden layers learn by backpropagation, together with the output layer
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
