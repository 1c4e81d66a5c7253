"""The directory of one run: whose it is, what lies in it, and who is writing it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from omegaconf import OmegaConf

from fa_bench.config.job import VOLATILE, Job
from fa_bench.config.labels import flat
from fa_bench.config.scale import scaled
from fa_bench.errors import OutputError, RunDirectoryError
from fa_bench.runs import locks
from fa_bench.runs.hashes import code_hash
from fa_bench.runs.ownership import CHECKPOINTS, LAST, PREVIOUS, check_own, own_files
from fa_bench.runs.readers import CODE_HEADER, HEADER, RecordError, read_result, recorded_lines
from fa_bench.utils.files import CONFIG, METRICS, RESULT, write_text
from fa_bench.utils.yaml_files import parse_yaml


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
        if lines[1:2] != [f"{CODE_HEADER}{code_hash(self.job.plugin_modules)}"]:
            return Stage.STALE
        if self._complete():
            return Stage.FINISHED
        return Stage.UNFINISHED if self.checkpoint.exists() or self.previous.exists() else Stage.BEGUN

    def _complete(self) -> bool:
        """Whether a result with its record is there: of a run that trained to its last epoch, or diverged."""
        try:
            result = read_result(self.path / RESULT)
        except RecordError:
            return False
        if result is None or result.get("config_hash") != self.job.config_hash:
            return False
        epochs, status = result.get("epoch"), result["status"]
        try:
            recorded_lines(self.path / METRICS, epochs or 0)
        except RecordError:
            return False
        if status == "diverged":
            return True
        # Probes that it has not measured are measured at its end, without training.
        measured = set(self.job.run.probes) <= set(result.get("probes") or ())
        return measured and status == "finished" and epochs == scaled(self.job).run.epochs

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the only process that writes this directory, which is made where it is not there.

        Raises:
            HeldError: naming the process that writes it.
            OutputError: where the directory cannot be made or written.
        """
        with locks.hold(self.path):
            yield

    def check(self) -> None:
        """Refuse a directory that holds another config's run, files of one that this is not known to be, or anything foreign.

        Raises:
            RunDirectoryError: naming the directory and what differs.
        """
        if not self.path.is_dir():
            return
        config, known = self.path / CONFIG, False
        if config.is_file() and not config.is_symlink():
            try:
                text = config.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                raise RunDirectoryError(f"{config}: cannot be read ({error.strerror})") from None
            known = text.startswith(f"{HEADER}{self.job.config_hash}\n")
            if not known:
                raise RunDirectoryError(f"{self.path}: holds a run of another config ({self._difference(text)}); "
                                        "choose another hydra.run.dir, or remove it")
        elif not os.path.lexists(config):
            strays = [name for name in (METRICS, RESULT, CHECKPOINTS) if os.path.lexists(self.path / name)]
            if strays:
                raise RunDirectoryError(f"{self.path}: holds {', '.join(strays)} but no {CONFIG}; choose another directory")
        check_own(self.path, self._wrote if known else None)

    def _wrote(self, events: Path) -> bool:
        """Whether an event file is of this run, as what it says about the run shows."""
        from fa_bench.loggers.events.writer import is_of

        return is_of(events, self.job)

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

        Raises:
            RunDirectoryError: as `check`.
            OutputError: where it cannot be written.
        """
        self.check()  # again, for what came since: from here on files are removed
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in list(own_files(self.path, keep)):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror or error})") from None
        text = OmegaConf.to_yaml(OmegaConf.create(self.job.plain()))
        code = code_hash(self.job.plugin_modules)
        write_text(self.path / CONFIG, f"{HEADER}{self.job.config_hash}\n{CODE_HEADER}{code}\n{text}")
