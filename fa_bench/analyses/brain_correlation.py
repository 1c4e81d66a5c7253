"""The correlation between forward and feedback weights in the brain, expressed as an angle."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fa_bench.analyses.base import Analysis
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS, ANALYSES
from fa_bench.utils.lazy import torch
from fa_bench.utils.sampling import seed_for

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@ANALYSES.register("brain_correlation")
@dataclasses.dataclass(eq=False)
class BrainCorrelation(Analysis):
    """Angle between forward and feedback weights if only some pairs of neurons are reciprocally connected (appendix B of Li and
    Benna 2024).

    A fraction p of the connected pairs of neurons is connected in both directions, and the forward and feedback weights of these
    pairs have correlation R. For the other pairs, the feedback weight is zero. For weights with mean zero, the correlation over
    all pairs is R √p, so the angle satisfies

        cos(angle) = R √p        [derived: the covariance is p R, and the variance of the feedback is multiplied by p]

    The paper sampled matrices with p = 0.31 and R = 0.36, as measured in cortex, and found a correlation of 0.2 and an angle of
    78 degrees, in agreement with the formula. We also sample matrices: W is Gaussian, and the feedback is
    M ⊙ (R W + √(1 - R²) N) with Gaussian noise N and a Bernoulli mask M that is one with probability p. The formula does not hold
    for weights with a nonzero mean, such as synapses of one sign.

    The rule `mixed`, which has three kinds of synapses, corresponds to p = k + f and R = k / (k + f), where k and f are its
    fractions of KP and FA synapses. The row for `mixed` uses the rule's defaults.
    """

    size: ClassVar[tuple[float, float]] = (10, 4)

    reciprocal: float = option(0.31, "fraction of connected pairs that are reciprocal, in the brain", above=0, maximum=1)
    correlation: float = option(0.36, "correlation of the weights over reciprocal pairs, in the brain", minimum=0, maximum=1)
    fractions: list[float] = option(
        [0.05, *(k / 10 for k in range(1, 11))], "p: fractions of reciprocal pairs to sample", above=0, maximum=1
    )
    correlations: list[float] = option(
        [0.2, 0.36, 0.6, 1.0], "R: correlations to sample, each with all fractions", minimum=0, maximum=1
    )
    neurons: int = option(200, "neurons on each side, that is, rows and columns of a matrix", minimum=2)
    draws: int = option(10, "matrices sampled for each point", minimum=1)
    seed: int = option(0, "seed of the matrices", minimum=0)

    def table(self) -> pd.DataFrame:
        import pandas as pd

        mixed: Any = ALGORITHMS["mixed"]()
        both = mixed.fa + mixed.kp
        points = [("brain", self.reciprocal, self.correlation), ("mixed", both, mixed.kp / both)]
        points += [("grid", p, r) for r in self.correlations for p in self.fractions]
        return pd.DataFrame([self._row(*point) for point in points])

    def _row(self, kind: str, p: float, r: float) -> dict[str, Any]:
        from fa_bench.metrics.angles import angles

        pairs = [sample_pair(self.neurons**2, p, r, seed_for(self.seed, p, r, number)) for number in range(self.draws)]
        forward, feedback = (torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True))
        sampled = angles(feedback, forward)
        return {
            "point": kind,
            "reciprocal": p,
            "correlation": r,
            "overall": r * math.sqrt(p),
            "overall_drawn": float(np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs])),
            "angle": math.degrees(math.acos(r * math.sqrt(p))),
            "angle_drawn": sampled.mean().item(),
            "angle_drawn_std": sampled.std(correction=0).item(),
        }

    def plot(self, figure: Figure, table: pd.DataFrame) -> None:
        from fa_bench.report.plot import COLOURS

        left, right = figure.subplots(1, 2)
        smooth = np.linspace(0, 1, 201)
        grid = table[table["point"] == "grid"]
        for number, (r, part) in enumerate(grid.groupby("correlation")):
            colour = COLOURS[1 + number % (len(COLOURS) - 1)]
            left.plot(smooth, np.degrees(np.arccos(r * np.sqrt(smooth))), color=colour, lw=1)
            left.errorbar(
                part["reciprocal"], part["angle_drawn"], part["angle_drawn_std"], fmt="o", ms=4, color=colour, label=f"R = {r:g}"
            )
        right.plot(smooth, np.degrees(np.arccos(smooth)), color=COLOURS[0], lw=1, label="arccos")
        right.plot(table["overall_drawn"], table["angle_drawn"], "o", ms=4, color=COLOURS[1], label="sampled")
        for axes, column in ((left, "reciprocal"), (right, "overall")):
            for kind, marker, colour in (("brain", "*", "#C20078"), ("mixed", "D", "#E69F00")):
                point = table[table["point"] == kind].iloc[0]
                axes.plot(
                    point[column],
                    point["angle"],
                    marker,
                    ms=13 if kind == "brain" else 6,
                    color=colour,
                    zorder=3,
                    label=f"{kind}: {point['angle']:.1f}°",
                )
            axes.set(ylabel="angle between W and feedback (degrees)", ylim=(-3, 93))
            axes.legend(frameon=False, fontsize=8)
        left.set(title="Lines: arccos(R √p); points: sampled", xlabel="p: fraction of reciprocal pairs")
        right.set(title="Over all connected pairs", xlabel="correlation over all pairs, R √p")


def sample_pair(pairs: int, reciprocal: float, correlation: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The forward and feedback weights of `pairs` connected pairs of neurons, each of shape (pairs,). Missing feedback weights
    are 0."""
    generator = np.random.default_rng(seed)
    forward, noise = generator.standard_normal((2, pairs))
    feedback = correlation * forward + math.sqrt(1 - correlation**2) * noise
    return forward, np.where(generator.random(pairs) < reciprocal, feedback, 0.0)
