"""The base class of objectives, which define the loss and the scores of a network's outputs.

In shapes, N is the batch size, T the number of positions, C the number of classes, and O the number of outputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fa_bench.errors import OptionError, missing_method, names, nearest, truncate
from fa_bench.objectives.scores import ACCURACY, R2, RMSE, Score
from fa_bench.registry.kinds import CLASSES, POSITIONS, VALUES
from fa_bench.registry.options import Options, option
from fa_bench.registry.registries import OBJECTIVES

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(eq=False)
class Objective(Options):
    """Base class of objectives, registered in `fa_bench.registry.registries.OBJECTIVES`.

    Examples:
        >>> import dataclasses, torch, fa_bench
        >>> @dataclasses.dataclass(eq=False)
        ... class Hinge(fa_bench.Objective):
        ...     def loss(self, outputs, target, reduction="mean"):
        ...         return torch.nn.functional.multi_margin_loss(outputs, target, reduction=reduction)
        >>> Hinge().loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0])).item()
        0.0
        >>> rule = fa_bench.attach(torch.nn.Sequential(torch.nn.Linear(4, 2)), "fa", objective=Hinge())
    """

    #: The kinds of targets (`fa_bench.registry.kinds`) that `loss` supports.
    targets: ClassVar[tuple[str, ...]] = (CLASSES,)
    #: Kind of targets -> its scores. The first score is the primary one, which determines the best epoch and the best settings.
    scores: ClassVar[Mapping[str, tuple[Score, ...]]] = {CLASSES: (ACCURACY,), POSITIONS: (ACCURACY,), VALUES: (R2, RMSE)}

    #: The range of real-valued targets for which `loss` is defined; None if there is no limit.
    value_range: ClassVar[tuple[float, float] | None] = None

    @property
    def is_cross_entropy(self) -> bool:
        """Whether `loss` is PyTorch's mean cross-entropy."""
        return False

    output: str | int | None = option(
        None,
        "the output from which the loss is computed, if the model returns several: a key, or an index into a tuple",
        identifying=False,
    )

    def loss(self, outputs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """The loss of a batch; each objective must implement this method.

        Args:
            outputs: the outputs of the network, (N, C), (N, O) or (N, T, C).
            target: class indices (N,), numbers (N, O) or class indices of positions (N, T), depending on `targets`.
            reduction: ``mean`` or ``sum`` reduces the losses of the targets that count to a scalar; ``none`` returns the loss of
                each sample, (N,), and the mean of these losses is the result of ``mean``.
        """
        raise missing_method(self, "loss")

    def check_data(self, characters: float | None) -> None:
        """Called by the runner before training; override this method to raise an OptionError for unsuitable data.

        Args:
            characters: for text, the mean number of characters per training token; None for other data.
        """

    def counted(self, target: Tensor) -> int | Tensor:
        """The number of targets that count. The loss is the mean over these targets."""
        return len(target)

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor | None:
        """A boolean mask of the correct predictions, (N,) or (N, T); None if the targets are real values."""
        return None if target.is_floating_point() else outputs.argmax(-1) == target

    def predicted(self, outputs: Tensor) -> Tensor:
        """The predicted values for outputs (N, O), in the unit of the targets."""
        return outputs

    def sums(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Sums over the counted targets of a batch; `scored` computes the scores from their totals over all batches.

        The caller sums the loss and the number of counted targets itself, so the result need not include them.
        """
        if (correct := self.correct(outputs, target)) is not None:
            return {"correct": correct.sum()}
        wide = target.double() if target.device.type != "mps" else target  # MPS has no float64
        errors = self.predicted(outputs).to(wide.dtype) - wide
        return {"error_squares": errors.square().sum(), "target_sums": wide.sum(0), "target_squares": wide.square().sum(0)}

    def scored(self, sums: Mapping[str, Any], loss: float, count: int, characters: float | None = None) -> dict[str, float]:
        """The scores of a split, by name; scores that cannot be computed are omitted.

        R² is 1 - Σ (prediction - target)² / Σ (target - mean)². Both sums are over all samples and outputs, and the mean is that
        of each output over the same split, so predicting this mean gives a score of 0. RMSE is the root mean squared error over
        all samples and outputs.

        Args:
            sums: the results of `sums`, added up over all batches, as numbers or lists of numbers.
            loss: the mean loss.
            count: the number of targets that count.
            characters: for text, the mean number of characters per token in this split.
        """
        if "correct" in sums:
            return {ACCURACY.name: sums["correct"] / count}
        outputs = len(sums["target_sums"])
        around_mean = sum(
            square - total * total / count for square, total in zip(sums["target_squares"], sums["target_sums"], strict=True)
        )
        # For constant targets, this sum contains only the rounding error of their squares.
        varies = around_mean > 1e-12 * sum(sums["target_squares"])
        return {
            **({R2.name: 1 - sums["error_squares"] / around_mean} if varies else {}),
            RMSE.name: math.sqrt(sums["error_squares"] / (count * outputs)),
        }


#: PyTorch losses with names that do not resemble those of the objectives -> the corresponding objective.
_OF_TORCH = dict.fromkeys(("BCEWithLogitsLoss", "binary_cross_entropy_with_logits"), "sigmoid_ce")


def as_objective(given: Any) -> Objective:
    """The objective with the given name, the given objective itself, or the cross-entropy for None.

    Raises:
        ConfigError: for an unknown name; suggests the nearest one.
        OptionError: for anything else, such as a loss of torch.
    """
    if given is None:
        return OBJECTIVES["cross_entropy"]()
    if isinstance(given, str):
        return OBJECTIVES[given]()
    if isinstance(given, Objective):
        return given
    name = getattr(given, "__name__", type(given).__name__)
    similar = nearest(name.removesuffix("Loss").removesuffix("_loss"), OBJECTIVES)
    hint = f"; did you mean '{_OF_TORCH[name]}'?" if name in _OF_TORCH else similar
    shown = name if hasattr(given, "__name__") else truncate(repr(given), 100)
    raise OptionError(
        "objective",
        f"={shown} is not an objective: pass a name ({names(OBJECTIVES)}) or an object of a class that "
        f"derives from fa_bench.Objective{hint}",
    )


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """The per-sample losses (N,), reduced as `Objective.loss` specifies."""
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def one_hot(target: Tensor, like: Tensor) -> Tensor:
    """The targets with the shape and dtype of the outputs `like`, (N, C); class indices become one-hot rows, and real-valued
    targets keep their values."""
    if target.is_floating_point():
        return target.to(like.dtype)
    return like.new_zeros(like.shape).scatter_(1, target.unsqueeze(1), 1)
