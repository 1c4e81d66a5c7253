"""The base class of compound modules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fa_bench.mechanisms.compound.projection import Projection

if TYPE_CHECKING:
    from fa_bench.mechanisms.weighted_layers import Mode

#: Maps each plain class to its compound class.
COMPOUNDS: dict[type[nn.Module], type[Compound]] = {}


class Compound(nn.Module):
    """Mixin for a plain module that can run as a composition of linear layers. Subclasses implement `layerwise_forward` and, if
    the module has weights of its own, `projections`.

    If ``rule_mode.layerwise`` is set, the forward pass calls one layer for each weight, provided that gradients are enabled or
    that ``rule_mode.training`` or ``rule_mode.always_layerwise`` is set. Otherwise, the forward pass of the plain class runs,
    which may use a fused kernel.

    Attributes:
        rule_mode: the `Mode` that all layers of the attached model share.
    """

    rule_mode: Mode
    plain_class: ClassVar[type[nn.Module]]
    #: The axis of the samples in the inputs and outputs of the module's layers.
    batch_axis: ClassVar[int] = 0

    def projections(self) -> dict[str, Projection]:
        """The layers for this module's own weights, keyed by the names that they have as children. All other children have
        weights of their own."""
        return {}

    def layerwise_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass, computed by calling the children."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mode = self.rule_mode
        # If this module runs without gradients in a training pass of the model, its layers are still called, so that they can
        # detect this.
        if mode.layerwise and (torch.is_grad_enabled() or mode.training or mode.always_layerwise):
            return self.layerwise_forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


def compound(*plain_classes: type[nn.Module]) -> Any:
    """A decorator that combines a mixin with each of these plain classes to form compound classes.

    The compound classes, such as ``CompoundLSTM``, are globals of the mixin's module, so that models can be pickled.
    """

    def register(mixin: type[Compound]) -> type[Compound]:
        for plain in plain_classes:
            name = f"Compound{plain.__name__}"
            body = {"__module__": mixin.__module__, "__doc__": mixin.__doc__, "plain_class": plain}
            cls = type(name, (mixin, plain), body)
            setattr(sys.modules[mixin.__module__], name, cls)
            COMPOUNDS[plain] = cls
        return mixin

    return register


class Substitute(TorchFunctionMode):
    """A context in which calls to some PyTorch functions are replaced.

    A fused function is replaced with a composition of layers, while PyTorch's argument checks around the function remain in
    place.

    Args:
        **replacements: name of a function -> the function that is called in its place, with the same arguments.
    """

    def __init__(self, **replacements: Callable[..., Any]) -> None:
        super().__init__()
        self.replacements = replacements

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = self.replacements.get(getattr(function, "__name__", ""))
        return (replacement or function)(*args, **(kwargs or {}))
