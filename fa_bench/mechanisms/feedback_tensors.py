"""Access to the feedback tensors of a module by name.

A fixed tensor `B` is the buffer ``feedback_B`` of the module, and a learned one is the parameter ``feedback_B``. Therefore,
``state_dict``, ``.to()`` and deepcopy treat the tensor like a weight. If the tensor is learned, optimizers, gradient clipping and
data parallelism also treat it like a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fa_bench.errors import ComponentError, truncate
from fa_bench.utils.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

#: The prefix of every feedback tensor's name in its module.
PREFIX = "feedback_"
#: The prefix of the names of all tensors in the auxiliary layers that local losses add.
AUXILIARY_PREFIX = PREFIX + "auxiliary_"
#: The attribute in which a module keeps the names of its feedback tensors, in the order of creation.
_NAMES = "_feedback_names"


def feedback_tensor(module: torch_nn.Module, name: str) -> Any:
    """The live feedback tensor `name` of a module, detached if it is learned, or None if the module has no tensor of that
    name."""
    key = PREFIX + name
    tensor = module._buffers.get(key)
    if tensor is None and (learned := module._parameters.get(key)) is not None:
        return learned.detach()
    return tensor


def fixed_tensor_reader(name: str) -> Any:
    """A method for pathway classes that returns the fixed feedback tensor `name` of a layer.

    This method costs a single dictionary look-up, whereas ``layer.feedback_B`` goes through ``Module.__getattr__``, which takes
    several times as long.
    """
    key = PREFIX + name
    return lambda self, layer: layer._buffers[key]


def put_tensor(module: torch_nn.Module, name: str, tensor: Tensor | None) -> None:
    """Register `tensor`, detached, as the fixed feedback tensor `name` of a module; None registers the name without a tensor."""
    names = module.__dict__.setdefault(_NAMES, [])
    if name not in names:
        names.append(name)
    module.register_buffer(PREFIX + name, None if tensor is None else tensor.detach())


def require_tensor(what: str, value: Any) -> Tensor:
    """Return the value if it is a tensor, and raise an error otherwise; `what` names the feedback tensor in the error message."""
    if not isinstance(value, torch.Tensor):
        raise ComponentError(
            f"{what}: {truncate(' '.join(repr(value).split()), 100)} is neither the name of an initialiser nor a torch tensor"
        )
    return value


def make_learned(module: torch_nn.Module, name: str) -> str:
    """Turn the fixed feedback tensor `name` of a module into a learned one, and return the parameter's name in the module."""
    key = PREFIX + name
    tensor = module._buffers.pop(key)
    assert tensor is not None
    module.register_parameter(key, nn.Parameter(tensor))
    return key


def tensors_of(module: torch_nn.Module) -> dict[str, Tensor]:
    """The feedback tensors of a module by name, live and not detached, in the order of creation."""
    tensors = {}
    for name in module.__dict__.get(_NAMES, ()):
        key = PREFIX + name
        tensor = module._parameters.get(key, module._buffers.get(key))
        if tensor is not None:
            tensors[name] = tensor
    return tensors


def has_own_parameters(module: torch_nn.Module) -> bool:
    """Whether a module, or one within it, has parameters besides the feedback that a rule has registered there."""
    return any(not name.rpartition(".")[2].startswith(PREFIX) for name, _ in module.named_parameters())


def drop_tensors(module: torch_nn.Module) -> None:
    """Remove every feedback tensor from a module."""
    for name in module.__dict__.pop(_NAMES, ()):
        delattr(module, PREFIX + name)
