"""Layers whose backward pass carries the error by feedback; their class is swapped in place.

``module.__class__ = FeedbackLinear`` keeps names, hooks, optimizer references, tied and pretrained weights. Feedback
tensors belong to the layer itself, as ``feedback_B`` and the like: fixed ones are its buffers, learned ones its parameters. So
state_dict, ``.to()``, memory formats, deepcopy, and for learned ones optimizers, clipping and data parallelism treat them as
they treat the weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fa_bench.errors import CoverageError
from fa_bench.mechanisms.backward_context import BackwardContext, FeedbackGradient
from fa_bench.mechanisms.coverage import PREFIX
from fa_bench.mechanisms.ops import (
    FeedbackConvFunction,
    FeedbackLinearFunction,
    Geometry,
    ProductLinearFunction,
)
from fa_bench.mechanisms.updates import LearnedTensor

if TYPE_CHECKING:
    from fa_bench.mechanisms.pathways import FeedbackPathway


@dataclasses.dataclass
class Mode:
    """What all layers and cuts of one attached model share.

    Attributes:
        exact: forward passes are those of the plain model.
        freeze_random: forward passes sample nothing new, so that a probe leaves no trace.
        training: a forward pass of the whole model with gradients is under way.
        blind: layers that learn and ran without gradients in it, by path.
        ran: paths of the layers that ran with gradients in it.
    """

    exact: bool = False
    freeze_random: bool = False
    training: bool = False
    blind: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    ran: set[str] = dataclasses.field(default_factory=set)


class FeedbackLayer(nn.Module):
    """Mixin in front of a plain layer class: the forward that puts the feedback into the graph.

    Attributes:
        carrier: what makes the effective feedback of this layer from its feedback tensors.
        mode: shared by all layers of the attached model.
        path: the layer's name in the model.
        learned: the learned feedback tensors by name.
    """

    pathway: FeedbackPathway
    mode: Mode
    path: str
    learned: dict[str, LearnedTensor]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mode = self.mode
        if mode.exact or not torch.is_grad_enabled():
            if mode.training and not mode.exact:
                if self.weight.requires_grad:
                    mode.blind[self.path] = self
                else:
                    self.pathway.observe(self, x)
            return super().forward(x, *args, **kwargs)
        # Straight from the dictionary: a module's attribute look-up takes as long as a small matrix product's launch.
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if weight is None:
            raise CoverageError(f"the weight of layer '{self.path}' is computed since attach (by pruning or a parametrization), "
                                f"and its feedback cannot follow it: call rule.detach(), and attach before you reparametrize no "
                                f"layer or after the weight is a parameter again")
        mode.ran.add(self.path)
        pathway = self.pathway
        if self.training and not mode.freeze_random:
            pathway.before_forward(self)
        # Where nobody asks for the error at the input (the first layer), a rule that only carries errors equals the plain layer.
        if not (x.requires_grad or pathway.always_needed):
            return super().forward(x, *args, **kwargs)
        context = pathway.context(self, x)
        if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            # Cast outside the Function: its backward then sees one dtype, and the casts are differentiated as usual.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = _autocast(x, dtype), _autocast(weight, dtype)
            context = _autocast_context(context, self.weight.detach(), dtype)
            bias = None if bias is None else _autocast(bias, dtype)
        return self.apply_feedback(x, weight, bias, context, *args, **kwargs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.pathway.materialize(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # In the order in which they were made, parameters or not: states and their hashes then do not depend on what learns.
        for name in tensors_of(self):
            if (key := f"{prefix}{PREFIX}{name}") in destination:
                destination[key] = destination.pop(key)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.pathway.materialize(self)
        super()._load_from_state_dict(*args, **kwargs)

    def apply_feedback(self, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext) -> Tensor:
        """The layer's output, with what carries the error in its backward pass."""
        raise NotImplementedError

    @property
    def qconfig(self) -> Any:
        """Quantisation tools set this on every module; they do not know this class, and would quantise nothing."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        raise CoverageError(f"layer '{self.path}' has feedback, which quantisation does not know: call rule.detach() first, "
                            f"then quantise")


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As torch's autocast does: double precision stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _autocast_context(context: BackwardContext, weight: Tensor, dtype: torch.dtype) -> BackwardContext:
    """`carry` with all tensors cast; what is made of the weight is made of it at full precision, where no small one is zero."""
    made = _autocast(context.from_weight(weight), dtype) if context.from_weight else None
    return context._replace(
        feedback=None if context.feedback is None else _autocast(context.feedback, dtype),
        from_weight=None if made is None else (lambda weight: made),
        second=None if context.second is None else _autocast(context.second, dtype),
        activation=context.activation and _composed(lambda value: _autocast(value, dtype), context.activation),
        gradients=_prepared_gradients(context, lambda value: _autocast(value, dtype)),
    )


def _prepared_gradients(context: BackwardContext, prepare: Callable[[Tensor], Tensor]) -> tuple[FeedbackGradient, ...]:
    """`carry.learn`, with what stands in for the input in a gradient prepared as the input is."""
    return tuple(gradient._replace(activation=gradient.activation and _composed(prepare, gradient.activation))
                 for gradient in context.gradients)


class FeedbackLinear(FeedbackLayer, nn.Linear):
    """nn.Linear with feedback."""

    def apply_feedback(self, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext) -> Tensor:
        function = FeedbackLinearFunction if context.second is None else ProductLinearFunction
        learned = [gradient.learned.tensor for gradient in context.gradients] if context.gradients else ()
        if x.dim() == 2:
            return function.apply(x, weight, bias, context, *learned)
        return function.apply(x.reshape(-1, x.shape[-1]), weight, bias, context, *learned).view(*x.shape[:-1], len(weight))


class _FeedbackConv(FeedbackLayer):
    def apply_feedback(self, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext) -> Tensor:
        def prepared(value: Tensor) -> tuple[Tensor, Geometry]:
            return padded(self, _batched(value, len(self.kernel_size)))

        y = _convolve(*prepared(x), weight, bias, context, lambda value: prepared(value)[0])
        return y if x.dim() == y.dim() else y.squeeze(0)


class _FeedbackConvTranspose(FeedbackLayer):
    def apply_feedback(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, context: BackwardContext, output_size: list[int] | None = None
    ) -> Tensor:
        dims = len(self.kernel_size)
        output_padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        geometry = Geometry(self.stride, self.padding, self.dilation, True, tuple(output_padding), self.groups)
        y = _convolve(_batched(x, dims), geometry, weight, bias, context, lambda value: _batched(value, dims))
        return y if x.dim() == y.dim() else y.squeeze(0)


def _convolve(
    x: Tensor, geometry: Geometry, weight: Tensor, bias: Tensor | None, context: BackwardContext,
    prepare: Callable[[Tensor], Tensor],
) -> Tensor:
    """A convolution of a prepared input; `prepare` does the same to what stands in for the input in a gradient."""
    if context.activation is not None or context.gradients:
        context = context._replace(
            activation=context.activation and _composed(prepare, context.activation),
            gradients=_prepared_gradients(context, prepare),
        )
    learned = (gradient.learned.tensor for gradient in context.gradients)
    return FeedbackConvFunction.apply(x, weight, bias, context, geometry, *learned)


def _composed(prepare: Callable[[Tensor], Tensor], activation: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: prepare(activation())


def padded(conv: Any, x: Tensor) -> tuple[Tensor, Geometry]:
    """The input of a plain convolution, (N, I, ...), and its geometry.

    Padding other than symmetric zeros is put around the input, where autograd differentiates it exactly.
    """
    dims, padding = len(conv.kernel_size), conv.padding
    if conv.padding_mode != "zeros":
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0,) * dims
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
    """A sample without a batch dimension, given one."""
    return x if x.dim() == dims + 2 else x.unsqueeze(0)


class FeedbackConv1d(_FeedbackConv, nn.Conv1d):
    """nn.Conv1d with feedback."""


class FeedbackConv2d(_FeedbackConv, nn.Conv2d):
    """nn.Conv2d with feedback."""


class FeedbackConv3d(_FeedbackConv, nn.Conv3d):
    """nn.Conv3d with feedback."""


class FeedbackConvTranspose1d(_FeedbackConvTranspose, nn.ConvTranspose1d):
    """nn.ConvTranspose1d with feedback."""


class FeedbackConvTranspose2d(_FeedbackConvTranspose, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with feedback."""


