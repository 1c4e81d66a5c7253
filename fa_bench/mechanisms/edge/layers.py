"""Layers whose backward pass uses feedback in place of the weight. A plain layer is converted in place, by changing its class.

Assigning ``module.__class__ = FeedbackLinear`` preserves names, hooks, optimizer references, and tied or pretrained weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fa_bench.errors import CoverageError
from fa_bench.mechanisms.compound.projection import Projection
from fa_bench.mechanisms.edge.ops import (
    FeedbackConvFunction,
    FeedbackLinearFunction,
    Geometry,
    ProductLinearFunction,
    weight_gradient,
)
from fa_bench.mechanisms.edge.pathways import BackwardContext, FeedbackGradient, FeedbackPathway
from fa_bench.mechanisms.feedback_tensors import PREFIX, drop_tensors, make_learned, tensors_of
from fa_bench.mechanisms.updates import LearnedTensor
from fa_bench.mechanisms.weighted_layers import WEIGHTED, Mode, weight_parameter


class FeedbackLayer(nn.Module):
    """Mixin for a plain layer class; its forward pass puts the layer's feedback into the autograd graph.

    Attributes:
        pathway: computes the effective feedback of this layer from its feedback tensors.
        mode: the `Mode` that all layers of the attached model share.
        path: the layer's name in the model.
        learned: the learned feedback tensors by name.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    pathway: FeedbackPathway
    mode: Mode
    path: str
    learned: dict[str, LearnedTensor]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mode = self.mode
        if mode.exact or not torch.is_grad_enabled():
            if mode.training and not mode.exact:
                if self.weight.requires_grad:
                    mode.without_gradients[self.path] = self
                else:
                    self.pathway.observe(self, x)
            return super().forward(x, *args, **kwargs)
        # The parameters are read from the dictionary, because attribute access on a module costs as much as launching a small
        # matrix product.
        parameters = self._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if weight is None or "bias" not in parameters:  # a pruned or parametrized bias is not a parameter of the layer
            weight, bias = self._weight_and_bias()
        pathway = self.pathway
        if self.training and not mode.freeze_random:
            pathway.before_forward(self)
        mode.with_gradients.add(self.path)
        # The first layer needs no error at its input, so its feedback has no effect.
        if not (x.requires_grad or pathway.always_needed):
            return super().forward(x, *args, **kwargs)
        context = pathway.context(self, x)
        if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            # The tensors are cast outside the Function, so that its backward pass sees one dtype and the casts are differentiated
            # as usual.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = _autocast(x, dtype), _autocast(weight, dtype)
            context = _autocast_context(context, self.weight.detach(), dtype)
            bias = None if bias is None else _autocast(bias, dtype)
        return pathway.forward(self, x, weight, bias, context, *args, **kwargs)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of a layer that does not have both as its own parameters.

        Raises:
            CoverageError: if the weight is computed from other parameters.
        """
        if weight_parameter(self) is None:
            raise CoverageError(
                f"layer '{self.path}' was pruned or parametrized after attach: its weight is no longer a plain "
                f"parameter, and its feedback cannot follow it. Call rule.detach() before pruning or "
                f"parametrizing, and attach again once the weight is a parameter"
            )
        return self.weight, self.bias

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.pathway.materialize(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The tensors are saved in the order of creation, so that a state and its hash do not depend on which of them are learned.
        for name in tensors_of(self):
            if (key := f"{prefix}{PREFIX}{name}") in destination:
                destination[key] = destination.pop(key)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.pathway.materialize(self)
        super()._load_from_state_dict(*args, **kwargs)

    def apply_feedback(self, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext) -> Tensor:
        """The layer's output, computed so that its backward pass uses `context`."""
        raise NotImplementedError

    def weight_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """The gradient of the layer's weight for the error g at its output if x were its input."""
        raise NotImplementedError

    def prepared(self, x: Tensor) -> tuple[Tensor, Geometry | None]:
        """The input x in the form that the layer's autograd Function receives, and the geometry if the layer is a convolution."""
        raise NotImplementedError

    @property
    def qconfig(self) -> Any:
        """Quantisation tools set this attribute on every module, but they would silently skip layers of this class. Therefore,
        setting it raises an error."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        raise CoverageError(
            f"layer '{self.path}' has feedback, which quantisation does not support; call rule.detach() first, then quantise"
        )


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast the tensor to `dtype` as torch's autocast does, which leaves double precision unchanged."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _autocast_context(context: BackwardContext, weight: Tensor, dtype: torch.dtype) -> BackwardContext:
    """`context` with its feedback and activations cast. Feedback is derived from the weight at full precision, so that small
    weights are not rounded to zero."""
    derived = _autocast(context.from_weight(weight), dtype) if context.from_weight else None
    return _prepared(context, lambda value: _autocast(value, dtype))._replace(
        feedback=None if context.feedback is None else _autocast(context.feedback, dtype),
        from_weight=None if derived is None else (lambda weight: derived),
        second_hop=None if context.second_hop is None else _autocast(context.second_hop, dtype),
    )


def _prepared(context: BackwardContext, prepare: Callable[[Tensor], Tensor]) -> BackwardContext:
    """`context` with `prepare` applied to every activation that replaces the layer's input in a gradient."""

    def composed(activation: Callable[[], Tensor] | None) -> Callable[[], Tensor] | None:
        return activation and (lambda: prepare(activation()))

    return context._replace(
        activation=composed(context.activation),
        gradients=tuple(gradient._replace(activation=composed(gradient.activation)) for gradient in context.gradients),
    )


