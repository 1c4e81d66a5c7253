"""Tests of reports on tasks whose score is not an accuracy: columns, direction and figures."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fa_bench.objectives.scores import as_records
from fa_bench.objectives.token_cross_entropy import NEXT_TOKEN, PERPLEXITY
from fa_bench.report import write_report
from fa_bench.report.aggregate import over_tasks
from fa_bench.report.best import choose_best
from fa_bench.report.export import to_latex
from fa_bench.report.figures import report_figures
from fa_bench.report.frames import load_results
from fa_bench.report.groups import in_order
from fa_bench.report.live import titles
from fa_bench.report.quantities import Selection
from fa_bench.report.runs import find_runs
from fa_bench.report.table import summarise
from tests.report.by_hand import runs_in, without_pixels, write_run, write_set

SCORES = as_records((PERPLEXITY, NEXT_TOKEN))


def lines_of(perplexity: float, val: float) -> list[dict]:
    return [
        {
            "epoch": epoch,
            "step": epoch,
            "train_loss": 1.0,
            "val_loss": 1.0,
            "test_loss": 1.0,
            "lr": 0.1,
            "seconds": 1.0,
            "angles": None,
            "scores": SCORES,
            "test_perplexity": 9.0 if epoch == 1 else perplexity,
            "val_perplexity": val,
            "test_accuracy": 0.5,
            "train_perplexity": 2.0,
        }
        for epoch in (1, 2)
    ]


def write_tokens(root: Path, rule: str, seed: int, perplexity: float, val: float, lr: float = 0.1, dataset: str = "text") -> Path:
    return write_set(
        root,
        rule,
        seed,
        0.5,
        None,
        lr,
        dataset=dataset,
        scores=SCORES,
        test_perplexity=perplexity,
        val_perplexity=val,
        train_perplexity=2.0,
        test_perplexity_at_best_val=perplexity,
        metrics=lines_of(perplexity, val),
    )


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_lower_perplexity_is_better_in_every_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is bp's setting with the lower perplexity; by perplexity, kp beats the floor, and fa does not."""
    without_pixels(monkeypatch)
    for seed in range(3):
        write_tokens(tmp_path, "bp", seed, 4.0 + 0.1 * seed, 4.0, lr=0.1)
        write_tokens(tmp_path, "bp", seed, 3.0 + 0.1 * seed, 3.0, lr=0.2)
        write_tokens(tmp_path, "frozen", seed, 8.0, 8.0)
        write_tokens(tmp_path, "kp", seed, 3.5 + 0.2 * seed, 3.5)
        write_tokens(tmp_path, "fa", seed, 9.0, 9.0)
    report = write_report(find_runs([tmp_path]), tmp_path / "report")
    table = {row["label"]: row for row in rows(tmp_path / "report", "report.csv")}
    kp, fa = table["kp"], table["fa"]
    assert (kp["bp_row"], kp["floor"], fa["floor"]) == ("bp lr=0.2", "True", "False") and "does not beat frozen" in fa["note"]
    assert float(kp["test_perplexity"]) == pytest.approx(3.7) and float(kp["bp_difference"]) == pytest.approx(0.6)
    assert float(kp["floor_perplexity"]) == 8 and kp["test_accuracy"] == "" and float(kp["bp_difference_p"]) < 0.05
    assert "test perplexity (mean ± std)" in report.text or "test perplexity (± std)" in report.text
    assert "test perplexity" in report.markdown.read_text() and "(points)" not in report.markdown.read_text().split("##")[0]
    run = next(row for row in rows(tmp_path / "report", "runs.csv") if row["label"] == "kp" and row["seed"] == "1")
    assert float(run["test_perplexity"]) == pytest.approx(3.7) and float(run["test_accuracy"]) == 50


def test_best_selects_lowest_perplexity(tmp_path: Path) -> None:
    for lr, val in ((0.1, 5.0), (0.2, 3.0), (0.4, 4.0)):
        write_tokens(tmp_path, "kp", 0, val, val, lr=lr)
    choice = choose_best(runs_in(tmp_path), ["optimizer.lr"])
    assert [run.config["optimizer.lr"] for run in choice.runs] == [0.2]
    assert list(choice.tried["val_perplexity"]) == [5.0, 3.0, 4.0]


