"""Tests of the script that collects results and writes docs/results.md and the README's results from them."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

import fa_bench

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import make_results

STUDIES = sorted(path.parent.name for path in make_results.DATA.glob("*/about.yaml"))


def test_page_is_up_to_date_with_committed_results():
    assert make_results.PAGE.read_text(encoding="utf-8") == make_results.render()
    assert make_results.README.read_text(encoding="utf-8") == make_results.render_readme()


def test_every_committed_result_is_on_page():
    template = (make_results.DATA / make_results.TEMPLATE).read_text(encoding="utf-8")
    for name in STUDIES:
        assert f'study("{name}")' in template
    for path in (make_results.DATA / "archived").glob("*.csv"):
        assert f'archived("{path.stem}")' in template


@pytest.mark.parametrize("name", STUDIES)
def test_study_statistics_match_runs(name: str):
    study = make_results.Study(name, make_results.DATA / name)
    finished = study.runs[study.runs["status"] == "finished"]
    for label, row in study.report.iterrows():
        runs = finished[finished["label"] == label]["test_accuracy"]
        assert len(runs) == row["n"]
        if len(runs):
            assert runs.mean() == pytest.approx(row["test_accuracy"], abs=1e-6)
        if len(runs) > 1:
            assert runs.std() == pytest.approx(row["test_accuracy_std"], abs=1e-6)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    runs = fa_bench.run(
        "dataset=digits", "scale=smoke", algorithm=["bp", "frozen"], seed=[0, 1], **{"hydra.sweep.dir": str(tmp_path / "sweep")}
    )
    for run in runs:  # the checkout may have uncommitted changes
        path = Path(run.directory) / "result.json"
        result = json.loads(path.read_text())
        result["git"] = {"commit": "1" * 40, "dirty": False}
        path.write_text(json.dumps(result))
    return tmp_path / "sweep"


def test_collecting_keeps_tables_and_provenance(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(make_results, "DATA", tmp_path / "data")
    folder = make_results.collect("mine", "fa-bench -m algorithm=bp,frozen seed=0,1", [sweep])
    study = make_results.Study("mine", folder)
    assert study.about["commit"] == "1" * 40
    assert study.about["threads"] >= 1
    assert set(study.report.index) == {"bp", "frozen"}
    assert len(study.runs) == 4
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.iterdir())
    assert "    fa-bench -m algorithm=bp,frozen seed=0,1\n\nThe runs are from commit 1111111 (torch " in study.header()
    assert "seeds 0 to 1)." in study.header()
    head, _, *rows = study.table("rule", "test accuracy (%)", "beats the floor", labels=["frozen", "bp"]).splitlines()
    assert head == "| rule | test accuracy (%) | beats the floor |"
    assert [row.split(" | ")[0] for row in rows] == ["| frozen", "| bp"]
    assert f"{study.runs[study.runs['label'] == 'bp']['test_accuracy'].mean():.2f} ± " in rows[1]
    assert rows[0].endswith("| floor |")


def test_gpu_runs_report_device_name(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(make_results, "DATA", tmp_path / "data")
    for path in sweep.rglob("result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "cuda (NVIDIA H200)"}))
    study = make_results.Study("mine", make_results.collect("mine", "fa-bench", [sweep]))
    assert study.about["processor"] == "NVIDIA H200"
    assert study.header().endswith(", NVIDIA H200, seeds 0 to 1).")


TUNE = """\
rule,n,test_accuracy,test_accuracy_ci95,bp_difference,bp_difference_ci95,floor_accuracy,floor,chosen,val_accuracy,trials,diverged,note
bp,5,97.125,0.25,,,92.0,True,optimizer.lr=0.0123456 optimizer.weight_decay=0,98,20,1,
frozen,5,92,0.5,-5.125,0.5,,,optimizer.lr=0.1,93,20,0,
drtp,5,91.5,0.5,-5.625,0.75,92.0,False,optimizer.lr=0.1 algorithm.b_init=pytorch,93,20,3,
frozen_blocks,5,91.25,0.5,-5.875,0.5,92.0,False,optimizer.lr=0.1,93,20,0,
weight_perturbation,0,,,,,,,,,20,20,no trial finished: nothing to train
"""


def test_tuned_studies_are_collected_and_compared(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(make_results, "DATA", tmp_path / "data")
    final = sweep.rename(tmp_path / "tuned")
    (tmp_path / "tune.csv").write_text(TUNE)
    (tmp_path / "trials.csv").write_text("rule,trial,reason\nbp,0,/somewhere/run.log\n")
    folder = make_results.collect("mine", "fa-bench-tune", [final])
    assert (folder / "trials.csv").read_text() == "rule,trial\nbp,0\n"
    study = make_results.Study("mine", folder)
    _, _, *rows = study.tuned_table().splitlines()
    assert rows == [
        "| bp | 97.12 ± 0.25 | - | - | 1 of 20 | `lr=0.0123` `weight_decay=0` |",
        "| frozen | 92.00 ± 0.50 | -5.12 | 0.50 | 0 of 20 | `lr=0.1` |",
        "| drtp | **91.50 ± 0.50** | -5.62 | 0.75 | 3 of 20 | `lr=0.1` `b_init=pytorch` |",
        "| frozen_blocks | **91.25 ± 0.50** | -5.88 | 0.50 | 0 of 20 | `lr=0.1` |",
        "| weight_perturbation | did not train | - | - | 20 of 20 | - |",
    ]
    assert make_results.compared({"here": "mine"}).splitlines() == [
        "| rule | here |",
        "| --- | --- |",
        "| bp | 97.12 ± 0.25 |",
        "| frozen | 92.00 ± 0.50 |",
        "| drtp | **91.50 ± 0.50** |",
        "| frozen_blocks | **91.25 ± 0.50** |",
        "| weight_perturbation | did not train |",
    ]
    (shutil.copytree(folder, folder.with_name("other")) / "tune.csv").write_text("".join(TUNE.splitlines(keepends=True)[:3]))
    assert make_results.compared({"here": "mine", "there": "other"}, common=True).splitlines()[2:] == [
        "| bp | 97.12 ± 0.25 | 97.12 ± 0.25 |",
        "| frozen | 92.00 ± 0.50 | 92.00 ± 0.50 |",
    ]


def test_by_setting_table_shows_every_run_and_marks_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "about.yaml").write_text("command: c\n")
    (tmp_path / "mine" / "report.csv").write_text("label,n\nbp,1\n")
    (tmp_path / "mine" / "runs.csv").write_text(
        "algorithm,status,optimizer.lr,val_accuracy\nbp,finished,0.1,91.5\nbp,finished,0.01,92.25\nkp,diverged,0.1,\n"
        "fa,interrupted,0.01,99.5\n"
    )
    assert make_results.Study("mine", tmp_path / "mine").by_setting("optimizer.lr").splitlines() == [
        "| rule | 0.01 | 0.1 |",
        "| --- | --- | --- |",
        "| bp | **92.25** | 91.50 |",
        "| kp | - | diverged |",
        "| fa | interrupted | - |",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"git": {"commit": "2" * 40, "dirty": False}}, "more than one commit"),
        ({"git": {"commit": "1" * 40, "dirty": True}}, "uncommitted changes"),
    ],
)
def test_runs_of_mixed_or_uncommitted_code_are_rejected(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
):
    monkeypatch.setattr(make_results, "DATA", tmp_path / "data")
    path = next(iter(sorted(sweep.rglob("result.json"))))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SystemExit, match=message):
        make_results.collect("mine", "fa-bench", [sweep])
    assert not (tmp_path / "data").exists()


def test_archived_tables_have_all_columns_and_rows():
    for path in sorted((make_results.DATA / "archived").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            head, *rows = csv.reader(file)
        lines = make_results.archived(path.stem).splitlines()
        assert [cell.strip() for cell in lines[0].strip("|").split(" | ")] == head
        assert len(lines) == len(rows) + 2
