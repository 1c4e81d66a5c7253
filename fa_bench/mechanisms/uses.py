"""Determine how a forward pass uses the model's weights outside their layers, by observing it while it runs and by searching its
autograd graph.

A rule determines how errors pass through a layer. If a function uses the layer's weight elsewhere, as ``F.linear(x,
self.enc.weight.t())`` does in a tied decoder, the error passes through the weight there, which is weight transport regardless of
the rule.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fa_bench.mechanisms.compound.base import Compound
from fa_bench.mechanisms.graph import nodes_from, tensors_in
from fa_bench.mechanisms.weighted_layers import WeightedLayer, weight_parameter

#: Autograd nodes that rearrange a tensor's entries without mixing them with those of another tensor.
_MOVES = {
    "Expand",
    "Unsqueeze",
    "Squeeze",
    "View",
    "UnsafeView",
    "Slice",
    "Select",
    "Index",
    "IndexSelect",
    "Gather",
    "Repeat",
    "ToCopy",
    "Permute",
    "Transpose",
    "T",
    "Clone",
    "ReshapeAlias",
    "Narrow",
    "Flip",
    "Alias",
    "Detach",
    "Split",
    "Unbind",
}
#: Nodes that combine tensors so that the derivative with respect to one does not depend on the values of another: sums,
#: concatenations, look-ups.
_ADDS = {"Add", "Sub", "Rsub", "Cat", "Stack", "Embedding", "EmbeddingBag", "Where", "Copy", "CopySlices"}
#: Nodes that can scale their input by a factor that is not differentiated.
_SCALES = {"Mul", "Div"}
#: Functions that read a tensor's dtype, device or shape, but not its entries.
_READS = {"to", "type_as", "view_as", "expand_as", "reshape_as", "broadcast_tensors"}
_LOOK_UPS = (nn.Embedding, nn.EmbeddingBag)


@dataclasses.dataclass(frozen=True)
class Uses:
    """The ways in which a forward pass used parameters.

    Attributes:
        outside: weighted layer -> a description of a function that used its weight outside the layer, and of where it was
            called.
        local: ids of the parameters that were only added, concatenated or looked up: no error passes through them.
        seen: ids of all parameters that the output depends on.
    """

    outside: dict[str, str]
    local: frozenset[int]
    seen: frozenset[int]


class UsesOfWeights(TorchFunctionMode):
    """A context that watches the uses of weights in one forward pass; `result` returns them.

    Args:
        model: the model that runs.
        layers: its weighted layers by path.
    """

    def __init__(self, model: nn.Module, layers: dict[str, WeightedLayer]) -> None:
        super().__init__()
        # A weight that is computed, by pruning or a parametrization, is a new tensor each time it is used, so it is not watched.
        weights = {path: weight for path, layer in layers.items() if (weight := weight_parameter(layer)) is not None}
        self._layer_of = {id(weight): path for path, weight in weights.items()}
        self._stored_at = {at: id(weight) for weight in weights.values() if (at := _storage(weight))}
        self._owners: dict[int, set[nn.Module]] = defaultdict(set)
        for path, weight in weights.items():
            self._owners[id(weight)].add(layers[path])
            # A compound module may use the weights of its layers in a fused function.
            if isinstance(parent := model.get_submodule(path.rpartition(".")[0]), Compound):
                self._owners[id(weight)].add(parent)
        # A look-up in a tied embedding is allowed, because no error passes through it.
        for module in model.modules():
            if isinstance(module, _LOOK_UPS):
                self._owners[id(module.weight)].add(module)
        self._weights_of: dict[nn.Module, set[int]] = defaultdict(set)
        for number, owners in self._owners.items():
            for module in owners:
                self._weights_of[module].add(number)
        self._model = model
        self._running: list[tuple[str, nn.Module]] = []
        #: The autograd nodes that the owners of each weight have created.
        self._nodes_of: dict[int, set[Any]] = defaultdict(set)
        #: Each entry (layer, description, node) stands for a function that used the layer's weight. The second list has the
        #: functions that used the weight's values but pass no gradient to the weight.
        self._used: list[tuple[str, str, Any]] = []
        self._detached: list[tuple[str, str, Any]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> UsesOfWeights:
        def enter_module(path: str):
            return lambda module, args: self._running.append((path, module))

        for path, module in self._model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self._handles.append(module.register_forward_pre_hook(enter_module(path), prepend=True))
                self._handles.append(module.register_forward_hook(self._exit_module, prepend=True, with_kwargs=True))
        return super().__enter__()

    def _exit_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._running and self._running[-1][1] is module:  # watching may begin within a module's call
            self._running.pop()
        for number in self._weights_of.get(module, ()):
            nodes = self._nodes_of[number]
            inputs = {tensor.grad_fn for tensor in tensors_in((args, kwargs))}
            nodes.update(nodes_from([tensor.grad_fn for tensor in tensors_in(output)], inputs | nodes))

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        node = next((tensor.grad_fn for tensor in tensors_in(result) if tensor.grad_fn is not None), None)
        if node is not None:
            name = getattr(function, "__name__", str(function))
            for value in tensors_in((args, kwargs)):
                if isinstance(value, nn.Parameter):
                    number, uses = id(value), self._used if value.requires_grad else self._detached
                else:
                    # The value may be a view of a weight that is not differentiated: weight.detach(), weight.data, or a view of a
                    # frozen weight.
                    number = 0 if value.requires_grad else self._stored_at.get(_storage(value), 0)
                    uses = self._detached
                path, owners = self._layer_of.get(number), self._owners.get(number, ())
                if path is not None and name not in _READS and not any(module in owners for _, module in self._running):
                    where = self._running[-1][0] if self._running else ""
                    uses.append((path, f"{name}() in {f'module {where!r}' if where else 'the model'}", node))
        return result

    def result(self, roots: Iterable[Any]) -> Uses:
        """The uses on which the outputs with the autograd nodes `roots` depend."""
        consumers: dict[Any, set[Any]] = defaultdict(set)
        nodes = dict.fromkeys(nodes_from(roots))
        leaves = {node: id(node.variable) for node in nodes if hasattr(node, "variable")}
        for node in nodes:
            for following, _ in node.next_functions:
                consumers[following].add(node)
        outside: dict[str, str] = {}
        for leaf, number in leaves.items():
            if (path := self._layer_of.get(number)) is not None and (
                mixing := _mixing_node(leaf, consumers, self._nodes_of[number])
            ) is not None:
                descriptions = (text for layer, text, node in self._used if layer == path and node in nodes)
                outside[path] = next(descriptions, f"{node_kind(mixing)}() in the model")
        for path, description, node in self._detached:
            if node in nodes and node_kind(node) not in _ADDS:
                outside.setdefault(path, description)
        local = frozenset(number for leaf, number in leaves.items() if _mixing_node(leaf, consumers, set()) is None)
        return Uses(outside, local, frozenset(leaves.values()))


def _storage(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage, or 0 for a tensor without memory, such as one on the meta device."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def node_kind(node: Any) -> str:
    """The name of an autograd node's operation, such as ``Mm``."""
    return type(node).__name__.rstrip("0123456789").removesuffix("Backward")


