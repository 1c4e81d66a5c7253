"""Regularised weight mirror."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.edge.alignment import AlignmentLoss, InputAlignmentRule
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("regularized_mirror")
@dataclasses.dataclass(eq=False)
class RegularizedMirror(InputAlignmentRule):
    """Regularised weight mirror: feedback that learns from correlations between the layer's inputs and outputs, and decays.

    Kunin et al. 2020 (arXiv 2003.01513) and the code released with it, primitives decay and amp.

        e_in = g B;  loss = α (‖W‖² + ‖B‖²) - β mean Σ (x Wᵀ)(x Bᵀ)
        gradient of B = 2 α B - β W C,  C = mean xᵀ x

    The fixed point is (β / 2 α) W C. It is parallel to W if the inputs x are white, and half of W with the code's defaults. Means
    are over samples and, for convolutions and tokens, output positions (our choice: how the paper normalises over positions was
    not verified); for a convolution, x Bᵀ is its output with B. In contrast, `wm` mirrors noise only, in a separate phase, and
    with a decay for which the fixed point is W.

    α = ``alpha`` and β = ``beta`` default to the values in the code. With ``update_forward``, W has the gradient 2 α W - β B C.
    ``signal`` and ``noise_batch`` replace x with noise. With the code's α and β, B changes slowly; ``b_lr_scale`` raises its
    learning rate relative to W's. The code's centred and normalised activations, delays and alternating steps are not
    implemented. The tuned settings are not public, so no result is a reproduction.
    """

    equations = (
        r"e_{\text{in}} &= g B",
        r"\mathcal{L}_B &= \alpha \left(\lVert W \rVert^2 + \lVert B \rVert^2\right) - \beta \operatorname{mean} \sum "
        r"(x W^\top) \odot (x B^\top)",
        r"\nabla_B &= 2 \alpha B - \beta W C,\quad C = \operatorname{mean} x^\top x",
    )

    search_space = {"b_lr_scale": "tag(log,interval(1,1000))"}

    alpha: float = option(1e-3, "α: weight of the decay loss", minimum=0)
    beta: float = option(1e-3, "β: weight of the amp loss", minimum=0)

    def alignment_loss(self) -> AlignmentLoss:
        return AlignmentLoss(decay=self.alpha, amp=self.beta)
