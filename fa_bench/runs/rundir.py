"""The directory of a run, whose files show which run it belongs to and how far that run has got."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

from omegaconf import OmegaConf

from fa_bench.config.job import VOLATILE, Job
from fa_bench.config.labels import flatten
from fa_bench.config.scale import scaled
from fa_bench.errors import RunDirectoryError
from fa_bench.runs.checked_json import RecordError
from fa_bench.runs.hashes import code_hash
from fa_bench.runs.ownership import CHECKPOINTS, checkpoint_files, refuse_foreign_files, removable_files
from fa_bench.runs.readers import CODE_HEADER, HEADER, read_measurements, read_result, recorded_lines
from fa_bench.utils.files import ANGLES, CONFIG, METRICS, RESULT, output_errors, write_text
from fa_bench.utils.yaml_files import parse_yaml


class RunState(Enum):
    """The state of a run directory."""

    NEW = "new, or without a checkpoint"
    UNFINISHED = "unfinished"
    FINISHED = "finished"
    STALE = "from a different version of the code"


class RunDirectory:
    """One run's directory.

    Args:
        path: the directory, which need not exist.
        job: the run.
    """

    def __init__(self, path: Path, job: Job) -> None:
        self.path, self.job = path, job
        #: The newest checkpoint, and the one before it.
        self.checkpoint, self.previous = checkpoint_files(path)

    @property
    def state(self) -> RunState:
        """The state of the run with this config in the directory; `check` refuses a directory that belongs to another config."""
        is_own_run, is_current = self._recorded()
        if not is_own_run:
            return RunState.NEW
        if not is_current:
            return RunState.STALE
        if self._is_complete():
            return RunState.FINISHED
        return RunState.UNFINISHED if self.checkpoint.exists() or self.previous.exists() else RunState.NEW

    @property
    def is_stale(self) -> bool:
        """Whether the directory contains a run with this config that was produced by a different version of the code. Unlike
        `state`, this property reads no records."""
        return self._recorded() == (True, False)

    def _recorded(self) -> tuple[bool, bool]:
        """Whether the directory's config is that of this run, and whether it was written by the current code."""
        try:
            lines = (self.path / CONFIG).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return False, False
        return lines[:1] == [f"{HEADER}{self.job.config_hash}"], lines[1:2] == [self._code_line()]

    def _code_line(self) -> str:
        """The line of a config that contains the hash of the current code."""
        return f"{CODE_HEADER}{code_hash(self.job.run.plugins, self.job.own_classes)}"

    def _is_complete(self) -> bool:
        """Whether the directory has the result and records of a run that must not be trained further.

        Such a run has trained to its last epoch, has diverged, or was stopped by a callback of its config. In the last case, the
        result names the callback.
        """
        try:
            result = read_result(self.path / RESULT)
            if result is None or result.get("config_hash") != self.job.config_hash:
                return False
            recorded_lines(self.path / METRICS, result.get("epoch") or 0, complete=True)
            measurements = read_measurements(self.path / ANGLES)
        except RecordError:
            return False
        if result["status"] == "diverged":
            return True
        if not measurements or measurements[-1]["step"] != result.get("step"):
            return False
        # Probes that were added to the config are measured without training again.
        has_probes = set(self.job.run.probes) <= set(result.get("probes") or ())
        if result["status"] == "stopped":
            return has_probes and (result.get("error") or {}).get("callback") is not None
        return has_probes and result["status"] == "finished" and result.get("epoch") == scaled(self.job).run.epochs

    def check(self) -> None:
        """Refuse a directory that belongs to a run with another config or contains files that do not belong to this run.

        Raises:
            RunDirectoryError: if the directory is refused; the message names the directory and the reason.
        """
        if not self.path.is_dir():
            return
        config, is_own_run = self.path / CONFIG, False
        if config.is_file() and not config.is_symlink():
            try:
                text = config.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                raise RunDirectoryError(f"{config}: cannot be read ({error.strerror})") from None
            is_own_run = text.startswith(f"{HEADER}{self.job.config_hash}\n")
            if not is_own_run:
                raise RunDirectoryError(
                    f"{self.path}: belongs to a run with another config ({self._difference(text)}); "
                    "choose another hydra.run.dir, or remove this directory"
                )
        elif not os.path.lexists(config):
            records = [name for name in (METRICS, ANGLES, RESULT, CHECKPOINTS) if os.path.lexists(self.path / name)]
            if records:
                raise RunDirectoryError(f"{self.path}: contains {', '.join(records)} but no {CONFIG}; choose another directory")
        refuse_foreign_files(self.path, is_own_run)

    def _difference(self, text: str) -> str:
        """A description of how the config in `text` differs from that of this run."""
        try:
            there, here = flatten(OmegaConf.to_container(parse_yaml(text, CONFIG))), flatten(self.job.plain())  # type: ignore[arg-type]
        except Exception:  # a foreign file may make the parser raise anything
            return "its config.yaml was not written by fa_bench"
        keys = [k for k in sorted({*there, *here}) if k.split(".")[0] not in VOLATILE and there.get(k) != here.get(k)]
        differences = [f"{key}={there.get(key)} there, {here.get(key)} here" for key in keys[:2]]
        return "; ".join(differences) + ("; ..." if len(keys) > 2 else "") if differences else "an older format"

    def start(self, resume: bool) -> None:
        """Begin the run: remove the files of earlier attempts, and write the config. If the run is resumed, only the result and
        half-written files are removed.

        Raises:
            RunDirectoryError: as in `check`.
            OutputError: if the directory cannot be written.
        """
        self.check()  # again, because files are removed from here on
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for path in list(removable_files(self.path, resume)):
                path.unlink(missing_ok=True)
        text = OmegaConf.to_yaml(OmegaConf.create(self.job.plain()))
        write_text(self.path / CONFIG, f"{HEADER}{self.job.config_hash}\n{self._code_line()}\n{text}")
