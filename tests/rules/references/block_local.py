"""Reference implementation of asfp_lc: activation sharing in the feedback path, with local classifiers."""

from __future__ import annotations

from ..reference import (
    Arrays,
    Stage,
    gradients,
)
from .direct import outputs
from .local import EPS
from .sharing import of_feedback, shared, without_stem


def classifier(shape: tuple[int, ...], pool: int) -> list[Stage]:
    """The stages of a classifier: average pooling to at most pool x pool pixels, flattening, a linear layer, and BatchNorm."""
    size = tuple(min(length, pool) for length in shape[1:])
    stages = [Stage("pool", "pool", size=size)] if size != shape[1:] else []
    return [*stages, Stage("flatten", "flatten"), Stage("fc", "linear"), Stage("bn", "bn1d", eps=EPS)]


def asfp_lc(chain, params, feedback, x, y, k=2, match="max_pool", linear="auto", pool=2, **_) -> Arrays:
    """The error at the end of a block comes from the block's classifier, through the classifier's B.

    Within a block, errors are propagated as in asfp.
    """
    values, given, learned = outputs(chain, params, x), {}, {}
    layers = {stage.name: stage for stage in chain if stage.kind in ("linear", "conv")}
    names = [stage.name for stage in chain]
    for cut in feedback.keys() - layers.keys():
        if not any(stage.name in layers or stage.kind.startswith("bn") for stage in chain[1 : names.index(cut)]):
            continue  # only the frozen stem precedes the cut, so no error is needed
        a, held, errors = values[cut], feedback[cut], {}
        grads = gradients(classifier(a.shape[1:], pool), held, a, y, carry={"fc": held["B"]}, errors=errors)
        given[cut] = errors[""]
        learned |= {f"{cut}.{name}": grad for name, grad in grads.items()}
    sharing, stand_ins = shared(chain, params, feedback, x, k, match, linear)
    errors: Arrays = {}
    carry = {layer: feedback[layer]["B"] for layer in layers if "B" in feedback.get(layer, {})}
    grads = gradients(chain, params, x, y, carry=carry, given=given, errors=errors)
    learned |= of_feedback(chain, grads, errors, sharing, stand_ins)
    return without_stem(chain, grads) | learned


REFERENCES = {"asfp_lc": asfp_lc}
CASES = {
    "asfp_lc": ("asfp_lc", {"match": "random", "linear": "share"}),
    "asfp_lc-pool": ("asfp_lc", {"match": "random", "linear": "share", "pool": 1}),
}
TRAITS = {"unscaled": {"asfp_lc"}, "last_module": {"asfp_lc"}, "partly_exact": {"asfp_lc"}}
