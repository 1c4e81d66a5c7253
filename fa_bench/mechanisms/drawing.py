"""Rules that draw random numbers for every backward pass."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fa_bench.mechanisms.coverage import noise_note
from fa_bench.mechanisms.rule import Rule

if TYPE_CHECKING:
    from fa_bench.mechanisms.coverage import Coverage


@dataclasses.dataclass(eq=False)
class DrawingRule(Rule):
    """Base class of rules that draw new random numbers for every backward pass. In the list of bases, this class must precede the
    class of the mechanism. The rule's state contains the number of backward passes."""

    def wire(self, sample_input: Any) -> Coverage:
        from fa_bench.mechanisms.second_pass import Draws

        self._draws = Draws(self.seed)
        return super().wire(sample_input)

    def next_draws(self) -> None:
        """Use new random numbers in this backward pass. If the pass belongs to a measurement, the previous numbers are used
        again."""
        if not self.mode.freeze_random:
            self._draws.number += 1

    def notes(self) -> tuple[str, ...]:
        return (*super().notes(), noise_note())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "draws": self._draws.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._draws.load_state(state["draws"])
