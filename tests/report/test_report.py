"""Reports over hand-made run directories; every expected number is worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from fa_bench import labels
from fa_bench.errors import DataError
from fa_bench.files import atomic
from fa_bench.report import plot, write_comparison
from fa_bench.report.runs import find_runs, group_labels, group_runs, read_run
from fa_bench.report.table import COLUMNS, half_width, summarise, to_markdown, to_text

T_2 = 4.302652729911275  # the 97.5 % quantile of Student's t with two degrees of freedom
ANGLES = {
    "weight_angle": {"fc1": 89.0, "fc2": 80.0, "fc3": 60.0},
    "norm_ratio": {"fc1": 9.0, "fc2": 1.0, "fc3": 2.0},
    "delta_angle": {"fc1": 30.0, "fc2": 50.0, "fc3": 0.0},
}


def write_run(root: Path, rule: str, seed: int, accuracy: float | None, metrics: list | None = None, **changes) -> Path:
    """One run directory; `changes` replace keys of its result."""
    directory = root / f"{changes.get('group', rule)}-{seed}"
    directory.mkdir(parents=True)
    result = {
        "status": "finished", "label": rule, "group": f"{rule}-0a", "algorithm": rule, "architecture": "mlp",
        "dataset": "digits", "optimizer": "sgd", "seed": seed, "epochs": 2, "test_accuracy": accuracy,
        "test_accuracy_at_best_val": accuracy, "angles": ANGLES, "feedback_layers": ["fc2", "fc3"],
        "output_layers": ["fc3"], "seconds": 2.0, "error": None, **changes,
    }
    (directory / "result.json").write_text(json.dumps(result))
    lines = metrics if metrics is not None else [epoch_record(1, 0.5, ANGLES), epoch_record(2, accuracy, None)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def epoch_record(epoch: int, accuracy: float | None, angles: dict | None) -> dict:
    return {"epoch": epoch, "test_accuracy": accuracy, "angles": angles}


def write_group(root: Path, rule: str, accuracies: list, **changes) -> None:
    for seed, accuracy in enumerate(accuracies):
        write_run(root, rule, seed, accuracy, **changes)


def runs_in(root: Path) -> list:
    return [read_run(directory) for directory in find_runs([root])]


def rows(root: Path) -> dict:
    """The summary's rows as dicts, by label."""
    return {row["label"]: row for row in summarise(runs_in(root)).to_dict("records")}


def blank(value: object) -> bool:
    return value is None or value != value


# Reading.

def test_runs_are_found_once_in_order_whatever_the_paths(tmp_path):
    second, first = write_run(tmp_path / "b", "fa", 0, 0.9), write_run(tmp_path / "a" / "deep", "bp", 0, 0.9)
    (tmp_path / "empty").mkdir()
    assert find_runs([tmp_path / "b", tmp_path, second]) == [first, second]
    with pytest.raises(DataError, match="nowhere: no such directory"):
        find_runs([tmp_path / "nowhere"])


