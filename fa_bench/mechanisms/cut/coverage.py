"""Determine which weights a cut rule covers, and where their errors come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING

from fa_bench.errors import names
from fa_bench.mechanisms.coverage import Coverage, Covered, foreign_weights, outside_text
from fa_bench.mechanisms.feedback_tensors import PREFIX
from fa_bench.mechanisms.rule import INPUT, OUTPUT

if TYPE_CHECKING:
    from fa_bench.mechanisms.cut.rule import CutRule
    from fa_bench.mechanisms.trace import Trace
    from fa_bench.mechanisms.weighted_layers import WeightedLayer


def cut_coverage(rule: CutRule, layers: dict[str, WeightedLayer], trace: Trace, cuts: Collection[str]) -> Coverage:
    """The coverage of a rule that is being attached.

    Args:
        rule: the rule.
        layers: the model's weighted layers.
        trace: the model's structure, traced with the cuts and the module in ``error_at`` as watched modules.
        cuts: the cuts.
    """
    from fa_bench.mechanisms.weighted_layers import kind_of, weight_name

    beyond = trace.beyond if rule.error_at is not None else set()
    # `through` lists the layers whose error passes through another layer's weight, except those beyond the module in error_at,
    # whose errors are meant to be exact.
    passed = trace.through_below if rule.error_at is not None else trace.through_below | trace.through_beyond
    through = [path for path in trace.order if path in passed and path not in beyond]
    covered = tuple(
        Covered(path, kind_of(layers[path]), tuple(layers[path].weight.shape), _source(rule, path, trace, cuts, through))
        for path in trace.order
        if rule.side == INPUT or rule.modular or path not in through
    )
    ids = {id(parameter) for entry in covered for parameter in layers[entry.layer].parameters(recurse=False)}
    uncovered, local = foreign_weights(rule.model, ids, trace.uses)
    parameters = dict(rule.model.named_parameters(remove_duplicate=False))
    if rule.error_at is not None:
        uncovered = {
            name: why for name, why in uncovered.items() if id(parameters[name]) not in trace.beyond_leaves - trace.below_leaves
        }
    transport = () if rule.error_at is None else (f"after '{rule.error_at}'",)
    if rule.modular:
        inside = [name for name in uncovered if id(parameters[name]) in trace.uses.seen]
        notes = (f"Learning by backpropagation within a block: {names(inside)}.",) if inside else ()
        outside = set(trace.uses.outside) - beyond
        if through or inside or outside:
            transport = ("within blocks", *transport)
        return Coverage(rule.name, covered, {}, local, (*rule.notes(), *notes), transport)
    for path in layers.keys() - set(trace.order):
        uncovered[weight_name(path, layers[path])] = "its layer did not run in the forward pass of the sample"
    if rule.side == OUTPUT:
        uncovered |= {weight_name(path, layers[path]): "no cut point between this layer and the next" for path in through}
        for name, parameter in parameters.items():
            table = name.rpartition(".")[0] if name.rpartition(".")[0] in trace.tables else id(parameter)
            is_table = isinstance(table, str) or name in local
            if is_table and table in trace.tables and table in passed and parameter.requires_grad:
                local.pop(name, None)
                uncovered[name] = "no cut point between it and the next layer"
    for path, use in trace.uses.outside.items():
        if path not in beyond:
            uncovered[weight_name(path, layers[path])] = outside_text(use)
    return Coverage(rule.name, covered, uncovered, local, rule.notes(), transport)


def with_untrained(coverage: Coverage, rule: CutRule, reached: set[int], why: str = "not trained") -> Coverage:
    """A copy of a coverage that also states which parameters the separate passes of the rule do not train.

    All outputs of the model except the one from which the loss is computed are detached, so layers that feed only the other
    outputs do not learn.

    Args:
        coverage: the coverage of the rule, which is being attached.
        rule: the rule.
        reached: ids of the parameters that learn.
        why: a phrase that describes all other parameters.
    """
    results = rule._trace.results
    which = f"output '{next(iter(results)) if rule.output is None else rule.output}'" if len(results) > 1 else "the output"
    cause = f"{which} does not depend on"
    layers = {entry.layer: rule.model.get_submodule(entry.layer) for entry in coverage.covered}
    idle = {path for path, layer in layers.items() if not any(id(one) in reached for one in layer.parameters(recurse=False))}
    ids = {id(parameter) for layer in layers.values() for parameter in layer.parameters(recurse=False)}
    others = [
        name
        for name, parameter in rule.model.named_parameters()
        if id(parameter) not in reached | ids and not name.rpartition(".")[2].startswith(PREFIX) and parameter.requires_grad
    ]
    notes = (f"{why.capitalize()}, because {cause} them: {names(others)}.",) if others else ()
    return dataclasses.replace(
        coverage,
        covered=tuple(
            dataclasses.replace(entry, feedback=f"is not computed: {why}, because {cause} it") if entry.layer in idle else entry
            for entry in coverage.covered
        ),
        notes=(*coverage.notes, *notes),
    )


def _source(rule: CutRule, path: str, trace: Trace, cuts: Collection[str], through: Collection[str]) -> str:
    at = [cut for cut in cuts if path in trace.feeds[cut]] if rule.side == OUTPUT else []
    within = "by backpropagation within its block (weight transport)" if rule.modular and path in through else ""
    if at:
        return f"comes from the cut at {names(at)}{f', in part {within}' if within else ''}"
    if within:
        return f"comes {within}"
    if rule.error_at is not None and path in trace.beyond:
        return "is the true one (output layer)" if path in trace.outputs else f"comes by backpropagation after {rule.error_at}"
    if rule.error_at is not None and path in trace.feeds[rule.error_at]:
        return f"is the true one at {rule.error_at}"
    return rule.output_source if path in trace.outputs else "comes from the cut at its consumer's input"
