"""Cross-entropy of the tokens in sequences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fa_bench.errors import OptionError
from fa_bench.objectives.base import Objective
from fa_bench.objectives.scores import Score
from fa_bench.registry.kinds import CLASSES, POSITIONS
from fa_bench.registry.options import option
from fa_bench.registry.registries import OBJECTIVES
from fa_bench.utils.lazy import nn

if TYPE_CHECKING:
    from torch import Tensor

PERPLEXITY = Score("perplexity", "perplexity", higher_is_better=False)
BITS_PER_TOKEN = Score("bits_per_token", "bits per token", higher_is_better=False)
BITS_PER_CHARACTER = Score("bits_per_character", "bits per character", higher_is_better=False)
NEXT_TOKEN = Score("accuracy", "next-token accuracy", "%")
_SCORES = (PERPLEXITY, BITS_PER_TOKEN, BITS_PER_CHARACTER, NEXT_TOKEN)


@OBJECTIVES.register("token_cross_entropy")
@dataclasses.dataclass(eq=False)
class TokenCrossEntropy(Objective):
    """Cross-entropy of the softmax at every position: the mean of L_nt = -log softmax(z_nt)[y_nt] over the counted targets.

    Targets equal to `ignore_index` are excluded from the loss and from all scores. If L is the mean loss in nats, the perplexity
    is exp(L), and the number of bits per token is L / log 2. The number of bits per character is the number of bits per token
    divided by the mean number of characters per token in the split; this score is omitted if the dataset has no characters.
    Accuracy is the fraction of the counted targets whose logit is the largest at their position. `score` selects the primary
    score, which reports compare and which determines the best epoch and the best settings.
    """

    targets = (POSITIONS, CLASSES)
    scores = dict.fromkeys((POSITIONS, CLASSES), _SCORES)

    @property
    def is_cross_entropy(self) -> bool:
        return True

    ignore_index: int = option(-100, "targets with this value do not count")
    score: str = option("perplexity", "the primary score", choices=[score.name for score in _SCORES])

    def __post_init__(self) -> None:
        super().__post_init__()
        primary = next(score for score in _SCORES if score.name == self.score)
        ordered = (primary, *(score for score in _SCORES if score is not primary))
        self.scores = dict.fromkeys(self.targets, ordered)  # pyright: ignore[reportAttributeAccessIssue]

    def check_data(self, characters: float | None) -> None:
        if characters is None and self.score == BITS_PER_CHARACTER.name:
            raise OptionError("score", f"={self.score}: the tokens of this dataset have no characters; use {BITS_PER_TOKEN.name}")

    def loss(self, outputs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """The loss as in `Objective.loss`, for outputs (N, T, C) with targets (N, T), or outputs (N, C) with targets (N,). The
        loss is 0 if no target counts."""
        losses = nn.functional.cross_entropy(
            outputs.flatten(0, -2),
            target.flatten(),
            ignore_index=self.ignore_index,
            reduction="none" if reduction == "none" else "sum",
        )
        if reduction == "sum":
            return losses
        count = self.counted(target).clamp(min=1)
        return losses / count if reduction == "mean" else losses.view(len(target), -1).sum(1) * len(target) / count

    def counted(self, target: Tensor) -> Tensor:
        return (target != self.ignore_index).sum()

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor:
        # The second condition matters if `ignore_index` is also the index of a class.
        return (outputs.argmax(-1) == target) & (target != self.ignore_index)

    def scored(self, sums: Mapping[str, Any], loss: float, count: int, characters: float | None = None) -> dict[str, float]:
        bits = loss / math.log(2)
        return {
            PERPLEXITY.name: math.exp(loss) if loss < 700 else math.inf,
            BITS_PER_TOKEN.name: bits,
            **({BITS_PER_CHARACTER.name: bits / characters} if characters else {}),
            **super().scored(sums, loss, count),
        }
