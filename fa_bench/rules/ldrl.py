"""Target propagation with the local difference reconstruction loss."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError
from fa_bench.mechanisms.checkpointing import recomputing, refuse_reentrant
from fa_bench.mechanisms.cut.local import LocalRule, map_module
from fa_bench.mechanisms.cut.rule import CapturedActivation
from fa_bench.mechanisms.drawing import DrawingRule
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

#: The key of the model's output, where the last block ends, in dictionaries that are otherwise indexed by cuts.
OUTPUT_OF_MODEL = ""


@ALGORITHMS.register("ldrl")
@dataclasses.dataclass(eq=False)
class LDRL(DrawingRule, LocalRule):
    """Target propagation through blocks: feedback maps learn from noise by the local difference reconstruction loss (L-DRL).

    The rule is due to Ernoult et al. 2022, "Towards scaling difference target propagation with backprop targets".

    The model is a chain of blocks f, which are those that the model declares (``model.blocks``) or those that end with the
    modules in ``cuts``. Each block except the first has a feedback map g from its output h' = f(h) to its input h; in this
    implementation, g is a linear map G without bias. If the target of a block is h' - e', the target of the block below is h +
    g(h' - e') - g(h'). The following equation therefore gives the error at the end of the block below:

        e = g(h') - g(h' - e') = G e'

    The error at the end of the last block is δ, the gradient of the loss at the logits. Each error is backpropagated within its
    block, as the gradient of half the squared distance to the target; this is weight transport within blocks. G minimises

        loss = (-2 σε · (g(f(h + σε)) - g(f(h))) + ‖g(f(h) + σε') - g(f(h))‖²) / σ², averaged over the samples.

    Here ε and ε' are Gaussian noise, and σ is ``sigma``. For small σ, G converges to Jᵀ, the transpose of J = ∂h'/∂h averaged
    over the samples. For a linear block, the errors are then those of backpropagation.

    G is a linear layer if h or h' is flat. If both are maps, G enlarges h' to the size of h by copying values and then applies a
    3x3 convolution. ``b_lr_scale`` is the learning rate of G relative to that of the weights. A high learning rate makes G
    diverge if a batch has fewer samples than h' has features.

    Deviations from the code: feedback maps are linear, so errors do not depend on h, whereas the code's maps have the
    nonlinearities and max-unpooling of their blocks. G learns once in every step, whereas the code takes 20 to 55 separate steps
    for every batch. The loss is divided by σ², so that the learning rate does not depend on σ. The step size of the target (β =
    0.7 in the code) is omitted, because it scales all errors equally if g is linear.

    Every feedback map costs one additional forward pass through the whole model, and there is another pass without noise. We
    derived the equations from the code and have not reproduced any result of the paper.
    """

    equations = (
        r"e &= g(h') - g(h' - e') = G e'",
        r"\mathcal{L}_G &= \frac{1}{\sigma^2} \operatorname{mean} \left(-2 \sigma \varepsilon \cdot \left(g(f(h + "
        r"\sigma \varepsilon)) - g(f(h))\right) + \lVert g(f(h) + \sigma \varepsilon') - g(f(h)) \rVert^2\right)",
    )

    search_space = {"b_lr_scale": "tag(log,interval(0.01,1))", "sigma": "choice(0.01,0.1)"}

    sigma: float = option(0.1, "standard deviation σ of the noise at the input of each block", above=0)
    b_lr_scale: float = option(0.1, "learning rate of the feedback maps relative to that of the weights", minimum=0)

    within = "block"
    repeats = True
    reads_values = False
    needs_target = False
    had_older_states = False

    # -------------------------------------------------------------------------------------------- attach
    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        if self._layouts:
            raise CoverageError(f"rule '{self.name}' needs outputs of shape (N, C), not {self._trace.result_shape}")
        executed = [path for path in self._trace.output_shapes if path in features]
        #: Cut -> the end of the next block, in the order of execution.
        self._next = dict(zip(executed, [*executed[1:], OUTPUT_OF_MODEL], strict=True))
        self._require_none_frozen(self._trace.trainable)
        self._shapes = {**features, OUTPUT_OF_MODEL: (classes,)}
        self._errors: dict[str, Tensor] = {}
        self._clean: dict[str, Tensor] = {}
        super().make_feedback(features, classes)

    def _require_none_frozen(self, learning: Collection[str]) -> None:
        """Raise an error if a frozen block follows a trainable one, given the ends of the trainable blocks."""
        executed = list(self._next)
        above = itertools.dropwhile(lambda cut: cut not in learning, executed)
        if frozen := next((cut for cut in above if cut not in learning), None):
            raise CoverageError(
                f"rule '{self.name}' sends errors through the block that ends at '{frozen}', whose weights "
                f"are frozen, so its feedback map would not learn; merge it with the next block by leaving '{frozen}' "
                f"out of cuts, or freeze only the first blocks"
            )

    def auxiliary(self, cut: str, shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        """The module G that maps errors at the end of the next block to this cut."""
        above = self._shapes[self._next[cut]]
        layers: OrderedDict[str, torch_nn.Module] = OrderedDict()
        if len(shape) == len(above) > 1:
            if shape[1:] != above[1:]:
                layers["enlarge"] = nn.Upsample(shape[1:])
            layers["map"] = map_module("Conv", cut, shape)(above[0], shape[0], 3, padding=1, bias=False)
            return nn.Sequential(layers)
        if len(above) > 1:
            layers["flatten"] = nn.Flatten()
        layers["map"] = nn.Linear(math.prod(above), math.prod(shape), bias=False)
        if len(shape) > 1:
            layers["unflatten"] = nn.Unflatten(1, shape)
        return nn.Sequential(layers)

    # -------------------------------------------------------------------------------------------- training
    def connect(self, output: Any, tape: dict[str, CapturedActivation] | None, at: str | None = None) -> Any:
        if tape and len(tape) < len(self._next) and not recomputing():  # blocks may have been frozen after `attach`
            outputs = {cut: captured.tensor for cut, captured in tape.items() if captured.tensor is not None}
            # An input that requires a gradient does not make a block trainable.
            self._require_none_frozen([cut for cut, output in outputs.items() if self._capture.depends_on_parameters(output)])
        return super().connect(output, tape, at)

    def broadcast(self, delta: Tensor, target: Tensor | None) -> Tensor:
        """Compute the errors at all cuts, from the last one down, and return δ."""
        error = delta.to(next(self.model.parameters()).dtype)
        with torch.no_grad():
            for cut in reversed(self._next):
                self._errors[cut] = error = self.auxiliary_at(cut)(error)
        if not self.mode.freeze_random:
            self.next_draws()
            self._clean = self._pass(None)
        return delta

    def error_and_gradients(
        self, cut: str, captured: CapturedActivation, broadcast: Tensor, delta: Tensor, target: Tensor | None, learns: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        error = self.in_shape(cut, self._errors.pop(cut).flatten(1), captured)
        learned = [one.tensor for one in self.learned_at(cut)] if learns else []
        if not any(tensor.requires_grad for tensor in learned):
            return error, [None for _ in learned]
        net, above, dtype = self.auxiliary_at(cut), self._next[cut], learned[0].dtype
        seen = self._pass(cut)
        change, noise = (seen[above] - self._clean[above]).to(dtype), seen[cut].to(dtype)
        other = self.sigma * self._draws.normal(f"{cut}, above", change)
        with torch.enable_grad():
            loss = net(other).square().sum() - 2 * (noise * net(change)).sum()
            gradients = torch.autograd.grad(loss, learned)
        scale = self.loss_factor / (max(len(change), 1) * self.sigma**2)
        return error, [gradient * scale for gradient in gradients]

    def _pass(self, cut: str | None) -> dict[str, Tensor]:
        """The activation at the end of each block, from another forward pass. If a cut is given, noise is added there, and the
        result contains only the noise at this cut, the activation at the end of the next block and the model's output."""
        from fa_bench.mechanisms.second_pass import again, value_of

        first = self.first_pass
        if first is None:
            refuse_reentrant(self.name)()
        assert first is not None
        seen: dict[str, Tensor] = {}

        def change(path: str) -> Any:
            def record(activation: Tensor) -> None:
                seen[path] = value_of(activation)

            def disturb(activation: Tensor) -> Tensor:
                seen[path] = self.sigma * self._draws.normal(path, activation)
                return activation + seen[path]

            return disturb if path == cut else record

        ends = self._next if cut is None else [path for path in (cut, self._next[cut]) if path != OUTPUT_OF_MODEL]
        result = again(self.model, self.mode, first, outputs={path: change(path) for path in ends})
        seen[OUTPUT_OF_MODEL] = self.logits_of(result)
        return seen

    # -------------------------------------------------------------------------------------------- state
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.require_entries(state, self.state_dict())
        self._draws.load_state(state["draws"])
