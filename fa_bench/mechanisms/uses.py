"""What a forward pass does with the model's weights outside their own layers, read while it runs and from its autograd graph.

A rule changes what a layer does with its weight. A weight that a function uses elsewhere, ``F.linear(x, self.enc.weight.t())``
in a tied decoder for example, carries the error through itself: that is weight transport, whatever the layer does.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

#: Autograd nodes that move a tensor's entries about without mixing them with another tensor's.
_MOVES = {"Expand", "Unsqueeze", "Squeeze", "View", "UnsafeView", "Slice", "Select", "Index", "IndexSelect", "Gather", "Repeat",
          "ToCopy", "Permute", "Transpose", "T", "Clone", "ReshapeAlias", "Narrow", "Flip", "Alias", "Detach", "Split", "Unbind"}
#: Nodes in which the derivative towards another input does not depend on the tensor: sums, concatenations, look-ups.
_ADDS = {"Add", "Sub", "Rsub", "Cat", "Stack", "Embedding", "EmbeddingBag", "Where", "Copy", "CopySlices"}
_LOOK_UPS = (nn.Embedding, nn.EmbeddingBag)


@dataclasses.dataclass(frozen=True)
class Uses:
    """What a forward pass did with parameters.

    Attributes:
        outside: weighted layer -> the function that used its weight outside the layer, and in which module.
        local: ids of the parameters that only ever were added, concatenated or looked up: they carry no error on.
        seen: ids of all parameters that the output depends on.
    """

    outside: dict[str, str]
    local: frozenset[int]
    seen: frozenset[int]


class UsesOfWeights(TorchFunctionMode):
    """Watches one forward pass; `found` gives what it saw.

    Args:
        model: the model that runs.
        layers: its weighted layers by path.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self._layer_of = {id(layer.weight): path for path, layer in layers.items()}
        self._owners: dict[int, set[nn.Module]] = defaultdict(set)
        # A look-up in a tied embedding carries no error on either.
        for module in (*layers.values(), *(module for module in model.modules() if isinstance(module, _LOOK_UPS))):
            self._owners[id(module.weight)].add(module)
        self._model = model
        self._running: list[tuple[str, nn.Module]] = []
        self._used: list[tuple[str, str, Any]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> UsesOfWeights:
        def enters(path: str):
            return lambda module, args: self._running.append((path, module))

        for path, module in self._model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self._handles.append(module.register_forward_pre_hook(enters(path), prepend=True))
                self._handles.append(module.register_forward_hook(lambda *_: void(self._running.pop())))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.grad_fn is not None:
            for value in (*args, *(kwargs or {}).values()):
                path = self._layer_of.get(id(value)) if isinstance(value, nn.Parameter) else None
                if path is not None and not any(module in self._owners[id(value)] for _, module in self._running):
                    where = self._running[-1][0] if self._running else ""
                    name = getattr(function, "__name__", str(function))
                    self._used.append((path, f"{name}() in {f'module {where!r}' if where else 'the model'}", result.grad_fn))
        return result

    def found(self, roots: Iterable[Any]) -> Uses:
        """What matters for the outputs whose autograd nodes are `roots`."""
        consumers: dict[Any, set[Any]] = defaultdict(set)
        leaves: dict[Any, int] = {}
        stack, visited = list(roots), set(roots)
        while stack:
            node = stack.pop()
            if (variable := getattr(node, "variable", None)) is not None:
                leaves[node] = id(variable)
            for following, _ in node.next_functions:
                if following is not None:
                    consumers[following].add(node)
                    if following not in visited:
                        visited.add(following)
                        stack.append(following)
        outside: dict[str, str] = {}
        for path, use, node in self._used:
            if node in visited:
                outside.setdefault(path, use)
        local = frozenset(leaf for node, leaf in leaves.items() if _only_added(node, consumers))
        return Uses(outside, local, frozenset(leaves.values()))


def void(value: Any) -> None:
    """Nothing, for a hook that must not replace what it is called with."""


def _only_added(leaf: Any, consumers: dict[Any, set[Any]]) -> bool:
    """Whether a leaf of the graph is only moved about, and then added, concatenated or looked up."""
    stack, visited = [leaf], {leaf}
    while stack:
        for node in consumers[stack.pop()]:
            kind = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
            if kind in _ADDS or node in visited:
                continue
            if kind not in _MOVES:
                return False
            visited.add(node)
            stack.append(node)
    return True
