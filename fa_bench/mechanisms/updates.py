"""Learned feedback tensors, and checks that an optimizer trains them.

A learned tensor is a parameter of the model, so an optimizer created after `attach` from ``model.parameters()`` trains it. An
optimizer created earlier does not train it, and one created before ``load_state_dict(assign=True)`` trains tensors that the model
no longer has. The first case would silently turn the rule into feedback alignment; in the second, nothing would be learned.
Therefore, the first update after `attach` and the first one after a tensor was replaced are checked. If an optimizer steps, the
check looks for the tensor in the optimizer's parameter groups; if the weights are updated by hand, it compares values when
``rule.step()`` is called. Later checks cost one comparison each.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

from fa_bench.errors import StateError
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

#: The number of entries of a learned tensor that are compared before and after an update, namely those with the largest
#: gradients.
_ENTRIES = 16
#: After this many calls of `after_step` without an update, updates by hand are no longer checked, while updates by optimizers
#: still are.
_PATIENCE = 3
#: If the largest gradient is below this fraction of the largest compared entry, an update may change nothing.
_NOISE = 1e-5
#: After this many updates without ``rule.step()``, rules that need this call warn. The limit is greater than one, because a
#: single change of the weights may come from loading a state.
_MISSED = 3


class LearnedTensor:
    """One learned feedback tensor of a module.

    Args:
        path: the path of the layer or cut.
        module: the module that has the tensor as a parameter.
        key: the parameter's name in the module.
        witness: a module whose weight is trained together with the tensor; if this weight changes, an update has happened. None
            disables the check.
    """

    #: The tensor's learning rate relative to that of the weights.
    lr_scale = 1.0
    #: Whether the tensor's gradient is exactly the gradient of the witness's weight.
    follows = False
    #: Whether the tensor has no separate gradient, because the optimizer uses the weight's gradient for it.
    shares_gradient = False

    def __init__(self, path: str, module: nn.Module, key: str, witness: nn.Module | None) -> None:
        self.path, self.module, self.key, self.witness = path, module, key, witness
        #: The tensor that was last observed being trained; initially, the original tensor.
        self._known = self.tensor
        self._trained = False
        self._snapshot: _Snapshot | None = None
        self._fault = ""
        self._grace = 0
        self._idle = 0
        self.is_frozen = False
        #: Whether `on_gradient` was called in this backward pass; a compiled graph does not call it.
        self._is_noted = False
        self._hook: Any = self.tensor.register_post_accumulate_grad_hook(self._on_accumulated)

    def _on_accumulated(self, tensor: Tensor) -> None:
        if not self._is_noted:
            self.on_gradient(tensor.grad)
        self._is_noted = False
        if self._is_trained():
            self._hook.remove()

    def freeze(self) -> None:
        """Freeze the tensor, because nothing that it learns from is trainable. Otherwise, DistributedDataParallel would wait for
        the gradient of the tensor."""
        self.is_frozen = True
        self.tensor.requires_grad_(False)

    def require_trainable(self) -> None:
        """Check that the tensor is trainable; called when it would get a gradient.

        Raises:
            StateError: if `freeze` froze it, but something that it learns from is trainable now.
        """
        if self.is_frozen:
            if not self.tensor.requires_grad:
                raise StateError(
                    f"the learned feedback '{self.name}' was frozen by attach because nothing that it learns from was "
                    f"trainable, but that has changed; unfreeze it, too (it is in rule.feedback_parameters()), or attach again"
                )
            self.is_frozen = False

    @property
    def tensor(self) -> Tensor:
        """The live parameter."""
        return self.module._parameters[self.key]  # type: ignore[return-value]

    @property
    def _weight(self) -> nn.Parameter | None:
        """The weight that is trained together with the tensor; None if there is no witness, or if its weight is computed."""
        from fa_bench.mechanisms.weighted_layers import weight_parameter

        return None if self.witness is None else weight_parameter(self.witness)

    @property
    def name(self) -> str:
        """The tensor's name in the model."""
        return f"{self.path}.{self.key}" if self.path else self.key

    def _is_trained(self) -> bool:
        return self._trained and self.tensor is self._known

    def on_gradient(self, gradient: Tensor | None) -> None:
        """Called by the backward pass with the gradient that it returns for the tensor.

        Raises:
            StateError: if an optimizer that has stepped since the last backward pass does not train this tensor.
        """
        # This method runs in every backward pass, so the usual case is handled first.
        if (self._trained or self._idle >= _PATIENCE) and not self._fault and self.module._parameters[self.key] is self._known:
            return
        if gradient is None or self.witness is None:
            return
        if not self.tensor.requires_grad:
            return  # the user froze it
        self._is_noted = True
        self._require_no_fault()
        _watch_optimizers(self)
        weight, tensor = self._weight, self.tensor
        is_recorded = self._snapshot is not None and self._snapshot.tensor is tensor
        if weight is not None and not is_recorded:
            self._snapshot = _Snapshot(tensor, gradient, weight)

    def after_step(self) -> None:
        """Called after an update.

        Raises:
            StateError: as for `on_gradient`, and if the weight was updated by hand but this tensor was not.
        """
        if self._snapshot is None and not self._fault:
            if self._trained and self.module._parameters[self.key] is not self._known:
                _watch_optimizers(self)  # a new tensor has no hook, and a compiled graph does not call `on_gradient`
            return
        snapshot, self._snapshot = self._snapshot, None
        self._require_no_fault()
        if snapshot is None or self._is_trained():
            return
        if snapshot.tensor_changed():
            self.mark_trained()
        elif not snapshot.weight_changed():
            self._idle += 1
        elif self.lr_scale and snapshot.significant:
            self._fault = _NOT_TRAINED
            self._require_no_fault()

    def mark_trained(self) -> None:
        """Record that the current tensor is trained."""
        self._known, self._trained, self._fault = self.tensor, True, ""

    def on_optimizer_step(self, groups: dict[int, dict[str, Any]]) -> None:
        """Called after a step of an optimizer, whether or not it trains this tensor.

        Args:
            groups: id of each tensor that the optimizer trains -> its parameter group.
        """
        weight = self._weight
        group, weight_group = groups.get(id(self.tensor)), groups.get(id(weight))
        if group is not None:
            self.mark_trained()
            if weight_group is not None:
                self._compare(group, weight_group)
        elif weight_group is not None:
            # A tensor that has been trained before may have its own optimizer, which steps before or after that of the weights.
            if not self._fault:
                self._grace = 2 if self._is_trained() else 0
            self._fault = _NOT_TRAINED
        elif id(self._known) in groups:
            self._fault = _REPLACED

    def _compare(self, group: dict[str, Any], weight_group: dict[str, Any]) -> None:
        """Warn if the optimizer's settings for the tensor are not those that the rule needs."""
        lr, weight_lr = float(group.get("lr", 0.0)), float(weight_group.get("lr", 0.0))
        if abs(lr - self.lr_scale * weight_lr) > 1e-6 * self.lr_scale * weight_lr:
            warnings.warn(
                f"the learned feedback '{self.name}' should have {self.lr_scale:g} times the learning rate of the weights, but "
                f"the optimizer uses {lr:g} for it and {weight_lr:g} for the weights: create it from "
                f"rule.parameter_groups(lr={weight_lr:g}). If a scheduler sets the rate of all groups, give it a list with one "
                f"rate for each group, such as max_lr=[group['lr'] for group in optimizer.param_groups]",
                stacklevel=4,
            )
        elif self.follows and group.get("weight_decay") != weight_group.get("weight_decay"):
            warnings.warn(
                f"the learned feedback '{self.name}' follows the weight only if both have the same weight decay, but "
                f"the optimizer uses {group.get('weight_decay')} for it and {weight_group.get('weight_decay')} for the "
                f"weight",
                stacklevel=4,
            )

    def _require_no_fault(self) -> None:
        if self._fault and not self.tensor.requires_grad:  # the user froze it
            self._fault = ""
        elif self._fault and self._grace:
            self._grace -= 1
        elif self._fault:
            fault = self._fault.format(self.name)
            for other in {self, *_unchecked}:  # raised once: the next update shows whether the user has fixed it
                other._fault, other._snapshot, other._idle = "", None, 0
            raise StateError(fault)