def _mixing_node(leaf: Any, consumers: dict[Any, set[Any]], excluded: set[Any]) -> Any:
    """The node in which a leaf of the graph is combined with another tensor whose error then depends on the leaf.

    The result is None if the leaf is only rearranged, added, concatenated or looked up. Nodes in `excluded` are ignored.
    """
    stack, visited = [leaf], {leaf}
    while stack:
        for node in consumers[stack.pop()]:
            kind = node_kind(node)
            if node in visited or (kind in _ADDS and not _is_weight(node)):
                continue
            visited.add(node)
            if kind not in _MOVES and kind not in _ADDS:
                if node in excluded:
                    continue
                if len({following for following, _ in node.next_functions if following is not None}) > 1:
                    return node
            stack.append(node)
    return None


def _is_weight(root: Any) -> bool:
    """Whether a node's result is computed only from parameters, such as a sum or concatenation of weights."""
    stack, visited = [root], {root}
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            continue
        kind, inputs = node_kind(node), {following for following, _ in node.next_functions}
        # A product with a factor that is not differentiated may be a product with data.
        is_differentiated = (len(node.next_functions) == 1 or kind in ("Mm", "Bmm")) and None not in inputs
        if kind.startswith("Embedding") or not (is_differentiated or kind in _MOVES or kind in _SCALES or kind in _ADDS):
            return False
        stack.extend(inputs - {None} - visited)
        visited |= inputs
    return True
