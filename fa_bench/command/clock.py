"""One time for a command: what ``${now:...}`` in a config means, whenever and in whichever process it is asked."""

from __future__ import annotations

import os
from datetime import datetime

from omegaconf import OmegaConf

#: When the command started; seen by jobs in other processes.
STARTED = "FA_BENCH_STARTED"


def now(pattern: str) -> str:
    """The time at which the command started, by `datetime.strftime`'s pattern; the present time outside of a command."""
    started = os.environ.get(STARTED)
    return (datetime.fromisoformat(started) if started else datetime.now()).strftime(pattern)


def pin() -> None:
    """Let ``${now:...}`` be `now` in every config composed from here on, until Hydra starts again and registers its own.

    Hydra's own says another time in every config: a directory checked for a run would not be the one that it is given.
    """
    OmegaConf.register_new_resolver("now", now, replace=True)
