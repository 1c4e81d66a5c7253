"""The multiplications, bytes moved and peak memory of a training step, counted by running steps on a few samples.

The counts depend on the shapes of tensors but not on their values. Steps with batches of two, three and four samples determine
the counts for any batch size.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fa_bench.mechanisms.contexts import set_temporarily
from fa_bench.mechanisms.feedback_tensors import PREFIX
from fa_bench.mechanisms.rule import Rule
from fa_bench.mechanisms.trace import loss_output
from fa_bench.optim.optimizers import Optimizers
from fa_bench.registry.kinds import CLASSES, IMAGES, TOKENS, VALUES

#: Sizes of the batches that are run to determine the counts for any batch size.
_BATCHES = (2, 3, 4)
_ATEN = torch.ops.aten
#: Formulas for the CPU's attention operations, which torch's table lacks. The backward pass of attention recomputes the scores,
#: so it takes five matrix products instead of four.
_ATTENTION: dict[Any, Callable[..., int]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query.shape, key.shape, value.shape
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda error, query, key, value, *_, **__: (
        sdpa_backward_flop_count(error.shape, query.shape, key.shape, value.shape)
    ),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one training step.

    Attributes:
        forward, backward, feedback: multiplications (each with its addition) in matrix products and convolutions. They are
            counted separately for the forward pass (including the loss), for the backward pass, and for learning the feedback,
            during the backward pass or after it.
        optimizer: multiplications of the optimizer, if it was counted; most optimizers have none.
        bytes_moved: bytes of the inputs and outputs of all operations, as if none were fused and nothing stayed in a cache. The
            optimizer's bytes are included if it was counted.
        peak_memory: the largest number of bytes that tensors occupy at any time: parameters, buffers, feedback, states of the
            optimizer, the batch, activations and gradients; excluding memory that a single operation allocates temporarily.
    """

    forward: int
    backward: int
    feedback: int
    bytes_moved: int
    peak_memory: int
    optimizer: int = 0

    @property
    def multiplications(self) -> int:
        """The total number of multiplications in the step."""
        return self.forward + self.backward + self.feedback + self.optimizer

    def record(self) -> dict[str, int]:
        """The costs as the entries of a run's result."""
        return {"multiplications": self.multiplications, **dataclasses.asdict(self)}


