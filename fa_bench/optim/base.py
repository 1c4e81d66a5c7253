"""The base class of optimizers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.errors import OptionError, missing_method
from fa_bench.registry.options import Options, option
from fa_bench.schedules.base import Schedule
from fa_bench.schedules.constant import Constant
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from fa_bench.mechanisms.rule import Rule


@dataclasses.dataclass(eq=False)
class OptimizerOptions(Options):
    """Base class of optimizers. Weight decay applies to every tensor that the optimizer trains, including biases, the parameters
    of normalisation layers, and learned feedback.

    Examples:
        >>> import dataclasses, torch, fa_bench
        >>> @dataclasses.dataclass(eq=False)
        ... class Plain(fa_bench.OptimizerOptions):
        ...     def build(self, groups):
        ...         return torch.optim.SGD(groups, lr=self.lr, weight_decay=self.weight_decay)
        >>> Plain(lr=0.1).build([{"params": [torch.nn.Parameter(torch.zeros(2))]}]).param_groups[0]["lr"]
        0.1
    """

    search_space = {"lr": "tag(log,interval(1e-3,1))", "weight_decay": "choice(0,1e-5,1e-4,1e-3,1e-2)"}

    lr: float = option(0.05, "learning rate", above=0)
    weight_decay: float = option(0.0, "weight decay per unit of learning rate", minimum=0)
    first_epoch_weight_decay: float | None = option(
        None, "weight decay in the first epoch; null: the same as weight_decay", minimum=0
    )
    schedule: Schedule = option(Constant(), "how the learning rate changes during training")

    def check(self) -> None:
        try:
            self.schedule.check_rate(self.lr)
        except OptionError as error:
            raise error.with_prefix("schedule") from None

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The PyTorch optimizer for the parameter groups; each group may have its own ``lr``."""
        raise missing_method(self, "build")

    def optimizers(self, groups: list[dict[str, Any]], rule: Rule) -> list[torch.optim.Optimizer]:
        """The PyTorch optimizers for the parameter groups; by default, only the one from `build`. Override this method to train
        different parameters of the rule's model with different optimizers.

        Raises:
            OptionError: if the options do not fit the model.
        """
        return [self.build(groups)]


def fusible(groups: list[dict[str, Any]]) -> bool:
    """Whether PyTorch's fused update, which is two to three times faster on a CPU, supports the tensors."""
    tensors = [tensor for group in groups for tensor in group["params"]]
    return all(tensor.is_floating_point() and tensor.device.type in ("cpu", "cuda") for tensor in tensors)
