"""Check whether a rule can be attached to a model, and whether the model's modules have changed since it was attached."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

from fa_bench.errors import CoverageError, names
from fa_bench.mechanisms.coverage import is_weight
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import nn


class Structure:
    """The modules of an attached model, and the parameters that the rule froze.

    `check` runs before every training forward pass and in `Rule.backward`. Unless a module was added or removed, the check costs
    one comparison of lists for each module that has children, and one look-up for each frozen parameter.

    Args:
        rule: the rule's name.
        model: the model to which the rule is attached.
        watched: path -> module, for the layers and cuts that the rule relies on.
        frozen: parameters that the rule has frozen.
    """

    def __init__(self, rule: str, model: nn.Module, watched: dict[str, nn.Module], frozen: list[nn.Parameter]) -> None:
        self.rule, self._model, self._watched = rule, model, watched
        self._number = next(_numbers)
        _attached[self._number] = self
        ids = {id(parameter) for parameter in frozen}
        self._frozen = [
            (path, module, key)
            for path, module in model.named_modules()
            for key, parameter in module._parameters.items()
            if id(parameter) in ids
        ]
        self._record()

    def _record(self) -> None:
        self._known = set(self._model.modules())
        for module in self._known:
            # A number is stored rather than the rule, because modules are copied and pickled, and a copy is not part of the
            # model.
            module.__dict__[PART_ATTRIBUTE] = self._number, id(module)
        self._children = [(module._modules, list(module._modules.values())) for module in self._known if module._modules]

    def check(self, allow_new: bool) -> None:
        """Raise an error if the model's layers, or the parameters that the rule froze, have changed since `attach`.

        Args:
            allow_new: whether modules with weights may have been added.

        Raises:
            CoverageError: in this case; the message names the change and the remedy.
        """
        for children, known in self._children:
            if list(children.values()) != known:
                self._compare(allow_new)
                break
        for path, module, key in self._frozen:
            parameter = module._parameters.get(key)
            parameters = [parameter] if parameter is not None else _underlying(module, key)
            if any(one.requires_grad for one in parameters):
                name = f"{path}.{key}" if path else key
                raise CoverageError(
                    f"'{name}' was frozen by the rule, but has since been replaced or had its requires_grad set. {_REATTACH}"
                )

    def _compare(self, allow_new: bool) -> None:
        now = dict(self._model.named_modules())
        present = set(now.values())
        missing = [path for path, module in self._watched.items() if module not in present]
        if missing:
            replaced = [path for path in missing if path in now]
            what = f"{names(replaced)} replaced" if replaced else f"{names(missing)} removed"
            raise CoverageError(
                f"the model was changed after attach ({what}), but the rule still uses the original modules. {_REATTACH}"
            )
        new = [
            f"{path}.{key}"
            for path, module in now.items()
            if module not in self._known
            for key, parameter in module._parameters.items()
            if parameter is not None and is_weight(key, parameter)
        ]
        if new and not allow_new:
            raise CoverageError(
                f"the model was changed after attach: the rule does not cover the new weights {names(new)}. {_REATTACH}"
            )
        self._record()

    def release(self) -> None:
        """Remove the marks that identify the modules as parts of the model."""
        for module in (*self._known, *self._model.modules()):
            module.__dict__.pop(PART_ATTRIBUTE, None)

    def current_parameters(self) -> list[Any]:
        """The frozen parameters that the model has now or, under pruning or a parametrization, the parameters from which they are
        computed."""
        return [parameter for _, module, key in self._frozen for parameter in _underlying(module, key)]


def _underlying(module: nn.Module, key: str) -> list[Any]:
    """The parameter of that name, or, under pruning or a parametrization, the parameters from which it is computed."""
    if key in module._parameters:
        parameter = module._parameters[key]
        return [] if parameter is None else [parameter]
    parametrized = getattr(module, "parametrizations", {})
    if key in parametrized:
        return [parameter for name, parameter in parametrized[key].named_parameters() if name.startswith("original")]
    return [parameter for name, parameter in module._parameters.items() if name in (f"{key}_orig", f"{key}_g", f"{key}_v")]


def rule_around(module: nn.Module) -> str | None:
    """The name of the rule attached to the model that contains a module; None if no rule is attached."""
    number, identity = module.__dict__.get(PART_ATTRIBUTE, (0, 0))
    structure = _attached.get(number)
    return structure.rule if structure is not None and identity == id(module) else None


def check_model(model: Any) -> None:
    """Raise an error if no rule can be attached to the model.

    Raises:
        TypeError: if `model` is not a module.
        CoverageError: for a model that is compiled or wrapped for data-parallel training, that has uninitialised parameters or
            buffers, or that contains a module with a rule or feedback.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"attach needs an nn.Module, not {type(model).__name__}")
    for path, module in model.named_modules():
        where = f"the model's part '{path}'" if path else "the model"
        nn, kind, tensors = torch.nn, type(module).__name__, (*module._parameters.values(), *module._buffers.values())
        if any(isinstance(one, (nn.UninitializedParameter, nn.UninitializedBuffer)) for one in tensors):
            raise CoverageError(f"{where} ({kind}) has no weight or buffers yet; run one forward pass, then attach")
        if kind in _WRAPPERS and type(module).__module__.startswith("torch."):
            raise CoverageError(f"{where} is wrapped in {kind}; attach to the plain model, then wrap it")
        if kind == "OptimizedModule" or module._compiled_call_impl is not None:
            raise CoverageError(f"{where} is compiled; attach to the plain model, then compile it")
        if (rule := getattr(module, RULE_ATTRIBUTE, None)) is not None:
            raise CoverageError(f"{where} already has the rule '{rule.name}'; call its detach() first")
        if (name := rule_around(module)) is not None:
            raise CoverageError(f"{where} is part of another model with the rule '{name}'; call that rule's detach() first")
        if hasattr(module, "pathway") and kind.startswith("Feedback"):
            raise CoverageError(f"{where} is a copy of a layer that has feedback; call detach() before copying")


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
#: The attribute in which an attached model keeps its rule, so that a deep copy of the model has a copy of the rule.
RULE_ATTRIBUTE = "_fa_bench_rule"
#: The attribute in which each module of an attached model keeps the number of the model's `Structure`, and its own id.
PART_ATTRIBUTE = "_fa_bench_part_of"
_attached: weakref.WeakValueDictionary[int, Structure] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
_REATTACH = "Call rule.detach(), attach again, and then create the optimizer"