class FeedbackConvTranspose3d(_FeedbackConvTranspose, nn.ConvTranspose3d):
    """nn.ConvTranspose3d with feedback."""


#: Plain class -> its class with feedback. Only exact types are swapped: a subclass may do anything in its forward.
SWAPS: dict[type[nn.Module], type[FeedbackLayer]] = {
    nn.Linear: FeedbackLinear,
    nn.Conv1d: FeedbackConv1d,
    nn.Conv2d: FeedbackConv2d,
    nn.Conv3d: FeedbackConv3d,
    nn.ConvTranspose1d: FeedbackConvTranspose1d,
    nn.ConvTranspose2d: FeedbackConvTranspose2d,
    nn.ConvTranspose3d: FeedbackConvTranspose3d,
}
_PLAIN = {swapped: plain for plain, swapped in SWAPS.items()}
CONVOLUTIONS = tuple(plain for plain in SWAPS if plain is not nn.Linear)


def is_weighted(module: nn.Module) -> bool:
    """Whether the module is a layer that feedback can be put into, plain or swapped already."""
    weight = module._parameters.get("weight")
    return (type(module) in SWAPS or type(module) in _PLAIN) and isinstance(weight, nn.Parameter) and not weight.is_complex()


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every weighted layer by its path, in the order of definition; a shared module once."""
    return {path: module for path, module in model.named_modules() if is_weighted(module)}


def swap_in(module: nn.Module, path: str, pathway: FeedbackPathway, mode: Mode) -> None:
    """Turn a plain layer into its feedback class, in place, and the tensors that the carrier learns into parameters."""
    module.__class__ = SWAPS[type(module)]
    module.pathway, module.mode, module.path = pathway, mode, path
    module.learned = {name: register_learned(module, path, name, module) for name in pathway.learned}
    if pathway.follows is not None:
        module.learned[pathway.follows].follows = True
        if not module.weight.requires_grad:
            module.learned[pathway.follows].rest()


def swap_out(module: nn.Module) -> None:
    """Turn a feedback layer back into the plain one and drop its feedback tensors."""
    cls = type(module)
    if cls in _PLAIN:
        module.__class__ = _PLAIN[cls]  # type: ignore[assignment]
    else:
        # A parametrization made a class of its own from the feedback class: the same one, made from the plain class.
        plain = _PLAIN[cls.__bases__[0]]
        body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(f"Parametrized{plain.__name__}", (plain,), body)
    for name in ("carrier", "mode", "path", "learned"):
        module.__dict__.pop(name, None)
    drop_tensors(module)


def put_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Make `tensor` the feedback tensor `name` of a module: a buffer, saved with the model's state_dict unless None."""
    order = module.__dict__.setdefault(_NAMES, [])
    if name not in order:
        order.append(name)
    module.register_buffer(PREFIX + name, tensor)


