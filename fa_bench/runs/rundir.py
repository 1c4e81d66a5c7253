"""The directory of one run: whose it is, what lies in it, and who is writing it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fa_bench.config.job import VOLATILE, Job
from fa_bench.config.labels import flat
from fa_bench.config.scale import scaled
from fa_bench.config.yaml_files import parse_yaml
from fa_bench.errors import HeldError, OutputError, RunDirectoryError
from fa_bench.files import CONFIG, LOG, METRICS, RESULT, TEMPORARY, write_text
from fa_bench.records import CODE_HEADER, HEADER, RecordError, read_metrics, read_result
from fa_bench.runs.hashes import code_hash

CHECKPOINTS, LAST, PREVIOUS = "checkpoints", "last.pt", "previous.pt"
EVENTS = "events.out.tfevents.*"
#: Held by the process that writes a run's directory; its content says who that is.
LOCK = ".lock"
#: How long to try for the lock, in seconds: whoever looks whether it is held, holds it for a moment.
PATIENCE = 1.0


class Stage(Enum):
    """How far a run's directory has come."""

    NEW = "new"
    BEGUN = "begun, without a checkpoint"
    UNFINISHED = "unfinished"
    FINISHED = "finished"
    STALE = "stale: made by other code"


class RunDirectory:
    """One run's directory.

    Args:
        path: the directory; need not exist.
        job: the run.
    """

    def __init__(self, path: Path, job: Job) -> None:
        self.path, self.job = path, job

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint's path."""
        return self.path / CHECKPOINTS / LAST

    @property
    def previous(self) -> Path:
        """The path of the checkpoint before the newest."""
        return self.path / CHECKPOINTS / PREVIOUS

    @property
    def stage(self) -> Stage:
        """How far this config's run in the directory has come; `check` says whether it is this config's."""
        try:
            lines = (self.path / CONFIG).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return Stage.NEW
        if not lines or lines[0] != f"{HEADER}{self.job.config_hash}":
            return Stage.NEW
        if lines[1:2] != [f"{CODE_HEADER}{code_hash(self.job.run.plugins)}"]:
            return Stage.STALE
        if self._complete():
            return Stage.FINISHED
        return Stage.UNFINISHED if self.checkpoint.exists() or self.previous.exists() else Stage.BEGUN

    def _complete(self) -> bool:
        """Whether a result with its record is there: of a run that trained to its last epoch, or diverged."""
        try:
            result, lines = read_result(self.path / RESULT), len(read_metrics(self.path / METRICS))
        except RecordError:
            return False
        if result is None or result.get("config_hash") != self.job.config_hash:
            return False
        if result.get("status") == "diverged":
            return True
        # Probes that it has not measured are measured at its end, without training.
        measured = set(self.job.run.probes) <= set(result.get("probes") or ())
        return measured and result.get("status") == "finished" and result.get("epoch") == lines == scaled(self.job).run.epochs

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the only process that writes this directory, which is made; it goes again where nothing was written into it.

        Raises:
            HeldError: naming the process that writes it.
            OutputError: where the directory cannot be made or written.
        """
        lock = self.path / LOCK
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = _locked(lock)
        except OSError as error:
            if isinstance(error, HeldError):
                raise
            raise OutputError(f"{self.path}: cannot be written ({error.strerror or error})") from None
        try:
            yield
        finally:
            with suppress(OSError):  # what the lock says is done with, wherever it stays
                lock.unlink()
            os.close(descriptor)

    def check(self) -> None:
        """Refuse a directory that holds another config's run, or files of one that this is not known to be.

        Raises:
            RunDirectoryError: naming the directory and what differs.
        """
        config = self.path / CONFIG
        if not config.exists():
            strays = [name for name in (METRICS, RESULT, CHECKPOINTS) if (self.path / name).exists()]
            if strays:
                raise RunDirectoryError(f"{self.path}: holds {', '.join(strays)} but no {CONFIG}; choose another directory")
            return
        try:
            text = config.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise RunDirectoryError(f"{config}: cannot be read ({error.strerror})") from None
        if text.startswith(f"{HEADER}{self.job.config_hash}\n"):
            return
        raise RunDirectoryError(f"{self.path}: holds a run of another config ({self._difference(text)}); "
                                "choose another hydra.run.dir, or remove it")

    def _difference(self, text: str) -> str:
        try:
            theirs, ours = flat(OmegaConf.to_container(parse_yaml(text, CONFIG))), flat(self.job.plain())  # type: ignore[arg-type]
        except Exception:  # whatever a foreign file makes the parser say, it is not this run's
            return "its config.yaml is not one of fa_bench"
        keys = [k for k in sorted({*theirs, *ours}) if k.split(".")[0] not in VOLATILE and theirs.get(k) != ours.get(k)]
        shown = [f"{key}={theirs.get(key)} there, {ours.get(key)} here" for key in keys[:2]]
        return "; ".join(shown) + ("; ..." if len(keys) > 2 else "") if shown else "an older format"

    def start(self, keep: bool) -> None:
        """Make it this run's; without `keep` what an earlier try of the same run left is removed.

        A result goes in either case: the run has none until it ends. So do files that a killed process was writing.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Checkpoints first: those of other code must not outlive the line that says so.
            if not keep:
                shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
            old = [self.path / name for name in ([RESULT] if keep else [RESULT, LOG, METRICS])]
            for path in (*old, *self.path.rglob(f".*{TEMPORARY}"), *([] if keep else self.path.glob(EVENTS))):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror or error})") from None
        text = OmegaConf.to_yaml(OmegaConf.create(self.job.plain()))
        code = code_hash(self.job.run.plugins)
        write_text(self.path / CONFIG, f"{HEADER}{self.job.config_hash}\n{CODE_HEADER}{code}\n{text}")


def _locked(lock: Path) -> int:
    """The descriptor of a lock file that is held by us until it is closed, or this process ends, however it does."""
    until = time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, its last holder may have removed it.
            if _same_file(descriptor, lock):
                about = {"pid": os.getpid(), "host": platform.node(), "command": " ".join(sys.argv),
                         "started": datetime.now().astimezone().isoformat(timespec="seconds")}
                os.truncate(descriptor, 0)
                os.write(descriptor, json.dumps(about).encode())
                return descriptor
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(descriptor)
                raise HeldError(f"{lock.parent}: {_holder_text(holder(lock.parent))} writes here; "
                                "wait for it, or choose another directory") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.02)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def holder(directory: Path) -> dict[str, Any] | None:
    """Who writes a run's directory: pid, host, command, started; None where nobody does."""
    try:
        with (directory / LOCK).open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                try:
                    about = json.loads(lock.read())
                except ValueError:  # it is being written this moment
                    about = {}
                return about if isinstance(about, dict) else {}
    except OSError:
        pass
    return None


def _holder_text(about: dict[str, Any] | None) -> str:
    if not about:
        return "another process"
    return f"process {about.get('pid')} on {about.get('host')} (since {about.get('started')}: {about.get('command')})"