class StepReminder:
    """Detects weight updates that are not followed by ``rule.step()``.

    Args:
        weights: weights of the model; one that learns is watched. Updates that autograd does not count (fused optimizers) are not
            detected.
    """

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self._weight = next((weight for weight in weights if weight.requires_grad), None)
        self._version = -1 if self._weight is None else self._weight._version
        self._missed = 0

    def on_step(self) -> None:
        """Called by ``rule.step()``."""
        self._missed = 0
        if self._weight is not None:
            self._version = self._weight._version

    def is_missed(self) -> bool:
        """Called before every training pass. The result is True only in the call in which the number of updates since the last
        ``rule.step()`` reaches `_MISSED`."""
        if self._weight is None or self._weight._version == self._version:
            return False
        self._version = self._weight._version
        self._missed += 1
        return self._missed == _MISSED


#: The warning about updates without ``rule.step()``.
STEP_MISSED = (
    f"the weights were updated {_MISSED} times without rule.step(), which does part of the learning; call it after every "
    f"optimizer.step()"
)

_NOT_TRAINED = (
    "the weights were updated, but the learned feedback '{0}' was not: the optimizer was created before attach, or "
    "holds a tensor that the model no longer has. Create the optimizer after attach, from model.parameters(), or add "
    "the feedback: optimizer.add_param_group({{'params': rule.feedback_parameters()}}). To keep feedback fixed, set "
    "requires_grad_(False) on it"
)
_REPLACED = (
    "the optimizer trains tensors that the model no longer has: the learned feedback '{0}' was replaced after the "
    "optimizer was created, for example by load_state_dict(assign=True). Create a new optimizer from model.parameters()"
)

