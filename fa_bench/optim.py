"""Optimizers, their schedules, and the pair of them that trains weights and learned feedback."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fa_bench.config.options import Options, option
from fa_bench.config.registries import OPTIMIZERS
from fa_bench.errors import OptionError
from fa_bench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.mechanisms.rule import Rule


@dataclasses.dataclass(eq=False)
class Schedule(Options):
    """How the learning rate changes from epoch to epoch; epochs count from 0."""

    name: str = option("constant", "constant, step (every step_size epochs), multistep (at milestones), cosine (towards min_lr)",
                       choices=["constant", "step", "multistep", "cosine"])
    gamma: float = option(0.1, "factor of step and multistep", above=0, maximum=1)
    step_size: int | None = option(None, "epochs between the steps of step", minimum=1)
    milestones: list[int] | None = option(None, "epochs at which multistep multiplies by gamma", minimum=1)
    min_lr: float = option(0.0, "learning rate that cosine approaches; the last epoch still has more, the one behind it would "
                                "have this", minimum=0)

    def check(self) -> None:
        for needs, key in (("step", "step_size"), ("multistep", "milestones")):
            if (getattr(self, key) is None) == (self.name == needs):
                raise OptionError(key, f"is {'needed' if self.name == needs else 'of no use'} with schedule.name={self.name}"
                                       f" (it belongs to {needs})")

    def build(self, optimizer: torch.optim.Optimizer, epochs: int) -> Any:
        """The torch scheduler, to be stepped once an epoch."""
        schedulers = torch.optim.lr_scheduler
        if self.name == "step":
            return schedulers.StepLR(optimizer, self.step_size, self.gamma)
        if self.name == "multistep":
            return schedulers.MultiStepLR(optimizer, self.milestones, self.gamma)
        if self.name == "cosine":
            return schedulers.CosineAnnealingLR(optimizer, epochs, self.min_lr)
        return schedulers.LambdaLR(optimizer, _constant)


def _constant(epoch: int) -> float:
    return 1.0


@dataclasses.dataclass(eq=False)
class OptimizerOptions(Options):
    """Base of the optimizers. Decay applies to every trained tensor: weights, biases, normalisation, learned feedback."""

    lr: float = option(0.05, "learning rate", above=0)
    weight_decay: float = option(0.0, "weight decay per unit of learning rate", minimum=0)
    first_epoch_weight_decay: float | None = option(None, "weight decay during the first epoch; null: as later", minimum=0)
    schedule: Schedule = option(Schedule(), "change of the learning rate from epoch to epoch")

    def check(self) -> None:
        if self.schedule.min_lr > self.lr:
            raise OptionError("schedule.min_lr", f"={self.schedule.min_lr} is above lr={self.lr}")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimizer for parameter groups; each group may hold a ``lr`` of its own."""
        raise NotImplementedError


@OPTIMIZERS.register("sgd")
@dataclasses.dataclass(eq=False)
class SGD(OptimizerOptions):
    """Stochastic gradient descent; decay is coupled (added to the gradient before momentum)."""

    momentum: float = option(0.9, "momentum", minimum=0, below=1)
    nesterov: bool = option(False, "Nesterov momentum")

    def check(self) -> None:
        super().check()
        if self.nesterov and self.momentum == 0:
            raise OptionError("nesterov", "=true needs momentum above 0")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov,
                               weight_decay=self.weight_decay, fused=_fusible(groups))


@OPTIMIZERS.register("adam")
@dataclasses.dataclass(eq=False)
class Adam(OptimizerOptions):
    """Adam; decay is coupled, which breaks the convergence of Kolen-Pollack's W - B: use adamw there."""

    lr: float = option(1e-3, "learning rate", above=0)
    beta1: float = option(0.9, "decay rate of the first moment", minimum=0, below=1)
    beta2: float = option(0.999, "decay rate of the second moment", minimum=0, below=1)
    eps: float = option(1e-8, "added to the root of the second moment", above=0)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return self._torch_class()(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps,
                                   weight_decay=self.weight_decay, fused=_fusible(groups))

    def _torch_class(self) -> Any:
        return torch.optim.Adam


@OPTIMIZERS.register("adamw")
@dataclasses.dataclass(eq=False)
class AdamW(Adam):
    """Adam with decoupled decay: each step shrinks a tensor by lr times weight_decay, whatever its gradient."""

    def _torch_class(self) -> Any:
        return torch.optim.AdamW


def _fusible(groups: list[dict[str, Any]]) -> bool:
    """Whether one kernel can update all tensors; on a CPU it is two to three times faster than one tensor at a time."""
    tensors = [tensor for group in groups for tensor in group["params"]]
    return all(tensor.is_floating_point() and tensor.device.type in ("cpu", "cuda") for tensor in tensors)


class Optimizers:
    """What trains the weights, and learned feedback: in the same parameter group, or with an optimizer of its own.

    Args:
        options: the optimizer of the weights.
        rule: an attached rule; its learned feedback is trained too.
        epochs: length of the run, for the schedules.
        feedback_options: the optimizer of the learned feedback; None: that of the weights.
    """

    def __init__(
        self, options: OptimizerOptions, rule: Rule, epochs: int, feedback_options: OptimizerOptions | None = None
    ) -> None:
        weights = [p for p in rule.weight_parameters() if p.requires_grad]
        learned = rule.feedback_parameters()
        scale = rule.feedback_lr_scale
        parts = [(options, [{"params": weights}])]
        if learned and feedback_options is not None:
            parts.append((feedback_options, [{"params": learned}]))
        elif learned and scale != 1:
            parts[0][1].append({"params": learned, "lr": options.lr * scale})
        else:
            # One group for both: every rule that relies on equal updates of W and B relies on equal settings.
            weights += learned
        self.options = [part for part, _ in parts]
        self.optimizers = [part.build(groups) for part, groups in parts]
        # A fused update only reads gradients, and so one tensor serves both; asked for as two, it would be copied at every step.
        fused = all(optimizer.defaults.get("fused") for optimizer in self.optimizers)
        self._shared = rule.shared_gradients() if fused else []
        self.schedulers = [
            part.schedule.build(optimizer, epochs) for part, optimizer in zip(self.options, self.optimizers, strict=True)
        ]

    @property
    def lr(self) -> float:
        """The learning rate of the weights now."""
        return self.optimizers[0].param_groups[0]["lr"]

    def begin_epoch(self, epoch: int) -> None:
        """Set the weight decay of this epoch, counted from 0."""
        for part, optimizer in zip(self.options, self.optimizers, strict=True):
            first = part.first_epoch_weight_decay
            for group in optimizer.param_groups:
                group["weight_decay"] = first if epoch == 0 and first is not None else part.weight_decay

    def end_epoch(self) -> None:
        """Step the schedules."""
        with warnings.catch_warnings():
            # A run that goes on at the end of an epoch steps them before its first update in this process.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for scheduler in self.schedulers:
                scheduler.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update the weights, then the learned feedback."""
        for feedback, weight in self._shared:
            if feedback.grad is not None:
                feedback.grad = weight.grad
        for optimizer in self.optimizers:
            optimizer.step()

    def trained(self) -> Iterable[Tensor]:
        """Every tensor that is trained."""
        return (tensor for optimizer in self.optimizers for group in optimizer.param_groups for tensor in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {"optimizers": [o.state_dict() for o in self.optimizers], "schedulers": [s.state_dict() for s in self.schedulers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for mine, theirs in zip([*self.optimizers, *self.schedulers], [*state["optimizers"], *state["schedulers"]], strict=True):
            mine.load_state_dict(theirs)
