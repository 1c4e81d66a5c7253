"""The base class of callbacks: code that the training loop calls at fixed points."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.registry.options import Options

if TYPE_CHECKING:
    from torch import Tensor

    from fa_bench.runs.loop import Trainer


@dataclasses.dataclass(eq=False)
class Callback(Options):
    """Base class of callbacks, registered in `fa_bench.registry.registries.CALLBACKS`; all methods are optional.

    A callback may read and change every attribute of the trainer: ``trainer.rule``, its ``model``, ``optimizers``, ``splits``,
    ``options`` and ``progress`` (finished epochs, steps, seconds). ``trainer.stop(reason)`` ends the run after the current epoch,
    with status `stopped`; raising an error ends it immediately, with status failed.

    Examples:
        >>> import dataclasses, fa_bench
        >>> @fa_bench.register_callback("norms")
        ... @dataclasses.dataclass(eq=False)
        ... class Norms(fa_bench.Callback):
        ...     '''Records the norm of all weights after every epoch.'''
        ...
        ...     def on_epoch_end(self, trainer, metrics):
        ...         metrics["norm"] = sum(p.norm().item() for p in trainer.model.parameters())
        >>> [run] = fa_bench.run("dataset=synthetic", "scale=smoke", "callbacks=[norms]")
        fa seed 0...
        >>> run.metrics[-1]["norm"] > 0
        True
    """

    def on_fit_start(self, trainer: Trainer) -> None:
        """Called before the first step, including in a resumed run."""

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Before the first step of an epoch in this process; ``trainer.progress.epoch`` counts from 0."""

    def on_loss(self, trainer: Trainer, x: Tensor) -> None:
        """After a forward pass on the inputs `x`, before the backward pass; ``trainer.progress.loss_sum`` includes its loss."""

    def on_gradients(self, trainer: Trainer) -> None:
        """After all gradients of a step are computed, before they are clipped and used."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After the update of weights and feedback."""

    def on_batches_end(self, trainer: Trainer) -> None:
        """After the last step of an epoch, before the evaluation."""

    def on_evaluation_batch(self, trainer: Trainer) -> None:
        """Before every batch of an evaluation."""

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """After the evaluation; ``trainer.progress.epoch`` counts this epoch. Values added to `metrics` must be JSON."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """After the last epoch, even if ``trainer.stop`` ended the run there."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, in plain containers and tensors; saved in every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
