"""Tests of reports on hand-made run directories; every expected number is worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fa_bench.config import labels
from fa_bench.errors import DataError
from fa_bench.report.columns import columns_of
from fa_bench.report.groups import group_labels, group_runs, tasks
from fa_bench.report.numbers import half_width, value_range
from fa_bench.report.references import BEST, NEAREST
from fa_bench.report.runs import find_runs, read_run
from fa_bench.report.table import summarise
from fa_bench.report.text import to_markdown, to_text

from .by_hand import ENTRY, T_2, TWO_SEEDS, blank, epoch_record, runs_in, write_group, write_run, write_set


def rows(root: Path, reference: str = BEST) -> dict:
    """The summary's rows as dicts, by label."""
    return {row["label"]: row for row in summarise(runs_in(root), reference=reference).to_dict("records")}


# Reading.


def test_runs_are_found_once_and_in_order(tmp_path):
    second, first = write_run(tmp_path / "b", "fa", 0, 0.9), write_run(tmp_path / "a" / "deep", "bp", 0, 0.9)
    (tmp_path / "empty").mkdir()
    assert find_runs([tmp_path / "b", tmp_path, second]) == [first, second]
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("seed: 0\n")  # commands are composed from this file
    started = tmp_path / "c"
    started.mkdir()
    (started / "config.yaml").write_text("# config hash: 0a\nseed: 0\n")
    assert find_runs([tmp_path]) == [first, second, started]
    with pytest.raises(DataError, match="nowhere: no such directory"):
        find_runs([tmp_path / "nowhere"])


