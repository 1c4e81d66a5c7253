"""Where training stops being finite, and what was not finite first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fa_bench.callbacks.base import Callback
from fa_bench.mechanisms.rule import Rule
from fa_bench.mechanisms.trace import evaluating

if TYPE_CHECKING:
    from fa_bench.runs.loop import Trainer

#: Steps between two looks at the loss where looking makes an accelerator wait.
CHECK_EVERY = 50


class Diverged(Exception):
    """The loss, or a trained tensor, is not finite."""

    def __init__(self, epoch: int, step: int, layer: str | None) -> None:
        where = f" (first in {layer})" if layer else ""
        super().__init__(f"not finite in epoch {epoch} at step {step}{where}")
        self.epoch, self.step, self.layer = epoch, step, layer


@dataclasses.dataclass(eq=False)
class Divergence(Callback):
    """Records the first loss, weight or feedback that is not finite, and ends the run there by `Diverged` unless `proceed`."""

    proceed: bool = False

    def on_fit_start(self, trainer: Trainer) -> None:
        self._every = 1 if next(trainer.model.parameters()).device.type == "cpu" else CHECK_EVERY

    def on_loss(self, trainer: Trainer, x: Tensor) -> None:
        progress = trainer.progress
        assert progress.loss_sum is not None
        if progress.step % self._every == 0 and not math.isfinite(progress.loss_sum.item()):
            # Before the update, which would spread it to all layers.
            self._diverged(trainer, x)

    def on_batches_end(self, trainer: Trainer) -> None:
        total = torch.stack([tensor.detach().sum() for tensor in trainer.optimizers.trained()]).sum()
        if not (math.isfinite(trainer.progress.means()[0]) and torch.isfinite(total)):
            self._diverged(trainer, None)

    def _diverged(self, trainer: Trainer, x: Tensor | None) -> None:
        progress = trainer.progress
        if progress.diverged is not None:
            return
        found = Diverged(progress.epoch + 1, progress.step, first_culprit(trainer.rule, x))
        progress.diverged = {"epoch": found.epoch, "step": found.step, "layer": found.layer, "message": str(found)}
        if not self.proceed:
            raise found


def first_culprit(rule: Rule, x: Tensor | None) -> str | None:
    """The first tensor that is not finite: a weight, in the model's order, learned feedback, or a layer's output for `x`."""
    feedback = [(f"{layer}.{name}", tensor) for layer, own in rule.feedback.items() for name, tensor in own.items()]
    weights = {id(weight) for weight in rule.weight_parameters()}
    named = [(name, tensor) for name, tensor in rule.model.named_parameters() if id(tensor) in weights]
    for name, tensor in (*named, *feedback):
        if not torch.isfinite(tensor).all():
            return name
    return None if x is None else first_not_finite(rule.model, x)


@torch.no_grad()
def first_not_finite(model: torch.nn.Module, x: Tensor) -> str | None:
    """The first module whose output for `x` is not finite, in evaluation mode; None where there is none."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)
        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with evaluating(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