class Counter(TorchDispatchMode):
    """Counts multiplications, bytes moved and bytes of new tensors for all operations, including those of a backward pass.

    This class replaces torch's FlopCounterMode, which hooks modules and fails if a backward pass itself calls autograd.

    Attributes:
        multiplications, moved: the numbers of multiplications and of bytes moved so far.
        new: after each operation, the bytes of all live tensors that were created since counting began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiplications, self.moved = 0, 0
        self.new: list[int] = []
        self._alive: dict[int, int] = {}
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = func._overloadpacket
        if operation is torch.ops.aten.convolution_backward:
            self.multiplications += _convolution_backward(*args)
        elif operation in flop_registry:
            self.multiplications += flop_registry[operation](*args, **kwargs, out_val=out) // 2
        elif operation in _ATTENTION:
            self.multiplications += _ATTENTION[operation](*args, **kwargs) // 2
        inputs = {id(tensor): tensor for tensor in _tensors((*args, *kwargs.values()))}
        outputs = {id(tensor): tensor for tensor in _tensors((out,))}
        read = {id(tensor.untyped_storage()) for tensor in inputs.values()}
        written = {id(storage): storage for tensor in outputs.values() for storage in [tensor.untyped_storage()]}
        is_view = written.keys() <= read
        if func._schema.is_mutable:
            self.moved += sum(map(_size, (*inputs.values(), *_mutated(func._schema, args, kwargs))))
        elif not is_view and "empty" not in operation.__name__:
            self.moved += sum(map(_size, (*inputs.values(), *outputs.values())))
        for key, storage in written.items():
            if key not in read and key not in self._alive:
                self._alive[key] = storage.nbytes()
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, key).atexit = False
        self.new.append(self._bytes)
        return out

    def _freed(self, key: int) -> None:
        self._bytes -= self._alive.pop(key)


def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *others: Any
) -> int:
    """The number of multiplications that the gradients of a convolution take. Each gradient takes as many multiplications as the
    forward pass. For grouped convolutions, torch's own count is too high."""
    needs_x, needs_weight, _ = others[-1]
    return (int(needs_x) + int(needs_weight)) * (x if transposed else g).numel() * weight[0].numel()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among these values, including those in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _mutated(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes in place, whether or not it returns them."""
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    return list(_tensors(given[argument.name] for argument in schema.arguments if argument.is_write and argument.name in given))


def _size(tensor: Tensor) -> int:
    """The number of bytes that a tensor occupies. An expanded tensor, which repeats values without copying them, occupies only
    the bytes of its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def counting() -> Iterator[Counter]:
    """A context manager that counts the operations in its body.

    Recurrent modules run as the individual operations of their cells, not as one opaque kernel. The garbage collector is
    disabled, because its timing would make the count depend on earlier code.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with set_temporarily([torch.backends.mkldnn], "enabled", False), Counter() as counter:
            yield counter
    finally:
        if was_enabled:
            gc.enable()


def multiplications(step: Callable[[], None]) -> int:
    """The number of multiplications in the matrix products and convolutions of one step."""
    with counting() as counter:
        step()
    return counter.multiplications


def at_batch(counts: Sequence[int], batch: int) -> int:
    """The count for a batch of `batch` samples, extrapolated from the counts for 2, 3 and 4 samples.

    The result is exact if the count is a polynomial of degree at most two in the batch size. The cost of most operations
    is linear in the batch size, the cost of similarities between samples is quadratic, and the cost of learning from a fixed
    number of noise samples is constant.
    """
    two, three, four = counts
    beyond = batch - _BATCHES[0]
    return two + beyond * (three - two) + beyond * (beyond - 1) // 2 * (four - 2 * three + two)


class _Step(NamedTuple):
    """The counts of operations in one step.

    Attributes:
        multiplications: in the forward pass, in the backward pass, for learning the feedback in the backward pass, in the
            optimizer, and after the optimizer.
        moved: bytes moved in the forward pass, in the backward pass, and after it.
        new: bytes of new tensors, see `Counter`.
    """

    multiplications: tuple[int, int, int, int, int]
    moved: tuple[int, int, int]
    new: list[int]


def step_costs(
    rule: Rule,
    input_shape: tuple[int, ...],
    classes: int,
    batch: int,
    inputs: str = IMAGES,
    targets: str = CLASSES,
    optimizers: Callable[[], Optimizers] | None = None,
    accumulate: int = 1,
) -> tuple[Cost, Cost]:
    """The costs of one training step with the rule, and of one with backpropagation in the same model.

    The function runs small steps on random inputs. The steps change gradients, running statistics, feedback and, with
    `optimizers`, the weights, so pass a rule that will not be trained further.

    Args:
        rule: an attached rule.
        input_shape: shape of one input, without the batch.
        classes: number of classes, of outputs, or of tokens.
        batch: the batch size of the step.
        inputs, targets: their kinds (`fa_bench.registry.kinds`).
        optimizers: creates the optimizers; None: their operations and states are not counted.
        accumulate: the number of micro-batches into which the batch is split.
    """
    model, learned = rule.model, rule.feedback_parameters()
    model.train()

    def samples(size: int) -> tuple[Tensor, Tensor]:
        return _samples(next(model.parameters()).device, (size, *input_shape), classes, inputs, targets)

    def steps(own: Optimizers | None, exact: bool = False) -> list[_Step]:
        state, found = rule.state_dict(), []
        # The first step creates the states of optimizers and all tensors that the rule keeps.
        for size in (_BATCHES[0], *_BATCHES):
            found.append(_step(rule, samples(size), own, exact))
            if state:  # so that the same step is counted every time, if a rule's steps differ
                rule.load_state_dict(state)
        return found[1:]

    with rule.exact():
        plain = optimizers() if optimizers is not None else None  # also trains parameters that the rule has frozen
        reference = steps(plain, exact=True)
    own = optimizers() if optimizers is not None else None
    if own is not None:
        own.share_gradients()
    fixed: list[int] = []
    if learned:
        with set_temporarily(learned, "requires_grad", False):
            fixed = [step.multiplications[1] for step in steps(None)]
    with_rule = steps(own)
    if fixed:
        with_rule = [
            step._replace(multiplications=(forward, backward, both - backward, *after))
            for step, backward in zip(with_rule, fixed, strict=True)
            for forward, both, _, *after in [step.multiplications]
        ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    others = [tensor for name, tensor in tensors if not name.rpartition(".")[2].startswith(PREFIX)]
    sizes = [len(part) for part in torch.empty(batch).tensor_split(min(accumulate, batch))]

    def resident(present: Iterable[Tensor], of: Optimizers | None) -> int:
        gradients = model.parameters() if len(sizes) > 1 else ()
        return sum(map(_size, (*present, *gradients, *optimizer_states(of)))) + batch * sum(map(_size, samples(1)))

    return (
        _cost(with_rule, sizes, resident([tensor for _, tensor in tensors], own)),
        _cost(reference, sizes, resident(others, plain)),
    )


def optimizer_states(optimizers: Optimizers | None) -> list[Tensor]:
    """The tensors that optimizers keep for their parameters. The list is empty without optimizers and before their first step."""
    return [
        value
        for optimizer in (optimizers.optimizers if optimizers is not None else ())
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]


def _samples(device: torch.device, shape: tuple[int, ...], classes: int, inputs: str, targets: str) -> tuple[Tensor, Tensor]:
    """A random batch of inputs and targets."""
    x = torch.randint(classes, shape, device=device) if inputs == TOKENS else torch.randn(shape, device=device)
    if targets == VALUES:
        return x, torch.randn(shape[0], classes, device=device)
    return x, torch.arange(shape[0], device=device) % classes if targets == CLASSES else x % classes


def _step(rule: Rule, data: tuple[Tensor, Tensor], optimizers: Optimizers | None, exact: bool) -> _Step:
    """Run one step and count its operations. The gradients of earlier steps are removed first."""
    x, y = data
    indices = torch.arange(len(y)) % (rule.sample_count or len(y))
    rule.model.zero_grad()
    # In a data-parallel run, only one process executes this step, so it must not wait for the others.
    with set_temporarily([rule.mode], "alone", True), counting() as counter:
        logits = loss_output(rule.model(x), rule.loss_output)
        loss = rule.objective.loss(logits, y)
        forward = counter.multiplications, counter.moved
        rule.backward(loss, logits, y, indices=indices)
        backward = counter.multiplications - forward[0], counter.moved - forward[1]
        del logits, loss
        before_optimizer = counter.multiplications
        if optimizers is not None:
            optimizers.step()
        of_optimizer = counter.multiplications - before_optimizer
        if not exact:
            rule.step()
        after = counter.multiplications - before_optimizer - of_optimizer, counter.moved - forward[1] - backward[1]
    return _Step((forward[0], backward[0], 0, of_optimizer, after[0]), (forward[1], backward[1], after[1]), counter.new)


def _cost(steps: Sequence[_Step], sizes: Sequence[int], resident: int) -> Cost:
    """The cost of a step, computed from the counts for a few samples, the sizes of the micro-batches, and the bytes in use
    throughout the step."""
    *products, of_optimizer, products_after = zip(*(step.multiplications for step in steps), strict=True)
    *moved, moved_after = zip(*(step.moved for step in steps), strict=True)
    forward, backward, feedback = (sum(at_batch(counts, size) for size in sizes) for counts in products)
    return Cost(
        forward,
        backward,
        feedback + at_batch(products_after, sum(sizes)),
        sum(at_batch(counts, size) for counts in moved for size in sizes) + at_batch(moved_after, sum(sizes)),
        resident + _peak([step.new for step in steps], max(sizes)),
        at_batch(of_optimizer, sum(sizes)),
    )


def _peak(new: Sequence[Sequence[int]], batch: int) -> int:
    """The peak number of bytes of new tensors in a step with `batch` samples.

    The operation at which the peak occurs may depend on the batch size, so a polynomial is fitted for each operation. If the
    number of operations depends on the batch size, a single polynomial is fitted to the peaks.
    """
    at_a_time = zip(*new, strict=True) if len(set(map(len, new))) == 1 else [[max(series) for series in new]]
    return max(at_batch(counts, batch) for counts in at_a_time)
