"""Tensors are found in nested values, and the autograd graph is walked correctly."""

from __future__ import annotations

import dataclasses
from collections import namedtuple

import torch

from fa_bench.mechanisms.graph import items_in, leaves, nodes_from, tensors_in


@dataclasses.dataclass
class Output:
    value: object


def test_tensors_are_found_in_every_container_in_order() -> None:
    """Classes, text and numbers contain no tensors."""
    one, two, three, four, five = (torch.tensor(float(number)) for number in range(5))
    pair = namedtuple("Pair", "x y")
    value = {"a": [one, "text", Output], "b": (Output({"c": two}), 3), "d": pair(three, None), "e": Output(four)}
    assert [tensor.item() for tensor in tensors_in([value, five])] == [0, 1, 2, 3, 4]
    assert [*tensors_in(one)] == [one] and not [*tensors_in("text")]
    assert items_in(Output) is None and items_in("ab") is None and items_in(Output(3)) == [("value", 3)]


def test_graph_walk_visits_nodes_once_and_respects_stops() -> None:
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    inner = x * 2
    middle = inner + w
    outer = middle * middle + inner
    nodes = [*nodes_from([outer.grad_fn, inner.grad_fn, middle.grad_fn, outer.grad_fn, None])]
    assert len(nodes) == len(set(nodes)) == 6, "expected two sums, two products, and two leaves"
    assert inner.grad_fn not in [*nodes_from([outer.grad_fn], [inner.grad_fn])]
    assert [*nodes_from([inner.grad_fn], [inner.grad_fn])] == []
    assert leaves(outer.grad_fn) == {id(x), id(w)} and leaves(outer.grad_fn, [inner.grad_fn]) == {id(w)}
    assert leaves(middle.grad_fn, [middle.grad_fn]) == {id(x), id(w)}, "a stop at the root itself must be ignored"
