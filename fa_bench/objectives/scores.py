"""Scores of a task, such as accuracy and perplexity, in a form that is saved in records and read by reports."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

#: The splits of a dataset on which scores are measured, as they appear in the keys of records, such as ``val_accuracy``.
PARTS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Score:
    """A score of a task.

    Attributes:
        name: the name in the keys of records; there is one key for each split, such as ``val_accuracy``.
        title: the title in tables and figures.
        unit: ``%`` for a score that records contain as a fraction; empty if it has none.
        higher_is_better: whether larger values are better.

    Examples:
        >>> import fa_bench
        >>> accuracy = fa_bench.Score("accuracy", "accuracy", "%")
        >>> accuracy.in_unit, accuracy.text(0.971)
        ('accuracy (%)', '97.10%')
        >>> fa_bench.Score("mae", "mean absolute error", higher_is_better=False).direction
        'minimize'
    """

    name: str
    title: str
    unit: str = ""
    higher_is_better: bool = True

    @property
    def scale(self) -> int:
        """The factor that converts recorded values for tables and figures: 100 for ``%`` and 1 otherwise."""
        return 100 if self.unit == "%" else 1

    @property
    def in_unit(self) -> str:
        """The title with its unit, for a column or an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def format(self) -> str:
        """The format specification for scaled values."""
        return ".2f" if self.unit == "%" else ".4f"

    @property
    def worst(self) -> float | None:
        """The worst possible value: 0 for a percentage whose larger values are better, otherwise None, because it is unknown."""
        return 0.0 if self.unit == "%" and self.higher_is_better else None

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """The direction of optimization, in Optuna's terms."""
        return "maximize" if self.higher_is_better else "minimize"

    def merit(self, value: float) -> float:
        """The value, or its negative if smaller values are better, so that a larger merit is always better."""
        return value if self.higher_is_better else -value

    def is_better(self, value: float, other: float) -> bool:
        """Whether the mean `value` is better than the mean `other`; means that differ only by rounding count as equal."""
        if math.isinf(value) or math.isinf(other):  # a perplexity may be infinite
            return self.merit(value) > self.merit(other)
        return self.merit(value) - self.merit(other) > 1e-9 * max(abs(value), abs(other))

    def text(self, value: float) -> str:
        """A recorded value as text, such as ``97.10%`` or ``4.321``."""
        return f"{value:.2%}" if self.unit == "%" else f"{value:.4g}"


ACCURACY = Score("accuracy", "accuracy", "%")
R2, RMSE = Score("r2", "R²"), Score("rmse", "RMSE", higher_is_better=False)


def score_keys(scores: Sequence[Score]) -> list[str]:
    """The keys of the losses and scores in the record of an epoch."""
    return [f"{part}_{name}" for name in ("loss", *(score.name for score in scores)) for part in PARTS]


def final_keys(scores: Sequence[Score]) -> list[str]:
    """The keys of the scores in the result of a run. For the first score, which is the primary one, they include the test score
    at the best epoch."""
    first = scores[0].name
    return [
        f"test_{first}",
        f"test_{first}_at_best_val",
        f"val_{first}",
        f"train_{first}",
        *(f"{part}_{score.name}" for score in scores[1:] for part in reversed(PARTS)),
    ]


def as_records(scores: Iterable[Score]) -> list[dict[str, Any]]:
    """The scores as plain containers, in the form that records contain."""
    return [dataclasses.asdict(score) for score in scores]


def scores_of(record: Any) -> tuple[Score, ...]:
    """The scores that the record of a run or an epoch declares, with the primary one first; accuracy if it declares none."""
    known = [field.name for field in dataclasses.fields(Score)]
    declared = (record or {}).get("scores") or ()
    return tuple(Score(**{key: score[key] for key in known if key in score}) for score in declared) or (ACCURACY,)
