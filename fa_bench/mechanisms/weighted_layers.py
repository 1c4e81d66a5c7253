"""The weighted layers that rules work on, and the state that all layers of an attached model share."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias, TypeGuard

from torch import Tensor, nn

from fa_bench.errors import CoverageError
from fa_bench.mechanisms.compound.projection import Projection

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: The types of weighted layers. Subclasses do not count, because their forward pass may differ.
WEIGHTED = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, Projection, *CONVOLUTIONS)
#: The static type of a weighted layer, plain or with feedback.
WeightedLayer: TypeAlias = nn.Linear | Projection | nn.modules.conv._ConvNd


@dataclasses.dataclass
class Mode:
    """The state that all layers and cuts of one attached model share.

    Attributes:
        rule: the rule's name.
        exact: forward passes are those of the plain model.
        freeze_random: no new random tensors are sampled, so that measuring does not change the run.
        alone: nothing is exchanged with the other processes of a data-parallel run, which are not doing the same at the moment.
        layerwise: compound modules call one layer for each of their weights; otherwise they may use fused kernels.
        always_layerwise: compound modules call these layers even if gradients are disabled.
        training: a forward pass of the whole model with gradients is running, and `exact` is off.
        without_gradients: path -> trainable layer that ran without gradients in this pass.
        with_gradients: paths of the layers that ran with gradients in this pass.
        seeds: in a compiled graph, path -> seed of the layer's random tensors in this pass.
    """

    rule: str
    exact: bool = False
    freeze_random: bool = False
    alone: bool = False
    layerwise: bool = False
    always_layerwise: bool = False
    training: bool = False
    without_gradients: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    with_gradients: set[str] = dataclasses.field(default_factory=set)
    seeds: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def is_weighted(module: nn.Module) -> TypeGuard[WeightedLayer]:
    """Whether the module is a layer that can have feedback, or one that already has it."""
    plain = _plain_class(type(module))
    # Only attention modules have a layer of this class, which they call only if they are compound modules. The layers of compound
    # modules have the attribute `batch_axis`.
    is_used = plain is not nn.modules.linear.NonDynamicallyQuantizableLinear or "batch_axis" in module.__dict__
    if plain not in WEIGHTED or not is_used or "forward" in module.__dict__:
        return False  # a forward method that was replaced may use the weight in any way
    weight = weight_parameter(module)
    return isinstance(weight, nn.Parameter) and not weight.is_complex()


def weight_parameter(layer: nn.Module) -> nn.Parameter | None:
    """The parameter that is a layer's weight, or None if the weight is computed from other parameters, for example by pruning."""
    return layer.parameter if isinstance(layer, Projection) else layer._parameters.get("weight")


def weight_gradient(layer: WeightedLayer) -> Tensor | None:
    """The gradient of a layer's weight, in the weight's shape, or None if the weight has none."""
    parameter = weight_parameter(layer)
    return None if parameter is None or parameter.grad is None else parameter.grad.view_as(layer.weight)


def weight_name(path: str, layer: nn.Module) -> str:
    """The name of the layer's weight in the model."""
    return _parameter_name(path, layer, layer.weight_name if isinstance(layer, Projection) else "weight")


def bias_name(path: str, layer: nn.Module) -> str | None:
    """The name of the layer's bias in the model, or None if there is no bias. Several layers of a compound module may share a
    bias."""
    name = layer.bias_name if isinstance(layer, Projection) else "bias"
    return _parameter_name(path, layer, name) if name is not None and getattr(layer, "bias", None) is not None else None


def _parameter_name(path: str, layer: nn.Module, name: str) -> str:
    parent = path.rpartition(".")[0] if isinstance(layer, Projection) else path
    return f"{parent}.{name}" if parent else name


def sample_axis(layer: nn.Module, dims: int) -> int:
    """The axis of the samples in a layer's input or output of `dims` dimensions. In attention and recurrent modules, positions
    come first."""
    return getattr(layer, "batch_axis", 0) if dims > 2 else 0


def kind_of(layer: nn.Module) -> str:
    """The type of a layer as it appears in coverage tables; for a `Projection`, this is the type of the compound module."""
    plain = _plain_class(type(layer.owner if isinstance(layer, Projection) else layer))
    return "Linear" if issubclass(plain, nn.Linear) else plain.__name__


def weighted_layers(model: nn.Module) -> dict[str, WeightedLayer]:
    """Every weighted layer, keyed by its path, in the order of definition; a shared module appears once."""
    return {path: module for path, module in model.named_modules() if is_weighted(module)}


def _plain_class(cls: type) -> type:
    """The class itself or, for a class with feedback, its plain class."""
    return cls.__dict__.get("plain_class", cls)


def require_gradients(path: str, layer: nn.Module) -> None:
    """Refuse a layer whose weight is trainable but that ran without gradients in a training forward pass.

    Raises:
        CoverageError: in this case; the message names the layer and a remedy.
    """
    if layer.weight.requires_grad:
        raise CoverageError(
            f"layer '{path}' ran without gradients in a training forward pass, although its weight is trainable: "
            f"activation checkpointing needs use_reentrant=False; parts that run under torch.no_grad() need "
            f"requires_grad_(False)"
        )
