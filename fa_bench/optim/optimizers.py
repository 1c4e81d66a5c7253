"""The pair of optimizers that trains weights and learned feedback."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.mechanisms.rule import Rule
    from fa_bench.optim.base import OptimizerOptions


class Optimizers:
    """What trains the weights, and learned feedback: in the same parameter group, or with an optimizer of its own.

    Args:
        options: the optimizer of the weights.
        rule: an attached rule; its learned feedback is trained too.
        epochs: length of the run, for the schedules.
        feedback_options: the optimizer of the learned feedback; None: that of the weights.
        steps_per_epoch: for schedules that count steps.
    """

    def __init__(
        self, options: OptimizerOptions, rule: Rule, epochs: int, feedback_options: OptimizerOptions | None = None,
        steps_per_epoch: int = 1,
    ) -> None:
        weights = [p for p in rule.weight_parameters() if p.requires_grad]
        learned = rule.feedback_parameters()
        scale = rule.feedback_lr_scale
        parts: list[tuple[OptimizerOptions, list[dict[str, Any]]]] = [(options, [{"params": weights}])]
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
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self.lengths = {"epoch": epochs, "step": epochs * steps_per_epoch}
        self._by_step = any(part.schedule.per == "step" for part in self.options)
        self._set_rates("epoch", 0)
        self._set_rates("step", 0)

    @property
    def lr(self) -> float:
        """The learning rate of the weights now."""
        return self.optimizers[0].param_groups[0]["lr"]

    def begin_epoch(self, epoch: int, step: int = 0) -> None:
        """Set the weight decay and the learning rates of this epoch, which begins at `step`; both are counted from 0."""
        for part, optimizer in zip(self.options, self.optimizers, strict=True):
            first = part.first_epoch_weight_decay
            for group in optimizer.param_groups:
                group["weight_decay"] = first if epoch == 0 and first is not None else part.weight_decay
        self._set_rates("epoch", epoch)
        self._set_rates("step", step)

    def begin_step(self, step: int) -> None:
        """Drop all gradients, and set the learning rates of schedules that count steps."""
        self.zero_grad()
        if self._by_step:
            self._set_rates("step", step)

    def _set_rates(self, unit: str, done: int) -> None:
        """Set the learning rates of schedules that count in `unit`, ``epoch`` or ``step``, after `done` of them."""
        for part, optimizer in zip(self.options, self.optimizers, strict=True):
            if part.schedule.per == unit:
                for group in optimizer.param_groups:
                    group["lr"] = part.schedule.at(group["initial_lr"], done, self.lengths[unit])

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def clip(self, most: float) -> None:
        """Scale all gradients, those of weights and learned feedback alike, so that their norm is at most `most`."""
        torch.nn.utils.clip_grad_norm_(self.trained(), most)

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
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for mine, theirs in zip(self.optimizers, state["optimizers"], strict=True):
            mine.load_state_dict(theirs)
