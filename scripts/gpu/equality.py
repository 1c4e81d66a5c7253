"""Compares the gradients and weights of every rule on the device with those on the CPU, for the same seeds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fa_bench
from fa_bench.errors import CoverageError, first_line
from fa_bench.models.mlp import MLP
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD
from fa_bench.registry.registries import ALGORITHMS

from .noise import sampled_on_cpu
from .page import Section
from .parts import Context

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
#: In float32, the tolerance is at least this multiple of the difference between float32 and float64 on the CPU, because some
#: rules divide a small difference between losses by a small number, which amplifies rounding errors.
ROUNDING = 10.0
STEPS, BATCH, CLASSES = 3, 16, 10
#: Differences are relative to the largest entry of the tensor, or to this fraction of the largest entry of all compared tensors
#: if that is larger. Smaller entries may be rounding errors of sums whose terms cancel.
_FLOOR = 1e-4


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """A multilayer perceptron with layers of 784, 64, 64 and 10 units, and the shape of its inputs."""
    return MLP(widths=[64, 64]).build((1, 28, 28), CLASSES), (1, 28, 28)


def convnet() -> tuple[nn.Module, tuple[int, ...]]:
    """A net with three convolutions and two linear layers, and the shape of its inputs.

    The second and third convolutions have stride 2.
    """
    model: Any = nn.Sequential()
    channels = [3, 8, 8, 16]
    for number in (1, 2, 3):
        model.add_module(f"conv{number}", nn.Conv2d(channels[number - 1], channels[number], 3, 1 if number == 1 else 2, 1))
        model.add_module(f"act{number}", nn.ReLU())
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc1", nn.Linear(16 * 16, 32))
    model.add_module("act4", nn.ReLU())
    model.add_module("fc2", nn.Linear(32, CLASSES))
    model.cut_points = model.blocks = ["act1", "act2", "act3", "act4"]
    return model, (3, 16, 16)


#: Options of rules that require them or would otherwise take a long time.
OPTIONS: dict[str, dict[str, Any]] = {"wm": {"initial_steps": 2, "mirror_batch": 8}, "f3": {"samples": BATCH}}
NETS = {"mlp": mlp, "convnet": convnet}


def trained(rule_name: str, net: str, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of the first step, and the parameters, feedback and buffers after the last step, by name, on the CPU.

    The model, data, feedback and noise are sampled on the CPU, and are the same in every dtype except for rounding.
    """
    torch.manual_seed(0)
    model, shape = NETS[net]()
    x, y = torch.randn(BATCH, *shape, dtype=torch.float64), torch.randint(CLASSES, (BATCH,))
    model, x, y = model.to(device, dtype), x.to(device, dtype), y.to(device)
    with sampled_on_cpu():
        return _trained(rule_name, model, x, y)


def _trained(rule_name: str, model: nn.Module, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    rule = fa_bench.attach(model, rule_name, seed=0, sample_input=x[:2], **OPTIONS.get(rule_name, {}))
    indices = torch.arange(BATCH, device=x.device)
    optimizers = Optimizers(SGD(lr=0.01), rule, epochs=1)
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        optimizers.zero_grad()
        logits = model(x)
        rule.backward(F.cross_entropy(logits, y), logits, y, 1.0, indices=indices)
        if step == 0:
            gradients = {name: weight.grad.double().cpu() for name, weight in model.named_parameters() if weight.grad is not None}
        optimizers.step()
        rule.step()
    state = {name: tensor.double().cpu() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    return gradients, state


def largest_difference(given: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference between two tensors of the same name, in the maximum norm, and that name.

    The difference is infinite if entries are not finite, or if one side lacks tensors. In the latter case, the name lists these
    tensors.
    """
    if given.keys() != expected.keys():
        return float("inf"), ", ".join(sorted(given.keys() ^ expected.keys()))
    largest = max((tensor.abs().max().item() for tensor in expected.values() if tensor.numel()), default=0.0)
    worst, where = 0.0, "-"
    for name, tensor in expected.items():
        if not tensor.numel():
            continue
        scale = max(tensor.abs().max().item(), _FLOOR * largest) or 1.0
        difference = (given[name] - tensor).abs().max().item() / scale
        if not difference <= worst:
            worst, where = difference if difference == difference else float("inf"), name
    return worst, where


def run(context: Context, section: Section) -> None:
    """Add a row for each net and rule to the section."""
    torch.backends.cudnn.allow_tf32 = False
    section.notes = [
        f"The device compared with the CPU: {STEPS} steps of SGD with momentum on one batch of {BATCH}, with the same seeds and "
        f"without TF32. Each cell is the largest relative difference of a tensor, max |a - b| / max |b|, with the tensor's name "
        f"in brackets. The columns 'gradients' compare the gradients of the first step, and the columns 'weights' compare the "
        f"weights, feedback and buffers after the last step. Tolerance: 1e-9 in float64; in float32, 1e-4 or {ROUNDING:g} times "
        f"the difference between float32 and float64 on the CPU, whichever is larger. If {_FLOOR:g} times "
        f"the largest entry of all compared tensors is more than max |b|, it replaces max |b|. The noise of all rules is sampled "
        f"on the CPU."
    ]
    section.columns = [
        "net",
        "rule",
        "gradients, float64",
        "weights, float64",
        "gradients, float32",
        "weights, float32",
        "result",
    ]
    for net in NETS:
        for name in ALGORITHMS:
            if not context.fits(2):
                section.missing.append(f"{name} on {net}")
                continue
            try:
                cells, passed = compared(name, net, context.device)
            except CoverageError as error:
                section.add(net, name, f"not covered: {first_line(error)}")
            except Exception as error:
                section.add(net, name, f"{type(error).__name__}: {first_line(error)}", "", "", "", passed=False)
            else:
                section.add(net, name, *cells, passed=passed)


def compared(name: str, net: str, device: str) -> tuple[list[str], bool]:
    """The cells of a rule's row, and whether the differences in gradients and weights are within the tolerances."""
    wide, narrow = (trained(name, net, dtype, "cpu") for dtype in (torch.float64, torch.float32))
    cells, passed = [], True
    for dtype, on_cpu in ((torch.float64, wide), (torch.float32, narrow)):
        for given, expected, exact in zip(trained(name, net, dtype, device), on_cpu, wide, strict=True):
            difference, where = largest_difference(given, expected)
            rounding = 0.0 if dtype is torch.float64 else largest_difference(expected, exact)[0]
            passed = passed and difference <= max(TOLERANCES[dtype], ROUNDING * rounding)
            cells.append(f"{difference:.1e} ({where})")
    return cells, passed
