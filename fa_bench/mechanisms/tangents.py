"""Compute derivatives of a model's output along given directions with additional forward passes, without propagating errors back
through the model.

The passes repeat the training pass (`fa_bench.mechanisms.second_pass`), so dropout masks are the same, and running statistics are
not updated. Autocast is off, and attention and recurrent modules run as compositions of operations that have a forward-mode
derivative. Except for rounding, forward-mode passes compute the same values as the training pass. However, the dropout mask may
differ if the training pass used a fused kernel that contains dropout, as for LSTMs with several layers.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fa_bench.errors import CoverageError
from fa_bench.mechanisms.contexts import evaluating, restoring, set_temporarily
from fa_bench.mechanisms.second_pass import FirstPass, again, forget_updates
from fa_bench.mechanisms.trace import arguments

if TYPE_CHECKING:
    from fa_bench.mechanisms.cut.rule import CutRule
    from fa_bench.mechanisms.weighted_layers import Mode

#: The ways to compute a derivative: exactly, by forward-mode differentiation, or by central differences of two passes.
FORWARD, DIFFERENCE = "forward", "difference"
METHODS = (FORWARD, DIFFERENCE)
#: The step ε of central differences, in which tensors are shifted by ε and -ε times their tangents. The truncation error of the
#: derivative is proportional to ε², and its rounding error to 1/ε.
STEP = 1e-3
#: Maps the path of a module to a function that takes the tensor at the module's output and returns the tangent to be added there,
#: in the same shape.
Directions = Mapping[str, Callable[[Tensor], Tensor]]


def output_tangent(
    rule: CutRule, first: FirstPass, method: str, directions: Directions, parameters: Mapping[nn.Parameter, Tensor] | None = None
) -> Tensor:
    """The derivative of the model's output, in the shape of the output, along all directions at once.

    Args:
        rule: the attached rule.
        first: the training pass.
        method: one of `METHODS`.
        directions: the tangents to be added at modules; for central differences, both passes use the same tangents.
        parameters: parameter -> a tangent of the same shape.

    Raises:
        CoverageError: in forward mode, if an operation has no forward-mode derivative, or if the output does not depend on any of
            the directions.
    """
    with torch.no_grad(), _without_fused_kernels(rule.mode):
        if method == FORWARD:
            return _by_forward_mode(rule, first, directions, parameters or {})
        return _by_differences(rule, first, directions, parameters or {})


def check_tangents(rule: CutRule, method: str, cuts: Mapping[str, nn.Module], sample: Any) -> None:
    """Check, while a rule is being attached, that tangents can be computed, by computing one for a sample in evaluation mode.

    Args:
        rule: the rule, after `CutRule.wire`.
        method: one of `METHODS`.
        cuts: the modules at which tangents are added, by path; if there are none, the parameters get tangents instead.
        sample: inputs (N, ...), as for `Rule.attach`; None: zeros, if the first layer is fully connected.

    Raises:
        CoverageError: see `output_tangent`.
    """
    if sample is None:
        layer: Any = next(iter(rule._covered.values()))
        sample = layer.weight.new_zeros(2, layer.in_features)
    args, kwargs = arguments(sample)
    parameters = (
        {}
        if cuts
        else {parameter: torch.zeros_like(parameter) for parameter in rule.model.parameters() if parameter.is_floating_point()}
    )
    with evaluating(rule.model), restoring(rule.model):
        output_tangent(
            rule, FirstPass(rule.name, rule.model, args, kwargs), method, dict.fromkeys(cuts, torch.zeros_like), parameters
        )
    forget_updates(rule.model)  # there was no first pass that could have updated buffers


def _by_forward_mode(
    rule: CutRule, first: FirstPass, directions: Directions, parameters: Mapping[nn.Parameter, Tensor]
) -> Tensor:
    def moved(direction: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            value, tangent = forward_ad.unpack_dual(x)
            added = direction(value)
            # The tangent is copied, because the next module may change the value and the tangent in place.
            return forward_ad.make_dual(value, added.clone() if tangent is None else tangent + added)

        return change

    _load_forward_mode()
    with forward_ad.dual_level():
        duals = {parameter: forward_ad.make_dual(parameter.detach(), tangent) for parameter, tangent in parameters.items()}
        try:
            with _replaced(rule.model, duals):
                result = again(
                    rule.model, rule.mode, first, precise=True, outputs={path: moved(one) for path, one in directions.items()}
                )
        except NotImplementedError as error:
            operation = re.search(r"forward AD with (\S+) that", str(error))
            what = operation[1] if operation else "an autograd.Function without a jvp"
            raise CoverageError(
                f"rule '{rule.name}': PyTorch has no forward-mode derivative for {what}; use central differences of "
                "two passes instead: {tangents}",
                {"tangents": DIFFERENCE},
            ) from error
        tangent = forward_ad.unpack_dual(rule.logits_of(result)).tangent
        if tangent is None:
            of = "cuts" if directions else "parameters"
            raise CoverageError(
                f"rule '{rule.name}': the model's output depends on none of its {of} in a way that can be differentiated"
            )
        return tangent


@functools.lru_cache(maxsize=1)
def _load_forward_mode() -> None:
    """Make PyTorch load its decompositions now, and suppress the irrelevant warning that it emits with the first dual tensor."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _by_differences(rule: CutRule, first: FirstPass, directions: Directions, parameters: Mapping[nn.Parameter, Tensor]) -> Tensor:
    tangents: dict[str, Tensor] = {}

    def moved(path: str, step: float) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            if path not in tangents:
                tangents[path] = directions[path](x)
            return x.add(tangents[path], alpha=step)

        return change

    def output(step: float) -> Tensor:
        values = {parameter: parameter.detach().add(tangent, alpha=step) for parameter, tangent in parameters.items()}
        with _replaced(rule.model, values):
            return rule.logits_of(
                again(rule.model, rule.mode, first, outputs={path: moved(path, step) for path in directions}, precise=True)
            )

    return (output(STEP) - output(-STEP)) / (2 * STEP)


@contextmanager
def _without_fused_kernels(mode: Mode) -> Iterator[None]:
    """A context in which attention and recurrent modules run as compositions of operations that have forward-mode derivatives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            set_temporarily([mode], "layerwise", True),
            set_temporarily([mode], "always_layerwise", True),
            sdpa_kernel([SDPBackend.MATH]),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _replaced(model: nn.Module, tensors: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """A context in which the model uses other tensors in place of its parameters."""
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in tensors
    ]
    held: list[dict[str, Any]] = [module._parameters for module, _, _ in places]
    try:
        for of_module, (_, name, parameter) in zip(held, places, strict=True):
            of_module[name] = tensors[parameter]
        yield
    finally:
        for of_module, (_, name, parameter) in zip(held, places, strict=True):
            of_module[name] = parameter
