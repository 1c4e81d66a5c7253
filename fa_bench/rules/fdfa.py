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
    """Forward direct feedback alignment: direct feedback that learns the Jacobian of the logits from noise.

    Bacho and Chu 2022, arXiv 2212.07282, and its official code.

    δ = ∂L/∂z of shape (N, C) is the error at the logits z. The error at a cut is δ B, as in direct feedback alignment, with B of
    shape (C, features of the cut). In an additional forward pass, noise p (N, features), standard normal, is added to the tangent
    at every cut, and d (N, C) is the tangent at the logits: the derivative of z along the noise. d ⊗ p is an unbiased estimate of
    the Jacobian ∂z/∂a at the cut, and B learns the mean of these estimates over samples and steps:

        gradient of B = B - mean over n of d_n ⊗ p_n.

    No error passes back through a weight; the forward pass with tangents does use the weights. All cuts are perturbed in one
    pass, so the noise at the other cuts adds variance to d, which grows with the number of cuts. The output layer has its true
    gradient.

    As in the code, an optimizer updates B with this gradient: either W's optimizer, with its learning rate times `b_lr_scale`, or
    a separate one, with ``optimizer@feedback_optimizer=adam``. The code uses Adam at 1e-4 for both, no decay, batches of 64, and
    a learning rate of W that is multiplied by 0.95 per epoch. The paper's form, B ← (1 - α) B + α mean d_n ⊗ p_n (from memory,
    not checked against the paper), is plain SGD at the rate α:
    ``optimizer@feedback_optimizer=sgd feedback_optimizer.lr=ALPHA feedback_optimizer.momentum=0``. With a rate of 0, the rule is
    direct feedback alignment.

    `tangents` chooses how d is computed: ``forward`` is exact; ``difference`` is (z(a + εp) - z(a - εp)) / 2ε with ε = 0.001, for
    operations without a forward-mode derivative, which ``forward`` refuses. `within` and `positions` are those of `dfa`;
    positions, such as tokens, count as samples, and B (C, F) is the mean Jacobian between corresponding positions.

    Choices: B starts at zero as in the code (``b_init``). The gradient of B is multiplied by the factor by which the loss was
    scaled, so that micro-batches and gradient scalers give the right mean. Gradient clipping includes it in the norm. Each sample
    has its own noise, which changes if a batch is split into micro-batches or across data-parallel ranks; all ranks hold the same
    B. In the code, W's optimizer has a schedule and B's has none.
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
