"""Expand the compound modules of a model into compositions of layers, in place, and restore them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from fa_bench.mechanisms.compound import attention, recurrent  # noqa: F401  (they fill COMPOUNDS)
from fa_bench.mechanisms.compound.base import COMPOUNDS, Compound
from fa_bench.mechanisms.contexts import set_temporarily

if TYPE_CHECKING:
    from fa_bench.mechanisms.weighted_layers import Mode


def expand(model: nn.Module, mode: Mode) -> None:
    """Change every module whose class is in `COMPOUNDS` to its compound class, in place, and add its projections as children.

    A module is left unchanged if its weights are computed by pruning or by a parametrization, or if its forward method was
    replaced.
    """
    if "torchvision.models.swin_transformer" in sys.modules:
        from fa_bench.mechanisms.compound import windows  # noqa: F401
    contract(model)  # a copy of a model with a rule is already expanded
    module: Any
    for module in list(model.modules()):
        cls = COMPOUNDS.get(type(module))
        if cls is None or "forward" in module.__dict__:
            continue
        module.__class__ = cls
        projections = module.projections()
        if any(projection.parameter is None for projection in projections.values()):
            module.__class__ = cls.plain_class
            continue
        module.__dict__["rule_mode"] = mode
        # The projections come before the module's other children, such as the output projection of attention, because they run
        # first.
        children = dict(module._modules)
        module._modules.clear()
        module._modules.update({**projections, **children})
        for child in module._modules.values():
            child.__dict__["batch_axis"] = cls.batch_axis


def contract(model: nn.Module) -> None:
    """Undo `expand`."""
    for module in list(model.modules()):
        if isinstance(module, Compound):
            for name in module.projections():
                module._modules.pop(name, None)
            for child in module._modules.values():
                child.__dict__.pop("batch_axis", None)  # type: ignore[union-attr]
            module.__dict__.pop("rule_mode", None)
            cls = type(module)
            module.__class__ = vars(cls).get("plain_class") or _replanted(cls)  # type: ignore[assignment]


def _replanted(cls: type[nn.Module]) -> type[nn.Module]:
    """Rebuild a class that a parametrization has derived from a compound class, with the plain class as its base."""
    plain: Any = cls.__bases__[0]
    body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{plain.plain_class.__name__}", (plain.plain_class,), body)


@contextmanager
def layerwise(model: nn.Module, mode: Mode) -> Iterator[None]:
    """A context in which every compound module calls one layer for each weight. Modules that are not expanded yet are expanded
    for the duration of the context.

    Args:
        model: a plain model, or one with a rule.
        mode: the mode of modules that are not expanded yet.
    """
    modes = {id(module.rule_mode): module.rule_mode for module in model.modules() if isinstance(module, Compound)}
    is_plain = not modes
    if is_plain:
        expand(model, mode)
        modes = {id(mode): mode}
    try:
        with set_temporarily(modes.values(), "layerwise", True):
            yield
    finally:
        if is_plain:
            contract(model)
