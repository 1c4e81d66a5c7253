"""Data-parallel runs: the processes that torchrun starts for one run, and the data that they exchange.

Every process builds the same model with the same rule and trains on its part of every batch; DistributedDataParallel averages the
gradients. The parts, the augmentation and the weights of the losses are chosen so that the update equals that of a single process
with the whole batch, apart from rounding and from the differences that `Processes.notes` describes. All processes perform all
measurements, so that none waits for another, but only process 0 writes.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fa_bench.callbacks.base import Callback
from fa_bench.errors import ConfigError, describe_error
from fa_bench.mechanisms.feedback_tensors import PREFIX
from fa_bench.objectives.base import Objective
from fa_bench.utils.lazy import nn, torch
from fa_bench.utils.sampling import seed_for
from fa_bench.utils.stopping import Interrupted, StopRequest

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

    from fa_bench.runs.loop import Progress, Trainer

#: The longest time for which an exchange waits for a process that has neither ended nor answered. The end of a process is noticed
#: immediately.
TIMEOUT = timedelta(minutes=10)
#: The number of seconds between two checks for a message from process 0 before training.
_INTERVAL = 0.05
#: The environment variables that torchrun sets for each process.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: The keys in the store that the processes share.
_MESSAGE, _REPORTED, _ERROR = "fa_bench/message", "fa_bench/reported", "fa_bench/error"
#: A pattern that matches torch's error messages if another process has ended or does not answer.
_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|[Tt]imed out|Socket Timeout", re.IGNORECASE)


class ProcessLost(Exception):
    """Another process of the run has ended or does not respond.

    Attributes:
        reason: the error that the other process has reported; empty if there is none.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(f"another process of this run has ended ({reason})" if reason else "lost another process of this run")
        self.reason = reason


