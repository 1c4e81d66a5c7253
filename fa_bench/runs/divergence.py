"""Detect that training diverges, and find the first tensor that is not finite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fa_bench.callbacks.base import Callback
from fa_bench.mechanisms.contexts import evaluating
from fa_bench.mechanisms.rule import Rule

if TYPE_CHECKING:
    from fa_bench.runs.loop import Trainer

#: The number of steps between two checks of the loss on an accelerator, where each check has to wait for the device.
CHECK_EVERY = 50


class Diverged(Exception):
    """The error that is raised if the loss or a trained tensor is not finite."""

    def __init__(self, epoch: int, step: int, layer: str | None) -> None:
        where = f" (first in {layer})" if layer else ""
        super().__init__(f"not finite in epoch {epoch} at step {step}{where}")
        self.epoch, self.step, self.layer = epoch, step, layer


@dataclasses.dataclass(eq=False)
class Divergence(Callback):
    """Records the epoch, step and layer at which the loss or a trained tensor is first found not to be finite, and then raises
    `Diverged` unless `proceed` is true."""

    proceed: bool = False

    def on_fit_start(self, trainer: Trainer) -> None:
        self._every = 1 if next(trainer.model.parameters()).device.type == "cpu" else CHECK_EVERY

    def on_loss(self, trainer: Trainer, x: Tensor) -> None:
        progress = trainer.progress
        assert progress.loss_sum is not None
        if progress.step % self._every == 0 and not math.isfinite(trainer.world.sum(progress.loss_sum).item()):
            # The layer is determined before the update, because the update would spread non-finite values to all layers.
            self._diverged(trainer, x)

    def on_batches_end(self, trainer: Trainer) -> None:
        total = torch.stack([tensor.detach().sum() for tensor in trainer.optimizers.trained()]).sum()
        if not (math.isfinite(trainer.world.totals(trainer.progress).mean_loss) and torch.isfinite(total)):
            self._diverged(trainer, None)

    def _diverged(self, trainer: Trainer, x: Tensor | None) -> None:
        progress = trainer.progress
        if progress.diverged is not None:
            return
        # The outputs may be non-finite for the samples of a single process only.
        layers = trainer.world.gather(first_nonfinite(trainer.rule, x))
        order = [name for name, _ in trainer.model.named_modules()]
        layer = min(filter(None, layers), key=lambda name: order.index(name) if name in order else -1, default=None)
        error = Diverged(progress.epoch + 1, progress.step, layer)
        progress.diverged = {"epoch": error.epoch, "step": error.step, "layer": error.layer, "message": str(error)}
        if not self.proceed:
            raise error


def first_nonfinite(rule: Rule, x: Tensor | None) -> str | None:
    """The name of the first weight or feedback tensor that is not finite or, if there is none, of the first module with a
    non-finite output for `x`; None if there is no such module or `x` is None."""
    feedback = [(f"{layer}.{name}", tensor) for layer, tensors in rule.feedback.items() for name, tensor in tensors.items()]
    weights = {id(weight) for weight in rule.weight_parameters()}
    named = [(name, tensor) for name, tensor in rule.model.named_parameters() if id(tensor) in weights]
    for name, tensor in (*named, *feedback):
        if not torch.isfinite(tensor).all():
            return name
    return None if x is None else first_nonfinite_output(rule.model, x)


@torch.no_grad()
def first_nonfinite_output(model: torch.nn.Module, x: Tensor) -> str | None:
    """The name of the first module that has a non-finite output for `x` in evaluation mode; None if all outputs are finite."""
    nonfinite: list[str] = []

    def make_hook(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                nonfinite.append(name)

        return hook

    handles = [module.register_forward_hook(make_hook(name)) for name, module in model.named_modules() if name]
    try:
        with evaluating(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return nonfinite[0] if nonfinite else None
