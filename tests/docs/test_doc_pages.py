"""Tests of pages in docs/: generated pages are up to date, tables are complete and correct, and examples in guides work."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fa_bench
from fa_bench.cli import main
from fa_bench.command.dry_run import _bytes, _stored_feedback
from fa_bench.mechanisms.cut.local import LocalRule
from fa_bench.mechanisms.cut.rule import CutRule
from fa_bench.mechanisms.edge.rule import EdgeRule
from fa_bench.mechanisms.rule import Rule
from fa_bench.metrics.cost import step_costs
from fa_bench.registry.registries import ALGORITHMS, ARCHITECTURES, DATASETS
from fa_bench.report import figures

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "metrics_of", lambda runs: {})


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        return importlib.import_module("make_docs")


def made() -> dict[str, str]:
    return script().pages()


# ------------------------------------------------------------------------------------------------ the rules' pages
def test_rule_pages_are_up_to_date() -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "rules").glob("*.md")}
    assert committed == made(), "run: python scripts/make_docs.py"


def test_every_rule_page_has_measured_score() -> None:
    for name in ALGORITHMS:
        assert name == "bp" or f"| task | `{name}` | `bp` |" in page(f"rules/{name}")


def test_rule_guide_lists_overridable_methods() -> None:
    guide = script().guide()
    assert page("add_a_rule") == guide, "run: python scripts/make_docs.py"
    overridden = {
        name
        for cls in ALGORITHMS.values()
        for base in cls.__mro__
        if base.__module__.startswith("fa_bench.rules")
        for name, member in vars(base).items()
        if not name.startswith("_") and (callable(member) or isinstance(member, property))
    }
    inherited = {
        name
        for base in (Rule, EdgeRule, CutRule, LocalRule)
        for name, member in vars(base).items()
        if callable(member) or isinstance(member, property)
    }
    assert overridden & inherited, "no rule overrides anything"
    assert not {name for name in overridden & inherited if f"| `{name}" not in guide}


def test_every_rule_has_page_with_options() -> None:
    pages = made()
    assert set(pages) == {"README.md", *(f"{name}.md" for name in ALGORITHMS)}
    assert sorted(re.findall(r"^- \[`(\w+)`\]\(\1\.md\): \S", pages["README.md"], re.M)) == sorted(ALGORITHMS)
    assert "| `density` | `1.0` | > 0 and <= 1 | fraction of B that is not zero (fixed random mask) |\n" in pages["fa.md"]
    assert "| `form` | `neuron` | one of neuron, kernel, shared | how the output error is projected |\n" in pages["dfa.md"]
    assert not re.search("(?<!`)``(?!`)", "".join(pages.values()))


def test_every_rule_has_own_equations() -> None:
    assert [name for name, cls in ALGORITHMS.items() if not vars(cls).get("equations")] == []


# ------------------------------------------------------------------------------------------------ links, commands
def test_readme_links_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/{path.name}" in readme for path in DOCS.glob("*.md"))


def test_slurm_script_calls_fa_bench(tmp_path: Path) -> None:
    script = re.search(r"```bash\n(.*?)```", page("cluster"), re.S)
    assert script is not None
    Path("job.sh").write_text(script.group(1))
    Path("fa-bench").write_text('#!/bin/sh\necho "$OMP_NUM_THREADS" "$@"\n')
    Path("fa-bench").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    environment["SLURM_CPUS_PER_TASK"] = "2"
    said = subprocess.run(["bash", "job.sh"], env=environment, capture_output=True, text=True, check=True).stdout
    assert said == "2 algorithm=kp dataset=mnist seed=3 data_dir=data output_dir=outputs\n"


# ------------------------------------------------------------------------------------------------ choose a rule
def rows(name: str) -> dict[str, list[str]]:
    """The table rows of a page as {name in the first cell: the other cells}; a first cell may contain several names."""
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in page(name).splitlines() if line[:1] == "|"]
    return {key.strip("` "): cells for first, *cells in lines for key in first.split(",")}


def test_every_rule_is_in_guide_table() -> None:
    table = rows("choose_a_rule")
    assert [name for name in ALGORITHMS if name not in table] == []


@pytest.mark.parametrize(("place", "net", "shape"), [(0, "mlp", (1, 28, 28)), (1, "resnet20", (3, 32, 32))], ids=["mlp", "res"])
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_table_memory_and_multiplications_are_correct(name: str, place: int, net: str, shape: tuple[int, int, int]) -> None:
    *_, feedback, arithmetic = rows("choose_a_rule")[name]
    model = ARCHITECTURES[net]().build(shape, 10)
    weights = _bytes(model.parameters())
    options: dict[str, Any] = {"wm": {"initial_steps": 0}, "f3": {"samples": 64}}.get(name, {})
    rule = fa_bench.attach(model, name, sample_input=torch.zeros(2, *shape), **options)
    stored = _bytes(_stored_feedback(rule).values())
    assert float(feedback.split(", ")[place]) == pytest.approx(stored / weights, rel=5e-3, abs=6e-3)
    own, exact = (cost.multiplications for cost in step_costs(rule, shape, 10, 64))
    assert arithmetic.split(", ")[place] == f"{own / exact:.2f}"


# ------------------------------------------------------------------------------------------------ read the metrics
def test_every_run_key_is_documented() -> None:
    small = ["dataset=synthetic", "dataset.samples=64", "dataset.test_samples=16", "architecture.widths=[8]", "epochs=1"]
    assert main([*small, "algorithm=dfa", "hydra.run.dir=run"]) == 0
    shown = set(re.findall(r"`([\w/]+)`", "\n".join(line for line in page("read_the_metrics").splitlines() if line[:1] == "|")))
    metrics, result = json.loads(Path("run/metrics.jsonl").read_text()), json.loads(Path("run/result.json").read_text())
    keys = {*metrics, *result, *metrics["angles"], *result["angles"]}
    assert sorted(keys - shown) == []
    others = {"null", *ALGORITHMS}  # these words on the page are not keys
    assert sorted(shown - keys - others) == []
    tags = {tag.split("/")[0] if "/fc" in tag else tag for tag in EventAccumulator("run").Reload().Tags()["scalars"]}
    text = page("read_the_metrics")
    assert [tag for tag in tags if f"`{tag}`" not in text] == []


# ------------------------------------------------------------------------------------------------ add a dataset
def test_dataset_guide_example_works_in_package_and_as_plugin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page("add_a_dataset")
    module, example = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    exec(compile(example, "add_a_dataset.md", "exec"), {})
    Path("arrays.py").write_text(module)
    lines = [shlex.split(line)[1:] for line in re.findall(r"^    (fa-bench .*)$", text, re.M)]
    assert len(lines) == 3
    known = dict(DATASETS._entries)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    try:
        for words in lines:
            assert main([*words, *([] if "plugins=[arrays]" in words else ["plugins=[arrays]"])]) == 0
        said = capsys.readouterr().out
        assert "360 training, 40 validation, 100 test; 1x12x12, 2 classes" in said
        assert float(said.rsplit("test accuracy ", 1)[1].split("%")[0]) > 90
        assert main(["dataset=arrays", "dataset.file=none.npz", "plugins=[arrays]"]) == 2
        assert "dataset=arrays: no data/none.npz" in capsys.readouterr().err
    finally:
        sys.modules.pop("arrays", None)
        DATASETS._entries.clear()
        DATASETS._entries.update(known)
