"""Find the tensors in nested values, and walk autograd graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def items_in(value: Any) -> list[tuple[Any, Any]] | None:
    """The (key, value) pairs of a mapping, a tuple, a list or a dataclass, or None for anything else."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for _, item in items_in(value) or ():
            yield from tensors_in(item)


def nodes_from(roots: Iterable[Any], stops: Iterable[Any] = ()) -> Iterator[Any]:
    """The `roots` that are not `stops`, and every autograd node that can be reached from them without passing `stops`."""
    visited = {None, *stops}
    stack = [root for root in dict.fromkeys(roots) if root not in visited]
    visited.update(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following not in visited:
                visited.add(following)
                stack.append(following)


def leaves(root: Any, stops: Iterable[Any] = ()) -> set[int]:
    """The ids of the leaves, such as parameters, that can be reached from the node `root` without passing `stops`."""
    return {id(node.variable) for node in nodes_from([root], set(stops) - {root}) if hasattr(node, "variable")}
