"""Thresholds against which reports check the values of metrics and probes."""

from __future__ import annotations

from typing import NamedTuple


class Alarm(NamedTuple):
    """A threshold for one quantity of a layer.

    Attributes:
        threshold: the threshold in the quantity's unit.
        above: whether values above the threshold are reported, rather than those below it.
        meaning: what a value beyond the threshold means, in one sentence, which may name the source of the threshold.
    """

    threshold: float
    above: bool
    meaning: str

    def fires(self, value: float) -> bool:
        """Whether a value is on the wrong side of the threshold. An undefined value (NaN) never fires the alarm."""
        return value > self.threshold if self.above else value < self.threshold

    @property
    def condition(self) -> str:
        """The condition as text, for example ``> 50``."""
        return f"{'>' if self.above else '<'} {self.threshold:g}"