def test_a_directory_without_result_is_no_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert read_run(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"status": "finished"}', "\xff"])
def test_an_unreadable_result_is_named(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"result\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize("tail", ['{"epoch": 2, "test_acc', '{"epoch": 2, "x": "\xc3', "\0\0\0", '{"epo', "{}"])
def test_a_torn_last_line_is_ignored(tmp_path, tail):
    directory = write_run(tmp_path, "fa", 0, 0.9, metrics=[epoch_record(1, 0.5, None)])
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(tail.encode("latin-1"))
    assert read_run(directory).metrics == [epoch_record(1, 0.5, None)]


def test_a_broken_line_before_the_last_is_named(tmp_path):
    directory = write_run(tmp_path, "fa", 0, 0.9)
    (directory / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2"):
        read_run(directory)


def test_an_epoch_trained_again_counts_once(tmp_path):
    lines = [epoch_record(1, 0.1, None), epoch_record(2, 0.2, None), epoch_record(1, 0.3, None)]
    run = read_run(write_run(tmp_path, "fa", 0, 0.9, metrics=lines))
    assert run.metrics == [epoch_record(1, 0.3, None), epoch_record(2, 0.2, None)]


def test_a_run_without_metrics_is_read(tmp_path):
    directory = write_run(tmp_path, "fa", 0, 0.9)
    (directory / "metrics.jsonl").unlink()
    assert read_run(directory).metrics == []


def test_groups_keep_the_order_of_first_appearance(tmp_path):
    runs = [read_run(write_run(tmp_path, rule, seed, 0.9)) for rule, seed in (("kp", 0), ("bp", 0), ("kp", 1))]
    groups = group_runs(runs)
    assert [(group, [run.result["seed"] for run in members]) for group, members in groups.items()] == [
        ("kp-0a", [0, 1]), ("bp-0a", [0])]


def test_groups_that_share_a_label_go_by_their_own_name(tmp_path):
    for group in ("fa-1", "fa-2"):
        write_run(tmp_path, "fa", 0, 0.9, group=group)
    write_run(tmp_path, "bp", 0, 0.9)
    assert group_labels(group_runs(runs_in(tmp_path))) == {"bp-0a": "bp", "fa-1": "fa-1", "fa-2": "fa-2"}
    assert set(rows(tmp_path)) == {"bp", "fa-1", "fa-2"}


def test_groups_that_share_a_label_show_what_their_configs_differ_in(tmp_path):
    common = {"seed": 0, "output_dir": "out", "optimizer": {"name": "sgd", "momentum": 0.9}, "feedback_optimizer": None}
    different = [
        {"seed": 1, "output_dir": "x", "optimizer": {"name": "sgd", "lr": 0.05}},
        {"optimizer": {"name": "sgd", "lr": 0.1}},
        {"optimizer": {"name": "adam", "lr": 1e-05, "beta1": 0.9}, "feedback_optimizer": {"name": "adam", "lr": 0.3}},
    ]
    for number, config in enumerate(different):
        run = write_run(tmp_path, "kp", 0, 0.9, group=f"kp-{number}")
        (run / "config.yaml").write_text("# config hash: abc\n" + json.dumps({**common, **config}))
    bp = write_run(tmp_path, "bp", 0, 0.9)
    (bp / "config.yaml").write_text(json.dumps({**common, "optimizer": {"name": "sgd", "lr": 7.0}}))
    assert list(group_labels(group_runs(runs_in(tmp_path))).values()) == [
        "bp",
        "kp optimizer=sgd optimizer.lr=0.05 feedback_optimizer=null",
        "kp optimizer=sgd optimizer.lr=0.1 feedback_optimizer=null",
        "kp optimizer=adam optimizer.lr=1e-05 feedback_optimizer=adam"]
    assert "kp optimizer=sgd optimizer.lr=0.1 feedback_optimizer=null" in rows(tmp_path)


def test_configs_that_say_nothing_or_cannot_be_read_leave_the_group_s_name(tmp_path):
    for number, text in enumerate(["a: [", "- 1", "seed: 3"]):
        (write_run(tmp_path, "kp", 0, 0.9, group=f"kp-{number}") / "config.yaml").write_text(text)
    assert set(group_labels(group_runs(runs_in(tmp_path))).values()) == {"kp-0", "kp-1", "kp-2"}


@pytest.mark.parametrize(("one", "other", "want"), [
    ({"a": 1, "b": True}, {"a": 1, "b": False}, ["rule b=true", "rule b=false"]),
    ({"m": [20, 30], "n": None}, {"m": [], "n": None}, ["rule m=[20,30]", "rule m=[]"]),
    ({"o": {"name": "a", "s": {"name": "c", "x": 1}}}, {"o": {"name": "a", "s": {"name": "d", "x": 2}}},
     ["rule o.s.name=c", "rule o.s.name=d"]),
    ({"o": {"name": "a", "s": {"name": "c", "x": 1}}}, {"o": {"name": "a", "s": {"name": "c", "x": 2}}},
     ["rule o.s.x=1", "rule o.s.x=2"]),
    ({"seed": 1, "resume": True}, {"seed": 2, "resume": False}, ["rule", "rule"]),
])
def test_labels(one, other, want):
    configs = [labels.flat(one), labels.flat(other)]
    assert [labels.label("rule", config, labels.differing(configs)) for config in configs] == want


# Statistics.

def test_accuracy_mean_std_and_interval(tmp_path):
    for seed, (final, best) in enumerate([(0.97, 0.90), (0.98, 0.96), (0.99, None)]):
        write_run(tmp_path, "bp", seed, final, test_accuracy_at_best_val=best, seconds=1.0 + seed)
    row = rows(tmp_path)["bp"]
    assert (row["n"], row["status"]) == (3, "3 finished")
    assert row["test_accuracy"] == pytest.approx(98) and row["test_accuracy_std"] == pytest.approx(1)
    assert row["test_accuracy_ci95"] == pytest.approx(T_2 / 3**0.5)
    assert row["best_val_accuracy"] == pytest.approx(93) and row["best_val_accuracy_std"] == pytest.approx(18**0.5)
    assert row["seconds"] == pytest.approx(2)


def test_interval_of_few_values():
    assert half_width([1.0, 3.0]) == pytest.approx(12.706204736)  # t(1) = 12.706, std = sqrt 2, n = 2
    assert blank(half_width([1.0])) and blank(half_width([])) and blank(half_width([1.0, None, float("inf")]))


def test_difference_to_bp_is_paired_by_seed(tmp_path):
    write_group(tmp_path, "bp", [0.97, 0.98, 0.99])
    write_group(tmp_path, "fa", [0.95, 0.96, 0.94, 0.10])  # seed 3 has no partner
    table = rows(tmp_path)
    # -2, -2, -5: mean -3, std sqrt 3
    assert table["fa"]["bp_difference"] == pytest.approx(-3)
    assert table["fa"]["bp_difference_ci95"] == pytest.approx(T_2)
    assert table["fa"]["bp_difference_n"] == 3
    assert blank(table["bp"]["bp_difference"]) and blank(table["bp"]["bp_difference_n"])


def test_without_bp_or_frozen_their_columns_are_blank(tmp_path):
    write_group(tmp_path, "fa", [0.9, 0.8])
    row = rows(tmp_path)["fa"]
    assert all(blank(row[key]) for key in ("bp_difference", "bp_difference_ci95", "bp_difference_n", "floor"))
    assert row["note"] == ""


def test_floor(tmp_path):
    write_group(tmp_path, "frozen", [0.90, 0.92])
    write_group(tmp_path, "fa", [0.95])
    write_group(tmp_path, "dfa", [0.91, 0.91])
    table = rows(tmp_path)
    assert table["fa"]["floor"] is True and table["fa"]["note"] == ""
    assert table["dfa"]["floor"] is False and table["dfa"]["note"] == "does not beat frozen"
    assert blank(table["frozen"]["floor"]) and table["frozen"]["note"] == ""


@pytest.mark.parametrize("elsewhere", [{"dataset": "mnist"}, {"architecture": "cnn"}])
def test_references_are_of_the_same_task(tmp_path, elsewhere):
    write_group(tmp_path, "bp", [0.97], **elsewhere)
    write_group(tmp_path, "frozen", [0.10], **elsewhere)
    write_group(tmp_path, "fa", [0.95])
    row = rows(tmp_path)["fa"]
    assert blank(row["bp_difference"]) and blank(row["floor"])


def test_among_several_references_the_optimizer_decides_or_none_is_taken(tmp_path):
    write_group(tmp_path, "bp", [0.97])
    write_group(tmp_path, "bp", [0.90], optimizer="adam", group="bp-adam")
    write_group(tmp_path, "fa", [0.95], optimizer="adam")
    write_group(tmp_path, "kp", [0.95], optimizer="lion")
    table = rows(tmp_path)
    assert table["fa"]["bp_difference"] == pytest.approx(5)
    assert blank(table["kp"]["bp_difference"]) and table["kp"]["note"] == "several bp groups fit"


def test_a_run_that_did_not_finish_is_counted_and_kept_out_of_the_means(tmp_path):
    write_group(tmp_path, "bp", [0.97, 0.98, 0.99])
    write_group(tmp_path, "fa", [0.95, 0.97])
    write_run(tmp_path, "fa", 2, 0.10, status="diverged", seconds=99.0, angles={"weight_angle": {"fc2": 5.0}})
    write_group(tmp_path, "kp", [None], status="failed", angles=None, feedback_layers=None, seconds=None)
    table = rows(tmp_path)
    fa, kp = table["fa"], table["kp"]
    assert (fa["n"], fa["status"]) == (2, "2 finished, 1 diverged")
    assert fa["test_accuracy"] == pytest.approx(96) and fa["bp_difference_n"] == 2
    assert (fa["weight_angle"], fa["seconds"]) == (70, 2)
    assert (kp["n"], kp["status"]) == (0, "1 failed") and blank(kp["test_accuracy"]) and blank(kp["floor"])


def test_a_repeated_seed_counts_once(tmp_path):
    for index, accuracy in enumerate([0.80, 0.90]):
        write_run(tmp_path / str(index), "fa", 0, accuracy)
    write_run(tmp_path / "2", "fa", 1, 0.94)
    row = rows(tmp_path)["fa"]
    assert row["n"] == 2 and row["test_accuracy"] == pytest.approx(92)
    assert row["status"] == "3 finished" and row["note"] == "1 repeated run(s) not counted"


def test_angles_are_means_over_the_layers_that_they_say_something_about(tmp_path):
    void = {"weight_angle": {"fc1": 1.0, "fc2": None, "fc3": 90.0}, "delta_angle": {"fc1": None, "fc2": None, "fc3": 0.0}}
    write_run(tmp_path, "fa", 0, 0.9)
    write_run(tmp_path, "fa", 1, 0.9, angles=void)
    write_run(tmp_path, "fa", 2, 0.9, angles=None)
    write_run(tmp_path, "dfa", 0, 0.9, angles={"weight_angle": {}, "delta_angle": {"fc1": 88.0}})
    table = rows(tmp_path)
    assert (table["fa"]["weight_angle"], table["fa"]["delta_angle"], table["fa"]["norm_ratio"]) == (80, 40, 1.5)
    assert blank(table["dfa"]["weight_angle"]) and table["dfa"]["delta_angle"] == 88


# Tables as text.

def test_terminal_table(tmp_path):
    write_group(tmp_path, "bp", [0.97, 0.98, 0.99], angles=None)
    write_group(tmp_path, "fa", [1.0])
    assert to_text(summarise(runs_in(tmp_path))).splitlines() == [
        "rule  test accuracy % (mean ± std)  weight angle (°)  delta angle (°)  seconds",
        "----  ----------------------------  ----------------  ---------------  -------",
        "bp     98.00 ± 1.00                                -                -      2.0",
        "fa    100.00 ± -                                70.0             40.0      2.0",
    ]


def test_terminal_table_says_what_did_not_finish_and_what_misses_its_floor(tmp_path):
    write_group(tmp_path, "frozen", [0.9])
    write_group(tmp_path, "fa", [0.8])
    write_group(tmp_path, "kp", [None], status="diverged")
    header, _, fa, frozen, kp = to_text(summarise(runs_in(tmp_path))).splitlines()
    assert header.split()[-2:] == ["status", "note"]
    assert fa.endswith("1 finished  does not beat frozen")
    assert frozen.split()[-3:] == ["1", "finished", "-"]
    assert kp.split() == ["kp", "-", "-", "-", "-", "1", "diverged", "-"]


def test_markdown_has_every_column_and_keeps_its_cells_apart(tmp_path):
    write_group(tmp_path, "bp", [0.97])
    write_group(tmp_path, "fa", [0.96], label="a|b")
    write_group(tmp_path, "frozen", [0.5])
    head, rule, _, fa, _ = to_markdown(summarise(runs_in(tmp_path))).splitlines()
    assert [len(line.replace("\\|", "").split("|")) for line in (head, rule, fa)] == [len(COLUMNS) + 2] * 3
    assert fa == (r"| a\|b | fa-0a | mlp | digits | sgd | 1 | 1 finished | 96.00 | - | - | 96.00 | - | -1.00 | - | 1 "
                  "| 70.0 | 40.0 | 1.50 | 2.0 | yes | - |")


# The figure.

def test_curve_is_mean_and_std_over_the_finished_seeds(tmp_path):
    write_run(tmp_path, "fa", 0, 0.9, metrics=[epoch_record(1, 0.2, None), epoch_record(2, 0.6, ANGLES)])
    write_run(tmp_path, "fa", 1, 0.9, metrics=[epoch_record(1, 0.4, None), epoch_record(2, None, None)])
    write_run(tmp_path, "fa", 2, 0.9, metrics=[epoch_record(1, 0.9, None)], status="diverged")
    accuracy, weight, delta = (plot._curve(runs_in(tmp_path), panel.value) for panel in plot.PANELS)
    assert accuracy[0] == pytest.approx((1, 30, 10 * 2**0.5))
    assert accuracy[1][:2] == pytest.approx((2, 60)) and blank(accuracy[1][2])
    assert [point[:2] for point in weight] == [(2, 70)] and [point[:2] for point in delta] == [(2, 40)]
    unfinished = [run for run in runs_in(tmp_path) if not run.finished]
    assert plot._curve(unfinished, plot.PANELS[0].value)[0][:2] == pytest.approx((1, 90))


def test_twelve_rules_look_different():
    looks = [plot._look(index) for index in range(12)]
    assert len({look["color"] for look in looks}) == 12
    assert len({tuple(plot._look(index).values()) for index in range(24)}) == 24


def test_figure_shows_each_group_and_says_where_there_is_no_data(tmp_path, monkeypatch):
    drawn = []
    savefig = plot.Figure.savefig
    monkeypatch.setattr(plot.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or savefig(self, *a, **k))
    write_group(tmp_path, "bp", [0.97, 0.98], metrics=[epoch_record(1, 0.5, {"weight_angle": {"fc2": 120.0}})])
    write_group(tmp_path, "kp", [None], metrics=[], status="failed", label=f"kp {'a=1 ' * 11}".strip())
    plot.plot_comparison(runs_in(tmp_path), tmp_path / "figure.png")
    accuracy, weight, delta = drawn[0].axes
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [
        "bp", f"kp {'a=1 ' * 9}".strip() + "\na=1 a=1\n(1 failed)"]
    assert len(accuracy.lines) == 1 and weight.get_ylim()[0] <= 0 and weight.get_ylim()[1] > 120
    assert [text.get_text() for text in delta.texts] == ["no data"] and not weight.texts
    assert imread(tmp_path / "figure.png").shape[:2] == (480, 1560)
    assert b"Software" not in (tmp_path / "figure.png").read_bytes()


# The whole report.

def test_report_is_equal_to_the_byte_and_leaves_nothing_else(tmp_path):
    write_group(tmp_path / "runs", "bp", [0.97, 0.98, 0.99])
    write_group(tmp_path / "runs", "fa", [0.95, None])
    write_group(tmp_path / "runs", "kp", [None], status="diverged", metrics=[])
    directories = find_runs([tmp_path / "runs"])
    texts = [write_comparison(directories, tmp_path / out)[0] for out in ("one", "two")]
    assert texts[0] == texts[1]
    for name in ("comparison.csv", "comparison.md", "comparison.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["comparison.csv", "comparison.md", "comparison.png"]


def test_report_follows_the_order_given_and_names_what_it_leaves_out(tmp_path):
    directories = [write_run(tmp_path, "kp", 0, 0.96), tmp_path / "lost", write_run(tmp_path, "bp", 0, 0.97)]
    text, figure = write_comparison(directories, tmp_path / "new" / "out")
    assert [line.split()[0] for line in text.splitlines()[2:4]] == ["kp", "bp"]
    remark = f"without result.json, so not in the table: {tmp_path / 'lost'}"
    assert text.endswith(remark) and remark in (figure.parent / "comparison.md").read_text()
    header, kp, _ = (figure.parent / "comparison.csv").read_text().splitlines()
    assert header == ",".join(COLUMNS)
    assert kp == "kp,kp-0a,mlp,digits,sgd,1,1 finished,96,,,96,,-1,,1,70,40,1.5,2,,"


def test_report_on_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nothing to compare"):
        write_comparison([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_reading_runs_is_quick_and_reports_leave_pyplot_alone(tmp_path):
    run = write_run(tmp_path, "fa", 0, 0.9)
    script = """
import sys
from pathlib import Path
from fa_bench.report import write_comparison
from fa_bench.report.runs import read_run
assert not {"pandas", "matplotlib", "scipy", "torch"} & set(sys.modules), "reading runs imports a slow module"
write_comparison([Path(sys.argv[1])], Path(sys.argv[1]))
assert not {"matplotlib.pyplot", "torch"} & set(sys.modules), "a report imports pyplot or torch"
"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-W", "error", "-c", script, str(run)], check=True, cwd=root)
