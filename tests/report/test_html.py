"""report.html is complete, self-contained, and harmless, no matter what the records contain."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

from fa_bench.report import html
from fa_bench.report.cli import main

from .by_hand import ANGLES, epoch_record, write_group, write_run

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
VOID = {"meta", "input", "br", "hr", "img", "link"}


class Page(HTMLParser):
    """Collects the elements of a page as (name, attributes), and their texts by element name."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open, self.errors = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data):
        if data.strip() and self.open:
            self.texts.append((self.open[-1], data.strip()))

    def of(self, *names):
        return [text for name, text in self.texts if name in names]


def page_of(root, *flags):
    main([str(root / "runs"), "--out", str(root / "out"), *flags])
    text = (root / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.errors and not page.open  # every element is closed
    return page, text


def test_html_has_tables_figures_configs_and_statuses(tmp_path):
    for lr in (0.1, 0.2):
        for seed in (0, 1):
            run = write_run(
                tmp_path / "runs",
                "kp",
                seed,
                0.9 + lr / 10 + seed / 100,
                group=f"kp-{lr}",
                label=f"kp lr={lr}",
                metrics=[epoch_record(1, 0.5, ANGLES)],
            )
            (run / "config.yaml").write_text(
                json.dumps({"seed": seed, "algorithm": {"name": "kp"}, "optimizer": {"name": "sgd", "lr": lr, "momentum": 0.9}})
            )
    write_run(tmp_path / "runs", "fa", 0, None, status="diverged", error={"epoch": 3, "layer": "fc1"}, metrics=[])
    page, _ = page_of(tmp_path)
    before, after = ["Runs that have not finished (1)", "Missing references (2)"], ["Figures", "Configs and runs"]
    assert page.of("h1", "h2") == ["Report", *before, "Summary", *after]
    assert "3 rows, 5 runs: 4 finished, 1 diverged." in page.of("p")
    assert page.of("figcaption") == [
        "Overview",
        "Test accuracy against optimizer.lr",
        "Curves",
        "Weight angle by layer",
        "Delta angle by layer",
        "Norm ratio by layer",
    ]
    assert sum(name == "svg" for name, _ in page.elements) == 6
    assert page.of("summary") == ["Explanation", "fa", "kp lr=0.1", "kp lr=0.2"]
    assert "diverged in epoch 3, first in fc1" in page.of("td") and "92.00" in page.of("td")
    options = list(zip(page.of("dt"), page.of("dd"), strict=True))
    assert options.count(("optimizer.momentum", "0.9")) == 2 and ("optimizer.lr", "0.2") in options


def test_values_common_to_all_rows_are_shown_above_table(tmp_path):
    for rule, seeds in (("bp", (0, 1)), ("kp", (0,))):
        for seed in seeds:
            write_run(tmp_path / "runs", rule, seed, 0.9)
    page, _ = page_of(tmp_path)
    (common,) = [text for text in page.of("p") if text.startswith("All rows: ")]
    assert "architecture mlp, dataset digits" in common and "seeds" not in common and "status" not in common
    head = page.of("button")
    assert "architecture" not in head and "dataset" not in head
    assert "seeds" in head and "runs" in head and "status" in head  # these columns differ between rows
    assert page.of("td").count("90.00") >= 4  # rows keep their numbers even if all are equal


def test_options_that_all_runs_share_are_listed_once(tmp_path):
    for lr in (0.1, 0.2):
        run = write_run(tmp_path / "runs", "kp", 0, 0.9, group=f"kp-{lr}", metrics=[])
        config = {"seed": 0, "algorithm": {"name": "kp"}, "optimizer": {"lr": lr, "momentum": 0.9}}
        (run / "config.yaml").write_text(json.dumps(config))
    page, _ = page_of(tmp_path)
    assert list(zip(page.of("dt"), page.of("dd"), strict=True)) == [
        ("algorithm", "kp"),
        ("optimizer.momentum", "0.9"),
        ("optimizer.lr", "0.1"),
        ("optimizer.lr", "0.2"),
    ]
    assert "Options that all runs share (2)" in page.of("summary")


def test_html_escapes_text_from_records(tmp_path):
    write_run(tmp_path / "runs", "fa", 0, 0.9, label=f"fa {EVIL}", dataset=EVIL)
    write_run(tmp_path / "runs", "kp", 0, None, status="failed", error={"type": EVIL, "message": EVIL}, metrics=[])
    page, text = page_of(tmp_path)
    assert [name for name, _ in page.elements].count("script") == 1 and not any(name == "img" for name, _ in page.elements)
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert any(f"fa {EVIL}" in cell for cell in page.of("td"))
    (policy,) = [attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes]
    script = re.search(r"<script>(.*?)</script>", text, flags=re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_html_is_self_contained_with_unique_ids(tmp_path):
    write_group(tmp_path / "runs", "bp", [0.9, 0.8], metrics=[epoch_record(1, 0.5, ANGLES), epoch_record(2, 0.6, ANGLES)])
    page, _ = page_of(tmp_path)
    links = [
        value
        for _, attributes in page.elements
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href", "srcset", "data")
    ]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    assert len(ids) == len(set(ids))
    assert not any(name in ("link", "iframe", "object") for name, _ in page.elements)


def test_no_timings_omits_seconds(tmp_path):
    write_group(tmp_path / "runs", "bp", [0.9])
    assert any("seconds" in title for title in page_of(tmp_path)[0].of("button"))
    assert not any("seconds" in title for title in page_of(tmp_path, "--no-timings")[0].of("button"))


def test_filters_precede_their_target_and_all_columns_are_sortable(tmp_path):
    write_group(tmp_path / "runs", "bp", [0.9])
    page, text = page_of(tmp_path)
    assert len(re.findall(r'<output></output></p>\n<div class="(?:scroll|groups)">', text)) == text.count('class="filter"') == 2
    names = [name for name, _ in page.elements]
    assert names.count("th") == names.count("button") > 5
    # The script looks for these elements of the page.
    script = html._SCRIPT.read_text()
    assert all(f'"{name}"' in script for name in ("table", ".filter", "input", "output", ".groups", "tbody", "button"))


def test_spread_columns_are_labelled_with_quantity(tmp_path):
    """Several columns are called "std", so their labels name the quantity."""
    write_group(tmp_path / "runs", "bp", [0.9, 0.8, 0.85])
    page, _ = page_of(tmp_path)
    buttons = [attributes for name, attributes in page.elements if name == "button"]
    labels = [attributes["aria-label"] for attributes in buttons if "aria-label" in attributes]
    assert {"std of test accuracy (%)", "± 95 % of test accuracy (%)", "lowest of test accuracy (%)"} <= set(labels)
    assert len(labels) == len(set(labels))
    assert all(attributes.get("title") == attributes.get("aria-label") for attributes in buttons)


def test_flags_select_figures_and_are_validated_before_writing(tmp_path, capsys):
    for rule in ("bp", "kp"):
        write_group(tmp_path / "runs", rule, [0.9])
    runs, out = str(tmp_path / "runs"), tmp_path / "out"
    for flags, said in (
        (["--rules", "kpp"], "rules='kpp' is not available (allowed: bp, kp); did you mean 'kp'?"),
        (["--metric", "accuracy"], "metric='accuracy' is not available"),
        (["--format", "pngs"], "did you mean 'png'"),
        (["--format", ","], "--format is empty"),
        (["--x", "seconds", "--no-timings"], "cannot be combined"),
        (["--live", "--rules", "kp"], "--rules cannot be combined with --live"),
    ):
        assert main([runs, *(() if "--live" in flags else ("--out", str(out))), *flags]) == 2
        assert said in (error := capsys.readouterr().err) and error.count("\n") == 1 and not out.exists()
    assert main([runs, "--out", str(out), "--rules", "kp", "--metric", "test_accuracy", "--format", "pdf,svg"]) == 0
    assert {path.name for path in out.glob("report.*")} >= {"report.pdf", "report.svg"} and not list(out.glob("*.png"))
    assert "![report](report.svg) [report.pdf](report.pdf)" in (out / "report.md").read_text()
    assert len((out / "report.csv").read_text().splitlines()) == 3  # tables contain all rows
