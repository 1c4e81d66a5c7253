"""Feed-forward optimization with delayed feedback."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError, OptionError
from fa_bench.mechanisms.cut.rule import CutRule
from fa_bench.mechanisms.feedback_options import density_option, init_option, within_option
from fa_bench.objectives.base import one_hot
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.mechanisms.coverage import Coverage
    from fa_bench.mechanisms.cut.sample_errors import SampleErrors

_DELAYED, _SOFTMAX, _ONE_HOT = "delayed_", "_softmax", "_one_hot"


@ALGORITHMS.register("f3")
@dataclasses.dataclass(eq=False)
class F3(CutRule):
    """Feed-forward with delayed feedback: each sample's output error from the previous epoch is projected to every hidden
    activation.

    The rule is due to Flügel et al. 2024 (arXiv 2304.13372); the equations are those of the authors' code.

    The error at a cut is ε B / N, where N is the batch size, B (C, features of the cut) is fixed and random, and ``information``
    selects ε (N, C). The output layer learns from its true gradient, the derivatives from a cut down to the next weights are
    exact, and B does not decay. In the following list, y (N, C) are the targets (one-hot or real values), z (N, C) the logits, o
    the output of the objective (σ(z) for ``sigmoid_ce``, otherwise z) and l a sample's own loss:

    - delayed_loss: ∂l/∂z, the error of `dfa` without its 1/N.

    - delayed_error: o - y.

    - delayed_loss_softmax: the derivative of l(softmax(o)) with respect to o.

    - delayed_error_softmax: softmax(o) - y.

    - delayed_loss_one_hot, delayed_error_one_hot: delayed_loss or delayed_error, multiplied by y entry by entry.

    - current_error: ∂l/∂z of the current pass, as in `dfa`.

    - one_hot_target: -y, as in `drtp` with the opposite sign of B.

    A delayed error comes from the previous training pass that contained the sample, so no layer has to wait for the output. In a
    sample's first epoch, there is no delayed error, and ``first_epoch`` selects its replacement: -y, which is the error of a zero
    output; the current error; or zero, in which case hidden layers do not learn. If the weights do not change, the delayed error
    equals the current one from the second epoch on.

    The stored errors, of shape (training samples, C), are part of the rule's state and of checkpoints, but not of the model's
    ``state_dict``. With delayed errors, each backward pass needs the indices of the samples in the training set:
    ``rule.backward(loss, logits, y, indices=indices)``. ``samples`` must be at least the size of the training set; the runner
    sets it. With ``torch.distributed``, call ``rule.step()`` after every update to exchange the errors between the processes,
    which must train the same model. If samples are augmented, the stored error is that of the last augmented version. Errors that
    are not finite are not stored. Outputs with positions, such as tokens, are rejected.

    The paper uses the following initialisers for B: PyTorch's default (``b_init=pytorch``, also the default of the code),
    ``trinomial`` with entries -1, 0 or 1, ``binomial`` with entries 0 or 1, and ``identity_pm``. The last three initialisers do
    not scale with the number of features, which matters for plain gradient descent but not for Adam. If ``density`` is below 1, a
    fixed mask sets entries of B to zero. As in `dfa`, ``within=block`` places cuts only at the ends of the model's blocks, and
    the layers of each block learn by backpropagation from its end.

    Differences from the code: errors are outputs minus targets here but targets minus outputs in the code, so B has the opposite
    sign. For ``delayed_loss``, the code differentiates its loss with respect to the output of a sigmoid, whereas here the loss is
    differentiated with respect to the logits. With the objective ``sigmoid_ce``, ``delayed_loss`` is therefore the code's
    ``delayed_error``. The scale of the loss and the factor 1/N are those of the current batch, whereas the code stores
    ``delayed_loss`` divided by the size of the earlier batch and does not divide the other errors. The default of ``first_epoch``
    is that of the code.
    """

    equations = (
        r"e_h &= \tfrac{1}{N} \varepsilon_{t-1} B",
        r"\varepsilon_{t-1} &= \frac{\partial l}{\partial z} \text{ of the sample in its previous epoch}",
    )

    search_space = {"b_init": "choice(pytorch,trinomial)"}

    information: str = option(
        "delayed_loss",
        "what is projected: delayed_loss (the derivative of the sample's loss in its previous epoch), delayed_error (output "
        "minus target in that epoch), either of them with a softmax of the output (_softmax) or times the target (_one_hot), "
        "current_error (as in dfa), or one_hot_target (minus the target, as in drtp)",
        choices=[
            "delayed_loss",
            "delayed_error",
            "delayed_loss_softmax",
            "delayed_error_softmax",
            "delayed_loss_one_hot",
            "delayed_error_one_hot",
            "current_error",
            "one_hot_target",
        ],
    )
    first_epoch: str = option(
        "target",
        "what replaces the delayed error in a sample's first epoch: minus its target, its current error, or zero",
        choices=["target", "current", "zero"],
    )
    b_init: str = init_option("B", "pytorch")
    density: float = density_option()
    samples: int | None = option(
        None,
        "number of training samples, for delayed errors; null: set by the runner (attach needs a number)",
        minimum=1,
        identifying=False,
    )
    within: str = within_option()

    takes_numbers = True

    @property
    def is_delayed(self) -> bool:
        """Whether the error comes from an earlier pass."""
        return self.information.startswith(_DELAYED)

    @property
    def needs_indices(self) -> bool:
        return self.is_delayed

    @property
    def sample_count(self) -> int | None:
        return self.samples

    def expect_samples(self, count: int) -> None:
        if self.samples is not None and self.samples < count:
            raise OptionError("samples", f"={self.samples}: there are {count} training samples; use null, or {count} or more")
        self.samples = self.samples or count

    @property
    def scales(self) -> bool:
        return self.information != "current_error"

    @property
    def needs_target(self) -> bool:
        uses_target = self.information not in ("current_error", "delayed_loss")
        return uses_target or (self.is_delayed and self.first_epoch == "target")

    def wire(self, sample_input: Any) -> Coverage:
        if self.is_delayed and self.samples is None:
            raise OptionError(
                "samples",
                f"is required, because the errors of all training samples are stored: "
                f"fa_bench.attach(model, '{self.name}', samples=len(dataset))",
            )
        return super().wire(sample_input)

    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        from fa_bench.mechanisms.cut.sample_errors import SampleErrors

        if self.error_dims != 2:
            raise CoverageError(
                f"rule '{self.name}' needs outputs of shape (N, C), with one error per sample; "
                "outputs with positions are not supported"
            )
        for cut, shape in features.items():
            self.put(cut, "B", self.b_init, (classes, math.prod(shape)), self.density)
        self._kept: SampleErrors | None = None
        if self.is_delayed:
            assert self.samples is not None
            self._kept = SampleErrors(self.samples, classes, next(self.model.parameters()))

    def broadcast(self, delta: Tensor, target: Tensor | None) -> Tensor:
        if self.information == "current_error":
            return delta
        delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
        factor = self.loss_factor / max(len(delta), 1)
        if self.information == "one_hot_target":
            return one_hot(_given(target), delta) * -factor
        kept, indices, error = self._kept, self.indices, self._error(delta / factor, target)
        assert kept is not None and indices is not None
        first = {"target": lambda: -one_hot(_given(target), delta), "current": lambda: error, "zero": lambda: delta.new_zeros(())}
        delayed = kept.read(indices, first[self.first_epoch]().expand(delta.shape))
        if not self.mode.freeze_random:
            kept.write(indices, error, not self.mode.alone)
        return (delayed * one_hot(_given(target), delayed) if self.information.endswith(_ONE_HOT) else delayed) * factor

    def _error(self, of_loss: Tensor, target: Tensor | None) -> Tensor:
        """The errors of the samples in this pass, (N, C), without the one-hot factor; `of_loss` is the error for
        ``delayed_loss``."""
        information = self.information.removesuffix(_ONE_HOT)
        if information == "delayed_loss":
            return of_loss
        logits = self.logits
        assert logits is not None
        outputs = self.objective.predicted(logits.to(of_loss.dtype))
        if information == "delayed_loss_softmax":
            with torch.enable_grad():
                leaf = outputs.detach().requires_grad_(True)
                return torch.autograd.grad(self.objective.loss(leaf.softmax(1), _given(target), reduction="sum"), leaf)[0]
        return (outputs.softmax(1) if information.endswith(_SOFTMAX) else outputs) - one_hot(_given(target), outputs)

    @property
    def needs_step(self) -> bool:
        return self._kept is not None and self._kept.is_shared

    def step(self) -> None:
        super().step()
        if self._kept is not None and not self.mode.alone:
            self._kept.exchange()

    def notes(self) -> tuple[str, ...]:
        return () if self._kept is None else (f"{self._kept.describe()}.",)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._kept is None else self._kept.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self._kept is not None:
            self._kept.load_state(self.name, state)


def _given(target: Tensor | None) -> Tensor:
    """The targets, which cannot be None because `F3.needs_target` is set."""
    assert target is not None
    return target