class World:
    """The processes that train a run together. This class is for a run with a single process; its subclass `Processes` is for
    one of several processes.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        stops_together: whether all processes have agreed to stop after the same step.
        has_lost: whether another process has ended.
    """

    rank, size = 0, 1
    stops_together, has_lost = True, False

    # -------------------------------------------------------------------------------------------- messages
    def announce(self, message: Any) -> None:
        """Send a message, which must be serialisable as JSON, from process 0 to the processes that `listen`."""

    def listen(self) -> Any:
        """Wait for the next message from process 0, without a time limit."""
        raise NotImplementedError

    def report(self, line: str) -> None:
        """Print an error on standard error. If several processes report errors, only the first report is printed."""
        print(line, file=sys.stderr)

    def explained(self, error: BaseException) -> BaseException:
        """Return `error`, or a ProcessLost error if `error` means that another process has ended."""
        return error

    # -------------------------------------------------------------------------------------------- exchanges
    # Every process must call the methods of this section at the same point.
    def from_main(self, value: Any) -> Any:
        """Return the value that process 0 passed to this method."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of the processes."""
        return [value]

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return value

    def totals(self, progress: Progress) -> Progress:
        """The progress of the whole run, with the sums over the parts of all processes."""
        return progress

    def whole_batch(self, x: Tensor, y: Tensor, share: Callable[[int], Tensor] | None, size: int) -> tuple[Tensor, Tensor]:
        """Collect the whole batch of `size` samples in order (on the CPU if there are several processes). Each process passes the
        inputs and targets of its part."""
        return x, y

    def same_buffers(self, model: torch_nn.Module) -> None:
        """Copy the buffers of process 0, such as running statistics, to all processes. Feedback is not copied."""

    def due(self, wanted: bool) -> bool:
        """Whether all processes now take an action that one of them has requested. A single process takes it immediately, and
        several processes take it one step later."""
        return wanted

    def check(self, stop: StopRequest) -> None:
        """Raise Interrupted if one of the processes was asked to stop."""
        stop.check()

    # -------------------------------------------------------------------------------------------- training
    def device(self, name: str) -> str:
        """The device of this process for the run's option `device`, which must not be auto."""
        return name

    def share(self, accumulate: int = 1) -> Callable[[int], Tensor] | None:
        """A function that returns the positions of this process's samples in a batch, given the size of the batch. The result is
        None instead if this process has all samples."""
        return None

    def begin_step(self, seed: int, step: int) -> None:
        """Make the random numbers of dropout independent of those of the other processes."""

    def wrapped(self, model: torch_nn.Module) -> Any:
        """The module to call in training, which wraps the model if there are several processes."""
        return model

    def micro_batches(
        self, x: Tensor, y: Tensor, size: int, accumulate: int, objective: Objective
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yield the micro-batches in this process's part of a batch of `size` samples, each with the weight of its loss.

        Summed over the micro-batches and averaged over the processes, the weighted losses amount to the mean loss of the batch
        over the targets that count.
        """
        count = min(accumulate, len(y))
        if count == 1:
            yield x, y, 1
            return
        counted = max(int(objective.counted(y)), 1)
        for part_x, part_y in zip(x.tensor_split(count), y.tensor_split(count), strict=True):
            yield part_x, part_y, int(objective.counted(part_y)) / counted

    def synchronised(self, model: torch_nn.Module) -> torch_nn.Module:
        """The model with batch normalisation over the batches of all processes."""
        return model

    def notes(self, model: torch_nn.Module, synchronised: bool, notes: tuple[str, ...]) -> list[str]:
        """Lines for the log about the processes, and about reasons why the results differ from those of a single process. `notes`
        are the notes on the rule's coverage."""
        return []


class Processes(World):
    """One of several processes that train a run together.

    Args:
        rank, size: see `World`.
        local_rank: the number of this process on its machine.
        store: the store that the processes share; their process group must have been initialised.
    """

    def __init__(self, rank: int, size: int, local_rank: int, store: Any) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.stops_together = self.has_lost = False
        self._store, self._messages, self._stderr = store, 0, sys.stderr
        self._wanted = self._due = False
        self._wrapped: Any = None

    # -------------------------------------------------------------------------------------------- messages
    def announce(self, message: Any) -> None:
        with self._talking():
            self._messages += 1
            self._store.set(f"{_MESSAGE}{self._messages}", json.dumps(message))

    def listen(self) -> Any:
        self._messages += 1
        key = f"{_MESSAGE}{self._messages}"
        with self._talking():
            # This polls instead of waiting within torch, because Python does not see signals during such a wait.
            while not self._store.check([key]):
                if self._store.check([_ERROR]):
                    raise self._lost()
                time.sleep(_INTERVAL)
            return json.loads(self._store.get(key))

    def report(self, line: str) -> None:
        is_first = True
        with suppress(RuntimeError):  # the store may have ended together with its process
            is_first = self._store.add(_REPORTED, 1) == 1
            if is_first:
                self._store.set(_ERROR, line)
        if is_first:
            with suppress(OSError, ValueError):
                print(line, file=self._stderr, flush=True)

    def explained(self, error: BaseException) -> BaseException:
        is_lost = isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
        return self._lost() if is_lost else error

    def _lost(self) -> ProcessLost:
        """A ProcessLost error, with the error that another process has reported, if there is one."""
        self.has_lost, reason = True, ""
        with suppress(RuntimeError):
            if self._store.check([_ERROR]):
                reason = self._store.get(_ERROR).decode().removeprefix("fa-bench: ")
        return ProcessLost(reason)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Within the block, convert torch's errors to ProcessLost, because they mean that another process has ended."""
        try:
            yield
        except RuntimeError:
            raise self._lost() from None

    # -------------------------------------------------------------------------------------------- exchanges
    def from_main(self, value: Any) -> Any:
        values = [value]
        with self._talking():
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with self._talking():
            torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, value: Tensor) -> Tensor:
        total = value.detach().cpu().clone()
        with self._talking():
            torch.distributed.all_reduce(total)
        return total

    def totals(self, progress: Progress) -> Progress:
        from fa_bench.metrics.evaluation import add

        if progress.loss_sum is None:
            return progress
        cpu = {name: value.cpu() for name, value in progress.sums.items()}
        samples = progress.samples if isinstance(progress.samples, int) else progress.samples.cpu()
        losses, sums, count = [], {}, 0
        for loss, of_process, counted in self.gather((progress.loss_sum.cpu(), cpu, samples)):
            losses.append(loss)
            add(sums, of_process)
            count = count + counted
        return dataclasses.replace(progress, loss_sum=torch.stack(losses).sum(), sums=sums, samples=count)

    def whole_batch(self, x: Tensor, y: Tensor, share: Callable[[int], Tensor] | None, size: int) -> tuple[Tensor, Tensor]:
        assert share is not None
        parts = self.gather((share(size), x.cpu(), y.cpu()))
        order = torch.cat([positions for positions, _, _ in parts]).argsort()
        return torch.cat([x for _, x, _ in parts])[order], torch.cat([y for _, _, y in parts])[order]

    def same_buffers(self, model: torch_nn.Module) -> None:
        with self._talking():
            for name, buffer in model.named_buffers():
                if not name.rpartition(".")[2].startswith(PREFIX):  # feedback is the same in all processes, and may be large
                    torch.distributed.broadcast(buffer, src=0)

    def due(self, wanted: bool) -> bool:
        self._wanted, due, self._due = wanted, self._due, False
        return due

    def check(self, stop: StopRequest) -> None:
        state = torch.tensor([stop.number or 0, int(self._wanted)])
        with self._talking():
            torch.distributed.all_reduce(state, torch.distributed.ReduceOp.MAX)
        number, due = state.tolist()
        self._wanted, self._due = False, self._due or bool(due)
        if number:
            self.stops_together = True
            raise Interrupted(number, is_deferred=True)

    # -------------------------------------------------------------------------------------------- training
    def device(self, name: str) -> str:
        if name == "cpu":
            return name
        if name != "cuda":
            raise ConfigError(
                f"device={name}: {self.size} processes need a device each; use device=cuda, with which each "
                "process takes its own, or device=cpu"
            )
        if self.local_rank >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ConfigError(
                f"device=cuda: each process needs its own CUDA device, but this machine has {count}; use "
                f"--nproc-per-node={max(count, 1)}, or device=cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def parts(self, size: int, accumulate: int) -> list[Tensor]:
        """The positions of this process's samples in a batch, for each micro-batch. Each micro-batch is divided among the
        processes."""
        return [part.tensor_split(self.size)[self.rank] for part in torch.arange(size).tensor_split(min(accumulate, size))]

    def share(self, accumulate: int = 1) -> Callable[[int], Tensor] | None:
        return lambda size: torch.cat(self.parts(size, accumulate))

    def begin_step(self, seed: int, step: int) -> None:
        if self.rank:  # process 0 keeps the random state that checkpoints contain
            torch.manual_seed(seed_for("process", seed, step, self.rank))

    def wrapped(self, model: torch_nn.Module) -> Any:
        wrapper: Any = nn.parallel.DistributedDataParallel
        # Buffers are either equal in all processes or are copied by `same_buffers` before they are read.
        renamed = "forward_sync_buffers" in inspect.signature(wrapper).parameters
        with self._talking():
            self._wrapped = wrapper(model, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})
        return self._wrapped

    def micro_batches(
        self, x: Tensor, y: Tensor, size: int, accumulate: int, objective: Objective
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """As in `World`. Gradients are exchanged in the backward pass of the last micro-batch."""
        parts_y = y.split(lengths := [len(part) for part in self.parts(size, accumulate)])
        counts = [objective.counted(part) for part in parts_y]
        total: Any = size
        if type(objective).counted is not Objective.counted:  # otherwise every sample counts as one
            total = max(self.sum(torch.as_tensor(sum(counts), dtype=torch.float64)).item(), 1)
        for number, (part_x, part_y, count) in enumerate(zip(x.split(lengths), parts_y, counts, strict=True), start=1):
            with nullcontext() if number == len(counts) else self._wrapped.no_sync():
                yield part_x, part_y, int(count) * self.size / total

    def synchronised(self, model: torch_nn.Module) -> torch_nn.Module:
        if next(model.parameters()).is_cuda:
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        from fa_bench.runs.batch_norm import synchronise

        return synchronise(model)

    def notes(self, model: torch_nn.Module, synchronised: bool, notes: tuple[str, ...]) -> list[str]:
        modules, several = list(model.modules()), f"{self.size} processes"
        lines = [f"{several} share each batch"]
        if not synchronised and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
            lines.append(
                f"batch normalisation uses the statistics of each process's own samples: the results of {several} "
                "differ from those of one; sync_batch_norm=true uses those of the whole batch"
            )
        rates = [
            module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0) for module in modules
        ]
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            lines.append(f"dropout differs from process to process: the results of {several} differ from those of one")
        return [*lines, *(note for note in notes if "data-parallel" in note)]


