"""Tests of the view of a running sweep."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path

import pytest
from rich.console import Console

from fa_bench.errors import DataError
from fa_bench.report import live
from fa_bench.report.cli import main
from fa_bench.runs.sweep import PlannedRun, write_sweep

from .by_hand import at_work, write_begun, write_run

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_800_000_000.0


def record(epoch: int, seconds: float, loss: float, val: float, test: float) -> dict:
    return {"epoch": epoch, "seconds": seconds, "train_loss": loss, "val_accuracy": val, "test_accuracy": test}


def written(directory: Path, ago: float, started: float | None = None) -> None:
    """Set the modification times of the directory's files to `ago` seconds before NOW, and that of the config to `started`
    seconds before NOW."""
    for file in directory.iterdir():
        since = started if started is not None and file.name == "config.yaml" else ago
        os.utime(file, (NOW - since, NOW - since))


def at(ago: float) -> str:
    return datetime.fromtimestamp(NOW - ago, timezone.utc).isoformat()


@pytest.fixture
def sweep(tmp_path):
    """A sweep with runs in every state except `stopped` at the time NOW."""

    def begun(rule, seed, *lines):
        run = write_begun(tmp_path, rule, seed, 0)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    names = ("bp", "fa", "dfa", "drtp", "kp", "wm", "pfa", "usf")
    write_sweep(tmp_path, ["fa-bench"], [PlannedRun(tmp_path / f"{name}-seed0", f"{name} seed 0", 40) for name in names])
    write_run(tmp_path, "bp", 0, 0.9821, metrics=[record(40, 88.0, 0.0021, 0.9813, 0.9821)]).rename(tmp_path / "bp-seed0")
    write_run(
        tmp_path,
        "fa",
        0,
        None,
        metrics=[record(2, 4.4, 8.1, 0.098, 0.097)],
        status="diverged",
        error={"type": "Diverged", "message": "not finite", "epoch": 3, "layer": "fc1"},
    ).rename(tmp_path / "fa-seed0")
    write_run(
        tmp_path,
        "dfa",
        0,
        None,
        metrics=[],
        status="failed",
        error={"type": "OutOfMemoryError", "message": "tried to allocate 2 GiB\nmore"},
    ).rename(tmp_path / "dfa-seed0")
    begun("drtp", 0, record(12, 24.0, 0.2411, 0.934, 0.9312))
    with ExitStack() as stack:
        # Ten epochs with 2.4 s of training each took 30 s in total, which is 3 s per epoch; the last one ended 1 s ago.
        kp = begun("kp", 0, record(10, 24.0, 0.1021, 0.9652, 0.9631))
        stack.enter_context(at_work(kp, started=at(33.0)))
        written(kp, 1.0, started=31.0)
        wm = begun("wm", 0, record(7, 21.0, 0.1834, 0.951, 0.9498))
        stack.enter_context(at_work(wm, started=at(2000)))
        written(wm, 1980.0, started=2000.0)
        pfa = begun("pfa", 0)
        stack.enter_context(at_work(pfa, started=at(5.0)))
        written(pfa, 4.0)
        yield tmp_path


def test_states_and_remaining_time(sweep):
    lines = {line.name.split()[0]: line for line in live.Watcher([sweep]).look(NOW)}
    assert {name: line.state for name, line in lines.items()} == {
        "bp": "done",
        "fa": "diverged",
        "dfa": "failed",
        "drtp": "interrupted",
        "kp": "running",
        "wm": "stalled",
        "pfa": "running",
        "usf": "waiting",
    }
    assert lines["fa"].remark == "in epoch 3, first in fc1" and lines["wm"].remark == "nothing written for 33 min"
    assert lines["dfa"].remark == "OutOfMemoryError: tried to allocate 2 GiB"
    assert (lines["kp"].epoch, lines["kp"].epochs, lines["kp"].pace) == (10, 40, pytest.approx(2.4))
    assert lines["kp"].remaining == pytest.approx(30 * 3 - 1)
    # pfa has no epoch yet, so its estimate is the mean of the other runs' training times per epoch, 2.2, 2.2, 2, 2.4 and 3 s,
    # times 1.125 for the time outside training. kp takes 3 s for 2.4 s of training, and wm takes no extra time.
    epoch = (2.2 + 2.2 + 2 + 2.4 + 3) / 5 * 1.125
    assert lines["pfa"].remaining == pytest.approx(40 * epoch - epoch)  # the past four seconds count as one epoch at most
    assert lines["usf"].remaining == pytest.approx(40 * epoch)
    assert live.summary(list(lines.values())) == (
        "8 runs: 1 done, 2 running, 1 stalled, 1 failed, 1 diverged, 1 interrupted, 1 waiting; "
        f"about {live.duration((89 + 79 * epoch) / 2)} left, 2 at a time"
    )


def test_resumed_run_is_not_estimated_faster_than_training(tmp_path):
    run = write_begun(tmp_path, "kp", 0, epochs=10)  # 2 s per epoch; the present process has trained only the last one
    with at_work(run, started=at(3.0)):
        written(run, 1.0, started=500.0)
        (line,) = live.Watcher([tmp_path]).look(NOW)
    assert line.overhead == 1 and line.remaining == pytest.approx(30 * 2 - 1)


def test_documented_example_matches_output(sweep):
    shown = live.plain_text(live.Watcher([sweep]).look(NOW))
    print(*(f"    {line}" for line in shown), sep="\n")
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    assert "\n".join(f"    {line}" for line in shown) in page


def test_unannounced_runs_are_labelled_from_configs(tmp_path):
    for seed, lr in ((0, 1), (0, 2), (1, 2)):
        write_begun(tmp_path, "kp", seed, 1, folder=f"{lr}/{seed}", optimizer={"name": "sgd", "lr": lr})
    write_begun(tmp_path, "fa", 0, 1, folder="one", scale="smoke")
    write_begun(tmp_path, "fa", 0, 1, folder="two", scale="smoke")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"epoch": 1}\n')
    lines = live.Watcher([tmp_path]).look(NOW)
    assert {line.name: line.epochs for line in lines} == {
        "kp lr=1 seed 0": 40,
        "kp lr=2 seed 0": 40,
        "kp lr=2 seed 1": 40,
        f"fa seed 0 ({'/'.join(tmp_path.parts[-2:])}/one)": 1,
        f"fa seed 0 ({'/'.join(tmp_path.parts[-2:])}/two)": 1,
        f"{'/'.join(tmp_path.parts[-2:])}/bare": None,
    }
    assert live.summary(lines) == "6 runs: 6 interrupted"


def test_changed_records_are_reread_and_unreadable_ones_reported(tmp_path):
    run = write_begun(tmp_path, "kp", 0, epochs=2)
    watcher = live.Watcher([tmp_path])
    assert watcher.look(NOW)[0].epoch == 2
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record(3, 6.0, 1, 0.5, 0.5)) + "\n")
    assert watcher.look(NOW)[0].epoch == 3
    (run / "metrics.jsonl").write_text('{\n{"epoch": 1}\n')
    (line,) = watcher.look(NOW)
    assert line.state == "failed" and re.search(r"metrics\.jsonl: line 1 is not an epoch's record", line.remark)


def test_waiting_runs_and_unknown_remaining_time(tmp_path):
    write_sweep(tmp_path, [], [PlannedRun(tmp_path / "a", "a seed 0", 2)])
    watcher = live.Watcher([tmp_path])
    assert live.summary(watcher.look(NOW)) == "1 run: 1 waiting; none is running"
    (tmp_path / "a").mkdir()
    with at_work(tmp_path / "a", started="?"):
        lines = watcher.look(time.time())
        assert live.summary(lines) == "1 run: 1 running; time left unknown until the first epoch ends"
        assert live.plain_text(lines)[1].split() == ["a", "seed", "0", "running", "0/2", "-", "-", "-", "-", "-"]
        assert watcher.look(time.time() + live.FIRST_EPOCH + 60)[0].state == "stalled"
    (tmp_path / "sweep.json").unlink()
    with pytest.raises(DataError, match="no runs found"):
        watcher.look(NOW)


def test_small_terminal_shows_most_important_runs(sweep):
    lines = live.Watcher([sweep]).look(NOW)
    text = rendered(lines, width=70, height=7)
    assert len(text) == 7 and all(len(line) <= 70 for line in text)
    assert [line.split()[0] for line in text[1:-2]] == ["dfa", "kp", "wm", "pfa"]
    assert text[-2].rstrip() == "not shown: 1 done, 1 diverged, 1 interrupted, 1 waiting"
    lines[0].name = "bp algorithm.density=0.25 optimizer.lr=0.1 seed 0"
    text = rendered(lines, width=110, height=10)
    assert len(text) == 10 and re.match(r"bp algo\S*…\S* seed 0  done", text[1])
    lines[0].name, lines[0].remark = "[bold]bp[/bold] seed 0", "[red]"
    assert rendered(lines, width=110, height=10)[1].startswith("[bold]bp[/bold] seed 0  done"), "the name was read as markup"


def rendered(lines: list[live.Line], width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(live.table(lines, width, height))
    return console.file.getvalue().splitlines()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_view_refreshes_in_place_until_runs_end(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for key, value in (("TERM", "xterm"), ("COLUMNS", "100"), ("LINES", "30")):
        monkeypatch.setenv(key, value)
    run = write_begun(tmp_path, "kp", 0, epochs=1)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        (run / "result.json").write_text((write_run(tmp_path / "other", "kp", 0, 0.9) / "result.json").read_text())

    monkeypatch.setattr(live.time, "sleep", sleep)
    out = Terminal()
    live.watch([run], out, interval=7, once=False)
    assert slept == [7]
    # The output has four lines; then the cursor returns to the first of them, and each line is cleared.
    before, after, *_ = re.split(r"\r\x1b\[2K(?:\x1b\[1A\x1b\[2K){3}", out.getvalue())
    text = [[re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", line).rstrip() for line in part.splitlines()] for part in (before, after)]
    assert [lines[2] for lines in text] == ["1 run: 1 interrupted", "1 run: 1 done"]
    assert re.fullmatch(r"\d\d:\d\d:\d\d, every 7 s; Ctrl-C ends only this view", text[0][3])
    assert "\x1b[33minterrupted" in before and "\x1b[34mdone" in after, "the states are not coloured"
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l"), "the cursor remains hidden"


def test_ctrl_c_exits_with_zero_and_writes_nothing(tmp_path, monkeypatch):
    run = write_begun(tmp_path, "kp", 0, epochs=1)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())

    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(live.time, "sleep", stop)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path, run, *run.iterdir())}
    assert main(["--live", str(tmp_path), "--interval", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path, run, *run.iterdir())} == before


@pytest.mark.parametrize("words", [["--once"], []])
def test_non_terminal_and_once_print_plain_text(tmp_path, capsys, words):
    write_begun(tmp_path, "kp", 0, epochs=1)
    assert main(["--live", *words, str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and said.splitlines()[-1] == "1 run: 1 interrupted" and len(said.splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--once"], "--once requires --live"),
        (["--interval=3"], "--interval requires --live"),
        (["--live", "--out=x"], "--out cannot be combined with --live, which writes nothing"),
        (["--live", "--no-timings"], "--no-timings cannot be combined with --live, which writes nothing"),
        (["--live", "--interval=0.1"], "--interval=0.1 is out of range (allowed: 0.5 to 3600 seconds)"),
        (["--live", "--interval=nan"], "--interval=nan is out of range (allowed: 0.5 to 3600 seconds)"),
        (["--live", "--interval=x"], "argument --interval: invalid float value: 'x'; see fa-bench-report --help"),
        (["--live"], ".: no runs found"),
    ],
)
def test_errors_are_single_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main([".", *words]) == 2
    assert capsys.readouterr().err == f"fa-bench-report: {said}\n"
