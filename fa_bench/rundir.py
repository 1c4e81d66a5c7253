"""The directory of one run: whose it is, and what lies in it."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import OmegaConf

from fa_bench.config import VOLATILE, Job
from fa_bench.errors import RunDirectoryError
from fa_bench.files import CONFIG, LOG, METRICS, RESULT, write_text
from fa_bench.labels import flat
from fa_bench.yaml_files import parse_yaml

CHECKPOINTS, LAST = "checkpoints", "last.pt"
EVENTS = "events.out.tfevents.*"
#: How a run's config.yaml begins.
HEADER = "# config hash: "


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
        """Make it this run's; without `keep` what an earlier try of the same run left is removed."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not keep:
            for name in (LOG, METRICS, RESULT):
                (self.path / name).unlink(missing_ok=True)
            for events in self.path.glob(EVENTS):
                events.unlink()
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
        text = OmegaConf.to_yaml(OmegaConf.create(self.job.plain()))
        write_text(self.path / CONFIG, f"{HEADER}{self.job.config_hash}\n{text}")
