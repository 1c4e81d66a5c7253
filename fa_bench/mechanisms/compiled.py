"""Operators through which a graph compiled by ``torch.compile`` calls a rule's own code.

Most of a rule is traced into the graph unchanged. Parts that cannot be traced (local losses, errors that depend on the labels,
random samples that depend on a counter) run as they would without compilation, inside an operator that the graph treats as a
black box. The last argument of each operator is the key of a `Handle`, with which the operator looks up the object that it works
on.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from fa_bench.errors import CoverageError

#: The first version of torch whose compiler works for all rules that do not set `Rule.repeats`. Earlier compilers fail on
#: convolutional layers, and torch 2.11 sets all gradients to zero with derivative=dual.
COMPILING_TORCH = (2, 13)


class Handle:
    """A name by which compiled graphs refer to an object. If a handle is copied or pickled with its owner, the new handle
    refers to the new owner.

    Args:
        owner: the object.

    Attributes:
        key: the name. Graphs contain it, so a graph compiled for one owner is not run for another that exists at the same time.
            The key is the smallest unused number, so repeating a run produces identical graphs, which compilers find in their
            cache.
    """

    def __init__(self, owner: Any) -> None:
        self.__setstate__(owner)

    def __getstate__(self) -> Any:
        return self.owner

    def __setstate__(self, owner: Any) -> None:
        self.owner = owner
        self.key = next(key for key in map(str, itertools.count()) if key not in _handles)
        _handles[self.key] = self


_handles: weakref.WeakValueDictionary[str, Handle] = weakref.WeakValueDictionary()
_library = torch.library.Library("fa_bench", "DEF")


def guard_hooks() -> None:
    """Make compiled graphs depend on the hooks of the modules from which they were traced.

    By default, torch ignores hooks when it reuses a graph, so a model whose rule uses hooks would run the graph of a plain model
    of the same shape. Previously compiled graphs are discarded, because they ignore hooks as well.
    """
    import torch._dynamo.config as config

    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()


_REPEATS = "runs the model again in the backward pass, which no compiled graph can do; do not compile the model"
_NEEDS_MODEL = "needs a second forward pass of the whole model; compile the model, not"


def too_old_to_compile() -> str:
    """An error message if the installed version of torch is older than `COMPILING_TORCH`, and an empty string otherwise."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version >= COMPILING_TORCH:
        return ""
    return f"compiling a model with a rule requires torch {'.'.join(map(str, COMPILING_TORCH))} or later, not {torch.__version__}"


# With fullgraph=True, the compiler raises its own error, which quotes the reason given here. Otherwise, there is a graph break,
# and these functions raise their own errors.
@torch.compiler.disable(reason=f"its rule {_REPEATS}")
def refuse_repeats(rule: str) -> None:
    """Raise an error because a rule with `Rule.repeats` cannot be compiled."""
    raise CoverageError(f"rule '{rule}' {_REPEATS}")


@torch.compiler.disable(reason=f"its rule {_NEEDS_MODEL} only a part of it")
def refuse_part(rule: str, path: str) -> None:
    """Raise an error because only a part of the model is being compiled."""
    raise CoverageError(f"rule '{rule}' {_NEEDS_MODEL} only its part '{path}'")


@torch.compiler.disable(reason="compiling a model with a rule requires a later version of torch")
def refuse_version(rule: str, problem: str) -> None:
    """Raise an error because this version of torch is too old; `problem` is the result of `too_old_to_compile`."""
    raise CoverageError(f"rule '{rule}': {problem}; upgrade torch, or do not compile the model")


def operator(schema: str, like: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that turns a function into the operator ``fa_bench::NAME``, whose code is not traced by compilers.

    The operator's last argument is the key of a handle, and the function's first argument is the owner of that handle. The
    function must not return its arguments or views of them. Unlike in `torch.library.custom_op`, autograd works within the
    function.

    Args:
        schema: name, arguments and results, without the key. Compilers keep graphs on disk, so if the memory format of the
            results changes, the operator needs a new name.
        like: used by compilers; takes the arguments without the key and returns tensors like the results.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        # The tags allow a compiler to choose the memory format of the arguments, and prevent it from capturing the operator in a
        # CUDA graph. A CUDA graph would replay the kernels without running the Python code.
        _library.define(schema.replace(") ->", ", str key) ->"), tags=(torch.Tag.flexible_layout, *_tags("cudagraph_unsafe")))
        _library.impl(name, lambda *given: function(_handles[given[-1]].owner, *given[:-1]), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fa_bench::{name}", lambda *given: like(*given[:-1]), lib=_library)
        return getattr(torch.ops.fa_bench, name).default

    return register


def _tags(name: str) -> tuple[torch.Tag, ...]:
    """A tuple with the operator tag of this name, or an empty tuple if this version of torch does not have the tag."""
    tag = getattr(torch.Tag, name, None)
    return () if tag is None else (tag,)


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, dtype and device that uses the memory of a single number."""
    return tensor.detach().new_zeros(()).expand(tensor.shape)


@operator("new_sample(Tensor(a!) magnitudes) -> Tensor", like=lambda magnitudes: magnitudes.new_empty(2, dtype=torch.int32))
def new_sample(pathway: Any, magnitudes: torch.Tensor) -> torch.Tensor:
    """Request a new sample of a layer's random magnitudes, which are overwritten the next time they are read.

    Returns:
        The seed of the sample as a tensor of two integers, for `fa_bench.utils.sampling.magnitudes`.
    """
    pathway.new_sample()
    return torch.tensor(pathway.seed_words(), dtype=torch.int32).to(magnitudes.device, non_blocking=True)


@operator("sampled(Tensor magnitudes) -> Tensor", like=torch.empty_like)
def sampled(pathway: Any, magnitudes: torch.Tensor) -> torch.Tensor:
    """The current random magnitudes |M| of a layer, even if `magnitudes` has not been overwritten with them yet."""
    return pathway.sampled(magnitudes)
