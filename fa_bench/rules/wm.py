"""Weight mirror."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.draws import INITIALISERS, seed_for
from fa_bench.errors import CoverageError
from fa_bench.lazy import torch
from fa_bench.mechanisms.carriers import Carrier, Fixed
from fa_bench.mechanisms.edge import EdgeRule, Site

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.mechanisms.coverage import Coverage
    from fa_bench.mechanisms.ops import Geometry

#: activation -> its φ'(0); that of ReLU is the mean of its slopes on both sides.
SLOPES = {"linear": 1.0, "relu": 0.5, "tanh": 1.0, "sigmoid": 0.25}


class Noise(NamedTuple):
    """How one layer is driven in mirror mode.

    Attributes:
        kind: gaussian or uniform.
        sigma: its standard deviation.
        batch: samples of noise.
        shape: of one sample.
        seed: draw k is a pure function of it and k.
    """

    kind: str
    sigma: float
    batch: int
    shape: tuple[int, ...]
    seed: int

    def draw(self, number: int, like: Tensor) -> Tensor:
        """Noise number `number`, (batch, *shape), on the device and in the dtype of `like`."""
        generator = torch.Generator(like.device).manual_seed(seed_for(self.seed, number))
        x = torch.empty(self.batch, *self.shape, dtype=like.dtype, device=like.device)
        if self.kind == "gaussian":
            return x.normal_(0.0, self.sigma, generator=generator)
        half_width = math.sqrt(3) * self.sigma
        return x.uniform_(-half_width, half_width, generator=generator)


class Mirror(Fixed):
    """e_in = g B, where B is drawn towards W by what noise at the layer's input makes of its output.

    Args:
        noise: the noise.
        rate: η.
        decay: λ.
        activation: φ.
        block_bias: whether b is left out.
        positions: n_pos, (1, 1, K...); None for a linear layer.
        geometry: how a convolution of the noise walks; None where the layer pads its input with zeros itself.
    """

    tensors = "B, drawn towards W by noise"

    def __init__(
        self, noise: Noise, rate: float, decay: float, activation: str, block_bias: bool, positions: Tensor | None,
        geometry: Geometry | None,
    ) -> None:
        self.noise, self.rate, self.decay = noise, rate, decay
        self.activation, self.block_bias = activation, block_bias
        self.positions, self.geometry = positions, geometry
        self.draws = 0
        self._scale: Tensor | None = None

    def mirror(self, layer: Any) -> None:
        """One mirror step: B <- (1 - λ) B + η Ŵ with the next noise."""
        from fa_bench.mechanisms.layers import padded
        from fa_bench.mechanisms.ops import weight_gradient

        self.draws += 1
        weight, feedback = layer.weight.detach(), layer._buffers["feedback_B"]
        bias = None if self.block_bias or layer.bias is None else layer.bias.detach()
        x = self.noise.draw(self.draws, weight)
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
    """Weight mirror: noise at each layer's input turns the feedback towards the weights.

    Section 4 of Akrout et al. 2019.

    e_in = g B; gradients of W and b are those of backpropagation with this error; B has no gradient, no optimizer and no decay of
    its optimizer. After every update, and independent of data, each layer by itself takes ``mirror_steps`` mirror steps:

        x = noise at the layer's input, N samples, zero mean, deviation σ (``noise``, ``sigma``, N = ``mirror_batch``)
        y = φ(W x + b)             φ = ``activation``; b is left out with ``block_bias``
        Ŵ = Σ yᵀ x / (N σ² φ' n)   for a convolution the weight gradient of x and y
        B <- (1 - λ) B + η Ŵ       η = ``mirror_rate``, λ = ``mirror_decay`` or, where that is null, η

    This is the paper's ΔB = η_B x yᵀ with the decay that it leaves open, and with the gain for which B's fixed point is W; with
    another decay it is W η / λ. φ' is 1 for the linear map and tanh, 1/2 for ReLU, 1/4 for the sigmoid: with b left out exact for
    ReLU, and for tanh and sigmoid while σ is small (σ ‖w‖ much below 1; the sigmoid's constant part then is noise of its own).
    With b each row has its own factor instead, for ReLU and Gaussian noise 2 Φ(b / (σ ‖w‖)). n is 1 for a linear layer; for a
    convolution it is the number of output positions where a tap of the kernel meets an input that is not padding, of this tap, or
    with ``per_tap=false`` the largest of all taps, which leaves the taps at the kernel's border too small.

    ``mirror_decay=0`` is the mirror of the numpy code released with the paper, B <- B + η_B Σ yᵀ x: its normalisation has no
    effect, and B grows without bound. η is η_B N σ² φ' n then. That code has η_B = 0.01, N = 128 and uniform noise of deviation
    0.1 / √12 through a sigmoid with biases:

        noise=uniform sigma=0.0288675 activation=sigmoid block_bias=false mirror_decay=0 mirror_rate=2.6667e-4

    For a fixed W, λ = η and Gaussian noise the angle between B and W goes to arctan √(η / (2 - η) · c (F + 1) / (N n)), F the
    fan-in, c = 1 for the linear map and 2 for ReLU, and the trace of B's first value to (1 - η)^steps.

    Choices: the linear map alone is mirrored, so that BatchNorm between it and its activation does not matter (it is never
    run); B drawn by ``b_init``; σ = 1, to which the linear map and ReLU are indifferent without b; η = 0.01; N = 128; one
    mirror step to an update; and ``initial_steps=469`` before training, an epoch of MNIST in batches of 128, as in the code
    released with the paper. The paper's runs mirrored ReLU without blocking biases; that code mirrors a sigmoid with uniform
    noise, σ = 0.0289. Noise has the size of the layer's input in `sample_input`, which models with convolutions need. What
    padding copies from the input (reflect, replicate, circular) gets noise of its own, for a copy's correlation would be taken
    for a weight. A layer whose input nothing trainable precedes (without `sample_input`: the first one defined) carries no
    error and is not mirrored: its B stays as drawn.
    """

    b_init: str = option("xavier_uniform", "initialiser of B", choices=[*INITIALISERS, "copy_w"])
    mirror_rate: float = option(0.01, "η: how far a mirror step draws B to what the noise shows", above=0, maximum=1)
    mirror_decay: float | None = option(None, "λ: fraction of B that a mirror step takes away; null: mirror_rate; 0: none, as in "
                                              "the code released with the paper", minimum=0, maximum=1)
    mirror_steps: int = option(1, "mirror steps after every update", minimum=0)
    initial_steps: int = option(469, "mirror steps when the rule is put into the model", minimum=0)
    mirror_batch: int = option(128, "samples of noise in a mirror step", minimum=1)
    noise: str = option("gaussian", "distribution of the noise", choices=["gaussian", "uniform"])
    sigma: float = option(1.0, "standard deviation of the noise", above=0)
    activation: str = option("linear", "what follows the weight in the mirror", choices=list(SLOPES))
    block_bias: bool = option(True, "leave the biases out of the mirror")
    per_tap: bool = option(True, "divide each tap of a kernel by its own number of positions")

    def shortened(self, fraction: float) -> WM:
        return dataclasses.replace(self, initial_steps=round(fraction * self.initial_steps))

    def put_in(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.layers import weighted_layers

        layers = weighted_layers(self.model)
        #: layer to be mirrored -> shapes of its input and output
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
        if sample_input is None:
            convolution = next((path for path, layer in layers.items() if hasattr(layer, "kernel_size")), None)
            if convolution is not None:
                raise CoverageError(f"rule '{self.name}' needs sample_input, one input batch, to see the size of what enters "
                                    f"the convolution '{convolution}'")
            self._shapes = dict.fromkeys(list(layers)[1:], ())
        else:
            trace = self.trace(sample_input)
            self._shapes = {path: (trace.input_shapes[path], trace.output_shapes[path]) for path in trace.reached}
        coverage = super().put_in(sample_input)
        self._mirrored = [layer for layer in self._layers.values() if isinstance(layer.carrier, Mirror)]
        return coverage

    @property
    def initial_steps_left(self) -> int:
        return max(self.initial_steps - self._mirrored[0].carrier.draws, 0) if self._mirrored else 0

    def initial_phase(self) -> Iterator[None]:
        for _ in range(self.initial_steps_left):
            self._mirror(1)
            yield

    def carrier(self, site: Site) -> Carrier:
        site.put("B", self.b_init)
        if site.path not in self._shapes:
            return Fixed()
        layer: Any = site.layer
        shape, positions, geometry = (layer.weight.shape[1],), None, None
        if hasattr(layer, "kernel_size"):
            shape, positions, geometry = _driven(layer, *self._shapes[site.path])
            if not self.per_tap:
                positions = positions.max().expand_as(positions)
        noise = Noise(self.noise, self.sigma, self.mirror_batch, shape, site.tensor_seed("mirror"))
        decay = self.mirror_rate if self.mirror_decay is None else self.mirror_decay
        return Mirror(noise, self.mirror_rate, decay, self.activation, self.block_bias, positions, geometry)

    def step(self) -> None:
        super().step()
        if not self.mode.hold:
            self._mirror(self.mirror_steps)

    def _mirror(self, steps: int) -> None:
        with torch.no_grad():
            for layer in self._mirrored:
                for _ in range(steps):
                    layer.carrier.mirror(layer)


def _driven(
    conv: Any, input_shape: tuple[int, ...], output_shape: tuple[int, ...]
) -> tuple[tuple[int, ...], Tensor, Geometry | None]:
    """What drives a convolution in mirror mode: shape of one sample, n_pos of each tap (1, 1, K...), geometry of `Mirror`."""
    from fa_bench.mechanisms.layers import padded
    from fa_bench.mechanisms.ops import Geometry, weight_gradient

    dims = len(conv.kernel_size)
    shape = tuple(input_shape[-dims - 1:])
    ones, own = torch.ones(1, 1, *shape[1:], dtype=torch.float64), None
    if conv.transposed:
        extra = conv._output_padding(ones, list(output_shape[-dims:]), conv.stride, conv.padding, conv.kernel_size, dims,
                                     conv.dilation)
        geometry = own = Geometry(conv.stride, conv.padding, conv.dilation, True, tuple(extra), conv.groups)
    else:
        ones, geometry = padded(conv, ones)
        if conv.padding_mode != "zeros":
            own, shape = geometry, (shape[0], *ones.shape[2:])
    # The weight gradient of ones and ones counts.
    single, tap = geometry._replace(groups=1), ones.new_ones(1, 1, *conv.kernel_size)
    positions = weight_gradient(torch.ones_like(torch.ops.aten.convolution(ones, tap, None, *single)), ones, tap, single)
    # A tap that meets nothing but padding: its Ŵ is 0, whatever it is divided by.
    return shape, positions.clamp_min(1), own
