"""The execution of a run: its precision, memory layout and compilation. Rules, models and losses do not depend on these
settings."""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from fa_bench.config.job import RunOptions
from fa_bench.errors import ConfigError, first_line
from fa_bench.mechanisms.compiled import too_old_to_compile
from fa_bench.runs.logs import log

#: The minimum number of steps that a run must have for compile=auto to compile it. A graph of resnet20 takes about 30 s to
#: compile and saves 15 ms per step.
ENOUGH_STEPS = 2000


class Execution:
    """The way in which a run executes its forward passes.

    Args:
        options: the run's options.
        device: the run's device.

    Raises:
        ConfigError: if the device or the installed software does not support an option, or if graphs=true is set without
            compile=true.
    """

    def __init__(self, options: RunOptions, device: torch.device) -> None:
        self.options, self.device = options, device
        if options.precision == "tf32" and device.type != "cuda":
            raise ConfigError(f"precision=tf32: {device.type} devices do not support this format (allowed: fp32, bf16)")
        if options.graphs is True and device.type != "cuda":
            raise ConfigError(
                f"graphs=true: this run's device, {device.type}, does not support CUDA graphs (allowed: auto, false)"
            )
        if options.graphs is True and options.compile is not True:
            raise ConfigError("graphs=true needs compile=true: graphs are captured from compiled code")
        self._channels_last = options.channels_last
        self._compiles: bool | None = options.compile if isinstance(options.compile, bool) else None
        self._pending: set[int] = set()
        self._has_compiled = False
        if options.compile is True:
            _require_compiler(device)

    def products(self) -> AbstractContextManager[Any]:
        """A context in which matrix products and convolutions use TF32 if the run's precision is tf32. Outside it, where
        metrics are computed, they use single precision."""
        return _tf32() if self.options.precision == "tf32" else _NOTHING

    def placed(self, model: torch.nn.Module) -> torch.nn.Module:
        """Move the model to the device, convert it to the run's memory format, and return it. This must happen before a rule is
        attached."""
        model = model.to(self.device)
        if self._channels_last == "auto":
            self._channels_last = self.device.type == "cpu" and _has_convolutions(model)
            log.info("channels_last=auto: %s", "on" if self._channels_last else "off (pays off only for convolutions on a CPU)")
        return model.to(memory_format=torch.channels_last) if self._channels_last else model

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass and its loss. With bf16, weights, feedback and metrics stay in single precision."""
        is_bf16 = self.options.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if is_bf16 else nullcontext()

    def forward(
        self, function: Callable[..., Any], model: torch.nn.Module, steps: int, processes: int = 1, repeats: bool = False
    ) -> Callable[..., Any]:
        """Return the forward pass ``function(x, y)`` as the run executes it. With compilation, it is compiled for full batches
        and their micro-batches.

        Other batches run without compilation, because a smaller last batch would need its own graph.

        Args:
            function: computes outputs and loss from a batch (N, ...) or a micro-batch.
            model: the model that it calls.
            steps: updates of the whole run.
            processes: number of processes that train the run together; with several, there is no compilation.
            repeats: whether the rule runs the model again in the backward pass, which compiled graphs do not support.
        """

        def eager(x: torch.Tensor, y: torch.Tensor) -> Any:
            with self.autocast():
                return function(x, y)

        if self._compiles is None:
            why = f"{processes} processes" if processes > 1 else "the rule runs the model again" if repeats else ""
            self._compiles, why = (False, why) if why else _pays(model, self.device, steps)
            log.info("compile=auto: %s (%s)", "on" if self._compiles else "off", why)
        if not self._compiles:
            return eager
        # This frees the handles of earlier rules, so that their keys, which are part of graphs, are used again and torch finds
        # equal graphs in its cache.
        gc.collect()
        # Each run needs its own code object, because torch limits the number of graphs per code object in a process.
        own: Any = types.FunctionType(eager.__code__.replace(), eager.__globals__, eager.__name__, None, eager.__closure__)
        mode = {"triton.cudagraphs": True} if self.options.graphs is True else {}
        # With this setting, dropout draws the same random numbers as without compilation.
        compiled = torch.compile(own, dynamic=False, options={"fallback_random": True, **mode})
        size, parts = self.options.batch_size, self.options.accumulate
        self._pending = {-(-size // parts), size // parts}
        sizes = frozenset(self._pending)

        def run(x: torch.Tensor, y: torch.Tensor) -> Any:
            if len(x) not in sizes:
                return eager(x, y)
            if len(x) in self._pending:
                self._pending.discard(len(x))
                self._has_compiled = True
                log.info("compiling the step for %d samples, which may take a minute", len(x))
                with torch._dynamo.config.patch(allow_rnn=True):  # by default, the graph breaks at recurrent modules
                    return compiled(x, y)
            return compiled(x, y)

        return run

    def step_compiled(self) -> bool:
        """Whether a graph has been compiled since the last call."""
        has_compiled, self._has_compiled = self._has_compiled, False
        return has_compiled


_NOTHING = nullcontext()


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _require_compiler(device: torch.device) -> None:
    if problem := too_old_to_compile():
        raise ConfigError(f"compile=true: {problem}; upgrade it, or pass compile=false")
    if device.type == "cpu" and (problem := _no_compiler()):
        raise ConfigError(f"compile=true needs a C++ compiler, such as g++: {problem}; install one, or pass compile=false")


def _no_compiler() -> str:
    """The reason why torch does not find a C++ compiler; empty if it finds one."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        return first_line(error)
    return ""


def _pays(model: torch.nn.Module, device: torch.device, steps: int) -> tuple[bool, str]:
    """Whether compilation is known to be faster (see docs/performance.md), and the reason."""
    if device.type != "cpu":
        return False, f"not measured on {device.type}"
    if not _has_convolutions(model):
        return False, "it pays off only for models with convolutions, according to measurements"
    if steps < ENOUGH_STEPS:
        return False, f"{steps} steps; compiling takes about as much time as it saves in {ENOUGH_STEPS} steps"
    if problem := too_old_to_compile():
        return False, problem
    if problem := _no_compiler():
        return False, f"no C++ compiler: {problem}"
    return True, f"{steps} steps of a model with convolutions"


def _has_convolutions(model: torch.nn.Module) -> bool:
    return any(isinstance(module, torch.nn.modules.conv._ConvNd) for module in model.modules())
