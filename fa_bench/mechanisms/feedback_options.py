"""Options that several rules share, with their help and limits."""

from __future__ import annotations

from typing import Any

from fa_bench.registry.options import option
from fa_bench.utils.sampling import INITIALISERS

#: An "initialiser" of an edge rule's tensors that copies the layer's weight.
COPY_WEIGHT = "copy_w"


def init_option(tensor: str, default: str | None = "xavier_uniform", can_copy: bool = False) -> Any:
    """The initialiser of a feedback tensor.

    Args:
        tensor: the tensor, as the help calls it.
        default: the default initialiser.
        can_copy: whether the tensor may be a copy of the weight.
    """
    return option(default, f"initialiser of {tensor}", choices=[*INITIALISERS, *([COPY_WEIGHT] if can_copy else [])])


def density_option(tensors: str = "B", masks: str = "mask") -> Any:
    """The fraction of the entries of feedback tensors that is not masked."""
    return option(1.0, f"fraction of {tensors} that is not zero (fixed random {masks})", above=0, maximum=1)


def output_option() -> Any:
    """The output of the model from which a cut rule's errors come."""
    return option(None, "the output from which the errors come, if the model returns several: a key, or a number in a tuple; "
                        "other outputs train only the layers after the last cut")
