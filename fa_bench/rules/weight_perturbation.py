"""Weight perturbation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.mechanisms.coverage import Coverage, Covered
from fa_bench.mechanisms.cut.passes import PassRule
from fa_bench.mechanisms.drawing import DrawingRule
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


@ALGORITHMS.register("weight_perturbation")
@dataclasses.dataclass(eq=False)
class WeightPerturbation(DrawingRule, PassRule):
    """Weight perturbation: gradients are estimated from the change of the loss when noise is added to all weights.

    The rule uses the two-sided estimate of simultaneous perturbation (SPSA, Spall 1992), as in MeZO (Malladi et al. 2023, arXiv
    2305.17333, official code). Let θ be all trained parameters, v standard normal noise with the shape of θ, ε the option
    `epsilon`, and L the loss of the batch. Then

        gradient of θ = c v,    c = (L(θ + εv) - L(θ - εv)) / 2ε.

    This estimate of the gradient is unbiased up to O(ε²), and c is an exact directional derivative if L is quadratic. The
    expected cosine to the true gradient decreases like 1/√P with the number P of parameters, so the rule is a baseline for
    learning without any backward pass. Users of MeZO report that it does not learn CIFAR-10 from scratch.

    All parameters that require gradients belong to θ. If a parameter does not affect the loss, its estimate is noise around zero.
    The noise v is not stored but regenerated from the seed and the number of the backward pass each time it is used. All
    processes of a data-parallel run use the same v, so the mean of their gradients is the gradient of one process with the full
    batch. Every micro-batch has its own v. The weights are restored exactly. An update needs two additional forward passes and no
    backward pass.

    Dropout masks are the same in all passes. Batch normalisation uses the statistics of each pass and updates its running
    statistics in the first pass.
    """

    equations = (
        r"c &= \frac{L(\theta + \varepsilon v) - L(\theta - \varepsilon v)}{2 \varepsilon},\quad v \sim \mathcal{N}(0, I)",
        r"\nabla_\theta &= c v",
    )

    search_space = {"epsilon": "tag(log,interval(1e-4,1e-1))"}

    cuts: list[str] | None = dataclasses.field(default=None, init=False)
    epsilon: float = option(1e-3, "size of the perturbation", above=0)

    takes_numbers = True
    learns_by_objective = True

    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.cut.capture import Capture
        from fa_bench.mechanisms.cut.coverage import with_untrained
        from fa_bench.mechanisms.cut.cut_points import check_cuts
        from fa_bench.mechanisms.cut.delivery import Delivery
        from fa_bench.mechanisms.cut.positions import class_axis
        from fa_bench.mechanisms.second_pass import Draws
        from fa_bench.mechanisms.weighted_layers import kind_of, weighted_layers

        self._cut_modules, self._layouts, self._draws = {}, {}, Draws(self.seed)
        trace = self.trace(sample_input)
        check_cuts(self, trace, ())
        self._trace, self._covered = trace, weighted_layers(self.model)
        self.error_axis, self.error_dims = class_axis(trace.result_shape), len(trace.result_shape)
        self._capture, self._delivery = Capture(self, {}, trace, {}), Delivery(self)
        covered = tuple(
            Covered(path, kind_of(layer), tuple(layer.weight.shape), "is not needed: its gradient comes from perturbed losses")
            for path, layer in self._covered.items()
        )
        return with_untrained(Coverage(self.name, covered, {}), self, trace.result_leaves, "gets only noise")

    def transporting_layers(self) -> dict[str, Any]:
        return {}

    def trained_parameters(self, results: list[Tensor]) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def gradients(
        self, parameters: list[nn.Parameter], activations: dict[str, Tensor], delta: Tensor, logits: Tensor, target: Tensor
    ) -> list[Tensor | None]:
        self.next_draws()
        with torch.no_grad():
            kept = [parameter.clone() for parameter in parameters]
            try:
                plus, minus = (self._loss(parameters, kept, size, target) for size in (self.epsilon, -self.epsilon))
            finally:
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.data.copy_(value)  # through .data, because autograd must not count this as a change
            if not len(target):
                return [torch.zeros_like(parameter) for parameter in parameters]
            slope = (plus - minus) / (2 * self.epsilon) * self.loss_factor
            return [noise.mul_(slope.to(noise.dtype)) for noise in self._noise(parameters)]

    def _noise(self, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
        return (self._draws.normal(str(number), parameter, is_shared=True) for number, parameter in enumerate(parameters))

    def _loss(self, parameters: list[nn.Parameter], kept: list[Tensor], size: float, target: Tensor) -> Tensor:
        """The loss when v times `size` is added to the parameters."""
        from fa_bench.mechanisms.cut.positions import mean_loss
        from fa_bench.mechanisms.second_pass import again

        assert self.first_pass is not None
        for parameter, value, noise in zip(parameters, kept, self._noise(parameters), strict=True):
            parameter.data.copy_(value).add_(noise, alpha=size)
        logits = self.logits_of(again(self.model, self.mode, self.first_pass, precise=True))
        return mean_loss(self.objective, logits.to(torch.promote_types(logits.dtype, torch.float32)), target)

    def notes(self) -> tuple[str, ...]:
        """Returns no notes, because all samples and processes share the noise."""
        return ()