def test_directory_without_result_is_not_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert read_run(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"status": "finished"}', "\xff"])
def test_unreadable_result_error_names_file(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"result\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize("tail", ['{"epoch": 2, "test_acc', '{"epoch": 2, "x": "\xc3', "\0\0\0", '{"epo', "{}"])
def test_truncated_last_line_is_ignored(tmp_path, tail):
    directory = write_run(tmp_path, "fa", 0, 0.9, metrics=[epoch_record(1, 0.5, None)])
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(tail.encode("latin-1"))
    assert read_run(directory).metrics == [epoch_record(1, 0.5, None)]


def test_broken_inner_line_is_reported(tmp_path):
    directory = write_run(tmp_path, "fa", 0, 0.9)
    (directory / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2"):
        read_run(directory)


def test_repeated_epoch_counts_once(tmp_path):
    lines = [epoch_record(1, 0.1, None), epoch_record(2, 0.2, None), epoch_record(1, 0.3, None)]
    run = read_run(write_run(tmp_path, "fa", 0, 0.9, metrics=lines))
    assert run.metrics == [epoch_record(1, 0.3, None), epoch_record(2, 0.2, None)]


def test_run_without_metrics_is_read(tmp_path):
    directory = write_run(tmp_path, "fa", 0, 0.9)
    (directory / "metrics.jsonl").unlink()
    assert read_run(directory).metrics == []


def test_groups_keep_the_order_of_first_appearance(tmp_path):
    runs = [read_run(write_run(tmp_path, rule, seed, 0.9)) for rule, seed in (("kp", 0), ("bp", 0), ("kp", 1))]
    groups = group_runs(runs)
    assert [(group, [run.result["seed"] for run in members]) for group, members in groups.items()] == [
        ("kp-0a", [0, 1]),
        ("bp-0a", [0]),
    ]


def test_groups_with_same_label_use_group_name(tmp_path):
    for group in ("fa-1", "fa-2"):
        write_run(tmp_path, "fa", 0, 0.9, group=group)
    write_run(tmp_path, "bp", 0, 0.9)
    assert group_labels(group_runs(runs_in(tmp_path))) == {"bp-0a": "bp", "fa-1": "fa-1", "fa-2": "fa-2"}
    assert set(rows(tmp_path)) == {"bp", "fa-1", "fa-2"}


def test_groups_with_same_label_show_differing_options(tmp_path):
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
        "kp optimizer=sgd lr=0.05 feedback_optimizer=null",
        "kp optimizer=sgd lr=0.1 feedback_optimizer=null",
        "kp optimizer=adam lr=1e-05 feedback_optimizer=adam",
    ]
    assert "kp optimizer=sgd lr=0.1 feedback_optimizer=null" in rows(tmp_path)


def test_groups_without_differing_options_use_group_name(tmp_path):
    for number, text in enumerate(["", "epochs: 5", "seed: 3"]):
        (write_run(tmp_path, "kp", 0, 0.9, group=f"kp-{number}") / "config.yaml").write_text(text)
    assert set(group_labels(group_runs(runs_in(tmp_path))).values()) == {"kp-0", "kp-1", "kp-2"}


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        ({"a": 1, "b": True}, {"a": 1, "b": False}, ["rule b=true", "rule b=false"]),
        ({"m": [20, 30], "n": None}, {"m": [], "n": None}, ["rule m=[20,30]", "rule m=[]"]),
        (
            {"o": {"name": "a", "s": {"name": "c", "x": 1}}},
            {"o": {"name": "a", "s": {"name": "d", "x": 2}}},
            ["rule o.s.name=c", "rule o.s.name=d"],
        ),
        (
            {"o": {"name": "a", "s": {"name": "c", "x": 1}}},
            {"o": {"name": "a", "s": {"name": "c", "x": 2}}},
            ["rule o.s.x=1", "rule o.s.x=2"],
        ),
        ({"seed": 1, "resume": True}, {"seed": 2, "resume": False}, ["rule", "rule"]),
        ({"dataset": "mnist", "data_dir": "a"}, {"dataset": "mnist", "data_dir": "b"}, ["rule", "rule"]),
        (
            {"dataset": "image_folder", "data_dir": "a"},
            {"dataset": "image_folder", "data_dir": "b"},
            ["rule data_dir=a", "rule data_dir=b"],
        ),
        (
            {"dataset": "image_folder", "data_dir": "a"},
            {"dataset": "mnist", "data_dir": "b"},
            ["rule dataset=image_folder", "rule dataset=mnist"],
        ),
    ],
)
def test_labels(one, other, want):
    configs = [labels.flatten(one), labels.flatten(other)]
    assert [labels.label("rule", config, labels.differing_keys(configs)) for config in configs] == want


# Statistics.


def test_accuracy_mean_std_and_interval(tmp_path):
    for seed, (final, best) in enumerate([(0.97, 0.90), (0.98, 0.96), (0.99, None)]):
        write_run(tmp_path, "bp", seed, final, test_accuracy_at_best_val=best, seconds=1.0 + seed)
    row = rows(tmp_path)["bp"]
    assert (row["n"], row["status"]) == (3, "3 finished")
    assert row["test_accuracy"] == pytest.approx(98) and row["test_accuracy_std"] == pytest.approx(1)
    assert row["test_accuracy_ci95"] == pytest.approx(T_2 / 3**0.5)
    assert row["test_accuracy_at_best_val"] == pytest.approx(93)
    assert row["test_accuracy_at_best_val_std"] == pytest.approx(18**0.5)
    assert row["seconds"] == pytest.approx(2)


def test_interval_requires_three_values():
    assert blank(half_width([1.0, 3.0])) and value_range([1.0, 3.0]) == (1, 3)  # not a half width of 12.7 standard errors
    assert blank(value_range([1.0])[0])
    assert blank(half_width([1.0])) and blank(half_width([])) and blank(half_width([1.0, 2.0, None, float("inf")]))


