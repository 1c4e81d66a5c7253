"""One time for a command: what ``${now:...}`` in a config means, whenever and in whichever process it is asked."""

from __future__ import annotations

import os
from datetime import datetime

from hydra.core import utils

#: When the command started; seen by jobs in other processes.
STARTED = "FA_BENCH_STARTED"


class Clock:
    """The time as Hydra's resolver asks for it."""

    @staticmethod
    def now() -> datetime:
        """When the command started; the present time outside of a command."""
        started = os.environ.get(STARTED)
        return datetime.fromisoformat(started) if started else datetime.now()


def pin() -> None:
    """Let Hydra's ``${now:...}`` ask `Clock` from here on in this process.

    Hydra's own says another time in every config, so that a directory that was checked for a run would not be the one that it is
    given. Hydra registers its resolver again and again, hence this and no resolver of our own.
    """
    utils.datetime = Clock  # type: ignore[misc,assignment]
