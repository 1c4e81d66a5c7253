"""Weight mirror."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from fa_bench.errors import CoverageError
from fa_bench.mechanisms.edge.pathways import FeedbackPathway, FixedFeedback
from fa_bench.mechanisms.edge.rule import EdgeRule, LayerContext
from fa_bench.mechanisms.feedback_options import init_option
from fa_bench.mechanisms.feedback_tensors import feedback_tensor
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import torch
from fa_bench.utils.memory_limits import require_option_memory
from fa_bench.utils.sampling import seed_for

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.mechanisms.coverage import Coverage
    from fa_bench.mechanisms.edge.ops import Geometry

#: Activation -> φ'(0); for ReLU, this is the mean of the slopes on both sides.
SLOPES = {"linear": 1.0, "relu": 0.5, "tanh": 1.0, "sigmoid": 0.25}


class Noise(NamedTuple):
    """The noise at the input of a layer in mirror mode.

    Attributes:
        kind: gaussian or uniform.
        sigma: the standard deviation.
        batch: N, the number of samples.
        shape: shape of one sample.
        seed: seed of the noise; batch k depends only on this seed and k.
    """

    kind: str
    sigma: float
    batch: int
    shape: tuple[int, ...]
    seed: int

    def sample(self, number: int, like: Tensor) -> Tensor:
        """The batch of noise with the given number, (N, *shape), on the device and in the dtype of `like`."""
        generator = torch.Generator(like.device).manual_seed(seed_for(self.seed, number))
        x = torch.empty(self.batch, *self.shape, dtype=like.dtype, device=like.device)
        if self.kind == "gaussian":
            return x.normal_(0.0, self.sigma, generator=generator)
        half_width = math.sqrt(3) * self.sigma
        return x.uniform_(-half_width, half_width, generator=generator)


class MirroredFeedback(FixedFeedback):
    """Feedback e_in = g B, where B learns W from the layer's response to noise.

    Args:
        noise: the noise at the layer's input.
        rate: η.
        decay: λ.
        activation: φ.
        block_bias: whether b is omitted.
        positions: n, (1, 1, K...); None for a linear layer.
        geometry: the geometry of the convolution of the noise; None for a linear layer, and for a convolution that is not
            transposed and pads with zeros.
    """

    description = "B, which learns W from noise"

    def __init__(
        self,
        noise: Noise,
        rate: float,
        decay: float,
        activation: str,
        block_bias: bool,
        positions: Tensor | None,
        geometry: Geometry | None,
    ) -> None:
        self.noise, self.rate, self.decay = noise, rate, decay
        self.activation, self.block_bias = activation, block_bias
        self.positions, self.geometry = positions, geometry
        self.draws = 0
        self._scale: Tensor | None = None

    def mirror(self, layer: Any) -> None:
        """Take one mirror step with the next batch of noise: B <- (1 - λ) B + η Ŵ."""
        from fa_bench.mechanisms.edge.layers import padded
        from fa_bench.mechanisms.edge.ops import weight_gradient

        self.draws += 1
        weight, feedback = layer.weight.detach(), feedback_tensor(layer, "B")
        bias = None if self.block_bias or layer.bias is None else layer.bias.detach()
        x = self.noise.sample(self.draws, weight)
        scale = self.rate / (self.noise.batch * self.noise.sigma**2 * SLOPES[self.activation])
        if self.positions is None:
            y = self._activated(torch.nn.functional.linear(x, weight, bias))
            feedback.addmm_(y.t(), x, beta=1 - self.decay, alpha=scale)
            return
        x, geometry = (x, self.geometry) if self.geometry is not None else padded(layer, x)
        y = self._activated(torch.ops.aten.convolution(x, weight, bias, *geometry))
        if self._scale is None or self._scale.device != weight.device or self._scale.dtype != weight.dtype:
            self._scale = (scale / self.positions).to(weight)
        feedback.mul_(1 - self.decay).addcmul_(weight_gradient(y, x, weight, geometry), self._scale)

    def _activated(self, y: Tensor) -> Tensor:
        return y if self.activation == "linear" else getattr(torch, self.activation)(y)

    def state(self) -> dict[str, Any]:
        return {"seed": self.noise.seed, "draws": self.draws}

    def load_state(self, state: dict[str, Any]) -> None:
        self.noise, self.draws = self.noise._replace(seed=int(state["seed"])), int(state["draws"])


@ALGORITHMS.register("wm")
@dataclasses.dataclass(eq=False)
class WM(EdgeRule):
    """Weight mirror: the feedback learns the weights from each layer's response to noise.

    The rule is described in section 4 of Akrout et al. 2019.

    The rule computes e_in = g B. The gradients of W and b are those of backpropagation with this error. B has no gradient and no
    optimizer, and weight decay does not apply to it. After every update, and independently of the data, each layer takes
    ``mirror_steps`` mirror steps:

        x = noise at the layer's input, N samples, zero mean, standard deviation σ (``noise``, ``sigma``, N = ``mirror_batch``)
        y = φ(W x + b)             φ = ``activation``; b is omitted with ``block_bias``
        Ŵ = Σ yᵀ x / (N σ² φ' n)   for a convolution, the weight gradient of x and y
        B <- (1 - λ) B + η Ŵ       η = ``mirror_rate``, λ = ``mirror_decay`` or, if that is null, η

    The update of B is the paper's ΔB = η_B x yᵀ with a decay, which the paper does not specify, and with a gain for which the
    fixed point of B is W. If λ differs from η, the fixed point is W η / λ.

    The slope φ' is 1 for the linear map and tanh, 1/2 for ReLU and 1/4 for the sigmoid. Without b, the fixed point for ReLU is
    exactly W. For tanh and sigmoid, it tends to W for small σ (σ ‖w‖ much below 1 for every row w of W), where the constant part
    of the sigmoid is additional noise. With b and a nonlinear φ, each row of the fixed point is a row of W times its own factor;
    for ReLU and Gaussian noise, this factor is 2 Φ(b / (σ ‖w‖)), where Φ is the normal distribution function.

    For a linear layer, n is 1. For a convolution, n is counted for each tap of the kernel: it is the number of output positions
    at which the tap meets an input that is not zero padding. With ``per_tap=false``, n is the largest of these counts for all
    taps, which makes the taps at the kernel's border too small.

    ``mirror_decay=0`` gives the mirror update of the numpy code that was released with the paper, B <- B + η_B Σ yᵀ x. The
    normalisation in that code has no effect, and B grows without bound. The corresponding value of η is η_B N σ² φ' n. That code
    uses η_B = 0.01, N = 128 and uniform noise of standard deviation 0.1 / √12 through a sigmoid with biases. The corresponding
    options are:

        noise=uniform sigma=0.0288675 activation=sigmoid block_bias=false mirror_decay=0 mirror_rate=2.6667e-4

    For a fixed W, λ = η and Gaussian noise, the angle between B and W tends to arctan √(η / (2 - η) · c (F + 1) / (N n)), where F
    is the fan-in and c is 1 for the linear map and 2 for ReLU. The fraction of B's initial value that remains is (1 - η)^steps.

    Our choices: by default, only the linear map is mirrored, so batch normalisation between the map and its activation does not
    matter; mirror steps do not run it. B is sampled by ``b_init``. The noise has σ = 1; its scale does not matter for the linear
    map, or for ReLU without b. By default, η is 0.01, N is 128, and there is one mirror step per update. Before training, there
    are ``initial_steps=469`` mirror steps, which is an epoch of MNIST in batches of 128, as in the code released with the paper.
    The paper's runs mirrored ReLU without blocking biases.

    The noise has the size of the layer's input in `sample_input`, which models with convolutions need. Padding that copies the
    input (reflect, replicate, circular) gets independent noise, because the correlation of a copy would be mistaken for a weight.
    A layer whose input depends on no parameter propagates no error and is not mirrored, so its B keeps its initial value. Without
    `sample_input`, the layer that is defined first is assumed to be the only such layer.
    """

    equations = (
        r"e_{\text{in}} &= g B",
        r"\nabla_W &= g^\top x",
        r"y &= \varphi(W x + b),\quad x \text{ noise of deviation } \sigma",
        r"\hat{W} &= \sum \frac{y^\top x}{N \sigma^2 \varphi' n}",
        r"B &\leftarrow (1 - \lambda) B + \eta \hat{W}",
    )

    search_space = {"mirror_rate": "tag(log,interval(1e-3,0.1))"}

    b_init: str = init_option("B", can_copy=True)
    mirror_rate: float = option(0.01, "η: step size of a mirror step towards its estimate of W", above=0, maximum=1)
    mirror_decay: float | None = option(
        None,
        "λ: fraction by which a mirror step decays B; null: mirror_rate; 0: no decay, as in the code released with the paper",
        minimum=0,
        maximum=1,
    )
    mirror_steps: int = option(1, "mirror steps after every update", minimum=0)
    initial_steps: int = option(469, "mirror steps before training", minimum=0)
    mirror_batch: int = option(128, "noise samples per mirror step", minimum=1)
    noise: str = option("gaussian", "distribution of the noise", choices=["gaussian", "uniform"])
    sigma: float = option(1.0, "standard deviation of the noise", above=0)
    activation: str = option("linear", "activation function applied to the layer's response in mirror mode", choices=list(SLOPES))
    block_bias: bool = option(True, "omit the biases in mirror mode")
    per_tap: bool = option(True, "divide each tap of a kernel by its own number of output positions")

    def shortened(self, fraction: float) -> WM:
        return dataclasses.replace(self, initial_steps=round(fraction * self.initial_steps))

    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.weighted_layers import weighted_layers

        layers = weighted_layers(self.model)
        #: Layer to be mirrored -> the shapes of its input and output.
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
        if sample_input is None:
            convolution = next((path for path, layer in layers.items() if hasattr(layer, "kernel_size")), None)
            if convolution is not None:
                raise CoverageError(
                    f"rule '{self.name}' needs sample_input, one input batch, to determine the input size of "
                    f"the convolution '{convolution}'"
                )
            self._shapes = dict.fromkeys(list(layers)[1:], ())
        else:
            trace = self.trace(sample_input)
            self._shapes = {path: (trace.input_shapes[path], trace.output_shapes[path]) for path in trace.reached}
        coverage = super().wire(sample_input)
        pathways = [(layer, layer.pathway) for layer in self._layers.values()]
        self._mirrored = [(layer, pathway) for layer, pathway in pathways if isinstance(pathway, MirroredFeedback)]
        return coverage

    @property
    def initial_steps_left(self) -> int:
        return max(self.initial_steps - self._mirrored[0][1].draws, 0) if self._mirrored else 0

    def initial_phase(self) -> Iterator[None]:
        for _ in range(self.initial_steps_left):
            self._mirror(1)
            yield

    def pathway(self, layer: LayerContext) -> FeedbackPathway:
        layer.put("B", self.b_init)
        if layer.path not in self._shapes:
            return FixedFeedback()
        module: Any = layer.module
        shape, positions, geometry = (module.weight.shape[1],), None, None
        if hasattr(module, "kernel_size"):
            shape, positions, geometry = _noise_geometry(module, *self._shapes[layer.path])
            if not self.per_tap:
                positions = positions.max().expand_as(positions)
        size, what = self.mirror_batch * math.prod(shape), f"the noise of layer '{layer.path}'"
        require_option_memory("mirror_batch", self.mirror_batch, size, what, module.weight.device.type)
        noise = Noise(self.noise, self.sigma, self.mirror_batch, shape, layer.tensor_seed("mirror"))
        decay = self.mirror_rate if self.mirror_decay is None else self.mirror_decay
        return MirroredFeedback(noise, self.mirror_rate, decay, self.activation, self.block_bias, positions, geometry)

    @property
    def needs_step(self) -> bool:
        return super().needs_step or (bool(self._mirrored) and self.mirror_steps > 0)

    def step(self) -> None:
        super().step()
        if not self.mode.freeze_random:
            self._mirror(self.mirror_steps)

    def _mirror(self, steps: int) -> None:
        with torch.no_grad():
            for layer, pathway in self._mirrored:
                for _ in range(steps):
                    pathway.mirror(layer)


def _noise_geometry(
    conv: Any, input_shape: tuple[int, ...], output_shape: tuple[int, ...]
) -> tuple[tuple[int, ...], Tensor, Geometry | None]:
    """The shape of one noise sample, n of each tap (1, 1, K...), and the geometry, as in `MirroredFeedback`, of a convolution."""
    from fa_bench.mechanisms.edge.layers import padded
    from fa_bench.mechanisms.edge.ops import Geometry, weight_gradient

    dims = len(conv.kernel_size)
    shape = tuple(input_shape[-dims - 1 :])
    ones, noise_geometry = torch.ones(1, 1, *shape[1:], dtype=torch.float64), None
    if conv.transposed:
        output_padding = conv._output_padding(
            ones, list(output_shape[-dims:]), conv.stride, conv.padding, conv.kernel_size, dims, conv.dilation
        )
        geometry = noise_geometry = Geometry(conv.stride, conv.padding, conv.dilation, True, tuple(output_padding), conv.groups)
    else:
        ones, geometry = padded(conv, ones)
        if conv.padding_mode != "zeros":
            noise_geometry, shape = geometry, (shape[0], *ones.shape[2:])
    # If all inputs and errors are one, the weight gradient counts positions.
    ungrouped, tap = geometry._replace(groups=1), ones.new_ones(1, 1, *conv.kernel_size)
    positions = weight_gradient(torch.ones_like(torch.ops.aten.convolution(ones, tap, None, *ungrouped)), ones, tap, ungrouped)
    # For a tap that meets only padding, Ŵ is 0, so the divisor has no effect.
    return shape, positions.clamp_min(1), noise_geometry
