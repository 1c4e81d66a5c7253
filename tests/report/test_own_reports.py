"""A report, including the one at the end of a sweep, replaces only files that reports have written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from fa_bench.cli import main as bench
from fa_bench.errors import RunDirectoryError
from fa_bench.report import files, write_report
from fa_bench.report.cli import main
from fa_bench.utils import locks

from .by_hand import write_run

SWEEP = [
    "-m",
    "algorithm=bp,fa",
    "dataset=synthetic",
    "dataset.samples=64",
    "dataset.test_samples=32",
    "epochs=1",
    "output_dir=o",
]


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["report.md", "report.csv", "report_layers.csv", "report.png"])
@pytest.mark.parametrize("kind", ["text", "link", "hard link", "folder"])
def test_foreign_file_is_not_replaced(tmp_path, capsys, name, kind):
    write_run(tmp_path / "runs", "bp", 0, 0.9)
    mine, out = tmp_path / "mine", tmp_path / "out"
    out.mkdir()
    mine.write_text("# Notes\n")
    {
        "text": lambda: (out / name).write_text("# Report of mine\n"),
        "link": lambda: (out / name).symlink_to(mine),
        "hard link": lambda: os.link(mine, out / name),
        "folder": lambda: (out / name).mkdir(),
    }[kind]()
    before = bytes_below(tmp_path)
    assert main([str(tmp_path / "runs"), "--out", str(out)]) == 2
    assert f"{name}: not written by a report of fa-bench" in (said := capsys.readouterr().err) and said.count("\n") == 1
    after = bytes_below(tmp_path)
    assert {key: after[key] for key in before} == before
    with pytest.raises(RunDirectoryError, match="not written by a report"):
        files.check_folder(out)


def test_own_files_are_replaced_and_removed(tmp_path):
    write_run(tmp_path, "bp", 0, 0.9)
    first = write_report(sorted(tmp_path.iterdir()), tmp_path / "out")
    (tmp_path / "out/report_old.csv").write_text("of an earlier report\n")
    (tmp_path / "out/report_mine.csv").write_text("mine\n")
    files.write_record(tmp_path / "out", {*files.recorded_files(tmp_path / "out"), "report_old.csv"})
    first.markdown.write_text("edited")
    write_report(sorted(path for path in tmp_path.iterdir() if path.name != "out"), tmp_path / "out")
    assert first.markdown.read_text().startswith("# Report")
    assert not (tmp_path / "out/report_old.csv").exists() and (tmp_path / "out/report_mine.csv").read_text() == "mine\n"
    assert not list((tmp_path / "out").glob("*.lock")) and not list((tmp_path / "out").glob(".*.tmp"))


def test_report_without_record_is_recognised_by_links(tmp_path):
    write_run(tmp_path, "bp", 0, 0.9)
    runs = sorted(tmp_path.iterdir())
    write_report(runs, tmp_path / "out")
    (tmp_path / "out/.report.json").unlink()
    files.check_folder(tmp_path / "out")
    write_report(runs, tmp_path / "out")
    assert "report.png" in files.recorded_files(tmp_path / "out")


@pytest.mark.parametrize("name", [".report.csv.tmp", ".report.md.tmp", ".report_layers.csv.tmp", "..report.json.tmp"])
def test_foreign_file_with_temporary_name_is_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunDirectoryError, match=f"{name}: not written by fa-bench"):
        files.check_folder(tmp_path)
    run = write_run(tmp_path / "runs", "bp", 0, 0.9)
    with pytest.raises(RunDirectoryError, match=f"{name}: not written by fa-bench"):
        write_report([run], tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_foreign_lock_file_is_rejected_by_folder_check(tmp_path):
    (tmp_path / ".report.lock").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"\.report\.lock: not a lock file"):
        files.check_folder(tmp_path)
    assert (tmp_path / ".report.lock").read_text() == "mine"


def test_partial_files_of_killed_report_are_replaced(tmp_path):
    run = write_run(tmp_path / "runs", "bp", 0, 0.9)
    (tmp_path / "..report.json.tmp").write_text('["repo')
    files.write_record(tmp_path, {"report.md", "report.csv"})
    (tmp_path / ".report.csv.tmp").write_text("half")
    write_report([run], tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("text", ["{", '["../x.csv"]', '["mine.csv"]', "{}", "[" * 100_000])
def test_foreign_record_is_rejected_and_unchanged(tmp_path, text):
    (tmp_path / ".report.json").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"\.report\.json: not a record of report files"):
        files.check_folder(tmp_path)
    assert (tmp_path / ".report.json").read_text() == text


def test_concurrent_report_is_rejected_while_locked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "locked", locks.locked)
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    write_run(tmp_path, "bp", 0, 0.9)
    with FileLock(tmp_path / ".report.lock"):
        assert main([str(tmp_path)]) == 2
    assert "another process is still writing a report there" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 0


def test_foreign_lock_file_is_not_truncated(tmp_path, capsys):
    write_run(tmp_path, "bp", 0, 0.9)
    (tmp_path / ".report.lock").write_text("mine")
    assert main([str(tmp_path)]) == 2
    assert "not a lock file" in capsys.readouterr().err and (tmp_path / ".report.lock").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("report.csv", "not written by a report"),
        ("sweep.json", "sweep.json: "),
        (".sweep.json.tmp", "not written by fa-bench"),
        (".sweep.json.lock", "lock"),
    ],
)
def test_sweep_is_refused_before_training(tmp_path, monkeypatch, capsys, name, what):
    monkeypatch.chdir(tmp_path)
    folder = Path("o/synthetic-mlp")
    folder.mkdir(parents=True)
    (folder / name).write_text("hydra: mine\n")
    assert bench(SWEEP) == 2
    assert name in (said := capsys.readouterr().err) and what in said and said.count("\n") == 1
    assert bytes_below(tmp_path) == {str(folder / name): b"hydra: mine\n"}


def test_repeated_sweep_replaces_own_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench(SWEEP) == 0 and not list(Path().rglob("multirun.yaml"))
    assert bench(SWEEP) == 0
    assert (Path("o/synthetic-mlp/.report.json")).exists()
