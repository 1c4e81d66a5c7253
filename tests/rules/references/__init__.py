"""One naive reference per rule: from the feedback tensors to the gradients of every weight, bias and learned feedback tensor.

Each takes (chain, params, feedback, x, y, **options); ``feedback`` is {layer or cut: {tensor name: array}}, ``options`` are the
rule's own. It returns {"layer.weight": ..., "layer.bias": ..., "layer.B": ...}; a tensor without an entry must not learn.

Every module here holds REFERENCES {rule: function}, CASES {case: (rule, options)}, AFTER_UPDATE {rule: what changes learned
feedback after every update, in place, from (chain, params)}, and TRAITS {trait: rules}:

- exact: the gradient of backpropagation for all parameters that they train
- redrawn: feedback that changes without being learned by the optimizer; the reference gets the current one
- learned_from_noise: feedback that learns from the rule's own noise, which no reference has
- unscaled: signals that are not computed from the loss, and so do not scale with it
- partly_exact: hidden layers may have the gradient of backpropagation
- untrue_output: the output layer's own gradient is not that of the loss
- noisy: rules that sample noise for every update; their references get the same random numbers as ``draws``
- delayed: rules that use errors of a sample's last pass; their references keep them in the dictionary ``kept``
- last_module: the last hidden layers learn by backpropagation, with the output layer
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