def register_learned(module: nn.Module, place: str, name: str, witness: nn.Module | None) -> LearnedTensor:
    """Turn the feedback tensor `name` of a module, a buffer so far, into a parameter; see `LearnedTensor`."""
    key = PREFIX + name
    module.register_parameter(key, nn.Parameter(module._buffers.pop(key)))
    return LearnedTensor(place, module, key, witness)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The feedback tensors of a module by name, live, in the order in which they were made."""
    found = {}
    for name in module.__dict__.get(_NAMES, ()):
        key = PREFIX + name
        tensor = module._parameters.get(key, module._buffers.get(key))
        if tensor is not None:
            found[name] = tensor
    return found


def drop_tensors(module: nn.Module) -> None:
    """Remove every feedback tensor from a module."""
    for name in module.__dict__.pop(_NAMES, ()):
        delattr(module, PREFIX + name)


def require_gradients(path: str, layer: nn.Module) -> None:
    """Refuse a forward pass without gradients through a layer whose weight learns, within one of the model with gradients.

    Raises:
        CoverageError: naming the layer and what to do.
    """
    if layer.weight.requires_grad:
        raise CoverageError(f"layer '{path}' ran without gradients in a forward pass with gradients, although its weight learns: "
                            f"activation checkpointing needs use_reentrant=False; a part of the model that is not trained, under "
                            f"torch.no_grad(), needs requires_grad_(False)")


#: Where a module keeps the names of its feedback tensors.
_NAMES = "_feedback_names"
