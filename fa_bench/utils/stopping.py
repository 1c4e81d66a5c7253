"""How a run is asked to stop: SIGINT, SIGTERM and SIGHUP wait for a moment at which the run's state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: A terminal that is closed sends the last one, which Windows lacks.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def code(self) -> int:
        """The exit code, as shells count: 130 after SIGINT, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


class Stop:
    """A wish to stop.

    Attributes:
        number: the signal that came first; None before one came.
    """

    number: int | None = None

    def check(self) -> None:
        """Raise Interrupted where a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)


@contextmanager
def postponed() -> Iterator[Stop]:
    """Within it a first signal does nothing but set what is yielded; a second SIGINT raises at once.

    A signal that nothing asked for is raised at the end.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.number is not None and number == signal.SIGINT:
            raise Interrupted(number)
        stop.number = stop.number or number

    with _handling(handle):
        yield stop
    stop.check()


@contextmanager
def raised(before: Callable[[int], Any] = lambda number: None) -> Iterator[None]:
    """Within it each of `SIGNALS` raises Interrupted, after `before` was called with the signal.

    An error behind a signal becomes Interrupted, too: what a signal cuts short, such as an import, may fail in its own way.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.number = number
        before(number)
        raise Interrupted(number)

    with _handling(handle):
        try:
            yield
        except Exception:
            stop.check()
            raise


@contextmanager
def _handling(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # Python lets the main thread alone set handlers; whoever runs jobs in others stops them by their own means.
        yield
        return
    # nohup has SIGHUP ignored: the run is to outlive its terminal.
    heard = [number for number in SIGNALS if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN]
    old = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
