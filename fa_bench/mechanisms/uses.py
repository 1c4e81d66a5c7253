"""What a forward pass does with the model's weights outside their own layers, read while it runs and from its autograd graph.

A rule changes what a layer does with its weight. A weight that a function uses elsewhere, ``F.linear(x, self.enc.weight.t())``
in a tied decoder for example, carries the error through itself: that is weight transport, whatever the layer does.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

#: Autograd nodes that move a tensor's entries about without mixing them with another tensor's.
_MOVES = {"Expand", "Unsqueeze", "Squeeze", "View", "UnsafeView", "Slice", "Select", "Index", "IndexSelect", "Gather", "Repeat",
          "ToCopy", "Permute", "Transpose", "T", "Clone", "ReshapeAlias", "Narrow", "Flip", "Alias", "Detach", "Split", "Unbind"}
#: Nodes in which the derivative towards another input does not depend on the tensor: sums, concatenations, look-ups.
_ADDS = {"Add", "Sub", "Rsub", "Cat", "Stack", "Embedding", "EmbeddingBag", "Where", "Copy", "CopySlices"}
#: Nodes that scale what they are given, also by a number.
_SCALES = {"Mul", "Div", "Neg"}
#: Functions that read a tensor's dtype, device or shape, not its entries.
_READS = {"to", "type_as", "view_as", "expand_as", "reshape_as", "broadcast_tensors"}
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
        # A weight that is computed, by pruning or a parametrization, is a new tensor every time.
        layers = {path: layer for path, layer in layers.items() if layer._parameters.get("weight") is not None}
        self._layer_of = {id(layer.weight): path for path, layer in layers.items()}
        self._stored_at = {at: id(layer.weight) for layer in layers.values() if (at := _storage(layer.weight))}
        self._owners: dict[int, set[nn.Module]] = defaultdict(set)
        # A look-up in a tied embedding carries no error on either.
        for module in (*layers.values(), *(module for module in model.modules() if isinstance(module, _LOOK_UPS))):
            self._owners[id(module.weight)].add(module)
        self._weight_of = {module: number for number, owners in self._owners.items() for module in owners}
        self._model = model
        self._running: list[tuple[str, nn.Module]] = []
        #: The autograd nodes that the owners of each weight made.
        self._own: dict[int, set[Any]] = defaultdict(set)
        #: (layer, words, node): functions that took its weight; those that took its entries without being differentiated.
        self._used: list[tuple[str, str, Any]] = []
        self._detached: list[tuple[str, str, Any]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> UsesOfWeights:
        def enters(path: str):
            return lambda module, args: self._running.append((path, module))

        for path, module in self._model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self._handles.append(module.register_forward_pre_hook(enters(path), prepend=True))
                self._handles.append(module.register_forward_hook(self._leaves, prepend=True, with_kwargs=True))
        return super().__enter__()

    def _leaves(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._running and self._running[-1][1] is module:  # the watch may begin within a module's call
            self._running.pop()
        if module in self._weight_of:
            own = self._own[self._weight_of[module]]
            inputs = {tensor.grad_fn for tensor in _tensors((args, kwargs))}
            stack = [tensor.grad_fn for tensor in _tensors(output)]
            while stack:
                node = stack.pop()
                if node is not None and node not in inputs and node not in own:
                    own.add(node)
                    stack.extend(following for following, _ in node.next_functions)

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        node = next((tensor.grad_fn for tensor in _tensors(result) if tensor.grad_fn is not None), None)
        if node is not None:
            name = getattr(function, "__name__", str(function))
            for value in _tensors((args, kwargs)):
                if isinstance(value, nn.Parameter):
                    number, found = id(value), self._used
                else:
                    # A view of a weight that is not differentiated: weight.detach(), weight.data.
                    number, found = None if value.requires_grad else self._stored_at.get(_storage(value)), self._detached
                path, owners = self._layer_of.get(number), self._owners.get(number, ())
                if path is not None and name not in _READS and not any(module in owners for _, module in self._running):
                    where = self._running[-1][0] if self._running else ""
                    found.append((path, f"{name}() in {f'module {where!r}' if where else 'the model'}", node))
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
        for leaf, number in leaves.items():
            if (path := self._layer_of.get(number)) is not None and (
                    by := _carrier(leaf, consumers, self._own[number])) is not None:
                words = (words for used, words, node in self._used if used == path and node in visited)
                outside[path] = next(words, f"{_kind(by)}() in the model")
        for path, words, node in self._detached:
            if node in visited and _kind(node) not in _ADDS:
                outside.setdefault(path, words)
        local = frozenset(number for leaf, number in leaves.items() if _carrier(leaf, consumers, set()) is None)
        return Uses(outside, local, frozenset(leaves.values()))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among a function's arguments, in lists and dictionaries too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _storage(tensor: torch.Tensor) -> int:
    """Where a tensor's entries are; 0 for one that has none, such as those on the meta device."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def _kind(node: Any) -> str:
    return type(node).__name__.rstrip("0123456789").removesuffix("Backward")


def _carrier(leaf: Any, consumers: dict[Any, set[Any]], own: set[Any]) -> Any:
    """The node in which a leaf of the graph meets another tensor, so that an error towards this one depends on the leaf.

    None where the leaf, moved about and by itself, is only added, concatenated or looked up; nodes in `own` are left out.
    """
    stack, visited = [leaf], {leaf}
    while stack:
        for node in consumers[stack.pop()]:
            kind = _kind(node)
            if node in visited or (kind in _ADDS and not _is_weight(node)):
                continue
            visited.add(node)
            if kind not in _MOVES and kind not in _ADDS:
                if node in own:
                    continue
                if len({following for following, _ in node.next_functions if following is not None}) > 1:
                    return node
            stack.append(node)
    return None


def _is_weight(root: Any) -> bool:
    """Whether a node's result is made of parameters alone: itself a weight, such as a sum or concatenation of weights."""
    stack, visited = [root], {root}
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            continue
        kind, inputs = _kind(node), {following for following, _ in node.next_functions}
        # A product of which one factor is not differentiated may well be one with data.
        whole = (len(node.next_functions) == 1 or kind in ("Mm", "Bmm")) and None not in inputs
        if kind.startswith("Embedding") or not (whole or kind in _MOVES or kind in _SCALES or kind in _ADDS):
            return False
        stack.extend(inputs - {None} - visited)
        visited |= inputs
    return True
