"""A run removes and overwrites only its own files. All other files in its folders are unchanged, byte by byte."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from fa_bench.cli import main
from fa_bench.command.compose import Composer
from fa_bench.errors import RunDirectoryError
from fa_bench.loggers.events import files as event_files
from fa_bench.runs import ownership
from fa_bench.utils.files import CONFIG, LOG, RESULT

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
COMMON = [
    "dataset=synthetic",
    "dataset.samples=64",
    "dataset.test_samples=16",
    "batch_size=16",
    "epochs=1",
    "probe_size=8",
    "architecture.widths=[8]",
]
RUN = [*COMMON, "hydra.run.dir=run"]
#: Files that a user's folder may contain; the last ones have names similar to those of a run's files.
FOREIGN = [
    "notes.txt",
    ".draft.tmp",
    ".bashrc",
    "notes/deep/.draft.tmp",
    "checkpoints/best.pt",
    "checkpoints/.best.pt.tmp",
    "my.log",
    "data/.x.tmp",
    "run.log.1",
    ".lock.txt",
    "events.out.tfevents.1700000000.host",
    "events.out.tfevents.1700000000.host.1.0",
    ".metrics.jsonl.7.tmp",
    ".events.7.tmp",
    "checkpoints/.last.pt.7.tmp",
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)


def put(name: str, text: str = "mine") -> Path:
    path = Path("run", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def bytes_below(folder: str | Path) -> dict[str, bytes]:
    return {
        str(path): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def refused(command: list[str], capsys: Capture) -> str:
    capsys.readouterr()
    before = bytes_below(".")
    assert main(command) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and bytes_below(".") == before, said
    return said


@pytest.mark.parametrize("name", FOREIGN)
def test_directory_with_foreign_file_is_refused_and_unchanged(name: str, capsys: Capture) -> None:
    put(name)
    shown = name if name.startswith("checkpoints/") else name.split("/")[0]
    said = refused(RUN, capsys)
    assert "checkpoints but no config.yaml" in said if shown.startswith("checkpoints/") else f"run: contains '{shown}'" in said


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file_in_own_run_is_refused(name: str, capsys: Capture) -> None:
    assert main([*COMMON, "output_dir=o"]) == 0
    (place,) = [path.parent for path in Path("o").rglob(RESULT)]
    for path in place.iterdir():
        own = {CONFIG, LOG, RESULT, "metrics.jsonl", "angles.jsonl", "checkpoints", event_files.EVENTS}
        assert path.name in own or "tfevents" in path.name
    put(f"../{place}/{name}")
    for command in ([*COMMON, "output_dir=o"], [*COMMON, "output_dir=o", "resume=false"], ["-m", *COMMON, "output_dir=o"]):
        assert "which no run wrote; choose another directory, or move foreign files elsewhere" in refused(command, capsys)


@pytest.mark.parametrize("name", [LOG, event_files.EVENTS, *ownership.TEMPORARIES, ownership.HOLDER])
def test_own_file_name_without_config_is_not_run(name: str, capsys: Capture) -> None:
    put(name)
    for command in (RUN, [*RUN, "resume=false"], ["-m", *COMMON, "hydra.sweep.dir=run", "hydra.sweep.subdir=."]):
        assert f"run: contains '{name}'" in refused(command, capsys)


@pytest.mark.parametrize("text", ["", '{"pid": 1}'])
def test_start_killed_before_writing_config_is_restarted(text: str) -> None:
    put(ownership.LOCK, "")
    for name in (ownership.HOLDER, f".{ownership.HOLDER}.tmp"):
        put(name, text)
    put(".config.yaml.tmp", text and "# config hash: 0123")
    assert main(RUN) == 0 and not list(Path("run").glob(".*holder*")) and not list(Path("run").glob("*.tmp"))


def test_working_directory_with_files_is_refused(capsys: Capture) -> None:
    put("../notes/deep/.draft.tmp")
    assert "contains 'notes'" in refused([*COMMON, "hydra.run.dir=."], capsys)


def test_known_harmless_foreign_files_are_unchanged(capsys: Capture) -> None:
    kept = [put(name) for name in (".DS_Store", ".hydra/config.yaml", "cli.log", "report.md", "report_curves-a.png")]
    for extra in ([], ["resume=true"], ["resume=false"]):
        assert main([*RUN, *extra]) == 0 and all(path.read_text() == "mine" for path in kept)


def test_hydra_records_and_log_do_not_block_run() -> None:
    command = [*RUN, "hydra.output_subdir=.hydra", "hydra/job_logging=default"]
    assert main(command) == 0 and main([*command, "resume=false"]) == 0 and Path("run/.hydra/config.yaml").exists()


def test_restart_removes_only_own_files(monkeypatch: Patch) -> None:
    assert main(RUN) == 0
    left = [
        put(f"{folder}{name}")
        for folder, names in (("", ownership.TEMPORARIES), ("checkpoints/", ownership.CHECKPOINT_TEMPORARIES))
        for name in names
    ]
    with open("run/checkpoints/last.pt", "rb") as before:  # kept open, so that its inode number is not given to another file
        assert main([*RUN, "resume=false"]) == 0
        assert not any(path.exists() for path in left)
        assert Path("run/checkpoints/last.pt").stat().st_ino != os.fstat(before.fileno()).st_ino
    # Within the same second, the new event file may have the same name as the old one.
    assert event_files.recorded_events(Path("run")) == [path.name for path in Path("run").glob("events.out.*")]


@pytest.mark.parametrize(
    "name",
    [
        LOG,
        RESULT,
        CONFIG,
        "metrics.jsonl",
        "angles.jsonl",
        event_files.EVENTS,
        ownership.LOCK,
        ".result.json.tmp",
        "checkpoints",
        "checkpoints/last.pt",
        "events",
    ],
)
@pytest.mark.parametrize("resume", ["true", "false"])
def test_links_are_not_followed(name: str, resume: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(RUN) == 0
    link = next(Path("run").glob("events.out.*")) if name == "events" else Path("run", name)
    elsewhere = Path("elsewhere")
    link.rename(elsewhere) if link.exists() else elsewhere.write_text("theirs")
    link.symlink_to(tmp_path / elsewhere)
    said = refused([*RUN, f"resume={resume}"], capsys)
    assert name == CONFIG or f"{link}: a link" in said
    assert "a link" in said


def test_dangling_links_and_pipes_are_refused(capsys: Capture) -> None:
    Path("run").mkdir()
    Path("run", LOG).symlink_to("nowhere")
    assert "run.log: a link" in refused(RUN, capsys)
    Path("run", LOG).unlink()
    os.mkfifo(Path("run", LOG))
    assert "run.log: not a file" in refused(RUN, capsys)


def test_foreign_lock_file_is_not_truncated(capsys: Capture) -> None:
    put(ownership.LOCK, "their text")
    assert ".lock: not a lock file" in refused(RUN, capsys)
    put(ownership.LOCK, "")
    os.link(put("../other", ""), "run/second")
    os.replace("run/second", Path("run", ownership.LOCK))
    assert ".lock: not a lock file" in refused(RUN, capsys)


def test_hard_linked_copy_is_unchanged() -> None:
    assert main([*RUN, "epochs=2"]) == 0
    for path in [path for path in Path("run").rglob("*") if path.is_file()]:
        copy = Path("copy", path.relative_to("run"))
        copy.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, copy)
    before = bytes_below("copy")
    Path("run/checkpoints/last.pt").unlink()  # resumed from the previous checkpoint, so an epoch is trained again
    assert main([*RUN, "epochs=2", "resume=true"]) == 0 and bytes_below("copy") == before
    assert main([*RUN, "epochs=2", "resume=false"]) == 0 and bytes_below("copy") == before


def test_forged_event_record_removes_no_other_files(capsys: Capture) -> None:
    assert main(RUN) == 0
    outside, beside = put("../outside"), Path("run", LOG)
    own = event_files.recorded_events(Path("run"))
    put(event_files.EVENTS, json.dumps([*own, "../outside", str(outside.absolute()), 7, "checkpoints", f"x/../{own[0]}"]))
    assert event_files.recorded_events(Path("run")) == own
    assert main([*RUN, "resume=false"]) == 0 and outside.read_text() == "mine" and beside.exists()


@pytest.mark.parametrize("place", ["/", "//", "/.", "/..", "/tmp/../..", "up", "/proc/self/root"])
@pytest.mark.parametrize(
    ("multirun", "key"), [(False, "output_dir"), (False, "hydra.run.dir"), (True, "output_dir"), (True, "hydra.sweep.dir")]
)
def test_root_directory_is_refused(place: str, multirun: bool, key: str) -> None:
    """No command is executed; only the jobs are checked, which writes nothing."""
    Path("up").symlink_to("/")
    composer = Composer("config", None, [*COMMON, f"{key}={place}"])
    jobs = composer.expand(multirun)
    with pytest.raises(RunDirectoryError, match=rf"^{re.escape(key)}={re.escape(str(Path(place)))}: the root of the file system"):
        composer.check(jobs, directories=False)


@pytest.mark.parametrize("option", ["output_dir=''", "output_dir=", "output_dir='  '", "hydra.run.dir=''"])
def test_empty_directory_name_is_refused(option: str, capsys: Capture) -> None:
    assert "is empty; name a folder, such as outputs" in refused([*COMMON, option], capsys)


@pytest.mark.parametrize("option", ["output_dir=''", "output_dir=null", "hydra.sweep.dir=''"])
def test_sweep_refuses_empty_directory_name(option: str, capsys: Capture) -> None:
    assert option.split("=")[0] in refused(["-m", *COMMON, option], capsys)


def test_sweep_keeps_foreign_record_and_removes_own_temporary_file(tmp_path: Path, capsys: Capture) -> None:
    sweep = ["-m", *COMMON, "seed=0,1", "output_dir=out"]
    assert main(sweep) == 0
    (record,) = Path("out").rglob("sweep.json")
    left = record.with_name(".sweep.json.tmp")
    left.write_text("half")
    assert main(sweep) == 0 and not left.exists() and not record.with_name(".sweep.json.lock").exists()
    record.write_text('{"method": "grid"}')
    assert "sweep.json: not the list of a sweep's runs" in refused(sweep, capsys)
    record.rename("theirs.json")
    record.symlink_to(tmp_path / "theirs.json")
    assert "sweep.json: a link" in refused(sweep, capsys)
