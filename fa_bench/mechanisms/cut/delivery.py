"""The backward pass of a cut rule: once the error at the logits is known, an error is delivered to every cut.

An autograd Function is applied to the model's output or, if ``error_at`` names a module, to the output of this module. In the
forward pass, the Function is the identity, with all captured activations as additional inputs. All parts of the model therefore
belong to one graph. Loss scaling and several forward passes before a backward pass work as usual, as does a plain
``loss.backward()`` for rules that need neither labels nor indices. A graph that is never differentiated is freed together with
the output.
"""

from __future__ import annotations

import ast
import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError, StateError, names
from fa_bench.mechanisms.checkpointing import refuse_reentrant
from fa_bench.mechanisms.cut.capture import CapturedActivation, format_of, is_stored_last
from fa_bench.mechanisms.cut.positions import require_labels
from fa_bench.mechanisms.graph import nodes_from
from fa_bench.mechanisms.loss_scale import PASS_OBJECTIVE, PASS_SCALE, PassOutput, is_other_loss, is_unscaled, not_a_multiple
from fa_bench.mechanisms.rule import OUTPUT
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.cut.rule import CutRule
    from fa_bench.mechanisms.second_pass import FirstPass
    from fa_bench.mechanisms.updates import LearnedTensor


#: The number of passes whose loss is compared with the objective. One pass would not be enough, because with a gradient scaler
#: the gradients of the first passes may overflow, in which case the comparison shows nothing.
_CHECKED_PASSES = 3