def test_difference_to_bp_is_paired_by_seed(tmp_path):
    write_group(tmp_path, "bp", [0.97, 0.98, 0.99])
    write_group(tmp_path, "fa", [0.95, 0.96, 0.94, 0.10])  # seed 3 has no partner
    table = rows(tmp_path)
    # The differences are -2, -2, -5, with mean -3 and std sqrt 3.
    assert table["fa"]["bp_difference"] == pytest.approx(-3)
    assert table["fa"]["bp_difference_ci95"] == pytest.approx(T_2)
    assert table["fa"]["bp_difference_n"] == 3
    assert blank(table["bp"]["bp_difference"]) and blank(table["bp"]["bp_difference_n"])


def test_bp_and_floor_columns_are_blank_without_references(tmp_path):
    write_group(tmp_path, "fa", [0.9, 0.8])
    row = rows(tmp_path)["fa"]
    assert all(blank(row[key]) for key in ("bp_difference", "bp_difference_ci95", "bp_difference_n", "floor"))
    assert row["note"] == TWO_SEEDS and row["bp_row"] == row["floor_row"] == ""


def test_floor_comparison(tmp_path):
    write_group(tmp_path, "frozen", [0.90, 0.92])
    write_group(tmp_path, "fa", [0.95])
    write_group(tmp_path, "dfa", [0.91, 0.91])
    table = rows(tmp_path)
    assert table["fa"]["floor"] is True and table["fa"]["note"] == ""
    assert table["dfa"]["floor"] is False and table["dfa"]["note"] == f"does not beat frozen; {TWO_SEEDS}"
    assert blank(table["frozen"]["floor"]) and table["frozen"]["note"] == TWO_SEEDS
    assert [table[rule]["floor_row"] for rule in ("fa", "dfa", "frozen")] == ["frozen", "frozen", ""]


def test_tie_does_not_beat_floor(tmp_path):
    """Both rules classify 716 of 720 images correctly, but the floating-point means of their accuracies differ in the last
    digit."""
    write_group(tmp_path, "frozen", [358 / 360, 358 / 360])
    write_group(tmp_path, "fa", [359 / 360, 357 / 360])
    assert rows(tmp_path)["fa"]["floor"] is False


@pytest.mark.parametrize("elsewhere", [{"dataset": "mnist"}, {"architecture": "cnn"}])
def test_references_are_from_same_task(tmp_path, elsewhere):
    write_group(tmp_path, "bp", [0.97], **elsewhere)
    write_group(tmp_path, "frozen", [0.10], **elsewhere)
    write_group(tmp_path, "fa", [0.95])
    row = rows(tmp_path)["fa"]
    assert blank(row["bp_difference"]) and blank(row["floor"])


def test_reference_is_nearest_or_best_by_validation(tmp_path):
    # Both bp rows are equally similar to that of kp. The row with a validation accuracy of 0.80 is used, although the other row's
    # test accuracy is higher.
    write_group(tmp_path, "bp", [0.97, 0.97], val_accuracy=0.7)
    write_group(tmp_path, "bp", [0.90, 0.90], val_accuracy=0.8, optimizer="adam", group="bp-adam")
    write_group(tmp_path, "fa", [0.95, 0.94], optimizer="sgd")
    write_group(tmp_path, "kp", [0.95, 0.94], optimizer="lion")
    table = rows(tmp_path, NEAREST)
    assert table["fa"]["bp_difference"] == pytest.approx(-2.5) and table["fa"]["bp_row"] == "bp-0a"
    assert table["kp"]["bp_difference"] == pytest.approx(4.5) and table["kp"]["bp_row"] == "bp-adam"
    assert table["kp"]["note"] == f"bp chosen by validation accuracy from 2 rows with equally similar settings; {TWO_SEEDS}"
    assert table["fa"]["note"] == TWO_SEEDS


@pytest.mark.parametrize("choice", [BEST, NEAREST])
def test_ambiguous_reference_without_validation_is_not_used(tmp_path, choice):
    for number in range(2):
        write_group(tmp_path, "bp", [0.97], group=f"bp-{number}", seconds=1.0 + number)
    write_group(tmp_path, "kp", [0.95])
    row = rows(tmp_path, choice)["kp"]
    assert blank(row["bp_difference"]) and blank(row["bp_difference_n"]) and row["bp_row"] == ""
    assert row["note"] == "2 rows of bp have equally similar settings, and none has a validation accuracy to choose by"


