"""Cut rules with a learned matrix B (C, features) at every cut."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fa_bench.mechanisms.cut.rule import CutRule
from fa_bench.mechanisms.feedback_tensors import make_learned
from fa_bench.utils.sampling import sample_mask, seed_for

if TYPE_CHECKING:
    from fa_bench.mechanisms.updates import LearnedTensor


@dataclasses.dataclass(eq=False)
class LearnedCutRule(CutRule):
    """A cut rule whose B at each cut is a parameter of the model.

    Subclasses create B with `put_learned` and implement `feedback_gradients`.
    """

    def put_learned(self, features: dict[str, tuple[int, ...]], classes: int, init: str, density: float = 1.0) -> None:
        """Give every cut its learned B.

        Args:
            features, classes: as for `make_feedback`.
            init: initialiser of B.
            density: fraction of the entries that a fixed mask keeps, also during training.
        """
        from fa_bench.mechanisms.updates import LearnedTensor

        self._learned: dict[str, list[LearnedTensor]] = {}
        self._masked = density < 1
        for cut, shape in features.items():
            size = (classes, math.prod(shape))
            module = self._cut_modules[cut]
            self.put(cut, "B", init, size, density)
            self._learned[cut] = [LearnedTensor(cut, module, make_learned(module, "B"), self._witness)]
            if self._masked:
                self.put(cut, "mask", sample_mask(size, density, seed_for(self.seed, cut, "B")))

    def learned_at(self, cut: str) -> list[LearnedTensor]:
        return self._learned[cut]

    def learned_feedback(self) -> list[LearnedTensor]:
        return [one for learned in self._learned.values() for one in learned]

    @property
    def needs_step(self) -> bool:
        return super().needs_step or self._masked

    def step(self) -> None:
        super().step()
        if self._masked:
            for cut in self._cut_modules:
                self.tensor(cut, "B").mul_(self.tensor(cut, "mask"))
