"""The blocks of a model, the modules at which they end, and the parameters that they contain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fa_bench.mechanisms.contexts import evaluating, restoring
from fa_bench.mechanisms.coverage import matching
from fa_bench.mechanisms.feedback_tensors import PREFIX
from fa_bench.mechanisms.trace import arguments


def block_ends(model: nn.Module, blocks: Iterable[str] | None = None) -> set[str]:
    """The paths of the modules that end the model's blocks, or an empty set if the model declares none.

    Args:
        model: an attached or plain model.
        blocks: names of these modules, or patterns; None: those in ``model.blocks`` or, if the model has none,
            ``model.cut_points``.

    Raises:
        CoverageError: if a name matches no module.
    """
    declared = [getattr(model, name, None) for name in ("blocks", "cut_points")] if blocks is None else [list(blocks)]
    # Values other than lists and tuples are ignored, because a user's model may use these attributes for its own modules.
    patterns = next((value for value in declared if isinstance(value, (list, tuple)) and value), ())
    return matching(patterns, [path for path, _ in model.named_modules() if path], "blocks")


def blocks_of(model: nn.Module, sample: Any, blocks: Iterable[str] | None = None) -> dict[str, list[str]]:
    """A mapping from the end of each block to the names of the block's parameters, in the order of execution. Blocks without
    parameters are left out.

    A block extends from the end of the previous block to its own end.

    Args:
        model: an attached or plain model.
        sample: inputs (N, ...), as for `fa_bench.mechanisms.trace.trace_model`.
        blocks: as for `block_ends`.

    Raises:
        CoverageError: if a name matches no module.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    ends = block_ends(model, blocks)
    found: dict[str, list[str]] = {}
    current: list[str] = []
    seen: set[str] = set()

    def add(path: str, recurse: bool) -> None:
        # `named_parameters` is not used, because modules such as `Projection` override it.
        parts = modules[path].named_modules(prefix=path, remove_duplicate=False) if recurse else [(path, modules[path])]
        names = [
            f"{where}.{name}"
            for where, part in parts
            for name, parameter in part._parameters.items()
            if parameter is not None and not name.startswith(PREFIX)
        ]
        current.extend(name for name in names if name not in seen)
        seen.update(names)

    def after_module(path: str) -> None:
        add(path, recurse=True)  # a module such as attention may use a child's parameters without calling it
        if path in ends and current:
            found[path] = [*found.get(path, []), *current]
            current.clear()

    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: add(path, recurse=False)) for path, module in modules.items()
    ]
    handles += [module.register_forward_hook(lambda *_, path=path: after_module(path)) for path, module in modules.items()]
    args, kwargs = arguments(sample)
    try:
        with evaluating(model), restoring(model), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def embedding_of(model: nn.Module, blocks: dict[str, list[str]]) -> list[str]:
    """The names of the parameters of the model's embedding, which is the part of the first block before the module that ends the
    block.

    If that module has no parameters, as when a nonlinearity ends the first block, the embedding is the whole first block.

    Args:
        model: an attached or plain model.
        blocks: from `blocks_of`.
    """
    end, names = next(iter(blocks.items()), ("", []))
    return [name for name in names if not name.startswith(f"{end}.")]
