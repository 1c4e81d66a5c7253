"""Models under ``torch.compile``: operators through which a compiled graph calls a rule's own code.

Most of a rule is traced into the graph unchanged. Parts that cannot be traced (local losses, labels that are known only in the
backward pass, samples that depend on a step's number) run as they would without compilation, inside an operator that the graph
treats as a black box. Such an operator gets tensors, numbers and the key of a `Handle`, by which it finds the object that it
belongs to.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from fa_bench.errors import CoverageError

#: The first version of torch that compiles every rule. Earlier compilers fail at convolutional layers, and torch 2.11 made all
#: gradients zero with derivative=dual.
COMPILING_TORCH = (2, 13)


class Handle:
    """A name for an object in compiled graphs. If a handle is copied or pickled with its owner, the copied handle names the
    copied owner.

    Args:
        owner: the object.

    Attributes:
        key: the name. Graphs contain it, so a graph compiled for one owner is never run for another. It is the smallest unused
            number, so repeating a run gives identical graphs, which compilers find in their cache.
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
    """Make graphs depend on the hooks of the modules that they were traced from.

    By default, torch ignores hooks when it reuses a graph, so a model whose rule works with hooks would run the graph of a plain
    model of the same shape. Graphs compiled earlier are discarded, because they ignore hooks as well.
    """
    import torch._dynamo.config as config

    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()


_REPEATS = "runs the model again in the backward pass, which no compiled graph can do; do not compile the model"
_NEEDS_MODEL = "needs a second forward pass of the whole model; compile the model, not"


def too_old_to_compile() -> str:
    """Why the installed torch cannot compile every rule; empty if it can."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version >= COMPILING_TORCH:
        return ""
    return f"torch {torch.__version__} cannot compile every rule, which needs {'.'.join(map(str, COMPILING_TORCH))} or later"


# With fullgraph=True, the compiler raises its own error, which contains the reason. Otherwise, it abandons the graph, and these
# functions raise their errors.
@torch.compiler.disable(reason=f"its rule {_REPEATS}")
def refuse_repeats(rule: str) -> None:
    """Raise the error for a rule with `Rule.repeats`, which cannot be compiled."""
    raise CoverageError(f"rule '{rule}' {_REPEATS}")


@torch.compiler.disable(reason=f"its rule {_NEEDS_MODEL} only a part of it")
def refuse_part(rule: str, path: str) -> None:
    """Raise the error for compiling only a part of the model."""
    raise CoverageError(f"rule '{rule}' {_NEEDS_MODEL} only its part '{path}'")


@torch.compiler.disable(reason="this version of torch cannot compile every rule")
def refuse_version(rule: str, problem: str) -> None:
    """Raise the error for a version of torch that cannot compile every rule; see `too_old_to_compile`."""
    raise CoverageError(f"rule '{rule}': {problem}; upgrade it, or do not compile the model")


def operator(schema: str, like: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that turns a function into the operator ``fa_bench::NAME``, whose code compilers do not trace.

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
        # The tags allow a compiler to choose the memory format of the arguments and forbid it to capture the operator in a CUDA
        # graph, which would repeat the kernels without running the Python code.
        _library.define(schema.replace(") ->", ", str key) ->"), tags=(torch.Tag.flexible_layout, *_tags("cudagraph_unsafe")))
        _library.impl(name, lambda *given: function(_handles[given[-1]].owner, *given[:-1]), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fa_bench::{name}", lambda *given: like(*given[:-1]), lib=_library)
        return getattr(torch.ops.fa_bench, name).default

    return register


def _tags(name: str) -> tuple[torch.Tag, ...]:
    """The operator tag with this name, as a tuple; empty if this version of torch does not have the tag."""
    tag = getattr(torch.Tag, name, None)
    return () if tag is None else (tag,)


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, dtype and device that occupies the memory of one number."""
    return tensor.detach().new_zeros(()).expand(tensor.shape)


@operator("new_sample(Tensor(a!) magnitudes) -> Tensor", like=lambda magnitudes: magnitudes.new_empty(2, dtype=torch.int32))
def new_sample(pathway: Any, magnitudes: torch.Tensor) -> torch.Tensor:
    """Announce a new sample of a layer's random magnitudes, which are overwritten when they are next read.

    Returns:
        The seed of the sample, for `fa_bench.utils.sampling.magnitudes`.
    """
    pathway.new_sample()
    return torch.tensor(pathway.seed_words(), dtype=torch.int32).to(magnitudes.device, non_blocking=True)


@operator("sampled(Tensor magnitudes) -> Tensor", like=torch.empty_like)
def sampled(pathway: Any, magnitudes: torch.Tensor) -> torch.Tensor:
    """The current random magnitudes |M| of a layer; `magnitudes` may not have been overwritten yet."""
    return pathway.sampled(magnitudes)