def test_nearest_reference_has_same_setting_even_if_unfinished(tmp_path):
    for lr in (0.1, 9.0):
        for rule in ("bp", "fa"):
            write_set(tmp_path, rule, 0, 0.9, lr=lr, status="diverged" if rule == "bp" and lr == 9 else "finished")
    table = rows(tmp_path, NEAREST)
    assert table["fa lr=0.1"]["bp_difference"] == 0
    other = table["fa lr=9.0"]
    assert blank(other["bp_difference"]) and other["bp_difference_n"] == 0 and other["bp_row"] == "bp lr=9.0"
    assert other["note"] == "bp lr=9.0 has no finished run"


def test_image_folders_are_separate_tasks_labelled_by_data_dir(tmp_path):
    for folder, accuracy in (("cats", 0.8), ("dogs", 0.9)):
        for rule, more in (("bp", 0.01), ("fa", 0)):
            run = write_run(tmp_path, rule, 0, accuracy + more, group=f"{rule}-{folder}", dataset="image_folder")
            (run / "config.yaml").write_text(
                json.dumps({"algorithm": {"name": rule}, "dataset": {"name": "image_folder"}, "data_dir": f"images/{folder}"})
            )
    table = rows(tmp_path)
    assert list(table) == [f"{rule} data_dir=images/{folder}" for rule in ("bp", "fa") for folder in ("cats", "dogs")]
    assert table["fa data_dir=images/dogs"]["bp_difference"] == pytest.approx(-1)
    assert list(tasks(group_runs(runs_in(tmp_path)))) == [
        "image_folder, mlp data_dir=images/cats",
        "image_folder, mlp data_dir=images/dogs",
    ]


def test_nearest_reference_matches_task_options(tmp_path):
    def configured(rule: str, accuracy: float, group: str, **config) -> None:
        run = write_run(tmp_path, rule, 0, accuracy, group=group)
        (run / "config.yaml").write_text(json.dumps({"seed": 0, "algorithm": {"name": rule}, **config}))

    for number, decay in enumerate([0.0, 0.1]):
        configured(
            "bp",
            0.9 + number / 100,
            f"bp-{number}",
            architecture={"name": "mlp", "widths": [8]},
            optimizer={"name": "sgd", "lr": 0.1, "weight_decay": decay},
        )
        configured(
            "fa",
            0.8,
            f"fa-{number}",
            architecture={"name": "mlp", "widths": [8]},
            optimizer={"name": "sgd", "lr": 0.2, "weight_decay": decay},
        )
    configured("kp", 0.8, "kp", architecture={"name": "mlp", "widths": [9]}, optimizer={"name": "sgd"})
    table = {row["group"]: row for row in summarise(runs_in(tmp_path)).to_dict("records")}
    assert table["fa-0"]["bp_difference"] == pytest.approx(-10) and table["fa-1"]["bp_difference"] == pytest.approx(-11)
    assert blank(table["kp"]["bp_difference"]) and table["kp"]["note"] == ""


