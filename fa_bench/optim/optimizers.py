"""The optimizers that train weights and learned feedback."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fa_bench.errors import OptionError
from fa_bench.utils.lazy import torch
from fa_bench.utils.tensors import copied_when_changed

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.mechanisms.rule import Rule
    from fa_bench.optim.base import OptimizerOptions


class Optimizers:
    """Trains the weights and the learned feedback, with the same optimizer or with separate ones.

    Args:
        options: the options of the optimizer of the weights.
        rule: an attached rule, which may have learned feedback.
        epochs: length of the run, for the schedules.
        feedback_options: the optimizer of the learned feedback; None: that of the weights.
        steps_per_epoch: the number of steps in an epoch, for schedules that count steps.

    Raises:
        OptionError: if an optimizer's options do not fit the model.
    """

    def __init__(
        self,
        options: OptimizerOptions,
        rule: Rule,
        epochs: int,
        feedback_options: OptimizerOptions | None = None,
        steps_per_epoch: int = 1,
    ) -> None:
        weights = [p for p in rule.weight_parameters() if p.requires_grad]
        learned = rule.feedback_parameters()
        scale = rule.feedback_lr_scale
        parts: list[tuple[str, OptimizerOptions, list[dict[str, Any]]]] = [("optimizer", options, [{"params": weights}])]
        if learned and feedback_options is not None:
            parts.append(("feedback_optimizer", feedback_options, [{"params": learned}]))
        elif learned and scale != 1:
            parts[0][2].append({"params": learned, "lr": options.lr * scale})
        else:
            # Weights and feedback share one group, because rules that rely on equal updates of W and B need equal settings for
            # both.
            weights += learned
        #: The optimizers, and the options of each.
        self.optimizers: list[torch.optim.Optimizer] = []
        self.options: list[OptimizerOptions] = []
        for key, part, groups in parts:
            try:
                built = part.optimizers(groups, rule)
            except OptionError as error:
                raise error.with_prefix(key) from None
            self.optimizers += built
            self.options += [part] * len(built)
        self._rule = rule
        #: Pairs (learned feedback, weight) that share one gradient in `step`, which is safe because a fused update only reads it.
        self._shared: list[tuple[Tensor, Tensor]] = []
        self._is_filled = False
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self.lengths = {"epoch": epochs, "step": epochs * steps_per_epoch}
        self._by_step = any(part.schedule.per == "step" for part in self.options)
        self._set_rates(epoch=0, step=0)

    def share_gradients(self) -> None:
        """Stop backward passes from computing a separate gradient for learned feedback that has the same gradient as a weight.

        The method has no effect unless all optimizers are fused. It must not be called in data-parallel training, where every
        process waits for the gradients of all parameters.
        """
        if all(optimizer.defaults.get("fused") for optimizer in self.optimizers):
            self._shared = self._rule.shared_gradients()
            for learned in self._rule.learned_feedback():
                learned.shares_gradient = any(learned.tensor is tensor for tensor, _ in self._shared)

    def fill_gradients(self) -> None:
        """Give learned feedback that shares the gradient of a weight its own copy, for code that reads or changes gradients."""
        if self._is_filled:  # a gradient that is missing now was removed on purpose
            return
        self._is_filled = True
        for feedback, weight in self._shared:
            if feedback.grad is None and weight.grad is not None:
                feedback.grad = copied_when_changed(weight.grad)

    @property
    def lr(self) -> float:
        """The current learning rate of the weights."""
        return self.optimizers[0].param_groups[0]["lr"]

    def begin_epoch(self, epoch: int, step: int = 0) -> None:
        """Set the weight decay and the learning rates of an epoch, which begins at `step`; epochs and steps count from 0."""
        for part, optimizer in zip(self.options, self.optimizers, strict=True):
            first = part.first_epoch_weight_decay
            for group in optimizer.param_groups:
                group["weight_decay"] = first if epoch == 0 and first is not None else part.weight_decay
        self._set_rates(epoch=epoch, step=step)

    def begin_step(self, step: int) -> None:
        """Reset all gradients, and set the learning rates of schedules that count steps."""
        self.zero_grad()
        if self._by_step:
            self._set_rates(step=step)

    def _set_rates(self, **done: int) -> None:
        """Set the learning rates of the schedules whose unit is given.

        Args:
            **done: the unit, ``epoch`` or ``step`` -> the number of completed epochs or steps.
        """
        for part, optimizer in zip(self.options, self.optimizers, strict=True):
            if (unit := part.schedule.per) in done:
                for group in optimizer.param_groups:
                    group["lr"] = part.schedule.at(group["initial_lr"], done[unit], self.lengths[unit])

    def zero_grad(self) -> None:
        """Reset all gradients."""
        self._is_filled = False
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def clip(self, max_norm: float) -> None:
        """Scale the gradients of weights and learned feedback so that their joint norm is at most `max_norm`."""
        self.fill_gradients()
        torch.nn.utils.clip_grad_norm_(self.trained(), max_norm)

    def step(self) -> None:
        """Update the weights and the learned feedback."""
        for feedback, weight in self._shared:
            if feedback.grad is None and not self._is_filled:
                feedback.grad = weight.grad
        for optimizer in self.optimizers:
            optimizer.step()

    def trained(self) -> Iterable[Tensor]:
        """All trained tensors."""
        return (tensor for optimizer in self.optimizers for group in optimizer.param_groups for tensor in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizers, as plain containers and tensors."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
