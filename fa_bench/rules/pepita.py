"""PEPITA."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError
from fa_bench.mechanisms.cut.passes import PassRule
from fa_bench.mechanisms.feedback_options import init_option
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.coverage import Coverage


@ALGORITHMS.register("pepita")
@dataclasses.dataclass(eq=False)
class Pepita(PassRule):
    """PEPITA: layers learn from a second forward pass, in which the error modulates the input.

    The rule is due to Dellaferrera and Kreiman 2022, arXiv 2201.11665; its form is that of the authors' code.

    The first pass gives the activations h_l and the error e = softmax(z) - y (N, C) of each sample. For objectives other than the
    cross-entropy, e is N times the gradient of the mean loss at the logits. The second pass has the input x' = x + e F, where F
    (C, features of the input) is fixed and random; it gives h'_l and the error e' = softmax(z') - y. With h'_0 = x', the
    gradients are as follows:

        gradient of W_l = (h_l - h'_l)ᵀ h'_{l-1} / N,    gradient of the output layer = e'ᵀ h'_{L-1} / N.

    No error passes through a weight. The derivatives of the hidden nonlinearities are not used, because the difference h - h' is
    used as the error at the input of the nonlinearity. F is Kaiming-uniform (`f_init`), which here means within ±√(6/features),
    times `f_scale`. If the first layer has no nonlinearity, h_1 - h'_1 = -e F W_1ᵀ. For this layer, the rule is then direct
    feedback alignment with the feedback -F W_1ᵀ (Srinivasan et al. 2023, arXiv 2302.05440), and reduces the loss if -F aligns
    with the product of the weights. With ``f_scale=0``, only the output layer learns.

    Deviations from the paper and its code: layers may have biases and normalisation. Biases and normalisation learn from the same
    errors, through everything between the previous cut and the nonlinearity. The gradient of a convolution is the sum over
    positions, whereas the code averages over positions and a second time over the batch. If the module at a cut is not a
    nonlinearity but, for example, a block, h - h' is used as the error at its output. A cut at a pooling layer is treated like a
    cut at the preceding nonlinearity.

    With autocast or in a half-precision model, h - h' is a small difference of rounded numbers, so use float32 or a larger
    `f_scale`.

    Dropout masks are the same in both passes. Batch normalisation uses the statistics of each pass and updates its running
    statistics in the first pass. The first pass is not differentiated. An update needs one additional forward pass, and half a
    backward pass for the weights.
    """

    equations = (
        r"x' &= x + e F,\quad e = \operatorname{softmax}(z) - y,\quad F \text{ fixed}",
        r"\nabla_{W_l} &= \frac{1}{N} (h_l - h'_l)^\top h'_{l-1}",
        r"\nabla_{W_L} &= \frac{1}{N} e'^\top h'_{L-1},\quad e' = \operatorname{softmax}(z') - y",
    )

    search_space = {"f_scale": "tag(log,interval(0.005,0.5))"}

    f_init: str = init_option("F", "kaiming_uniform")
    f_scale: float = option(0.05, "factor of F", minimum=0)

    skips_nonlinearities = True

    takes_numbers = True
    learns_by_objective = True

    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.trace import arguments

        coverage = super().wire(sample_input)
        first = next(iter(self._covered.values()))
        args = arguments(sample_input).args if sample_input is not None else (first.weight.new_zeros(2, first.weight.shape[1]),)
        if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
            raise CoverageError(
                f"rule '{self.name}' adds a projection of the error to the model's first argument, which must be "
                f"a floating-point tensor (N, ...)"
            )
        if self.error_dims != 2:
            raise CoverageError(f"rule '{self.name}' needs outputs of shape (N, C), not {self._trace.result_shape}")
        classes = self._trace.result_shape[self.error_axis]
        self.put(self._first_cut, "F", self.f_init, (classes, math.prod(args[0].shape[1:])))
        self.tensor(self._first_cut, "F").mul_(self.f_scale)
        return coverage

    @property
    def _first_cut(self) -> str:
        return next(iter(self._cut_modules))

    def gradients(
        self, parameters: list[nn.Parameter], activations: dict[str, Tensor], delta: Tensor, logits: Tensor, target: Tensor
    ) -> list[Tensor | None]:
        from fa_bench.mechanisms.second_pass import repeated

        assert self.first_pass is not None
        before: dict[str, Tensor] = {}
        differences: dict[str, Tensor] = {}
        share = self.loss_factor / max(len(logits), 1)

        def at_input(cut: str, tensor: Tensor) -> Tensor | None:
            if not self.is_nonlinearity(cut):
                return None
            before[cut] = tensor
            return tensor.detach().clone()  # the nonlinearity may work in place

        def at_output(cut: str, tensor: Tensor) -> Tensor:
            before.setdefault(cut, tensor)
            differences[cut] = (activations[cut] - tensor.detach()) * share
            # The backward pass of the module at the cut may need its output, so the output is copied if it is changed in place.
            return tensor.detach().clone() if cut in self._trace.changed_in_place else tensor.detach()

        x, *others = self.first_argument(self.first_pass.args)
        feedback = self.tensor(self._first_cut, "F")
        errors = (self._error(logits, target) * len(logits)).to(feedback.dtype).mm(feedback)
        with repeated(
            self.model,
            self.mode,
            self.first_pass,
            (x + errors.view(x.shape).to(x.dtype), *others),
            inputs={cut: lambda tensor, cut=cut: at_input(cut, tensor) for cut in activations},
            outputs={cut: lambda tensor, cut=cut: at_output(cut, tensor) for cut in activations},
        ) as result:
            last = self.logits_of(result)
            output_error = (self._error(last, target) * self.loss_factor).to(last.dtype)
            pairs = [(last, output_error), *((before[cut], differences[cut]) for cut in activations)]
            ends, errors_at_ends = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)  # others are frozen
            return list(torch.autograd.grad(ends, parameters, errors_at_ends, allow_unused=True))

    def _error(self, logits: Tensor, target: Tensor) -> Tensor:
        """The gradient of the objective's mean loss at the logits, (N, C)."""
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
        return torch.autograd.grad(self.objective.loss(wide, target), wide)[0]
