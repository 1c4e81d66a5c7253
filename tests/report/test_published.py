"""Tests of the published numbers: the file itself, the runs with which they are compared, and the comparison."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from fa_bench.config.job import conf_dir
from fa_bench.errors import DataError
from fa_bench.registry.registries import ALGORITHMS, ARCHITECTURES, DATASETS
from fa_bench.report.against import against_published
from fa_bench.report.gaps import published_without_run
from fa_bench.report.published import DIFFERENCE, matching_entries, published, read_entries
from fa_bench.report.table import summarise

from .by_hand import ENTRY, TWO_SEEDS, blank, epoch_record, runs_in, write_group, write_run

ENTRIES = published()
EXPERIMENTS = {
    "pfa_fig2",
    "pfa_fig4",
    "pfa_fig5",
    "pfa_fig6",
    "dkp_table1",
    "dkp_table2",
    "asap_table1",
    "asap_table2",
    "asap_table4",
    "asap_table5",
    "asap_fig6",
    "wm_fig3",
    "wm_fig4",
    "faeval",
    "forward_forward",
    "mono_forward",
    "dfc",
}


def found(**wanted) -> list:
    return [entry for entry in ENTRIES if all(getattr(entry, key) == value for key, value in wanted.items())]


def test_entries_cover_expected_experiments() -> None:
    assert {experiment for entry in ENTRIES for experiment in entry.experiments} == EXPERIMENTS


def test_entries_have_valid_rules_and_values() -> None:
    for entry in ENTRIES:
        assert entry.rule in list(ALGORITHMS) and entry.conditions and entry.source and entry.dataset and entry.architecture
        values = [value for value in (entry.value, entry.low, entry.high) if math.isfinite(value)]
        top = {"%": 100, "degrees": 180, "ratio": 3, "points": 100}[entry.unit]
        assert values and all(0 <= value <= top for value in values)
        assert math.isnan(entry.low) == math.isnan(entry.high) != math.isnan(entry.value)
        assert math.isnan(entry.spread) or 0 <= entry.spread < 7
        assert (entry.quantity == DIFFERENCE) == (entry.unit == "points")
        assert ("accuracy" in entry.quantity) == (entry.unit == "%") == (not entry.layer and entry.quantity != DIFFERENCE)
        assert entry.spread_kind in ("std", "standard error")


@pytest.mark.parametrize(
    ("wanted", "value", "spread"),
    [
        ({"table": "Fig. 2a", "rule": "pfa_o"}, 98.416, 0.040),
        (
            {"table": "Table 1", "paper": "DKP paper", "rule": "drtp", "dataset": "CIFAR-10", "quantity": "test_accuracy"},
            55.32,
            6.14,
        ),
        (
            {"table": "Table 2", "paper": "DKP paper", "rule": "dfa", "row": "Tiny ImageNet", "quantity": "test_accuracy"},
            32.116,
            0.66,
        ),
        (
            {"table": "Table 2", "paper": "DKP paper", "rule": "kp", "dataset": "CIFAR-100", "quantity": "train_accuracy"},
            67.70,
            1.88,
        ),
        ({"table": "Table 1", "paper": "Woo et al. 2021", "rule": "asap", "row": "CIFAR-100 ResNet-34"}, 72.81, math.nan),
        ({"table": "Table 4", "rule": "asap", "row": "λ = 5e-5"}, 91.63, math.nan),
        ({"table": "Table 5", "rule": "dgl", "row": "ResNet-34"}, 77.2, math.nan),
        ({"table": "Fig. 2b-e", "rule": "usf", "quantity": "norm_ratio", "layer": "fc3"}, 0.506, math.nan),
        ({"table": "section 6 (Fig. 3)", "rule": "kp", "row": "ResNet-18"}, 100 - 29.2, 0.4),
    ],
)
def test_selected_values_match_papers(wanted, value, spread) -> None:
    (entry,) = found(**wanted)
    assert entry.value == pytest.approx(value) and entry.spread == pytest.approx(spread, nan_ok=True)


@pytest.mark.parametrize("experiment", sorted(EXPERIMENTS & {path.stem for path in (conf_dir() / "experiment").glob("*.yaml")}))
def test_conditions_of_shipped_experiments_are_satisfiable(experiment) -> None:
    for entry in (entry for entry in ENTRIES if experiment in entry.experiments):
        for key, wanted in entry.where.items():
            for value in wanted if isinstance(wanted, list) else [wanted]:
                if key in ("dataset", "architecture"):
                    assert value in {"dataset": DATASETS, "architecture": ARCHITECTURES}[key]
                elif key.split(".")[0] in ("algorithm", "architecture"):
                    names = entry.where.get("architecture", [])
                    classes = (
                        [ALGORITHMS[entry.rule]]
                        if key.startswith("algorithm")
                        else [ARCHITECTURES[name] for name in ([names] if isinstance(names, str) else names)]
                    )
                    assert all(key.partition(".")[2] in {field.name for field in dataclasses.fields(cls)} for cls in classes)


def test_run_is_matched_with_published_number(tmp_path) -> None:
    write_group(tmp_path, "fa", [0.98, 0.99], experiment="pfa_fig2", group="dense", dataset="mnist", epochs=40)
    write_group(tmp_path, "fa", [0.98], experiment="pfa_fig2", group="sparse", dataset="mnist")
    write_group(tmp_path, "fa", [0.98], experiment=None, group="none", dataset="mnist")
    for run in runs_in(tmp_path):
        density = 0.1 if run.result["group"] == "sparse" else 1.0
        (run.directory / "config.yaml").write_text(json.dumps({"algorithm": {"name": "fa", "density": density}}))
    rows = {row["group"]: row for row in summarise(runs_in(tmp_path), ENTRIES).to_dict("records")}
    dense = rows["dense"]
    assert (dense["published"], dense["published_std"], dense["note"]) == (98.234, 0.057, TWO_SEEDS)
    assert dense["published_difference"] == pytest.approx(98.5 - 98.234)
    assert dense["published_source"] == "Li and Benna 2024, Fig. 2a"
    assert all(blank(rows[group]["published"]) for group in ("sparse", "none"))


def test_older_result_is_matched_by_experiment_folder(tmp_path) -> None:
    run = write_run(tmp_path / "a_table" / "bp-0a", "bp", 0, 0.97)
    result = json.loads((run / "result.json").read_text())
    del result["experiment"]
    (run / "result.json").write_text(json.dumps(result))
    (old,) = runs_in(tmp_path)
    assert old.experiment == "a_table" and ENTRY.matches(old)


@pytest.mark.parametrize(
    ("where", "fits"),
    [
        ({}, True),
        ({"dataset": "digits"}, True),
        ({"dataset": ["mnist", "digits"]}, True),
        ({"dataset": "mnist"}, False),
        ({"architecture.widths": [8]}, True),
        ({"architecture.widths": [9]}, False),
        ({"optimizer.lr": 0.1}, True),
        ({"optimizer.lr": [0.2, 0.3]}, False),
        ({"algorithm.density": 1.0}, False),
    ],
)
def test_entry_matches_config_conditions(tmp_path, where, fits) -> None:
    run = write_run(tmp_path, "bp", 0, 0.97)
    (run / "config.yaml").write_text("architecture: {name: mlp, widths: [8]}\noptimizer: {name: sgd, lr: 1e-1}\n")
    entry = dataclasses.replace(ENTRY, where=where)
    assert matching_entries([entry], runs_in(tmp_path)) == ([entry] if fits else [])


def test_published_numbers_are_compared_with_runs(tmp_path) -> None:
    write_group(tmp_path, "bp", [0.97, 0.98, 0.99], train_accuracy=0.5)
    entries = [
        ENTRY,
        dataclasses.replace(ENTRY, value=99.0),
        dataclasses.replace(ENTRY, quantity="train_accuracy", value=51.0, epochs=9),
        dataclasses.replace(ENTRY, quantity="weight_angle", layer="fc3", value=61.0),
        dataclasses.replace(ENTRY, quantity="weight_angle", layer="*", value=math.nan, low=85.0, high=math.inf),
    ]
    rows = against_published(entries, runs_in(tmp_path)).to_dict("records")
    assert [(row["quantity"], row["layer"], row["ours"], row["published"]) for row in rows if row["inside"] is None] == [
        ("test_accuracy", "", pytest.approx(98), 98.5),
        ("train_accuracy", "", 50, 51),
        ("weight_angle", "fc3", 60, 61),
    ]
    assert rows[0]["difference"] == pytest.approx(-0.5) and (rows[0]["published_spread"], rows[0]["published_n"]) == (0.25, 4)
    assert rows[1]["note"] == "published after 9 epochs"
    # fc1 has 89 degrees and fc2 has 80; the number for fc3 alone takes precedence over the range.
    assert [(row["layer"], row["inside"]) for row in rows if row["inside"] is not None] == [("fc1", True), ("fc2", False)]
    assert all(row["published_low"] == 85 and blank(row["published_high"]) for row in rows[3:])


def test_published_difference_to_bp_uses_paired_seeds(tmp_path) -> None:
    """Differences are computed separately for each seed. On digits, bp has runs for seeds 0 and 1 but none for seed 2, so the run
    with seed 2 has no partner. The runs of bp on the other dataset are ignored."""
    write_group(tmp_path, "bp", [0.97, 0.95])
    write_group(tmp_path, "predsim", [0.98, 0.97, 0.1])
    write_group(tmp_path / "other", "bp", [0.5, 0.5, 0.5], dataset="mnist")
    for run in runs_in(tmp_path):
        if run.result["algorithm"] == "predsim":
            (run.directory / "config.yaml").write_text("algorithm: {name: predsim, loss: pred}\n")
    entry = dataclasses.replace(
        ENTRY,
        rule="predsim",
        quantity=DIFFERENCE,
        unit="points",
        value=0.5,
        where={"algorithm.loss": "pred", "dataset": "digits"},
    )
    (row,) = against_published([entry], runs_in(tmp_path)).to_dict("records")
    assert (row["ours"], row["n"], row["difference"]) == (pytest.approx(1.5), 2, pytest.approx(1.0))
    assert against_published([entry], [run for run in runs_in(tmp_path) if run.result["algorithm"] == "predsim"]).empty


@pytest.mark.parametrize(
    ("bounds", "low", "high", "inside"),
    [
        ("{low: 70}", 70, None, {"fc1": True, "fc2": True, "fc3": False}),
        ("{high: 85}", None, 85, {"fc1": False, "fc2": True, "fc3": True}),
        ("{low: 70, high: 85}", 70, 85, {"fc1": False, "fc2": True, "fc3": False}),
        ("{low: 80, high: 89}", 80, 89, {"fc1": True, "fc2": True, "fc3": False}),  # the bounds themselves count as inside
    ],
)
def test_layer_range_bounds_are_inclusive_and_optional(tmp_path, bounds, low, high, inside) -> None:
    """The angles of the runs' layers are 89, 80 and 60 degrees."""
    write_group(tmp_path, "bp", [0.97, 0.98])
    text = (
        "- {paper: P, table: T, dataset: d, architecture: a, quantity: weight_angle, unit: degrees, experiments: [a_table],\n"
        f"   rows: [{{row: R, values: {{bp: {{'*': {bounds}}}}}}}]}}\n"
    )
    (tmp_path / "p.yaml").write_text(text)
    rows = against_published(read_entries(tmp_path / "p.yaml"), runs_in(tmp_path)).to_dict("records")
    assert {row["layer"]: row["inside"] for row in rows} == inside
    for row in rows:
        assert [None if blank(row[f"published_{end}"]) else row[f"published_{end}"] for end in ("low", "high")] == [low, high]
        assert blank(row["published"]) and blank(row["difference"])