class Delivery:
    """Delivers the errors of an attached rule.

    Args:
        rule: the rule.
    """

    def __init__(self, rule: CutRule) -> None:
        from fa_bench.mechanisms.compiled import Handle
        from fa_bench.mechanisms.cut.function import CompiledDeliverFunction, DeliverFunction

        self.rule, self._handle, self._compiled_function = rule, Handle(self), CompiledDeliverFunction
        # These values are stored because they are read at every step, where imports and property look-ups would slow down a small
        # network by one per cent.
        self._function, self._reads_values, self._needs_target = DeliverFunction, rule.reads_values, rule.needs_target
        self._needs_indices = rule.needs_indices
        # With error_at, the values are kept on the tape instead of being saved by the autograd Function. If the module in
        # error_at runs within an activation checkpoint, the repeated forward pass does not apply the Function, so its saved
        # values would be missing.
        self._keeps_values = self._reads_values and rule.error_at is not None
        self._target: Tensor | None = None
        self._loss_scale: float | None = None
        self._is_delivered = self._has_warned_of_input = False
        #: The number of passes whose loss is still to be compared with the objective. Only the first passes are compared, because
        #: the comparison forces a synchronisation with the accelerator.
        self._unchecked = _CHECKED_PASSES if rule.learns_by_objective else 0

    # -------------------------------------------------------------------------------------------- forward
    def connect(self, output: Any, tape: dict[str, CapturedActivation]) -> Any:
        """The output of the model, or of the module in ``error_at``, with its logits connected to the captured activations.

        Raises:
            CoverageError: if the model returns a loss that it has computed from the logits, if it returns several outputs and
                none of them was chosen, or if it does not return the chosen output.
        """
        logits = self.logits_in(output)
        if logits is output:
            return self._connected(logits, tape)
        from fa_bench.mechanisms.trace import named_results, replaced

        connected = self._connected(logits, tape)
        others = named_results(output).values()
        output = replaced(output, logits, connected)
        if self.rule.learns_in_passes and not self.rule.output_learns_by_delta:
            # A loss on another output would be backpropagated through the whole model.
            for other in others:
                output = output if other is logits else replaced(output, other, other.detach())
        return output

    def logits_in(self, output: Any) -> Tensor:
        """The logits in the model's output; the errors raised are those of `connect`."""
        if isinstance(output, torch.Tensor):
            return output
        from fa_bench.mechanisms.trace import chosen_result, named_results

        rule, results = self.rule, named_results(output)
        for name, result in results.items():
            if result.dim() == 0 and (rule.output is None or depends_on(result, results.get(str(rule.output)))):
                raise CoverageError(
                    f"the model returns a loss ('{name}') that it has computed itself, from which rule '{rule.name}' "
                    f"cannot take its error; call the model without labels, and compute the loss from its logits"
                )
        if rule.output is None and len(results) > 1:
            raise CoverageError(
                f"rule '{rule.name}' takes its error from one output, but this model returns {names(results)}; "
                "choose one, for example {output}",
                {"output": next(iter(results))},
            )
        return chosen_result(results, rule.output)

    def _connected(self, logits: Tensor, tape: dict[str, CapturedActivation]) -> Tensor:
        rule = self.rule
        if (self._reads_values or rule.learns_in_passes) and not torch.compiler.is_compiling():
            self._check_unchanged(tape)
        if rule.learns_in_passes:
            return self._connected_to_parameters(logits, tape)
        tensors = []
        for captured in tape.values():
            tensors.append(captured.tensor)
            captured.tensor = captured.tensor.detach() if self._keeps_values else None
        learned = [] if rule.mode.freeze_random else [one for cut in tape for one in rule.learned_at(cut)]
        if torch.compiler.is_compiling():
            return self._connected_in_graph(logits, tape, tensors, learned)
        parameters = [one.tensor for one in learned]
        output = PassOutput(rule.name, logits) if rule.scales else None
        errors = functools.partial(self._errors, tape, list(zip(learned, parameters, strict=True)), output)
        if rule.first_pass is not None:
            rule.first_pass.output = logits.detach().clone()
        errors = self._with_first_pass(errors)
        saves = self._reads_values and not self._keeps_values
        return self._function.apply(errors, len(tensors), saves, logits, *tensors, *parameters)

    def _check_unchanged(self, tape: dict[str, CapturedActivation]) -> None:
        """Refuse activations that were changed in place in this pass but not in the pass that `attach` traced."""
        for cut, captured in tape.items():
            if captured.tensor._version != captured.version:
                raise CoverageError(
                    f"cut '{cut}': its output was changed in place in a training pass, but not in evaluation mode, and rule "
                    f"'{self.rule.name}' needs the original output: use inplace=False after this module"
                )

    def _connected_to_parameters(self, logits: Tensor, tape: dict[str, CapturedActivation]) -> Tensor:
        """The variant of `_connected` for a rule that learns in separate passes."""
        first = self.rule.first_pass
        if first is not None and first.input_requires_grad and not self._has_warned_of_input:
            self._has_warned_of_input = True
            warnings.warn(
                f"rule '{self.rule.name}' computes no error for the model's input, which requires a gradient, so the input gets "
                "no gradient, and nothing before the model learns. Attach the rule to a model that also contains the modules "
                "before it, or detach the input; in rule.exact(), the input gets its true gradient",
                stacklevel=2,
            )
        parameters = self.rule.trained_parameters([logits, *(captured.tensor for captured in tape.values())])
        activations = {cut: captured.tensor.detach() for cut, captured in tape.items()}
        errors = self._with_first_pass(
            functools.partial(self._gradients, parameters, activations, PassOutput(self.rule.name, logits))
        )
        # Without the logits' graph, the activations of the first pass are freed immediately.
        connected = logits if self.rule.output_learns_by_delta else logits.detach()
        return self._function.apply(errors, 0, False, connected, *parameters)

    def _connected_in_graph(
        self, logits: Tensor, tape: dict[str, CapturedActivation], tensors: list[Tensor], learned: list[LearnedTensor]
    ) -> Tensor:
        """The variant of `_connected` for a graph that is being compiled."""
        cuts = repr([(cut, captured.output_shape) for cut, captured in tape.items()])
        # The compiler would remove an operator without results, and the pass would count as not delivered.
        changes_delta = self.rule.changes_delta or not tensors
        return self._compiled_function.apply(
            self._handle.key,
            cuts,
            len(tensors),
            self._reads_values,
            self.rule.scales,
            changes_delta,
            logits,
            *tensors,
            *(one.tensor for one in learned),
        )

    # -------------------------------------------------------------------------------------------- backward
    def errors_in_graph(
        self,
        delta: Tensor,
        logits: list[Tensor],
        activations: list[Tensor],
        learned: list[Tensor],
        changes_delta: bool,
        cuts: str,
    ) -> list[Tensor]:
        """The errors at the cuts, the gradients of the learned tensors and, with `changes_delta`, the error at the logits.

        Args:
            delta: δ.
            logits: a list with the logits, which is empty if the rule does not need them.
            activations: the activation at each cut or, if the rule does not read activations, a tensor of the same shape.
            learned: tensors with the shapes and dtypes of the learned tensors.
            cuts: the ``repr`` of a list that contains each cut with its `CapturedActivation.output_shape`.
        """
        matrices = not self.rule._layouts and self.rule.side == OUTPUT
        tape = {
            cut: CapturedActivation(tensor, tensor.shape, shape, matrices and is_stored_last(tensor))
            for (cut, shape), tensor in zip(ast.literal_eval(cuts), activations, strict=True)
        }
        tensors = [(one, one.tensor) for cut in tape for one in self.rule.learned_at(cut)] if learned else []
        error, *others = self._errors(tape, tensors, PassOutput(self.rule.name, logits[0]) if logits else None, delta, ())
        like, results = [*activations, *learned], others
        if changes_delta:
            like, results = [*like, delta], [*others, error]
        # An operator must not return its arguments or tensors that are kept elsewhere. Only results that share memory with such
        # tensors are copied, because most results are new and large.
        feedback = (one for tensors in self.rule.feedback.values() for one in tensors.values())
        kept = {one.untyped_storage().data_ptr() for one in (delta, *logits, *activations, *learned, *feedback)}
        return [
            wanted.new_zeros(wanted.shape)
            if result is None
            else result.to(wanted.dtype, copy=result.untyped_storage().data_ptr() in kept, memory_format=format_of(wanted))
            for result, wanted in zip(results, like, strict=True)
        ]

    def run(self, loss: Tensor, target: Tensor | None, loss_scale: float | None) -> None:
        """Run the backward pass; the arguments are those of `Rule.backward`."""
        self._target, self._is_delivered = target, False
        if self.rule.scales:
            # If the rule computes errors from the objective's loss (`takes_numbers`), a scale that was not given is always
            # measured, because this also verifies that the loss is a multiple of the objective's loss.
            is_known = not self.rule.takes_numbers and is_unscaled(loss, target, self.rule.objective)
            self._loss_scale = 1.0 if loss_scale is None and is_known else loss_scale
        try:
            loss.backward()
        finally:
            self._target = self._loss_scale = None
            is_delivered, self._is_delivered = self._is_delivered, False
        if not is_delivered:
            raise ValueError(
                f"rule '{self.rule.name}': the loss was not computed by a training forward pass of the attached model"
            )

    def _with_first_pass(self, errors: Callable[..., Any]) -> Callable[..., Any]:
        """Bind `errors` to the rule's current `first_pass`, if the rule repeats passes. `first_pass` is then kept only as long as
        the graph exists."""
        if not self.rule.repeats:
            return errors
        first, self.rule.first_pass = self.rule.first_pass, None
        return functools.partial(self._of_pass, first, errors)

    def _of_pass(self, first: FirstPass | None, errors: Callable[..., Any], *arguments: Any) -> Any:
        if first is None:
            refuse_reentrant(self.rule.name)()
        assert first is not None
        first.require_own_weights()
        self.rule.first_pass = first
        try:
            return errors(*arguments)
        finally:
            self.rule.first_pass = None

    def _gradients(
        self,
        parameters: list[nn.Parameter],
        activations: dict[str, Tensor],
        output: PassOutput,
        delta: Tensor,
        tensors: tuple[Tensor, ...],
    ) -> list[Tensor | None]:
        """The error at the logits and the gradients of `parameters`, for a rule that learns in separate passes. The error is None
        unless the rule sets `output_learns_by_delta`."""
        device, rule = delta.device.type, self.rule
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._gradients(parameters, activations, output, delta, tensors)
        with torch.enable_grad():
            self._checked_rows(delta)
            self._is_delivered = True
            try:
                if rule.scales:
                    self._measure_scale(delta, output)
                labels: Any = self._target  # may be None if the rule does not need labels
                gradients = rule.gradients(parameters, activations, delta, output.logits, labels)
            except (IndexError, RuntimeError, ValueError):
                if rule.needs_target and self._target is not None:
                    require_labels(rule.name, self._target, delta.shape, rule.objective)
                raise
        given = {id(parameter): gradient for parameter, gradient in zip(parameters, gradients, strict=True)}
        for one in rule.learned_feedback():
            one.on_gradient(given.get(id(one.tensor)))
        return [delta if rule.output_learns_by_delta else None, *gradients]

    def _checked_rows(self, delta: Tensor) -> Tensor:
        """δ with the class axis last, (N, C) or (N, P..., C), after checks of its shape, the labels and the indices."""
        rule = self.rule
        if delta.dim() != rule.error_dims:
            raise CoverageError(
                f"rule '{rule.name}' was attached to a model with outputs of {rule.error_dims} dimensions; now "
                f"they have the shape {tuple(delta.shape)}"
            )
        rows = delta if delta.dim() == 2 else delta.movedim(rule.error_axis, -1)
        if self._needs_target:
            self._check_target(delta, rows, self._target)
        if self._needs_indices:
            self._check_indices(len(rows), rule.indices)
        return rows

    def _measure_scale(self, delta: Tensor, output: PassOutput) -> None:
        """Set the rule's `loss_factor`."""
        rule, scale, target = self.rule, self._loss_scale, self._target
        if rule.learns_by_objective:
            output.unchanged()
        if scale is None:
            mend = PASS_OBJECTIVE if rule.learns_by_objective else PASS_SCALE
            scale = output.scale(delta, target, rule.loss_factor, rule.objective, mend)
        elif self._unchecked and target is not None:
            if is_other_loss(delta, output.logits, target, rule.objective):
                raise ValueError(f"rule '{rule.name}': {not_a_multiple(rule.objective)}. {PASS_OBJECTIVE}")
            self._unchecked -= 1
        rule.loss_factor = scale

    def _errors(
        self,
        tape: dict[str, CapturedActivation],
        learned: list[tuple[LearnedTensor, Tensor]],
        output: PassOutput | None,
        delta: Tensor,
        tensors: tuple[Tensor, ...],
    ) -> list[Tensor | None]:
        """The errors at the logits and at all cuts, and the gradients of learned tensors, computed from δ.

        `learned` contains each `LearnedTensor` together with its parameter in the forward pass.
        """
        device = delta.device.type
        if torch.is_autocast_enabled(device):  # the caller enabled it; a backward pass runs in the precision of its inputs
            with torch.autocast(device, enabled=False):
                return self._errors(tape, learned, output, delta, tensors)
        rule, target = self.rule, self._target
        rows = self._checked_rows(delta)
        for one, parameter in learned:
            if one.tensor is not parameter:
                raise StateError(
                    f"rule '{rule.name}' computes errors with its learned feedback in the backward pass, but '{one.name}' was "
                    "a different tensor in the forward pass: pass only the weights to torch.func.functional_call, and replace "
                    "tensors before the forward pass"
                )
        if tensors:
            for captured, tensor in zip(tape.values(), tensors, strict=True):
                captured.tensor = tensor
        self._is_delivered = True
        errors: list[Tensor | None] = []
        gradients: list[Tensor | None] = []
        try:
            if output is not None:
                self._measure_scale(delta, output)
                rule.pass_output = output
            broadcast = rule.broadcast(rows, target)
            errors.append(rule.output_error(delta))
            for cut, captured in tape.items():
                error, gradients_at_cut = rule.error_and_gradients(cut, captured, broadcast, rows, target, bool(learned))
                errors.append(error)
                gradients += gradients_at_cut
        except (IndexError, RuntimeError, ValueError):
            if self._needs_target and target is not None:
                require_labels(rule.name, target, delta.shape, rule.objective)
            raise
        finally:
            if output is not None:
                rule.pass_output = None
        if tensors:
            for captured in tape.values():
                captured.tensor = None
        if learned:
            for (one, _), gradient in zip(learned, gradients, strict=True):
                one.on_gradient(gradient)
        return errors + gradients

    def _check_target(self, delta: Tensor, rows: Tensor, target: Tensor | None) -> None:
        if self._is_delivered:
            raise ValueError(
                f"rule '{self.rule.name}': the loss depends on two forward passes, but the labels belong to one of "
                f"them; call rule.backward for each"
            )
        if target is not None and self.rule.takes_numbers and target.is_floating_point() and target.shape == delta.shape:
            return
        if target is None or target.shape != rows.shape[:-1] or target.is_floating_point():
            shape = "(N,)" if rows.dim() == 2 else f"{tuple(rows.shape[:-1])}, one for each position"
            raise ValueError(
                f"rule '{self.rule.name}' requires labels; call rule.backward(loss, logits, target) with class "
                f"indices of shape {shape}"
            )

    def _check_indices(self, size: int, indices: Tensor | None) -> None:
        rule, count = self.rule.name, self.rule.sample_count
        if self._is_delivered:
            raise ValueError(
                f"rule '{rule}': the loss depends on two forward passes, but the indices belong to one of them; call "
                "rule.backward for each"
            )
        if indices is None:
            raise ValueError(
                f"rule '{rule}' requires the indices of the batch's samples in the training set; call "
                f"rule.backward(loss, logits, target, indices=indices) with integers of shape (N,)"
            )
        if not isinstance(indices, torch.Tensor):
            raise ValueError(
                f"rule '{rule}': indices are a {type(indices).__name__}, not a tensor of integers of shape ({size},)"
            )
        if indices.shape != (size,) or indices.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"rule '{rule}': indices have the shape {tuple(indices.shape)} and are {indices.dtype}; this batch needs "
                f"integers of shape ({size},)"
            )
        low, high = (int(bound) for bound in indices.aminmax()) if size else (0, 0)
        if count is not None and (low < 0 or high >= count):
            raise ValueError(
                f"rule '{rule}': index {low if low < 0 else high} is out of range: there are {count} training samples, "
                f"numbered from 0 to {count - 1}"
            )


def depends_on(result: Tensor, logits: Tensor | None) -> bool:
    """Whether one output of a model was computed from the logits; True if the logits are unknown."""
    return logits is None or result.grad_fn is logits.grad_fn or logits.grad_fn in nodes_from([result.grad_fn])
