"""Forward-forward."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError
from fa_bench.mechanisms.coverage import batch_note
from fa_bench.mechanisms.cut.passes import PassRule
from fa_bench.mechanisms.drawing import DrawingRule
from fa_bench.mechanisms.feedback_tensors import make_learned, put_tensor
from fa_bench.mechanisms.processes import average, process_count
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.coverage import Coverage
    from fa_bench.mechanisms.updates import LearnedTensor

#: Added to the root mean square by which an activation is divided, as in the code loeweX/Forward-Forward.
_TINY = 1e-8
#: The momentum of the running mean of a unit's activity, and the initial value of this mean; both as in loeweX/Forward-Forward.
_MOMENTUM, _START = 0.9, 0.5


@ALGORITHMS.register("forward_forward")
@dataclasses.dataclass(eq=False)
class ForwardForward(DrawingRule, PassRule):
    """Forward-forward: every hidden layer learns to distinguish images with their true label from images with a wrong label.

    The rule is the supervised form of Hinton 2022, arXiv 2212.13345; details follow the public code loeweX/Forward-Forward.

    The label is part of the image: `label_scale` times its one-hot row replaces the first C values of the input. While the rule
    is attached, the input and every activation h at a cut are divided by their root mean square, so that the next layer sees the
    direction of h but not its length. An update has two additional passes: the positive pass with the true labels, and the
    negative pass with wrong labels that are sampled uniformly from the other classes. In both passes, each hidden layer learns
    from its own loss, a function of its goodness G = Σ h² for each sample:

        ½ softplus(θ - G) for positive samples, ½ softplus(G - θ) for negative ones, averaged over the batch.

    Here θ is the number of values in the layer's activation, unless `theta` is given. No error passes between cuts. With
    ``full_gradient=true``, the derivative of the nonlinearity is replaced by 1, so that inactive units can also learn. To prevent
    units from being always inactive or always active, `peer_norm` times the mean of (m̄ - m)² is added to the loss of the
    positive pass. Here m is the running mean of each unit's activity for positive samples, and m̄ is the mean of m over the
    units.

    The model's predictions come from a linear classifier, which learns from the true gradient of the loss. The inputs of this
    classifier are the activations for a neutral image, in which 1/C for every class replaces the one-hot row. The output layer
    classifies the last activation. Learned matrices M (C, features), initially zero, classify the earlier activations except the
    first, and their scores are added to the logits; with ``all_layers=false``, there are no such matrices.
    ``prediction=goodness`` instead scores each label by the goodness of the image with that label, summed over all cuts except
    the first; this needs C passes. The training accuracy is still that of the classifier.

    The classifier consists of all M and the output layer; ``rule.feedback_parameters()`` returns its parameters. These parameters
    are trained by the feedback's optimizer if there is one (``optimizer@feedback_optimizer=sgd``), and otherwise by the optimizer
    of W.

    Deviations from the code: the output layer has a bias, and the model determines the initial values of this layer. In the code,
    its initial values are zero, as with ``architecture.output_init=zeros`` here. The code processes positive and negative samples
    in a single pass.

    Learning rates that suit other rules are too large, because goodness is a sum over all units of a layer, so start with 1e-3.
    The code trains three layers of 1000 units, with weights initialised from N(0, 1/fan_out), for 100 epochs with batches of 100.
    The code uses SGD with momentum 0.9, a learning rate of 1e-3 and a decay of 3e-4; for the classifier, the learning rate is
    1e-2 and the decay 3e-3. Both learning rates fall linearly to zero over the second half of training.

    Each data-parallel process updates the running means with its own samples. `step` averages the running means over the
    processes, so every process must call it.

    Dropout masks are the same in all passes, including the positive and the negative one. Batch normalisation uses the statistics
    of each pass. An update needs two additional forward passes, and half a backward pass for each of them.
    """

    equations = (
        r"G &= \sum_i h_i^2",
        r"\mathcal{L} &= \operatorname{mean} \tfrac{1}{2} \operatorname{softplus}(\theta - G) \text{ for positive "
        r"samples, }\operatorname{mean} \tfrac{1}{2} \operatorname{softplus}(G - \theta) \text{ for negative ones}",
    )

    search_space = {"peer_norm": "choice(0,0.03,0.3)"}

    theta: float | None = option(None, "threshold of the goodness; null: the number of values in the layer's activation", above=0)
    peer_norm: float = option(0.03, "weight of the penalty on differences between the units' mean activities", minimum=0)
    full_gradient: bool = option(True, "use 1 as the derivative of nonlinearities")
    label_scale: float = option(1.0, "value that marks the label in the input", above=0)
    all_layers: bool = option(True, "classify all activations except the first, not only the last one")
    prediction: str = option("classifier", "how labels are predicted", choices=["classifier", "goodness"])

    output_learns_by_delta = True

    @property
    def skips_nonlinearities(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.full_gradient

    # -------------------------------------------------------------------------------------------- attach
    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.trace import arguments

        coverage = super().wire(sample_input)
        first = next(iter(self._covered.values()))
        args = arguments(sample_input).args if sample_input is not None else (first.weight.new_zeros(2, first.weight.shape[1]),)
        size = math.prod(args[0].shape[1:]) if args and isinstance(args[0], torch.Tensor) else 0
        if size < self._classes or not args[0].is_floating_point():
            raise CoverageError(
                f"rule '{self.name}' writes the label into the model's first argument, which must be a floating-point "
                f"tensor with at least {self._classes} values for each sample"
            )
        if self.error_dims != 2:
            raise CoverageError(f"rule '{self.name}' needs outputs of shape (N, C), not {self._trace.result_shape}")
        if self._classes < 2:
            raise CoverageError(f"rule '{self.name}' needs wrong labels: this model has {self._classes} class")
        for cut, module in self._cut_modules.items():
            self._handles.append(module.register_forward_hook(functools.partial(self._normalise_output, cut)))
        return coverage

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        from fa_bench.mechanisms.updates import LearnedTensor

        self._classes = classes
        self._features = {cut: math.prod(shape) for cut, shape in features.items()}
        self._learned: dict[str, LearnedTensor] = {}
        #: The names of the parameters after the last cut. They are stored by name, because a copy of the model has different
        #: parameters with the same names.
        self._above = [name for name, one in self.model.named_parameters() if id(one) in self._trace.beyond_leaves]
        like = next(self.model.parameters())
        for cut in features:
            if self.peer_norm:
                put_tensor(self._cut_modules[cut], "activity", like.new_full((self._features[cut],), _START))
        # The last cut has no M, because it feeds the output layer.
        for cut in list(features)[1:-1] if self.all_layers else ():
            module = self._cut_modules[cut]
            self.put(cut, "M", "zeros", (classes, self._features[cut]))
            self._learned[cut] = LearnedTensor(cut, module, make_learned(module, "M"), self._witness)

    def learned_feedback(self) -> list[LearnedTensor]:
        return list(self._learned.values())

    def feedback_parameters(self) -> list[Tensor]:
        """The parameters of the classifier: all M, and the parameters after the last cut."""
        parameters = dict(self.model.named_parameters())
        return [*super().feedback_parameters(), *(parameters[name] for name in self._above)]

    def notes(self) -> tuple[str, ...]:
        return (*super().notes(), *((batch_note("the mean activity of units"),) if self.peer_norm else ()))

    # -------------------------------------------------------------------------------------------- every pass
    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        super().begin_forward(model, args, kwargs)
        if self.mode.exact:
            return None
        self._normalised: dict[str, Tensor] = {}
        x = self.first_argument(args)[0].detach()
        return (self._marked(x, x.new_full((1, self._classes), 1 / self._classes)), *args[1:]), kwargs

    def _normalise_output(self, cut: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self.mode.exact:
            return None
        normalised = _normalised(output.detach())
        # The model may change the returned tensor in place before the classifier reads it.
        copies = cut in self._learned and cut in self._trace.changed_in_place
        self._normalised[cut] = normalised.clone() if copies else normalised
        return normalised

    def connect(self, output: Any, tape: Any, at: str | None = None) -> Any:
        from fa_bench.mechanisms.trace import replaced

        if output is not None and not self.mode.exact and self._learned:
            logits = self.logits_of(output) if tape is None else self._delivery.logits_in(output)
            scores = [
                torch.nn.functional.linear(self._normalised[cut].flatten(1), learned.tensor)
                for cut, learned in self._learned.items()
            ]
            output = replaced(output, logits, sum(scores, logits))
        connected = super().connect(output, tape, at)
        return output if connected is None else connected

    def _marked(self, x: Tensor, label: Tensor) -> Tensor:
        """The inputs (N, ...), normalised after `label`, (N, C) or (1, C), times `label_scale` has replaced their first
        values."""
        marked = x.flatten(1).clone()
        marked[:, : self._classes] = label * self.label_scale
        return _normalised(marked).view(x.shape)

    # -------------------------------------------------------------------------------------------- learning
    def gradients(
        self, parameters: list[nn.Parameter], activations: dict[str, Tensor], delta: Tensor, logits: Tensor, target: Tensor
    ) -> list[Tensor | None]:
        assert self.first_pass is not None
        self.next_draws()
        x = self.first_pass.args[0].detach()
        shift = self._draws.shifts("labels", len(target), self._classes).to(target.device)
        total: list[Tensor | None] = [None] * len(parameters)
        for labels, sign in ((target, 1), ((target + shift) % self._classes, -1)):
            with self._activations(self._marked(x, self._rows(labels, x))) as activations:
                losses = torch.stack([self._loss(cut, activation, sign) for cut, activation in activations.items()])
                gradients = (
                    torch.autograd.grad(losses.sum() * self.loss_factor, parameters, allow_unused=True)
                    if losses.requires_grad
                    else [None] * len(parameters)
                )  # all hidden layers may be frozen
            total = [two if one is None else one if two is None else one + two for one, two in zip(total, gradients, strict=True)]
        return total

    def _loss(self, cut: str, activation: Tensor, sign: int) -> Tensor:
        """The loss of the activation at a cut, for positive samples if `sign` is 1 and for negative samples if it is -1."""
        values = activation.flatten(1)
        goodness = values.square().sum(1)
        threshold = values.shape[1] if self.theta is None else self.theta
        # torch's softplus is linear above 20.
        loss = -torch.nn.functional.logsigmoid(sign * (goodness - threshold)).mean() / 2
        return loss + self.peer_norm * self._inequality(cut, activation) if sign == 1 and self.peer_norm else loss

    def _rows(self, labels: Tensor, like: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(labels, self._classes).to(like.dtype)

    @contextmanager
    def _activations(self, x: Tensor) -> Iterator[dict[str, Tensor]]:
        """A context manager that provides {cut: its activation for marked inputs}; derivatives stop at the previous cut."""
        from fa_bench.mechanisms.second_pass import repeated

        assert self.first_pass is not None
        entering: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}

        def at_input(cut: str, tensor: Tensor) -> Tensor | None:
            if not self.full_gradient or not self.is_nonlinearity(cut):
                return None
            entering[cut] = tensor
            return tensor.detach().clone()  # the nonlinearity may work in place

        def at_output(cut: str, tensor: Tensor) -> Tensor:
            # This tensor has the value of h but the derivative of the nonlinearity's input.
            found[cut] = tensor + entering[cut] - entering[cut].detach() if cut in entering else tensor
            return _normalised(tensor.detach())

        with repeated(
            self.model,
            self.mode,
            self.first_pass,
            (x, *self.first_pass.args[1:]),
            inputs={cut: lambda tensor, cut=cut: at_input(cut, tensor) for cut in self._cut_modules},
            outputs={cut: lambda tensor, cut=cut: at_output(cut, tensor) for cut in self._cut_modules},
        ):
            yield found

    def _inequality(self, cut: str, activation: Tensor) -> Tensor:
        """The mean of (m̄ - m)², where m is the running mean after an update with this batch."""
        running = self.tensor(cut, "activity")
        if activation.flatten(1).shape[1] != len(running):
            raise CoverageError(
                f"cut '{cut}' has activations of shape {tuple(activation.shape[1:])}, but {len(running)} mean activities; attach "
                "with a sample_input of the same size as the training data"
            )
        mean = running * _MOMENTUM + activation.flatten(1).mean(0) * (1 - _MOMENTUM)
        if not self.mode.freeze_random:
            running.copy_(mean.detach())
        return (mean.mean() - mean).square().mean()

    @property
    def needs_step(self) -> bool:
        return self.peer_norm > 0 and process_count() > 1

    def step(self) -> None:
        super().step()
        if self.needs_step and not self.mode.alone:
            for cut in self._cut_modules:
                average(self.tensor(cut, "activity"))

    # -------------------------------------------------------------------------------------------- prediction
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        if self.prediction == "classifier":
            return super().predict(*args, **kwargs)
        from fa_bench.mechanisms.second_pass import FirstPass

        x = self.first_argument(args)[0]
        self.first_pass = FirstPass(self.name, self.model, args, kwargs)
        scores = []
        for label in range(self._classes):
            row = self._rows(torch.full((1,), label, device=x.device), x)
            with self._activations(self._marked(x, row)) as activations:
                goodness = [activation.flatten(1).square().sum(1) for activation in activations.values()]
            scores.append(sum(goodness[1:] or goodness))
        self.first_pass = None
        return torch.stack(scores, 1)


def _normalised(x: Tensor) -> Tensor:
    """The samples (N, ...), each divided by the root mean square of its values."""
    length = x.flatten(1).square().mean(1).sqrt() + _TINY
    return x / length.view(-1, *[1] * (x.dim() - 1))
