"""Information alignment."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.edge.alignment import AlignmentLoss, InputAlignmentRule
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("information_alignment")
@dataclasses.dataclass(eq=False)
class InformationAlignment(InputAlignmentRule):
    """Information alignment: a local loss trains the feedback to reconstruct the layer's input from its output.

    The rule combines the primitives amp, null and decay of Kunin et al. 2020 (arXiv 2003.01513) and of the code released with
    that paper.

        e_in = g B;  loss = -α mean Σ (x Wᵀ)(x Bᵀ) + β mean ‖x Wᵀ B‖² + γ (‖W‖² + ‖B‖²)
        gradient of B = -α W C + 2 β W C Wᵀ B + 2 γ B,  C = mean xᵀ x

    With α = 2 β, the ratio in the released code, the fixed point of B is (W C Wᵀ + (γ / β) I)⁻¹ W C. This fixed point is not W
    but the kind of inverse of W that target propagation uses. If the inputs x are white and there is no decay, the fixed point is
    the transposed pseudo-inverse of W.

    Means are over samples and, for convolutions and tokens, over output positions. We did not verify how the paper normalises
    over positions. For a convolution, x Bᵀ is the output of the convolution with the kernel B, and x Wᵀ B is the output of the
    transposed convolution with the kernel B for the input x Wᵀ.

    If a convolution pads its input with anything other than zeros, ‖x Wᵀ B‖² covers the padded input, including its border.

    The options ``alpha``, ``beta`` and ``gamma``, which set α, β and γ, default to the values in the released code. In this rule,
    α multiplies amp, whereas it multiplies decay in `symmetric_alignment` and `regularized_mirror`, and sparse in
    `activation_alignment`. With ``update_forward``, the loss also trains W, with the gradient -α B C + 2 β B Bᵀ W C + 2 γ W. With
    ``signal=noise``, ``noise_batch`` samples of noise replace x. With the default α and β, B changes slowly; ``b_lr_scale`` can
    raise its learning rate relative to that of W. Centred and normalised activations, delays and alternating steps, which the
    released code has, are not implemented. The paper's tuned settings are not public, so none of our results reproduces the
    paper.
    """

    equations = (
        r"e_{\text{in}} &= g B",
        r"\mathcal{L}_B &= -\alpha \operatorname{mean} \sum (x W^\top) \odot (x B^\top) + \beta \operatorname{mean} "
        r"\lVert x W^\top B \rVert^2 + \gamma \left(\lVert W \rVert^2 + \lVert B \rVert^2\right)",
        r"\nabla_B &= -\alpha W C + 2 \beta W C W^\top B + 2 \gamma B,\quad C = \operatorname{mean} x^\top x",
    )

    search_space = {"b_lr_scale": "tag(log,interval(1,1000))"}

    alpha: float = option(2e-3, "α: weight of the amp loss", minimum=0)
    beta: float = option(1e-3, "β: weight of the null loss", minimum=0)
    gamma: float = option(1e-3, "γ: weight of the decay loss", minimum=0)

    def alignment_loss(self) -> AlignmentLoss:
        return AlignmentLoss(amp=self.alpha, null=self.beta, decay=self.gamma)
