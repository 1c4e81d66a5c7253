"""Further forward passes of an attached model: the same arguments and the same randomness, with changes where a rule wants them.

A rule that sets `Rule.repeats` gets the `FirstPass` of every training pass, and runs the model again with `again`: with noise at
cuts, another input, or in forward-mode differentiation. Dropout masks are those of the first pass. Batch normalisation in
training mode uses the statistics of the pass's own batch, and updates its running ones in the first pass only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fa_bench.errors import StateError
from fa_bench.mechanisms.contexts import same_randomness, set_temporarily, without_running_statistics
from fa_bench.mechanisms.graph import nodes_from, tensors_in
from fa_bench.mechanisms.trace import named_results
from fa_bench.utils.sampling import seed_for

#: A change of the tensor at a module's input or output; None leaves it as it is.
Change = Callable[[Tensor], "Tensor | None"]


class FirstPass:
    """The arguments and the surroundings of a training pass of the model.

    Args:
        rule: the rule's name, for error messages.
        model: the model.
        args, kwargs: what it is called with.

    Attributes:
        note: what the rule wants to know of this pass in its backward pass.
        output: the output from which errors come, detached; None if the rule delivers none to cuts.
    """

    output: Tensor | None = None

    def __init__(self, rule: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rule, self.args, self.kwargs = rule, args, kwargs
        self.note: Any = None
        self._outputs: dict[str, weakref.ref[Tensor]] = {}
        self._versions = [(tensor, tensor._version) for tensor in tensors_in((args, kwargs))]
        self._random = torch.get_rng_state()
        devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
        self._random_on = {device: torch.cuda.get_rng_state(device) for device in devices}
        kinds = {"cpu", *(device.type for device in devices)}
        self._autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_outputs": {}}  # no copy of the model has computed them

    def remember(self, output: Any) -> None:
        """Remember the output of the pass, for `name_of`."""
        self._outputs = {name: weakref.ref(tensor) for name, tensor in named_results(output).items()}

    def _alive(self) -> dict[str, Tensor]:
        return {name: output for name, reference in self._outputs.items() if (output := reference()) is not None}

    @property
    def is_alive(self) -> bool:
        """Whether something still refers to an output."""
        return bool(self._alive())

    def name_of(self, logits: Tensor) -> str | None:
        """The name of the output of this pass that these logits are, or from which they were computed; None if there is none."""
        outputs = self._alive()
        for name, output in outputs.items():
            if output is logits:
                return name
        nodes = nodes_from([logits.grad_fn]) if logits.grad_fn is not None else set()
        return next((name for name, output in outputs.items() if output.grad_fn in nodes), None)

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """A context with the random state and the precision of the pass.

        Raises:
            StateError: if an argument was changed in place since.
        """
        for tensor, version in self._versions:
            if tensor._version != version:
                raise StateError(f"rule '{self.rule}' runs the model again in the backward pass, but an input of shape "
                                 f"{tuple(tensor.shape)} was changed in place after the forward pass: pass a copy")
        torch.set_rng_state(self._random)
        for device, state in self._random_on.items():
            torch.cuda.set_rng_state(state, device)
        with ExitStack() as stack:
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            yield


@contextmanager
def repeated(
    model: nn.Module, mode: Any, first: FirstPass, args: tuple[Any, ...] | None = None,
    inputs: Mapping[str, Change] | None = None, outputs: Mapping[str, Change] | None = None,
) -> Iterator[Any]:
    """A context with the result of another forward pass of an attached model, in which the rule's own hooks change nothing.

    The pass has gradients if they are enabled. Its backward pass must run within the context, because activation checkpointing
    runs parts of the forward pass again then.

    Args:
        model: the model.
        mode: `Rule.mode`.
        first: the pass that is repeated.
        args: replaces the positional arguments.
        inputs, outputs: module's path -> change of the tensor at its input, or output.
    """
    handles = []
    try:
        for path, change in (inputs or {}).items():
            handles.append(model.get_submodule(path).register_forward_pre_hook(_at_input(change)))
        for path, change in (outputs or {}).items():
            handles.append(model.get_submodule(path).register_forward_hook(_at_output(change)))
        with set_temporarily([mode], "exact", True), without_running_statistics(model), same_randomness(model), \
                first.surroundings():
            yield model(*(first.args if args is None else args), **first.kwargs)
    finally:
        for handle in handles:
            handle.remove()


def again(model: nn.Module, mode: Any, first: FirstPass, **changes: Any) -> Any:
    """The result of another forward pass that is not differentiated; the arguments are those of `repeated`."""
    with torch.no_grad(), repeated(model, mode, first, **changes) as result:
        return result


def _at_input(change: Change) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        changed = change(args[0])
        return None if changed is None else (changed, *args[1:])

    return hook


def _at_output(change: Change) -> Any:
    return lambda module, args, output: change(output)


class Draws:
    """The random tensors of an attached rule, new ones for every update; each depends on the seed, a number and a name only.

    Processes of a data-parallel run have different samples, and therefore draw different noise for them.

    Args:
        seed: seed of the rule.

    Attributes:
        number: of the present ones.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.number = seed, 0

    def generator(self, name: str, device: torch.device, is_shared: bool = False) -> torch.Generator:
        """A generator that is seeded by the number and the name.

        Args:
            name: for example a cut.
            device: the generator's.
            is_shared: whether all processes of a data-parallel run draw the same.
        """
        return torch.Generator(device).manual_seed(seed_for(self.seed, self.number, name, 0 if is_shared else _rank()))

    def normal(self, name: str, like: Tensor, is_shared: bool = False) -> Tensor:
        """A standard normal tensor in the shape and dtype of `like`; arguments as for `generator`."""
        return torch.empty_like(like).normal_(generator=self.generator(name, like.device, is_shared))

    def shifts(self, name: str, count: int, high: int) -> Tensor:
        """`count` whole numbers from 1 to `high` - 1, on the CPU."""
        return torch.randint(1, high, (count,), generator=self.generator(name, torch.device("cpu")))

    def state(self) -> dict[str, int]:
        """For checkpoints."""
        return {"seed": self.seed, "number": self.number}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.seed, self.number = int(state["seed"]), int(state["number"])


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