def test_unfinished_run_is_counted_but_excluded_from_means(tmp_path):
    write_group(tmp_path, "bp", [0.97, 0.98, 0.99])
    write_group(tmp_path, "fa", [0.95, 0.97])
    write_run(
        tmp_path,
        "fa",
        2,
        0.10,
        status="diverged",
        seconds=99.0,
        angles={"weight_angle": {"fc2": 5.0}},
        epochs=40,
        error={"type": "Diverged", "message": "not finite in epoch 3", "epoch": 3, "layer": "fc1"},
    )
    write_group(
        tmp_path,
        "kp",
        [None],
        status="failed",
        angles=None,
        feedback_layers=None,
        seconds=None,
        error={"type": "RuntimeError", "message": "out of luck\nat length"},
    )
    table = rows(tmp_path)
    fa, kp = table["fa"], table["kp"]
    assert (fa["n"], fa["runs"], fa["status"]) == (2, 3, "2 finished, 1 diverged")
    assert fa["unfinished"] == "1 of 3: seed 2 diverged in epoch 3, first in fc1"
    assert kp["unfinished"] == "1 of 1: seed 0 failed after 2 of 2 epochs, RuntimeError: out of luck"
    assert table["bp"]["unfinished"] == ""
    assert fa["test_accuracy"] == pytest.approx(96) and fa["bp_difference_n"] == 2
    assert (fa["weight_angle"], fa["seconds"]) == (70, 2)
    assert (kp["n"], kp["status"]) == (0, "1 failed") and blank(kp["test_accuracy"]) and blank(kp["floor"])


@pytest.mark.parametrize(
    ("losses", "note"),
    [
        ([[2.0, 1.0, 4.1]], "the training loss of the run rose, from 2 in the first epoch to 4.1 (seed 0)"),
        (
            [[2.0, 9e21], [2.0, 8.0], [2.0, 1.0]],
            "of 2 of 3 runs rose, from 2 in the first epoch to 9e+21 (seed 0)",
        ),
        ([[2.0, 4.0], [4.1], [None, 9.0], [-1.0, 4.0], [2.0, 9.0, 1.0]], ""),
    ],
)
def test_finite_loss_explosion_is_noted(tmp_path, losses, note):
    for seed, values in enumerate(losses):
        metrics = [epoch_record(epoch, 0.1, None) | {"train_loss": loss} for epoch, loss in enumerate(values, start=1)]
        write_run(tmp_path, "drtp", seed, 0.1, metrics=metrics, epochs=len(values))
    (row,) = rows(tmp_path).values()
    assert note in row["note"] and ("training loss" in row["note"]) == bool(note)


def test_repeated_seed_counts_once(tmp_path):
    for index, accuracy in enumerate([0.80, 0.90]):
        write_run(tmp_path / str(index), "fa", 0, accuracy)
    write_run(tmp_path / "2", "fa", 1, 0.94)
    row = rows(tmp_path)["fa"]
    assert row["n"] == 2 and row["test_accuracy"] == pytest.approx(92)
    assert row["status"] == "3 finished" and row["note"] == f"1 run with a repeated seed not counted; {TWO_SEEDS}"


def test_angles_are_averaged_over_meaningful_layers(tmp_path):
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
    write_group(tmp_path, "bp", [0.97, 0.98, 0.99], angles=None, val_accuracy=0.965)
    write_group(tmp_path, "fa", [1.0])
    assert to_text(summarise(runs_in(tmp_path))).splitlines() == [
        "rule  val %  test accuracy % (mean ± std)  n  weight angle (°)  delta angle (°)  seconds",
        "----  -----  ----------------------------  -  ----------------  ---------------  -------",
        "bp    96.50   98.00 ± 1.00                 3                 -                -      2.0",
        "fa        -  100.00                        1              70.0             40.0      2.0",
    ]


def _write_rates(root: Path, **rates: float) -> None:
    for rule, rate in rates.items():
        run = write_run(root, rule.rstrip("_"), 0, 0.9, group=rule)
        config = {"algorithm": {"name": rule.rstrip("_")}, "optimizer": {"name": "sgd", "lr": rate}, "shuffle": rule != "fa"}
        (run / "config.yaml").write_text(json.dumps(config))


