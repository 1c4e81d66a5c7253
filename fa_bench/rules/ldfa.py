"""Low-dimensional feedback alignment with a learned subspace."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from fa_bench.mechanisms.edge.pathways import BackwardContext, FeedbackPathway, feedback_gradient
from fa_bench.mechanisms.edge.rule import LayerContext
from fa_bench.mechanisms.edge.subspace import oja_gradient, orthonormalized
from fa_bench.mechanisms.feedback_tensors import feedback_tensor
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.rules.pfa import ProductFeedback, SemiOrthogonalRule

if TYPE_CHECKING:
    from torch import Tensor


class SubspaceFeedback(ProductFeedback):
    """Feedback e_in = g B R with a learned R and with a B that learns the principal subspace of g.

    Args:
        rate: the factor by which the gradient of B is multiplied.
    """

    learned = ("B", "R")

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        context = super().context(layer, x)
        gradient = functools.partial(oja_gradient, feedback_tensor(layer, "B"), getattr(layer, "groups", 1), self.rate)
        return context._replace(gradients=(*context.gradients, *feedback_gradient(layer, "B", of_errors=gradient)))

    def needs_step(self, layer: Any) -> bool:
        return layer.learned["B"].tensor.requires_grad

    def after_step(self, layer: Any) -> None:
        if self.needs_step(layer):
            first = feedback_tensor(layer, "B")
            first.copy_(orthonormalized(first, getattr(layer, "groups", 1)))


@ALGORITHMS.register("ldfa")
@dataclasses.dataclass(eq=False)
class LDFA(SemiOrthogonalRule):
    """Low-dimensional feedback: errors pass through a learned low-dimensional subspace.

    The rule is due to Hanut and Kadmon 2025 (arXiv 2502.20580), "Training Large Neural Networks With Low-Dimensional Error
    Feedback".

        ē = g B,  e_in = ē R,  gradient of R = ēᵀ x                                         as in ``pfa_o``
        gradient of B = -``b_rate`` (C B - B Bᵀ C B),  C = Σ gᵀ g / ‖g‖ over samples and positions

    B (O, r) has orthonormal columns, where r is the smaller of ``rank`` and O (in grouped convolutions, for each group). In the
    notation of the paper, where the feedback is Q P, the projection of errors to r dimensions is P = Bᵀ, and R (r, I, K...;
    ``r_init``) is Qᵀ. R follows Bᵀ W by Kolen-Pollack. With decay, B R therefore approaches B Bᵀ W, at an angle of arccos(‖Bᵀ W‖
    / ‖W‖) to W. B learns the principal subspace of the errors by Oja's rule, and its columns are orthonormalised after every
    update. Layers with at most ``rank`` outputs keep their initial B. With ``b_rate=0``, all layers keep their initial B, and the
    subspace is random, as in `pfa_o` with a ratio below 1.

    We derived the equations ourselves and did not check them against the paper. We know neither how the paper updates the
    subspace nor its settings, so none of our results reproduces the paper.

    Our choices: errors are weighted by 1/‖g‖ in C. Like all other gradients, that of B is therefore proportional to the loss and
    a sum over samples, even with gradient accumulation, gradient scalers and data-parallel training. For errors with an
    elliptical distribution, the subspace is the same as without this weighting. B and R are trained by the optimizer of W, at its
    learning rate. Since the columns of B are orthonormal, decay and high learning rates do not change the norm of B. With Adam
    and Muon, ``b_rate`` has hardly any effect unless it is 0.
    """

    equations = (
        r"\bar{e} &= g B,\quad e_{\text{in}} = \bar{e} R",
        r"\nabla_R &= \bar{e}^\top x",
        r"\nabla_B &= -b_{\text{rate}} (C B - B B^\top C B),\quad C = \sum \frac{g^\top g}{\lVert g \rVert}",
    )

    search_space = {"rank": "choice(5,10,32)", "b_rate": "tag(log,interval(1e-2,10))"}

    rank: int = option(10, "r: number of dimensions of the errors that are passed on", minimum=1)
    b_rate: float = option(1.0, "factor of the gradient of B; 0: B keeps its initial value", minimum=0)

    def between(self, outputs: int) -> int:
        return min(self.rank, outputs)

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        pathway = super().pathway(layer)
        rows, columns = feedback_tensor(layer.module, "B").shape
        is_whole = rows == columns * getattr(layer.module, "groups", 1)  # no subspace to learn
        return pathway if is_whole or not self.b_rate else SubspaceFeedback(self.b_rate)