#: All learned tensors that have received a gradient, and those for which no update by an optimizer has been observed yet.
_known: weakref.WeakSet[LearnedTensor] = weakref.WeakSet()
_unchecked: weakref.WeakSet[LearnedTensor] = weakref.WeakSet()
#: The number of times that a check was requested. An optimizer's step is checked only if this number has changed since the
#: optimizer's last step.
_checks_requested = 0
#: The attribute of an optimizer that holds the value of `_checks_requested` at its last step; not part of the optimizer's state.
_CHECKED_AT = "_fa_bench_checked_at"
_hook: Any = None


def _watch_optimizers(learned: LearnedTensor) -> None:
    global _hook, _checks_requested
    _checks_requested += 1
    _unchecked.add(learned)
    _known.add(learned)
    if _hook is None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        _hook = register_optimizer_step_post_hook(_after_optimizer_step)


def _after_optimizer_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    checked_at = optimizer.__dict__.get(_CHECKED_AT)
    if checked_at == _checks_requested:
        return
    optimizer.__dict__[_CHECKED_AT] = _checks_requested
    if checked_at is None:  # a new optimizer may lack tensors that others train
        _unchecked.update(_known)
    groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    for learned in list(_unchecked):
        if learned.key not in learned.module._parameters:  # the rule was detached
            _known.discard(learned)
            _unchecked.discard(learned)
            continue
        learned.on_optimizer_step(groups)
        if not learned._fault and learned._is_trained():
            _unchecked.discard(learned)


class _Snapshot:
    """Some entries of a learned tensor and of its witness's weight, and the versions of both, recorded in a backward pass."""

    def __init__(self, tensor: Tensor, gradient: Tensor, weight: Tensor) -> None:
        with torch.no_grad():
            flat = gradient.detach().reshape(-1)
            self._where = flat.abs().topk(min(_ENTRIES, flat.numel())).indices
            self._values, self._weights = tensor.reshape(-1)[self._where], _sampled(weight)
            self._gradients = flat[self._where]
        self.tensor, self._version = tensor, tensor._version
        self._weight, self._weight_version = weight, weight._version

    @property
    def significant(self) -> bool:
        """Whether an update with the recorded gradient would change the tensor. Gradients that are not finite do not count,
        because a gradient scaler skips the update."""
        size = self._gradients.abs().max()
        return bool(torch.isfinite(self._gradients).all()) and bool(size > _NOISE * self._values.abs().max())

    def tensor_changed(self) -> bool:
        # Autograd does not count writes by fused optimizers or writes to .data.
        return self.tensor._version != self._version or not torch.equal(
            self.tensor.detach().reshape(-1)[self._where].to(self._values), self._values
        )

    def weight_changed(self) -> bool:
        return self._weight._version != self._weight_version or not torch.equal(
            _sampled(self._weight).to(self._weights), self._weights
        )


def _sampled(tensor: Tensor) -> Tensor:
    """A copy of at most a few thousand entries of a tensor."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 4096)].clone()
