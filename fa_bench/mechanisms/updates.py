"""Learned feedback, and whether an optimizer trains it.

A learned tensor is a parameter of the model, so that an optimizer made after `attach` has it. One made before does not, and one
made before ``load_state_dict(assign=True)`` trains tensors that the model no longer has. Both would go wrong silently: the rule
would become feedback alignment, or nothing would learn. So the first update after `attach`, and the first one after a tensor was
replaced, is looked at: by what the optimizers that step hold, and where the weights are updated by hand, by what changed until
``rule.step()``. After that a check costs one comparison.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

from fa_bench.errors import StateError
from fa_bench.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Entries of a tensor that are compared before and after an update: those with the largest gradients.
_ENTRIES = 16
#: Calls of `after_step` without an update after which updates by hand are not looked for any more; optimizers still are.
_PATIENCE = 3
#: Gradients below this fraction of the entries are rounding noise, and an update by them changes nothing.
_NOISE = 1e-5


class LearnedTensor:
    """One learned feedback tensor of a module.

    Args:
        place: the layer's or the cut's path.
        module: has the tensor, as a parameter.
        key: the parameter's name in the module.
        witness: a module whose weight learns beside it; that weight tells whether there was an update. None: nobody looks.
    """

    #: What its learning rate is, relative to that of the weights, and whether it follows the weight.
    lr_scale = 1.0
    follows = False

    def __init__(self, place: str, module: nn.Module, key: str, witness: nn.Module | None) -> None:
        self.place, self.module, self.key, self.witness = place, module, key, witness
        #: The tensor that was seen to be trained; until then the one that was there at first.
        self._known = self.tensor
        self._trained = False
        self._before: _Before | None = None
        self._fault = ""
        self._grace = 0
        self._idle = 0
        self._rests = False

    def rest(self) -> None:
        """Freeze the tensor, for nothing that learns gives it a gradient; whatever waits for one would wait in vain."""
        self._rests = True
        self.tensor.requires_grad_(False)

    def require_awake(self) -> None:
        """Called where the tensor would get a gradient.

        Raises:
            StateError: where it rests although there is something to learn from now.
        """
        if self._rests:
            if not self.tensor.requires_grad:
                raise StateError(f"the learned feedback '{self.name}' was frozen by attach, for what it learns from was; that "
                                 f"learns now: unfreeze it too (rule.feedback_parameters() has it), or attach again")
            self._rests = False

    @property
    def tensor(self) -> Tensor:
        """The live parameter."""
        return self.module._parameters[self.key]  # type: ignore[return-value]

    @property
    def name(self) -> str:
        """Its name in the model."""
        return f"{self.place}.{self.key}" if self.place else self.key

    def _is_trained(self) -> bool:
        return self._trained and self.tensor is self._known

    def received(self, gradient: Tensor | None) -> None:
        """Called by the backward pass with the gradient that it returns for the tensor.

        Raises:
            StateError: where the optimizer that stepped since the last backward pass does not train this tensor.
        """
        # This runs in every backward pass. Of what nobody updated so far optimizers alone are awaited, by their hook.
        if (self._trained or self._idle >= _PATIENCE) and not self._fault and self.module._parameters[self.key] is self._known:
            return
        if gradient is None or self.witness is None:
            return
        if not self.tensor.requires_grad:
            return  # meant to stay as it is
        self._require_no_fault()
        _watch_optimizers(self)
        weight, tensor = self.witness._parameters.get("weight"), self.tensor
        looked_at = self._before is not None and self._before.tensor is tensor
        if weight is not None and not looked_at:
            self._before = _Before(tensor, gradient, weight)

    def after_step(self) -> None:
        """Called after an update.

        Raises:
            StateError: as `received`; and where the weight was updated by hand, and this tensor was not.
        """
        if self._before is None and not self._fault:
            return
        before, self._before = self._before, None
        self._require_no_fault()
        if before is None or self._is_trained():
            return
        if before.tensor_changed():
            self.accept()
        elif not before.weight_changed():
            self._idle += 1
        elif self.lr_scale and before.significant:
            self._fault = _LEFT_OUT
            self._require_no_fault()

    def accept(self) -> None:
        """Take the present tensor for trained."""
        self._known, self._trained, self._fault = self.tensor, True, ""

    def stepped(self, groups: dict[int, dict[str, Any]]) -> bool:
        """Called after an optimizer made a step; whether it trains this tensor.

        Args:
            groups: id of each tensor that it trains -> its group.
        """
        weight = None if self.witness is None else self.witness._parameters.get("weight")
        mine, its = groups.get(id(self.tensor)), groups.get(id(weight))
        if mine is not None:
            self.accept()
            if its is not None:
                self._compare(mine, its)
            return True
        if its is not None:
            # What was trained before may have an optimizer of its own, which steps before the weights' new one or after it.
            if not self._fault:
                self._grace = 2 if self._is_trained() else 0
            self._fault = _LEFT_OUT
        elif self.tensor is not self._known and id(self._known) in groups:
            self._fault = _REPLACED
        return False

    def _compare(self, mine: dict[str, Any], its: dict[str, Any]) -> None:
        """Warn where the settings that an optimizer has for the tensor are not those that the rule asks for."""
        wanted = self.lr_scale * float(its.get("lr", 0.0))
        if abs(float(mine.get("lr", 0.0)) - wanted) > 1e-6 * wanted:
            warnings.warn(
                f"the rule wants {self.lr_scale:g} times the weights' learning rate for the learned feedback '{self.name}', and "
                f"the optimizer has {mine['lr']:g} beside {its['lr']:g}: make it from rule.parameter_groups(lr={its['lr']:g})",
                stacklevel=4)
        elif self.follows and mine.get("weight_decay") != its.get("weight_decay"):
            warnings.warn(f"the learned feedback '{self.name}' follows the weight only with the same weight decay, and the "
                          f"optimizer has {mine.get('weight_decay')} beside {its.get('weight_decay')}", stacklevel=4)

    def _require_no_fault(self) -> None:
        if self._fault and not self.tensor.requires_grad:  # meant to stay as it is
            self._fault = ""
        elif self._fault and self._grace:
            self._grace -= 1
        elif self._fault:
            fault = self._fault.format(self.name)
            for other in {self, *_awaiting}:  # said once: the next update shows whether it was mended
                other._fault, other._before, other._idle = "", None, 0
            raise StateError(fault)


_LEFT_OUT = ("the weights are updated, but not the learned feedback '{0}': the optimizer was made before attach, or holds a "
             "tensor that the model no longer has. Make the optimizer after attach, from model.parameters(), or add the feedback "
             "to it: optimizer.add_param_group({{'params': rule.feedback_parameters()}}). Feedback that is meant to stay as it "
             "is needs requires_grad_(False)")
_REPLACED = ("the optimizer trains tensors that the model no longer has: the learned feedback '{0}' was replaced after the "
             "optimizer was made, as load_state_dict(assign=True) does. Make a new optimizer from model.parameters()")

#: All learned tensors that received a gradient, and those of them that were not seen to be trained yet.
_known: weakref.WeakSet[LearnedTensor] = weakref.WeakSet()
_awaiting: weakref.WeakSet[LearnedTensor] = weakref.WeakSet()
#: How often a tensor began or went on to wait. An optimizer's step is looked at where this is not what it was at its last one.
_waits = 0
#: Where an optimizer keeps that number; it is not a part of its state.
_LOOKED_AT = "_fa_bench_looked_at"
_hook: Any = None


def _watch_optimizers(learned: LearnedTensor) -> None:
    global _hook, _waits
    _waits += 1
    _awaiting.add(learned)
    _known.add(learned)
    if _hook is None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        _hook = register_optimizer_step_post_hook(_after_optimizer_step)


def _after_optimizer_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    looked_at = optimizer.__dict__.get(_LOOKED_AT)
    if looked_at == _waits:
        return
    optimizer.__dict__[_LOOKED_AT] = _waits
    if looked_at is None:  # it may leave out what others train
        _awaiting.update(_known)
    groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    for learned in list(_awaiting):
        if learned.key not in learned.module._parameters:  # the rule was detached
            _known.discard(learned)
            _awaiting.discard(learned)
        elif learned.stepped(groups) or (not learned._fault and learned._is_trained()):
            _awaiting.discard(learned)


class _Before:
    """A learned tensor and its weight as they were in a backward pass: entries of both, and autograd's count of writes."""

    def __init__(self, tensor: Tensor, gradient: Tensor, weight: Tensor) -> None:
        with torch.no_grad():
            flat = gradient.detach().reshape(-1)
            self._where = flat.abs().topk(min(_ENTRIES, flat.numel())).indices
            self._values, self._weights = tensor.reshape(-1)[self._where], _sample(weight)
            self._gradients = flat[self._where]
        self.tensor, self._version = tensor, tensor._version
        self._weight, self._weight_version = weight, weight._version

    @property
    def significant(self) -> bool:
        """Whether an update had anything to change: a gradient scaler leaves one out that is not finite."""
        size = self._gradients.abs().max()
        return bool(torch.isfinite(self._gradients).all()) and bool(size > _NOISE * self._values.abs().max())

    def tensor_changed(self) -> bool:
        # Fused optimizers, and writes into .data, are not counted.
        return self.tensor._version != self._version or not torch.equal(
            self.tensor.detach().reshape(-1)[self._where].to(self._values), self._values)

    def weight_changed(self) -> bool:
        return self._weight._version != self._weight_version or not torch.equal(
            _sample(self._weight).to(self._weights), self._weights)


def _sample(tensor: Tensor) -> Tensor:
    """A few thousand entries of a tensor, a copy."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 4096)].clone()
