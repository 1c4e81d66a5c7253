"""Helpers shared by the tests in this folder: a small net in parts, its data, and one training loop for every rule."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.mechanisms.cut.rule import CutRule
from fa_bench.mechanisms.second_pass import Draws
from fa_bench.registry.registries import ALGORITHMS

RULES = list(ALGORITHMS)
#: Rules that cover all weights in any kind of module, because they propagate no error through modules.
COVERS_ALL = ["weight_perturbation"]
#: Cut rules other than those in COVERS_ALL, and asfp_lc. They take their error from one output of the model.
CUT_RULES = [name for name, rule in ALGORITHMS.items() if issubclass(rule, CutRule) and name not in COVERS_ALL] + ["asfp_lc"]
#: Edge rules, bp, and the rules that freeze layers, except np_feedback and asfp_lc, which need the labels. All these rules learn
#: from any loss.
EDGE_RULES = [name for name in RULES if name not in (*CUT_RULES, *COVERS_ALL, "np_feedback")]
#: Rules that settle the states between whole blocks.
SETTLING = ["epc", "pc"]
#: Rules that cover whole blocks with any content.
COVERS_BLOCKS = ["dgl", "ldrl", *SETTLING]
#: Rules that change the model's first argument, which must therefore be a floating-point tensor.
CHANGES_INPUT = ["pepita", "forward_forward"]
#: Edge rules whose feedback learns from local losses, which are scaled like the model's loss.
LOCAL_LOSSES = ["symmetric_alignment", "activation_alignment", "regularized_mirror", "information_alignment"]
# The mirror steps of wm before training are slow, so only one is run. With b_lr_scale=1, dkp and ldrl have the same learning rate
# for all parameters, so one parameter group suffices.
_QUICK: dict[str, dict[str, Any]] = {
    "wm": {"initial_steps": 1, "mirror_batch": 2},
    "dkp": {"b_lr_scale": 1.0},
    "forward_forward": {"peer_norm": 0.0},
    "epc": {"steps": 4},
    "pc": {"steps": 4},
    "ldfa": {"rank": 2},
    "ldrl": {"b_lr_scale": 1.0},
    "fdfa": {"b_init": "kaiming_uniform"},
    "f3": {"samples": 64},
}

Runs = Callable[[nn.Module, Tensor], Tensor]


def batch(size: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 8, generator=generator), torch.randint(3, (size,), generator=generator)


def part(inputs: int, dropout: float = 0.0) -> nn.Sequential:
    layers = OrderedDict(fc=nn.Linear(inputs, 16), act=nn.ReLU())
    return nn.Sequential(layers | {"drop": nn.Dropout(dropout)} if dropout else layers)


class Chain(nn.Module):
    """A net of widths 8-16-16-16-3 in three parts and a head; `runs` determines how each part is run."""

    def __init__(self, runs: Runs | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.runs = runs or (lambda module, x: module(x))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.a, self.b, self.c, self.head = part(8, dropout), part(16, dropout), part(16), nn.Linear(16, 3)
        self.cut_points, self.blocks = ["a.act", "b.act", "c.act"], ["a", "b", "c"]

    def forward(self, x: Tensor) -> Tensor:
        for module in (self.a, self.b, self.c):
            x = self.runs(module, x)
        return self.head(x)


def attach(model: nn.Module, name: str, **options: Any) -> Any:
    return fa_bench.attach(model, name, **_QUICK.get(name, {}) | options)


def same_noise(draws: Draws, name: str, like: Tensor, is_shared: bool = False) -> Tensor:
    """A replacement for `Draws.normal`. The noise is the same for every update and sample, so that batches can be compared with
    their parts."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    shape = like.shape if is_shared else like.shape[1:]
    return torch.randn(shape, generator=generator, dtype=like.dtype).expand(like.shape).clone()


def draw_the_same_for_every_sample(patch: Any) -> None:
    """Replace the noise and the label shifts of noisy rules; `patch` has the method ``setattr`` of pytest's monkeypatch."""
    patch.setattr(Draws, "normal", same_noise)
    patch.setattr(Draws, "shifts", lambda draws, name, count, high: torch.ones(count, dtype=torch.int64))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters that have one, including learned feedback, without the prefix of checkpoint wrappers in the
    names."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def train(model: nn.Module, rule: Any, x: Tensor, y: Tensor, steps: int = 3, runs: Runs | None = None) -> dict[str, Tensor]:
    """Make a few updates with SGD and return the gradients of the last one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    last: dict[str, Tensor] = {}
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(x) if runs is None else runs(model, x)
        rule.backward(F.cross_entropy(logits, y), logits, y, indices=torch.arange(len(y)))
        last = gradients(model)
        optimizer.step()
        rule.step()
    return last


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rel: float = 0.0) -> None:
    """Check that the names are the same and that the tensors are equal, or differ by at most `rel` times their largest entry."""
    assert want and set(got) == set(want), f"got the tensors {sorted(got)}, expected {sorted(want)}"
    wrong = {
        name: difference
        for name in want
        if not (difference := (got[name] - want[name]).abs().max().item()) <= rel * want[name].abs().max().item()
    }
    assert not wrong, f"tensors that differ, and by how much: {wrong}"
