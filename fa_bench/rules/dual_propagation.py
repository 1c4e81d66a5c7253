"""Dual propagation."""

from __future__ import annotations

import dataclasses

from fa_bench.mechanisms.edge.pathways import FeedbackPathway, TransposeFeedback
from fa_bench.mechanisms.edge.rule import EdgeRule, LayerContext
from fa_bench.mechanisms.feedback_options import beta_option, derivative_option
from fa_bench.registry.registries import ALGORITHMS


@ALGORITHMS.register("dual_propagation")
@dataclasses.dataclass(eq=False)
class DualPropagation(EdgeRule):
    """Dual propagation: errors pass through the weights, and a finite difference replaces the derivative of every elementwise
    nonlinearity.

    The rule is due to Høier, Staudt and Zach 2023 (arXiv 2302.01228); its form is that of the authors' code for convolutional
    networks.

    The rule computes e_in = g W. A nonlinearity φ with the input a and the error g at its output passes the following error to
    its input:

        g_in = (φ(a + β s g) - φ(a - β s g)) / (2 β s),    s = N / c

    Here N is the number of samples, and the loss is c times the mean of their losses, so s g is the error of a sample's own loss.
    The gradients of W and b are those of backpropagation with these errors. Pooling, normalisation and softmax keep their exact
    derivatives. For ``beta`` → 0, and for linear φ with any ``beta``, this is backpropagation. For ReLU, the slope g_in / g lies
    between 0 and 1 where β s |g| > |a|, and tends to 1/2 for large ``beta``.

    In rules that pass errors through separate feedback in each layer, ``derivative=dual`` replaces the derivatives in the same
    way, for example in `kp`. The four rules of Kunin et al. 2020 refuse this option, because their ``beta`` has another meaning.
    With ``derivative=exact``, this rule is `bp`.

    In contrast to this rule, the code differentiates the mean loss with β = 1 and without s, so its finite difference depends on
    the batch size. This setting corresponds to ``beta`` = 1/N here, and the default is the value for the code's batches of 100.
    The rule replaces the derivative of every elementwise nonlinear module of torch.nn without parameters or random numbers, not
    only of ReLU. It rejects models that call functions such as ReLU or tanh outside of these modules, as `nn.LSTM` does. We took
    the equations from the code, did not compare them with the paper, and have not reproduced the paper's accuracies.
    """

    equations = (
        r"e_{\text{in}} &= g W",
        r"g_{\text{in}} &= \frac{\varphi(a + \beta s g) - \varphi(a - \beta s g)}{2 \beta s},\quad s = \frac{N}{c}",
    )

    search_space = {"beta": "choice(0.01,0.1,1)"}

    derivative: str = derivative_option("dual", identifying=True)
    beta: float = beta_option(identifying=True)

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        return TransposeFeedback()
