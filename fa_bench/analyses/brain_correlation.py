"""The correlation of forward and feedback weights in the brain, and the angle that it is."""

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
    """Angle between forward and feedback weights against how many pairs are reciprocal (appendix B of Li and Benna 2024).

    Of the connected pairs of neurons a fraction p is connected both ways, and over those the weights have the correlation R;
    where there is no way back the feedback weight is zero. Over all pairs, for weights of mean zero, the correlation is R √p, and

        cos(angle) = R √p        [derived: the covariance is p R, and the feedback's variance is p times its own]

    The paper drew matrices: p = 0.31 and R = 0.36, as measured in cortex, gave it R ≈ 0.2 and 78 degrees; so does the formula.
    Here matrices are drawn too: W Gaussian, F = R W + √(1 - R²) noise where a Bernoulli mask of p has a one, else 0. With means
    that are not zero, as synapses of one sign have them, the angle is another one.

    The rule `mixed` reaches the point by synapses of three kinds: p = k + f and R = k / (k + f), of its fractions k of KP and f
    of FA. Its row has those of the rule's defaults.
    """

    size: ClassVar[tuple[float, float]] = (10, 4)

    reciprocal: float = option(0.31, "fraction of connected pairs that are connected both ways, in the brain", above=0, maximum=1)
    correlation: float = option(0.36, "correlation of the weights over those pairs, in the brain", minimum=0, maximum=1)
    fractions: list[float] = option([0.05, *(k / 10 for k in range(1, 11))], "p: fractions of reciprocal pairs to draw",
                                    above=0, maximum=1)
    correlations: list[float] = option([0.2, 0.36, 0.6, 1.0], "R: correlations to draw at every fraction", minimum=0, maximum=1)
    neurons: int = option(200, "neurons on either side: matrices of this size squared", minimum=2)
    draws: int = option(10, "matrices drawn at each point", minimum=1)
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

        whole = [draw_pair(self.neurons**2, p, r, seed_for(self.seed, p, r, number)) for number in range(self.draws)]
        forward, feedback = (torch.from_numpy(np.stack(side)) for side in zip(*whole, strict=True))
        found = angles(feedback, forward)
        return {
            "point": kind, "reciprocal": p, "correlation": r, "overall": r * math.sqrt(p),
            "overall_drawn": float(np.mean([np.corrcoef(*pair)[0, 1] for pair in whole])),
            "angle": math.degrees(math.acos(r * math.sqrt(p))),
            "angle_drawn": found.mean().item(), "angle_drawn_std": found.std(correction=0).item(),
        }

    def draw(self, figure: Figure, table: pd.DataFrame) -> None:
        from fa_bench.report.plot import COLOURS

        left, right = figure.subplots(1, 2)
        smooth = np.linspace(0, 1, 201)
        grid = table[table["point"] == "grid"]
        for number, (r, part) in enumerate(grid.groupby("correlation")):
            colour = COLOURS[1 + number % (len(COLOURS) - 1)]
            left.plot(smooth, np.degrees(np.arccos(r * np.sqrt(smooth))), color=colour, lw=1)
            left.errorbar(part["reciprocal"], part["angle_drawn"], part["angle_drawn_std"], fmt="o", ms=4, color=colour,
                          label=f"R = {r:g}")
        right.plot(smooth, np.degrees(np.arccos(smooth)), color=COLOURS[0], lw=1, label="arccos")
        right.plot(table["overall_drawn"], table["angle_drawn"], "o", ms=4, color=COLOURS[1], label="drawn")
        for axes, column in ((left, "reciprocal"), (right, "overall")):
            for kind, marker, colour in (("brain", "*", "#C20078"), ("mixed", "D", "#E69F00")):
                point = table[table["point"] == kind].iloc[0]
                axes.plot(point[column], point["angle"], marker, ms=13 if kind == "brain" else 6, color=colour, zorder=3,
                          label=f"{kind}: {point['angle']:.1f}°")
            axes.set(ylabel="angle between W and feedback (degrees)", ylim=(-3, 93))
            axes.legend(frameon=False, fontsize=8)
        left.set(title="Lines: arccos(R √p); points: drawn", xlabel="p: fraction of pairs connected both ways")
        right.set(title="Over all connected pairs", xlabel="correlation over all pairs, R √p")


def draw_pair(pairs: int, reciprocal: float, correlation: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Forward and feedback weights of `pairs` connected pairs of neurons, (pairs,) each; no way back is a zero."""
    generator = np.random.default_rng(seed)
    forward, noise = generator.standard_normal((2, pairs))
    feedback = correlation * forward + math.sqrt(1 - correlation**2) * noise
    return forward, np.where(generator.random(pairs) < reciprocal, feedback, 0.0)
