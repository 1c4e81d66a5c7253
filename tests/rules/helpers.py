"""Helpers that the rule tests share: attaching a rule, running one pass, comparing gradients, and autograd surrogates of a
rule's gradients.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa_bench.registry.options import option_fields
from fa_bench.registry.registries import ALGORITHMS

from . import nets

EDGE_RULES = ("fa", "usf", "brsf", "frsf", "kp", "wm", "mixed")
# The rules with stored feedback, and the name of a tensor of it.
STORED = {
    "fa": "B",
    "kp": "B",
    "brsf": "M",
    "frsf": "M",
    "dfa": "B",
    "dkp": "B",
    "drtp": "B",
    "local_error": "M",
    "wm": "B",
    "mixed": "F",
}
# Options that reduce the work of tests of other properties, while the same code runs.
QUICK = {"wm": {"initial_steps": 2, "mirror_batch": 4}, "f3": {"samples": 16}}
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# The errors that a mistake in a call may raise: attach's own errors are ValueErrors; a missing name may also be a lookup or a
# type error.
LOUD = (ValueError, LookupError, TypeError)

# Loops and torch add the same few hundred float64 products in another order: 1e-16 times their number, amplified by BatchNorm's
# 1/deviation, stays under 1e-12; 1e-9 leaves room and is far below any term one could forget.
REL = 1e-9


def layer_names(model: nn.Module) -> list[str]:
    """The weighted layers, in registration order."""
    return [name for name, module in model.named_modules() if isinstance(module, WEIGHTED)]


def cut_options(name: str, model: nn.Module, options: dict) -> dict:
    """The options of a rule: activations as cuts if the rule takes cuts, and the first layer for blocks."""
    if "blocks" in {field.name for field in option_fields(ALGORITHMS[name])}:
        return {"blocks": layer_names(model)[:1]} | options
    if "cuts" not in {field.name for field in option_fields(ALGORITHMS[name])} or options.get("form") == "kernel":
        return options
    return {"cuts": nets.activation_cuts(model)} | options


def backward(rule, loss: Tensor, logits: Tensor, target: Tensor | None = None) -> None:
    rule.backward(loss, logits, target, indices=torch.arange(len(logits)))


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the plain model by name; for an attached model, learned feedback is left out."""
    return {name: parameter for name, parameter in model.named_parameters() if "feedback_" not in name}


def collect(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients of the weights; for those of learned feedback, use ``rule.feedback_parameters()``."""
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in weights(model).items()}


def rule_grads(model: nn.Module, rule, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    """Gradients of one training pass under the rule."""
    model.zero_grad(set_to_none=True)
    logits = model(x)
    backward(rule, F.cross_entropy(logits, y), logits, y)
    return collect(model)


def bp_grads(plain: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    """Gradients of one pass of the plain model; the model itself is not changed."""
    twin = copy.deepcopy(plain)
    twin.zero_grad(set_to_none=True)
    F.cross_entropy(twin(x), y).backward()
    return collect(twin)


def feedback_tensors(rule) -> dict[tuple[str, str], Tensor]:
    """The live feedback tensors as {(layer or cut, tensor name): tensor}."""
    return {(layer, name): tensor for layer, tensors in rule.feedback.items() for name, tensor in tensors.items()}


def feedback_arrays(rule) -> dict[str, dict[str, np.ndarray]]:
    return {layer: {name: array(t) for name, t in tensors.items()} for layer, tensors in rule.feedback.items()}


def copy_weights_into_feedback(model: nn.Module, rule) -> None:
    """Set B = W (or M = |W|) for every layer."""
    with torch.no_grad():
        for layer, tensors in rule.feedback.items():
            weight = model.get_submodule(layer).weight
            for name, tensor in tensors.items():
                tensor.copy_(weight.abs() if name == "M" else weight)


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy().copy()


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The weights of a model, attached or not."""
    return {name: array(p) for name, p in weights(model).items()}


def distance(got, want, floor: float = 1e-30) -> float:
    """Largest difference relative to the largest wanted entry, or to ``floor`` if that is larger."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, wanted {want.shape}"
    return float(np.abs(got - want).max() / max(np.abs(want).max(), floor))


def assert_matches(got: dict, want: dict, rel: float = REL) -> None:
    """Assert that the same tensors have a gradient, with the same values up to ``rel``.

    The tolerance is relative to each tensor's own largest entry, which counts as at least 1e-3 of the largest entry of all
    tensors, because a bias before BatchNorm has gradient 0.
    """
    present = {name for name, grad in got.items() if grad is not None}
    assert present == set(want), f"gradients of {sorted(present)}, wanted {sorted(want)}"
    floor = 1e-3 * max(float(np.abs(np.asarray(tensor)).max()) for tensor in want.values())
    distances = {name: distance(got[name], want[name], floor) for name in want}
    wrong = {name: f"{value:.2e}" for name, value in distances.items() if not value <= rel}
    assert not wrong, f"relative differences above {rel}: {wrong}"


def assert_bitwise(got: dict, want: dict) -> None:
    """Assert that both have the same tensors (or None) under the same names, bitwise."""
    assert set(got) == set(want)
    for name in want:
        assert (got[name] is None) == (want[name] is None), f"{name}: got {got[name]}, wanted {want[name]}"
    wrong = [name for name in want if want[name] is not None and not torch.equal(got[name], want[name])]
    assert not wrong, f"differ from backpropagation: {wrong}"


def state_of(rule) -> tuple[dict, dict]:
    """Everything that determines the next update: weights, feedback, and the number of the next noise."""
    return copy.deepcopy(rule.state_dict()), copy.deepcopy(rule.model.state_dict())


def restore(rule, state: tuple[dict, dict]) -> None:
    """Restore the rule to the state returned by `state_of`, so that it samples the same noise again."""
    rule.model.load_state_dict(state[1])
    rule.load_state_dict(state[0])


# --- surrogates: the same gradients from torch's autograd on a plain model, without any rule ----------------------------------


class TwoFaced(nn.Module):
    """A layer with the forward value and weight gradient of ``layer``, and the input gradient of the same layer with weight
    ``feedback``.
    """

    def __init__(self, layer: nn.Module, feedback: Tensor) -> None:
        super().__init__()
        self.layer, mirror = layer, copy.deepcopy(layer).requires_grad_(False)
        mirror.weight.copy_(feedback)
        self.mirror = [mirror]  # in a list: not a submodule

    def forward(self, x: Tensor) -> Tensor:
        reflected = self.mirror[0](x)
        return self.layer(x.detach()) + (reflected - reflected.detach())


def fa_surrogate(plain: nn.Module, feedback: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """FA's gradients for any architecture."""
    twin = copy.deepcopy(plain)
    for name, tensor in feedback.items():
        twin.set_submodule(name, TwoFaced(twin.get_submodule(name), tensor))
    F.cross_entropy(twin(x), y).backward()
    return {name.replace(".layer.", "."): grad for name, grad in collect(twin).items()}
