"""Forward gradients, which come from the derivative of the loss along noise."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.mechanisms.coverage import Coverage, Covered
from fa_bench.mechanisms.cut.noise import NoisyCutRule
from fa_bench.mechanisms.cut.passes import used_parameters
from fa_bench.mechanisms.cut.rule import CapturedActivation
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.trace import Trace

#: The value of `form` for the perturbation of weights.
WEIGHT = "weight"


@ALGORITHMS.register("forward_gradient")
@dataclasses.dataclass(eq=False)
class ForwardGradient(NoisyCutRule):
    """Forward gradients: the gradient is estimated, without backpropagation, as noise times the derivative of the loss along this
    noise.

    The rule is due to Baydin, Pearlmutter, Syme, Wood and Torr 2022, arXiv 2202.08587; the activation form is due to Ren,
    Kornblith, Liao and Hinton 2023, arXiv 2210.03310.

    An additional forward pass computes the derivative ż of the logits z along noise by forward-mode differentiation; with δ =
    ∂L/∂z, the derivative of the loss is δ · ż. There is no feedback, and no error passes back through a weight. `form` selects
    what is perturbed:

    - activation: standard normal noise p_n at every cut, for every sample n:  d_n = Σ_c δ_nc ż_nc,  error at the cut = d_n p_n.
      The derivatives from there down to the next weights are exact, and the output layer learns from its true gradient.

    - weight: standard normal noise v for every trained parameter:  d = Σ_n Σ_c δ_nc ż_nc,  gradient = d v.  The weight form needs
      no cuts and ignores the option ``cuts``.

    The estimates of both forms are unbiased: their expectation is the true gradient. The variance of both estimates grows with
    the number of perturbed values P, and the cosine between a single estimate and the gradient is of order 1/√P. The rule is
    therefore a baseline for learning without backpropagation and not a practical way to train deep networks. In the activation
    form, each sample has its own d_n, so the noise averages out over the batch.

    Our choices: all cuts are perturbed in one pass. The local losses, groups of neurons and special normalisation that Ren et al.
    add are not part of this rule. If the output has positions, such as tokens, d_n is the sum over the positions of a sample.
    `tangents` can select central differences for operations without a forward-mode derivative; see `fdfa`. In the weight form,
    all data-parallel ranks use the same noise, so training is equivalent to a single process with the full batch.
    """

    equations = (
        r"d_n &= \sum_c \delta_{nc} \dot{z}_{nc},\quad e_{a,n} = d_n p_n \quad \text{with form=activation}",
        r"d &= \sum_n \sum_c \delta_{nc} \dot{z}_{nc},\quad \nabla_\theta = d v \quad \text{with form=weight}",
    )

    form: str = option("activation", "what is perturbed: the activations at cuts, or the weights", choices=["activation", WEIGHT])

    @property
    def learns_in_passes(self) -> bool:
        return self.form == WEIGHT

    def find_cuts(self, sample_input: Any) -> tuple[str, ...]:
        return () if self.form == WEIGHT else super().find_cuts(sample_input)

    def wire(self, sample_input: Any) -> Coverage:
        coverage = super().wire(sample_input)
        if self.form != WEIGHT:
            return coverage
        from fa_bench.mechanisms.cut.coverage import with_untrained
        from fa_bench.mechanisms.weighted_layers import kind_of, weighted_layers

        covered = tuple(
            Covered(path, kind_of(layer), tuple(layer.weight.shape), "is not needed: its gradient is noise times a derivative")
            for path, layer in weighted_layers(self.model).items()
        )
        return with_untrained(Coverage(self.name, covered, {}), self, self._trace.result_leaves)

    def notes(self) -> tuple[str, ...]:
        return () if self.form == WEIGHT else super().notes()

    def transporting_layers(self) -> dict[str, Any]:
        return {} if self.form == WEIGHT else super().transporting_layers()

    def signal(self, cut: str, captured: CapturedActivation, broadcast: Tensor, target: Tensor | None) -> Tensor:
        noise, tangent = self.noise_and_tangent()
        derivative = (broadcast * tangent).flatten(1).sum(1)
        return noise[cut] * derivative.view(-1, *[1] * (len(captured.shape) - 1)).to(noise[cut].dtype)

    def trained_parameters(self, results: list[Tensor]) -> list[nn.Parameter]:
        return used_parameters(self.model, results)

    def gradients(
        self,
        parameters: list[nn.Parameter],
        activations: dict[str, Tensor],
        delta: Tensor,
        logits: Tensor,
        target: Tensor,
    ) -> list[Tensor | None]:
        from fa_bench.mechanisms.tangents import output_tangent

        assert self.first_pass is not None
        self.next_draws()
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        noise = {
            parameter: self._draws.normal(names[id(parameter)], parameter.detach(), is_shared=True) for parameter in parameters
        }
        derivative = (delta * output_tangent(self, self.first_pass, self.tangents, {}, noise)).sum()
        return [tangent * derivative.to(tangent.dtype) for tangent in noise.values()]

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns no pairs, because there is no feedback."""
        return {}

    def error_points(self, trace: Trace) -> dict[str, tuple[str, str]]:
        return {} if self.form == WEIGHT else super().error_points(trace)
