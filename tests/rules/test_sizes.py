"""Tests that an option which would make feedback or noise exceed the available memory is refused by name, before anything is
allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.errors import OptionError
from fa_bench.utils import memory_limits

#: Maps (rule, option) to the other options that this option requires and to a value that needs at least 2 GB.
OPTIONS: dict[tuple[str, str], tuple[dict[str, Any], float]] = {
    ("pfa", "ratio"): ({}, 2e7),
    ("pfa_o", "ratio"): ({}, 2e7),
    ("mixed", "ratio"): ({}, 2e7),
    ("activation_alignment", "noise_batch"): ({"signal": "noise"}, 10**8),
    ("information_alignment", "noise_batch"): ({"signal": "noise"}, 10**8),
    ("regularized_mirror", "noise_batch"): ({"signal": "noise"}, 10**8),
    ("wm", "mirror_batch"): ({"initial_steps": 1}, 10**8),
}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize(("name", "key"), OPTIONS)
def test_rejects_option_exceeding_memory(name: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, value = OPTIONS[name, key]
    model = net()
    monkeypatch.setattr(memory_limits, "available_memory", lambda: 10**9)
    for allocate in ("empty", "zeros"):
        monkeypatch.setattr(torch, allocate, lambda *sizes, **options: pytest.fail(f"allocates {sizes}"))
    with pytest.raises(OptionError, match=rf"{key}=.*of layer '\d': needs .* of memory, but only 1 GB is available"):
        fa_bench.attach(model, name, **{key: value}, **options)
    monkeypatch.undo()
    fa_bench.attach(model, name, **options)  # the refusal left the model unchanged


@pytest.mark.parametrize("value", [1e15, 1e18, 1e19, 1e30, 1e300])
@pytest.mark.parametrize("name", ["pfa", "pfa_o", "mixed"])
def test_rejects_astronomical_ratio(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"ratio=1e\+\d+: the feedback of layer '0': needs .* of memory"):
        fa_bench.attach(net(), name, ratio=value)
    if value > 1e17:
        monkeypatch.setattr(memory_limits, "available_memory", lambda: None)
        with pytest.raises(OptionError, match=r"ratio=1e\+\d+: the feedback of layer '0': needs .* TB of memory"):
            fa_bench.attach(net(), name, ratio=value)
