"""The first hop of product feedback alignment: spectrum of B Bᵀ, and how far B Bᵀ W is from W."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fa_bench.analyses.base import Analysis
from fa_bench.errors import OptionError, names
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS, ANALYSES
from fa_bench.utils.lazy import torch
from fa_bench.utils.sampling import sample, seed_for

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor


@ANALYSES.register("pfa_spectrum")
@dataclasses.dataclass(eq=False)
class PFASpectrum(Analysis):
    """Eigenvalues of B Bᵀ against the expansion ratio, and the angle of B Bᵀ W to W (Fig. 3 of Li and Benna 2024).

    B (O, M) is the rule's own draw: M = ratio x O units in between, entries of variance 1/M. With λ = O/M, and O and M large, the
    eigenvalues v of B Bᵀ have the density of Marchenko and Pastur (eq. 8, with the square roots that its print lost)

        μ(v) = √((λ₊ - v)(v - λ₋)) / (2π λ v) on [λ₋, λ₊], λ± = (1 ± √λ)²

    with mean 1 and standard deviation √λ; for λ > 1 a fraction 1 - 1/λ of them is zero [derived]. W and R learn by gᵀ x and
    Bᵀ gᵀ x, so that B R becomes B Bᵀ W: its angle to W, for W (O, I) that knows nothing of B, is arctan √λ [derived: tr(B Bᵀ)/O
    is 1, and tr((B Bᵀ)²)/O is 1 + λ]. W is drawn anew with every B.

    Rows are long: quantity, ratio, λ, and for the density the middle of the bin; what was measured over all draws (and
    eigenvalues), its standard deviation over them, and what is predicted.
    """

    size: ClassVar[tuple[float, float]] = (13, 4)

    outputs: int = option(100, "O: units of the layer's output", minimum=2)
    inputs: int = option(256, "I: units of its input, columns of W", minimum=1)
    ratios: list[float] = option([round(10 ** (k / 5), 4) for k in range(11)], "expansion ratios M/O", above=0)
    draws: int = option(100, "draws of B and W at each ratio", minimum=1)
    histograms: list[float] = option([1.0, 10.0, 100.0], "those of the ratios whose eigenvalues are counted in bins", above=0)
    bins: int = option(30, "bins of a histogram, from λ₋ to λ₊", minimum=1)
    seed: int = option(0, "seed of B and W", minimum=0)

    def check(self) -> None:
        if missing := [ratio for ratio in self.histograms if ratio not in self.ratios]:
            raise OptionError("histograms", f"={names(missing)} is not among ratios={names(self.ratios)}")

    def table(self) -> pd.DataFrame:
        import pandas as pd
        from tqdm import tqdm

        rows: list[dict[str, Any]] = []
        for ratio in tqdm(self.ratios, desc=self.name, unit="ratio", disable=None, leave=False):
            rule: Any = ALGORITHMS["pfa"].from_mapping({"ratio": ratio})
            between = max(round(ratio * self.outputs), 1)
            law = MarchenkoPastur(self.outputs / between)
            found = [self._measure(rule, between, number) for number in range(self.draws)]
            values, angles = np.concatenate([each[0] for each in found]), np.array([each[1] for each in found])

            def row(quantity: str, measured: float, predicted: float, spread: float = math.nan, v: float = math.nan,
                    ratio: float = ratio, law: MarchenkoPastur = law) -> None:
                rows.append({"quantity": quantity, "ratio": ratio, "lambda": law.ratio, "eigenvalue": v,
                             "measured": measured, "std": spread, "predicted": predicted})

            row("eigenvalue_mean", values.mean(), 1.0, values.std())
            row("eigenvalue_std", values.std(), math.sqrt(law.ratio))
            row("eigenvalue_min", values.min(), law.low if law.ratio <= 1 else 0.0)
            row("eigenvalue_max", values.max(), law.high)
            row("zero_fraction", (values < ZERO).mean(), law.zero_fraction)
            row("angle", angles.mean(), math.degrees(math.atan(math.sqrt(law.ratio))), angles.std())
            if ratio in self.histograms:
                edges = np.linspace(law.low, law.high, self.bins + 1)
                counts, width = np.histogram(values[values >= ZERO], edges)[0], edges[1] - edges[0]
                expected = np.diff(law.below(edges)) / width
                for low, count, density in zip(edges[:-1], counts, expected, strict=True):
                    row("density", count / (len(values) * width), density, v=low + width / 2)
        return pd.DataFrame(rows)

    def _measure(self, rule: Any, between: int, number: int) -> tuple[np.ndarray, float]:
        """Eigenvalues of B Bᵀ, ascending, (O,), and the angle of B Bᵀ W to W in degrees, of one draw."""
        from fa_bench.metrics.angles import weight_angle

        first: Tensor = rule.first(self.outputs, between, seed_for(self.seed, number, "B")).double()
        weight = sample((self.outputs, self.inputs), "xavier_uniform", seed_for(self.seed, number, "W")).double()
        product = first @ first.t()
        return torch.linalg.eigvalsh(product).numpy(), weight_angle(product @ weight, weight)

    def summary(self, table: pd.DataFrame) -> pd.DataFrame:
        """All but the bins."""
        return table.loc[table["quantity"] != "density"].drop(columns="eigenvalue")

    def draw(self, figure: Figure, table: pd.DataFrame) -> None:
        from fa_bench.report.plot import COLOURS

        spectrum, density, angle = figure.subplots(1, 3)
        rows = {quantity: part.sort_values("ratio") for quantity, part in table.groupby("quantity")}
        mean, deviation = rows["eigenvalue_mean"], rows["eigenvalue_std"]["predicted"].to_numpy()
        points: dict[str, Any] = {"fmt": "o", "ms": 4, "capsize": 3, "color": COLOURS[1], "label": "measured"}
        spectrum.errorbar(mean["ratio"], mean["measured"], mean["std"], **points)
        for sign in (-1, 1):
            spectrum.plot(mean["ratio"], 1 + sign * deviation, color=COLOURS[0], lw=1, label="1 ± √λ" if sign > 0 else None)
        spectrum.set(title="Eigenvalues of B Bᵀ, mean ± std", ylabel="eigenvalue")
        for number, (ratio, part) in enumerate(rows["density"].groupby("ratio") if "density" in rows else ()):
            colour = COLOURS[1 + number % (len(COLOURS) - 1)]
            density.step(part["eigenvalue"], part["measured"], where="mid", color=colour, lw=1.2, label=f"ratio {ratio:g}")
            density.plot(part["eigenvalue"], part["predicted"], color=colour, lw=1, ls=":")
        density.set(title="Density (dotted: Marchenko-Pastur)", xlabel="eigenvalue", ylabel="density", yscale="log")
        part = rows["angle"]
        angle.errorbar(part["ratio"], part["measured"], part["std"], **points)
        angle.plot(part["ratio"], part["predicted"], color=COLOURS[0], lw=1, label="arctan √λ")
        angle.set(title="Angle of B Bᵀ W to W", ylabel="degrees", ylim=(0, None))
        for axes in (spectrum, angle):
            axes.set(xscale="log", xlabel="expansion ratio 1/λ")
        for axes in (spectrum, density, angle):
            axes.legend(frameon=False, fontsize=8)


#: Below this an eigenvalue of B Bᵀ in double precision is zero but for rounding.
ZERO = 1e-12


@dataclasses.dataclass(frozen=True)
class MarchenkoPastur:
    """The limit of the eigenvalues of B Bᵀ for B (O, M) with independent entries of mean 0 and variance 1/M, O/M = `ratio`."""

    ratio: float

    @property
    def low(self) -> float:
        """λ₋, the smallest eigenvalue that is not zero."""
        return (1 - math.sqrt(self.ratio)) ** 2

    @property
    def high(self) -> float:
        """λ₊, the largest."""
        return (1 + math.sqrt(self.ratio)) ** 2

    @property
    def zero_fraction(self) -> float:
        """The fraction of eigenvalues that are zero: B has at most M rows that are independent."""
        return max(0.0, 1 - 1 / self.ratio)

    def density(self, v: np.ndarray) -> np.ndarray:
        """μ(v), without the zeros; 0 outside [λ₋, λ₊]."""
        v = np.asarray(v, dtype=float)
        inside = (v > self.low) & (v < self.high)
        at = np.where(inside, v, 1.0)
        root = np.sqrt(np.clip((self.high - at) * (at - self.low), 0, None))
        return np.where(inside, root / (2 * math.pi * self.ratio * at), 0.0)

    def below(self, v: np.ndarray) -> np.ndarray:
        """The integral of μ up to v, without the zeros.

        Along v = 1 + λ - 2 √λ cos θ, where the integrand 2 sin² θ / (π v) has no singularity, not even for λ = 1.
        """
        theta = np.linspace(0, math.pi, 4097)
        middle = (theta[1:] + theta[:-1]) / 2
        places = 1 + self.ratio - 2 * math.sqrt(self.ratio) * np.cos(middle)
        parts = 2 * np.sin(middle) ** 2 / (math.pi * places) * (theta[1] - theta[0])
        at = np.arccos(np.clip((1 + self.ratio - np.asarray(v)) / (2 * math.sqrt(self.ratio)), -1, 1))
        return np.interp(at, theta, np.concatenate([[0.0], parts.cumsum()]))
