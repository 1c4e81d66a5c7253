"""The hooks of a cut rule, which cut the graph during a training forward pass and capture the activation at each cut.

The hook at a cut returns a detached tensor, so no error crosses the cut and autograd does no unnecessary work. Rules whose errors
cross the cuts (`CutRule.crosses`) keep the graph.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError
from fa_bench.mechanisms.checkpointing import recomputing
from fa_bench.mechanisms.graph import leaves
from fa_bench.mechanisms.rule import OUTPUT
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fa_bench.mechanisms.cut.rule import CutRule
    from fa_bench.mechanisms.trace import Trace
    from fa_bench.mechanisms.updates import LearnedTensor


@dataclasses.dataclass(slots=True)
class CapturedActivation:
    """The activation at one cut in one forward pass.

    Attributes:
        tensor: the activation, (N, ...); its values are available in the backward pass only if the rule sets `reads_values`.
        shape: its shape.
        output_shape: for a cut at a module's input, the shape of the module's output.
        channels_last: whether the error should be stored with its channels last.
        version: the tensor's version when it was captured; 0 in a compiled graph, where tensors have no version.
    """

    tensor: Any
    shape: torch.Size
    output_shape: tuple[int, ...] = ()
    channels_last: bool = False
    version: int = 0


def is_stored_last(tensor: Tensor) -> bool:
    """Whether a compiled graph stores a tensor like this one in the channels-last format, as it does for feature maps on CPUs."""
    return tensor.dim() == 4 and tensor.is_cpu


def format_of(tensor: Tensor) -> torch.memory_format:
    """The memory format of results that have the shape and device of this tensor."""
    return torch.channels_last if is_stored_last(tensor) else torch.contiguous_format


class Capture:
    """Captures the activations at the cuts of an attached rule.

    Args:
        rule: the rule.
        modules: cut -> module.
        trace: the model's structure, traced with the cuts as watched modules.
        frozen: cut -> learned tensors at the cut that were frozen because the error at the cut reaches no trainable parameter.

    Attributes:
        tape: cut -> activation captured in the current forward pass; None outside a training pass.
    """

    def __init__(
        self, rule: CutRule, modules: dict[str, nn.Module], trace: Trace, frozen: dict[str, list[LearnedTensor]]
    ) -> None:
        self.rule, self.modules, self.frozen = rule, modules, frozen
        self._feeds, self._changed_in_place = trace.feeds, trace.changed_in_place
        self.tape: dict[str, CapturedActivation] | None = None
        self._outer_tapes: list[dict[str, CapturedActivation] | None] = []
        self._without_gradients: set[str] = set()
        self._warned: set[str] = set()
        self._handles: list[Any] = []
        self._connected = False
        for cut, module in modules.items():
            if rule.side == OUTPUT:
                self._handles.append(module.register_forward_hook(functools.partial(self._at_output, cut)))
            else:
                self._handles.append(module.register_forward_pre_hook(functools.partial(self._at_input, cut)))
                self._handles.append(module.register_forward_hook(functools.partial(self._after_input, cut)))
        if rule.error_at is not None:  # registered after the hook of a cut at the same module
            self._handles.append(rule.model.get_submodule(rule.error_at).register_forward_hook(self._at_origin))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    # If the model's forward pass is repeated within a backward pass, as in activation checkpointing, the repeated pass has its
    # own tape. It must treat its tensors as the first pass did, but the errors come from the tape of the first pass.
    def begin(self) -> None:
        """Called at the start of every forward pass of the model."""
        if torch.compiler.is_compiling():
            # New containers are created, because a compiled graph depends on the contents of existing ones.
            self.tape, self._connected, self._without_gradients = {} if self.rule.mode.training else None, False, set()
            return
        self._outer_tapes.append(self.tape)
        if not self.rule.mode.training:
            self.tape = None
        elif self.tape is not None and not recomputing():
            raise CoverageError(
                f"the model calls itself in a training pass, and rule '{self.rule.name}' cannot tell the outputs of the "
                f"two calls apart; call one of the model's modules instead"
            )
        else:
            self.tape = {}
            self._connected = False
            self._without_gradients.clear()

    def end(self) -> None:
        """Called at the end of every forward pass of the model, even if it failed."""
        if torch.compiler.is_compiling():
            self.tape = None
            return
        self.tape = self._outer_tapes.pop() if self._outer_tapes else None

    def require_connected(self) -> None:
        """Raise an error if the module in the option ``error_at`` did not run in the training pass that is ending."""
        if not self._connected and not recomputing():
            raise CoverageError(
                f"error_at={self.rule.error_at}: this module did not run in a training pass with gradients, "
                f"although it ran when the model was attached (activation checkpointing needs "
                f"use_reentrant=False)"
            )

    def check_missing(self, tape: dict[str, CapturedActivation]) -> None:
        """Refuse cuts before which a trainable layer ran without gradients, and warn about cuts that did not run."""
        from fa_bench.mechanisms.weighted_layers import require_gradients

        for cut in self.modules.keys() - tape.keys():
            if cut in self._without_gradients:
                for path in self._feeds.get(cut, ()) if self.rule.side == OUTPUT else ():
                    require_gradients(path, self.rule.model.get_submodule(path))
            elif cut not in self._warned:
                self._warned.add(cut)
                warnings.warn(
                    f"rule '{self.rule.name}': cut '{cut}' did not run in a training pass, although it ran when the "
                    f"model was attached. Layers before it that did run receive their error through later weights",
                    stacklevel=2,
                )

    def _at_output(self, cut: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        tape = self.tape
        if tape is None:
            if not torch.is_grad_enabled() or self.rule.mode.exact:
                return None
            if not recomputing():
                raise CoverageError(f"cut '{cut}' ran outside a forward pass of the attached model; call the model itself")
        if not isinstance(output, torch.Tensor):
            raise CoverageError(f"cut '{cut}' returns a {type(output).__name__}; name a module that returns one tensor")
        if not output.requires_grad:
            self._without_gradients.add(cut)
            return None
        if tape is not None:
            if self._connected:
                raise CoverageError(
                    f"cut '{cut}' ran after '{self.rule.error_at}' in a training pass, but before it when the model was attached"
                )
            if cut in tape:
                raise CoverageError(
                    f"cut '{cut}' ran twice in a training pass, but once when the model was attached; "
                    f"name a module that runs once in training"
                )
            # If errors cross the cut, the model continues with the output itself, so a copy is captured if a later module changes
            # the output in place.
            kept = output.clone() if self.rule.crosses and cut in self._changed_in_place else output
            tape[cut] = CapturedActivation(kept, output.shape, version=0 if torch.compiler.is_compiling() else kept._version)
            frozen = [learned for learned in self.frozen.get(cut, ()) if learned.is_frozen]
            if frozen and self.depends_on_parameters(output):
                for learned in frozen:
                    learned.require_trainable()
        if self.rule.crosses:
            return output
        # An output that a later module changes in place is copied, because the rule needs the original.
        return output.detach().clone() if cut in self._changed_in_place else output.detach()

    def _at_origin(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Connect the output of the module that ``error_at`` names to the cuts before it."""
        tape = self.tape
        if tape is None:
            # A repeated pass must save the same tensors as the first one, in which this output required a gradient.
            repeated = recomputing() and not self.rule.mode.exact and torch.is_grad_enabled()
            return output.detach().requires_grad_() if repeated else None
        if not torch.is_grad_enabled():
            return None  # a call without gradients is ignored; `require_connected` refuses reentrant checkpointing
        if not isinstance(output, torch.Tensor) or self._connected:
            what = "ran twice" if self._connected else f"returned a {type(output).__name__}"
            raise CoverageError(
                f"error_at={self.rule.error_at}: this module {what} in a training pass; name one that runs once "
                f"and returns one tensor"
            )
        connected = self.rule.connect(output, tape, self.rule.error_at)
        self._connected = True
        return connected

    def depends_on_parameters(self, output: Tensor) -> bool:
        """Whether a cut's output depends on a trainable parameter, and not only on an input that requires a gradient."""
        return not leaves(output.grad_fn).isdisjoint(id(parameter) for parameter in self.rule.model.parameters())

    def _at_input(self, cut: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        passed_on = self._at_output(cut, module, (), args[0])
        return None if passed_on is None else (passed_on, *args[1:])

    def _after_input(self, cut: str, module: nn.Module, args: Any, output: Tensor) -> None:
        tape = self.tape
        if tape is not None and cut in tape:
            tape[cut].output_shape = tuple(output.shape)
