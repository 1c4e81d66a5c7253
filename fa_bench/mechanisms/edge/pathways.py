"""Feedback pathways, which determine a layer's effective feedback, the tensor that passes the error to the layer below.

Every effective feedback has the layout of the layer's weight: (O, I) for linear layers, (O, I/groups, K...) for convolutions and
(I, O/groups, K...) for transposed ones. The forward pass asks the layer's pathway for a `BackwardContext`, which holds everything
that the backward pass needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fa_bench.errors import missing_method
from fa_bench.mechanisms.checkpointing import recomputing, refuse_reentrant
from fa_bench.mechanisms.edge.checks import require_b, require_shape
from fa_bench.mechanisms.feedback_tensors import feedback_tensor, fixed_tensor_reader
from fa_bench.utils.lazy import torch
from fa_bench.utils.sampling import magnitudes, resample_magnitudes, seed_for, seed_words

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.mechanisms.updates import LearnedTensor


class FeedbackGradient(NamedTuple):
    """Describes how the gradient of a learned feedback tensor is computed, by default in the same way as that of the weight.

    Attributes:
        learned: the learned tensor. It is an input of the layer's autograd Function, so that autograd accumulates its gradient,
            and hooks, gradient scalers and DistributedDataParallel see it. If the weight is frozen, a tensor that follows it gets
            no gradient.
        activation: returns the activation that replaces the layer's input in the gradient, in the input's shape.
        first_hop: B, if the learned tensor is the factor R of a product B R; ē = g B then replaces g in the gradient. The layout
            of B is described in `fa_bench.mechanisms.edge.product`.
        of_errors: computes the gradient from the errors at the layer's output, (samples and positions, O), if it depends only on
            them.
        of_input: computes the gradient from the layer's input, its `Geometry` (None for a linear layer) and `rows`, if it depends
            only on them and on the layer's tensors.
        rows: the layer's outputs that this call computes, if the tensor has a row for each of them; None for all.
        error_scale: returns a factor; this factor times the error at the layer's input is added to `activation`. None: nothing is
            added.
    """

    learned: LearnedTensor
    activation: Callable[[], Tensor] | None = None
    first_hop: Tensor | None = None
    of_errors: Callable[[Tensor], Tensor] | None = None
    of_input: Callable[[Tensor, Any, slice | None], Tensor] | None = None
    rows: slice | None = None
    error_scale: Callable[[], float] | None = None

    @property
    def input(self) -> Tensor:
        """The learned tensor, or its `rows`, as an input of the autograd Function."""
        return self.learned.tensor if self.rows is None else self.learned.tensor[self.rows]


class BackwardContext(NamedTuple):
    """The data that one forward pass of a layer passes to its backward pass.

    Attributes:
        feedback: the effective feedback; for a linear layer with `second_hop`, its first factor.
        from_weight: computes the effective feedback from the weight, in the backward pass; replaces `feedback`.
        second_hop: the second factor of a linear layer's effective feedback.
        activation: returns the activation that replaces the layer's input in the weight gradient.
        gradients: how the gradient of each learned tensor is computed.
        local_gradient: computes a term that is added to the weight's gradient, from the same arguments as
            `FeedbackGradient.of_input`.
    """

    feedback: Tensor | None = None
    from_weight: Callable[[Tensor], Tensor] | None = None
    second_hop: Tensor | None = None
    activation: Callable[[], Tensor] | None = None
    gradients: tuple[FeedbackGradient, ...] = ()
    local_gradient: Callable[[Tensor, Any, slice | None], Tensor] | None = None


class FeedbackPathway:
    """Computes the effective feedback of one layer. The feedback tensors belong to the layer, not to its pathway.

    Subclasses implement `effective`, or both `context` and `effective` if the backward pass needs more than one tensor.

    Attributes:
        description: the tensor that the error passes through, in a few words, for the coverage table.
        learned: names of the tensors that the optimizer trains.
        follows: the name in `learned` of the tensor whose gradient is exactly that of the weight; None if there is no such
            tensor.
        always_needed: whether the layer needs `context` even if no error is needed at its input.

    Examples:
        >>> import dataclasses, torch, fa_bench
        >>> class Negative(fa_bench.FeedbackPathway):
        ...     description = "the negative weight"
        ...
        ...     def effective(self, layer):
        ...         return -layer.weight.detach()
        >>> @dataclasses.dataclass(eq=False)
        ... class Wrong(fa_bench.EdgeRule):
        ...     def pathway(self, layer):
        ...         return Negative()
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> rule = fa_bench.attach(model, Wrong())
        >>> bool((rule.effective_feedback("1") == -model[1].weight).all())
        True
    """

    description = "its own tensors"
    learned: tuple[str, ...] = ()
    follows: str | None = None
    always_needed = False

    def describe(self) -> str:
        """A short description of the tensor that the error passes through, and of the learned tensors, for the coverage table."""
        if self.learned == (self.description,):
            return f"learned {self.description}"
        return self.description + (f" ({', '.join(self.learned)} learned)" if self.learned else "")

    def check(self, layer: Any) -> None:
        """Check the feedback tensors of a layer; called by `attach` after `pathway`.

        Raises:
            ComponentError: if a tensor is missing, or if the effective feedback does not have the shape of the weight.
        """
        if type(self).context is FeedbackPathway.context:  # otherwise, `effective` may be slow, and is not used in training
            require_shape(layer, f"{type(self).__qualname__}.effective returned", self.effective(layer))

    def effective(self, layer: Any) -> Tensor:
        """The current effective feedback, in the weight's layout, detached."""
        raise missing_method(self, "effective")

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        """The context that the layer's backward pass needs; `x` is the layer's input."""
        return BackwardContext(self.effective(layer))

    def effective_context(self, layer: Any, x: Tensor, gradients: tuple[FeedbackGradient, ...]) -> BackwardContext:
        """A context with `effective` as the feedback, computed only if the backward pass needs an error at the input."""
        return BackwardContext(self.effective(layer) if x.requires_grad else layer.weight.detach(), gradients=gradients)

    def forward(
        self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The layer's output, computed so that the backward pass uses `context`."""
        return layer.apply_feedback(x, weight, bias, context, *args, **kwargs)

    def before_forward(self, layer: Any) -> None:
        """Called before the layer runs in training mode with gradients enabled, except in `Rule.exact` and in measurements."""

    def observe(self, layer: Any, x: Tensor) -> None:
        """Called with the input of a frozen layer that runs without gradients in a training forward pass of the model."""

    def materialize(self, layer: Any) -> None:
        """Bring the layer's tensors up to date; called before they are read from outside."""

    def needs_step(self, layer: Any) -> bool:
        """Whether `after_step` does anything."""
        return False

    def after_step(self, layer: Any) -> None:
        """Called after every update if the layer has learned tensors."""

    def derived(self, layer: Any) -> dict[str, Tensor]:
        """Tensors that are computed rather than stored, but still appear in ``rule.feedback``; writing to them has no effect."""
        return {}

    def state(self) -> dict[str, Any]:
        """Plain values that a checkpoint needs in addition to the tensors."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""


class FixedFeedback(FeedbackPathway):
    """The error e_in = g B with a fixed B.

    Examples:
        >>> import torch, fa_bench
        >>> rule = fa_bench.attach(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), "fa")
        >>> list(rule.feedback_parameters())
        []
    """

    description = "fixed B"
    effective = fixed_tensor_reader("B")

    def check(self, layer: Any) -> None:
        require_b(self, layer)


class LearnedFeedback(FeedbackPathway):
    """The error e_in = g B with a learned B, whose gradient is exactly the gradient of W.

    Examples:
        >>> import torch, fa_bench
        >>> rule = fa_bench.attach(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), "kp")
        >>> [tuple(parameter.shape) for parameter in rule.feedback_parameters()]
        [(3, 4), (2, 3)]
    """

    description = "B"
    learned = ("B",)
    follows = "B"
    always_needed = True

    def check(self, layer: Any) -> None:
        require_b(self, layer)

    def effective(self, layer: Any) -> Tensor:
        return feedback_tensor(layer, "B")

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        return BackwardContext(layer.learned["B"].tensor, gradients=feedback_gradient(layer, "B"))


def feedback_gradient(
    layer: Any,
    name: str,
    activation: Callable[[], Tensor] | None = None,
    first_hop: Tensor | None = None,
    of_errors: Callable[[Tensor], Tensor] | None = None,
    of_input: Callable[[Tensor, Any, slice | None], Tensor] | None = None,
) -> tuple[FeedbackGradient, ...]:
    """The `FeedbackGradient` of the learned feedback tensor `name`, in a tuple. The tuple is empty if the tensor gets no separate
    gradient, as with `Mode.freeze_random`.

    Raises:
        StateError: if the tensor was frozen because its weight was, and the weight is trained now.
    """
    if layer.mode.freeze_random:
        return ()
    learned = layer.learned[name]
    if learned.is_frozen and layer.weight.requires_grad:
        learned.require_trainable()
    if learned.shares_gradient:
        return ()
    return (FeedbackGradient(learned, activation, first_hop, of_errors, of_input),)


class TransposeFeedback(FeedbackPathway):
    """The error e_in = g W, which is backpropagation through this layer."""

    description = "the weight"

    def effective(self, layer: Any) -> Tensor:
        return layer.weight.detach()


class WeightDerivedFeedback(FeedbackPathway):
    """B is computed from the weight in the backward pass, just before the multiplication, so that B is still in the cache.

    The weight of the forward pass is used. As in backpropagation, autograd raises an error if the weight was changed in place
    before the backward pass.
    """

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        return BackwardContext(from_weight=functools.partial(self.derive, layer))

    def effective(self, layer: Any) -> Tensor:
        return self.derive(layer, layer.weight.detach())

    def derive(self, layer: Any, weight: Tensor) -> Tensor:
        """B computed from this weight, masked if the layer has a mask."""
        return _masked(layer, self.unmasked(layer, torch.sign(weight)))

    def unmasked(self, layer: Any, signs: Tensor) -> Tensor:
        """B before masking, computed from the signs of the weight; `signs` may be overwritten."""
        raise missing_method(self, "unmasked")


def _masked(layer: Any, feedback: Tensor) -> Tensor:
    """The feedback, multiplied in place by the layer's mask if there is one."""
    mask = feedback_tensor(layer, "mask")
    return feedback if mask is None else feedback.mul_(mask)