@pytest.mark.parametrize(("bounds", "inside"), [("{low: 98}", False), ("{high: 98}", True), ("{high: 97}", False)])
def test_network_range_may_have_one_bound(tmp_path, bounds, inside) -> None:
    """The runs have an accuracy of 97.5 % on average."""
    write_group(tmp_path, "bp", [0.97, 0.98])
    (tmp_path / "p.yaml").write_text(
        "- {paper: P, table: T, dataset: d, architecture: a, quantity: test_accuracy, unit: '%', experiments: [a_table],\n"
        f"   rows: [{{row: R, values: {{bp: {bounds}}}}}]}}\n"
    )
    (row,) = against_published(read_entries(tmp_path / "p.yaml"), runs_in(tmp_path)).to_dict("records")
    assert (row["layer"], row["inside"]) == ("", inside)


def test_number_at_epoch_is_compared_with_same_epoch(tmp_path) -> None:
    lines = [epoch_record(1, 0.5, None), epoch_record(2, 0.7, None)]
    write_run(tmp_path, "bp", 0, 0.7, metrics=lines)
    entries = [dataclasses.replace(ENTRY, at=at, value=60.0) for at in (3, 1, 2)]
    rows = against_published(entries, runs_in(tmp_path)).to_dict("records")
    assert [row["ours"] for row in rows] == [50, 70]
    (row,) = summarise(runs_in(tmp_path), entries).to_dict("records")
    assert row["published_difference"] == pytest.approx(-10)
    assert [len(published_without_run(of, runs_in(tmp_path))) for of in (entries, entries[:1])] == [0, 1]


def test_standard_error_is_not_reported_as_standard_deviation(tmp_path) -> None:
    write_group(tmp_path, "bp", [0.97])
    entry = dataclasses.replace(ENTRY, spread_kind="standard error")
    (row,) = summarise(runs_in(tmp_path), [entry]).to_dict("records")
    assert row["published"] == 98.5 and blank(row["published_std"])
    assert against_published([entry], runs_in(tmp_path)).to_dict("records")[0]["spread_kind"] == "standard error"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {table: T, rows: [{row: R, values: {bp: x}}]}", "T, row R"),
        ("a: [", "unreadable"),
        ("- {table: T, tabel: U, rows: [{row: R, values: {bp: 1}}]}", "tabel"),
    ],
)
def test_unreadable_file_error_gives_location(tmp_path, text, said) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(DataError, match=said):
        read_entries(tmp_path / "p.yaml")
