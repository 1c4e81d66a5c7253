"""Regularised weight mirror."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.edge.alignment import AlignmentLoss, InputAlignmentRule
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("regularized_mirror")
@dataclasses.dataclass(eq=False)
class RegularizedMirror(InputAlignmentRule):
    """Regularised weight mirror: the feedback learns from correlations between the layer's inputs and outputs, and decays.

    The rule combines the primitives decay and amp of Kunin et al. 2020 (arXiv 2003.01513) and of the code released with that
    paper.

        e_in = g B;  loss = α (‖W‖² + ‖B‖²) - β mean Σ (x Wᵀ)(x Bᵀ)
        gradient of B = 2 α B - β W C,  C = mean xᵀ x

    The fixed point of B is β / (2 α) W C. If the inputs x are white, this is a multiple of W; with the default α and β, it is
    half of W. In contrast, `wm` uses only noise as the input, in separate steps, and by default has a decay for which the fixed
    point is W.

    Means are over samples and, for convolutions and tokens, over output positions. We did not verify how the paper normalises
    over positions. For a convolution, x Bᵀ is the output of the convolution with the kernel B.

    The options ``alpha`` and ``beta``, which set α and β, default to the values in the released code. With ``update_forward``,
    the loss also trains W, with the gradient 2 α W - β B C. With ``signal=noise``, ``noise_batch`` samples of noise replace x.
    With the default α and β, B changes slowly; ``b_lr_scale`` can raise its learning rate relative to that of W. Centred and
    normalised activations, delays and alternating steps, which the released code has, are not implemented. The paper's tuned
    settings are not public, so none of our results reproduces the paper.
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
