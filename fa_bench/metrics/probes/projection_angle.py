"""Measures how similar the feedback and the weight of a layer are on the layer's inputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.metrics.probes.base import Probe, Quantities, Subject
from fa_bench.registry.registries import PROBES
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@PROBES.register("projection_angle")
@dataclasses.dataclass(eq=False)
class ProjectionAngle(Probe):
    """Angle in degrees between x Wᵀ and x Eᵀ, the outputs of a layer with its weight W and with its effective feedback E.

    The measure is taken from Kunin et al. 2020. Here, x (N, ...) is the layer's input on the fixed batch, and the outputs do not
    include biases. The angle is measured between the outputs of each sample, flattened over positions, and averaged over the
    samples for which it is defined. For a layer that runs several times, the angle is measured in the first run. Batch
    normalisation uses the batch's statistics and dropout is off.

    The angle is 0 if the feedback equals the weight, up to a positive factor, on the span of the inputs. Outside this span, the
    feedback and the weight may differ; only `weight_angle` shows such differences. Layers within compound modules, such as
    attention, have no angle, and neither do layers for which the rule has no feedback in the weight's shape.
    """

    def measure(self, subject: Subject) -> Quantities:
        from fa_bench.mechanisms.compound.projection import Projection
        from fa_bench.mechanisms.second_pass import value_of
        from fa_bench.metrics.angles import mean_sample_angle
        from fa_bench.metrics.meter import measurement_mode

        pairs, inputs = subject.rule.weight_pairs(), {}

        def record(path: str) -> Any:
            def hook(module: Any, args: Any) -> None:
                if path not in inputs:
                    inputs[path] = value_of(args[0])

            return hook

        layers = {path: subject.model.get_submodule(path) for path in subject.meter.trace.order if path in pairs}
        layers = {path: layer for path, layer in layers.items() if not isinstance(layer, Projection)}
        handles = [layer.register_forward_pre_hook(record(path)) for path, layer in layers.items()]
        try:
            with measurement_mode(subject.rule), torch.no_grad():
                subject.model(subject.meter.inputs())
                return {
                    self.name: {
                        path: mean_sample_angle(*(output(layers[path], inputs[path], kernel) for kernel in pairs[path]))
                        for path in layers
                        if path in inputs
                    }
                }
        finally:
            for handle in handles:
                handle.remove()


def output(layer: Any, x: Tensor, kernel: Tensor) -> Tensor:
    """The output (N, ...) of a layer for x with another weight and without bias."""
    values = {"weight": kernel} | ({} if layer.bias is None else {"bias": torch.zeros_like(layer.bias)})
    return torch.func.functional_call(layer, values, (x,))
