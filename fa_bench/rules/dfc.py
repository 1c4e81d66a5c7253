"""Deep feedback control in its steady state."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError
from fa_bench.mechanisms.cut.learned import LearnedCutRule
from fa_bench.mechanisms.cut.passes import PassRule, used_parameters
from fa_bench.mechanisms.drawing import DrawingRule
from fa_bench.mechanisms.feedback_options import init_option
from fa_bench.mechanisms.feedback_tensors import make_learned
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

    from fa_bench.mechanisms.coverage import Coverage
    from fa_bench.mechanisms.trace import Trace
    from fa_bench.mechanisms.updates import LearnedTensor

#: The key of the output in dictionaries that are otherwise indexed by cuts.
OUTPUT_OF_MODEL = ""
#: The name of the output's feedback tensor, which is stored at the last cut.
OF_OUTPUT = "B_output"


@dataclasses.dataclass
class Controller:
    """The linearised closed loop between the output z (N, C) and the voltages v, for all samples of a batch.

    Attributes:
        feedback: cut, or "" for the output -> Qᵀ (C, F); with ``jacobian``, Qᵀ of each sample (N, C, F) at the cuts.
        loop: J Q (N, C, C), summed over all cuts and the output.
        output: z in the pass at which the network was linearised.
    """

    feedback: dict[str, Tensor]
    loop: Tensor
    output: Tensor

    def control(self, error: Tensor, leak: float) -> Tensor:
        """The controller's steady state u = (J Q + leak I)⁻¹ error (N, C), which is not finite for samples with a singular
        matrix."""
        damped = self.loop + leak * torch.eye(self.loop.shape[1], dtype=self.loop.dtype, device=self.loop.device)
        return torch.linalg.solve_ex(damped, error.to(damped.dtype).unsqueeze(2))[0].squeeze(2)

    def change(self, place: str, control: Tensor) -> Tensor:
        """Q u (N, F)."""
        feedback = self.feedback[place]
        return control @ feedback if feedback.dim() == 2 else (control.unsqueeze(1) @ feedback).squeeze(1)


@ALGORITHMS.register("dfc")
@dataclasses.dataclass(eq=False)
class DFC(DrawingRule, LearnedCutRule, PassRule):
    """Deep feedback control: a controller drives the output to a target, and layers learn from the changes that the controller
    causes.

    The rule is due to Meulemans et al. 2021, arXiv 2106.07887. Here, the steady state is computed in closed form, as with the
    option ``ssa`` in the code of Meulemans et al. 2022, arXiv 2204.07249 (mariacer/strong_dfc). Let v_l be the voltages before
    the nonlinearities φ, and u (C,) the controller's output. The following equations define the steady state for a sample x, with
    r_0 = x:

        v_l = W_l r_{l-1} + b_l + Q_l u,    r_l = φ(v_l),    α u = z* - z,    z* = z⁻ - λ ∂L/∂z⁻.

    Here z⁻ is the output without control, L the sample's loss, λ the step to the target (`target_stepsize`) and α the
    controller's leak (`alpha`). Every layer, including the output layer, has a Q_l (F_l, C). Let J (C, ΣF) be the Jacobian of z
    with respect to all voltages. Linearised around the forward pass, the steady state is:

        u = (J Q + α I)⁻¹ (z* - z⁻),    Δv = Q u.

    Another forward pass adds Δv to the voltages, so r_{l-1} is controlled as well. With v⁻_l = W_l r_{l-1} + b_l, the voltage
    before Δv_l is added, the gradient is:

        gradient of W_l = -1/N Σ_n (φ(v⁻_l + Δv_l) - φ(v⁻_l)) r_{l-1}ᵀ.

    With ``learning_rule=voltage_difference``, Δv_l replaces the difference. The output layer has no nonlinearity, and its voltage
    is z. For small λ, gradients are proportional to λ. The size of the gradients does not affect Adam, but SGD needs a learning
    rate proportional to 1/λ.

    **Feedback.** `feedback_weights` determines Q. With ``learned``, B_l = Q_lᵀ (C, F_l) is initially Xavier-normal (`b_init`),
    and B at the output is initially the identity; both learn from Gaussian noise. In another forward pass, noise σ ε (`sigma`) is
    added to all voltages, and the controller, now with the leak `alpha_fb`, counteracts the effect of the noise on z. Q learns by
    an anti-Hebbian rule from the feedback voltages v_fb:

        u = (J Q + α_fb I)⁻¹ (z⁻ - z_noisy),    v_fb = Q u + σ ε,    gradient of Q_l = 1/(N σ²) Σ_n v_fb,l uᵀ.

    The paper's decay -β Q is the weight decay of the feedback's optimizer here. If all samples have the same J, Q converges to a
    matrix Jᵀ M with columns in the row space of J, and Δv is then a damped Gauss-Newton step. ``b_lr_scale`` is the learning rate
    of B relative to that of W.

    With ``fixed``, Q keeps its initial value, which is the identity at the output. With ``jacobian``, an oracle without stored
    feedback, Q is Jᵀ for each sample. For α → 0, Δv is then J⁺ (z* - z⁻), the Gauss-Newton step; for large α, Δv is -λ/α Jᵀ
    ∂L/∂z⁻, which has the direction of backpropagation. For large α, gradients from the voltage difference have this direction,
    too, whereas the difference of φ(v) adds a factor φ'(v) in the hidden layers.

    Weight transport: the dynamics, which are the biological process in the paper, do not require weight transport. The closed
    form requires it, because J is computed by C backward passes through the weights.

    Deviations from the paper and its code: we do not simulate the dynamics. In the published runs on MNIST, whose commands set
    neither of the options ``ss`` and ``ssa``, updates are averages over 500 Euler steps from rest. Q learns from the correlations
    over 44 steps with noise in the apical compartments, far from the steady state. Strong-DFC, which uses the label as the
    target, is not implemented. The published code has no closed form for Strong-DFC, because the linearisation is not valid for
    such a target. Q learns in every step together with W, whereas the code trains Q alone for 20 epochs before training and for
    one epoch before every epoch. The code's gradient has an additional factor of 2, and its voltage difference has the wrong sign
    in the steady state. The code does not divide by σ² if σ² is below 0.01². The values α = 0.001 and α_fb = 0.5 are defaults of
    the code, whereas λ = 0.1 and σ = 0.1 are our choices. We did not check the equations against the text of the papers and have
    not reproduced any result.

    Frozen layers before the first trainable layer (``freeze_stem``) are not controlled, and their output is the input r_0. A
    frozen layer after a trainable one is controlled, and its B learns.

    If the module at a cut is not an elementwise nonlinearity but, for example, a block, Q u is added to its output, and φ is the
    identity. A cut at a pooling layer is treated like a cut at the preceding nonlinearity. Layers may be followed by
    normalisation; the gradient of their weights then passes through all modules between the previous cut and the nonlinearity.
    With batch normalisation, J also contains the effect of a sample on the outputs of the other samples. Outputs must be (N, C).
    Additional passes run without autocast, because Δv is small. Dropout masks are those of the first pass.

    An update needs three additional forward passes (two if Q does not learn) and C backward passes that compute only the errors.
    It also needs half a backward pass for the weights, and solves a C x C system for every sample (two if Q learns). J is stored
    only with ``jacobian``.
    """

    equations = (
        r"u &= (J Q + \alpha I)^{-1} (z^* - z^-), \quad z^* = z^- - \lambda \frac{\partial L}{\partial z^-}",
        r"\Delta v_l &= Q_l u",
        r"\nabla_{W_l} &= -\frac{1}{N} \sum_n (\varphi(v^-_l + \Delta v_l) - \varphi(v^-_l)) r_{l-1}^\top",
        r"\nabla_{Q_l} &= \frac{1}{N \sigma^2} \sum_n (Q_l u + \sigma \varepsilon) u^\top",
    )

    search_space = {"alpha": "tag(log,interval(1e-4,1))", "target_stepsize": "tag(log,interval(1e-3,1))"}

    alpha: float = option(0.001, "leak α of the controller", minimum=0)
    target_stepsize: float = option(0.1, "step λ from the output to its target, against the gradient of a sample's loss", above=0)
    learning_rule: str = option(
        "nonlinear_difference",
        "whether a layer learns from the change of its activation or of its voltage",
        choices=["nonlinear_difference", "voltage_difference"],
    )
    feedback_weights: str = option(
        "learned",
        "the feedback Q: learned from noise, fixed, or the transposed Jacobian of each sample",
        choices=["learned", "fixed", "jacobian"],
    )
    b_init: str = init_option("B", "xavier_normal")
    b_lr_scale: float = option(1.0, "learning rate of B relative to that of W, unless B has its own optimizer", minimum=0)
    sigma: float = option(0.1, "standard deviation σ of the noise from which B learns", above=0)
    alpha_fb: float = option(0.5, "leak of the controller while B learns", minimum=0)

    skips_nonlinearities = True
    needs_target = False
    output_source = "comes from the controller"

    # -------------------------------------------------------------------------------------------- attach
    def wire(self, sample_input: Any) -> Coverage:
        coverage = super().wire(sample_input)
        before = {path for path in self._cut_modules if path not in self.trainable_cuts(self._trace)}
        covered = tuple(
            dataclasses.replace(entry, feedback="is not computed: the controller acts from the first trainable layer on")
            if before & {cut for cut in self._cut_modules if entry.layer in self._trace.feeds[cut]}
            else entry
            for entry in coverage.covered
        )
        transport = ("in the Jacobian that gives the steady state",)
        return dataclasses.replace(coverage, covered=covered, transport=transport)

    def trainable_cuts(self, trace: Trace) -> set[str]:
        """The cuts that the controller acts on. The cuts of frozen layers that follow a trainable layer are included, because B
        learns there, too."""
        return self.after_first_trainable(trace)

    def notes(self) -> tuple[str, ...]:
        return super().notes() if self.feedback_weights == "learned" else super(DrawingRule, self).notes()

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        from fa_bench.mechanisms.updates import LearnedTensor

        if self.error_dims != 2:
            raise CoverageError(f"rule '{self.name}' needs outputs of shape (N, C), not {self._trace.result_shape}")
        #: The cuts at which the voltage is the input of the module; at all other cuts, it is the output.
        self._nonlinear = frozenset(cut for cut in features if self.is_nonlinearity(cut))
        self._last = list(features)[-1]
        self._learned, self._masked = {cut: [] for cut in features}, False
        if self.feedback_weights == "fixed":
            for cut, shape in features.items():
                self.put(cut, "B", self.b_init, (classes, math.prod(shape)))
        elif self.feedback_weights == "learned":
            self.put_learned(features, classes, self.b_init)
            module = self._cut_modules[self._last]
            self.put(self._last, OF_OUTPUT, torch.eye(classes))
            self._learned[self._last].append(LearnedTensor(self._last, module, make_learned(module, OF_OUTPUT), self._witness))

    def is_nonlinearity(self, cut: str) -> bool:
        """Whether the module at a cut counts as a nonlinearity. Modules that use random numbers do not, because the numbers would
        change when the module is evaluated again."""
        modules = self._cut_modules[cut].modules()
        draws = any(isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)) for module in modules)
        return not draws and super().is_nonlinearity(cut)

    # -------------------------------------------------------------------------------------------- training
    def trained_parameters(self, results: list[Tensor]) -> list[torch_nn.Parameter]:
        learned: list[Any] = [] if self.mode.freeze_random else [one.tensor for one in self.learned_feedback()]
        return [*super().trained_parameters(results), *(tensor for tensor in learned if tensor.requires_grad)]

    def gradients(
        self, parameters: list[torch_nn.Parameter], activations: dict[str, Tensor], delta: Tensor, logits: Tensor, target: Tensor
    ) -> list[Tensor | None]:
        share = self.loss_factor / max(len(delta), 1)
        controller = self._linearised()
        error = delta.to(controller.output.dtype) / share if share else torch.zeros_like(controller.output)
        control = controller.control(-self.target_stepsize * error, self.alpha)
        learned = {id(one.tensor): (place, one.tensor) for place, one in self._learned_at_places()}
        weights = [parameter for parameter in parameters if id(parameter) not in learned]
        found = dict(zip(map(id, weights), self._steady_state(controller, control, share, weights), strict=True))
        if len(weights) < len(parameters):
            of_feedback = self._feedback_gradients(controller, share)
            found |= {key: of_feedback[place].to(one.dtype) for key, (place, one) in learned.items() if place in of_feedback}
        return [found.get(id(parameter)) for parameter in parameters]

    def _learned_at_places(self) -> Iterator[tuple[str, LearnedTensor]]:
        """Pairs of a cut and a tensor that is learned there; the cut is "" for the tensor of the output."""
        for cut, learned in self._learned.items():
            yield from zip((cut, OUTPUT_OF_MODEL), learned, strict=False)

    @contextmanager
    def _pass(self, change: Callable[[str, Tensor], Tensor]) -> Iterator[Tensor]:
        """A context manager that provides the output of an additional pass, in which `change` replaces the voltage at every
        cut."""
        from fa_bench.mechanisms.second_pass import repeated

        assert self.first_pass is not None
        changes = {cut: functools.partial(change, cut) for cut in self._cut_modules}
        before = {cut: changes.pop(cut) for cut in self._nonlinear}
        with repeated(self.model, self.mode, self.first_pass, inputs=before, outputs=changes, precise=True) as result:
            yield self.logits_of(result)

    def _linearised(self) -> Controller:
        """The closed loop, linearised around the first pass."""
        seen: dict[str, Tensor] = {}

        def at(cut: str, voltage: Tensor) -> Tensor:
            # Only voltages that depend on a parameter of the model are recorded; an input that requires a gradient does not
            # count.
            if voltage.requires_grad and used_parameters(self.model, [voltage]):
                seen[cut] = voltage
            return voltage.clone()  # the next operation may work in place

        with torch.enable_grad(), self._pass(at) as output:
            dtype, (batch, classes) = torch.promote_types(output.dtype, torch.float32), output.shape
            voltages = dict(seen)  # activation checkpointing calls `at` again, for tensors of another graph
            rows = _jacobian_rows(output, voltages, dtype)
            unit = torch.eye(classes, dtype=dtype, device=output.device)
            if self.feedback_weights == "jacobian":
                stored = list(rows)
                feedback = {cut: torch.stack([row[cut] for row in stored], 1) for cut in voltages}
                loop = sum((jacobian @ jacobian.mT for jacobian in feedback.values()), unit.repeat(batch, 1, 1))
                return Controller({**feedback, OUTPUT_OF_MODEL: unit}, loop, output.detach().to(dtype))
            feedback = {cut: self._feedback_of(cut, voltage).to(dtype) for cut, voltage in voltages.items()}
            of_output = self._feedback_of_output(unit)
            products = [sum((row[cut] @ feedback[cut].t() for cut in row), unit.new_zeros(batch, classes)) for row in rows]
            loop = torch.stack(products, 1) + of_output.t()
            return Controller({**feedback, OUTPUT_OF_MODEL: of_output}, loop, output.detach().to(dtype))

    def _feedback_of(self, cut: str, voltage: Tensor) -> Tensor:
        """B of a cut, (C, F)."""
        feedback = self.tensor(cut, "B")
        if math.prod(voltage.shape[1:]) != feedback.shape[1]:
            raise CoverageError(
                f"cut '{cut}' has activations of shape {tuple(voltage.shape[1:])}, but its feedback was made for "
                f"{feedback.shape[1]} features; attach with a sample_input of the same size as the training data"
            )
        return feedback

    def _feedback_of_output(self, unit: Tensor) -> Tensor:
        """The feedback B of the output, (C, C), which is the identity unless it learns."""
        return self.tensor(self._last, OF_OUTPUT).to(unit.dtype) if self.feedback_weights == "learned" else unit

    def _steady_state(
        self, controller: Controller, control: Tensor, share: float, weights: list[torch_nn.Parameter]
    ) -> list[Tensor | None]:
        """The gradients of the weights, from a pass with Q u added to all voltages.

        Args:
            controller: the closed loop.
            control: u (N, C).
            share: the weight of a sample in the loss.
            weights: the parameters whose gradients are computed.
        """
        ends: list[tuple[Tensor, Tensor]] = []

        def at(cut: str, voltage: Tensor) -> Tensor:
            if cut not in controller.feedback:
                return voltage
            before = voltage.detach().to(control.dtype)
            after = before + controller.change(cut, control).view(voltage.shape)
            taught = cut in self._nonlinear and self.learning_rule == "nonlinear_difference"
            difference = self._activation(cut, after) - self._activation(cut, before) if taught else after - before
            ends.append((voltage, difference))
            return after.to(voltage.dtype)

        with torch.enable_grad(), self._pass(at) as output:
            ends.append((output, controller.change(OUTPUT_OF_MODEL, control)))
            trainable = [(end, (-share * difference).to(end.dtype)) for end, difference in ends if end.requires_grad]
            if not trainable:
                return [None] * len(weights)
            outputs, errors = zip(*trainable, strict=True)
            return list(torch.autograd.grad(outputs, weights, errors, allow_unused=True))

    def _activation(self, cut: str, voltage: Tensor) -> Tensor:
        """The activation φ(v), computed without the hooks of the nonlinearity."""
        with torch.no_grad():
            return self._cut_modules[cut].forward(voltage.clone())  # the nonlinearity may work in place

    def _feedback_gradients(self, controller: Controller, share: float) -> dict[str, Tensor]:
        """A dict {cut, or "" for the output: the gradient of its B (C, F)}, computed in a pass with noise added to all
        voltages."""
        self.next_draws()
        noise: dict[str, Tensor] = {}

        def disturbed(place: str, voltage: Tensor) -> Tensor:
            if place not in controller.feedback:
                return voltage
            noise[place] = self.sigma * self._draws.normal(place, voltage.detach())
            return voltage + noise[place]

        with torch.no_grad():
            with self._pass(disturbed) as output:
                change = disturbed(OUTPUT_OF_MODEL, output) - controller.output
            control = controller.control(-change, self.alpha_fb)
            return {
                place: control.t()
                @ (controller.change(place, control) + drawn.flatten(1).to(control.dtype))
                * (share / self.sigma**2)
                for place, drawn in noise.items()
            }


def _jacobian_rows(output: Tensor, voltages: dict[str, Tensor], dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The rows of J, one for each class, as dicts {cut: the derivatives (N, F) of the class's output with respect to the
    voltage}."""
    if not voltages:
        yield from ({} for _ in range(output.shape[1]))
        return
    for number in range(output.shape[1]):
        found = torch.autograd.grad(
            output[:, number].sum(),
            list(voltages.values()),
            retain_graph=number + 1 < output.shape[1],
            allow_unused=True,
            materialize_grads=True,
        )
        yield {cut: row.flatten(1).to(dtype) for cut, row in zip(voltages, found, strict=True)}
