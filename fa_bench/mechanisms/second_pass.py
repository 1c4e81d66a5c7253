"""Additional forward passes of an attached model, with the same arguments and the same randomness, but with changes that a rule
requests.

A rule that sets `Rule.repeats` receives the `FirstPass` of every training pass. With `again` or `repeated`, the rule can rerun
the model with noise at cuts, with another input, or for forward-mode differentiation. Dropout masks are those of the first pass.
Batch normalisation in training mode uses the statistics of the pass's own batch, and updates its running statistics only in the
first pass. In additional passes, other buffers that the first pass has updated, such as the running means of a user-defined
normalisation layer, start from the values that they had before the first pass. Afterwards, their values from the end of the first
pass are restored.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fa_bench.errors import StateError
from fa_bench.mechanisms.contexts import (
    Place,
    own_buffers,
    same_randomness,
    set_temporarily,
    with_copies,
    without_running_statistics,
)
from fa_bench.mechanisms.graph import tensors_in
from fa_bench.mechanisms.processes import rank
from fa_bench.utils.sampling import seed_for

#: A function that returns a replacement for the tensor at a module's input or output, or None to leave it unchanged.
Change = Callable[[Tensor], "Tensor | None"]


#: For each model, the buffers that earlier passes updated, listed separately for passes with and without a module in training
#: mode. Only these buffers are copied before a pass. Before the first pass of each kind, all buffers are copied.
_updated: weakref.WeakKeyDictionary[nn.Module, dict[bool, set[tuple[int, str]]]] = weakref.WeakKeyDictionary()


class FirstPass:
    """The arguments of a training pass of the model, and the state in which it ran.

    Args:
        rule: the rule's name, for error messages.
        model: the model.
        args, kwargs: the arguments of the pass.

    Attributes:
        note: data of this pass that the rule needs in its backward pass.
        output: the output from which errors come, detached; None if the rule delivers no errors to cuts.
    """

    output: Tensor | None = None

    def __init__(self, rule: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rule, self.args, self.kwargs = rule, args, kwargs
        self.note: Any = None
        self._versions = [(tensor, tensor._version) for tensor in tensors_in((args, kwargs))]
        self._weights = [
            (path, module._parameters, key, parameter, parameter._version)
            for path, module in model.named_modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._modes = [(module, module.training) for module in model.modules()]
        self._buffers = EarlierBuffers(model, any(training for _, training in self._modes))
        self._random = torch.get_rng_state()
        devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
        self._random_on = {device: torch.cuda.get_rng_state(device) for device in devices}
        kinds = {"cpu", *(device.type for device in devices)}
        self._autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]

    @property
    def input_requires_grad(self) -> bool:
        """Whether any argument of the pass requires a gradient."""
        return any(tensor.requires_grad for tensor, _ in self._versions)

    def require_own_weights(self) -> None:
        """Raise a StateError if the model's parameters are not those of this pass, because further passes would use the new
        ones."""
        for path, of_module, key, parameter, _ in self._weights:
            if of_module.get(key) is not parameter:
                raise StateError(
                    f"rule '{self.rule}' runs the model again in the backward pass, but '{_name(path, key)}' was a different "
                    "tensor in the forward pass: copy new values into the model's own parameters before calling the model, "
                    "instead of replacing parameters or using torch.func.functional_call"
                )

    @contextmanager
    def surroundings(self, precise: bool = False) -> Iterator[None]:
        """A context that restores the random state, the modes and buffers of the modules, and the precision of the pass.

        Args:
            precise: whether autocast is off, for passes whose small differences would be lost in half precision.

        Raises:
            StateError: if an argument or a parameter was changed in place after the pass.
        """
        for tensor, version in self._versions:
            if tensor._version != version:
                raise StateError(
                    f"rule '{self.rule}' runs the model again in the backward pass, but an input of shape "
                    f"{tuple(tensor.shape)} was changed in place after the forward pass; pass a copy"
                )
        for path, _, key, parameter, version in self._weights:
            if parameter._version != version:
                raise StateError(
                    f"rule '{self.rule}' runs the model again in the backward pass, but '{_name(path, key)}' was changed after "
                    f"the forward pass; update the weights after the backward passes"
                )
        torch.set_rng_state(self._random)
        for device, state in self._random_on.items():
            torch.cuda.set_rng_state(state, device)
        with ExitStack() as stack:
            stack.enter_context(with_copies(self._buffers.values()))
            for mode in (True, False):
                changed = [module for module, training in self._modes if training == mode != module.training]
                stack.enter_context(set_temporarily(changed, "training", mode))
            for kind in ("cpu", *({"cuda"} if self._random_on else ())):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            for kind, dtype in () if precise else self._autocast:
                # Autocast's cache would still hold the weights from before a rule changed them.
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
            yield


class EarlierBuffers:
    """The values that buffers had before a pass that updates them. The object must be created when the pass starts.

    Args:
        model: the model.
        trains: whether any of its modules is in training mode.
    """

    def __init__(self, model: nn.Module, trains: bool) -> None:
        self._trains, self._updated = trains, _updated.setdefault(model, {})
        known = self._updated.get(trains)
        self._known = [
            (place, buffer, buffer._version, buffer.clone() if known is None or _key(place) in known else None)
            for place, buffer in own_buffers(model)
        ]
        self._values: list[tuple[Place, Tensor]] | None = None

    def values(self) -> list[tuple[Place, Tensor]]:
        """The buffers that the pass updated or replaced, with their earlier values. Call this method after the pass.

        Except before the first pass of each kind (see `_updated`), only buffers that previous passes updated were copied. For any
        other buffer that was changed in place, the current value is returned.
        """
        if self._values is None:
            updated = [
                (place, (copy if copy is not None else buffer))
                for place, buffer, version, copy in self._known
                if place[0].get(place[1]) is not buffer or buffer._version != version
            ]
            self._updated.setdefault(self._trains, set()).update(_key(place) for place, _ in updated)
            self._known, self._values = [], updated
        return self._values


def forget_updates(model: nn.Module) -> None:
    """Forget which buffers earlier passes updated, so that all buffers are copied before the next pass."""
    _updated.pop(model, None)


def _key(place: Place) -> tuple[int, str]:
    return id(place[0]), place[1]


@contextmanager
def repeated(
    model: nn.Module,
    mode: Any,
    first: FirstPass,
    args: tuple[Any, ...] | None = None,
    inputs: Mapping[str, Change] | None = None,
    outputs: Mapping[str, Change] | None = None,
    precise: bool = False,
) -> Iterator[Any]:
    """A context that yields the result of another forward pass of an attached model, in which the rule's own hooks change
    nothing.

    The pass records gradients if they are enabled. The backward pass must also run within the context, because activation
    checkpointing reruns parts of the forward pass during the backward pass.

    Args:
        model: the model.
        mode: `Rule.mode`.
        first: the pass that is repeated.
        args: replaces the positional arguments.
        inputs, outputs: path of a module -> function that changes the module's input, or output. To keep the tensor that it
            receives for use after the pass, such a function must copy it with `value_of`.
        precise: whether autocast is off.
    """
    handles = []
    try:
        for path, change in (inputs or {}).items():
            handles.append(model.get_submodule(path).register_forward_pre_hook(_at_input(change)))
        for path, change in (outputs or {}).items():
            handles.append(model.get_submodule(path).register_forward_hook(_at_output(change)))
        with (
            set_temporarily([mode], "exact", True),
            without_running_statistics(model),
            same_randomness(model),
            first.surroundings(precise),
        ):
            yield model(*(first.args if args is None else args), **first.kwargs)
    finally:
        for handle in handles:
            handle.remove()


def again(model: nn.Module, mode: Any, first: FirstPass, **changes: Any) -> Any:
    """The result of another forward pass, which records no gradients; the arguments are those of `repeated`."""
    with torch.no_grad(), repeated(model, mode, first, **changes) as result:
        return result


def _name(path: str, key: str) -> str:
    """The full name of a module's parameter within the model."""
    return f"{path}.{key}" if path else key


