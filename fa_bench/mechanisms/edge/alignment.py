"""Feedback that learns from local losses of a layer's weight and feedback. Some of these losses also depend on the layer's input.

For the rows x of a layer's input, or of noise in its place, let z_W = x Wᵀ and z_B = x Bᵀ. With means over samples and positions,
the losses are:

    decay    ‖W‖² + ‖B‖²
    amp      -mean Σ z_W z_B
    null     mean ‖z_W B‖²
    self     -Σ W B
    sparse   mean ‖z_W‖² + mean ‖z_B‖²

For a convolution, z_W and z_B are its outputs with W and B, with one row for each sample and output position. The product z_W B
is the error that B passes from z_W to the input. No loss has a gradient at the layer's input, and W gets the gradients of the
losses only on request.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from fa_bench.errors import CoverageError, OptionError, StateError, missing_method
from fa_bench.mechanisms.edge.pathways import BackwardContext, FeedbackPathway, feedback_gradient
from fa_bench.mechanisms.edge.rule import LayerContext, RandomFeedbackRule
from fa_bench.mechanisms.feedback_tensors import feedback_tensor
from fa_bench.mechanisms.loss_scale import is_unscaled, measured_scale
from fa_bench.registry.options import option
from fa_bench.utils.lazy import torch
from fa_bench.utils.memory_limits import require_option_memory
from fa_bench.utils.sampling import seed_for

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.mechanisms.coverage import Coverage
    from fa_bench.mechanisms.edge.ops import Geometry


class AlignmentLoss(NamedTuple):
    """The coefficient of each local loss in the sum that the feedback minimises."""

    decay: float = 0.0
    amp: float = 0.0
    null: float = 0.0
    self_: float = 0.0
    sparse: float = 0.0

    @property
    def reads_input(self) -> bool:
        """Whether the sum depends on the layer's input."""
        return bool(self.amp or self.null or self.sparse)

    def feedback_gradient(self, weight: Tensor, feedback: Tensor, x: Tensor, geometry: Geometry | None) -> Tensor:
        """The gradient of B; `x` and `geometry` are as for `LayerProducts`."""
        gradient = 2 * self.decay * feedback - self.self_ * weight
        if not self.reads_input:
            return gradient
        layer = LayerProducts(x, geometry)
        if self.amp or self.sparse:  # both gradients are linear in z_W and z_B, so one product computes them together
            z = layer.output(2 * self.sparse * feedback - self.amp * weight)
            gradient = gradient + layer.correlation(z, x, weight) / layer.rows(z)
        if self.null:
            z = layer.output(weight)
            gradient = gradient + layer.correlation(z, layer.input_error(z, feedback), weight) * (2 * self.null / layer.rows(z))
        return gradient

    def weight_gradient(self, weight: Tensor, feedback: Tensor, x: Tensor, geometry: Geometry | None) -> Tensor:
        """The gradient of W; `x` and `geometry` are as for `LayerProducts`."""
        swapped = self._replace(null=0.0).feedback_gradient(feedback, weight, x, geometry)
        if not self.null:
            return swapped
        layer = LayerProducts(x, geometry)
        z = layer.output(weight)
        back = LayerProducts(layer.input_error(z, feedback), geometry).output(feedback)
        return swapped + layer.correlation(back, x, weight) * (2 * self.null / layer.rows(z))


