"""What a probe of layers is, and how a run measures those that its option ``probes`` names, leaving no trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from fa_bench.errors import ConfigError
from fa_bench.registry.options import Options
from fa_bench.registry.registries import PROBES
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.data.base import Split, Splits
    from fa_bench.mechanisms.rule import Rule
    from fa_bench.metrics.meter import AlignmentMeter

#: Training images that a probe may learn from, and images that it scores on: at most, a fixed choice of them.
TRAINING_IMAGES, SCORED_IMAGES = 2_000, 10_000

Quantities = dict[str, dict[str, float]]


@dataclasses.dataclass
class Subject:
    """What probes measure.

    Attributes:
        rule: an attached rule; its model is measured.
        splits: the data.
        meter: holds the fixed batch (``x``, ``y``) and the model's structure (``trace``).
        batch_size: of training.
        initial: parameter name -> its value before training; empty where no probe asks for them.
    """

    rule: Rule
    splits: Splits
    meter: AlignmentMeter
    batch_size: int
    initial: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model, the rule in it."""
        return self.rule.model

    @property
    def training(self) -> Split:
        """The training images that a probe may learn from: the same for every run on these data."""
        from fa_bench.data.base import some

        return some(self.splits.train, TRAINING_IMAGES)

    @property
    def scored(self) -> Split:
        """The images that accuracies are measured on: of validation where there is one, else of the test set."""
        from fa_bench.data.base import some

        held = self.splits.validation
        return some(held if held is not None and len(held) else self.splits.test, SCORED_IMAGES)


@dataclasses.dataclass(eq=False)
class Probe(Options):
    """Base of the probes, registered under a name in `fa_bench.registry.registries.PROBES`."""

    #: Whether it needs ``subject.initial``.
    needs_initial: ClassVar[bool] = False

    def require(self, subject: Subject) -> None:
        """Called before training; raise ConfigError, with what would work, where the probe makes no sense for the subject."""

    def measure(self, subject: Subject) -> Quantities:
        """{quantity: {layer or block: value}}, a quantity of the probe's name among them, others beginning with that name.

        Whatever it does to the model, to gradients, modes and global random numbers is undone afterwards.
        ``rule.mode.freeze_random`` is set, so that forward passes sample nothing new.
        """
        raise NotImplementedError


class Probes:
    """The probes that a run asks for.

    Args:
        names: of the probes.
        every: epochs between two measurements; 0: at the end alone.
        subject: what they measure, before training.

    Raises:
        ConfigError: for a probe that makes no sense here, with what would work.
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
            # On the CPU: an accelerator's memory is for training.
            subject.initial = {name: parameter.detach().to("cpu", copy=True)
                               for name, parameter in subject.model.named_parameters(remove_duplicate=False)}

    def due(self, epoch: int) -> bool:
        """Whether they are to be measured at the end of this epoch, counted from 1."""
        return bool(self.probes) and self.every > 0 and epoch % self.every == 0

    def measure(self, step: int) -> Quantities:
        """What all probes give now, after update number `step`; measured once for a step."""
        if self._last is None or self._last[0] != step:
            found: Quantities = {}
            for probe in self.probes:
                with as_before(self.subject.rule):
                    found |= probe.measure(self.subject)
            self._last = step, found
        return self._last[1]


@contextmanager
def as_before(rule: Rule) -> Iterator[None]:
    """Whatever happens within it to an attached model and to global random numbers is undone afterwards.

    That is parameters, learned feedback among them, buffers, gradients (none within it), ``requires_grad``, the modes of all
    modules, and the state of every global random generator; ``rule.mode.freeze_random`` is set.
    """
    from fa_bench.utils.process import random_state, restore_random_state

    model, mode = rule.model, rule.mode
    _ = rule.feedback  # reading it brings it up to date, so that what is put back is not an older draw
    tensors = [*model.parameters(), *model.buffers()]
    kept = [(tensor, tensor.detach().clone(), tensor.grad, tensor.requires_grad) for tensor in tensors]
    modes = [(module, module.training) for module in model.modules()]
    held, drawn = mode.freeze_random, random_state()
    for tensor in tensors:
        tensor.grad = None
    mode.freeze_random = True
    try:
        yield
    finally:
        mode.freeze_random = held
        restore_random_state(drawn)
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for tensor, value, gradient, required in kept:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
                tensor.grad = gradient
                tensor.requires_grad_(required)
