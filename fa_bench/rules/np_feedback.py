"""Feedback learned by node perturbation."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError
from fa_bench.mechanisms.drawing import DrawingRule
from fa_bench.mechanisms.edge.pathways import BackwardContext, FeedbackPathway, LearnedFeedback, feedback_gradient
from fa_bench.mechanisms.edge.rule import LayerContext, RandomFeedbackRule
from fa_bench.mechanisms.loss_scale import PassOutput
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.coverage import Coverage
    from fa_bench.mechanisms.second_pass import FirstPass


class Regression:
    """The data with which feedback learns from noise in one training pass.

    Attributes:
        noise: layer -> the noise at its input in each of its calls.
        slopes: the effect of the noise on each sample's loss, (N,); None before the backward pass.
        scale: N over the scale of the loss.
        calls: layer -> the number of its calls so far in the first pass.
    """

    def __init__(self) -> None:
        self.noise: dict[str, list[Tensor]] = {}
        self.slopes: Tensor | None = None
        self.scale = 1.0
        self.calls: dict[str, int] = {}

    def target(self, layer: Any, call: int, rule: str) -> Tensor:
        """The negative estimate of each sample's error at the layer's input, with the shape of the input."""
        from fa_bench.mechanisms.weighted_layers import sample_axis

        if self.slopes is None:
            raise CoverageError(
                f"rule '{rule}' learns its feedback from the labels; call rule.backward(loss, logits, target) "
                f"with the output of this forward pass (activation checkpointing needs use_reentrant=False)"
            )
        noise = self.noise[layer.path][call]
        shape = [1] * noise.dim()
        shape[sample_axis(layer, noise.dim())] = -1
        return noise * -self.slopes.to(noise.dtype).view(shape)


class RegressedFeedback(LearnedFeedback):
    """Feedback e_in = g B, where B learns from errors that are estimated with noise.

    Args:
        rule: the rule, attached.
    """

    description = "B, which learns from noise"
    follows = None

    def __init__(self, rule: NPFeedback) -> None:
        self.rule = rule

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        regression, rule = self.rule.regression, self.rule.name
        call = regression.calls.get(layer.path, 0)
        regression.calls[layer.path] = call + 1
        how = feedback_gradient(layer, "B", activation=lambda: regression.target(layer, call, rule))
        return BackwardContext(
            layer.learned["B"].tensor, gradients=tuple(one._replace(error_scale=lambda: regression.scale) for one in how)
        )


@ALGORITHMS.register("np_feedback")
@dataclasses.dataclass(eq=False)
class NPFeedback(DrawingRule, RandomFeedbackRule):
    """Feedback alignment with feedback that learns from node perturbation.

    The rule is due to Lansdell, Prakash and Kording 2020, arXiv 1906.00889; details follow their official code.

    The rule computes e_in = g B, and W and b learn from this error, as in feedback alignment. B learns to predict errors that are
    estimated with noise. Let ξ be standard normal noise at the input of every layer, and σ the option `sigma`. Two additional
    forward passes, in which ±σξ is added to these inputs, give the losses L± of each sample n. Then

        d_n = (L⁺_n - L⁻_n) / 2σ,    gradient of B = 1/N Σ_n ĝ_nᵀ (ĝ_n B - d_n ξ_n).

    Here ĝ_n, which is N times g, is the error of sample n at the layer's output. The product d ξ is an unbiased estimate of
    ∂L_n/∂x up to O(σ²), so B learns W in a linear network. B has its own learning rate, which is `b_lr_scale` times that of W (0
    gives feedback alignment), or its own optimizer. The authors train B by plain SGD.

    Deviations from the code: d_n is a two-sided difference of losses, whereas the code subtracts the loss without noise from the
    loss with noise. The gradient of B is a mean over the batch instead of a sum. Any loss and nonlinearity can be used, whereas
    the code has squared errors and sigmoids. B is sampled by `b_init` and ``linear_b_init``, whereas the code samples weights and
    feedback from N(0, 2/fan). The B of the first layer propagates no error but is trained anyway.

    If a convolution pads its input with anything other than zeros, or pads the two sides differently (``same`` with an even
    kernel), B learns from the errors at the padded input, including its border. In this case, B learns W only approximately.

    Dropout masks are the same in all three passes. Batch normalisation uses the statistics of each pass and updates its running
    statistics in the first pass. An update needs two additional forward passes and the computation of the gradient of B.
    """

    equations = (
        r"e_{\text{in}} &= g B",
        r"\nabla_W &= g^\top x",
        r"d_n &= \frac{L_n^+ - L_n^-}{2 \sigma}",
        r"\nabla_B &= \frac{1}{N} \sum_n \hat{g}_n^\top (\hat{g}_n B - d_n \xi_n),\quad \hat{g}_n = N g_n",
    )

    search_space = {"sigma": "tag(log,interval(1e-4,1))", "b_lr_scale": "tag(log,interval(1e-3,10))"}

    sigma: float = option(1e-2, "standard deviation of the noise", above=0)
    b_lr_scale: float = option(1.0, "learning rate of B relative to that of W, unless B has its own optimizer", minimum=0)

    repeats = True

    def wire(self, sample_input: Any) -> Coverage:
        self.regression = Regression()
        self._target: Tensor | None = None
        self._loss_scale: float | None = None
        self._is_delivered = False
        return super().wire(sample_input)

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        self.put_feedback(layer)
        return RegressedFeedback(self)

    # -------------------------------------------------------------------------------------------- every pass
    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.first_pass = None
        super().begin_forward(model, args, kwargs)
        if self.first_pass is not None:
            self.regression = Regression()

    def end_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        from fa_bench.mechanisms.cut.delivery import depends_on
        from fa_bench.mechanisms.cut.function import DeliverFunction
        from fa_bench.mechanisms.trace import named_results, replaced

        super().end_forward(model, args, output)
        first, self.first_pass = self.first_pass, None
        if first is None or output is None:
            return None
        results = named_results(output)
        for name, result in results.items():
            if result.dim() == 0:
                if not any(other.dim() and depends_on(result, other) for other in results.values()):
                    continue  # depends on no other output, like a penalty on the weights
                raise CoverageError(
                    f"the model returns a loss ('{name}') that it has computed itself, from which rule '{self.name}' "
                    f"cannot learn; call the model without labels, and compute the loss from its logits"
                )
            learn = functools.partial(self._learn, first, name, self.regression, PassOutput(self.name, result))
            output = replaced(output, result, DeliverFunction.apply(learn, 0, False, result))
        return output

    def deliver(self, loss: Tensor, logits: Tensor | None, target: Tensor | None, loss_scale: float | None = None) -> None:
        self._target, self._loss_scale, self._is_delivered = target, loss_scale, False
        try:
            super().deliver(loss, logits, target, loss_scale)
        finally:
            self._target = self._loss_scale = None
        if not self._is_delivered:
            raise ValueError(f"rule '{self.name}': the loss was not computed by a training forward pass of the attached model")

    def _learn(
        self, first: FirstPass, name: str, regression: Regression, output: PassOutput, delta: Tensor, _: Any
    ) -> list[Tensor]:
        """Compute the effect of the noise on the loss, before the backward pass reaches the layers, and return δ."""
        from fa_bench.mechanisms.cut.positions import require_labels

        target = self._target
        if target is None:
            raise ValueError(f"rule '{self.name}' learns its feedback from the labels; call rule.backward(loss, logits, target)")
        if regression.slopes is not None:
            raise CoverageError(f"rule '{self.name}': the loss depends on two outputs of the model, but the labels belong to one")
        self._is_delivered = True
        output.unchanged()
        first.require_own_weights()
        scale = self._loss_scale
        if scale is None:
            scale = output.scale(delta, target, 1.0, self.objective)
        if not self.mode.freeze_random:
            self.next_draws()
            try:
                with torch.no_grad():
                    plus, minus = (self._losses(first, name, regression, size, target) for size in (self.sigma, -self.sigma))
            except (IndexError, RuntimeError, ValueError):
                require_labels(self.name, target, delta.shape, self.objective)
                raise
            regression.slopes = (plus - minus) / (2 * self.sigma)
            regression.scale = len(delta) / scale if scale else 0.0
        return [delta]

    def _losses(self, first: FirstPass, output: str, regression: Regression, size: float, target: Tensor) -> Tensor:
        """The loss of each sample, (N,), when the noise times `size` is added to the inputs of all layers."""
        from fa_bench.mechanisms.contexts import set_temporarily
        from fa_bench.mechanisms.cut.positions import sample_losses
        from fa_bench.mechanisms.second_pass import again
        from fa_bench.mechanisms.trace import loss_output

        noise, calls = regression.noise, dict.fromkeys(self._layers, 0)

        def perturbed(path: str, tensor: Tensor) -> Tensor:
            call, calls[path] = calls[path], calls[path] + 1
            known = noise.setdefault(path, [])
            if call == len(known):
                known.append(self._draws.normal(f"{path} {call}", tensor))
            return tensor.add(known[call], alpha=size)

        changes = {path: lambda tensor, path=path: perturbed(path, tensor) for path in self._layers}
        with set_temporarily([self.mode], "always_layerwise", True):  # a fused kernel would not call the layers
            logits = loss_output(again(self.model, self.mode, first, inputs=changes, precise=True), output)
        return sample_losses(self.objective, logits.to(torch.promote_types(logits.dtype, torch.float32)), target)
