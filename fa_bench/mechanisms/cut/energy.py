"""Rules that let the activations at the cuts settle by gradient descent on an energy, and then learn from its local gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from fa_bench.mechanisms.cut.passes import PassRule
from fa_bench.registry.options import option
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

    from fa_bench.mechanisms.coverage import Coverage

#: Below this path length, the settled errors differ little from a multiple of their first step.
SHORT = 0.1


@dataclasses.dataclass
class EnergyPass:
    """One forward pass in which the activations at the cuts are replaced by states. The symbols are those of `EnergyRule`.

    Attributes:
        predicted: cut -> f_l(s_{l-1}) (N, ...), the output of the cut's block for the previous state.
        errors: cut -> s_l - f_l(s_{l-1}), in the shape of the cut's activation and in at least single precision.
        loss: the mean loss, a scalar; None while the pass runs.
    """

    predicted: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    errors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    loss: Any = None


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """The result of settling for one batch; each attribute except the loss maps each cut to a number.

    Attributes:
        energies: ½‖e_l‖², summed over the batch and divided by N, the number of targets.
        loss: the mean loss of the settled states.
        before, after: the norm of ∂E/∂e_l over the batch, where the derivative includes the effect of e_l on all later states.
            `before` is taken at e = 0, where the derivative is the error of backpropagation, and `after` at the settled errors,
            where the derivative is zero in equilibrium.
    """

    energies: dict[str, float]
    loss: float
    before: dict[str, float]
    after: dict[str, float]


@dataclasses.dataclass(eq=False)
class EnergyRule(PassRule):
    """Base class of rules that train blocks on the errors between states and predictions. Every block except the last ends at a
    cut.

    Let f_l be the function of block l, s_l the state at its end, s_0 the input, and L the loss of a sample. The energy E is then:

        E = Σ_n [ Σ_l ½‖s_l - f_l(s_{l-1})‖² + L(f_L(s_{L-1})) ]

    The outer sum runs over the samples. The states start at the activations of the first pass, where all errors are zero, and
    settle in `steps` steps of gradient descent with momentum. Each step takes an additional forward pass and a backward pass to
    the states. In one more pass, the parameters of each block get the gradient of E / N with all states fixed, where N is the
    number of targets.
    """

    #: Whether the variables are the states; otherwise, the variables are the errors e_l, and s_l = f_l(s_{l-1}) + e_l.
    moves_states: ClassVar[bool] = False

    within = "block"
    takes_numbers = True
    learns_by_objective = True
    learns_beside_output = False  # errors at cuts that do not affect the output stay zero

    steps: int = option(20, "number of settling steps in each update", minimum=1)
    rate: float = option(0.1, "step size of settling", above=0)
    momentum: float = option(0.0, "momentum of settling", minimum=0, below=1)

    def wire(self, sample_input: Any) -> Coverage:
        self._observed: list[Relaxation] | None = None
        # Errors reach a state through the weights of the block after it, even if that block is a single layer, so "within blocks"
        # always applies.
        across = () if self.moves_states else ("from block to block in each step of settling",)
        return dataclasses.replace(super().wire(sample_input), transport=("within blocks", *across))

    @property
    def path_length(self) -> float:
        """The distance that the errors would move along a constant gradient of length 1, which is steps times rate without
        momentum."""
        total = velocity = 0.0
        for _ in range(self.steps):
            velocity = self.momentum * velocity + 1
            total += velocity
        return self.rate * total

    def notes(self) -> tuple[str, ...]:
        if self.path_length >= SHORT:
            return ()
        return (
            f"steps={self.steps}, rate={self.rate:g}: the states hardly move, and each hidden layer learns from the "
            f"backpropagation gradient times a factor, {self.path_length:.2g} at the last cut: see probes=[energy].",
        )

    @contextmanager
    def observed(self) -> Iterator[list[Relaxation]]:
        """A context that yields a list, to which every backward pass within the context appends its `Relaxation`. Each
        `Relaxation` costs two additional passes of the model."""
        self._observed = found = []
        try:
            yield found
        finally:
            self._observed = None

    # -------------------------------------------------------------------------------------------- learning
    def gradients(
        self, parameters: list[torch_nn.Parameter], activations: dict[str, Tensor], delta: Tensor, logits: Tensor, target: Tensor
    ) -> list[Tensor | None]:
        variables, count = self._settled(target), self._count(target)
        fixed = {cut: variable.detach() for cut, variable in variables.items()}
        with self._energy_pass(fixed, target, self.moves_states, local=True) as at_rest:
            ends = [(at_rest.loss, torch.full_like(at_rest.loss, self.loss_factor))]
            ends += [(predicted, at_rest.errors[cut] * -self.loss_factor / count) for cut, predicted in at_rest.predicted.items()]
            outputs, errors = zip(*(end for end in ends if end[0].requires_grad), strict=True)
            gradients = torch.autograd.grad(outputs, parameters, errors, allow_unused=True)
        if self._observed is not None:
            self._observed.append(self._relaxation(at_rest, target))
        return list(gradients)

    def _count(self, target: Tensor) -> Tensor:
        """N, the number of targets over which the loss is averaged."""
        from fa_bench.mechanisms.cut.positions import ignored_label

        count = len(target) if target.is_floating_point() else (target != ignored_label(self.objective)).sum()
        return torch.as_tensor(count).clamp(min=1)

    def _settled(self, target: Tensor) -> dict[str, Tensor]:
        """A mapping from each cut to its state or error after settling."""
        variables: dict[str, Tensor] = {}
        velocities: dict[str, Tensor] = {}
        for _ in range(self.steps):
            for cut, gradient in self._descent(variables, target, self.moves_states).items():
                if cut in velocities:
                    gradient = gradient.add(velocities[cut], alpha=self.momentum)
                velocities[cut] = gradient
                variables[cut] = variables[cut].detach().sub(gradient, alpha=self.rate)
        return variables

    def _descent(self, variables: dict[str, Tensor], target: Tensor, moves_states: bool) -> dict[str, Tensor]:
        """A mapping from each cut to the derivative of E with respect to the cut's variable. Variables that are missing in
        `variables` are added with their initial values."""
        for variable in variables.values():
            variable.requires_grad_()
        with self._energy_pass(variables, target, moves_states) as now:
            energy = now.loss * self._count(target) + sum(error.square().sum() / 2 for error in now.errors.values())
            return dict(zip(variables, torch.autograd.grad(energy, list(variables.values())), strict=True))

    @contextmanager
    def _energy_pass(
        self, variables: dict[str, Tensor], target: Tensor, moves_states: bool, local: bool = False
    ) -> Iterator[EnergyPass]:
        """A context that yields the `EnergyPass` of a forward pass in which the variables determine the activations at the cuts.

        Args:
            variables: cut -> its state or error; a cut without a variable gets one for which the error is zero.
            target: the labels.
            moves_states: whether the variables are states.
            local: whether gradients stop at every cut.
        """
        from fa_bench.mechanisms.cut.positions import mean_loss
        from fa_bench.mechanisms.second_pass import repeated

        assert self.first_pass is not None
        found = EnergyPass()

        @torch.enable_grad()  # a frozen part of the model may run without gradients
        def at_output(cut: str, tensor: Tensor) -> Tensor:
            found.predicted[cut] = tensor
            # A step may be smaller than the rounding error of a half-precision activation.
            predicted = _wide(tensor.detach() if local else tensor)
            if cut not in variables:
                variables[cut] = (predicted.detach() if moves_states else torch.zeros_like(predicted)).requires_grad_()
            variable = variables[cut]
            found.errors[cut] = variable - predicted if moves_states else variable
            state = (variable if moves_states else predicted + variable).to(tensor.dtype)
            return state.clone() if cut in self._trace.changed_in_place else state

        with repeated(
            self.model,
            self.mode,
            self.first_pass,
            outputs={cut: lambda tensor, cut=cut: at_output(cut, tensor) for cut in self._cut_modules},
        ) as result:
            found.loss = mean_loss(self.objective, _wide(self.logits_of(result)), target)
            yield found

    def _relaxation(self, at_rest: EnergyPass, target: Tensor) -> Relaxation:
        errors = {cut: error.detach() for cut, error in at_rest.errors.items()}
        count = float(self._count(target))
        before, after = self._descent({}, target, False), self._descent(errors, target, False)
        return Relaxation(
            {cut: error.double().square().sum().item() / 2 / count for cut, error in errors.items()},
            at_rest.loss.item(),
            {cut: gradient.double().norm().item() for cut, gradient in before.items()},
            {cut: gradient.double().norm().item() for cut, gradient in after.items()},
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
