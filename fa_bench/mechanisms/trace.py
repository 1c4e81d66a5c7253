"""The order and neighbourhood of a model's layers, read from the autograd graph of one sample forward.

No layer is recognised by its type or place in the file: a layer *feeds* a tensor when the graph leads from the tensor
back to the layer's output without passing another weighted layer.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fa_bench.errors import CoverageError, names, nearest
from fa_bench.mechanisms.layers import weighted_layers
from fa_bench.mechanisms.uses import Uses, UsesOfWeights


@dataclasses.dataclass
class Trace:
    """What one forward pass showed.

    Attributes:
        order: weighted layers in the order of execution.
        outputs: weighted layers that feed the output that counts, or another one and no further layer.
        reached: weighted layers whose input depends on any parameter, so that an error through them is asked for.
        consumer: layer -> the first executed layer that its activation is an input of; absent for output layers.
        inputs: weighted layers grouped by the activation that enters them, in the order of execution; those of the image first.
        calls: how often each watched module ran.
        feeds: watched module -> weighted layers that feed its output.
        alone: watched module, in the order of execution -> `feeds` as it would be if no other module were watched.
        twins: watched module -> one watched before it that has the very same output, such as a block's last module.
        behind: weighted layers that a watched output, or the model's, is reached from only or also through another layer.
        output_shapes, input_shapes: watched module or layer -> shape of its output, of its input.
        learns: watched modules whose output depends on a parameter that is trained, without passing another one's output.
        changed: watched modules and layers whose output was changed in place after they returned it.
        without_gradients: weighted layers that ran without gradients, under ``torch.no_grad()`` or reentrant checkpointing.
        uses: what was done with the model's weights outside their own layers.
        results: name -> shape of each output that a loss can be made of; a model that returns one tensor names it ``""``.
        result_shape: shape of the one that counts: the output that was asked for, or the first one.
    """

    order: list[str]
    outputs: list[str]
    reached: list[str]
    consumer: dict[str, str]
    inputs: list[list[str]]
    calls: Counter[str]
    feeds: dict[str, list[str]]
    alone: dict[str, set[str]]
    twins: dict[str, str]
    behind: list[str]
    output_shapes: dict[str, tuple[int, ...]]
    input_shapes: dict[str, tuple[int, ...]]
    learns: set[str]
    changed: set[str]
    without_gradients: list[str]
    uses: Uses
    results: dict[str, tuple[int, ...]]
    result_shape: tuple[int, ...]


def trace_model(
    model: nn.Module, sample: Any, watch: Iterable[str] = (), output: str | None = None, frozen: Iterable[Tensor] = (),
    alone: bool = False,
) -> Trace:
    """Run the model once in evaluation mode and read its structure; no state of the model changes.

    Args:
        model: the plain model (or an attached one inside ``rule.exact()``).
        sample: one input batch, (N, ...); a tuple or list of several arguments, or a dictionary of them by name.
        watch: paths of further modules whose outputs matter.
        output: name of the output that the loss is made of; None for the first.
        frozen: parameters that are not trained, whatever their ``requires_grad`` says at the moment.
        alone: fill in `Trace.alone`.

    Raises:
        CoverageError: where the model has no such output.
    """
    layers, modules = weighted_layers(model), dict(model.named_modules())
    watched = {path: modules[path] for path in watch}
    seen: dict[str, _Seen] = {}
    calls: Counter[str] = Counter()
    node_of: dict[Any, str] = {}
    blind: list[str] = []

    def record(path: str):
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[path] += 1
            if path in layers and not torch.is_grad_enabled():
                blind.append(path)
            y = next(tensors_in(output), None)
            if y is None:
                return
            x = next(tensors_in(args), y)
            # The nodes of this moment: a later in-place operation gives the tensor another one.
            seen[path] = _Seen(tuple(x.shape), x.grad_fn, y, y.grad_fn, y._version)
            if path in layers and y.grad_fn is not None:
                node_of[y.grad_fn] = path
        return hook

    handles = [m.register_forward_hook(record(p), prepend=True) for p, m in {**watched, **layers}.items()]
    args, kwargs = arguments(sample)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad} - set(map(id, frozen))
    try:
        with evaluating(model), torch.enable_grad(), all_require_grad(model), UsesOfWeights(model, layers) as uses:
            result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()

    results = named_results(result)
    roots = [tensor.grad_fn for tensor in results.values() if tensor.grad_fn is not None]
    order = [path for path in seen if path in layers]
    consumer: dict[str, str] = {}
    groups: dict[Any, list[str]] = {}
    for path in order:
        groups.setdefault(seen[path].input_node, []).append(path)
        for fed in _walk([seen[path].input_node], node_of, ())[0]:
            consumer.setdefault(fed, path)
    ends = {path: seen[path].output_node for path in watched if path in seen}
    first: dict[Any, str] = {}
    twins = {path: twin for path, node in ends.items() if node is not None and (twin := first.setdefault(node, path)) != path}
    walks = {path: _walk([node], node_of, ends.values()) for path, node in ends.items()}
    # An output that is a watched one, such as a hidden state, has no way of its own to the layers in front of it.
    _, behind = _walk(set(roots).difference(ends.values()), node_of, ends.values())
    behind = behind.union(*(through for _, through in walks.values()))
    chosen = chosen_result(results, output) if results or output is not None else None
    # Of several outputs, such as hidden states, those that other layers go on from do not make an output layer.
    last = _walk([chosen.grad_fn] if chosen is not None and (output is not None or len(results) == 1) else [], node_of, ())[0]
    fed = _walk(roots, node_of, ())[0]
    last |= {path for path in fed if path not in consumer}
    return Trace(
        order=order,
        outputs=[path for path in order if path in (last or fed)],
        reached=[path for path in order if seen[path].input_node is not None],
        consumer=consumer,
        inputs=list(groups.values()),
        calls=calls,
        feeds={path: [p for p in order if p in fed] for path, (fed, _) in walks.items()},
        alone={path: _walk([seen[path].output_node], node_of, ())[0] for path in seen if path in watched} if alone else {},
        twins=twins,
        behind=[path for path in order if path in behind],
        output_shapes={path: tuple(record.output.shape) for path, record in seen.items()},
        input_shapes={path: record.input_shape for path, record in seen.items()},
        learns={path for path, node in ends.items() if trained & leaves(node, ends.values())},
        changed={path for path, record in seen.items() if record.output._version != record.version},
        without_gradients=list(dict.fromkeys(blind)),
        uses=uses.found(roots),
        results={name: tuple(tensor.shape) for name, tensor in results.items()},
        result_shape=() if chosen is None else tuple(chosen.shape),
    )


class Arguments(NamedTuple):
    """What a forward pass is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def arguments(sample: Any) -> Arguments:
    """The arguments of a forward pass on a sample, see `trace_model`: copies, for a model may change what it is given."""
    def detached(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        return copy.copy(value) if isinstance(value, (Mapping, list)) else value

    if isinstance(sample, Mapping):
        return Arguments((), {name: detached(value) for name, value in sample.items()})
    return Arguments(tuple(map(detached, sample)) if isinstance(sample, (tuple, list)) else (detached(sample),), {})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of tuples, lists, mappings and dataclasses (models may return any of them)."""
    if isinstance(value, Tensor):
        yield value
    elif (items := _items(value)) is not None:
        for _, item in items:
            yield from tensors_in(item)


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """The keys, numbers or names in a mapping, a tuple or list, or a dataclass, and what is there; None for anything else."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """The same nest with `new` in the place of `old`; dictionaries and dataclasses are changed in place, whatever their class."""
    if value is old:
        return new
    if isinstance(value, dict):
        for key, item in list(value.items()):
            value[key] = replaced(item, old, new)
    elif isinstance(value, (tuple, list)):
        items = [replaced(item, old, new) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif (named := _items(value)) is not None:
        for name, item in named:
            if (changed := replaced(item, old, new)) is not item:
                object.__setattr__(value, name, changed)  # frozen ones too
    return value


def named_results(result: Any, name: str = "") -> dict[str, Tensor]:
    """The outputs of a model that a loss can be made of, by name: those that depend on a parameter, or else all floating ones.

    A name leads to the tensor: the key in a mapping, the number in a tuple or list, the field of a dataclass, joined by dots
    where they are nested.
    """
    found = dict(_named(result, name))
    return {name: tensor for name, tensor in found.items() if tensor.requires_grad} or found


def _named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    else:
        for key, item in _items(value) or ():
            yield from _named(item, f"{name}.{key}" if name else str(key))


def chosen_result(results: dict[str, Tensor], output: str | None) -> Tensor:
    """The output called `output`, or the first one.

    Raises:
        CoverageError: where there is none.
    """
    if results and (output is None or list(results) == [""]):  # a model may return several outputs in training alone
        return next(iter(results.values()))
    if output not in results:
        allowed = [name for name in results if name]
        given = f"output='{output}': " if output is not None else ""
        raise CoverageError(f"{given}the model has no such output{nearest(output or '', allowed)} (outputs: "
                            f"{names(allowed) or 'one tensor, which needs no name' if results else 'no tensor'})")
    return results[output]


class _Seen(NamedTuple):
    """What one watched module did in the sample forward; nodes are those of the autograd graph."""

    input_shape: tuple[int, ...]
    input_node: Any
    output: Tensor
    output_node: Any
    version: int


def _walk(roots: Iterable[Any], node_of: dict[Any, str], stops: Iterable[Any]) -> tuple[set[str], set[str]]:
    """Layers met first on the ways down the graph from `roots`, and layers met behind those, not passing `stops`."""
    first: set[str] = set()
    behind: set[str] = set()
    visited: set[tuple[Any, bool]] = set()
    starts = {root for root in roots if root is not None}
    stops = set(stops)
    stack = [(root, False) for root in starts]
    while stack:
        node, past_layer = stack.pop()
        if (node, past_layer) in visited or (node in stops and node not in starts):
            continue
        visited.add((node, past_layer))
        if node in node_of:
            (behind if past_layer else first).add(node_of[node])
            past_layer = True
        stack.extend((following, past_layer) for following, _ in node.next_functions if following is not None)
    return first, behind


def leaves(root: Any, stops: Iterable[Any] = ()) -> set[int]:
    """Ids of the leaves, such as parameters, that the graph leads to from the node `root`, not passing `stops`."""
    found: set[int] = set()
    visited, stack = set(stops), [] if root is None else [root]
    while stack:
        node = stack.pop()
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                stack.append(following)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module, each one's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def without_side_effects(model: nn.Module) -> Iterator[None]:
    """Forward passes that draw nothing and leave running statistics alone: dropout is off, a batch has its own statistics."""
    changed: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if (isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth") and module.training:
            changed.append((module, "training"))
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            changed.append((module, "track_running_stats"))
    for module, attribute in changed:
        setattr(module, attribute, False)
    try:
        yield
    finally:
        for module, attribute in changed:
            setattr(module, attribute, True)


@contextmanager
def all_require_grad(model: nn.Module) -> Iterator[None]:
    """Every parameter of floating type in the graph, frozen ones too; as before afterwards."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
