"""Helpers shared by the tests of user-defined training loops: a small net, data that can be learned, and a loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fa_bench

#: Some of the rules with learned feedback, which belongs to layers, cuts or auxiliary layers.
LEARNED = (
    "kp",
    "pfa",
    "pfa_o",
    "ldfa",
    "activation_alignment",
    "mixed",
    "asap",
    "asfp",
    "asfp_lc",
    "dkp",
    "fdfa",
    "grape",
    "predsim",
    "bp_deepsup",
    "dgl",
)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A net of widths 8-16-16-3, in which every rule finds its cuts and blocks."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)
    model.cut_points = model.blocks = ["1", "3"]
    return model


def data(samples: int = 32, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype), x[:, :3].argmax(1)


def attached(name: str, dtype: torch.dtype = torch.float64, **options):
    model = net(dtype)
    # The stem is not frozen, so the feedback of every layer has something to learn from.
    chosen = {"freeze_stem": False} if name in ("asap", "asfp", "asfp_lc") else {}
    chosen |= {"dkp": {"b_lr_scale": 1.0}, "ldrl": {"b_lr_scale": 1.0}, "ldfa": {"rank": 2}, "f3": {"samples": 32}}.get(name, {})
    return model, fa_bench.attach(model, name, seed=0, **(chosen | options))


def steps(
    model,
    rule,
    optimizer,
    number: int,
    *,
    call=None,
    zero_grad: Callable[[], None] | None = None,
    before_step=None,
    plain_backward: bool = False,
    rule_step: bool = True,
) -> list[float]:
    """Train with an ordinary loop, and return the losses. `call`, such as a wrapper of the model, is called instead of the
    model."""
    losses = []
    dtype = next(model.parameters()).dtype
    for number_of_step in range(number):
        x, y = data(seed=number_of_step, dtype=dtype)
        (zero_grad or optimizer.zero_grad)()
        logits = (call or model)(x)
        loss = F.cross_entropy(logits, y)
        if plain_backward:
            loss.backward()
        else:
            rule.backward(loss, logits, y, indices=torch.arange(len(y)))
        if before_step is not None:
            before_step()
        optimizer.step()
        if rule_step:
            rule.step()
        losses.append(loss.item())
    return losses


def state(model) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def sgd(parameters, **settings) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, **({"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3} | settings))
