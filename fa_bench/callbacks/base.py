"""The base class of callbacks, which the training loop calls at fixed points."""

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

    A callback may read and change every attribute of the trainer, such as ``rule``, ``model``, ``optimizers``, ``splits``,
    ``options`` and ``progress`` (finished epochs, steps, seconds). ``trainer.stop(reason)`` ends the run after the current epoch,
    with the status ``stopped`` unless that epoch is the last one. An exception ends the run immediately, with the status
    ``failed``.

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
        """Called before the first step; also called when a run is resumed."""

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Called at the start of an epoch and when a run is resumed within an epoch; ``trainer.progress.epoch`` counts from 0."""

    def on_loss(self, trainer: Trainer, x: Tensor) -> None:
        """Called between the forward pass on `x` and the backward pass; ``trainer.progress.loss_sum`` already includes the
        loss."""

    def on_gradients(self, trainer: Trainer) -> None:
        """Called when all gradients of a step have been computed, before they are clipped and applied."""

    def on_step_end(self, trainer: Trainer) -> None:
        """Called after the weights and the feedback have been updated."""

    def on_batches_end(self, trainer: Trainer) -> None:
        """Called after the last step of an epoch, before the evaluation; called again if a run is resumed that was interrupted
        during this evaluation."""

    def on_evaluation_batch(self, trainer: Trainer) -> None:
        """Called before every batch of an evaluation."""

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Called after the evaluation; ``trainer.progress.epoch`` includes this epoch. Values added to `metrics` must be
        JSON-serialisable."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Called after the last epoch, even if ``trainer.stop`` ended the run early."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, as plain containers and tensors; every checkpoint contains it. A checkpoint with
        anything else, such as a number of NumPy, cannot be read, and its run restarts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
