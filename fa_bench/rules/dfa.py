"""Direct feedback alignment."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError, OptionError
from fa_bench.mechanisms.cut.rule import CapturedActivation, CutRule
from fa_bench.mechanisms.feedback_options import density_option, error_at_option, init_option, positions_option, within_option
from fa_bench.mechanisms.feedback_tensors import feedback_tensor
from fa_bench.mechanisms.rule import INPUT, OUTPUT
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@ALGORITHMS.register("dfa")
@dataclasses.dataclass(eq=False)
class DFA(CutRule):
    """Direct feedback alignment: the output error is projected directly to every hidden activation.

    The rule is due to Nøkland 2016; see also section 2 of Li and Benna 2024.

    The error at the logits, δ = ∂L/∂z of shape (N, C), is projected directly to every hidden activation, where it replaces the
    error from the layers above. The derivatives from there down to the next weights are exact. The output layer learns from its
    true gradient. B is fixed and does not decay. `form` selects the projection:

    - neuron: the error at each cut is δ B, with B of shape (C, features of the cut).

    - kernel: the error is delivered at the input of each layer. For a linear layer, the error is δ B with B of shape (C, I). For
      a convolution, δ is copied to every output pixel, and the error is the input gradient of a convolution with B of shape (C,
      I, K...). Identity shortcuts still carry the error from the layers above, so in residual networks the rule mixes this error
      with direct feedback, as in the code of Li and Benna 2024.

    - shared: all cuts share one matrix of shape (C, features of the largest cut), which is uniform in [-1, 1). Each cut uses the
      first columns of this matrix; `normalise` divides them by √(features of the largest cut) (Launay et al. 2020).

    If the output has positions, such as tokens (N, T, C) or pixels (N, C, H, W), they are treated as a second batch axis. The
    error at position t of a cut (N, T, F) or (N, F, H, W) is δ_t B, with one B (C, F) for all positions. If the cut has fewer
    positions than the output (by an integer factor along each axis), each position gets the sum of the δ_t that it covers; if the
    cut has more, the δ_t are copied. If only the cut has positions, B has the shape (C, T F) and covers all features of the cut.
    With ``positions=shared``, B is then (C, F), and all positions get the same δ B.

    ``error_at=MODULE`` takes δ at the output h of this module instead, so B has the shape (features of h, F). Layers after the
    module, such as the vocabulary layer, learn by exact backpropagation, and h receives its exact error through their weights. If
    the module is also a cut, the layers before it learn from δ B and not from this exact error.

    With ``within=block``, there are cuts only at the ends of the model's blocks (or at `cuts`), and all layers between two cuts
    learn by exact backpropagation from the upper cut. This option causes weight transport within blocks, which coverage and
    reports state. By default (``within=layer``), there must be a cut between any weight or embedding and the next weight.

    Together, ``within`` and ``error_at`` give the settings of Launay et al. 2020 for transformers. In these settings, the error
    is taken at the input of the vocabulary layer, and the cuts are at the end of each block ("macro") or also inside the block
    ("micro"). The options are ``algorithm=dfa algorithm.form=shared algorithm.within=block`` and ``algorithm.error_at=MODULE``,
    where MODULE is the last block or the last normalisation layer. For "micro", add ``algorithm.cuts='[*norm1,*act,*norm2]'``,
    with the names of the model's own modules.

    Our choices: for neuron and kernel, B is Xavier-uniform (``b_init``), with the fans of a weight in the shape of B. For neuron,
    fan_in is therefore the number of features, and fan_out is C. If ``density`` is below 1, a fixed mask sets entries of B to
    zero.
    """

    equations = (r"e_a &= \delta B,\quad B \text{ fixed}",)

    search_space = {"b_init": "choice(xavier_uniform,kaiming_uniform,pytorch)"}

    form: str = option("neuron", "how the output error is projected", choices=["neuron", "kernel", "shared"])
    b_init: str = init_option("B (forms neuron and kernel)")
    density: float = density_option()
    normalise: bool = option(True, "divide the shared matrix by the square root of its number of columns (form shared)")
    within: str = within_option()
    error_at: str | None = error_at_option()
    positions: str = positions_option()

    def check(self) -> None:
        for name in ("within", "error_at", "positions") if self.form == "kernel" else ():
            if (value := getattr(self, name)) not in ("layer", None, "own"):
                raise OptionError(
                    name,
                    f"={value}: form=kernel delivers its error at the input of every layer and supports only "
                    f"{'null' if name == 'error_at' else 'layer' if name == 'within' else 'own'}",
                )
        if self.form == "kernel" and self.cuts is not None:
            raise OptionError("cuts", "form=kernel delivers its error at the input of every layer and does not support cuts")

    @property
    def side(self) -> str:
        return INPUT if self.form == "kernel" else OUTPUT

    def find_cuts(self, sample_input: Any) -> tuple[str, ...]:
        if self.form != "kernel":
            return super().find_cuts(sample_input)
        from fa_bench.mechanisms.weighted_layers import weighted_layers

        return tuple(weighted_layers(self.model))

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        largest = max(math.prod(shape) for shape in features.values())
        self._gain = 1 / math.sqrt(largest) if self.form == "shared" and self.normalise else 1.0
        for cut, shape in features.items():
            if self.form == "shared":
                self.put(cut, "B", "uniform_one", (classes, largest), self.density, "shared", columns=math.prod(shape))
            elif self.form == "kernel":
                layer: Any = self.model.get_submodule(cut)
                if getattr(layer, "transposed", False):
                    raise CoverageError(
                        f"rule '{self.name}' with form=kernel does not support the transposed convolution "
                        f"'{cut}'; use form=neuron"
                    )
                kernel = getattr(layer, "kernel_size", ())
                self.put(cut, "B", self.b_init, (classes, layer.in_channels if kernel else shape[-1], *kernel), self.density)
            else:
                self.put(cut, "B", self.b_init, (classes, math.prod(shape)), self.density)

    @property
    def reads_values(self) -> bool:
        """True for the kernel form, which needs the layer's input because the layer may pad it."""
        return self.form == "kernel"

    def broadcast(self, delta: Tensor, target: Tensor | None) -> Tensor:
        return delta if self._gain == 1 else delta * self._gain

    def signal(self, cut: str, captured: CapturedActivation, broadcast: Tensor, target: Tensor | None) -> Tensor:
        if self.form == "kernel":
            return self.input_error(cut, captured.tensor, captured.tensor, broadcast, captured.output_shape)
        return self.project(cut, broadcast, captured)

    def input_error(self, layer: str, x: Tensor, g: Tensor, delta: Tensor, output_shape: tuple[int, ...] | None = None) -> Tensor:
        """The error at the input of a layer for the kernel form. `output_shape` is the shape of the layer's output; by default,
        it is that of g."""
        from fa_bench.mechanisms.edge.layers import padded

        module = self.model.get_submodule(layer)
        feedback = feedback_tensor(module, "B")
        delta = delta.to(feedback.dtype)
        if feedback.dim() == 2:
            return (delta @ feedback).view(len(x), *[1] * (x.dim() - 2), x.shape[-1]).expand(x.shape).to(x.dtype)
        pixels = (output_shape or tuple(g.shape))[2:]
        copied = delta.view(*delta.shape, *[1] * len(pixels)).expand(*delta.shape, *pixels)
        with torch.enable_grad():
            leaf = x.detach().to(feedback.dtype).requires_grad_(True)
            padded_input, geometry = padded(module, leaf)
            error = torch.ops.aten.convolution_backward(
                copied, padded_input.detach(), feedback, None, *geometry._replace(groups=1), [True, False, False]
            )[0]
            return (error if padded_input is leaf else torch.autograd.grad(padded_input, leaf, error)[0]).to(x.dtype)
