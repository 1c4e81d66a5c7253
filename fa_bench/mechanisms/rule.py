"""What every rule is: its options, its life in a model, and the interface that the loop and the metrics use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from fa_bench.config.options import Options, option
from fa_bench.errors import CoverageError, FaBenchError, StateError, first_line, names
from fa_bench.lazy import torch
from fa_bench.mechanisms.coverage import RULE_ATTRIBUTE, Coverage, check_model, computed_weights, outside_text

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.layers import Mode
    from fa_bench.mechanisms.structure import Structure
    from fa_bench.mechanisms.trace import Trace
    from fa_bench.mechanisms.updates import LearnedFeedback
    from fa_bench.mechanisms.uses import UsesOfWeights

R = TypeVar("R", bound="Rule")

INPUT, OUTPUT = "input", "output"


class _Attached:
    """What a rule holds while it is in a model; no options."""

    if TYPE_CHECKING:
        model: nn.Module
        mode: Mode
        seed: int
        coverage: Coverage
        _trace: Trace | None
        _frozen: list[nn.Parameter]
        _handles: list[Any]
        _structure: Structure | None
        _passes: list[bool]
        _watch: UsesOfWeights | None
        _unwatched: bool
        _outside: dict[str, str]


@dataclasses.dataclass(eq=False)
class Rule(_Attached, Options):
    """A learning rule; its dataclass fields are its options.

    A rule is put into one model by `attach` and taken out by `detach`. `EdgeRule` and `CutRule` implement the two
    mechanisms that rules are made of.
    """

    allow_uncovered: bool | list[str] = option(
        False, "accept weights that the rule does not cover, all or those named (names, or patterns such as 'lstm.*'); they "
               "learn by their true local gradient")
    freeze_stem: bool = option(False, "the first layer keeps its initial weight and bias")

    def shortened(self: R, fraction: float) -> R:
        """The rule for a trial: what it does before training, at all its length in this one, takes `fraction` of that."""
        return self

    # -------------------------------------------------------------------------------------------- life in a model
    def attach(
        self: R, model: nn.Module, seed: int = 0, sample_input: Any = None, initial_phase: bool = True
    ) -> R:
        """Put the rule into `model`, in place.

        Args:
            model: a plain module: not wrapped for data-parallel training, not compiled, with no rule in it.
            seed: seed of the feedback; every tensor is drawn by (seed, layer, name).
            sample_input: one input batch (N, ...), a tuple of several arguments, or a dictionary of them by name; for rules that
                need to know what follows what.
            initial_phase: do at once what the rule does before training; else it is left to `initial_phase`.

        Raises:
            CoverageError: naming the layers, where the rule cannot be put in.
        """
        from fa_bench.mechanisms.layers import Mode
        from fa_bench.mechanisms.structure import Structure

        if torch.is_inference_mode_enabled():
            raise CoverageError("attach was called in torch.inference_mode(), where tensors cannot be trained: call it outside")
        if getattr(self, "model", None) is not None:
            raise CoverageError(f"this '{self.name}' rule object is in a model already; make another one")
        check_model(model)
        self.model, self.mode, self.seed = model, Mode(), seed
        self._trace = None
        self._frozen: list[nn.Parameter] = []
        self._handles: list[Any] = []
        self._structure, self._outside = None, {}
        self._passes, self._watch, self._unwatched = [], None, True
        try:
            if self.freeze_stem:
                stem = model.get_submodule(self.trace(sample_input).order[0])
                self.freeze(stem.parameters(recurse=False))
            self.coverage = self.put_in(sample_input).noting_frozen(model)
            self.coverage.require(self.allow_uncovered, model)
            for learned in self.learned_feedback():
                learned.lr_scale = self.feedback_lr_scale
            self._structure = Structure(self.name, model, self.watched_modules(), self._frozen)
            self.hook_model()
        except BaseException as error:
            self._leave()
            if isinstance(error, CoverageError) and (reasons := self._reasons(error, model)):
                raise CoverageError(f"{error.text} ({'; '.join(reasons)})", error.settings) from None
            raise
        setattr(model, RULE_ATTRIBUTE, self)
        if initial_phase:
            for _ in self.initial_phase():
                pass
        return self

    def _reasons(self, error: CoverageError, model: nn.Module) -> list[str]:
        """What else may have led to a refusal, where the error does not say it."""
        outside = {f"'{path}.weight' is": outside_text(use) for path, use in self._outside.items()}
        reasons = [computed_weights(model), *(f"{what} {why}" for what, why in outside.items() if why not in error.text)]
        return [reason for reason in reasons if reason]

    @property
    def initial_steps_left(self) -> int:
        """Steps that `initial_phase` will take."""
        return 0

    def initial_phase(self) -> Iterator[None]:
        """What the rule does before training, with a pause after every step; from where a loaded state stands."""
        return iter(())

    def detach(self) -> nn.Module:
        """Take the rule out: the model is the plain model again, with its present weights. Returns the model.

        Raises:
            CoverageError: where the rule is in no model.
        """
        model = getattr(self, "model", None)
        if model is None:
            raise CoverageError(f"this '{self.name}' rule object is in no model: it was detached already, or never attached")
        self._leave()
        delattr(model, RULE_ATTRIBUTE)
        return model

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.take_out()
        if self._structure is not None:
            self._structure.release()
        for parameter in self._frozen_now():
            parameter.requires_grad_(True)
        del self.model

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep parameters from learning, and from decaying, until the rule is detached."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def _frozen_now(self) -> list[nn.Parameter]:
        return self._structure.live() if self._structure is not None else self._frozen

    def put_in(self, sample_input: Any) -> Coverage:
        """Change `self.model`; implemented by the mechanism."""
        raise NotImplementedError

    def take_out(self) -> None:
        """Undo what `put_in` did, also where it stopped half way."""
        raise NotImplementedError

    def watched_modules(self) -> dict[str, nn.Module]:
        """{path: module} of the layers and cuts that must stay in the model while the rule is."""
        return {}

    # -------------------------------------------------------------------------------------------- every forward pass
    def hook_model(self) -> None:
        """Have `begin_forward` and `end_forward` called by every forward pass of the model."""
        self._handles += [self.model.register_forward_pre_hook(self.begin_forward, with_kwargs=True),
                          self.model.register_forward_hook(self.end_forward, always_call=True)]

    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Called before every forward pass of the model; refuses a model that was changed since `attach`."""
        mode = self.mode
        training = torch.is_grad_enabled() and not mode.exact
        if torch.compiler.is_compiling():
            mode.training = training
            return
        if not self._passes:
            mode.blind.clear()
            mode.ran.clear()
        self._passes.append(mode.training)
        if training:
            self._check_structure()
            if self._unwatched and self._watch is None and (layers := self.transporting_layers()):
                from fa_bench.mechanisms.uses import UsesOfWeights

                self._watch = UsesOfWeights(model, layers).__enter__()
        mode.training = training

    def end_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Called after every forward pass of the model, also where it failed; may return another output."""
        mode = self.mode
        mode.training = self._passes.pop() if self._passes else False
        if self._passes:  # the model called itself
            return
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.__exit__(None, None, None)
        if output is None:  # it failed
            return
        for path, layer in mode.blind.items() if mode.blind else ():
            if path not in mode.ran:
                from fa_bench.mechanisms.layers import require_gradients

                require_gradients(path, layer)
        if watch is not None:
            self._unwatched = False
            self.check_uses(watch.found(self.roots(output)).outside)

    def transporting_layers(self) -> dict[str, nn.Module]:
        """The layers whose weight must not carry the error by itself, by path."""
        return {}

    def roots(self, output: Any) -> list[Any]:
        """The autograd nodes from which a backward pass reaches the model."""
        from fa_bench.mechanisms.trace import tensors_in

        return [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]

    def _check_structure(self) -> None:
        if self._structure is not None:
            self._structure.check(bool(self.allow_uncovered))

    def check_uses(self, outside: dict[str, str]) -> None:
        """Refuse weights that the first training pass used outside their layers, see `Uses`: `attach` looked at an evaluation."""
        new = {f"{path}.weight": outside_text(use) for path, use in outside.items()}
        if new.keys() - self.coverage.uncovered.keys():
            coverage = dataclasses.replace(self.coverage, uncovered=self.coverage.uncovered | new)
            self._unwatched = True  # the next pass is looked at, too
            coverage.require(self.allow_uncovered, self.model)
            self.coverage, self._unwatched = coverage, False

    def notes(self) -> tuple[str, ...]:
        """What else to know about the rule in a model, for its coverage."""
        return ()

    # -------------------------------------------------------------------------------------------- training
    def backward(
        self, loss: Tensor, logits: Tensor | None = None, target: Tensor | None = None, loss_scale: float | None = None
    ) -> None:
        """Fill ``.grad`` of the weights and of learned feedback, adding to what is there as ``loss.backward()`` does.

        Args:
            loss: the scalar loss, scaled or not.
            logits: the model's output that the loss is made of, (N, C); cut rules need it.
            target: the labels, (N,); rules whose signal is made of them need it.
            loss_scale: what the loss was multiplied by (for gradient accumulation, by a gradient scaler); None: the rules whose
                errors are made of the labels find it out by themselves, where the loss is the mean cross-entropy times a number.
        """
        if self.mode.exact:
            loss.backward()
            return
        self._check_structure()
        self.deliver(loss, logits, target, loss_scale)

    def deliver(
        self, loss: Tensor, logits: Tensor | None, target: Tensor | None, loss_scale: float | None = None
    ) -> None:
        """Bring the rule's errors to every layer: the backward pass alone."""
        loss.backward()

    def step(self) -> None:
        """Whatever the rule does between updates; call it after ``optimizer.step()``.

        Raises:
            StateError: where the update left learned feedback out; see `fa_bench.mechanisms.updates`.
        """
        for learned in self.learned_feedback():
            learned.after_step()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within it forward and backward are true backpropagation, by ``loss.backward()`` and ``rule.backward`` alike.

        What the rule froze takes part.
        """
        before, self.mode.exact = self.mode.exact, True
        frozen = self._frozen_now()
        required = [parameter.requires_grad for parameter in frozen]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            self.mode.exact = before
            for parameter, was in zip(frozen, required, strict=True):
                parameter.requires_grad_(was)

    # -------------------------------------------------------------------------------------------- feedback
    @property
    def feedback(self) -> dict[str, dict[str, Tensor]]:
        """{layer or cut: {name: tensor}}, the live tensors: writing into them takes effect."""
        return {}

    def effective_feedback(self, layer: str) -> Tensor:
        """What really carries the error through `layer`, in the weight's layout, detached (edge rules)."""
        raise CoverageError(f"rule '{self.name}' carries no error backwards through layers such as '{layer}'")

    def learned_feedback(self) -> list[LearnedFeedback]:
        """The learned feedback tensors with what is known of them."""
        return []

    def feedback_parameters(self) -> list[Tensor]:
        """The learned feedback tensors: those of ``model.parameters()`` that the rule added."""
        return [learned.tensor for learned in self.learned_feedback()]

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer: the weights at the learning rate `lr`, and learned feedback at the rule's own part of it."""
        groups: list[dict[str, Any]] = [{"params": self.weight_parameters(), "lr": lr}]
        learned = self.feedback_parameters()
        return [*groups, {"params": learned, "lr": lr * self.feedback_lr_scale}] if learned else groups

    def weight_parameters(self) -> list[nn.Parameter]:
        """``model.parameters()`` without the learned feedback: those of the plain model."""
        learned = {id(tensor) for tensor in self.feedback_parameters()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in learned]

    def shared_gradients(self) -> list[tuple[Tensor, Tensor]]:
        """(learned feedback, weight) wherever the gradient of the one is that of the other, the same numbers."""
        return []

    @property
    def feedback_lr_scale(self) -> float:
        """Learning rate of the learned feedback relative to that of the weights."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """The rule's state that is not in ``model.state_dict()``: plain containers, values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, after the model's; a rule with state extends this check.

        Raises:
            StateError: naming the entries that are missing, and those that this rule does not have.
        """
        self.require_entries(state, self.state_dict())

    def require_entries(self, state: dict[str, Any], like: dict[str, Any]) -> None:
        """Raise StateError, as `load_state_dict`, where `state` has other entries than `like`."""
        wanted, given = _entries(like), _entries(state)
        found = {"missing": wanted - given, "unknown": given - wanted}
        faults = [f"{what}: {names(sorted(entries))}" for what, entries in found.items() if entries]
        if faults:
            raise StateError(f"not a state of rule '{self.name}' in this model ({'; '.join(faults)})")

    # -------------------------------------------------------------------------------------------- for the metrics
    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{layer: (effective feedback, weight)}, both in the weight's layout, where the rule has such a pair."""
        return {}

    def readouts(self) -> dict[str, Tensor]:
        """{cut: B (C, features)}: direct feedback, which also reads an estimate of the logits out of the cut's activation."""
        return {}

    def error_points(self, trace: Trace) -> dict[str, tuple[str, str]]:
        """{layer: (module, side)}: where the rule delivers the error at each layer's activation; side is input or output."""
        return {layer: (consumer, INPUT) for layer, consumer in trace.consumer.items()}

    def carried(self, layer: str, x: Tensor, g: Tensor, delta: Tensor) -> Tensor:
        """The error that the rule brings to the input of `layer` through it.

        Args:
            layer: its path.
            x: the layer's input.
            g: the rule's error at the layer's output.
            delta: the gradient of the loss at the logits, (N, C).
        """
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            return torch.autograd.grad(self.model.get_submodule(layer)(x), x, g)[0]

    # -------------------------------------------------------------------------------------------- structure
    def trace(self, sample_input: Any, watch: tuple[str, ...] = ()) -> Trace:
        """The model's structure from one sample forward.

        Without a sample, zeros of the width of the first layer serve where it is linear and nothing else is declared.

        Raises:
            CoverageError: where no sample can be made up, or the made-up one does not pass through the model.
        """
        from fa_bench.mechanisms.coverage import not_coverable
        from fa_bench.mechanisms.layers import require_gradients, weighted_layers
        from fa_bench.mechanisms.trace import trace_model

        output = None if (given := getattr(self, "output", None)) is None else str(given)

        def traced(sample: Any) -> Trace:
            with self.exact():
                trace = trace_model(self.model, sample, watch, output, self._frozen_now())
            for blind in trace.without_gradients:
                require_gradients(blind, self.model.get_submodule(blind))
            self._outside = trace.uses.outside
            return trace

        if sample_input is not None:
            return traced(sample_input)
        layers = weighted_layers(self.model)
        path, first = next(iter(layers.items()), ("", None))
        if first is None:
            raise CoverageError(f"rule '{self.name}' covers no layer of this model: {not_coverable(self.model)}")
        needed = f"rule '{self.name}' needs sample_input, one input batch, to see what follows layer '{path}'"
        if not isinstance(first, torch.nn.Linear):
            raise CoverageError(needed)
        try:
            return traced(first.weight.new_zeros(2, first.in_features))
        except FaBenchError:
            raise
        except Exception as error:  # whatever the model says to an input that is not its own
            raise CoverageError(f"{needed}; zeros of shape (2, {first.in_features}) do not pass through the model "
                                f"({first_line(error)})") from None


def _entries(state: Any, path: str = "") -> set[str]:
    """The paths of a nested state's values; an empty mapping counts as nothing."""
    if not isinstance(state, Mapping):
        return {path or type(state).__name__}
    return {entry for key, value in state.items() for entry in _entries(value, f"{path}.{key}" if path else str(key))}
