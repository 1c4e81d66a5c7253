"""Choose the modules at which a cut rule cuts: read their names, reject modules that cannot be cut, and suggest cuts if none are
named."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError, names, nearest
from fa_bench.mechanisms.coverage import matching
from fa_bench.mechanisms.rule import OUTPUT
from fa_bench.mechanisms.trace import trace_model
from fa_bench.mechanisms.weighted_layers import CONVOLUTIONS
from fa_bench.registry.options import option_fields

if TYPE_CHECKING:
    from fa_bench.mechanisms.cut.rule import CutRule
    from fa_bench.mechanisms.trace import Trace

#: The maximum number of names that are written out; longer lists are abbreviated by patterns.
_MAX_NAMES = 6
#: The maximum number of attempts in a search for working options.
_MAX_ATTEMPTS = 4


def named_cuts(rule: CutRule, sample_input: Any) -> tuple[str, ...]:
    """The paths of the modules named by the rule's option `cuts` or, if it is not set, by the model, in the order of the model's
    modules.

    Raises:
        CoverageError: if there are none, or a name matches no module.
    """
    paths = [path for path, _ in rule.model.named_modules() if path]
    declared = getattr(rule.model, rule.declared, None)
    # A model may use this attribute for its own modules, in which case it declares no cut points.
    names_modules = isinstance(declared, (list, tuple)) and all(isinstance(name, str) for name in declared)
    patterns = rule.cuts if rule.cuts is not None else declared if names_modules else None
    if not patterns:
        raise _no_cut_points(rule, paths, sample_input)
    matches = matching(patterns, paths, "cuts")
    return tuple(path for path in paths if path in matches)


def check_cuts(rule: CutRule, trace: Trace, cuts: tuple[str, ...]) -> None:
    """Check that the rule can take its error from the model's output, or from the module in ``error_at``, and can cut at these
    modules.

    Args:
        rule: the rule, which is being attached.
        trace: the model's structure, traced with `cuts` as watched modules.
        cuts: paths of modules.

    Raises:
        CoverageError: if it cannot; the message states the reason.
    """
    if rule.output is None and len(trace.results) > 1:
        listed = names(f"{name} {shape}" for name, shape in trace.results.items())
        logits = [name for name, shape in trace.results.items() if len(shape) == 2] or list(trace.results)
        raise CoverageError(
            f"rule '{rule.name}' takes its error from one output, but this model returns {listed}; choose "
            "one, for example {output}",
            {"output": logits[0]},
        )
    if not 2 <= len(trace.result_shape) <= 5:
        raise CoverageError(
            f"rule '{rule.name}' needs outputs of shape (N, C), (N, T, C), (N, C, H, W) or (N, C, D, H, W); this "
            f"model returns {trace.result_shape}"
        )
    if rule.error_at is not None:
        _check_origin(rule.error_at, trace, cuts)
    elif _has_classes_first(rule, trace):
        raise CoverageError(
            f"rule '{rule.name}' needs sequences of outputs as (N, T, C), but this model returns "
            f"{trace.result_shape} from the convolution '{trace.outputs[0]}', whose classes come first; "
            f"transpose the model's output"
        )
    for cut, same in trace.same_output.items() if rule.side == OUTPUT else ():
        if cut in cuts and same in cuts:
            raise CoverageError(
                f"cut '{cut}' has the same output as cut '{same}'; name only one of them (in patterns, * also matches dots)"
            )
    for cut in cuts:
        if trace.calls[cut] != 1:
            raise CoverageError(f"cut '{cut}' runs {trace.calls[cut]} times in a forward pass; name a module that runs once")
        if rule.side == OUTPUT and cut in trace.kinds:
            raise CoverageError(f"cut '{cut}' returns a {trace.kinds[cut]}; name a module that returns one tensor")
        if rule.side == OUTPUT and not trace.feeds[cut] and cut not in trace.after_tables:
            raise CoverageError(f"cut '{cut}' has no layer with weights before it")
        if rule.side == OUTPUT and rule.error_at is None and set(trace.feeds[cut]) & set(trace.outputs):
            raise CoverageError(f"cut '{cut}' is after the output layer '{trace.outputs[0]}'; cut hidden layers only")


def _has_classes_first(rule: CutRule, trace: Trace) -> bool:
    """Whether the model's output is (N, C, T), judging by whether a convolution computed it."""
    shape = trace.result_shape
    layers = [(rule.model.get_submodule(path), trace.output_shapes[path]) for path in trace.outputs]
    return (
        len(shape) == 3
        and (shape[1] != shape[2] or not trace.result_is_moved)
        and any(isinstance(layer, CONVOLUTIONS) and of_layer == shape for layer, of_layer in layers)
    )


def named_origin(rule: CutRule) -> tuple[str, ...]:
    """The option ``error_at`` as a tuple, which is empty if the option is not set.

    Raises:
        CoverageError: if the model has no such module.
    """
    if rule.error_at is None:
        return ()
    paths = [path for path, _ in rule.model.named_modules() if path]
    if rule.error_at not in paths:
        raise CoverageError(f"error_at={rule.error_at}: the model has no module of that name{nearest(rule.error_at, paths)}")
    return (rule.error_at,)


