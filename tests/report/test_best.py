"""The best setting of each rule is chosen by validation accuracy, and references are compared at their best settings."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

import fa_bench
from fa_bench.errors import DataError
from fa_bench.report import write_report
from fa_bench.report.best import choose_best, parse_keys
from fa_bench.report.cli import main
from fa_bench.report.groups import in_order
from fa_bench.report.references import NEAREST
from fa_bench.report.runs import find_runs
from fa_bench.report.table import summarise

from .by_hand import TWO_SEEDS, blank, runs_in, without_pixels, write_run, write_set


@pytest.fixture(autouse=True)
def drawn_quickly(monkeypatch):
    without_pixels(monkeypatch)


def chosen(root: Path, *keys: str) -> dict[str, str]:
    """Map each rule to its chosen setting."""
    best = choose_best(in_order(runs_in(root)), keys or ["optimizer.lr"])
    return {run.result["algorithm"]: best.chosen[run.row].values for run in best.runs}


def rows(folder: Path, name: str = "report.csv") -> dict[str, dict[str, str]]:
    return {row["label"]: row for row in csv.DictReader((folder / name).read_text().splitlines())}


def write_values(root: Path, rule: str, by_lr: dict[float, list[tuple[float | None, float]]], **changes) -> None:
    """Write the runs of a rule, given {learning rate: [(validation, test accuracy) of each seed]}."""
    for lr, seeds in by_lr.items():
        for seed, (val, test) in enumerate(seeds):
            write_set(root, rule, seed, test, val, lr, **changes)


def study(root: Path) -> None:
    """Write a study in which the best rates by validation are 0.1 for bp and 0.02 for fa, but 0.02 for both by test accuracy."""
    write_values(root, "bp", {0.02: [(0.80, 0.99)] * 3, 0.1: [(0.90, 0.91), (0.92, 0.92), (0.94, 0.93)], 0.5: [(0.85, 0.5)] * 3})
    write_values(root, "fa", {0.02: [(0.90, 0.90), (0.90, 0.92), (0.90, 0.91)], 0.1: [(0.7, 0.7)] * 3, 0.5: [(0.1, 0.1)] * 3})


def test_best_selects_value_with_highest_validation_accuracy(tmp_path, capsys):
    study(tmp_path)
    assert main([str(tmp_path), "--best", "optimizer.lr"]) == 0
    table = rows(tmp_path)
    bp, fa = table["bp lr=0.1"], table["fa lr=0.02"]
    assert len(table) == 2 and (bp["tried"], bp["chosen"]) == ("3", "optimizer.lr=0.1")
    assert (bp["val_accuracy"], bp["test_accuracy"], bp["note"]) == ("92", "92", "")
    # The differences are -1, 0, -2, and their mean is -1.
    assert (fa["test_accuracy"], fa["bp_difference"], fa["bp_row"]) == ("91", "-1", "bp lr=0.1")
    assert fa["note"] == "optimizer.lr=0.02 is the smallest of 3 values tried"
    tried = list(csv.DictReader((tmp_path / "report_tried.csv").read_text().splitlines()))
    assert [(row["optimizer.lr"], row["val_accuracy"], row["chosen"]) for row in tried] == [
        ("0.02", "80", "False"),
        ("0.1", "92", "True"),
        ("0.5", "85", "False"),
        ("0.02", "90", "True"),
        ("0.1", "70", "False"),
        ("0.5", "10", "False"),
    ]
    said = capsys.readouterr().out
    assert "note: fa lr=0.02: optimizer.lr=0.02 is the smallest" in said and "warning" not in said
    assert "## Values tried: optimizer.lr\n" in (tmp_path / "report.md").read_text()
    assert len(rows(tmp_path, "runs.csv")) == 6  # every setting is listed, chosen or not
    assert main([str(tmp_path)]) == 0 and not (tmp_path / "report_tried.csv").exists()


def test_ties_up_to_rounding_select_smaller_value(tmp_path):
    write_values(tmp_path, "fa", {10.0: [(0.9, 0.1)] * 3, 9.0: [(0.8, 0.1), (0.9, 0.1), (1.0, 0.1)], 0.5: [(0.1, 0.9)]})
    assert chosen(tmp_path) == {"fa": "optimizer.lr=9.0"}


def test_diverged_value_counts_as_tried_but_is_never_selected(tmp_path):
    write_values(tmp_path, "fa", {0.1: [(0.8, 0.8)] * 3, 0.2: [(0.99, 0.99)] * 2})
    write_set(tmp_path, "fa", 2, None, None, 0.2, status="diverged")
    write_values(tmp_path, "kp", {0.1: [(None, 0.1)], 0.2: [(None, 0.1)]}, status="diverged")
    write_values(tmp_path, "usf", {0.1: [(0.5, 0.5)]}, status="diverged")
    best = choose_best(in_order(runs_in(tmp_path)), ["optimizer.lr"])
    (fa,) = best.chosen.values()
    assert fa.values == "optimizer.lr=0.1" and fa.tried == 2
    assert fa.note == "optimizer.lr=0.1 is the smallest of 2 values tried; 1 of 2 values diverged"
    assert best.warnings == [
        "kp is not compared (digits, mlp): 2 values of optimizer.lr tried, none can be chosen (2 diverged)",
        "usf is not compared (digits, mlp): 1 value of optimizer.lr tried, none can be chosen (1 diverged)",
    ]


def test_without_validation_only_single_value_is_selected(tmp_path):
    write_values(tmp_path, "fa", {0.1: [(None, 0.9)], 0.2: [(None, 0.8)]})
    write_values(tmp_path, "bp", {0.1: [(None, 0.9)]})
    best = choose_best(in_order(runs_in(tmp_path)), ["optimizer.lr"])
    assert [choice.values for choice in best.chosen.values()] == ["optimizer.lr=0.1"]
    assert best.warnings[0] == (
        "fa is not compared (digits, mlp): 2 values of optimizer.lr tried, no validation accuracy to choose by"
    )
    for path in tmp_path.glob("bp-*/result.json"):
        path.unlink()
    with pytest.raises(DataError, match="fa is not compared"):
        choose_best([run for run in runs_in(tmp_path) if run is not None], ["optimizer.lr"])


def test_unequal_budgets_are_noted_and_warned_about(tmp_path):
    write_values(
        tmp_path,
        "bp",
        {0.1: [(0.9, 0.9)] * 3, 0.2: [(0.8, 0.9)] * 3, 0.05: [(0.7, 0.9)] * 3},
        epochs=4,
        epoch=4,
        metrics=[{"epoch": epoch} for epoch in range(1, 5)],
    )
    write_values(tmp_path, "fa", {0.05: [(0.8, 0.9)] * 2, 0.1: [(0.9, 0.9)] * 2, 0.2: [(0.8, 0.9)]})
    write_values(tmp_path, "kp", {0.1: [(0.9, 0.9)] * 3})
    report = write_report(find_runs([tmp_path]), tmp_path, best=["optimizer.lr"])
    warning = (
        "unequal budgets (digits, mlp): values of optimizer.lr: 1 (kp), 3 (bp lr=0.1, fa lr=0.1); "
        "seeds: 2 (fa lr=0.1), 3 (bp lr=0.1, kp); epochs: 2 (fa lr=0.1, kp), 4 (bp lr=0.1)"
    )
    assert f"\nwarning: {warning}\n" in f"{report.text}\n" and "## Warnings\n" in report.markdown.read_text()
    table = rows(tmp_path)
    assert table["bp lr=0.1"]["note"] == "unequal budgets: 3 values (others 1 to 3), 3 seeds (others 2 to 3), 4 epochs (others 2)"
    assert table["fa lr=0.1"]["note"] == (
        "bp was trained for 4 epochs, but this row for 2; 1 to 2 finished seeds per value; "
        f"unequal budgets: 3 values (others 1 to 3), 2 seeds (others 3), 2 epochs (others 2 to 4); {TWO_SEEDS}"
    )
    assert "1 value (others 3)" in table["kp"]["note"]


def test_multiple_keys_are_selected_jointly(tmp_path):
    for decay, density, lr, val in (
        (0.0, 1.0, 0.1, 0.7),
        (0.0, 1.0, 0.2, 0.8),
        (0.1, 1.0, 0.1, 0.9),
        (0.1, 0.5, 0.2, 0.6),
        (0.0, 0.5, 0.1, 0.65),
    ):
        write_set(
            tmp_path,
            "fa",
            0,
            val,
            val,
            lr,
            config={
                "algorithm": {"name": "fa", "density": density},
                "optimizer": {"name": "sgd", "lr": lr, "weight_decay": decay},
            },
        )
    best = choose_best(in_order(runs_in(tmp_path)), parse_keys(" optimizer.lr,optimizer.weight_decay,optimizer.lr"))
    assert {run.config["algorithm.density"]: best.chosen[run.row][:2] for run in best.runs} == {
        1.0: ("optimizer.lr=0.1 optimizer.weight_decay=0.1", 3),
        0.5: ("optimizer.lr=0.1 optimizer.weight_decay=0.0", 2),
    }


def test_selection_is_separate_per_task_and_code_version(tmp_path):
    for dataset, code, good in (("digits", "a", 0.1), ("mnist", "a", 0.2), ("digits", "b", 0.2)):
        for lr in (0.1, 0.2):
            write_set(tmp_path, "fa", 0, 0.5, 0.9 if lr == good else 0.8, lr, dataset=dataset, code_hash=code)
    best = choose_best(in_order(runs_in(tmp_path)), ["optimizer.lr"])
    assert {(run.result["dataset"], run.result["code_hash"]): run.config["optimizer.lr"] for run in best.runs} == {
        ("digits", "a"): 0.1,
        ("mnist", "a"): 0.2,
        ("digits", "b"): 0.2,
    }


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("optimizer.lrr", "no run has this key; did you mean 'optimizer.lr'? K"),
        ("lr", "no run has this key; did you mean 'optimizer.lr'? K"),
        ("gamma", "no run has this key; k"),
        ("optimizer", "nothing to choose, because optimizer=sgd in all runs; k"),
        ("algorithm.density", "nothing to choose, because it differs only between rules; k"),
        ("seed", "cannot be chosen, because runs of different seeds are averaged; k"),
        ("dataset.size", "cannot be chosen, because it is part of the task; k"),
    ],
)
def test_best_rejects_unselectable_key_before_writing(tmp_path, capsys, key, said):
    for number, rule in enumerate(("fa", "kp")):
        for lr in (0.1, 0.2):
            write_set(tmp_path, rule, 0, 0.9, lr=lr, config={"algorithm": {"name": rule, "density": number}})
    assert main([str(tmp_path), "--best", key]) == 2
    there = "eys that differ between runs of a rule: optimizer.lr"
    assert capsys.readouterr().err == f"fa-bench-report: --best {key}: {said}{there}\n"
    assert not (tmp_path / "report.md").exists()


def test_best_needs_a_key(tmp_path, capsys):
    assert main([str(tmp_path), "--best", ","]) == 2
    assert capsys.readouterr().err == "fa-bench-report: --best: no key given; an example is --best optimizer.lr\n"


# References.


def by_label(root: Path, **options) -> dict:
    return {row["label"]: row for row in summarise(in_order(runs_in(root)), **options).to_dict("records")}


def test_reference_is_best_setting_of_its_rule(tmp_path):
    study(tmp_path)
    write_values(tmp_path, "frozen", {0.02: [(0.6, 0.95)], 0.1: [(0.5, 0.1)]})
    table = by_label(tmp_path)
    for lr, difference in ((0.02, -1), (0.1, -22), (0.5, -82)):
        row = table[f"fa lr={lr}"]
        assert row["bp_difference"] == pytest.approx(difference) and row["bp_row"] == "bp lr=0.1"
        assert (row["floor_accuracy"], row["floor_row"], row["floor"]) == (95, "frozen lr=0.02", False)
    nearest = by_label(tmp_path, reference=NEAREST)
    assert nearest["fa lr=0.02"]["bp_difference"] == pytest.approx(-8) and nearest["fa lr=0.02"]["bp_row"] == "bp lr=0.02"
    assert nearest["fa lr=0.1"]["floor"] is True and nearest["fa lr=0.1"]["floor_row"] == "frozen lr=0.1"


def test_diverged_reference_is_not_best(tmp_path):
    write_values(tmp_path, "bp", {0.1: [(0.8, 0.8)] * 2, 0.2: [(0.9, 0.9)] * 2})
    write_set(tmp_path, "bp", 2, None, None, 0.2, status="diverged")
    write_values(tmp_path, "fa", {0.2: [(0.7, 0.7)] * 2})
    assert by_label(tmp_path)["fa"]["bp_row"] == "bp lr=0.1"


def test_reference_has_same_code_and_preferably_same_epochs(tmp_path):
    for code, epochs, val in (("a", 2, 0.5), ("a", 9, 0.9), ("b", 2, 0.99)):
        write_set(tmp_path, "bp", 0, val, val, epochs=epochs, code_hash=code)
    for code, epochs in (("a", 2), ("a", 5), ("c", 2)):
        write_set(tmp_path, "fa", 0, 0.4, 0.4, epochs=epochs, code_hash=code)
    table = {
        (row["code_hash"], row["epochs"]): (row["floor_accuracy"], round(row["bp_difference"]), row["note"])
        for row in by_label(tmp_path).values()
        if row["label"].startswith("fa")
    }
    assert [table[key][1:] for key in (("a", 2), ("a", 5), ("c", 2))] == [
        (-10, ""),
        (-50, "bp was trained for 9 epochs, but this row for 5"),
        (-59, "the runs of bp used different code"),
    ]


def test_without_validation_nearest_reference_is_used_and_noted(tmp_path):
    write_values(tmp_path, "bp", {0.1: [(None, 0.8)], 0.2: [(None, 0.9)]})
    write_values(tmp_path, "fa", {0.1: [(None, 0.7)]})
    row = by_label(tmp_path)["fa"]
    assert row["bp_row"] == "bp lr=0.1" and row["bp_difference"] == pytest.approx(-10)
    assert row["note"] == "bp chosen by its settings: no row of it can be chosen by validation accuracy"
    for path in tmp_path.glob("bp-*/result.json"):
        path.write_text(path.read_text().replace('"finished"', '"failed"'))
    row = by_label(tmp_path)["fa"]
    assert blank(row["bp_difference"]) and row["note"] == "none of 2 rows of bp has a finished run"


def test_unpaired_seeds_are_noted(tmp_path):
    for seed, accuracy in ((0, 0.9), (1, 0.8), (2, 0.7)):
        write_set(tmp_path, "bp", seed, accuracy)
    for seed, accuracy in ((1, 0.7), (2, 0.65), (3, 0.1)):
        write_set(tmp_path, "fa", seed, accuracy)
    row = by_label(tmp_path)["fa"]
    # The two differences are -10 and -5.
    assert (row["bp_difference"], row["bp_difference_low"], row["bp_difference_high"]) == pytest.approx((-7.5, -10, -5))
    assert row["bp_difference_n"] == 2 and blank(row["bp_difference_ci95"]) and blank(row["bp_difference_p"])
    assert row["note"] == "2 of 3 seeds are paired with bp"


def test_p_values_are_corrected_per_task_without_references(tmp_path):
    by_rule = {"bp": (0.90, 0.90, 0.90), "frozen": (0.5, 0.51, 0.53), "fa": (0.89, 0.88, 0.84), "kp": (0.89, 0.885, 0.88)}
    for dataset in ("digits", "mnist"):
        for rule, accuracies in by_rule.items():
            if (dataset, rule) != ("mnist", "kp"):
                for seed, accuracy in enumerate(accuracies):
                    write_set(tmp_path, rule, seed, accuracy, dataset=dataset)
    table = {(row["dataset"], row["label"].split()[0]): row for row in by_label(tmp_path).values()}
    fa, kp = table["digits", "fa"], table["digits", "kp"]
    # For fa, the differences are -1, -2, -6, so p = 1 - sqrt(27 / 41), see test_statistics. For kp, the differences are -1, -1.5,
    # -2, with mean -1.5, std 0.5 and t^2 = 27, so p = 1 - sqrt(27 / 29) = 0.0351. Holm's method doubles kp's p but not fa's.
    assert fa["bp_difference_p"] == fa["bp_difference_p_holm"] == pytest.approx(1 - (27 / 41) ** 0.5)
    assert kp["bp_difference_p"] == pytest.approx(1 - (27 / 29) ** 0.5)
    assert kp["bp_difference_p_holm"] == pytest.approx(2 * (1 - (27 / 29) ** 0.5)) and kp["bp_difference_dz"] == pytest.approx(-3)
    assert table["mnist", "fa"]["bp_difference_p_holm"] == table["mnist", "fa"]["bp_difference_p"]
    assert all(blank(table["digits", rule]["bp_difference_p_holm"]) for rule in ("bp", "frozen"))
    assert not blank(table["digits", "frozen"]["bp_difference_p"])


def test_default_report_does_not_replace_report_covering_more_runs(tmp_path, capsys):
    study(tmp_path)
    fa = sorted(map(str, tmp_path.glob("fa-*")))
    assert main([str(tmp_path)]) == 0 and main(fa) == 2
    assert "has a report that covers 9 more runs; choose another folder with --out DIR" in capsys.readouterr().err
    assert main([*fa, "--out", str(tmp_path / "out")]) == 0 and len(rows(tmp_path)) == 6


def test_run_without_config_is_separate_setting(tmp_path):
    study(tmp_path)
    write_run(tmp_path, "kp", 0, 0.9, val_accuracy=0.9)
    assert chosen(tmp_path) == {"bp": "optimizer.lr=0.1", "fa": "optimizer.lr=0.02", "kp": ""}


def test_documented_pandas_snippet_finds_best_rates(tmp_path, monkeypatch):
    study(tmp_path / "outputs" / "digits-mlp")
    write_set(tmp_path / "outputs" / "digits-mlp", "fa", 9, None, 0.99, 0.1, status="diverged")
    page = (Path(__file__).resolve().parents[2] / "docs" / "reports.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert lines.count("\n") == 3
    monkeypatch.chdir(tmp_path)
    variables = {"fa_bench": fa_bench}
    exec(compile(lines, "reports.md", "exec"), variables)
    assert dict(variables["best"]) == {"bp": 0.1, "fa": 0.02}
    assert variables["table"].loc["bp", 0.1] == pytest.approx(0.92)


def test_numeric_columns_stay_numeric_without_values(tmp_path):
    write_set(tmp_path, "fa", 0, None, None, config={"clip_norm": None, "a": True}, status="failed", seconds=None)
    write_set(tmp_path, "fa", 1, None, None, config={"clip_norm": 2, "a": True}, status="failed", seconds=None)
    frame = fa_bench.load_results(tmp_path)
    assert {frame[name].dtype.kind for name in ("val_accuracy", "test_accuracy", "seconds", "clip_norm", "optimizer.lr")} == {"f"}
    assert frame["seed"].dtype.kind == "i" and frame["a"].dtype.kind == "b"


def test_budget_of_epochs_is_that_of_finished_runs(tmp_path):
    for rule in ("bp", "fa"):
        write_values(tmp_path, rule, {0.1: [(0.9, 0.9)] * 2, 0.2: [(0.8, 0.9)] * 2}, epoch=2)
    for path in tmp_path.glob("fa-*-0/result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "interrupted", "epoch": 1}))
        (path.parent / "metrics.jsonl").write_text('{"epoch": 1}\n')
    best = choose_best(in_order(runs_in(tmp_path)), ["optimizer.lr"])
    assert "seeds: 1 (fa lr=0.1), 2 (bp lr=0.1)" in best.warnings[0] and "epoch" not in str((best.warnings, best.chosen))


def test_figures_of_rules_without_choice_are_refused_before_writing(tmp_path, capsys):
    study(tmp_path)
    write_values(tmp_path, "kp", {0.1: [(None, 0.1)]}, status="diverged")
    assert main([str(tmp_path), "--best", "optimizer.lr", "--rules", "kp", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fa-bench-report: rules=kp: no setting of these rules could be chosen; kp is not compared")
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()
