"""Rules that compute the gradients of their trained parameters in additional passes of the model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from fa_bench.errors import CoverageError, missing_method
from fa_bench.mechanisms.cut.rule import CutRule
from fa_bench.mechanisms.feedback_tensors import has_own_parameters
from fa_bench.mechanisms.graph import leaves
from fa_bench.utils.lazy import nn

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

    from fa_bench.mechanisms.coverage import Coverage
    from fa_bench.mechanisms.trace import Trace


@dataclasses.dataclass(eq=False)
class PassRule(CutRule):
    """A rule that learns in additional passes, for which it uses `fa_bench.mechanisms.second_pass`; subclasses implement
    `gradients`.

    When ``loss.backward()`` reaches the logits, the gradients that `gradients` returns are added to ``.grad``, like those of a
    backward pass. Unless `output_learns_by_delta` is set, the backward pass stops there: the first pass is not differentiated,
    and other outputs of the model are detached.
    """

    repeats = True
    scales = True
    learns_in_passes = True
    #: Whether the rule skips the derivatives of the nonlinearities at the cuts. A cut at a pooling layer then stands for the
    #: nonlinearity before the layer. At other cuts, such as blocks, errors are delivered at the output as usual.
    skips_nonlinearities: ClassVar[bool] = False
    #: Whether layers after the last cut learn by backpropagation from the loss of the first pass. If so, `gradients` returns None
    #: for their parameters.
    output_learns_by_delta = False
    #: Whether layers before a cut learn even if the cut does not affect the output from which the loss is computed.
    learns_beside_output = True
    needs_target = True

    def first_argument(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the positional arguments of a pass, and raise an error if there are none, because the first one must be the
        model's input."""
        if not args:
            raise CoverageError(f"rule '{self.name}' changes the model's input; pass it as the first positional argument")
        return args

    def trained_parameters(self, results: list[Tensor]) -> list[torch_nn.Parameter]:
        """The parameters that are passed to `gradients`.

        Args:
            results: the logits of the first pass, and its activations at the cuts.
        """
        return used_parameters(self.model, results)

    def gradients(
        self,
        parameters: list[torch_nn.Parameter],
        activations: dict[str, Tensor],
        delta: Tensor,
        logits: Tensor,
        target: Tensor,
    ) -> list[Tensor | None]:
        """The gradients of the parameters; this method is called with gradients enabled and `first_pass` set.

        Args:
            parameters: the result of `trained_parameters`.
            activations: cut -> its activation (N, ...) in the first pass.
            delta: the gradient of the loss at the logits, in their shape; it includes the factor `loss_factor` and the 1/N of the
                mean.
            logits: the logits of the first pass.
            target: the labels, (N,) or (N, P...); if the rule sets `takes_numbers`, possibly numbers in the shape of the logits.
        """
        raise missing_method(self, "gradients")

    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.cut.coverage import with_untrained

        coverage = super().wire(sample_input)
        reached = self._trace.result_leaves | (self._trace.below_leaves if self.learns_beside_output else set())
        return coverage if self.output_learns_by_delta else with_untrained(coverage, self, reached)

    def error_points(self, trace: Trace) -> dict[str, tuple[str, str]]:
        """An empty dictionary, because no error is delivered to an activation of the first pass."""
        return {}

    def readouts(self) -> dict[str, Tensor]:
        return {}

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """An empty dictionary, because no layer's backward pass uses feedback."""
        return {}

    # -------------------------------------------------------------------------------------------- nonlinearities
    def find_cuts(self, sample_input: Any) -> tuple[str, ...]:
        cuts = super().find_cuts(sample_input)
        if not self.skips_nonlinearities:
            return cuts
        paths = [path for path, module in self.model.named_modules() if path and not list(module.children())]
        trace = self.trace(sample_input, watch=tuple(dict.fromkeys((*cuts, *paths))))
        order = list(trace.output_shapes)

        def nonlinearity(cut: str) -> str:
            """The module at which to cut instead of `cut`: for a module without parameters that changes the shape, such as
            pooling, the nearest earlier module that could be the nonlinearity, if any; otherwise, `cut` itself."""
            if not self._changes_shape(cut, trace) or has_own_parameters(self.model.get_submodule(cut)):
                return cut
            for path in reversed(order[: order.index(cut)]):
                module = self.model.get_submodule(path)
                if path in trace.order:
                    break
                if not (
                    self._changes_shape(path, trace)
                    or has_own_parameters(module)
                    or trace.calls[path] != 1
                    or isinstance(module, (nn.modules.dropout._DropoutNd, nn.Identity))
                    or path in cuts
                ):
                    return path
            return cut

        chosen = {nonlinearity(cut) if cut in order else cut for cut in cuts}
        return tuple(path for path, _ in self.model.named_modules() if path in chosen)

    @staticmethod
    def _changes_shape(path: str, trace: Trace) -> bool:
        return trace.input_shapes[path] != trace.output_shapes[path]

    def is_nonlinearity(self, cut: str) -> bool:
        """Whether the module at a cut counts as a nonlinearity, so that an error can be delivered at its input."""
        return not has_own_parameters(self._cut_modules[cut]) and not self._changes_shape(cut, self._trace)


def used_parameters(model: torch_nn.Module, results: list[Tensor]) -> list[torch_nn.Parameter]:
    """The parameters of a model that are part of the autograd graphs of the results."""
    used = set().union(*(leaves(result.grad_fn) for result in results))
    return [parameter for parameter in model.parameters() if id(parameter) in used]
