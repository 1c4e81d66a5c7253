"""Symmetric alignment."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.edge.alignment import AlignmentLoss, AlignmentRule
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("symmetric_alignment")
@dataclasses.dataclass(eq=False)
class SymmetricAlignment(AlignmentRule):
    """Symmetric alignment: the feedback is pulled towards the weights by a local loss that compares them entry by entry.

    The rule combines the primitives decay and self of Kunin et al. 2020 (arXiv 2003.01513) and of the code released with that
    paper.

        e_in = g B;  loss = α (‖W‖² + ‖B‖²) - β Σ W B;  gradient of B = 2 α B - β W

    With β = 2 α, the gradient is 2 α (B - W), and the fixed point is W. With other values, the fixed point is β / (2 α) W. The
    update of an entry of B reads the corresponding weight, which is weight transport within the layer. The rule is therefore the
    reference for `activation_alignment` and `information_alignment`, which avoid weight transport.

    The options ``alpha`` and ``beta``, which set α and β, default to the values in the released code. With ``update_forward``,
    the loss also trains W, with the gradient 2 α W - β B. With the default α and β, B changes slowly; ``b_lr_scale`` can raise
    its learning rate relative to that of W. The delays and alternating steps of the released code are not implemented. The
    paper's tuned settings are not public, so none of our results reproduces the paper.
    """

    equations = (
        r"e_{\text{in}} &= g B",
        r"\mathcal{L}_B &= \alpha \left(\lVert W \rVert^2 + \lVert B \rVert^2\right) - \beta \sum W \odot B",
        r"\nabla_B &= 2 \alpha B - \beta W",
    )

    search_space = {"b_lr_scale": "tag(log,interval(1,1000))"}

    alpha: float = option(1e-3, "α: weight of the decay loss", minimum=0)
    beta: float = option(2e-3, "β: weight of the self loss", minimum=0)

    def alignment_loss(self) -> AlignmentLoss:
        return AlignmentLoss(decay=self.alpha, self_=self.beta)
