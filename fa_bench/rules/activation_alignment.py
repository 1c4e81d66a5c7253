"""Activation alignment."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.edge.alignment import AlignmentLoss, InputAlignmentRule
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("activation_alignment")
@dataclasses.dataclass(eq=False)
class ActivationAlignment(InputAlignmentRule):
    """Activation alignment: the feedback is pulled towards the weights by a local loss that compares their outputs for the same
    inputs.

    The rule combines the primitives sparse and amp of Kunin et al. 2020 (arXiv 2003.01513) and of the code released with that
    paper.

        e_in = g B;  loss = α (mean ‖x Wᵀ‖² + mean ‖x Bᵀ‖²) - β mean Σ (x Wᵀ)(x Bᵀ)
        gradient of B = (2 α B - β W) C,  C = mean xᵀ x

    With β = 2 α, the gradient is 2 α (B - W) C, and the fixed point on the span of the layer's inputs x is W. With other values,
    the fixed point on this span is β / (2 α) W. The gradient of B has no component outside this span.

    Means are over samples and, for convolutions and tokens, over output positions. We did not verify how the paper normalises
    over positions. For a convolution, x Bᵀ is the output of the convolution with the kernel B.

    The options ``alpha`` and ``beta``, which set α and β, default to the values in the released code. With ``update_forward``,
    the loss also trains W, with the gradient (2 α W - β B) C. With ``signal=noise``, ``noise_batch`` samples of noise replace x.
    With the default α and β, B changes slowly; ``b_lr_scale`` can raise its learning rate relative to that of W. Centred and
    normalised activations, delays and alternating steps, which the released code has, are not implemented. The paper's tuned
    settings are not public, so none of our results reproduces the paper.
    """

    equations = (
        r"e_{\text{in}} &= g B",
        r"\mathcal{L}_B &= \alpha \left(\operatorname{mean} \lVert x W^\top \rVert^2 + \operatorname{mean} \lVert x "
        r"B^\top \rVert^2\right) - \beta \operatorname{mean} \sum (x W^\top) \odot (x B^\top)",
        r"\nabla_B &= (2 \alpha B - \beta W) C,\quad C = \operatorname{mean} x^\top x",
    )

    search_space = {"b_lr_scale": "tag(log,interval(1,1000))"}

    alpha: float = option(1e-3, "α: weight of the sparse loss", minimum=0)
    beta: float = option(2e-3, "β: weight of the amp loss", minimum=0)

    def alignment_loss(self) -> AlignmentLoss:
        return AlignmentLoss(sparse=self.alpha, amp=self.beta)
