"""Activation checkpointing, which repeats parts of the forward pass inside the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass, as it does when activation checkpointing repeats it. The result is
    False while a graph is being compiled."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def refuse_reentrant(rule: str) -> Callable[..., Tensor]:
    """A function that raises an error when it is called. In a forward pass that checkpointing repeats, it replaces functions that
    only the first pass can provide.

    It is called only if the repeated pass is itself differentiated, as in reentrant checkpointing of the whole model. In that
    case, the first pass ran without gradients and looked like an evaluation.
    """

    def refuse(*_: Any) -> Tensor:
        raise CoverageError(
            f"rule '{rule}' cannot train with a forward pass that runs within a backward pass: activation "
            f"checkpointing needs use_reentrant=False"
        )

    return refuse
