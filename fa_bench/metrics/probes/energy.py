"""Measures how far the states of rules that minimise an energy have settled, and how much the gradients of these rules differ
from those of backpropagation."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fa_bench.errors import ConfigError, names
from fa_bench.metrics.alarm import Alarm
from fa_bench.metrics.probes.base import Probe, Quantities, Subject
from fa_bench.registry.registries import ALGORITHMS, PROBES
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: The name of the row for the loss in the quantity ``energy``.
LOSS = "(loss)"


@PROBES.register("energy")
@dataclasses.dataclass(eq=False)
class Energy(Probe):
    """The energy after settling, the distance from equilibrium, and a comparison of the resulting gradients with
    backpropagation's.

    The probe is for subclasses of `fa_bench.mechanisms.cut.energy.EnergyRule`. Let e_l be the error between the state and its
    prediction at cut l. The quantities of the probe are:

    - ``energy``: the parts of the energy after settling, averaged over the samples. Each cut has a row with ½‖e_l‖², and the row
      ``(loss)`` contains the loss.

    - ``energy_gradient``: ‖∂E/∂e_l‖ after settling, divided by its value before settling, which is the norm of backpropagation's
      error at the cut. In this derivative, the states after cut l change with e_l. The ratio is 1 if nothing has settled and 0 at
      equilibrium.

    - ``energy_cosine``: for each layer, the cosine between the weight's gradient and that of backpropagation.

    - ``energy_ratio``: for each layer, the norm of the weight's gradient divided by that of backpropagation.

    All quantities are measured on the fixed batch; batch normalisation uses the batch's statistics, and dropout is off. A ratio
    is NaN if its denominator is zero, and a cosine is NaN if either norm is zero. For a weight that does not learn,
    ``energy_cosine`` and ``energy_ratio`` are NaN. The probe costs a step of the rule, two more passes of the model,
    and a step of backpropagation.
    """

    alarms = {
        "energy_gradient": Alarm(
            0.9,
            True,
            "The states have hardly settled, so the gradients of hidden layers are nearly those of backpropagation times a "
            "factor, which has no effect under Adam (threshold chosen by this project).",
        )
    }

    def require(self, subject: Subject) -> None:
        from fa_bench.mechanisms.cut.energy import EnergyRule

        if not isinstance(subject.rule, EnergyRule):
            rules = names(name for name, rule in ALGORITHMS.items() if issubclass(rule, EnergyRule))
            raise ConfigError(f"rule '{subject.rule.name}' has no energy; rules that have one: {rules}")

    def measure(self, subject: Subject) -> Quantities:
        from fa_bench.mechanisms.cut.energy import EnergyRule
        from fa_bench.mechanisms.weighted_layers import weight_gradient, weighted_layers
        from fa_bench.metrics.meter import measured_output, measurement_mode

        rule, meter, y = subject.rule, subject.meter, subject.meter.y
        assert isinstance(rule, EnergyRule)
        layers = weighted_layers(subject.model)
        layers = {path: layers[path] for path in subject.meter.trace.order}

        def gradients() -> dict[str, Tensor | None]:
            logits = measured_output(rule, subject.model(meter.inputs()))
            rule.backward(rule.objective.loss(logits, y), logits, y, indices=subject.meter.indices)
            return {path: weight_gradient(layer) for path, layer in layers.items()}

        with torch.enable_grad():
            with measurement_mode(rule), rule.exact():
                exact = gradients()
            with measurement_mode(rule), rule.observed() as found:
                own = gradients()
        (relaxation,) = found
        pairs = {path: (own[path], exact[path]) for path in layers}
        return {
            self.name: {**relaxation.energies, LOSS: relaxation.loss},
            f"{self.name}_gradient": {cut: _ratio(relaxation.after[cut], before) for cut, before in relaxation.before.items()},
            f"{self.name}_cosine": {path: _cosine(*pair) for path, pair in pairs.items()},
            f"{self.name}_ratio": {path: _ratio(_norm(one), _norm(other)) for path, (one, other) in pairs.items()},
        }


def _norm(gradient: Tensor | None) -> float:
    return math.nan if gradient is None else gradient.double().norm().item()


def _ratio(one: float, other: float) -> float:
    return one / other if other else math.nan


def _cosine(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return math.nan
    return _ratio((one.double() * other.double()).sum().item(), _norm(one) * _norm(other))