def value_of(tensor: Tensor) -> Tensor:
    """A copy of a module's input or output, for use after the pass; later modules may change the original in place."""
    return tensor.detach().clone()


def _at_input(change: Change) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        changed = change(args[0])
        return None if changed is None else (changed, *args[1:])

    return hook


def _at_output(change: Change) -> Any:
    return lambda module, args, output: change(output)


class Draws:
    """The random tensors of an attached rule, which are new for every backward pass. Each depends on the seed, the number of the
    backward pass and a name.

    Data-parallel processes have different samples. Therefore, their random tensors also depend on the rank, unless a tensor is
    requested as shared.

    Args:
        seed: seed of the rule.

    Attributes:
        number: the number of the current backward pass, counted from 1; passes of measurements are not counted.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.number = seed, 0

    def generator(self, name: str, device: torch.device, is_shared: bool = False) -> torch.Generator:
        """A generator whose seed depends on the rule's seed, the number of the backward pass, the name and, unless it is shared,
        the rank.

        Args:
            name: a name, for example that of a cut.
            device: the device of the generator.
            is_shared: whether all processes of a data-parallel run draw the same numbers.
        """
        return torch.Generator(device).manual_seed(seed_for(self.seed, self.number, name, 0 if is_shared else rank()))

    def normal(self, name: str, like: Tensor, is_shared: bool = False) -> Tensor:
        """A standard normal tensor in the shape and dtype of `like`; the other arguments are those of `generator`."""
        return torch.empty_like(like).normal_(generator=self.generator(name, like.device, is_shared))

    def shifts(self, name: str, count: int, high: int) -> Tensor:
        """A tensor of `count` random integers from 1 to `high` - 1, on the CPU."""
        return torch.randint(1, high, (count,), generator=self.generator(name, torch.device("cpu")))

    def state(self) -> dict[str, int]:
        """The state for checkpoints."""
        return {"seed": self.seed, "number": self.number}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.seed, self.number = int(state["seed"]), int(state["number"])