class _FeedbackLinear(FeedbackLayer):
    """nn.Linear with feedback."""

    def apply_feedback(self, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext) -> Tensor:
        function = FeedbackLinearFunction if context.second_hop is None else ProductLinearFunction
        learned = [gradient.input for gradient in context.gradients] if context.gradients else ()
        if x.dim() == 2:
            return function.apply(x, weight, bias, context, *learned)
        return function.apply(x.reshape(-1, x.shape[-1]), weight, bias, context, *learned).view(*x.shape[:-1], len(weight))

    def prepared(self, x: Tensor) -> tuple[Tensor, Geometry | None]:
        return x.reshape(-1, x.shape[-1]), None

    def weight_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        return g.reshape(-1, g.shape[-1]).t().mm(x.reshape(-1, x.shape[-1]))


class _FeedbackProjection(_FeedbackLinear):
    """One weight of a compound module as a linear layer with feedback."""

    def apply_feedback(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext, rows: slice | None = None
    ) -> Tensor:
        if rows is None:
            return super().apply_feedback(x, weight, bias, context)
        return super().apply_feedback(x, weight[rows], None if bias is None else bias[rows], _rows_of(context, weight, rows))


def _rows_of(context: BackwardContext, weight: Tensor, rows: slice) -> BackwardContext:
    """`context`, restricted to some outputs of a linear layer with the weight (O, I)."""
    feedback = context.from_weight(weight.detach()) if context.from_weight else context.feedback
    assert feedback is not None

    def of_rows(gradient: FeedbackGradient) -> FeedbackGradient:
        if (of_errors := gradient.of_errors) is not None:  # the other outputs have no error in this call
            return gradient._replace(
                of_errors=lambda g: of_errors(
                    g.new_zeros(len(g), len(weight)).index_copy(1, torch.arange(len(weight), device=g.device)[rows], g)
                )
            )
        if gradient.first_hop is not None:
            return gradient._replace(first_hop=gradient.first_hop[rows])
        return gradient if context.second_hop is not None else gradient._replace(rows=rows)

    local = context.local_gradient
    return context._replace(
        feedback=feedback.detach()[rows],
        from_weight=None,
        gradients=tuple(map(of_rows, context.gradients)),
        local_gradient=None if local is None else lambda x, geometry, _: local(x, geometry, rows),
    )


class _FeedbackConv(FeedbackLayer):
    kernel_size: tuple[int, ...]

    def apply_feedback(self, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext) -> Tensor:
        y = _convolve(*self.prepared(x), weight, bias, context, lambda value: self.prepared(value)[0])
        return y if x.dim() == y.dim() else y.squeeze(0)

    def prepared(self, x: Tensor) -> tuple[Tensor, Geometry]:
        return padded(self, _batched(x, len(self.kernel_size)))

    def weight_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        dims = len(self.kernel_size)
        x, geometry = padded(self, _batched(x, dims))
        return weight_gradient(_batched(g, dims), x, self.weight, geometry)


