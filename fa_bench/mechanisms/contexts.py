"""Context managers that change a model's state temporarily, or that restore the state of the random generators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fa_bench.mechanisms.feedback_tensors import PREFIX

#: The dictionary in which a module stores a buffer, and the buffer's key in it.
Place = tuple[dict[str, "Tensor | None"], str]


@contextmanager
def set_temporarily(objects: Iterable[Any], attribute: str, value: Any) -> Iterator[None]:
    """A context in which the attribute of every object is set to this value."""
    before = [(one, getattr(one, attribute)) for one in objects]
    for one, _ in before:
        setattr(one, attribute, value)
    try:
        yield
    finally:
        for one, earlier in before:
            setattr(one, attribute, earlier)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """A context in which every module is in training mode, or in evaluation mode if `training` is False. The exceptions are
    modules whose own ``train`` method sets another mode.

    On exit, the earlier mode of every module is restored.
    """
    modes = modes_of(model)
    for module, _ in modes:
        module.training = training
    try:
        model.train(training)
        yield
    finally:
        restore_modes(modes)


def modes_of(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Every module of the model, paired with whether it is in training mode."""
    return [(module, module.training) for module in model.modules()]


def restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Restore the modes that `modes_of` returned.

    If a module overrides ``train``, that method is called, because it may change more than the attribute. Some modules, for
    example, merge weights for evaluation.
    """
    for module, training in modes:
        if type(module).train is not nn.Module.train:
            module.train(training)
    for module, training in modes:
        module.training = training


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which every module is in evaluation mode; see `in_mode`."""
    return in_mode(model, False)


def all_require_grad(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which every floating-point parameter requires gradients, even if it was frozen."""
    return set_temporarily([p for p in model.parameters() if p.is_floating_point()], "requires_grad", True)


#: Names of the attributes that hold the dropout rate in modules of PyTorch and other libraries that call dropout as a function.
_DROPOUT_RATES = ("dropout", "dropout_p", "attention_dropout", "activation_dropout", "dropout_prob", "dropout_rate", "drop_prob")


@contextmanager
def without_side_effects(model: nn.Module) -> Iterator[None]:
    """A context in which dropout is off, and normalisation in training mode uses the batch's statistics without updating its
    running statistics.

    On exit, the buffers of other modules (see `own_buffers`) and the state of the random generators are restored.
    """
    dropouts = [
        m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) or type(m).__name__ == "StochasticDepth"
    ]
    with ExitStack() as stack:
        stack.enter_context(set_temporarily(dropouts, "training", False))
        stack.enter_context(set_temporarily(dropouts, "p", 0.0))  # attention may pass this rate to a function
        stack.enter_context(without_running_statistics(model))
        for name in _DROPOUT_RATES:
            rates = [m for m in model.modules() if isinstance(getattr(m, name, None), float)]
            stack.enter_context(set_temporarily(rates, name, 0.0))
        stack.enter_context(restoring(model))
        yield


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """A context that, on exit, restores the buffers of the model (see `own_buffers`) and the state of the random generators."""
    with with_copies(list(own_buffers(model))), same_randomness(model):
        yield


def own_buffers(model: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    """Pairs (place, buffer) for the buffers that a forward pass may update even within `without_running_statistics`, such as the
    running means of a user-defined normalisation layer. The buffers of rules are not included."""
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            for key, buffer in module._buffers.items():
                if buffer is not None and not key.startswith(PREFIX):
                    yield (module._buffers, key), buffer


@contextmanager
def with_copies(values: list[tuple[Place, Tensor]]) -> Iterator[None]:
    """A context in which buffers are replaced with copies of these values; on exit, the original tensors are restored.

    Values are not copied back, because autograd would treat that as an in-place change of the tensors that it has saved.
    """
    copies: dict[int, Tensor] = {}
    before = [(place, place[0].get(place[1])) for place, _ in values]
    for (buffers, key), value in values:
        if id(value) not in copies:  # modules may share a buffer
            copies[id(value)] = value.detach().clone()
        buffers[key] = copies[id(value)]
    try:
        yield
    finally:
        for (buffers, key), earlier in before:
            buffers[key] = earlier


@contextmanager
def without_running_statistics(model: nn.Module) -> Iterator[None]:
    """A context in which normalisation in training mode uses the batch's statistics and leaves the running statistics
    unchanged."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    # Instance normalisation ignores this attribute and updates its running statistics, but with momentum 0 they do not change.
    instances = [m for m in norms if isinstance(m, nn.modules.instancenorm._InstanceNorm)]
    with set_temporarily(norms, "track_running_stats", False), set_temporarily(instances, "momentum", 0.0):
        yield


@contextmanager
def same_randomness(model: nn.Module) -> Iterator[None]:
    """A context that, on exit, restores the state of the random generators of the CPU and of the GPUs that the model uses."""
    with torch.random.fork_rng({parameter.device for parameter in model.parameters() if parameter.is_cuda}):
        yield
