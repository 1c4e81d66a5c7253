"""Handle SIGINT, SIGTERM and SIGHUP during a run: raise an exception either immediately or once the run's state is consistent."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: The signals that stop a run. SIGHUP, which is sent when the terminal is closed, does not exist on Windows.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

#: The signals with which submitit may requeue a job: USR2 by default, or USR1 if SUBMITIT_PREEMPT_SIGNAL names it.
_REQUEUE_SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """Raised when a signal has requested a stop.

    Attributes:
        number: the signal.
        is_deferred: whether the error was raised between two steps, so that a run can save a checkpoint.
    """

    def __init__(self, number: int, is_deferred: bool = False) -> None:
        super().__init__(number)
        self.number, self.is_deferred = number, is_deferred

    @property
    def code(self) -> int:
        """The exit code by the convention of shells, which is 130 after SIGINT, 143 after SIGTERM and 129 after SIGHUP."""
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


class StopRequest:
    """Records whether a signal has requested a stop.

    Attributes:
        number: the first signal received; None if there was none.
    """

    number: int | None = None

    def check(self) -> None:
        """Raise Interrupted if a signal was received."""
        if self.number is not None:
            raise Interrupted(self.number, is_deferred=True)


def requeue_handler(number: int) -> Callable[[int, FrameType | None], Any] | None:
    """submitit's handler of a signal, which requeues this process's job and exits; None if no such handler is installed."""
    handler = signal.getsignal(number) if number in _REQUEUE_SIGNALS else None
    return handler if callable(handler) and str(getattr(handler, "__module__", "")).startswith("submitit.") else None


def _is_own(handler: Any) -> bool:
    return getattr(handler, "__module__", None) == __name__


@contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Within the block, the first signal is only recorded in the StopRequest, but a SIGINT after it raises Interrupted
    immediately.

    If the block ends without checking the request, a recorded signal raises Interrupted at the end.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.number is not None and number == signal.SIGINT:
            raise Interrupted(number)
        request.number = request.number or number

    with _signal_handler(handle):
        yield request
    request.check()


@contextmanager
def interrupt_on_signals(on_signal: Callable[[int], Any] = lambda number: None) -> Iterator[None]:
    """Within the block, a signal of `SIGNALS` or a requeue signal of submitit raises Interrupted, after `on_signal` has been
    called with its number.

    Any error after a signal is also converted to Interrupted, because interrupted code, such as an import, may fail in unexpected
    ways.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        request.number = number
        on_signal(number)
        raise Interrupted(number)

    with _signal_handler(handle):
        try:
            yield
        except Exception:
            request.check()
            raise


@contextmanager
def _signal_handler(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # Python can set signal handlers only in the main thread. A program that runs jobs in other threads must stop them in
        # another way.
        yield
        return
    # If SIGHUP is ignored, as under nohup, it remains ignored, because the run should outlive its terminal.
    handled = [number for number in SIGNALS if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN]
    # Before submitit requeues a job, its run must write a checkpoint.
    handled += [number for number in _REQUEUE_SIGNALS if requeue_handler(number) or _is_own(signal.getsignal(number))]
    previous = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
