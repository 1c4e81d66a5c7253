"""Tests of the script that compares the results of two versions of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_runs.py"


@pytest.fixture(name="script")
def script_(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, with one rule, one setting and one experiment in place of all of them."""
    spec = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "ALGORITHMS", ["fa"])
    monkeypatch.setattr(module, "SETTINGS", {"mlp sgd": ["dataset=synthetic", "architecture.widths=[8]"]})
    experiments = tmp_path / "conf" / "experiment"
    experiments.mkdir(parents=True)
    (experiments / "quickstart.yaml").write_text("# only the name of this file is read")
    monkeypatch.setattr(module, "conf_dir", lambda: tmp_path / "conf")
    return module


def test_record_and_compare_runs(script: ModuleType) -> None:
    before = script.record("data", rules_only=False)
    assert set(before) == {"mlp sgd fa", *(f"quickstart: {rule} seed 0" for rule in ("bp", "frozen", "dfa", "fa", "kp", "usf"))}
    for run, record in before.items():
        assert record["status"] == "finished" and len(record["weights_hash"]) == 16 and record["metrics"], run
    assert script.compare(before, script.record("data", rules_only=False)) == []

    changed = {**before, "mlp sgd fa": {**before["mlp sgd fa"], "weights_hash": "0"}, "quickstart: kp seed 0": "no result"}
    del changed["quickstart: bp seed 0"]
    lines = script.compare(before, changed)
    assert lines[0] == "quickstart: bp seed 0: only before" and "mlp sgd fa: weights_hash" in lines and len(lines) == 3