class _FeedbackConvTranspose(FeedbackLayer):
    kernel_size: tuple[int, ...]

    def apply_feedback(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext, output_size: list[int] | None = None
    ) -> Tensor:
        dims, geometry = len(self.kernel_size), self._geometry(x, output_size)
        y = _convolve(_batched(x, dims), geometry, weight, bias, context, lambda value: _batched(value, dims))
        return y if x.dim() == y.dim() else y.squeeze(0)

    def prepared(self, x: Tensor) -> tuple[Tensor, Geometry]:
        return _batched(x, len(self.kernel_size)), self._geometry(x, None)

    def _geometry(self, x: Tensor, output_size: list[int] | None) -> Geometry:
        conv: Any = self
        output_padding = conv._output_padding(
            x, output_size, conv.stride, conv.padding, conv.kernel_size, len(conv.kernel_size), conv.dilation
        )
        return Geometry(conv.stride, conv.padding, conv.dilation, True, tuple(output_padding), conv.groups)

    def weight_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        dims = len(self.kernel_size)
        geometry = self._geometry(x, list(g.shape[-dims:]))
        return weight_gradient(_batched(g, dims), _batched(x, dims), self.weight, geometry)


def _convolve(
    x: Tensor,
    geometry: Geometry,
    weight: Tensor,
    bias: Tensor | None,
    context: BackwardContext,
    prepare: Callable[[Tensor], Tensor],
) -> Tensor:
    """A convolution of a prepared input; `prepare` applies the same preparation to an activation that replaces the input in a
    gradient."""
    if context.activation is not None or context.gradients:
        context = _prepared(context, prepare)
    learned = (gradient.input for gradient in context.gradients)
    return FeedbackConvFunction.apply(x, weight, bias, context, geometry, *learned)


def padded(conv: Any, x: Tensor) -> tuple[Tensor, Geometry]:
    """The input (N, I, ...) of a convolution that is not transposed, padded if necessary, and the convolution's geometry.

    Padding other than symmetric zero padding is applied to the input, so that autograd differentiates it exactly.
    """
    dims, padding = len(conv.kernel_size), conv.padding
    if conv.padding_mode != "zeros":
        # Under autocast, reflection and replication return single precision on the CPU.
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode).to(x.dtype), (0,) * dims
    elif padding == "same":
        pads = conv._reversed_padding_repeated_twice
        if all(pads[i] == pads[i + 1] for i in range(0, len(pads), 2)):
            padding = tuple(pads[::2][::-1])
        else:
            x, padding = F.pad(x, pads), (0,) * dims
    elif padding == "valid":
        padding = (0,) * dims
    return x, Geometry(conv.stride, padding, conv.dilation, False, (0,) * dims, conv.groups)


def _batched(x: Tensor, dims: int) -> Tensor:
    """The input with a batch dimension, which is added if the input is a single sample."""
    return x if x.dim() == dims + 2 else x.unsqueeze(0)


def _with_feedback(plain: type[nn.Module]) -> type[FeedbackLayer]:
    """The class with feedback for a plain class, such as ``FeedbackLinear`` for ``Linear``. The new class is a global of this
    module, so that layers can be pickled."""
    if plain is Projection:
        mixin = _FeedbackProjection
    elif issubclass(plain, nn.Linear):
        mixin = _FeedbackLinear
    else:
        mixin = _FeedbackConvTranspose if "Transpose" in plain.__name__ else _FeedbackConv
    name = f"Feedback{plain.__name__}"
    body = {"__module__": __name__, "__doc__": "A layer with feedback in its backward pass.", "plain_class": plain}
    return globals().setdefault(name, type(name, (mixin, plain), body))


#: Maps each plain class to its class with feedback.
SWAPS: dict[type[nn.Module], type[FeedbackLayer]] = {plain: _with_feedback(plain) for plain in WEIGHTED}


def swap_in(module: nn.Module, path: str, pathway: FeedbackPathway, mode: Mode) -> FeedbackLayer:
    """Change a plain layer to its class with feedback, in place, and turn the tensors that the pathway learns into parameters."""
    module.__class__ = SWAPS[type(module)]
    assert isinstance(module, FeedbackLayer)
    module.pathway, module.mode, module.path = pathway, mode, path
    module.learned = {name: LearnedTensor(path, module, make_learned(module, name), module) for name in pathway.learned}
    if pathway.follows is not None:
        module.learned[pathway.follows].follows = True
        if not module.weight.requires_grad:
            module.learned[pathway.follows].freeze()
    return module


def swap_out(module: nn.Module) -> None:
    """Turn a feedback layer back into a plain one and drop its feedback tensors."""
    cls = type(module)
    if "plain_class" in vars(cls):
        module.__class__ = cls.plain_class  # type: ignore[attr-defined]
    else:
        # torch's parametrization has derived a class from the feedback class; derive the same class from the plain one instead.
        plain = cls.__bases__[0].plain_class
        body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(f"Parametrized{plain.__name__}", (plain,), body)
    for name in ("pathway", "mode", "path", "learned"):
        module.__dict__.pop(name, None)
    drop_tensors(module)
