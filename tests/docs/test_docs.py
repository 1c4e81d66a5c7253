"""The examples in README.md, CONTRIBUTING.md, docs/command_line.md and docs/add_a_rule.md work."""

from __future__ import annotations

import itertools
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.api import _arguments
from fa_bench.cli import main
from fa_bench.config.job import conf_dir
from fa_bench.registry.registries import ALGORITHMS, ARCHITECTURES
from fa_bench.report import cli as report
from fa_bench.tuning.tune import prepared

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def shell_lines(text: str) -> list[str]:
    return re.findall(r"^    (\S.*)$", text, re.M)


def test_quick_start_has_install_run_and_test_lines() -> None:
    run, test = shell_lines(README.split("## Quick start")[1])[:2]
    for line in (run, test):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -q -e ")
    assert run.endswith(".venv/bin/fa-bench -m experiment=quickstart")
    assert test.endswith(".venv/bin/python -m pytest -n 2")


def test_documented_report_command_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = [
        line
        for line in shell_lines((ROOT / "docs" / "command_line.md").read_text(encoding="utf-8"))
        if line.startswith("fa-bench-report")
    ]
    words = line.split("#")[0].split()
    assert re.search(rf'^{words[0]} = "{report.main.__module__}:main"$', (ROOT / "pyproject.toml").read_text(), re.M)
    run = Path(words[1], "bp-0a", "seed0")
    run.mkdir(parents=True)
    (run / "result.json").write_text('{"status": "finished", "label": "bp", "group": "bp-0a", "algorithm": "bp", "seed": 0}')
    assert report.main(words[1:]) == 0 and Path(words[1], "report.md").is_file()


def test_table_of_rules_is_complete() -> None:
    shown = set(re.findall(r"^\| `(\w+)` \|", README.split("## Rules")[1].split("\n## ")[0], re.M))
    assert shown == set(ALGORITHMS)


def test_readme_run_and_tune_calls_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs have one seed and the smallest scale; the study is planned and checked, but not run."""
    [code] = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "fa_bench.run(" in block]
    run = fa_bench.run
    monkeypatch.chdir(tmp_path)
    small = {"scale": "smoke", "threads": 1, "seed": [0]}
    monkeypatch.setattr(fa_bench, "run", lambda *overrides, **options: run(*overrides, **{**options, **small}))
    monkeypatch.setattr(fa_bench, "tune", lambda *overrides, **options: prepared(_arguments("tune", overrides, options), None))
    shown: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), shown)
    assert [run.result["algorithm"] for run in shown["runs"]] == ["bp"] * 2 + ["fa"] * 2 and len(shown["frame"]) == 4
    assert [rule.rule for rule in shown["study"].rules] == ["bp", "fa"] and shown["study"].options.budget == 20


def test_documented_experiments_match_shipped_ones() -> None:
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    listed = page.split("Select an experiment with `experiment=NAME`:")[1].split("Before the first job of an experiment")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == {path.stem for path in (conf_dir() / "experiment").glob("*.yaml")}


def test_contributing_architecture_and_preset_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An architecture and an experiment need only one file each; no other file has to mention them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    architecture = re.search(r"^```python\n(.*?)^```", text, re.S | re.M)
    preset = re.search(r"^```yaml\n(# @package.*?)^```", text, re.S | re.M)
    assert architecture is not None and preset is not None
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "myfigure.yaml").write_text(preset.group(1))
    known = dict(ARCHITECTURES._entries)
    module = ModuleType("contributing_net")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(architecture.group(1), "CONTRIBUTING.md", "exec"), module.__dict__)
        assert main(["-m", "experiment=myfigure", "architecture=mynet", "scale=smoke", "seed=0", "--config-dir=own"]) == 0
    finally:
        ARCHITECTURES._entries.clear()
        ARCHITECTURES._entries.update(known)
    out = capsys.readouterr().out
    assert out.startswith("Running 5 jobs (5 epochs); output: outputs/myfigure\n  algorithm: bp, frozen, kp, fa\n")


def _check_random_signs() -> None:
    """The feedback of the guide's third rule has W's magnitudes; its signs change every second update, also after resuming."""
    first, second = (nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3)) for _ in range(2))
    rule = fa_bench.attach(first, "randsign", every=2)
    signs = [rule.feedback["2"]["S"].clone()]
    for _ in range(3):
        rule.step()
        signs.append(rule.feedback["2"]["S"].clone())
    assert torch.equal(rule.effective_feedback("2").abs(), first[2].weight.abs())
    assert [torch.equal(*pair) for pair in itertools.pairwise(signs)] == [True, False, True]
    resumed = fa_bench.attach(second, "randsign", every=2)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(rule.state_dict())
    for each in (rule, resumed):
        each.step()
    assert torch.equal(rule.feedback["2"]["S"], resumed.feedback["2"]["S"])
    assert not torch.equal(rule.feedback["2"]["S"], signs[-1])


def test_guide_rules_work(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "add_a_rule.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 3
    known = dict(ALGORITHMS._entries)
    module = ModuleType("guide")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    try:
        for code in blocks:
            exec(compile(textwrap.dedent(code), "add_a_rule.md", "exec"), module.__dict__)
        model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3))
        rule = fa_bench.attach(model, "myrule", density=0.3)
        zeros = (rule.effective_feedback("0") == 0).float().mean()
        assert 0.6 < zeros < 0.8 and torch.equal(rule.feedback["0"]["B"], rule.effective_feedback("0"))
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
        rule = fa_bench.attach(model, "mydirect", cuts=["1"], sample_input=torch.zeros(2, 1, 4, 4))
        x = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
        delta = (logits.softmax(1) - torch.eye(3)[:2]).detach() / 2
        rule.backward(loss, logits, torch.tensor([0, 1]))
        assert rule.feedback["1"]["B"].shape == (3, 8)
        error = (delta @ rule.feedback["1"]["B"]).view(2, 2, 2, 2)
        slope = 1 - model[0](x).detach().tanh() ** 2
        torch.testing.assert_close(model[0].bias.grad, (error * slope).sum((0, 2, 3)))
        _check_random_signs()
    finally:
        ALGORITHMS._entries.clear()
        ALGORITHMS._entries.update(known)
