"""Every analysis runs as a command that writes a table and a figure. The same options produce identical files, and errors are
reported in one line."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.image import imread

from fa_bench.analyses.cli import main
from fa_bench.registry.registries import ANALYSES

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "brain_correlation": ["neurons=20", "draws=2", "fractions=[0.5]"],
    "forward_alignment_theorem": ["seeds=1", "time=1", "lr=0.1", "records=4"],
    "memory_accesses": ["architectures=['resnet20:width=2,blocks=1']", "k=[2]", "batch=[1]"],
    "qualitative_table": [
        "rules=[bp,'pfa:ratio=2']",
        "architecture=mlp:widths=[8,8]",
        "dataset=synthetic:samples=80,test_samples=16",
        "epochs=1",
        "seeds=1",
    ],
    "shortcut_effect": [
        "with_shortcuts=resnet20:width=2,blocks=1",
        "without_shortcuts=resnet20:width=2,blocks=1,shortcuts=false",
        "dataset=synthetic:samples=80,test_samples=16",
        "epochs=1",
        "seeds=1",
        "probe_size=8",
    ],
    "pfa_spectrum": ["outputs=8", "inputs=8", "ratios=[1,10]", "histograms=[10]", "draws=2", "bins=4"],
}


def test_every_analysis_is_tested_and_documented() -> None:
    text = (ROOT / "docs" / "analyses.md").read_text()
    assert set(SMALL) == set(ANALYSES)
    assert all(f"fa-bench-analyse {name}" in text for name in ANALYSES)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_writes_table_and_figure(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main([name, *SMALL[name], "--out", str(tmp_path)])
    assert capsys.readouterr().out.endswith(f"{tmp_path / name}.csv\n{tmp_path / name}.png\n")
    table = pd.read_csv(tmp_path / f"{name}.csv")
    assert len(table) > 1 and not table.isna().all(axis=None)
    assert imread(tmp_path / f"{name}.png").std() > 0.05, "the picture is empty"


def test_same_options_give_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for folder in ("a", "b"):
        main(["pfa_spectrum", *SMALL["pfa_spectrum"], "--out", str(tmp_path / folder)])
        written.append([path.read_bytes() for path in sorted((tmp_path / folder).iterdir())])
    assert len(written[0]) == 2 and written[0] == written[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pfa_spectrun"], "fa-bench-analyse: analysis=pfa_spectrun: no such analysis; did you mean 'pfa_spectrum'?"),
        (["pfa_spectrum", "draw=1"], "fa-bench-analyse: draw: unknown option of pfa_spectrum; did you mean 'draws'?"),
        (["pfa_spectrum", "draws=0"], "fa-bench-analyse: draws=0 is out of range (allowed: >= 1)"),
        (["pfa_spectrum", "draws"], "fa-bench-analyse: draws: options are written OPTION=VALUE"),
        (["shortcut_effect", "rule=fa"], "fa-bench-analyse: rule=fa has no option transport"),
        (["shortcut_effect", "rule=asap:j=3"], "fa-bench-analyse: rule.asap.j: unknown option of asap"),
        (["shortcut_effect", "device=gpu"], "fa-bench-analyse: device=gpu is not one of auto"),
        (["qualitative_table", "rules=[fa]"], "fa-bench-analyse: rules=fa must include bp"),
        (["qualitative_table", "optimizer=sdg"], "fa-bench-analyse: optimizer=sdg: no such optimizer; did you mean 'sgd'?"),
        (
            ["qualitative_table", "rules=[bp]", "optimizer=sgd:lr=1e30", "epochs=1"],
            "fa-bench-analyse: bp with seed 0 diverged: not finite",
        ),
        (["pfa_spectrum", "ratios=[1"], "fa-bench-analyse: ratios=[1: cannot be read"),
        (["pfa_spectrum", "ratios=[]", "histograms=[]"], "fa-bench-analyse: ratios=[] is empty; list at least one ratio"),
        (["forward_alignment_theorem", "cases=[]"], "fa-bench-analyse: cases=[] is empty; list at least one case"),
        (["pfa_spectrum", "--draws"], "fa-bench-analyse: unrecognized arguments: --draws"),
    ],
)
def test_errors_are_reported_in_one_line(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*words, "--out", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(message) and said.count("\n") == 1 and not (tmp_path / "none").exists()


def test_help_lists_every_option(capsys: pytest.CaptureFixture) -> None:
    main(["pfa_spectrum", "--help"])
    assert "  draws=100  " in capsys.readouterr().out
    main([])
    listed = capsys.readouterr().out
    assert all(name in listed for name in ANALYSES)


@pytest.mark.filterwarnings("error")
def test_options_may_follow_out_and_histograms_may_be_empty(tmp_path: Path) -> None:
    small = ["outputs=8", "inputs=8", "ratios=[1]", "draws=2", "histograms=[]"]
    assert main(["pfa_spectrum", "--out", str(tmp_path), *small]) == 0
    assert len(pd.read_csv(tmp_path / "pfa_spectrum.csv")) == 6
