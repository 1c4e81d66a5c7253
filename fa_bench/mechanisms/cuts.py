"""The second mechanism: rules that cut the graph at named modules and deliver each part's error directly.

A hook at every cut passes on a detached tensor, so that nothing is computed and thrown away, and a Function on the model's
output, the identity forward, sends every cut its signal as soon as the backward pass brings the error at the logits. All parts
thus belong to one graph: loss scaling, several forwards before a backward, and plain ``loss.backward()`` work as usual, and
what is never differentiated is freed with its output.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

from fa_bench.config.options import option
from fa_bench.errors import CoverageError, names
from fa_bench.lazy import torch
from fa_bench.mechanisms.backward_context import recomputing
from fa_bench.mechanisms.coverage import Coverage, Covered, foreign_weights, matching, outside_text
from fa_bench.mechanisms.loss_scale import is_unscaled, measured_scale
from fa_bench.mechanisms.rule import INPUT, OUTPUT, Rule
from fa_bench.sampling import sample, seed_for

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.trace import Trace
    from fa_bench.mechanisms.updates import LearnedTensor


@dataclasses.dataclass(eq=False)
class CutRule(Rule):
    """A rule that brings its error to named cuts; subclasses say with which signal in `signal`.

    Cuts are the modules that the model names in its attribute ``cut_points``, or those of the option `cuts`.
    """

    cuts: list[str] | None = option(None, "modules (names, or patterns such as 'act*'; * crosses dots) whose output is "
                                          "cut; null: the cut points that the model declares")
    output: str | int | None = option(None, "the output that the errors come from, where the model returns several: a key, or a "
                                            "number in a tuple; other outputs train the layers after the last cut alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.output = None if self.output is None else str(self.output)

    #: The model's attribute that names the cuts unless the option does.
    declared = "cut_points"
    #: Whether `signal` or `feedback_gradients` reads the values of the kept tensors: then they are held until the backward pass.
    reads_values = False
    #: Whether the errors are made of the labels: then `loss_factor` is what the loss was multiplied by, see `loss_scale`.
    scales = False
    loss_factor = 1.0
    #: The rule that this one is a part of and whose options it has; None where it stands for itself.
    part_of: ClassVar[Rule | None] = None
    #: Whether all layers between two cuts are one module that learns by backpropagation within it: then a layer needs no cut of
    #: its own, and whatever is in a module is covered.
    modular = False

    @property
    def side(self) -> str:
        """Whether a cut is at its module's output or at its input."""
        return OUTPUT

    @property
    def needs_target(self) -> bool:
        """Whether `signal` needs the labels."""
        return False

    # -------------------------------------------------------------------------------------------- for subclasses
    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        """Put the feedback tensors of all cuts in place; `features` is each cut's shape without the batch."""

    def tensor(self, cut: str, name: str) -> Tensor:
        """The feedback tensor `name` of a cut, straight from its module's dictionary: this runs at every step."""
        return self._at[cut]._buffers["feedback_" + name]  # type: ignore[return-value]

    def broadcast(self, delta: Tensor, target: Tensor | None) -> Tensor:
        """What is sent to all cuts alike, (N, C): δ itself. Made once in a backward pass; arguments as for `signal`."""
        return delta

    def signal(self, cut: str, kept: CapturedActivation, sent: Tensor, target: Tensor | None) -> Tensor:
        """The error delivered at one cut, in the shape of the kept tensor: that of `project`.

        Args:
            cut: the cut's module path.
            kept: what the hooks kept there.
            sent: what `broadcast` made of δ, the gradient of the loss at the logits, (N, C).
            target: the labels, (N,), where ``rule.backward`` was given them.
        """
        return self.project(cut, sent, kept)

    def output_error(self, delta: Tensor) -> Tensor:
        """The error that the output layer learns by, of the gradient of the loss at the logits: that gradient itself."""
        return delta

    def project(self, cut: str, errors: Tensor, kept: CapturedActivation) -> Tensor:
        """errors B in the shape of the kept tensor, with errors (N, C) and the cut's B (C, features)."""
        feedback = self.tensor(cut, "B")
        if errors.dtype != feedback.dtype:
            errors = errors.to(feedback.dtype)
        return self.in_shape(cut, errors.mm(feedback), kept)

    def in_shape(self, cut: str, projected: Tensor, kept: CapturedActivation) -> Tensor:
        """An error (N, features) in the shape of the kept tensor."""
        if projected.dim() == len(kept.shape):
            return projected
        try:
            return projected.view(kept.shape)
        except RuntimeError:
            raise CoverageError(f"cut '{cut}' has activations of shape {tuple(kept.shape[1:])}, and its feedback was made for "
                                f"{projected.shape[1]} features: attach with a sample_input of the size trained on") from None

    def learned_at(self, cut: str) -> list[LearnedTensor]:
        """The learned feedback of one cut, in the order of `answer`'s gradients."""
        return []

    def feedback_gradients(self, cut: str, kept: CapturedActivation, delta: Tensor, target: Tensor | None) -> list[Tensor | None]:
        """The gradients of `learned_at`, of the error at the logits and what was kept of the cut."""
        return []

    def answer(
        self, cut: str, kept: CapturedActivation, sent: Tensor, delta: Tensor, target: Tensor | None, learns: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The error delivered at one cut, and the gradients of its learned feedback where it `learns`; arguments as above."""
        error = self.signal(cut, kept, sent, target)
        return error, self.feedback_gradients(cut, kept, delta, target) if learns else []

    def put(
        self, cut: str, name: str, shape: tuple[int, ...], init: str, density: float = 1.0,
        seeded_by: str | None = None, columns: int | None = None,
    ) -> None:
        """Draw the feedback tensor `name` of a cut, on the model's device.

        Args:
            cut: the cut's module path, which also seeds the draw unless `seeded_by` is given.
            name: the tensor's name.
            shape: its shape, (C, ...).
            init, density: as for `fa_bench.sampling.draw`.
            columns: keep only so many leading columns.
        """
        from fa_bench.mechanisms.layers import put_tensor

        tensor = sample(shape, init, seed_for(self.seed, seeded_by or cut, name), density)[:, :columns]
        put_tensor(self._at[cut], name, tensor.to(next(self.model.parameters())).contiguous())

    # -------------------------------------------------------------------------------------------- life in a model
    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.cut_points import check_cuts
        from fa_bench.mechanisms.layers import weighted_layers

        self._at: dict[str, nn.Module] = {}
        self._tape: dict[str, CapturedActivation] | None = None
        self._target: Tensor | None = None
        self._loss_scale: float | None = None
        self._delivered = False
        self._cut_handles: list[Any] = []
        self._blind: set[str] = set()
        self._missed: set[str] = set()
        self._outer: list[Any] = []
        named = self.find_cuts(sample_input)
        trace = self.trace(sample_input, watch=named)
        cuts = self.choose_cuts(named, trace)
        if cuts != named:
            trace = self.trace(sample_input, watch=cuts)
        check_cuts(self, trace, cuts)
        self._trace = trace
        self._at = {cut: self.model.get_submodule(cut) for cut in cuts}
        layers = weighted_layers(self.model)
        self._covered = {path: layers[path] for path in trace.order}
        self._witness = next((layers[path] for path in (*trace.outputs, *trace.order) if layers[path].weight.requires_grad), None)
        self._cloned = trace.changed
        shapes = trace.output_shapes if self.side == OUTPUT else trace.input_shapes
        self.make_feedback({cut: shapes[cut][1:] for cut in cuts}, trace.result_shape[-1])
        self._resting = {cut: self.learned_at(cut) for cut in cuts if cut not in trace.learns}
        for learned in (one for of_cut in self._resting.values() for one in of_cut):
            learned.rest()
        self._hook()
        covered = tuple(
            Covered(path, type(layers[path]).__name__, tuple(layers[path].weight.shape), self._brings(path, trace))
            for path in trace.order if self.side == INPUT or self.modular or path not in trace.behind
        )
        if self.modular:
            return Coverage(self.name, covered, {}, notes=self.notes())
        ids = {id(parameter) for entry in covered for parameter in layers[entry.layer].parameters(recurse=False)}
        uncovered, local = foreign_weights(self.model, ids, trace.uses)
        for path in layers.keys() - set(trace.order):
            uncovered[f"{path}.weight"] = "its layer did not run in the sample forward"
        for path in trace.behind if self.side == OUTPUT else ():
            uncovered[f"{path}.weight"] = "its error comes through another layer's weight: no cut between them"
        for path, use in trace.uses.outside.items():
            uncovered[f"{path}.weight"] = outside_text(use)
        return Coverage(self.name, covered, uncovered, local, self.notes())

    def watched_modules(self) -> dict[str, nn.Module]:
        return {**self._covered, **self._at}

    def unwire(self) -> None:
        from fa_bench.mechanisms.layers import drop_tensors

        for handle in getattr(self, "_cut_handles", ()):  # absent where `attach` failed before `wire`
            handle.remove()
        self._cut_handles = []
        for module in self.model.modules():
            drop_tensors(module)

    def find_cuts(self, sample_input: Any) -> tuple[str, ...]:
        """The cuts, in the order of the model's modules; raises CoverageError where there are none."""
        from fa_bench.mechanisms.cut_points import none_declared

        paths = [path for path, _ in self.model.named_modules() if path]
        wanted = self.cuts if self.cuts is not None else getattr(self.model, self.declared, None)
        if not wanted:
            raise none_declared(self, paths, sample_input)
        found = matching(wanted, paths, "cuts")
        return tuple(path for path in paths if path in found)

    def choose_cuts(self, cuts: tuple[str, ...], trace: Trace) -> tuple[str, ...]:
        """Those of the named cuts that the rule cuts at; `trace` watched them."""
        return cuts

    def _brings(self, path: str, trace: Trace) -> str:
        cuts = [cut for cut in self._at if path in trace.feeds[cut]] if self.side == OUTPUT else []
        if cuts:
            return f"comes from the cut at {names(cuts)}"
        if self.modular and path in trace.behind:
            return "comes by backpropagation within its module"
        return "is the true one (output layer)" if path in trace.outputs else "comes from the cut at its consumer's input"

    # -------------------------------------------------------------------------------------------- hooks
    def _hook(self) -> None:
        from fa_bench.mechanisms.ops import DeliverFunction

        # What every step asks for; imports and properties add up to a hundredth of a small net's step.
        self._function, self._reads_values, self._needs_target = DeliverFunction, self.reads_values, self.needs_target
        for cut, module in self._at.items():
            if self.side == OUTPUT:
                self._cut_handles.append(module.register_forward_hook(functools.partial(self._at_output, cut)))
            else:
                self._cut_handles.append(module.register_forward_pre_hook(functools.partial(self._at_input, cut)))
                self._cut_handles.append(module.register_forward_hook(functools.partial(self._after_input, cut)))

    # A forward pass repeated within a backward pass (activation checkpointing) has a tape of its own: it must do to its tensors
    # what the first one did, while the errors come from the first one's tape.
    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        super().begin_forward(model, args, kwargs)
        self._outer.append(self._tape)
        if not self.mode.training:
            self._tape = None
        elif self._tape is not None and not recomputing():
            raise CoverageError(f"the model calls itself in a training pass, where rule '{self.name}' cannot tell its outputs "
                                f"apart: call one of its modules instead")
        else:
            self._tape = {}
            self._blind.clear()

    def end_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        tape = self._tape
        try:
            super().end_forward(model, args, output)
        finally:
            self._tape = self._outer.pop() if self._outer else None
        if tape is None or output is None:
            return None
        if len(tape) < len(self._at) and not recomputing():
            self._require_cuts(tape)
        if isinstance(output, torch.Tensor):
            return self._delivered_to(output, tape)
        from fa_bench.mechanisms.trace import chosen_result, named_results, replaced

        results = named_results(output)
        for name, result in results.items():
            if result.dim() == 0 and (self.output is None or _made_of(result, results.get(self.output))):
                raise CoverageError(f"the model returns a loss ('{name}') that it computed itself, and the error of rule "
                                    f"'{self.name}' cannot come from there: call it without labels, and compute the loss from "
                                    f"its logits")
        if self.output is None and len(results) > 1:
            raise CoverageError(f"rule '{self.name}' takes its error from one output, and this model returns {names(results)}: "
                                "say which, such as {output}", {"output": next(iter(results))})
        logits = chosen_result(results, self.output)
        return replaced(output, logits, self._delivered_to(logits, tape))

    def roots(self, output: Any) -> list[Any]:
        kept = [kept.tensor.grad_fn for kept in (self._tape or {}).values() if kept.tensor is not None]
        return [*super().roots(output), *(node for node in kept if node is not None)]

    def transporting_layers(self) -> dict[str, nn.Module]:
        return {} if self.modular else dict(self._covered)

    def _require_cuts(self, tape: dict[str, CapturedActivation]) -> None:
        """Look at the cuts that a training pass did not meet: those that ran without gradients are refused, others warned of."""
        from fa_bench.mechanisms.layers import require_gradients

        assert self._trace is not None
        for cut in self._at.keys() - tape.keys():
            if cut in self._blind:
                for path in self._trace.feeds.get(cut, ()) if self.side == OUTPUT else ():
                    require_gradients(path, self._covered[path])
            elif cut not in self._missed:
                self._missed.add(cut)
                warnings.warn(f"rule '{self.name}': cut '{cut}' did not run in a training pass, although it ran when the model "
                              f"was attached. Layers before it that did run received their error through later weights",
                              stacklevel=2)

    def _delivered_to(self, logits: Tensor, tape: dict[str, CapturedActivation]) -> Tensor:
        """The logits, from which the backward pass reaches all cuts and their learned feedback."""
        tensors = []
        for kept in tape.values():
            tensors.append(kept.tensor)
            kept.tensor = None
        learned = [] if self.mode.freeze_random else [one for cut in tape for one in self.learned_at(cut)]
        answer = functools.partial(self._answers, tape, learned, logits if self.scales else None)
        return self._function.apply(answer, len(tensors), self._reads_values, logits, *tensors, *(one.tensor for one in learned))

    def _at_output(self, cut: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        tape = self._tape
        if tape is None:
            if not torch.is_grad_enabled() or self.mode.exact:
                return None
            if not recomputing():
                raise CoverageError(f"cut '{cut}' ran outside a forward pass of the attached model: call the model itself")
        if not isinstance(output, torch.Tensor):
            raise CoverageError(f"cut '{cut}' returns a {type(output).__name__}; name a module that returns one tensor")
        if not output.requires_grad:
            self._blind.add(cut)
            return None
        if tape is not None:
            if cut in tape:
                raise CoverageError(f"cut '{cut}' ran twice in a training pass, and once when the model was attached: "
                                    f"name a module that runs once in training")
            tape[cut] = CapturedActivation(output, output.shape)
            resting = [learned for learned in self._resting.get(cut, ()) if learned._rests] if self._resting else ()
            if resting and self._learns(output):
                for learned in resting:
                    learned.require_awake()
        passed_on = output.detach()
        # What follows changes this cut's output in place; the rule needs it as it was.
        return passed_on.clone() if cut in self._cloned else passed_on

    def _learns(self, output: Tensor) -> bool:
        """Whether a cut's output depends on a parameter that is trained, and not only on an input that asks for its gradient."""
        from fa_bench.mechanisms.trace import leaves

        return not leaves(output.grad_fn).isdisjoint(id(parameter) for parameter in self.model.parameters())

    def _at_input(self, cut: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        passed_on = self._at_output(cut, module, (), args[0])
        return None if passed_on is None else (passed_on, *args[1:])

    def _after_input(self, cut: str, module: nn.Module, args: Any, output: Tensor) -> None:
        tape = self._tape
        if tape is not None and cut in tape:
            tape[cut].output_shape = tuple(output.shape)

    # -------------------------------------------------------------------------------------------- training
    def deliver(
        self, loss: Tensor, logits: Tensor | None, target: Tensor | None, loss_scale: float | None = None
    ) -> None:
        self._target, self._delivered = target, False
        if self.scales:
            self._loss_scale = 1.0 if loss_scale is None and is_unscaled(loss, target) else loss_scale
        try:
            loss.backward()
        finally:
            self._target = self._loss_scale = None
            delivered, self._delivered = self._delivered, False
        if not delivered:
            raise ValueError(f"rule '{self.name}': the loss comes from no training forward pass of the attached model")

    def _answers(
        self, tape: dict[str, CapturedActivation], learned: list[LearnedTensor], logits: Tensor | None, delta: Tensor,
        tensors: tuple[Tensor, ...],
    ) -> list[Tensor | None]:
        """The errors at the logits and at all cuts, and the gradients of learned feedback, once the backward pass has δ."""
        target = self._target
        if delta.dim() != 2:
            raise CoverageError(f"rule '{self.name}' needs logits of shape (N, C); the model gave {tuple(delta.shape)}")
        if self._needs_target:
            if self._delivered:
                raise ValueError(f"rule '{self.name}': the loss depends on two forward passes, and the labels belong to one of "
                                 f"them: call rule.backward for each")
            if target is None or target.shape != delta.shape[:1] or target.is_floating_point():
                raise ValueError(f"rule '{self.name}' requires labels: call rule.backward(loss, logits, target) with class "
                                 f"indices of shape (N,)")
        device = delta.device.type
        if torch.is_autocast_enabled(device):  # the caller's: a backward pass has the precision of what it is made of
            with torch.autocast(device, enabled=False):
                return self._answers(tape, learned, logits, delta, tensors)
        if tensors:
            for kept, tensor in zip(tape.values(), tensors, strict=True):
                kept.tensor = tensor
        self._delivered = True
        answers: list[Tensor | None] = [self.output_error(delta)]
        gradients: list[Tensor | None] = []
        try:
            if logits is not None:
                known = self._loss_scale
                self.loss_factor = (
                    measured_scale(self.name, delta, logits.detach(), target, self.loss_factor) if known is None else known)
            sent = self.broadcast(delta, target)
            for cut, kept in tape.items():
                error, of_cut = self.answer(cut, kept, sent, delta, target, bool(learned))
                answers.append(error)
                gradients += of_cut
        except (IndexError, RuntimeError, ValueError):
            if self._needs_target and target is not None:
                self._check_labels(target, delta.shape[1])
            raise
        if tensors:
            for kept in tape.values():
                kept.tensor = None
        if learned:
            for one, gradient in zip(learned, gradients, strict=True):
                one.received(gradient)
        return answers + gradients

    def _check_labels(self, target: Tensor, classes: int) -> None:
        """Refuse labels outside [0, classes); called where something failed that is made of labels, which is to refuse them.

        On the CPU only: an accelerator that was given such a label answers no more.
        """
        if target.device.type != "cpu" or not len(target):
            return
        low, high = (int(bound) for bound in target.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"rule '{self.name}': label {low if low < 0 else high} is out of range: this model has {classes} "
                             f"classes, numbered from 0 to {classes - 1}; leave samples without a label out of the batch")

    # -------------------------------------------------------------------------------------------- feedback, metrics
    @property
    def feedback(self) -> dict[str, dict[str, Tensor]]:
        from fa_bench.mechanisms.layers import tensors_of

        return {cut: tensors_of(module) for cut, module in self._at.items()}

    def error_points(self, trace: Trace) -> dict[str, tuple[str, str]]:
        if self.side == INPUT:
            return super().error_points(trace)
        assert self._trace is not None
        return {layer: (cut, OUTPUT) for cut in self._at for layer in self._trace.feeds[cut]}

    def readouts(self) -> dict[str, Tensor]:
        return {} if self.side == INPUT else {cut: tensors["B"] for cut, tensors in self.feedback.items() if "B" in tensors}

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Only the output layer has such a pair, where the feedback of the last cut has its weight's shape."""
        assert self._trace is not None
        weights = {path: self.model.get_submodule(path).weight.detach() for path in self._trace.outputs}
        tensors = self.feedback.get(list(self._at)[-1], {})
        return {path: (tensors["B"], w) for path, w in weights.items() if "B" in tensors and tensors["B"].shape == w.shape}


def _made_of(result: Tensor, logits: Tensor | None) -> bool:
    """Whether one output of a model was computed from another."""
    if logits is None:
        return True
    visited, stack = set(), [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is logits.grad_fn:
            return True
        if node is not None and node not in visited:
            visited.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return False


@dataclasses.dataclass(slots=True)
class CapturedActivation:
    """What the hooks kept of one cut in one forward pass.

    Attributes:
        tensor: the tensor before it was detached, (N, ...); in `signal` only for rules that read its values.
        shape: its shape.
        output_shape: for a cut at an input, the shape of the module's output.
    """

    tensor: Any
    shape: torch.Size
    output_shape: tuple[int, ...] = ()
