"""Local losses for prediction and similarity."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError
from fa_bench.mechanisms.coverage import batch_note
from fa_bench.mechanisms.cut.local import LocalRule, linear_classifier, map_module
from fa_bench.mechanisms.feedback_options import decoder_init_option
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

#: Centred rows with a norm below this value count as constant; for float16, the limit is higher.
_TINY = 1e-8


@ALGORITHMS.register("predsim")
@dataclasses.dataclass(eq=False)
class PredSim(LocalRule):
    """Local losses: every hidden activation learns from a local classifier and from a loss on the similarity of samples.

    The rule is due to Nøkland and Eidnes 2019.

    Every hidden activation a has the following loss:

        (1-β) CE(D(a), labels) + β mean of (S(K a) - S(y))²    over all N x N pairs of samples.

    Here β is the option `beta`, CE the objective's loss (by default the cross-entropy), D a linear decoder, and y the one-hot
    labels. K, which has no bias, is a 3x3 convolution that keeps the number of channels or, for flat activations, a linear layer
    that keeps the number of features. S computes the cosines between the rows of its argument, after subtracting each row's mean.
    For a map with more than 3 channels and a height above 1, S uses the standard deviation of each channel over space; for other
    maps, it uses all values. D and K learn with the optimizer of W, and no error crosses a cut. ``loss=pred`` uses only CE(D(a),
    labels), and ``loss=sim`` uses only the similarity loss. With ``loss=predsim``, the error of the output layer is (1-β) times
    the true error; otherwise, it is the true error.

    D average-pools maps with more than `decoder_size` features. The weight of D is initially zero (`decoder_init`); its bias,
    which `decoder_bias=false` removes, has PyTorch's default initial values. These values, the divisor of the standard deviation
    (positions minus one) and β are those of the paper's code. The paper uses leaky ReLU, dropout, no decay, and Adam with a
    learning rate of 5e-4, which is multiplied by 0.25 after 50, 75, 88 and 94 % of the epochs.

    ``loss=pred decoder_init=pytorch decoder_bias=false`` is Mono-Forward (Gong, Li and Abdulla 2025, arXiv 2501.09238) with all
    layers trained simultaneously. D is their goodness matrix M (C, features), with scores a Mᵀ. ``experiment=mono_forward`` lists
    the numbers of an independent implementation, which trains one layer after the other with early stopping, has another M at the
    input, and predicts with the last M. Here, the output layer, which learns from its true gradient, plays the role of the last
    M.

    Our choices: if the size after the decoder's pooling does not divide the size of a map, the pooling windows overlap. A sample
    with a constant K a has similarity 0 to all other samples and no gradient, whereas the paper's code divides by zero. The
    cosines of a half-precision model are computed in single precision. A projection shortcut learns from the loss of the
    activation after the addition. Dropout after a cut does not affect the loss at this cut.

    If the model's output has positions, such as tokens, each position has its own label and its own loss from D. The similarity
    loss needs one label per sample, so ``loss=pred`` is then the only choice.

    The similarity depends on the batch; with data parallelism, each rank compares only its own samples.
    """

    equations = (
        r"\mathcal{L}_a &= (1 - \beta) \operatorname{CE}(D(a), y) + \beta \operatorname{mean} (S(K a) - S(y))^2",
        r"e_a &= \frac{\partial \mathcal{L}_a}{\partial a}",
    )

    search_space = {"beta": "choice(0.5,0.9,0.99,1)"}

    loss: str = option("predsim", "the local loss", choices=["predsim", "pred", "sim"])
    beta: float = option(0.99, "weight of the similarity loss, with loss=predsim", minimum=0, maximum=1)
    decoder_size: int = option(4096, "maps with more features are average-pooled before the decoder", minimum=1)
    decoder_init: str = decoder_init_option()
    decoder_bias: bool = option(True, "the decoder has a bias", identifying=False)

    def auxiliary(self, cut: str, shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        if self._layouts and self.loss != "pred":
            raise CoverageError(
                f"rule '{self.name}' compares samples by their labels, and the outputs of this model have a "
                "label for each position; use {loss}",
                {"loss": "pred"},
            )
        self._classes = classes
        parts = nn.ModuleDict()
        if self.loss != "sim":
            parts["decoder"] = linear_classifier(cut, shape, classes, self.decoder_size, self.decoder_init, self.decoder_bias)
        if self.loss != "pred":
            if len(shape) == 1:
                parts["similarity"] = nn.Linear(shape[0], shape[0], bias=False)
            else:
                parts["similarity"] = map_module("Conv", cut, shape)(shape[0], shape[0], 3, padding=1, bias=False)
        return parts

    def local_loss(self, cut: str, auxiliary: Any, activation: Tensor, target: Tensor) -> Tensor:
        functional: Any = nn.functional
        losses = []
        if self.loss != "sim":
            losses.append(self.loss_of(auxiliary["decoder"](activation), target))
        if self.loss != "pred":
            labels = functional.one_hot(target, self._classes).to(activation.dtype)
            losses.append(functional.mse_loss(similarity(auxiliary["similarity"](activation)), similarity(labels)))
        return losses[0] if len(losses) == 1 else (1 - self.beta) * losses[0] + self.beta * losses[1]

    def notes(self) -> tuple[str, ...]:
        return () if self.loss == "pred" else (batch_note("the similarity"),)

    def output_error(self, delta: Tensor) -> Tensor:
        return (1 - self.beta) * delta if self.loss == "predsim" else delta


def similarity(x: Tensor) -> Tensor:
    """The cosines (N, N) between the centred rows of x, (N, F) or maps (N, C, ...), in at least single precision.

    Rows whose norm is too small for a reliable direction count as constant. In float16, the gradient of such a row, which is
    divided by the norm, could overflow.
    """
    shortest = max(_TINY, torch.finfo(x.dtype).tiny)
    x, device = x.to(torch.promote_types(x.dtype, torch.float32)), x.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        x = x.flatten(2).std(2) if x.dim() > 2 and x.shape[1] > 3 and x.shape[2] > 1 else x.flatten(1)
        centred = x - x.mean(1, keepdim=True)
        norms = centred.norm(dim=1, keepdim=True)
        rows = torch.where(norms > shortest, centred / norms.clamp_min(shortest), 0.0)
        return rows.mm(rows.t())
