"""A replacement for the derivative of elementwise nonlinearities: a finite difference over the error itself.

Let φ be a nonlinearity with the input a and the error g at its output. The error at the input is then:

    g_in = (φ(a + β s g) - φ(a - β s g)) / (2 β s),    s = N / c

Backpropagation uses φ'(a) g instead. N is the number of samples in the batch, and the loss is c times the mean of their losses.
Since s g is the error of a sample's own loss, β has the same meaning for every batch size, number of micro-batches and scale of a
gradient scaler, and on every rank of data-parallel training. Modules are covered in place, by changing their class; functions
cannot be covered and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fa_bench.errors import CoverageError, names
from fa_bench.mechanisms.checkpointing import recomputing
from fa_bench.mechanisms.compiled import Handle, operator
from fa_bench.mechanisms.compound.expansion import layerwise
from fa_bench.mechanisms.contexts import all_require_grad, evaluating, restoring
from fa_bench.mechanisms.graph import nodes_from, tensors_in
from fa_bench.mechanisms.loss_scale import is_unscaled, measured_scale
from fa_bench.mechanisms.trace import arguments, named_results
from fa_bench.mechanisms.weighted_layers import Mode

if TYPE_CHECKING:
    from fa_bench.mechanisms.rule import Rule

#: The modules whose derivative can be replaced. Subclasses are excluded, because their forward pass may differ.
NONLINEAR: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Threshold,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanhshrink,
    nn.Softshrink,
    nn.Hardshrink,
    nn.Hardswish,
    nn.Hardsigmoid,
)
#: Maps the name of an autograd node, without "Backward", to the name of the function that created it. The functions are
#: elementwise and nonlinear, or kernels that contain such functions.
_FUNCTIONS = {
    name: name.lower()
    for name in (
        "Relu",
        "LeakyRelu",
        "Hardtanh",
        "Threshold",
        "Elu",
        "Celu",
        "Gelu",
        "Silu",
        "Mish",
        "Tanh",
        "Sigmoid",
        "LogSigmoid",
        "Softplus",
        "Softshrink",
        "Hardshrink",
        "Hardswish",
        "Hardsigmoid",
    )
} | {"PreluKernel": "prelu", "RreluWithNoise": "rrelu", "MkldnnRnnLayer": "lstm", "CudnnRnn": "rnn", "MiopenRnn": "rnn"}


class Dual:
    """The finite differences in one attached model.

    Args:
        rule: the rule's name.
        mode: the mode of the attached model.
        beta: β.

    Attributes:
        modules: path -> nonlinearity whose derivative is replaced.
    """

    def __init__(self, rule: str, mode: Mode, beta: float) -> None:
        self.rule, self.mode, self.beta = rule, mode, beta
        self.modules: dict[str, nn.Module] = {}
        self._handle = Handle(self)
        self._samples: int | None = None
        self._scale: float | None = None
        self._last_scale = 1.0
        self._is_checked = False

    @property
    def key(self) -> str:
        """The name of this object in compiled graphs."""
        return self._handle.key

    # -------------------------------------------------------------------------------------------- attach and detach
    def wire(self, model: nn.Module, sample: Any) -> None:
        """Replace the derivatives of a model's nonlinearities.

        Args:
            model: the model, in its rule's ``exact`` context.
            sample: one input batch, as for `attach`; None: functions are looked for only in the first training pass that is not
                compiled.

        Raises:
            CoverageError: if, with the sample, the model calls nonlinear functions outside of `NONLINEAR` modules.
        """
        found: dict[str, Any] = {
            path: module
            for path, module in model.named_modules()
            if type(module) in NONLINEAR and "forward" not in module.__dict__
        }
        if sample is not None:
            self._refuse(_functions(model, found.values(), sample))
        self.modules = found
        for module in found.values():
            module.__class__ = SWAPS[type(module)]
            module.__dict__["dual"] = self

    def unwire(self, model: nn.Module) -> None:
        """Undo `wire`."""
        module: Any
        for module in {*model.modules(), *self.modules.values()}:
            if isinstance(module, DualModule):
                module.__class__ = module.plain_class  # type: ignore[assignment]
                module.__dict__.pop("dual", None)

    def note(self) -> str:
        """The note about the finite differences that is added to the coverage."""
        if not self.modules:
            return "This model has no nonlinear modules whose derivative could be replaced."
        return f"The derivative of {names(self.modules)} is a finite difference over each sample's error (beta={self.beta:g})."

    # -------------------------------------------------------------------------------------------- every forward pass
    def begin(self, args: Any, kwargs: Any) -> None:
        """Called before every forward pass of the model, with its arguments, whose first axis is that of the samples."""
        self._samples = next((tensor.shape[0] for tensor in tensors_in((args, kwargs)) if tensor.dim()), None)

    def end(self, roots: Callable[[], Iterable[Any]] | None) -> None:
        """Called after every forward pass of the model. After a training pass, `roots` returns the autograd nodes of the outputs;
        otherwise, it is None.

        Raises:
            CoverageError: if the first training pass called nonlinear functions outside of the modules.
        """
        self._samples = None
        if roots is not None and not self._is_checked and not torch.compiler.is_compiling():
            self._refuse(_nonlinear(nodes_from(roots())))
            self._is_checked = True

    def samples(self, module: nn.Module) -> int:
        """N, the number of samples in the current forward pass.

        Raises:
            CoverageError: if the module runs outside of a forward pass of the model.
        """
        if self._samples is None and recomputing():
            return 0  # the backward pass uses the number from the pass that is repeated
        if self._samples is None:
            raise CoverageError(
                f"{type(module).__name__.removeprefix('Dual')} ran outside a forward pass of the attached model; "
                f"call the model itself"
            )
        return self._samples

    # -------------------------------------------------------------------------------------------- every backward pass
    @contextmanager
    def delivering(
        self, rule: Rule, loss: Tensor, logits: Tensor | None, target: Tensor | None, loss_scale: float | None
    ) -> Iterator[None]:
        """A context for the backward pass, in which the scale c of the loss is known. The arguments after `rule` are those of
        `Rule.backward`.

        Raises:
            ValueError: if c is not given and cannot be inferred.
        """
        if loss_scale is None and is_unscaled(loss, target, rule.objective):
            loss_scale = 1.0
        handle = None
        if loss_scale is None:
            if logits is None or logits.grad_fn is None:
                raise ValueError(
                    f"rule '{self.rule}': derivative=dual needs the scale of the loss; call rule.backward(loss, "
                    f"logits, target), or pass loss_scale=1.0, or loss_scale=1 / 4 for loss / 4"
                )

            def measure(delta: Tensor) -> None:
                self._scale = self._last_scale = measured_scale(
                    self.rule, delta, logits.detach(), target, self._last_scale, rule.objective
                )

            handle = logits.register_hook(measure)
        self._scale = loss_scale
        try:
            yield
        finally:
            self._scale = None
            if handle is not None:
                handle.remove()

    def step(self, samples: int) -> float:
        """β s.

        Raises:
            ValueError: if the backward pass does not run within `delivering`.
        """
        if self._scale is None:
            raise ValueError(
                f"rule '{self.rule}': derivative=dual needs the scale of the loss; call rule.backward(loss, logits, "
                f"target) with the logits of this forward pass instead of loss.backward()"
            )
        return self.beta * samples / (self._scale or 1.0)  # if the scale is 0, so are the errors

    def _refuse(self, functions: Iterable[str]) -> None:
        found = sorted(set(functions))
        if found:
            raise CoverageError(
                f"rule '{self.rule}': {{derivative}} replaces the derivative of modules such as nn.ReLU, but "
                f"this model computes {names(found)} outside of supported modules; use nn.ReLU, nn.Tanh or another "
                f"supported module instead",
                {"derivative": "dual"},
            )


def _nonlinear(nodes: Iterable[Any]) -> Iterator[str]:
    """The names of the nonlinear functions among autograd nodes."""
    for node in nodes:
        if (function := _FUNCTIONS.get(type(node).__name__.partition("Backward")[0])) is not None:
            yield function


def _functions(model: nn.Module, modules: Iterable[nn.Module], sample: Any) -> list[str]:
    """The nonlinear functions that a plain model calls outside of `modules`, found in one forward pass of the sample."""
    inside: set[Any] = set()
    inputs: list[Any] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        # The nodes are stored now, because the module may change its input in place.
        inputs[:] = (tensor.grad_fn for tensor in tensors_in((args, kwargs)))

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        inside.update(nodes_from([output.grad_fn], inputs))

    handles = [
        handle
        for module in modules
        for handle in (module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after))
    ]
    args, kwargs = arguments(sample)
    try:
        with layerwise(model, Mode("")), evaluating(model), torch.enable_grad(), all_require_grad(model), restoring(model):
            results = named_results(model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    roots = [tensor.grad_fn for tensor in results.values() if tensor.grad_fn is not None]
    return list(_nonlinear(node for node in nodes_from(roots) if node not in inside))


class DualModule(nn.Module):
    """Mixin that replaces the backward pass of a nonlinearity with the finite difference."""

    plain_class: type[nn.Module]
    dual: Dual

    def forward(self, input: Tensor) -> Tensor:
        dual = self.dual
        if dual.mode.exact or not torch.is_grad_enabled() or not input.requires_grad:
            return self.plain_class.forward(self, input)
        samples = dual.samples(self)
        if not getattr(self, "inplace", False):
            return _DualFunction.apply(input, self, samples)
        return input.copy_(_DualFunction.apply(input.clone(), self, samples))

    def values(self, a: Tensor) -> Tensor:
        """φ(a), in new memory."""
        return self.plain_class.forward(self, a.clone() if getattr(self, "inplace", False) else a)

    def difference(self, a: Tensor, d: Tensor) -> Tensor:
        """φ(a + d) - φ(a - d)."""
        return self.values(a + d) - self.values(a - d)


class _DualReLU(DualModule):
    def difference(self, a: Tensor, d: Tensor) -> Tensor:
        # This formula avoids subtracting nearly equal numbers. The result is 2 d if a + d and a - d are both positive, and 0 if
        # both are negative.
        size = d.abs()
        return torch.minimum((a + size).clamp_min(0), 2 * size).copysign(d)


class _DualFunction(torch.autograd.Function):
    """φ(a), with the error (φ(a + β s g) - φ(a - β s g)) / (2 β s) at its input."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, module: DualModule, samples: int) -> Tensor:
        ctx.save_for_backward(a)
        ctx.module, ctx.samples = module, samples
        return module.values(a)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (a,), module = ctx.saved_tensors, ctx.module
        dual = module.dual
        # In half precision, rounding would leave little of the difference.
        wide = torch.promote_types(a.dtype, torch.float32)
        error = g.to(wide)
        step = dual_step(error, ctx.samples, dual.key) if torch.compiler.is_compiling() else dual.step(ctx.samples)
        return (module.difference(a.to(wide), error * step) / (2 * step)).to(a.dtype), None, None


@operator("dual_step(Tensor error, SymInt samples) -> Tensor", like=lambda error, samples: error.new_empty(()))
def dual_step(dual: Dual, error: Tensor, samples: int) -> Tensor:
    """β s in the backward pass of a compiled graph, as a scalar tensor."""
    return error.new_full((), dual.step(samples))


def _dual(plain: type[nn.Module]) -> type[DualModule]:
    """The class with the finite difference for a plain class, such as ``DualReLU`` for ``ReLU``. The new class is a global of
    this module, so that modules can be pickled."""
    name = f"Dual{plain.__name__}"
    mixin = _DualReLU if plain is nn.ReLU else DualModule
    body = {"__module__": __name__, "__doc__": "The module with a finite difference as its derivative.", "plain_class": plain}
    return globals().setdefault(name, type(name, (mixin, plain), body))


#: Maps each plain class to its variant whose derivative is a finite difference.
SWAPS: dict[type[nn.Module], type[DualModule]] = {plain: _dual(plain) for plain in NONLINEAR}
