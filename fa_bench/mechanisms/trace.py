"""The order and connections of a model's layers, read from the autograd graph of one forward pass of a sample.

Connections are not inferred from types or names. A layer *feeds* a tensor if the graph leads from the tensor back to the layer's
output without passing another weighted layer.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fa_bench.errors import CoverageError, FaBenchError, first_line, names, nearest
from fa_bench.mechanisms.compound.expansion import layerwise
from fa_bench.mechanisms.contexts import all_require_grad, evaluating, restoring
from fa_bench.mechanisms.coverage import is_weight, not_coverable
from fa_bench.mechanisms.graph import items_in, leaves, nodes_from, tensors_in
from fa_bench.mechanisms.uses import Uses, UsesOfWeights, node_kind
from fa_bench.mechanisms.weighted_layers import Mode, require_gradients, weighted_layers

if TYPE_CHECKING:
    from fa_bench.mechanisms.rule import Rule

#: Autograd nodes of operations that can move the axes of a tensor.
_MOVES_AXES = {"Permute", "Transpose", "T", "View", "UnsafeView", "ReshapeAlias", "Mm", "Bmm"}


@dataclasses.dataclass
class Trace:
    """The structure of a model, read from one forward pass.

    Attributes:
        order: weighted layers in the order of execution.
        outputs: weighted layers that feed the requested or only output, or that feed any output and no other layer.
        reached: weighted layers whose input depends on a parameter, so that an error has to pass through them.
        consumer: layer -> the first executed layer whose input it feeds; absent if it feeds none.
        inputs: weighted layers grouped by their input, in the order of execution. All layers whose input depends on no parameter
            form one group.
        calls: how often each watched module, weighted layer or embedding ran.
        feeds: watched module -> weighted layers that feed its output.
        feeds_alone: watched module, in the order of execution -> the weighted layers and the entries of `tables` that would feed
            its output if no other module were watched. Empty unless `trace_model` is called with ``alone``.
        same_output: watched module -> an earlier watched module with the same output tensor, such as a block's last module.
        through_weights: weighted layers whose error comes, at least in part, through the weight of another layer.
        through_below, through_beyond: like `through_weights`, but including paths of embeddings and ids of parameters that belong
            to no layer. In the former, the error comes from a watched module; in the latter, from the model's outputs without
            passing a watched module.
        beyond: weighted layers between the outputs and the watched modules.
        beyond_leaves: ids of the parameters between the outputs and the watched modules.
        below_leaves: ids of the parameters below the watched modules, except the weights of embeddings.
        after_tables: watched modules whose output depends, with no layer in between, on an embedding or on a weight that is only
            added or looked up.
        tables: paths of embeddings and ids of weights that belong to no layer.
        kinds: watched module -> type of its output if it is not a tensor.
        output_shapes, input_shapes: watched module, layer or embedding -> shape of its output or input.
        trainable: watched modules whose output depends on a trainable parameter, without passing the output of another watched
            module.
        changed_in_place: watched modules, layers and embeddings whose output is changed in place after they have returned it.
        inputs_changed_in_place: layers whose input is changed in place after their last call.
        without_gradients: weighted layers that ran without gradients, under ``torch.no_grad()`` or reentrant checkpointing.
        uses: how the forward pass used the model's parameters.
        results: name -> shape of each output from which a loss can be computed; the name of a single tensor is ``""``.
        result_shape: shape of the output for the loss: the requested one, or the first one.
        result_leaves: ids of the parameters on which that output depends.
        result_is_moved: whether an operation after the weighted layers may have moved the axes of that output.
    """

    order: list[str]
    outputs: list[str]
    reached: list[str]
    consumer: dict[str, str]
    inputs: list[list[str]]
    calls: Counter[str]
    feeds: dict[str, list[str]]
    feeds_alone: dict[str, set[str]]
    same_output: dict[str, str]
    through_weights: list[str]
    through_below: set[Any]
    through_beyond: set[Any]
    beyond: set[str]
    beyond_leaves: set[int]
    below_leaves: set[int]
    after_tables: set[str]
    tables: list[Any]
    kinds: dict[str, str]
    output_shapes: dict[str, tuple[int, ...]]
    input_shapes: dict[str, tuple[int, ...]]
    trainable: set[str]
    changed_in_place: set[str]
    inputs_changed_in_place: set[str]
    without_gradients: list[str]
    uses: Uses
    results: dict[str, tuple[int, ...]]
    result_shape: tuple[int, ...]
    result_leaves: set[int]
    result_is_moved: bool


class StepMemory(NamedTuple):
    """The layers whose tensors a training step of a rule keeps or reads, for `fa_bench.metrics.memory_traffic`.

    Attributes:
        inputs: layers whose input is kept for the backward pass, one for each activation.
        feedback: layers whose feedback tensor propagates an error.
        learned: layers with learned feedback.
    """

    inputs: list[str]
    feedback: list[str]
    learned: list[str]


def trace_model(
    model: nn.Module,
    sample: Any,
    watch: Iterable[str] = (),
    output: str | int | None = None,
    frozen: Iterable[Tensor] = (),
    alone: bool = False,
) -> Trace:
    """Run the model once in evaluation mode and read its structure; the model is not changed.

    Args:
        model: the plain model (or an attached one inside ``rule.exact()``).
        sample: one input batch, (N, ...); a tuple or list of several arguments, or a dictionary of them by name.
        watch: paths of additional modules whose outputs are traced.
        output: name of the output from which the loss is computed; None: the first.
        frozen: parameters that are not trained, even if they require gradients now.
        alone: whether to fill in `Trace.feeds_alone`.

    Raises:
        CoverageError: if the model has no such output.
    """
    with layerwise(model, Mode("")):
        return _traced(model, sample, watch, output, frozen, alone)


def _traced(
    model: nn.Module, sample: Any, watch: Iterable[str], output: str | int | None, frozen: Iterable[Tensor], alone: bool
) -> Trace:
    layers, modules = weighted_layers(model), dict(model.named_modules())
    embeddings = {path: module for path, module in modules.items() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    owned = {id(p) for m in (*layers.values(), *embeddings.values()) for p in m.parameters(recurse=False)}
    tables: list[Any] = [
        *embeddings,
        *(id(p) for name, p in model.named_parameters() if id(p) not in owned and is_weight(name.rpartition(".")[2], p)),
    ]
    watched = {path: modules[path] for path in watch}
    seen: dict[str, _Call] = {}
    calls: Counter[str] = Counter()
    node_of: dict[Any, str] = {}
    look_ups: dict[Any, str] = {}
    kinds: dict[str, str] = {}
    without_gradients: list[str] = []
    dropped: set[int] = set()

    def enters_dropout(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # In-place dropout changes its input only in training, so the pass of the sample does not reveal this change.
        dropped.update(_memory(tensor) for tensor in tensors_in((args, kwargs)))

    def record(path: str):
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[path] += 1
            if path in layers and not torch.is_grad_enabled():
                without_gradients.append(path)
            if not isinstance(output, Tensor):
                kinds[path] = type(output).__name__
            y = next(tensors_in(output), None)
            if y is None:
                return
            if path in embeddings:
                look_ups[y.grad_fn] = path
            x = next(tensors_in(args), y)
            # The current nodes are stored, because a later in-place operation gives the tensor a different node.
            seen[path] = _Call(x, tuple(x.shape), x.grad_fn, x._version, y, y.grad_fn, y._version)
            if path in layers and y.grad_fn is not None:
                node_of[y.grad_fn] = path

        return hook

    handles = [m.register_forward_hook(record(p), prepend=True) for p, m in {**watched, **layers, **embeddings}.items()]
    handles += [
        module.register_forward_pre_hook(enters_dropout, with_kwargs=True)
        for module in modules.values()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.inplace
    ]
    args, kwargs = arguments(sample)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad} - set(map(id, frozen))
    observing = UsesOfWeights(model, layers)
    try:
        with evaluating(model), restoring(model), torch.enable_grad(), all_require_grad(model), observing as uses:
            result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()

    def is_changed(tensor: Tensor, version: int) -> bool:
        return tensor._version != version or _memory(tensor) in dropped

    results = named_results(result)
    roots = [tensor.grad_fn for tensor in results.values() if tensor.grad_fn is not None]
    order = [path for path in seen if path in layers]
    consumer: dict[str, str] = {}
    groups: dict[Any, list[str]] = {}
    for path in order:
        groups.setdefault(seen[path].input_node, []).append(path)
        for fed in _walk([seen[path].input_node], node_of, ())[0]:
            consumer.setdefault(fed, path)
    output_nodes = {path: seen[path].output_node for path in watched if path in seen}
    first: dict[Any, str] = {}
    same_output = {
        path: earlier
        for path, node in output_nodes.items()
        if node is not None and (earlier := first.setdefault(node, path)) != path
    }

    def tabled(roots: Iterable[Any], stops: Iterable[Any]) -> tuple[set[Any], set[Any]]:
        return _walk(roots, node_of, stops, look_ups, set(tables))

    walks = {path: tabled([node], output_nodes.values()) for path, node in output_nodes.items()}
    # An output of the model that is also the output of a watched module, such as a hidden state, is not followed any further.
    ends = set(roots).difference(output_nodes.values())
    first_beyond, through_beyond = tabled(ends, output_nodes.values())
    through_below = set().union(*(through for _, through in walks.values()))
    later = through_below | through_beyond
    chosen = chosen_result(results, output) if results or output is not None else None
    # Unless that output was requested, a layer that feeds one of several outputs and also other layers is not an output layer.
    last = _walk([chosen.grad_fn] if chosen is not None and (output is not None or len(results) == 1) else [], node_of, ())[0]
    fed, used = _walk(roots, node_of, ())[0], uses.result(roots)
    last |= {path for path in fed if path not in consumer}
    return Trace(
        order=order,
        outputs=[path for path in order if path in (last or fed)],
        reached=[path for path in order if seen[path].input_node is not None],
        consumer=consumer,
        inputs=list(groups.values()),
        calls=calls,
        feeds={path: [p for p in order if p in fed] for path, (fed, _) in walks.items()},
        feeds_alone={path: tabled([seen[path].output_node], ())[0] for path in seen if path in watched} if alone else {},
        same_output=same_output,
        through_weights=[path for path in order if path in later],
        through_below=through_below,
        through_beyond=through_beyond,
        beyond={path for path in order if path in first_beyond | through_beyond},
        beyond_leaves=set().union(*(leaves(node, output_nodes.values()) for node in ends)),
        below_leaves=set().union(
            *(leaves(node, (*output_nodes.values(), *look_ups)) for node in output_nodes.values() if node not in look_ups)
        ),
        after_tables={path for path, (met, _) in walks.items() if not met.isdisjoint({*embeddings, *used.local})},
        tables=tables,
        kinds=kinds,
        output_shapes={path: tuple(record.output.shape) for path, record in seen.items()},
        input_shapes={path: record.input_shape for path, record in seen.items()},
        trainable={path for path, node in output_nodes.items() if trained & leaves(node, output_nodes.values())},
        changed_in_place={path for path, call in seen.items() if is_changed(call.output, call.output_version)},
        inputs_changed_in_place={path for path in order if is_changed(seen[path].input, seen[path].input_version)},
        without_gradients=list(dict.fromkeys(without_gradients)),
        uses=used,
        results={name: tuple(tensor.shape) for name, tensor in results.items()},
        result_shape=() if chosen is None else tuple(chosen.shape),
        result_leaves=set() if chosen is None else leaves(chosen.grad_fn),
        result_is_moved=chosen is not None
        and any(node_kind(node) in _MOVES_AXES for node in nodes_from([chosen.grad_fn], node_of)),
    )


def trace_attached(rule: Rule, sample_input: Any, watch: Iterable[str], frozen: Iterable[Tensor]) -> Trace:
    """Run `trace_model` for a rule that is being attached. Without a sample, zeros are used if the first layer is fully
    connected.

    Args:
        rule: the rule, in its `exact` context.
        sample_input, watch, frozen: as for `trace_model`.

    Raises:
        CoverageError: if no layer ran, if there is no sample and zeros cannot replace it, or if a trainable layer ran without
            gradients.
    """
    nothing = f"rule '{rule.name}' covers no layer of this model"
    path, first = next(iter(weighted_layers(rule.model).items()), ("", None))
    if first is None:
        raise CoverageError(f"{nothing}: {not_coverable(rule.model)}")

    def traced(sample: Any) -> Trace:
        trace = trace_model(rule.model, sample, watch, getattr(rule, "output", None), frozen)
        if not trace.order:
            raise CoverageError(f"{nothing}: none ran in the forward pass on the sample input")
        for path in trace.without_gradients:
            require_gradients(path, rule.model.get_submodule(path))
        return trace

    if sample_input is not None:
        return traced(sample_input)
    needed = f"rule '{rule.name}' needs sample_input, one input batch, to determine what follows layer '{path}'"
    if not isinstance(first, nn.Linear):
        raise CoverageError(needed)
    try:
        return traced(first.weight.new_zeros(2, first.in_features))
    except FaBenchError:
        raise
    except Exception as error:  # a model may raise any exception for an input that it was not made for
        raise CoverageError(
            f"{needed}; the model does not accept zeros of shape (2, {first.in_features}) ({first_line(error)})"
        ) from None


class Arguments(NamedTuple):
    """The arguments of a forward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def arguments(sample: Any) -> Arguments:
    """The arguments for a forward pass on a sample (see `trace_model`), copied because a model may change its inputs in place."""

    def detached(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, tuple):
            items = [detached(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if not isinstance(value, (MutableMapping, list)):
            return value
        copied: Any = copy.copy(value)
        for key, item in items_in(value) or ():
            copied[key] = detached(item)
        return copied

    if isinstance(sample, Mapping):
        return Arguments((), {name: detached(value) for name, value in sample.items()})
    return Arguments(tuple(map(detached, sample)) if isinstance(sample, (tuple, list)) else (detached(sample),), {})


def replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """The nested value with `old` replaced by `new`; mappings that can be changed, and dataclasses, are changed in place."""
    if value is old:
        return new
    if isinstance(value, MutableMapping):
        for key, item in list(value.items()):
            value[key] = replaced(item, old, new)
    elif isinstance(value, Mapping):
        return type(value)({key: replaced(item, old, new) for key, item in value.items()})  # type: ignore[call-arg]
    elif isinstance(value, (tuple, list)):
        items = [replaced(item, old, new) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif (named := items_in(value)) is not None:
        for name, item in named:
            if (changed := replaced(item, old, new)) is not item:
                object.__setattr__(value, name, changed)  # works for frozen dataclasses, too
    return value


def named_results(result: Any, name: str = "") -> dict[str, Tensor]:
    """The outputs of a model from which a loss can be computed, by name. Outputs that require gradients are chosen or, if there
    are none, all floating-point outputs.

    A name is the key in a mapping, the index in a tuple or list, or the field of a dataclass; nested names are joined by dots.
    """
    tensors = dict(_named(result, name))
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad} or tensors


def _named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    else:
        for key, item in items_in(value) or ():
            yield from _named(item, f"{name}.{key}" if name else str(key))


def chosen_result(results: dict[str, Tensor], output: str | int | None) -> Tensor:
    """The output named `output`, or the first output if `output` is None. If the model returned a single tensor, the result is
    that tensor for any `output`.

    Raises:
        CoverageError: if there is no such output.
    """
    if results and (output is None or list(results) == [""]):  # a model may return several outputs only in training
        return next(iter(results.values()))
    name = "" if output is None else str(output)
    if name not in results:
        allowed = [name for name in results if name]
        given = f"output='{name}': " if output is not None else ""
        raise CoverageError(
            f"{given}the model has no such output{nearest(name, allowed)} (outputs: "
            f"{names(allowed) or 'one tensor, which needs no name' if results else 'no tensor'})"
        )
    return results[name]


def loss_output(result: Any, output: str | int | None) -> Tensor:
    """The tensor in a model's result from which the loss is computed; see `chosen_result`."""
    return result if isinstance(result, Tensor) else chosen_result(named_results(result), output)


class _Call(NamedTuple):
    """The last call of a module in the forward pass of the sample; the nodes are those of the autograd graph."""

    input: Tensor
    input_shape: tuple[int, ...]
    input_node: Any
    input_version: int
    output: Tensor
    output_node: Any
    output_version: int


def _memory(tensor: Tensor) -> int:
    """A number that identifies the memory of a tensor while the tensor is alive."""
    return tensor.untyped_storage()._cdata


def _walk(
    roots: Iterable[Any],
    node_of: dict[Any, str],
    stops: Iterable[Any],
    look_ups: Mapping[Any, str] | None = None,
    parameters: Collection[Any] = (),
) -> tuple[set[Any], set[Any]]:
    """Two sets: the layers that come first on paths from `roots` down the graph, and the layers that come later.

    A path ends at the first of the `stops` after its root. The sets also contain the embeddings on these paths, whose nodes are
    the keys of `look_ups`, and the ids of the `parameters` on these paths.
    """
    first: set[Any] = set()
    later: set[Any] = set()
    visited: set[tuple[Any, bool]] = set()
    starts = {root for root in roots if root is not None}
    stops = set(stops)
    stack = [(root, False) for root in starts]
    while stack:
        node, past_layer = stack.pop()
        if (node, past_layer) in visited or (node in stops and node not in starts):
            continue
        visited.add((node, past_layer))
        if look_ups is not None:
            table = look_ups.get(node) or id(getattr(node, "variable", None))
            if node in look_ups or table in parameters:
                (later if past_layer else first).add(table)
        if node in node_of:
            (later if past_layer else first).add(node_of[node])
            past_layer = True
        stack.extend((following, past_layer) for following, _ in node.next_functions if following is not None)
    return first, later