class SignFeedback(WeightDerivedFeedback):
    """B = s sign(W) for the current weight, where sign(0) is 0.

    Args:
        scale: s, a positive number.
    """

    description = "the signs of the weight"

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def unmasked(self, layer: Any, signs: Tensor) -> Tensor:
        return signs.mul_(self.scale)

    def derived(self, layer: Any) -> dict[str, Tensor]:
        return {"B": self.effective(layer)}


class SignedMagnitudeFeedback(WeightDerivedFeedback):
    """B = |M| sign(W) for the current weight.

    Args:
        resample: initialiser that samples a new M at every training forward pass; None keeps M.
        seed: the layer's seed for new samples; sample k depends on the seed and k only.
    """

    description = "the signs of the weight with magnitudes M"

    def __init__(self, resample: str | None = None, seed: int = 0) -> None:
        self.resample, self.seed, self.draws = resample, seed, 0
        # M is sampled only when it is read, so that nothing is sampled for the first layer, which passes no error on.
        self._is_due = False
        self._known_positive: tuple[int, int] | None = None
        if resample is not None:
            from fa_bench.mechanisms.compiled import Handle

            self._handle = Handle(self)

    def before_forward(self, layer: Any) -> None:
        if self.resample is None:
            return
        # A recurrent layer runs in every time step, and all steps of a pass share one sample.
        mode = layer.mode
        is_first = not mode.training or layer.path not in mode.with_gradients
        if torch.compiler.is_compiling():
            from fa_bench.mechanisms.compiled import new_sample

            if is_first:
                mode.seeds[layer.path] = new_sample(feedback_tensor(layer, "M"), self._handle.key)
        elif is_first and not recomputing():
            self.new_sample()

    def new_sample(self) -> None:
        """Schedule a new sample, which replaces M the next time M is read."""
        self.draws += 1
        self._is_due = True

    def materialize(self, layer: Any) -> None:
        if self._is_due:
            self._is_due = False
            assert self.resample is not None
            tensor = feedback_tensor(layer, "M")
            resample_magnitudes(tensor, self.resample, self._sample_seed())
            self._known_positive = _version(tensor)

    def sampled(self, magnitudes: Tensor) -> Tensor:
        """A copy of |M|, newly sampled if a sample is due; `magnitudes` is the layer's M."""
        if not self._is_due:
            return magnitudes.abs()
        assert self.resample is not None
        sample = torch.empty_like(magnitudes)
        resample_magnitudes(sample, self.resample, self._sample_seed())
        return sample

    def _sample_seed(self) -> int:
        return seed_for(self.seed, self.draws)

    def seed_words(self) -> tuple[int, int]:
        """The seed of the current sample as two numbers, for compiled graphs."""
        return seed_words(self._sample_seed())

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        if self.resample is None:
            return super().context(layer, x)
        if torch.compiler.is_compiling():
            from fa_bench.mechanisms.compiled import sampled

            tensor, words = feedback_tensor(layer, "M"), layer.mode.seeds.get(layer.path)
            sample = (
                sampled(tensor, self._handle.key)
                if words is None
                else magnitudes(words, tensor.shape, self.resample, tensor.dtype)
            )
            return BackwardContext(from_weight=lambda weight: _masked(layer, torch.sign(weight).mul_(sample)))
        if recomputing():
            return BackwardContext(from_weight=refuse_reentrant(layer.mode.rule))
        # Another forward pass may sample a new M before this one's backward pass, so B is computed now. Autograd does not save B,
        # because activation checkpointing would recompute a saved tensor with a different M.
        feedback = self.effective(layer)
        return BackwardContext(from_weight=lambda weight: feedback)

    def unmasked(self, layer: Any, signs: Tensor) -> Tensor:
        self.materialize(layer)
        return signs.mul_(self._magnitudes(feedback_tensor(layer, "M")))

    def _magnitudes(self, tensor: Tensor) -> Tensor:
        """|M|, which is M itself if M was found to have no negative entries and has not changed since."""
        if torch.compiler.is_compiling():
            return tensor.abs()
        if self._known_positive != _version(tensor):
            self._known_positive = None if bool((tensor < 0).any()) else _version(tensor)
        return tensor.abs() if self._known_positive is None else tensor

    def state(self) -> dict[str, Any]:
        return {"seed": self.seed, "draws": self.draws}

    def load_state(self, state: dict[str, Any]) -> None:
        self.seed, self.draws, self._is_due = int(state["seed"]), int(state["draws"]), False


def _version(tensor: Tensor) -> tuple[int, int]:
    """A value that changes whenever the tensor is replaced or written to in a way that autograd counts."""
    return tensor.data_ptr(), tensor._version
