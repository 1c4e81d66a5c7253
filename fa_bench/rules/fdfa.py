"""Forward direct feedback alignment."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.mechanisms.cut.jacobian import JacobianRule
from fa_bench.mechanisms.feedback_options import init_option, positions_option, within_option
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS

if TYPE_CHECKING:
    from torch import Tensor


@ALGORITHMS.register("fdfa")
@dataclasses.dataclass(eq=False)
class FDFA(JacobianRule):
    """Forward direct feedback alignment: direct feedback learns the Jacobian of the logits from noise.

    The rule is due to Bacho and Chu 2022, arXiv 2212.07282; details follow their official code.

    Let δ = ∂L/∂z of shape (N, C) be the error at the logits z. The error at a cut is δ B, as in direct feedback alignment, with B
    of shape (C, features of the cut). An additional forward pass with tangents adds standard normal noise p (N, features) to the
    tangent at every cut. The tangent at the logits, d (N, C), is then the derivative of z along the noise. The product d ⊗ p is
    an unbiased estimate of the Jacobian ∂z/∂a at the cut, and B learns the mean of these estimates over samples and steps:

        gradient of B = B - mean over n of d_n ⊗ p_n.

    No error passes back through a weight; the forward pass with tangents does use the weights. All cuts are perturbed in one
    pass, so the noise at the other cuts adds variance to the estimate at each cut, and this variance grows with the number of
    cuts. The output layer learns from its true gradient.

    As in the code, an optimizer updates B with this gradient. This optimizer is either that of W, at `b_lr_scale` times the
    learning rate of W, or a separate one, as with ``optimizer@feedback_optimizer=adam``. The code uses batches of 64. It trains
    both W and B with Adam at a learning rate of 1e-4 without decay, and multiplies only the learning rate of W by 0.95 after
    every epoch. We believe, but have not checked, that the paper's update is B ← (1 - α) B + α mean d_n ⊗ p_n. This update is
    plain SGD at the learning rate α:

        optimizer@feedback_optimizer=sgd feedback_optimizer.lr=ALPHA feedback_optimizer.momentum=0

    If B has a learning rate of 0 and a random ``b_init``, the rule is direct feedback alignment.

    `tangents` selects how d is computed. ``forward`` is exact but rejects operations that have no forward-mode derivative.
    ``difference``, which accepts such operations, computes (z(a + εp) - z(a - εp)) / 2ε with ε = 0.001. `within` and `positions`
    are those of `dfa`. Positions, such as tokens, count as samples, and B (C, F) is the mean Jacobian between corresponding
    positions.

    B starts at zero, as in the code (``b_init``). The gradient of B is multiplied by the factor by which the loss was scaled, so
    that the mean is right with micro-batches and gradient scalers. Gradient clipping includes the gradient of B in the norm. Each
    sample has its own noise, which changes if a batch is split into micro-batches or across data-parallel ranks; all ranks hold
    the same B.
    """

    equations = (
        r"e_a &= \delta B",
        r"d_n &= \sum_{\text{cuts}} \frac{\partial z_n}{\partial a_n} p_n,\quad p_n \sim \mathcal{N}(0, I)",
        r"\nabla_B &= B - \operatorname{mean}_n (d_n \otimes p_n)",
    )

    search_space = {"b_lr_scale": "tag(log,interval(1e-2,10))"}

    b_init: str = init_option("B", "zeros")
    b_lr_scale: float = option(1.0, "learning rate of B relative to that of W, unless B has its own optimizer", minimum=0)
    within: str = within_option()
    positions: str = positions_option()

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        self.put_learned(features, classes, self.b_init)

    def gradient_of(self, feedback: Tensor, estimate: Tensor) -> Tensor:
        return feedback - estimate