def test_tasks_with_different_scores_have_separate_columns_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pixels(monkeypatch)
    for lr in (0.1, 0.2):
        write_tokens(tmp_path, "kp", 0, 3.0, 3.0, lr)
        write_set(tmp_path, "kp", 0, 0.9, 0.9, lr)
    write_report(find_runs([tmp_path]), tmp_path / "report")
    table = rows(tmp_path / "report", "report.csv")
    assert [(row["dataset"], row["test_accuracy"], row["test_perplexity"]) for row in table] == [
        ("digits", "90", ""),
        ("digits", "90", ""),
        ("text", "", "3"),
        ("text", "", "3"),
    ]
    runs = in_order(runs_in(tmp_path))
    names = [name for name, *_ in report_figures(runs, Selection(), runs)]
    assert {"", "optimizer.lr", "optimizer.lr-test_perplexity"} <= {*names}
    frame, left_out = over_tasks(runs)
    assert list(frame["tasks"]) == [1]
    assert left_out == ["text, mlp is not in the aggregate: its score is not an accuracy (perplexity)"]


def test_data_frames_and_live_view_show_score(tmp_path: Path) -> None:
    from fa_bench.report.live import Watcher, plain_text

    write_tokens(tmp_path, "kp", 0, 3.25, 3.5)
    frame = load_results(tmp_path)
    assert frame["test_perplexity"].tolist() == [3.25]
    assert load_results(tmp_path, curves=True)["val_perplexity"].tolist() == [3.5, 3.5]
    lines = Watcher([tmp_path]).look(0.0)
    assert titles(lines)[4:6] == ("val perplexity", "test perplexity") and "3.2500" in plain_text(lines)[1]
    write_run(tmp_path, "bp", 0, 0.9)
    assert titles(Watcher([tmp_path]).look(0.0))[4:6] == ("val", "test")


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        ([{"name": "loss", "title": "x"}], r"scores\[0\]\.name=loss"),
        ([{"name": "f1"}], r"scores\[0\]\.title"),
        ([3], r"scores\[0\]=3"),
        ("f1", "scores=f1"),
        ([{"name": "f1", "title": "F1", "higher_is_better": 1}], "higher_is_better=1"),
    ],
)
def test_malformed_scores_are_rejected(tmp_path: Path, scores: object, problem: str) -> None:
    from fa_bench.report.runs import read_run
    from fa_bench.runs.checked_json import RecordError

    with pytest.raises(RecordError, match=problem.replace("=loss", "='loss'").replace("=f1", "='f1'")):
        read_run(write_run(tmp_path, "bp", 0, 0.9, scores=scores))


def test_text_as_score_value_is_rejected(tmp_path: Path) -> None:
    from fa_bench.report.runs import read_run
    from fa_bench.runs.checked_json import RecordError

    with pytest.raises(RecordError, match="test_perplexity='low'"):
        read_run(write_run(tmp_path, "bp", 0, 0.5, scores=SCORES, test_perplexity="low"))


def test_run_without_records_has_scores_of_its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first seed was killed in its first epoch, so that it has only a config; its row keeps the score of the other seed."""
    without_pixels(monkeypatch)
    write_tokens(tmp_path, "bp", 0, 4.0, 4.0)
    killed, _ = (write_tokens(tmp_path, "fa", seed, 5.0, 5.0) for seed in (0, 1))
    for name in ("result.json", "metrics.jsonl"):
        (killed / name).unlink()
    write_report(find_runs([tmp_path]), tmp_path)
    _, fa = rows(tmp_path, "report.csv")
    assert (fa["status"], fa["test_perplexity"]) == ("1 finished, 1 interrupted", "5") and "test_accuracy" not in next(
        line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| rule")
    )


def test_latex_differences_have_decimal_places_of_markdown(tmp_path: Path) -> None:
    write_tokens(tmp_path, "bp", 0, 4.0, 4.0)
    write_tokens(tmp_path, "fa", 0, 4.0034, 4.0)
    runs = in_order(run for run in runs_in(tmp_path) if run is not None)
    assert "$+0.0034$" in to_latex(summarise(runs))
