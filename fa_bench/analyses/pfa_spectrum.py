"""The spectrum of B Bᵀ in product feedback alignment, and the angle between B Bᵀ W and W."""

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
    """Eigenvalues of B Bᵀ for several expansion ratios, and the angle between B Bᵀ W and W (Fig. 3 of Li and Benna 2024).

    B (O, M) is sampled as in the rule `pfa`, with M = ratio x O intermediate units and entries of variance 1/M. Let λ = O/M. For
    large O and M, the eigenvalues v of B Bᵀ have the Marchenko-Pastur density (eq. 8, with the square roots that are missing in
    the paper)

        μ(v) = √((λ₊ - v)(v - λ₋)) / (2π λ v) on [λ₋, λ₊], λ± = (1 ± √λ)²

    The eigenvalues have mean 1 and standard deviation √λ; if λ > 1, a fraction 1 - 1/λ of them is zero [derived]. With the error
    g and the input x, the rule updates W by gᵀ x and its learned feedback R (M, I) by Bᵀ gᵀ x, so B R approaches B Bᵀ W as the
    initial values decay. If W (O, I) is independent of B, the angle between B Bᵀ W and W is arctan √λ [derived: tr(B Bᵀ)/O is 1,
    and tr((B Bᵀ)²)/O is 1 + λ]. A new W is sampled for every B.

    The table is in long format. Each row contains the quantity, the ratio, λ, the middle of the bin (for the density only), the
    measured value, its standard deviation (for means only), and the prediction. Statistics of the eigenvalues are taken over all
    eigenvalues of all samples, and those of the angle over all samples.
    """

    size: ClassVar[tuple[float, float]] = (13, 4)

    outputs: int = option(100, "O: output units of the layer", minimum=2)
    inputs: int = option(256, "I: input units, columns of W", minimum=1)
    ratios: list[float] = option([round(10 ** (k / 5), 4) for k in range(11)], "expansion ratios M/O", above=0)
    draws: int = option(100, "samples of B and W for each ratio", minimum=1)
    histograms: list[float] = option([1.0, 10.0, 100.0], "ratios whose eigenvalues are counted in bins", above=0)
    bins: int = option(30, "bins of a histogram, from λ₋ to λ₊", minimum=1)
    seed: int = option(0, "seed of B and W", minimum=0)

    def check(self) -> None:
        if not self.ratios:
            raise OptionError("ratios", "=[] is empty; list at least one ratio")
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
            samples = [self._measure(rule, between, number) for number in range(self.draws)]
            values, angles = np.concatenate([sample[0] for sample in samples]), np.array([sample[1] for sample in samples])

            def row(
                quantity: str,
                measured: float,
                predicted: float,
                spread: float = math.nan,
                v: float = math.nan,
                ratio: float = ratio,
                law: MarchenkoPastur = law,
            ) -> None:
                rows.append(
                    {
                        "quantity": quantity,
                        "ratio": ratio,
                        "lambda": law.ratio,
                        "eigenvalue": v,
                        "measured": measured,
                        "std": spread,
                        "predicted": predicted,
                    }
                )

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
        """The eigenvalues (O,) of B Bᵀ in ascending order, and the angle in degrees between B Bᵀ W and W, for one sample of B and
        W."""
        from fa_bench.metrics.angles import weight_angle

        first: Tensor = rule.first(self.outputs, between, seed_for(self.seed, number, "B")).double()
        weight = sample((self.outputs, self.inputs), "xavier_uniform", seed_for(self.seed, number, "W")).double()
        product = first @ first.t()
        return torch.linalg.eigvalsh(product).numpy(), weight_angle(product @ weight, weight)

    def summary(self, table: pd.DataFrame) -> pd.DataFrame:
        """All rows of the table except those of the density."""
        return table.loc[table["quantity"] != "density"].drop(columns="eigenvalue")

    def plot(self, figure: Figure, table: pd.DataFrame) -> None:
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
        for axes in (spectrum, *([density] if "density" in rows else []), angle):
            axes.legend(frameon=False, fontsize=8)


#: In double precision, an eigenvalue of B Bᵀ below this threshold is zero up to rounding.
ZERO = 1e-12


@dataclasses.dataclass(frozen=True)
class MarchenkoPastur:
    """The limiting distribution of the eigenvalues of B Bᵀ, where B (O, M) has independent entries of variance 1/M and O/M is
    `ratio`."""

    ratio: float

    @property
    def low(self) -> float:
        """λ₋, the lower end of the density."""
        return (1 - math.sqrt(self.ratio)) ** 2

    @property
    def high(self) -> float:
        """λ₊, the upper end of the density and the largest eigenvalue."""
        return (1 + math.sqrt(self.ratio)) ** 2

    @property
    def zero_fraction(self) -> float:
        """The fraction of eigenvalues that are zero, because the rank of B is at most M."""
        return max(0.0, 1 - 1 / self.ratio)

    def below(self, v: np.ndarray) -> np.ndarray:
        """The integral of μ up to v, without the point mass at zero.

        The integral is computed over θ with v = 1 + λ - 2 √λ cos θ. The integrand, 2 sin² θ / (π v), then has no singularity,
        even for λ = 1.
        """
        theta = np.linspace(0, math.pi, 4097)
        middle = (theta[1:] + theta[:-1]) / 2
        values = 1 + self.ratio - 2 * math.sqrt(self.ratio) * np.cos(middle)
        parts = 2 * np.sin(middle) ** 2 / (math.pi * values) * (theta[1] - theta[0])
        at = np.arccos(np.clip((1 + self.ratio - np.asarray(v)) / (2 * math.sqrt(self.ratio)), -1, 1))
        return np.interp(at, theta, np.concatenate([[0.0], parts.cumsum()]))