def test_settings_that_differ_between_rules_have_columns(tmp_path):
    """A setting that differs between rules does not appear in labels if each rule has only one value of it."""
    _write_rates(tmp_path, bp=0.1, fa=0.02)
    frame = summarise(runs_in(tmp_path))
    lines = to_text(frame).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["rule", "optimizer.lr", "shuffle"],
        ["----", "------------", "-------"],
        ["bp", "0.1", "yes"],
        ["fa", "0.02", "no"],
    ]
    markdown = to_markdown(frame, columns_of(frame)).splitlines()
    column = markdown[0].split(" | ").index("optimizer.lr")
    assert [line.split(" | ")[column] for line in markdown[2:]] == [r"0\.1", r"0\.02"]


def test_settings_in_labels_or_without_space_get_no_column(tmp_path):
    _write_rates(tmp_path, bp=0.1, fa=0.02, fa_=0.03)
    frame = summarise(runs_in(tmp_path))
    assert list(frame["label"]) == ["bp", "fa lr=0.02 shuffle=false", "fa lr=0.03 shuffle=true"]
    assert frame.attrs["settings"] == []
    assert "optimizer.lr" not in columns_of(frame)
    frame.attrs["settings"] = ["optimizer.lr"]
    frame["label"] = ["x" * 75] * 3
    header = to_text(frame).splitlines()[0]
    assert "lr" not in header and header.endswith("seconds")
    assert "optimizer.lr" in columns_of(frame)


def test_terminal_table_shows_unfinished_runs_and_floor_notes(tmp_path):
    write_group(tmp_path, "frozen", [0.9])
    write_group(tmp_path, "fa", [0.8])
    write_group(tmp_path, "kp", [None], status="diverged")
    header, _, fa, frozen, kp, *notes = to_text(summarise(runs_in(tmp_path))).splitlines()
    assert header.split()[-1] == "status" and "in means" in header and fa.split()[3:6] == ["1", "of", "1"]
    assert fa.endswith("1 finished") and frozen.endswith("1 finished")
    assert kp.split() == ["kp", "-", "-", "0", "of", "1", "-", "-", "-", "1", "diverged"]
    assert notes == ["", "note: fa: does not beat frozen"]


def test_terminal_table_shows_published_numbers_if_any(tmp_path):
    write_group(tmp_path, "bp", [0.97, 0.98, 0.99])
    frame = summarise(runs_in(tmp_path), [ENTRY])
    assert to_text(frame).splitlines()[0].endswith("seconds  published (%)  difference")
    assert to_text(frame).splitlines()[2].split()[-2:] == ["98.50", "-0.50"]


def test_markdown_has_nonempty_columns_and_escapes_pipes(tmp_path):
    write_group(tmp_path, "bp", [0.97])
    write_group(tmp_path, "fa", [0.96], label="a|b")
    write_group(tmp_path, "frozen", [0.5])
    head, rule, _, fa, _ = to_markdown(summarise(runs_in(tmp_path))).splitlines()
    assert len({len(line.replace("\\|", "").split("|")) for line in (head, rule, fa)}) == 1
    assert "std" not in head and "published" not in head
    assert fa == (
        r"| a\|b | fa-0a | mlp | digits | sgd | 2 | 1 | 1 | 0 | 1 finished | 96.00 | 96.00 | -1.00 | 1 | bp "
        "| 50.00 | frozen | yes | 70.0 | 40.0 | 1.50 | 2.0 | 1.00 |"
    )


def test_weight_transport_is_noted(tmp_path):
    """The note comes from the recorded results, not from the report's own knowledge of rules."""
    write_group(tmp_path, "kp", [0.9, 0.9, 0.9], weight_transport=[])
    write_group(tmp_path, "dgl", [0.9, 0.9, 0.9], weight_transport=["within blocks", "after 'norm'"])
    table = rows(tmp_path)
    assert table["dgl"]["note"] == "weight transport within blocks; weight transport after 'norm'" and table["kp"]["note"] == ""
    frame = summarise(runs_in(tmp_path))
    assert "note: dgl: weight transport within blocks" in to_text(frame) and "weight transport after 'norm'" in to_markdown(frame)
