"""Options that several rules share, with their help texts and limits."""

from __future__ import annotations

from typing import Any

from fa_bench.registry.options import option
from fa_bench.utils.sampling import CONTINUOUS, INITIALISERS

#: An "initialiser" of an edge rule's tensors that copies the layer's weight.
COPY_WEIGHT = "copy_w"


def init_option(tensor: str, default: str | None = "xavier_uniform", can_copy: bool = False, continuous: bool = False) -> Any:
    """The option for the initialiser of a feedback tensor.

    Args:
        tensor: what the help text calls the tensor.
        default: the default initialiser.
        can_copy: whether the tensor may be a copy of the weight.
        continuous: whether the tensor's entries must have a continuous distribution (or be zero).
    """
    initialisers = CONTINUOUS if continuous else INITIALISERS
    return option(default, f"initialiser of {tensor}", choices=[*initialisers, *([COPY_WEIGHT] if can_copy else [])])


def decoder_init_option() -> Any:
    """The option for the initialiser of the weight of a rule's local classifiers."""
    return option("zeros", "initialiser of the decoder's weight", choices=CONTINUOUS, identifying=False)


def density_option(tensors: str = "B", masks: str = "mask") -> Any:
    """The option that sets the fraction of a feedback tensor's entries that are not masked."""
    return option(1.0, f"fraction of {tensors} that is not zero (fixed random {masks})", above=0, maximum=1)


def within_option() -> Any:
    """The option that sets how far a cut rule backpropagates its errors exactly."""
    return option(
        "layer",
        "how far the error at a cut is backpropagated exactly: only to the nearest weights below (layer), or through all "
        "layers down to the next cut (block), with weight transport within each block",
        choices=["layer", "block"],
        identifying=False,
    )


def error_at_option() -> Any:
    """The option for the module from whose output a cut rule's errors come."""
    return option(
        None,
        "the module at whose output the error for the cuts is taken, such as the one before a vocabulary layer; "
        "layers after it learn by backpropagation; null: the model's output",
        identifying=False,
    )


def positions_option() -> Any:
    """The option that sets whether the positions of a cut share their feedback if the errors have no positions."""
    return option(
        "own",
        "feedback for the positions (tokens or pixels) of a cut if the output has no positions: own (a part of B for each "
        "position) or shared (one matrix for all)",
        choices=["own", "shared"],
        identifying=False,
    )


def tangents_option() -> Any:
    """The option that sets how a rule computes the derivative of the model's output along its noise."""
    return option(
        "forward",
        "how the output's derivative along the noise is computed: exactly, by forward-mode differentiation (forward), or by "
        "central differences of two passes (difference)",
        choices=["forward", "difference"],
    )


def output_option() -> Any:
    """The option for the output of the model from which a cut rule's errors come."""
    return option(
        None,
        "the output from which the errors come, if the model returns several: a key, or an index into a tuple; "
        "errors from other outputs stop at the cuts, unless the rule lets errors cross them",
    )


def derivative_option(default: str = "exact", identifying: bool = False) -> Any:
    """The option for the derivative of elementwise nonlinearities in the backward pass."""
    return option(
        default,
        "derivative of elementwise nonlinearities: exact, or dual, a finite difference over the error, as in dual propagation",
        choices=["exact", "dual"],
        identifying=identifying,
    )


def beta_option(identifying: bool = False) -> Any:
    """The option for the size of the finite difference."""
    return option(
        0.01,
        "derivative=dual: half the width of the finite difference, in units of the error of a sample's own loss",
        above=0,
        identifying=identifying,
    )
