"""The base class of probes, and a class that runs the probes listed in a run's option ``probes`` without side effects."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from fa_bench.errors import ConfigError, missing_method
from fa_bench.metrics.alarm import Alarm
from fa_bench.registry.options import Options
from fa_bench.registry.registries import PROBES
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.data.splits import Split, Splits
    from fa_bench.mechanisms.rule import Rule
    from fa_bench.metrics.meter import AlignmentMeter

#: Maximum number of training samples that a probe may learn from, and of samples on which it measures scores. The same samples
#: are chosen in every run on the same data.
TRAINING_IMAGES, SCORED_IMAGES = 2_000, 10_000

Quantities = dict[str, dict[str, float]]


@dataclasses.dataclass
class Subject:
    """The trained model that probes measure, with its data.

    Attributes:
        rule: an attached rule; its model is measured.
        splits: the data.
        meter: holds the fixed batch (``x``, ``y``; ``inputs()`` is a copy for one pass) and the model's structure (``trace``).
        batch_size: the batch size of training.
        initial: parameter name -> its value before training; empty unless a probe needs it.
    """

    rule: Rule
    splits: Splits
    meter: AlignmentMeter
    batch_size: int
    initial: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model with the rule attached."""
        return self.rule.model

    @property
    def training(self) -> Split:
        """The training samples that a probe may learn from, which are the same for every run on the same data."""
        from fa_bench.data.splits import some

        return some(self.splits.train, TRAINING_IMAGES)

    @property
    def training_indices(self) -> Tensor:
        """The indices of `training` in the training set."""
        from fa_bench.data.splits import some_indices

        return some_indices(self.splits.train, TRAINING_IMAGES)

    @property
    def scored(self) -> Split:
        """The samples on which scores are measured: validation samples if there are any, otherwise test samples."""
        from fa_bench.data.splits import some

        validation = self.splits.validation
        return some(validation if validation is not None and len(validation) else self.splits.test, SCORED_IMAGES)


@dataclasses.dataclass(eq=False)
class Probe(Options):
    """Base class of probes, registered under a name in `fa_bench.registry.registries.PROBES`.

    Examples:
        >>> import dataclasses, fa_bench
        >>> @fa_bench.register_probe("weight_norm")
        ... @dataclasses.dataclass(eq=False)
        ... class WeightNorm(fa_bench.Probe):
        ...     '''Norm of every weight at the end of the run.'''
        ...
        ...     def measure(self, subject):
        ...         parameters = subject.model.named_parameters()
        ...         return {"weight_norm": {name: value.norm().item() for name, value in parameters if value.dim() > 1}}
        >>> [run] = fa_bench.run("dataset=synthetic", "scale=smoke", "algorithm=bp", "probes=[weight_norm]")
        bp seed 0...
        >>> sorted(run.result["probes"]["weight_norm"])
        ['fc1.weight', 'fc2.weight', 'fc3.weight']
    """

    #: Whether the probe needs ``subject.initial``.
    needs_initial: ClassVar[bool] = False
    #: The thresholds that reports check the probe's values against, by quantity.
    alarms: ClassVar[Mapping[str, Alarm]] = {}

    def require(self, subject: Subject) -> None:
        """Called before training; raises ConfigError with a remedy if the probe cannot measure the subject."""

    def measure(self, subject: Subject) -> Quantities:
        """The values as {quantity: {layer or block: value}}. One quantity has the probe's name, and the names of all others begin
        with that name.

        Changes to the model, gradients, modes and the global random state are undone afterwards. ``rule.mode.freeze_random`` is
        set, so that forward passes sample nothing new.
        """
        raise missing_method(self, "measure")


class Probes:
    """Computes the values of a run's probes.

    Args:
        names: names of probes.
        every: epochs between two measurements; 0: only at the end.
        subject: the model to be measured, before training, with its data.

    Raises:
        ConfigError: for a probe that cannot measure the subject, with a remedy.
    """

    def __init__(self, names: Iterable[str], every: int, subject: Subject) -> None:
        self.probes = [PROBES[name]() for name in dict.fromkeys(names)]
        self.every, self.subject = every, subject
        self._last: tuple[int, Quantities] | None = None
        for probe in self.probes:
            try:
                probe.require(subject)
            except ConfigError as error:
                raise ConfigError(f"probes=[{probe.name}]: {error}") from None
        if any(probe.needs_initial for probe in self.probes):
            # The initial values are kept on the CPU to save the accelerator's memory for training.
            subject.initial = {
                name: parameter.detach().to("cpu", copy=True)
                for name, parameter in subject.model.named_parameters(remove_duplicate=False)
            }

    def due(self, epoch: int) -> bool:
        """Whether the probes should be measured at the end of this epoch, counted from 1."""
        return bool(self.probes) and self.every > 0 and epoch % self.every == 0

    def measure(self, step: int) -> Quantities:
        """The values of all probes after update number `step`. Another call for the same step returns the same values."""
        if self._last is None or self._last[0] != step:
            values: Quantities = {}
            for probe in self.probes:
                with state_restored(self.subject.rule):
                    values |= probe.measure(self.subject)
            self._last = step, values
        return self._last[1]


@contextmanager
def state_restored(rule: Rule) -> Iterator[None]:
    """A context manager that restores the state of an attached model and the global random state when it exits.

    The restored state consists of parameters (including learned feedback), buffers, gradients, ``requires_grad``, and the modes
    of all modules. At the start of the context, gradients are None; within it, ``rule.mode.freeze_random`` is set.
    """
    from fa_bench.mechanisms.contexts import modes_of, restore_modes, set_temporarily
    from fa_bench.utils.process import random_state, restore_random_state

    model = rule.model
    _ = rule.feedback  # feedback may be sampled when it is first read; the values after that are restored
    tensors = [*model.parameters(), *model.buffers()]
    saved = [(tensor, tensor.detach().clone(), tensor.requires_grad) for tensor in tensors]
    modes = modes_of(model)
    generators = random_state()
    try:
        with set_temporarily([rule.mode], "freeze_random", True), set_temporarily(tensors, "grad", None):
            yield
    finally:
        restore_random_state(generators)
        restore_modes(modes)
        with torch.no_grad():
            for tensor, value, requires_grad in saved:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
                tensor.requires_grad_(requires_grad)