class LayerProducts(NamedTuple):
    """The matrix products, or convolutions, of one layer from which the gradients of the local losses are computed.

    Attributes:
        x: the layer's input, (rows, I); for a convolution (N, I, ...), already padded if `Geometry` cannot describe the padding.
        geometry: the geometry of a convolution; None for a linear layer.
    """

    x: Tensor
    geometry: Geometry | None

    def output(self, weight: Tensor) -> Tensor:
        """The product x Wᵀ without the bias, (rows, O) or (N, O, ...)."""
        if self.geometry is None:
            return self.x.mm(weight.t())
        return torch.ops.aten.convolution(self.x, weight, None, *self.geometry)

    def input_error(self, z: Tensor, feedback: Tensor) -> Tensor:
        """The product z B, in the shape of the input."""
        if self.geometry is None:
            return z.mm(feedback)
        return torch.ops.aten.convolution_backward(z, self.x, feedback, None, *self.geometry, [True, False, False])[0]

    def correlation(self, z: Tensor, x: Tensor, like: Tensor) -> Tensor:
        """The product zᵀ x, in the shape of the weight `like`."""
        if self.geometry is None:
            return z.t().mm(x)
        from fa_bench.mechanisms.edge.ops import weight_gradient

        return weight_gradient(z, x, like, self.geometry)

    def rows(self, z: Tensor) -> int:
        """The number of samples times the number of output positions, at least 1."""
        return max(z.numel() // max(z.shape[1], 1), 1)


class AlignedFeedback(FeedbackPathway):
    """e_in = g B, where B learns from a local loss.

    Args:
        loss: the loss.
        scale: the factor by which the task's loss was scaled; the gradients are multiplied by it.
        updates_weight: whether W gets the gradient of the local loss, too.
        on_noise: whether the local loss is computed on the layer's `noise` instead of its input.
    """

    learned = ("B",)
    always_needed = True

    def __init__(self, loss: AlignmentLoss, scale: LossScale, updates_weight: bool, on_noise: bool) -> None:
        self.loss, self.scale, self.updates_weight, self.on_noise = loss, scale, updates_weight, on_noise
        self.description = "B, which learns from a local loss" + (" on noise" if on_noise else "")

    def describe(self) -> str:
        return self.description

    def effective(self, layer: Any) -> Tensor:
        return feedback_tensor(layer, "B")

    def context(self, layer: Any, x: Tensor) -> BackwardContext:
        # `weight` and `feedback` are the tensors of this pass; in the backward pass, the layer may have others
        # (torch.func.functional_call).
        weight, feedback = layer.weight, layer.learned["B"].tensor
        of_input = functools.partial(self.gradient, self.loss.feedback_gradient, layer, weight, feedback)
        of_weight = functools.partial(self.gradient, self.loss.weight_gradient, layer, weight, feedback)
        return BackwardContext(
            feedback,
            gradients=feedback_gradient(layer, "B", of_input=of_input),
            local_gradient=of_weight if self.updates_weight else None,
        )

    def gradient(
        self, of: Any, layer: Any, weight: Tensor, feedback: Tensor, x: Tensor, geometry: Geometry | None, rows: slice | None
    ) -> Tensor:
        """The gradient of the local loss, times the factor by which the task's loss was scaled.

        Args:
            of: the method of the loss that computes the gradient.
            layer: the layer.
            weight, feedback: W and B in the forward pass.
            x: the layer's input, as its autograd Function gets it.
            geometry: the geometry of a convolution.
            rows: the outputs that are computed; None: all.
        """
        device = x.device.type
        if torch.is_autocast_enabled(device):  # enabled by the caller of the backward pass
            with torch.autocast(device, enabled=False):
                return self.gradient(of, layer, weight, feedback, x, geometry, rows)
        weight, feedback = weight.detach(), feedback.detach()
        if rows is not None:
            weight, feedback = weight[rows], feedback[rows]
        if layer.mode.freeze_random and not self.scale.is_known:  # a metric asks only for this layer's input error
            return torch.zeros_like(weight)
        if self.on_noise:
            x, geometry = layer.prepared(feedback_tensor(layer, "noise"))
        return of(weight, feedback, x.to(feedback.dtype), geometry) * self.scale.factor(feedback)


class LossScale:
    """The factor by which the task's loss was scaled in the current backward pass.

    The factor is kept as a tensor, so that a compiled graph can read it when it runs. The factor is NaN outside the rule's
    backward passes.
    """

    def __init__(self, rule: str) -> None:
        self.rule, self.last, self.value = rule, 1.0, torch.full((), torch.nan, dtype=torch.float64)
        self.is_known = False

    def set(self, factor: float | None) -> None:
        """Set the factor; None means that the backward pass has ended."""
        self.is_known = factor is not None
        if factor is not None:
            self.last = factor
        self.value.data.fill_(torch.nan if factor is None else factor)  # not counted as a change by autograd

    def factor(self, like: Tensor) -> Tensor:
        """The factor in the dtype of a tensor.

        Raises:
            StateError: outside a backward pass of the rule; in a compiled graph, the result is NaN instead.
        """
        if not torch.compiler.is_compiling() and not self.is_known:
            raise StateError(
                f"rule '{self.rule}' adds local losses, which are scaled like the loss; call rule.backward(loss, "
                "logits, target), not loss.backward()"
            )
        return self.value.to(like.dtype)


@dataclasses.dataclass(eq=False)
class AlignmentRule(RandomFeedbackRule):
    """Base class of the rules whose feedback learns from local losses; subclasses implement `alignment_loss`.

    The error at a layer's input is e_in = g B. Each layer adds its local loss to the loss of the task. The local loss is
    multiplied by the factor by which gradient accumulation or a gradient scaler has scaled the task's loss. The local loss has no
    gradient at the layer's input, and none for W unless ``update_forward`` is set. B is trained by W's optimizer at
    ``b_lr_scale`` times the learning rate of W, or by an optimizer of its own (``optimizer@feedback_optimizer=adam``). The weight
    decay of the optimizer that trains B acts in addition to the local loss. ``b_init`` and ``linear_b_init`` are the initialisers
    of B. A layer that runs several times in a forward pass adds its loss each time.
    """

    b_lr_scale: float = option(1.0, "learning rate of B relative to that of W, unless B has its own optimizer", minimum=0)
    update_forward: bool = option(False, "the local losses also train the weights")

    #: Whether the losses are computed on noise.
    on_noise = False

    def check(self) -> None:
        super().check()
        if self.derivative != "exact":
            raise OptionError(
                "derivative",
                f"={self.derivative} is not available, because beta is a coefficient of the local losses in this rule",
            )

    def alignment_loss(self) -> AlignmentLoss:
        """The coefficients of the local losses."""
        raise missing_method(self, "alignment_loss")

    def wire(self, sample_input: Any) -> Coverage:
        self._scale = LossScale(self.name)
        return super().wire(sample_input)

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        self.put_feedback(layer)
        return AlignedFeedback(self.alignment_loss(), self._scale, self.update_forward, self.on_noise)

    def deliver(self, loss: Tensor, logits: Tensor | None, target: Tensor | None, loss_scale: float | None = None) -> None:
        scale = self._scale
        scale.set(self._factor(loss, logits, target) if loss_scale is None else loss_scale)
        try:
            super().deliver(loss, logits, target, loss_scale)
        finally:
            scale.set(None)

    def _factor(self, loss: Tensor, logits: Tensor | None, target: Tensor | None) -> float:
        if is_unscaled(loss, target, self.objective):
            return 1.0
        if logits is None:
            raise ValueError(
                f"rule '{self.name}' scales its local losses like the loss, and cannot infer the factor without "
                "the logits; call rule.backward(loss, logits, target), or pass the factor, such as loss_scale=1.0"
            )
        (delta,) = torch.autograd.grad(loss, logits, retain_graph=True)
        return measured_scale(self.name, delta, logits.detach(), target, self._scale.last, self.objective)


@dataclasses.dataclass(eq=False)
class InputAlignmentRule(AlignmentRule):
    """Base class of the alignment rules whose local losses depend on the layer's input.

    With ``signal=noise``, the losses are computed on standard normal noise in the shape of the layer's input, without positions
    if the layer is linear. The ``noise_batch`` noise samples are drawn again after every update and are the same in all
    processes. The expected second moments of such noise are the identity.
    """

    signal: str = option(
        "input", "what the local losses are computed on: the layer's input, or noise", choices=["input", "noise"]
    )
    noise_batch: int = option(32, "number of noise samples, with signal=noise", minimum=1)

    @property
    def on_noise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.signal == "noise"

    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.weighted_layers import sample_axis, weighted_layers

        self._shapes: dict[str, tuple[int, ...]] = {}
        self._draws = 0
        if self.on_noise:
            layers = weighted_layers(self.model)
            if sample_input is not None:
                for path, shape in self.trace(sample_input).input_shapes.items():
                    axis = sample_axis(layers[path], len(shape))
                    self._shapes[path] = (*shape[:axis], *shape[axis + 1 :])
            for path, layer in layers.items():
                if hasattr(layer, "kernel_size") and path not in self._shapes:
                    raise CoverageError(
                        f"rule '{self.name}' with signal=noise needs sample_input, one input batch, to find the "
                        f"input size of the convolution '{path}'"
                    )
        coverage = super().wire(sample_input)
        self._sample()
        return coverage

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        pathway = super().pathway(layer)
        if self.on_noise:
            # A linear layer treats all positions alike, so its noise has no position axis.
            shape = (layer.module.weight.shape[1],) if layer.is_linear else self._shapes[layer.path]
            size, what = self.noise_batch * math.prod(shape), f"the noise of layer '{layer.path}'"
            require_option_memory("noise_batch", self.noise_batch, size, what)
            layer.put("noise", torch.zeros(self.noise_batch, *shape))
        return pathway

    def _sample(self) -> None:
        """Replace the noise of all layers."""
        for path, layer in self._layers.items():
            if (noise := feedback_tensor(layer, "noise")) is not None:
                generator = torch.Generator(noise.device).manual_seed(seed_for(self.seed, path, "noise", self._draws))
                noise.normal_(generator=generator)

    @property
    def needs_step(self) -> bool:
        return super().needs_step or self.on_noise

    def step(self) -> None:
        super().step()
        if self.on_noise and not self.mode.freeze_random:
            self._draws += 1
            self._sample()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **({"draws": self._draws, "seed": self.seed} if self.on_noise else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.on_noise:
            self._draws, self.seed = int(state["draws"]), int(state["seed"])