def _check_origin(origin: str, trace: Trace, cuts: tuple[str, ...]) -> None:
    """Check that the errors can come from the output of the module in ``error_at``, and that no cut runs after this module."""
    if trace.calls[origin] != 1:
        raise CoverageError(
            f"error_at={origin}: this module runs {trace.calls[origin]} times in a forward pass; name one that runs once"
        )
    if origin in trace.kinds or origin not in trace.output_shapes:
        raise CoverageError(
            f"error_at={origin}: this module returns a {trace.kinds.get(origin, 'value')}; name one that returns one tensor"
        )
    if not 2 <= len(trace.output_shapes[origin]) <= 5:
        raise CoverageError(
            f"error_at={origin}: its output has the shape {trace.output_shapes[origin]}; name a module with "
            f"outputs (N, F), (N, T, F) or (N, F, H, W)"
        )
    order = list(trace.output_shapes)
    late = [cut for cut in cuts if cut in order and order.index(cut) > order.index(origin)]
    if late and (trace.same_output.get(origin) == late[0] or trace.same_output.get(late[0]) == origin):
        raise CoverageError(f"error_at={origin}: cut {late[0]} has the same output; use {{error_at}}", {"error_at": late[0]})
    if late:
        raise CoverageError(
            f"error_at={origin}: the cut{'s' * (len(late) > 1)} {names(late)} run{'s' * (len(late) == 1)} after "
            f"this module and would not receive its error; cut only at modules that run before it"
        )


def _no_cut_points(rule: CutRule, paths: list[str], sample_input: Any) -> CoverageError:
    """The error for a model without cut points. If a sample is given and cut points that work are found, the error suggests
    them."""
    model, modules = rule.model, [path for path in paths if not list(rule.model.get_submodule(path).children())]
    options: dict[str, Any] = {}
    if sample_input is not None:
        calls = rule.trace(sample_input, watch=tuple(modules)).calls
        modules, options = [path for path in modules if calls[path] == 1], working_options(rule, sample_input)
    example = f", for example {' and '.join(f'{{{name}}}' for name in options)}" if options else ""
    more = ", ..." if len(modules) > 12 else ""
    return CoverageError(
        f"rule '{rule.name}' needs cut points, and {type(model).__name__} declares none; set cuts to the names of the modules "
        f"whose outputs receive the error{example}, or set model.{rule.declared} (modules: {names(modules[:12])}{more})",
        options,
    )


def working_options(rule: CutRule, sample_input: Any) -> dict[str, Any]:
    """Options with which the rule can be attached to its model: ``cuts``, and any others that the error messages of failed
    attempts suggest.

    The result is empty if no such options are found.
    """
    paths = [path for path, _ in rule.model.named_modules() if path]
    options: dict[str, Any] = {"cuts": patterns(_suggested_cuts(rule, sample_input), paths)}
    has_blocks = any(field.name == "within" for field in option_fields(type(rule.part_of or rule)))
    for _ in range(_MAX_ATTEMPTS if options["cuts"] else 0):
        try:
            copied = copy.deepcopy(rule.model)
            dataclasses.replace(rule.part_of or rule, **options).attach(copied, sample_input=sample_input, initial_phase=False)
        except CoverageError as error:
            settings = error.settings
            if "allow_uncovered" in settings and has_blocks and not rule.modular and "within" not in options:
                settings = {"within": "block"}  # the weights would learn in the same way if they were uncovered
            if not settings or options.items() >= settings.items():
                break
            options |= settings
        else:
            return options
    return {}


def _suggested_cuts(rule: CutRule, sample_input: Any) -> list[str]:
    """The paths of suggested cuts: for every hidden layer, the last module whose output is fed by this layer and by as few others
    as possible, and possibly further modules for tables."""
    model = rule.model
    paths = tuple(path for path, _ in model.named_modules() if path)
    with rule.exact():
        trace = trace_model(model, sample_input, paths, rule.output, alone=True)
    if rule.modular:
        outputs = {*trace.outputs, *(path for path, consumer in trace.consumer.items() if consumer in trace.outputs)}
    else:
        outputs = set(trace.outputs)
    # Tables that are only looked up or added to activations need a cut between them and the first layer, unless the rule trains
    # whole blocks.
    tables = [] if rule.modular else [table for table in trace.tables if isinstance(table, str) or table in trace.uses.local]
    single = [
        path
        for path in trace.feeds_alone
        if trace.calls[path] == 1
        and path not in trace.same_output
        and trace.feeds_alone[path]
        and outputs.isdisjoint(trace.feeds_alone[path])
    ]
    chosen: dict[str, None] = {}
    for table in tables:  # of the modules that only tables feed, the first one with the most tables
        candidates = [path for path in single if table in trace.feeds_alone[path] <= set(tables)]
        if candidates:
            chosen[max(candidates, key=lambda path: len(trace.feeds_alone[path]))] = None
    for layer in trace.order:
        candidates = [path for path in single if layer in trace.feeds_alone[path]]
        if candidates:  # none for output layers
            fewest = min(len(trace.feeds_alone[path]) for path in candidates)
            chosen[next(path for path in reversed(candidates) if len(trace.feeds_alone[path]) == fewest)] = None
    return list(chosen)


def patterns(chosen: Collection[str], paths: Collection[str]) -> list[str]:
    """The names of the chosen modules or, if there are many, patterns that match these and no others among `paths`."""
    if len(chosen) <= _MAX_NAMES:
        return list(chosen)
    shortest: dict[str, None] = {}
    for path in chosen:
        parts = path.split(".")
        candidates = [f"*{'.'.join(parts[-number:])}" for number in range(1, len(parts))]
        shortest[next((one for one in candidates if {path} <= set(fnmatch.filter(paths, one)) <= set(chosen)), path)] = None
    return list(shortest)
