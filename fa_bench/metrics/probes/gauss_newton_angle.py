"""Measures how far the errors that a rule delivers are from those of the Gauss-Newton method."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.errors import ConfigError
from fa_bench.metrics.probes.base import Probe, Quantities, Subject
from fa_bench.registry.registries import PROBES
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.autograd.graph import GradientEdge

    from fa_bench.mechanisms.rule import Rule
    from fa_bench.metrics.meter import Point

#: Damping of J Jᵀ, relative to the mean of its diagonal.
DAMPING = 1e-6


@PROBES.register("gauss_newton_angle")
@dataclasses.dataclass(eq=False)
class GaussNewtonAngle(Probe):
    """Angle between the errors at a layer's activation and J⁺ δ, the error of the Gauss-Newton method.

    J = ∂z/∂a (C, F) is the derivative of a sample's logits with respect to the sample's activation a, and δ is the gradient of
    the loss with respect to the logits. J⁺ is Jᵀ (J Jᵀ + ε I)⁻¹, where ε is a millionth of the mean of the diagonal of J Jᵀ.
    Backpropagation's error is Jᵀ δ.

    - ``gauss_newton_angle``: the angle in degrees between the rule's errors and J⁺ δ, averaged over the batch.

    - ``gauss_newton_angle_bp``: the same angle for backpropagation's errors with the same weights. A rule whose angle is smaller
      than backpropagation's is closer to Gauss-Newton than backpropagation is.

    The angle between the rule's errors and those of backpropagation is measured by `delta_angle`.

    Errors are taken at the same points as for `delta_angle`, on the fixed batch. Samples with a zero error are excluded from the
    averages, which are NaN if no samples are left. With batch normalisation, J also contains the effect of a sample on the logits
    of the others. The probe costs C backward passes per layer.
    """

    def require(self, subject: Subject) -> None:
        shape = subject.meter.trace.result_shape
        if len(shape) != 2:
            raise ConfigError(f"the probe needs outputs of shape (N, C), not {shape}; omit the probe")

    def measure(self, subject: Subject) -> Quantities:
        from fa_bench.metrics.angles import mean_sample_angle
        from fa_bench.metrics.meter import LOGITS, Passes, measurement_mode

        meter = subject.meter
        found: Quantities = {self.name: {}, f"{self.name}_bp": {}}
        with measurement_mode(subject.rule):
            passes = Passes(meter)
            delivered, exact = passes.delivered.errors, passes.exact.errors
            logits, edges = edges_at(subject.rule, set(meter.points.values()), meter.inputs())
            delta = exact[LOGITS].double()
            for layer in meter.trace.order:
                point = meter.points.get(layer)
                if point not in edges or point not in exact or point not in delivered:
                    continue
                wanted = gauss_newton(jacobian(logits, edges[point]), delta)
                found[self.name][layer] = mean_sample_angle(delivered[point].flatten(1), wanted)
                found[f"{self.name}_bp"][layer] = mean_sample_angle(exact[point].flatten(1), wanted)
        return found


def edges_at(rule: Rule, points: set[Point], x: Tensor) -> tuple[Tensor, dict[Point, GradientEdge]]:
    """The logits of an exact forward pass, and the graph edge of the tensor at each of these points that the pass reaches exactly
    once.

    Edges are returned rather than tensors, because later modules may change a tensor in place, which moves it to another place in
    the graph.
    """
    from torch.autograd.graph import get_gradient_edge

    from fa_bench.mechanisms.rule import INPUT
    from fa_bench.mechanisms.trace import tensors_in
    from fa_bench.metrics.meter import measured_output

    seen: dict[Point, list[GradientEdge | None]] = {}

    def hook(point: Point, at_input: bool) -> Any:
        def record(module: Any, args: Any, output: Any = None) -> None:
            tensor = next(tensors_in(args if at_input else output))
            seen.setdefault(point, []).append(get_gradient_edge(tensor) if tensor.requires_grad else None)

        return record

    handles = []
    for path, side in points:
        module = rule.model.get_submodule(path)
        register = module.register_forward_pre_hook if side == INPUT else module.register_forward_hook
        handles.append(register(hook((path, side), side == INPUT), prepend=True))
    try:
        with torch.enable_grad(), rule.exact():
            logits = measured_output(rule, rule.model(x))
    finally:
        for handle in handles:
            handle.remove()
    return logits, {point: edges[0] for point, edges in seen.items() if len(edges) == 1 and edges[0] is not None}


def jacobian(logits: Tensor, activation: Tensor | GradientEdge) -> Tensor:
    """J (N, C, F), the derivative of the logits (N, C) with respect to an activation (N, ...)."""
    rows = [
        torch.autograd.grad(logits[:, number].sum(), activation, retain_graph=True)[0].flatten(1)
        for number in range(logits.shape[1])
    ]
    return torch.stack(rows, 1)


def gauss_newton(jacobian: Tensor, delta: Tensor) -> Tensor:
    """The damped J⁺ δ (N, F) for J (N, C, F) and δ (N, C), in double precision."""
    wide = jacobian.double()
    gram = wide @ wide.mT
    size = gram.diagonal(dim1=1, dim2=2).mean(1)
    damping = torch.where(size > 0, DAMPING * size, 1.0)  # J⁺ is zero if J is
    damped = gram + damping[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return (wide.mT @ torch.linalg.solve(damped, delta.double().unsqueeze(2))).squeeze(2)
