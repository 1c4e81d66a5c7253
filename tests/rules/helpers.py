"""Helpers shared by the rule tests: single passes, comparisons, and an autograd surrogate of the gradients of FA."""

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
# For some of the rules that store feedback, the name of one feedback tensor of the rule.
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
# Options for wm, which would be slow with its default options, and for f3, which requires the number of samples.
QUICK = {"wm": {"initial_steps": 2, "mirror_batch": 4}, "f3": {"samples": 16}}
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# A mistake in a call may raise any of these errors.
LOUD = (ValueError, LookupError, TypeError)

# Loops and torch add the same few hundred float64 products in different orders. The rounding error is about 1e-16 per product, is
# amplified when BatchNorm divides by the standard deviation, and stays below 1e-12. A tolerance of 1e-9 leaves a margin above
# this error and is far smaller than any term that could be missing.
REL = 1e-9


def layer_names(model: nn.Module) -> list[str]:
    """The names of the weighted layers, in registration order."""
    return [name for name, module in model.named_modules() if isinstance(module, WEIGHTED)]


def cut_options(name: str, model: nn.Module, options: dict) -> dict:
    """The options, with default cuts (all activations) or default blocks (only the first layer) if the rule needs them."""
    if "blocks" in {field.name for field in option_fields(ALGORITHMS[name])}:
        return {"blocks": layer_names(model)[:1]} | options
    if "cuts" not in {field.name for field in option_fields(ALGORITHMS[name])} or options.get("form") == "kernel":
        return options
    return {"cuts": nets.activation_cuts(model)} | options


def backward(rule, loss: Tensor, logits: Tensor, target: Tensor | None = None) -> None:
    rule.backward(loss, logits, target, indices=torch.arange(len(logits)))


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The named parameters of an attached or plain model, without learned feedback."""
    return {name: parameter for name, parameter in model.named_parameters() if "feedback_" not in name}


def collect(model: nn.Module) -> dict[str, Tensor | None]:
    """Copies of all gradients, except those of learned feedback, which are available through ``rule.feedback_parameters()``."""
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in weights(model).items()}


def rule_grads(model: nn.Module, rule, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    """The gradients of one training pass under the rule."""
    model.zero_grad(set_to_none=True)
    logits = model(x)
    backward(rule, F.cross_entropy(logits, y), logits, y)
    return collect(model)


def bp_grads(plain: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    """The gradients of one backpropagation pass, computed on a copy so that the plain model stays unchanged."""
    twin = copy.deepcopy(plain)
    twin.zero_grad(set_to_none=True)
    F.cross_entropy(twin(x), y).backward()
    return collect(twin)


def feedback_tensors(rule) -> dict[tuple[str, str], Tensor]:
    """The live feedback tensors, as {(layer or cut, tensor name): tensor}."""
    return {(layer, name): tensor for layer, tensors in rule.feedback.items() for name, tensor in tensors.items()}


def feedback_arrays(rule) -> dict[str, dict[str, np.ndarray]]:
    return {layer: {name: array(t) for name, t in tensors.items()} for layer, tensors in rule.feedback.items()}


def copy_weights_into_feedback(model: nn.Module, rule) -> None:
    """Set B = W (or M = |W|) in every layer."""
    with torch.no_grad():
        for layer, tensors in rule.feedback.items():
            weight = model.get_submodule(layer).weight
            for name, tensor in tensors.items():
                tensor.copy_(weight.abs() if name == "M" else weight)


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy().copy()


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The parameters that `weights` returns, as NumPy arrays."""
    return {name: array(p) for name, p in weights(model).items()}


def distance(got, want, floor: float = 1e-30) -> float:
    """The largest absolute difference, divided by the largest expected entry or by ``floor``, whichever is larger."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape, f"got the shape {got.shape}, expected {want.shape}"
    return float(np.abs(got - want).max() / max(np.abs(want).max(), floor))


def assert_matches(got: dict, want: dict, rel: float = REL) -> None:
    """Require that the same tensors have gradients and that their values agree to within ``rel``.

    Differences are relative to the tensor's largest entry, or to 1e-3 of the largest entry of all tensors if that is larger. The
    latter is needed for a bias that precedes BatchNorm, because the true gradient of such a bias is 0.
    """
    present = {name for name, grad in got.items() if grad is not None}
    assert present == set(want), f"got gradients of {sorted(present)}, expected {sorted(want)}"
    floor = 1e-3 * max(float(np.abs(np.asarray(tensor)).max()) for tensor in want.values())
    distances = {name: distance(got[name], want[name], floor) for name in want}
    wrong = {name: f"{value:.2e}" for name, value in distances.items() if not value <= rel}
    assert not wrong, f"relative differences above {rel}: {wrong}"


def assert_bitwise(got: dict, want: dict) -> None:
    """Require that both dictionaries have the same names and that their tensors are bitwise identical or both None."""
    assert set(got) == set(want)
    for name in want:
        assert (got[name] is None) == (want[name] is None), f"{name}: got {got[name]}, expected {want[name]}"
    wrong = [name for name in want if want[name] is not None and not torch.equal(got[name], want[name])]
    assert not wrong, f"these tensors differ: {wrong}"


def state_of(rule) -> tuple[dict, dict]:
    """Copies of the states of the rule and of its model."""
    return copy.deepcopy(rule.state_dict()), copy.deepcopy(rule.model.state_dict())


def restore(rule, state: tuple[dict, dict]) -> None:
    """Restore a state returned by `state_of`, so that the rule samples the same noise again."""
    rule.model.load_state_dict(state[1])
    rule.load_state_dict(state[0])


# --- a surrogate: the same gradients from torch's autograd on a plain model, without any rule ---------------------------------


class TwoFaced(nn.Module):
    """A layer that computes its output and weight gradient as ``layer`` does, but its input gradient with ``feedback``."""

    def __init__(self, layer: nn.Module, feedback: Tensor) -> None:
        super().__init__()
        self.layer, mirror = layer, copy.deepcopy(layer).requires_grad_(False)
        mirror.weight.copy_(feedback)
        self.mirror = [mirror]  # in a list, so that it is not a submodule

    def forward(self, x: Tensor) -> Tensor:
        reflected = self.mirror[0](x)
        return self.layer(x.detach()) + (reflected - reflected.detach())


def fa_surrogate(plain: nn.Module, feedback: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients of FA for any architecture, computed by autograd."""
    twin = copy.deepcopy(plain)
    for name, tensor in feedback.items():
        twin.set_submodule(name, TwoFaced(twin.get_submodule(name), tensor))
    F.cross_entropy(twin(x), y).backward()
    return {name.replace(".layer.", "."): grad for name, grad in collect(twin).items()}