class SameStop(Callback):
    """Turns a callback's request to stop in one process into a request in all processes. This callback must come after all
    callbacks that may request a stop."""

    def on_fit_start(self, trainer: Trainer) -> None:
        trainer.agree_on_stop()

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        trainer.agree_on_stop()


_world = World()


def current() -> World:
    """The processes to which this one belongs."""
    return _world


def is_started_by_torchrun() -> bool:
    """Whether this process is one of several that train together."""
    return all(name in os.environ for name in _VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def refuse(what: str) -> None:
    """Refuse an action that does not work in several processes that train together.

    Raises:
        ConfigError: if this process is one of them.
    """
    if is_started_by_torchrun():
        raise ConfigError(
            f"{what} cannot be started by torchrun, which trains one run in {os.environ['WORLD_SIZE']} processes: "
            "start it without torchrun, or start each of its runs with torchrun --nproc-per-node=N -m fa_bench"
        )


def run_together(command: Callable[[], int]) -> int:
    """Call `command` and return its exit code. If torchrun has started this process, first join the other processes.

    The output of all processes except process 0 is discarded, apart from errors that are printed with `World.report`.
    """
    global _world
    if not is_started_by_torchrun():
        return command()
    try:
        _world = _joined()
    except Exception as error:  # torch raises many types of errors
        print(f"fa-bench: cannot reach the other processes of torchrun ({describe_error(error)})", file=sys.stderr)
        return 1
    try:
        with open(os.devnull, "w", encoding="utf-8") as null:
            silent = _world.rank > 0
            with redirect_stdout(null) if silent else nullcontext(), redirect_stderr(null) if silent else nullcontext():
                return command()
    finally:
        _world = World()
        with suppress(RuntimeError):
            torch.distributed.destroy_process_group()


def _joined() -> Processes:
    from torch.distributed.rendezvous import rendezvous

    rank, size, local_rank = (int(os.environ[name]) for name in _VARIABLES[:3])
    store, *_ = next(rendezvous("env://", timeout=TIMEOUT))
    # NCCL transfers gradients between GPUs; the values that Python exchanges are on the CPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and torch.distributed.is_nccl_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return Processes(rank, size, local_rank, store)
