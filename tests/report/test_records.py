"""Records that were edited, damaged or written by other programs are named and left out, and their text is escaped."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fa_bench.report.cli import main
from fa_bench.runs.checked_json import RecordError
from fa_bench.runs.readers import read_config, read_metrics, read_result
from fa_bench.runs.sweep import PlannedRun, write_sweep
from fa_bench.utils.text import escape_markdown, escape_mathtext

from .by_hand import ANGLES, epoch_record, without_pixels, write_begun, write_group, write_run

NESTED = "[" * 100_000 + "]" * 100_000


def keys(file: str = "result.json", **values: Any) -> Callable[[Path], None]:
    """Return a function that replaces values in a record."""

    def edit(directory: Path) -> None:
        path = directory / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def text(file: str, content: str) -> Callable[[Path], None]:
    """Return a function that replaces the content of a file."""

    def edit(directory: Path) -> None:
        (directory / file).write_text(content)

    return edit


def lines(*records: Any) -> Callable[[Path], None]:
    return text("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


DAMAGED = {
    "an accuracy in words": (
        keys(test_accuracy="high"),
        r"result\.json: test_accuracy='high' \(allowed: a number from 0 to 1, or null\)",
    ),
    "an accuracy in per cent": (keys(val_accuracy=97), r"result\.json: val_accuracy=97 \(allowed: a number from 0 to 1"),
    "an accuracy that is a boolean": (keys(test_accuracy=True), r"test_accuracy=True"),
    "a status": (
        keys(status="finsihed"),
        r"status='finsihed' \(allowed: finished, stopped, diverged, failed, interrupted\); did you mean 'finished'\?",
    ),
    "a seed": (keys(seed="0"), r"seed='0' \(allowed: a whole number\)"),
    "a label": (keys(label=["a"]), r"label=\['a'\] \(allowed: text, not empty\)"),
    "seconds": (keys(seconds=-1), r"seconds=-1 \(allowed: a number from 0 to 1e\+100, or null\)"),
    "angles": (
        keys(angles={"weight_angle": {"fc1": "steep"}}),
        r"angles\.weight_angle\.fc1='steep' \(allowed: a number of at most 1e\+100, or null\)",
    ),
    "a number that no float can hold": (keys(angles={"weight_angle": {"fc1": 10**400}}), r"angles\.weight_angle\.fc1=1000"),
    "layers": (keys(feedback_layers=["fc1", 2]), r"feedback_layers\[1\]=2 \(allowed: text\)"),
    "an error": (
        keys(status="diverged", error={"epoch": "third"}),
        r"error\.epoch='third' \(allowed: a whole number >= 0, or null\)",
    ),
    "deep nesting": (text("result.json", NESTED), r"result\.json: nested deeper than 20 levels"),
    "nesting that JSON allows": (
        text("result.json", '{"a":' * 30 + "1" + "}" * 30),
        r"result\.json: nested deeper than 20 levels",
    ),
    "no JSON": (text("result.json", "{"), r"result\.json: unreadable"),
    "a list": (text("result.json", "[]"), r"result\.json: \[\] \(allowed: a mapping\)"),
    "missing epochs": (
        keys(epoch=7),
        r"metrics\.jsonl: has records of 2 epochs, but result\.json says that the run finished 7",
    ),
    "a wrong number of the last epoch": (
        lambda run: (keys(epoch=2)(run), lines(epoch_record(1, 0.5, None), epoch_record(10**18, 0.5, None))(run)),
        r"records of 2 epochs, the last of epoch 10+, but result\.json says that the run finished 2",
    ),
    "a loss beyond all scales": (
        lines({**epoch_record(1, 0.5, None), "test_loss": 1e308}, epoch_record(2, 0.5, None)),
        r"line 1: test_loss=1e\+308 \(allowed: a number of at most 1e\+100, or null\)",
    ),
    "an angle beyond all scales": (
        lines(epoch_record(1, 0.5, None), {**epoch_record(2, 0.5, None), "angles": {"weight_angle": {"fc1": -1e308}}}),
        r"line 2: angles\.weight_angle\.fc1=-1e\+308",
    ),
    "no record": (lines([1], epoch_record(2, 0.5, None)), r"metrics\.jsonl: line 1 is not an epoch's record"),
    "an epoch": (lines({"epoch": "1"}), r"metrics\.jsonl: line 1: epoch='1' \(allowed: a whole number >= 1\)"),
    "a record's angles": (
        lines({"epoch": 1, "angles": {"weight_angle": [3]}}),
        r"line 1: angles\.weight_angle=\[3\] \(allowed: a mapping\)",
    ),
    "a record's loss": (lines({"epoch": 1, "train_loss": "low"}), r"line 1: train_loss='low'"),
    "deep records": (
        text("metrics.jsonl", f"{NESTED}\n{NESTED}\n"),
        r"metrics\.jsonl: line 1 is not an epoch's record: nested deeper",
    ),
    "no YAML": (text("config.yaml", "a: ["), r"config\.yaml: line 1: invalid YAML"),
    "no mapping": (text("config.yaml", "- 1"), r"config\.yaml: not a run's config \(allowed: a mapping\)"),
    "a config's seed": (text("config.yaml", "seed: first"), r"config\.yaml: seed='first' \(allowed: a whole number\)"),
    "a config's epochs": (text("config.yaml", "epochs: [3]"), r"config\.yaml: epochs=\[3\] \(allowed: a whole number >= 1\)"),
    "a config with tags": (text("config.yaml", "a: !!python/name:os.system"), r"config\.yaml: line 1: tag !!python"),
}


@pytest.fixture(autouse=True)
def drawn_quickly(request, monkeypatch):
    if "figure" not in request.node.name:
        without_pixels(monkeypatch)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_record_is_reported_and_run_excluded(tmp_path, capsys, kind):
    damage, said = DAMAGED[kind]
    write_group(tmp_path, "fa", [0.9, 0.8])
    damage(tmp_path / "fa-1")
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert re.search(rf"^excluded: \S*/fa-1/.*{said}", out, re.MULTILINE), out
    (row,) = csv.DictReader((tmp_path / "report.csv").read_text().splitlines())
    assert (row["n"], row["runs"], row["test_accuracy"]) == ("1", "1", "90")
    assert "## Excluded" in (tmp_path / "report.md").read_text()
    assert main(["--live", "--once", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(said, shown) and "2 runs: 1 done, 1 failed" in shown


def test_unfinished_run_with_damaged_config_is_excluded(tmp_path, capsys):
    write_group(tmp_path, "fa", [0.9])
    text("config.yaml", "# config hash: 0\nalgorithm: [fa]\nseed: 1")(write_begun(tmp_path, "fa", 1, 1))
    assert main([str(tmp_path)]) == 1
    assert "config.yaml: algorithm=['fa'] (allowed: text, not empty)" in capsys.readouterr().out


def test_first_error_is_raised_if_every_run_is_damaged(tmp_path, capsys):
    keys(seed=None)(write_run(tmp_path, "fa", 0, 0.9))
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"fa-bench-report: {tmp_path}/fa-0/result.json: seed=None (allowed: a whole number)\n"


@pytest.mark.parametrize(
    "planned",
    [
        "[]",
        "{",
        NESTED,
        '{"runs": [5]}',
        '{"runs": [{"directory": "a"}]}',
        '{"runs": [{"directory": 5, "label": "a", "epochs": 1}]}',
        '{"runs": [{"directory": "a\\u0000b", "label": "a", "epochs": 1}]}',
        '{"runs": [{"directory": "a", "label": "", "epochs": 1}]}',
        '{"runs": [{"directory": "a", "label": "a", "epochs": -1}]}',
        '{"runs": [{"directory": "\\ud800", "label": "a", "epochs": 1}]}',
    ],
)
def test_damaged_sweep_file_is_reported_and_runs_are_included(tmp_path, capsys, planned):
    write_group(tmp_path, "fa", [0.9])
    (tmp_path / "sweep.json").write_text(planned)
    assert main([str(tmp_path)]) == 1
    assert re.search(r"excluded: \S*/sweep\.json: \S", capsys.readouterr().out)
    assert main(["--live", str(tmp_path)]) == 0
    assert re.search(r"1 run: 1 done\nexcluded: \S*/sweep\.json: ", capsys.readouterr().out)


EVIL = "\x1b[31mkp\u202e <script>alert(1)</script> # [a](http://b) | $\\frac{$ **x**\n# Heading"


def test_record_text_is_escaped_in_every_output(tmp_path, capsys):
    write_run(tmp_path, "fa", 0, 0.9)
    named = dict.fromkeys(("label", "group", "architecture", "optimizer"), EVIL)
    write_run(tmp_path, "fa", 1, 0.9, probes={EVIL: {EVIL: 1.0}}, **named).rename(tmp_path / "evil")
    write_run(tmp_path, "kp", 0, None, status="diverged", error={"type": "E", "message": EVIL.replace("\n", " ")})
    assert main([str(tmp_path)]) == 1
    report, table = ((tmp_path / name).read_text() for name in ("report.md", "report.csv"))
    assert main(["--live", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for shown in (said, report, table):
        assert "\x1b" not in shown and "\u202e" not in shown and r"\x1b" in shown
    assert "<script>" not in report and "&lt;script&gt;" in report and "\n# Heading" not in report and "[a](" not in report
    bars = {line.count("|") - line.count(r"\|") for line in report.split("\n\n")[1].splitlines()}
    assert len(bars) == 1  # every row has the same number of cells


def test_markdown_and_mathtext_are_escaped():
    assert escape_markdown("# a_b _c_ *d* `e` <f> [g] h|i ~j~ $k$ & l") == (
        r"\# a_b \_c\_ \*d\* \`e\` &lt;f&gt; \[g\] h\|i \~j\~ \$k\$ &amp; l"
    )
    assert [escape_markdown(text) for text in ("- a", "1. a", "2) a", "+ a", "a\nb", "3 finished, 1 diverged", "lr=0.1")] == [
        r"\- a",
        r"1\. a",
        r"2\) a",
        r"\+ a",
        r"a\\nb",
        "3 finished, 1 diverged",
        "lr=0.1",
    ]
    assert escape_mathtext("a$b$\n") == r"a\$b\$\n"


@pytest.mark.parametrize("sign", ["$\\frac{$", "a$b", "$", "結果", "\x1b[1m", "x" * 5000])
def test_figures_accept_any_name(tmp_path, sign):
    for number, lr in enumerate((sign, "0.1")):
        run = write_run(
            tmp_path,
            "kp",
            0,
            0.9,
            group=f"kp-{number}",
            dataset=f"d{lr}",
            metrics=[epoch_record(1, 0.5, {"weight_angle": {f"fc2{sign}": 70.0}}), epoch_record(2, 0.5, None)],
        )
        config = {"algorithm": {"name": "kp", "density": 0.5}, "optimizer": {"name": "sgd", "lr": lr}, "seed": 0}
        (run / "config.yaml").write_text(json.dumps(config))
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [1e100, -1e100, 1e-300, float("inf")])
def test_figures_accept_extreme_numbers(tmp_path, number):
    write_group(tmp_path, "fa", [0.9, 0.8])
    write_group(tmp_path, "bp", [0.9])
    lines(
        {**epoch_record(1, 0.5, None), "test_loss": number, "train_loss": number, "val_loss": number},
        {**epoch_record(2, 0.5, None), "angles": {"weight_angle": {"fc1": number}, "norm_ratio": {"fc1": number}}},
    )(tmp_path / "fa-1")
    keys(angles={"weight_angle": {"fc1": number}, "norm_ratio": {"fc1": number}})(tmp_path / "fa-1")
    assert main([str(tmp_path)]) == 0


def test_titles_differing_only_in_punctuation_get_separate_figures(tmp_path, monkeypatch):
    without_pixels(monkeypatch)
    for number, name in enumerate(("a_b", "a-b", "a b")):
        write_run(tmp_path, "kp", 0, 0.9, group=f"kp-{number}", dataset=name)
    assert main([str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("report_curves-*.png"))) == 3


def test_unknown_keys_of_later_versions_are_accepted(tmp_path):
    directory = write_run(tmp_path, "fa", 0, 0.9, added={"a": [1]})
    lines(epoch_record(1, 0.5, ANGLES) | {"added": "x"})(directory)
    assert (read_result(directory / "result.json") or {})["added"] == {"a": [1]}
    assert len(read_metrics(directory / "metrics.jsonl")) == 1
    (directory / "config.yaml").write_text("# config hash: a\n# code hash: b\nadded: 1\n")
    assert read_config(directory / "config.yaml") == ({"added": 1}, "b")


def test_non_file_record_is_rejected_and_missing_gives_none(tmp_path):
    assert read_result(tmp_path / "result.json") is None and read_metrics(tmp_path / "metrics.jsonl") == []
    (tmp_path / "result.json").mkdir()
    with pytest.raises(RecordError, match=r"result\.json: not a file"):
        read_result(tmp_path / "result.json")


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "config.yaml", "sweep.json"])
def test_circular_link_does_not_abort_report(tmp_path, name):
    directory = write_run(tmp_path, "fa", 0, 0.9)
    write_run(tmp_path, "fa", 1, 0.8)
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(name)
    write_sweep(tmp_path, [], [PlannedRun(tmp_path / "loop", "loop", 1)])
    (tmp_path / "loop").symlink_to("loop")
    assert main([str(tmp_path)]) == 1 and main(["--live", str(tmp_path)]) == 0


# Versions of the code.


@pytest.mark.parametrize("word", ["code", "data"])
def test_runs_of_different_code_or_data_get_separate_rows(tmp_path, word):
    for version, accuracies in (("a" * 64, [0.9, 0.8]), ("b" * 64, [0.5, 0.4])):
        for rule, less in (("bp", 0.0), ("fa", 0.1)):
            for seed, accuracy in enumerate(accuracies):
                write_run(tmp_path / version[0], rule, seed, accuracy - less, **{f"{word}_hash": version})
    assert main([str(tmp_path)]) == 0
    rows = {row["label"]: row for row in csv.DictReader((tmp_path / "report.csv").read_text().splitlines())}
    assert {label: (row["n"], row["test_accuracy"], row["bp_difference"]) for label, row in rows.items()} == {
        f"bp {word}=aaaaaaaa": ("2", "85", ""),
        f"bp {word}=bbbbbbbb": ("2", "45", ""),
        f"fa {word}=aaaaaaaa": ("2", "75", "-10"),
        f"fa {word}=bbbbbbbb": ("2", "35", "-10"),
    }
    assert {row[f"{word}_hash"] for row in rows.values()} == {"a" * 64, "b" * 64}
    layers = list(csv.DictReader((tmp_path / "report_layers.csv").read_text().splitlines()))
    assert {row["label"] for row in layers} == set(rows) and {row["n"] for row in layers} == {"2"}


def test_reference_of_different_code_is_noted(tmp_path):
    write_run(tmp_path, "bp", 0, 0.9, code_hash="a")
    write_run(tmp_path, "fa", 0, 0.8, code_hash="b")
    assert main([str(tmp_path)]) == 0
    rows = {row["label"]: row for row in csv.DictReader((tmp_path / "report.csv").read_text().splitlines())}
    assert rows["fa"]["note"] == "the runs of bp used different code" and rows["bp"]["note"] == ""


def test_unknown_data_hash_is_not_noted_as_different(tmp_path):
    """A run that was interrupted before it read its data has no hash of them."""
    write_run(tmp_path, "bp", 0, 0.9, data_hash="a" * 64)
    write_run(tmp_path, "fa", 0, 0.8, data_hash=None, status="interrupted")
    main([str(tmp_path)])
    rows = {row["label"]: row for row in csv.DictReader((tmp_path / "report.csv").read_text().splitlines())}
    assert "different" not in rows["fa"]["note"]


def test_run_without_result_is_grouped_by_code_hash(tmp_path):
    write_run(tmp_path, "kp", 0, 0.9, group="kp-0123abcd", code_hash="aa").rename(tmp_path / "x")
    begun = write_begun(tmp_path / "kp-0123abcd", "kp", 1, 1, folder="seed1")
    config = (begun / "config.yaml").read_text()
    for code, want in (("aa", {"kp": "2"}), ("bb", {"kp code=aa": "1", "kp code=bb": "1"})):
        (begun / "config.yaml").write_text(config.replace("\n", f"\n# code hash: {code}\n", 1))
        assert main([str(tmp_path)]) == 1
        found = csv.DictReader((tmp_path / "report.csv").read_text().splitlines())
        assert {row["label"]: row["runs"] for row in found} == want


# Columns.


def test_csv_has_validation_accuracies_and_swept_keys(tmp_path):
    for number, (lr, widths) in enumerate(((0.1, [8]), (0.05, [8, 4]))):
        for seed, val in enumerate((0.6, 0.7, 0.8)):
            run = write_run(tmp_path, "kp", seed, 0.9, group=f"kp-{number}", val_accuracy=val, test_accuracy_at_best_val=0.85)
            config = {
                "algorithm": {"name": "kp", "b_init": None},
                "optimizer": {"name": "sgd", "lr": lr},
                "seed": seed,
                "architecture": {"name": "mlp", "widths": widths},
                "status": number,
                "x\ny": number,
            }
            (run / "config.yaml").write_text(json.dumps(config))
    assert main([str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "report.csv").read_text().splitlines()))
    assert [(row["optimizer.lr"], row["architecture.widths"], row[r"x\ny"], row["status"]) for row in rows] == [
        ("0.05", "[8,4]", "1", "3 finished"),
        ("0.1", "[8]", "0", "3 finished"),
    ]
    assert "algorithm.b_init" not in rows[0] and "seed" not in rows[0] and "best_val_accuracy" not in rows[0]
    # The values are 60, 70, 80, so std is 10 and the half width is 4.302652730 x 10 / sqrt 3 = 24.84137712.
    assert (rows[0]["val_accuracy"], rows[0]["val_accuracy_std"], rows[0]["val_accuracy_ci95"]) == ("70", "10", "24.84137712")
    assert (rows[0]["test_accuracy"], rows[0]["test_accuracy_at_best_val"]) == ("90", "85")


def test_run_without_data_hash_shares_row_with_others(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "kp", seed, 0.9, group="kp-0", data_hash="d")
    write_run(tmp_path, "kp", 2, 0.9, group="kp-0", status="failed")
    assert main([str(tmp_path)]) == 1
    rows = list(csv.DictReader((tmp_path / "report.csv").read_text().splitlines()))
    assert [(row["label"], row["n"], row["runs"]) for row in rows] == [("kp", "2", "3")]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("# config hash: 0a\n# code hash: c0de\nseed: 3\nepochs: 2\n", {"seed": 3, "epochs": 2}),
        ("# config hash: 0b\n# code hash: c0de\nseed: 14\nepochs: 2\n", {"seed": 14, "epochs": 2}),
        ("epochs: 2\nseed: 0\n", {"epochs": 2, "seed": 0}),
        ('label: "a\nseed: 5\nb"\nseed: 6\n', {"label": "a seed: 5 b", "seed": 6}),  # the first "seed" is part of a string
        ('label: "a\nseed: 5\nb"\n', {"label": "a seed: 5 b"}),
        ("seed: 012\n", {"seed": 10}),  # octal in YAML
    ],
)
def test_configs_differing_only_in_seed_are_parsed_correctly(tmp_path, text, want):
    for _ in range(2):  # the second time, the parsed config is cached
        (tmp_path / "config.yaml").write_text(text)
        config = read_config(tmp_path / "config.yaml")
        assert config.values == want and config.code_hash == ("c0de" if "c0de" in text else None)
    assert list(config.values) == list(want)
