"""Node perturbation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.mechanisms.cut.rule import CapturedActivation, CutRule
from fa_bench.mechanisms.drawing import DrawingRule
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@ALGORITHMS.register("node_perturbation")
@dataclasses.dataclass(eq=False)
class NodePerturbation(DrawingRule, CutRule):
    """Node perturbation: errors are estimated from the effect of noise on the loss.

    Let ξ be standard normal noise at every hidden activation and at the logits z, and σ the option `sigma`. Two additional
    forward passes, in which ±σξ is added to these activations, give the losses L± of each sample n. The following equations give
    the error at an activation:

        d_n ξ_n / N,    d_n = (L⁺_n - L⁻_n) / 2σ.

    As an estimate of ∂L/∂a, this error is unbiased up to O(σ²), and d_n is an exact directional derivative if L is quadratic.
    Dalm, van Gerven and Ahmad, arXiv 2310.00965, describe the principle; we did not check the text of their paper. The two-sided
    difference is our choice. The variance of the estimate grows with the number of perturbed values P, and its expected cosine to
    the true error decreases like 1/√P. The rule is therefore a baseline for learning without feedback and is not competitive in
    wide networks.

    No error passes through a weight. The weight and bias of a layer learn from the error at its activation and from the layer's
    own derivatives, including that of its nonlinearity. With ``perturb_output=false``, the output layer learns from its true
    gradient.

    Dropout masks are the same in all three passes. Batch normalisation uses the statistics of each pass, which include the noise,
    and updates its running statistics in the first pass. Every backward pass samples new noise, which depends only on the seed,
    the number of the pass and the data-parallel rank. An update needs two additional forward passes.

    Dalm et al. also normalise by the actual change of activity and decorrelate inputs; neither is implemented.
    """

    equations = (
        r"d_n &= \frac{L_n^+ - L_n^-}{2 \sigma}",
        r"e_{a,n} &= \frac{1}{N} d_n \xi_n",
    )

    search_space = {"sigma": "tag(log,interval(1e-4,1))"}

    sigma: float = option(1e-3, "standard deviation of the noise", above=0)
    perturb_output: bool = option(True, "also perturb the logits; otherwise the output layer learns from its true gradient")

    repeats = True
    scales = True
    takes_numbers = True
    learns_by_objective = True
    needs_target = True

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        self._noise: dict[str, Tensor] = {}

    def broadcast(self, delta: Tensor, target: Tensor | None) -> Tensor:
        """The values d_n / N, times the scale of the loss, (N,)."""
        assert target is not None
        self.next_draws()
        self._noise = {}
        with torch.no_grad():
            slopes = (self._losses(self.sigma, target) - self._losses(-self.sigma, target)) / (2 * self.sigma)
        self._slopes = slopes * (self.loss_factor / max(len(slopes), 1))
        return self._slopes

    def _losses(self, size: float, target: Tensor) -> Tensor:
        """The loss of each sample, (N,), when the noise times `size` is added."""
        from fa_bench.mechanisms.cut.positions import sample_losses
        from fa_bench.mechanisms.second_pass import again

        def perturbed(name: str, tensor: Tensor) -> Tensor:
            if name not in self._noise:
                self._noise[name] = self._draws.normal(name, tensor)
            return tensor.add(self._noise[name], alpha=size)

        assert self.first_pass is not None
        changes = {cut: lambda tensor, cut=cut: perturbed(cut, tensor) for cut in self._cut_modules}
        logits = self.logits_of(again(self.model, self.mode, self.first_pass, outputs=changes, precise=True))
        if self.perturb_output:
            logits = perturbed("", logits)
        return sample_losses(self.objective, logits.to(torch.promote_types(logits.dtype, torch.float32)), target)

    def signal(self, cut: str, captured: CapturedActivation, broadcast: Tensor, target: Tensor | None) -> Tensor:
        return _by_sample(self._noise.pop(cut), broadcast)

    def output_error(self, delta: Tensor) -> Tensor:
        return _by_sample(self._noise.pop("").to(delta.dtype), self._slopes) if self.perturb_output else delta


def _by_sample(noise: Tensor, factors: Tensor) -> Tensor:
    """The noise (N, ...), with each sample multiplied by its own factor."""
    return noise * factors.to(noise.dtype).view(-1, *[1] * (noise.dim() - 1))
