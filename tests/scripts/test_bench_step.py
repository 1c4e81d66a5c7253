"""The benchmark of training steps can perform a step of every rule."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from fa_bench.registry.registries import ALGORITHMS


@pytest.fixture(name="bench_step")
def bench_step_(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "scripts"), *sys.path])
    yield importlib.import_module("bench_step")
    del sys.modules["bench_step"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_step_of_every_rule_runs(name: str, bench_step: Any) -> None:
    options = {"asap": ":linear=share", "asfp": ":linear=share", "asfp_lc": ":linear=share", "wm": ":initial_steps=0"}
    step = bench_step.make_step("mlp", name + options.get(name, ""), 4, with_optimizer=True)
    for _ in range(2):
        step()
