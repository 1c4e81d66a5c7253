"""The base class of alignment metrics. A metric measures one number per layer on a fixed batch and defines how reports show
it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from fa_bench.errors import missing_method
from fa_bench.metrics.alarm import Alarm
from fa_bench.registry.options import Options
from fa_bench.registry.registries import METRICS

if TYPE_CHECKING:
    from fa_bench.metrics.meter import Passes

#: Layers that a report averages over: those whose feedback propagates an error, all except the output layers, or all.
FEEDBACK, HIDDEN, ALL = "feedback", "hidden", "all"


@dataclasses.dataclass(eq=False)
class Metric(Options):
    """Base class of alignment metrics, registered in `fa_bench.registry.registries.METRICS`.

    A run measures its metrics at the end and, unless ``probe_every`` is 0, before the first step and at regular intervals. Every
    metric is recorded under its registered name in angles.jsonl, metrics.jsonl and result.json, and is passed to the loggers.

    Examples:
        >>> import dataclasses, torch, fa_bench
        >>> from fa_bench.metrics.meter import AlignmentMeter
        >>> @fa_bench.register_metric("gradient_norm")
        ... @dataclasses.dataclass(eq=False)
        ... class GradientNorm(fa_bench.Metric):
        ...     '''Norm of the gradient that the rule computes for a weight.'''
        ...
        ...     title = "gradient norm"
        ...
        ...     def measure(self, passes):
        ...         return {layer: gradient.norm().item() for layer, gradient in passes.gradients.items()}
        >>> rule = fa_bench.attach(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), "fa")
        >>> meter = AlignmentMeter(rule, torch.ones(5, 4), torch.zeros(5, dtype=torch.int64), metrics=["gradient_norm"])
        >>> sorted(meter.measure()["gradient_norm"])
        ['0', '1']
    """

    #: The metric's heading in tables and figures, and its unit, which is ``°`` or empty.
    title: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    #: The layers that a report averages over: FEEDBACK, HIDDEN or ALL.
    layers: ClassVar[str] = ALL
    #: Whether reports have a column for the mean over layers, whether they plot the values by layer, and the metric's position
    #: among all metrics.
    column: ClassVar[bool] = True
    plot: ClassVar[bool] = True
    order: ClassVar[int] = 100
    #: The thresholds that reports check the metric's values against, by metric name.
    alarms: ClassVar[Mapping[str, Alarm]] = {}

    def measure(self, passes: Passes) -> dict[str, float]:
        """The value of each layer, or NaN if it is undefined. `passes` holds the errors and gradients of the rule and of
        backpropagation."""
        raise missing_method(self, "measure")


def declared(names: Iterable[str]) -> dict[str, type[Metric]]:
    """The metrics with these names, in the order of reports. A metric that is not registered, for example because its plugin is
    missing, gets a title that is derived from its name."""
    metrics = {
        name: METRICS[name] if name in METRICS else type(name, (Metric,), {"title": name.replace("_", " ")}) for name in names
    }
    return dict(sorted(metrics.items(), key=lambda item: (item[1].order, item[0])))
