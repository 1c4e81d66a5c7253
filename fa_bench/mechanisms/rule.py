"""The base class of all rules: its options, attaching, and the interface for training loops and metrics."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fa_bench.errors import CoverageError, OptionError, StateError, missing_method, names
from fa_bench.mechanisms.checkpointing import recomputing
from fa_bench.mechanisms.coverage import Coverage, computed_weights, outside_text
from fa_bench.mechanisms.graph import tensors_in
from fa_bench.mechanisms.running import RunningPass
from fa_bench.mechanisms.structure import RULE_ATTRIBUTE, Structure, check_model
from fa_bench.mechanisms.updates import STEP_MISSED, StepReminder
from fa_bench.objectives.base import as_objective
from fa_bench.registry.options import Options, option
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.second_pass import FirstPass
    from fa_bench.mechanisms.trace import StepMemory, Trace
    from fa_bench.mechanisms.updates import LearnedTensor
    from fa_bench.objectives.base import Objective

R = TypeVar("R", bound="Rule")

INPUT, OUTPUT = "input", "output"


@dataclasses.dataclass(eq=False)
class Rule(Options):
    """A learning rule; its dataclass fields are its options.

    `attach` wires a rule into one model, and `detach` removes it. `EdgeRule` and `CutRule` implement the two mechanisms.

    Examples:
        >>> import torch, fa_bench
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> rule = fa_bench.attach(model, "fa")
        >>> print(rule.coverage)
        fa covers 2 layers, every weight
          layer  type    weight  its error
          0      Linear  3x4     passes through fixed B
          2      Linear  2x3     passes through fixed B
        >>> logits = model(torch.ones(5, 4))
        >>> rule.backward(logits.square().mean(), logits)
        >>> model[0].weight.grad.shape
        torch.Size([3, 4])
        >>> rule.effective_feedback("2").shape
        torch.Size([2, 3])
        >>> with rule.exact():
        ...     model(torch.ones(5, 4)).square().mean().backward()
        >>> rule.detach() is model
        True
    """

    #: Whether reports warn about rules whose test score is not better than that of this one.
    is_floor: ClassVar[bool] = False
    #: Whether the rule runs the model again in the backward pass; see `fa_bench.mechanisms.second_pass`.
    repeats: ClassVar[bool] = False
    #: The update in LaTeX for the rule's page. Each entry is one row of an ``aligned`` environment, and ∇ is the gradient that
    #: the optimizer receives.
    equations: ClassVar[tuple[str, ...]] = ()

    allow_uncovered: bool | list[str] = option(
        False,
        "accept weights that the rule does not cover: true for all, or names (or patterns such as 'lstm.*') for some; they "
        "learn from their true local gradient",
    )
    freeze_stem: bool = option(False, "the first layer keeps its initial weight and bias")

    def shortened(self: R, fraction: float) -> R:
        """The rule for a short trial run. An initial phase, if there is one, is shortened to `fraction` of its length."""
        return self

    @property
    def needs_indices(self) -> bool:
        """Whether errors depend on which training samples a batch contains; if so, `backward` needs their indices."""
        return False

    @property
    def sample_count(self) -> int | None:
        """The number of training samples, for rules with `needs_indices`; None if it is not known."""
        return None

    def expect_samples(self, count: int) -> None:
        """Called by the runner before `attach` with the number of training samples. Override this method in rules that store data
        for each sample.

        Raises:
            OptionError: if this number contradicts an option of the rule.
        """

    # -------------------------------------------------------------------------------------------- attach and detach
    def attach(
        self: R,
        model: nn.Module,
        seed: int = 0,
        sample_input: Any = None,
        initial_phase: bool = True,
        objective: str | Objective | None = None,
    ) -> R:
        """Attach the rule to `model`, in place, and return the rule.

        Args:
            model: a plain module, neither wrapped for data-parallel training nor compiled, and without a rule.
            seed: seed of the feedback; each tensor has its own seed, derived from (seed, layer or cut, name).
            sample_input: one input batch (N, ...), or a tuple or dictionary of several arguments; for rules that depend on the
                order of the layers.
            initial_phase: whether to run the rule's initial phase now; otherwise, the caller runs the method `initial_phase`.
            objective: the objective (or the name of the objective) that the model is trained with, for rules that use the labels;
                None: cross-entropy.

        Raises:
            CoverageError: if the rule cannot be attached; the message states the reason.
            ConfigError: for the name of an unknown objective.
            OptionError: if the rule and the objective name different outputs of the model, or if `objective` is neither a name
                nor an objective.
        """
        from fa_bench.mechanisms.compound.expansion import expand
        from fa_bench.mechanisms.weighted_layers import Mode

        if torch.is_inference_mode_enabled():
            raise CoverageError(
                "attach was called in torch.inference_mode(), whose tensors cannot be trained; call attach outside of it"
            )
        if getattr(self, "model", None) is not None:
            raise CoverageError(f"this '{self.name}' rule object is already attached to a model; create another one")
        check_model(model)
        objective = as_objective(objective)
        own_output = getattr(self, "output", None)
        self._take_output_of(objective)
        self._own_output = own_output
        self.model, self.mode, self.seed, self.objective = model, Mode(self.name), seed, objective
        expand(model, self.mode)
        self._frozen, self._handles = [], []
        self._structure, self._uses_outside = None, {}
        #: If the rule repeats passes, the training pass that is running or, while errors or gradients are being computed, the
        #: pass to which they belong.
        self.first_pass: FirstPass | None = None
        self.indices: Tensor | None = None
        self._passes, self._uses_watch, self._uses_unchecked = [], None, True
        try:
            if self.freeze_stem:
                stem = model.get_submodule(self.trace(sample_input).order[0])
                self.freeze(stem.parameters(recurse=False))
            self.coverage = self.wire(sample_input).with_frozen(model)
            self.coverage.require(self.allow_uncovered, model)
            for learned in self.learned_feedback():
                learned.lr_scale = self.feedback_lr_scale
            self._structure = Structure(self.name, model, self.watched_modules(), self._frozen)
            self._step_reminder = StepReminder(self.weight_parameters())
            self.hook_model()
        except BaseException as error:
            self._remove()
            if isinstance(error, CoverageError) and (causes := self._other_causes(error, model)):
                raise CoverageError(f"{error.text} ({'; '.join(causes)})", error.settings) from None
            raise
        setattr(model, RULE_ATTRIBUTE, self)
        if initial_phase:
            for _ in self.initial_phase():
                pass
        return self

    def _other_causes(self, error: CoverageError, model: nn.Module) -> list[str]:
        """Further possible causes of an error that its message does not mention."""
        outside = {f"'{weight}' is": outside_text(use) for weight, use in self._uses_outside.items()}
        causes = [computed_weights(model), *(f"{what} {why}" for what, why in outside.items() if why not in error.text)]
        return [cause for cause in causes if cause]

    @property
    def initial_steps_left(self) -> int:
        """The number of steps that remain in `initial_phase`."""
        return 0

    def initial_phase(self) -> Iterator[None]:
        """The work that the rule does before training, as a generator that yields once per step. After a state has been loaded,
        the generator continues from there."""
        return iter(())

    def detach(self) -> nn.Module:
        """Remove the rule and return the model, which is then the plain model with its current weights.

        Raises:
            CoverageError: if the rule is not attached.
        """
        model = getattr(self, "model", None)
        if model is None:
            raise CoverageError(f"this '{self.name}' rule object is not attached: it was already detached, or never attached")
        self._remove()
        delattr(model, RULE_ATTRIBUTE)
        return model

    def _remove(self) -> None:
        from fa_bench.mechanisms.compound.expansion import contract

        self._end_interrupted()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.unwire()
        contract(self.model)
        if self._structure is not None:
            self._structure.release()
        for parameter in self._frozen_now():
            parameter.requires_grad_(True)
        if hasattr(self, "output"):
            self.output = self._own_output  # which may have come from the objective
        del self.model

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Freeze parameters until the rule is detached: they neither learn nor decay."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def _frozen_now(self) -> list[nn.Parameter]:
        return self._structure.current_parameters() if self._structure is not None else self._frozen

    def wire(self, sample_input: Any) -> Coverage:
        """Wire the rule into `self.model` and return its coverage; implemented by the mechanism."""
        raise missing_method(self, "wire")

    def unwire(self) -> None:
        """Undo `wire`, even if it failed."""
        raise missing_method(self, "unwire")

    def watched_modules(self) -> dict[str, nn.Module]:
        """The layers and cuts, by path, that must stay in the model while the rule is attached."""
        return {}

    # -------------------------------------------------------------------------------------------- every forward pass
    def hook_model(self) -> None:
        """Register `begin_forward` and `end_forward` as hooks of the model's forward pass."""
        from fa_bench.mechanisms.compiled import guard_hooks

        guard_hooks()
        self._handles += [
            self.model.register_forward_pre_hook(self.begin_forward, with_kwargs=True),
            self.model.register_forward_hook(self.end_forward, always_call=True),
        ]

    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """Called before every forward pass of the model; may return different arguments (args, kwargs) for the pass.

        Raises:
            CoverageError: if the model has changed since `attach`, or is being compiled although this rule cannot be.
        """
        mode = self.mode
        training = torch.is_grad_enabled() and not mode.exact
        if torch.compiler.is_compiling():
            from fa_bench.mechanisms.compiled import refuse_repeats, refuse_version, too_old_to_compile

            if self.repeats:
                refuse_repeats(self.name)
            if problem := too_old_to_compile():
                refuse_version(self.name, problem)
            # New containers are created, because a compiled graph depends on the contents of existing ones.
            mode.training, mode.with_gradients, mode.without_gradients, mode.seeds = training, set(), {}, {}
            return
        self._end_interrupted()
        is_outermost = not self._passes
        if is_outermost:
            mode.without_gradients.clear()
            mode.with_gradients.clear()
        self._passes.append(RunningPass.begin(mode.training))
        if training:
            self._check_structure()
            if is_outermost and self._step_reminder.is_missed() and self.needs_step:
                warnings.warn(f"rule '{self.name}': {STEP_MISSED}", stacklevel=3)
            if self.repeats and is_outermost and not recomputing():
                from fa_bench.mechanisms.second_pass import FirstPass

                self.first_pass = FirstPass(self.name, model, args, kwargs)
            if self._uses_unchecked and self._uses_watch is None and (layers := self.transporting_layers()):
                from fa_bench.mechanisms.uses import UsesOfWeights

                self._uses_watch = UsesOfWeights(model, layers).__enter__()
        mode.training = training

    def _end_interrupted(self) -> None:
        """Do the work of `end_forward` for passes that were interrupted before they reached it."""
        while self._passes and not self._passes[-1].is_running():
            self.end_forward(self.model, (), None)

    def end_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Called after every forward pass of the model, even if it failed; may return a different output."""
        mode = self.mode
        mode.training = self._passes.pop().training if self._passes else False
        if torch.compiler.is_compiling():
            mode.seeds = {}
        if self._passes:  # the model called itself
            return
        watch, self._uses_watch = self._uses_watch, None
        if watch is not None:
            watch.__exit__(None, None, None)
        if output is None:  # the forward pass failed
            return
        for path, layer in mode.without_gradients.items() if mode.without_gradients else ():
            if path not in mode.with_gradients:
                from fa_bench.mechanisms.weighted_layers import require_gradients

                require_gradients(path, layer)
        if watch is not None:
            self._uses_unchecked = False
            self.check_uses(watch.result(self.roots(output)).outside)

    def transporting_layers(self) -> dict[str, Any]:
        """The layers, by path, whose weights must not be used elsewhere in the model, because an error would then pass through
        the weights."""
        return {}

    def roots(self, output: Any) -> list[Any]:
        """The autograd nodes at which a backward pass enters the model."""
        return [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]

    def _check_structure(self) -> None:
        if self._structure is not None:
            self._structure.check(bool(self.allow_uncovered))

    def check_uses(self, outside: dict[str, str]) -> None:
        """Refuse weights that the first training pass uses outside their layers, unless they may be uncovered. `attach` traced
        at most an evaluation pass."""
        new = {self._weight_name(path): outside_text(use) for path, use in outside.items()}
        if new.keys() - self.coverage.uncovered.keys():
            coverage = dataclasses.replace(self.coverage, uncovered=self.coverage.uncovered | new)
            self._uses_unchecked = True  # so that the next pass is checked, too
            coverage.require(self.allow_uncovered, self.model)
            self.coverage, self._uses_unchecked = coverage, False

    def _weight_name(self, path: str) -> str:
        from fa_bench.mechanisms.weighted_layers import weight_name

        return weight_name(path, self.model.get_submodule(path))

    def notes(self) -> tuple[str, ...]:
        """Notes below the coverage table."""
        return ()

    # -------------------------------------------------------------------------------------------- training
    def backward(
        self,
        loss: Tensor,
        logits: Tensor | None = None,
        target: Tensor | None = None,
        loss_scale: float | None = None,
        indices: Tensor | None = None,
    ) -> None:
        """Add the rule's gradients to ``.grad`` of the weights and of learned feedback, as ``loss.backward()`` does.

        Args:
            loss: the scalar loss, possibly scaled.
            logits: the output of the model from which the loss was computed, (N, C), or (N, T, C) or (N, C, H, W) if it has
                positions; some edge rules need it to infer the scale of the loss.
            target: the targets of the loss: labels (N,), a label for each position, or real values (N, O). Some rules compute
                errors, or infer the scale of the loss, from them.
            loss_scale: the factor by which gradient accumulation or a gradient scaler has scaled the loss; None: rules that need
                it infer it, if the loss is the objective's mean times a number.
            indices: the indices of the batch's samples in the training set, integers (N,) from 0, which must be the same in every
                epoch; for rules with `needs_indices`.

        Raises:
            CoverageError: if the rule is not attached to a model, or if the model has changed since `attach`.
        """
        if getattr(self, "model", None) is None:
            raise CoverageError(f"this '{self.name}' rule object is not attached to a model: after detach, call loss.backward()")
        if self.mode.exact:
            loss.backward()
            return
        self._check_structure()
        if target is not None and not target.is_floating_point():
            target = target.long()  # labels may have any integer type
        if self.needs_indices:
            with self.of_samples(indices):
                self.deliver(loss, logits, target, loss_scale)
        else:
            self.deliver(loss, logits, target, loss_scale)

    @contextmanager
    def of_samples(self, indices: Tensor | None) -> Iterator[None]:
        """A context in which `deliver` computes the errors of the training samples with these indices; see `backward`."""
        from fa_bench.mechanisms.contexts import set_temporarily

        with set_temporarily([self], "indices", indices):
            yield

    def deliver(self, loss: Tensor, logits: Tensor | None, target: Tensor | None, loss_scale: float | None = None) -> None:
        """The rule's backward pass."""
        loss.backward()

    def counts(self) -> dict[str, int]:
        """Counts of events since training began, by name, for the record of a run."""
        return {}

    def begin_epoch(self, epoch: int) -> None:
        """Called by the runner before every epoch; `epoch` counts from 0. Override this method in rules that change during
        training."""

    @property
    def needs_step(self) -> bool:
        """Whether `step` does more than check the update, in which case a warning is issued if a training loop omits it."""
        return False

    def step(self) -> None:
        """Do the rule's work between updates. Call this method after ``optimizer.step()``.

        Raises:
            StateError: if the update did not train the learned feedback; see `fa_bench.mechanisms.updates`.
        """
        self._step_reminder.on_step()
        for learned in self.learned_feedback():
            learned.after_step()

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, from which scores are computed; rules that predict in a different way override this method.

        Args:
            *args: positional arguments of the model.
            **kwargs: keyword arguments of the model.
        """
        return self.model(*args, **kwargs)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """A context in which the model trains by true backpropagation, with ``loss.backward()`` as well as ``rule.backward``.

        Parameters that the rule has frozen also get gradients.
        """
        from fa_bench.mechanisms.contexts import set_temporarily

        with set_temporarily([self.mode], "exact", True), set_temporarily(self._frozen_now(), "requires_grad", True):
            yield

    # -------------------------------------------------------------------------------------------- feedback
    @property
    def feedback(self) -> dict[str, dict[str, Tensor]]:
        """The feedback tensors by layer or cut, and then by name. The tensors are live, so changing them in place takes effect,
        except for tensors that are computed from the weight, such as those of `usf`."""
        return {}

    def effective_feedback(self, layer: str) -> Tensor:
        """The tensor that multiplies the error in the backward pass of `layer`, in the weight's layout, detached; only for edge
        rules."""
        raise CoverageError(f"rule '{self.name}' does not propagate errors through layers such as '{layer}'")

    def learned_feedback(self) -> list[LearnedTensor]:
        """The learned feedback tensors, with their learning rates and checks."""
        return []

    def feedback_parameters(self) -> list[Tensor]:
        """The learned feedback tensors: the parameters of the model that the rule has added."""
        return [learned.tensor for learned in self.learned_feedback()]

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, with the weights at the learning rate `lr` and the learned feedback at
        `feedback_lr_scale` times `lr`."""
        groups: list[dict[str, Any]] = [{"params": self.weight_parameters(), "lr": lr}]
        learned = self.feedback_parameters()
        return [*groups, {"params": learned, "lr": lr * self.feedback_lr_scale}] if learned else groups

    def _take_output_of(self, objective: Objective) -> None:
        """Take errors from the output that the objective names, if the rule has the option ``output``."""
        own, trained = getattr(self, "output", None), objective.output
        if own is not None and trained is not None and str(own) != str(trained):
            raise OptionError("output", f"={own} conflicts with output={trained} of the objective; set only one of them")
        if hasattr(self, "output") and trained is not None:
            self.output = str(trained)

    @property
    def loss_output(self) -> str | int | None:
        """The name of the model's output from which the loss is computed, which is set by an option of the objective or of the
        rule."""
        return self.objective.output if self.objective.output is not None else getattr(self, "output", None)

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters of the plain model: ``model.parameters()`` without the learned feedback."""
        learned = {id(tensor) for tensor in self.feedback_parameters()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in learned]

    def matrices(self) -> dict[str, list[Tensor]]:
        """A mapping from each layer or cut to a list of its weight, if it has one, and its learned tensors of two or more
        dimensions. The model's layers come first."""
        from fa_bench.mechanisms.weighted_layers import weight_parameter, weighted_layers

        weights = {path: weight_parameter(layer) for path, layer in weighted_layers(self.model).items()}
        found: dict[str, list[Tensor]] = {path: [weight] for path, weight in weights.items() if weight is not None}
        for learned in self.learned_feedback():
            if learned.tensor.dim() >= 2:
                found.setdefault(learned.path, []).append(learned.tensor)
        return found

    def end_layers(self) -> set[str]:
        """The first and the last layer in the order in which the model defines them."""
        from fa_bench.mechanisms.weighted_layers import weighted_layers

        layers = list(weighted_layers(self.model))
        return {*layers[:1], *layers[-1:]}

    def shared_gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a learned feedback tensor and a weight that have identical gradients."""
        return []

    @property
    def feedback_lr_scale(self) -> float:
        """The learning rate of the learned feedback relative to that of the weights, which is the option `b_lr_scale` if there is
        one, and 1 otherwise."""
        return getattr(self, "b_lr_scale", 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The part of the rule's state that is not in ``model.state_dict()``, as plain containers, values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`, after the model's state; rules with state extend this method.

        Raises:
            StateError: if entries are missing or unknown; the message names them.
        """
        self.require_entries(state, self.state_dict())

    def require_entries(self, state: dict[str, Any], expected_state: dict[str, Any]) -> None:
        """Raise a StateError if `state` does not have the entries of `expected_state`."""
        expected, given = _entries(expected_state), _entries(state)
        differences = {"missing": expected - given, "unknown": given - expected}
        faults = [f"{what}: {names(sorted(entries))}" for what, entries in differences.items() if entries]
        if faults:
            raise StateError(f"not a state of rule '{self.name}' in this model ({'; '.join(faults)})")

    # -------------------------------------------------------------------------------------------- for the metrics
    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A mapping from layers to pairs (effective feedback, weight), both detached and in the weight's layout, for the layers
        that have both."""
        return {}

    def readouts(self) -> dict[str, Tensor]:
        """A mapping from each cut with direct feedback B (C, features) to B, detached. Metrics compare the product a Bᵀ, where a
        is the cut's activation, with the logits."""
        return {}

    def readout_rows(self, cut: str, activation: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A cut's activation a as a matrix (M, features), and the logits (M, C) that are compared with a Bᵀ. Both have one row
        for each sample and position."""
        return activation.flatten(1), logits

    def error_points(self, trace: Trace) -> dict[str, tuple[str, str]]:
        """A mapping from each layer to the module and the side, input or output, at which the rule delivers the error of the
        layer's activation."""
        return {layer: (consumer, INPUT) for layer, consumer in trace.consumer.items()}

    def input_error(self, layer: str, x: Tensor, g: Tensor, delta: Tensor) -> Tensor:
        """The error that the rule passes through `layer` to its input.

        Args:
            layer: the layer's path.
            x: the layer's input.
            g: the rule's error at the layer's output.
            delta: the gradient of the loss at the logits, (N, C).
        """
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            return torch.autograd.grad(self.model.get_submodule(layer)(x), x, g)[0]

    def step_memory(self, model: nn.Module, trace: Trace) -> StepMemory | None:
        """The layers of the plain model whose tensors a training step of the rule keeps or reads, or None if the rule does not
        define them."""
        return None

    # -------------------------------------------------------------------------------------------- structure
    def trace(self, sample_input: Any, watch: tuple[str, ...] = ()) -> Trace:
        """The model's structure, from one forward pass of the sample; see `fa_bench.mechanisms.trace.trace_attached`."""
        from fa_bench.mechanisms.trace import trace_attached

        with self.exact():
            trace = trace_attached(self, sample_input, watch, self._frozen_now())
        self._uses_outside = {self._weight_name(path): use for path, use in trace.uses.outside.items()}
        return trace


def _entries(state: Any, path: str = "") -> set[str]:
    """The paths of a nested state's values; empty mappings are ignored."""
    if not isinstance(state, Mapping):
        return {path or type(state).__name__}
    return {entry for key, value in state.items() for entry in _entries(value, f"{path}.{key}" if path else str(key))}
