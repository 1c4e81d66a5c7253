"""The error of a linear net over time, with and without the conditions of the Forward Alignment theorem."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from fa_bench.analyses.base import Analysis
from fa_bench.errors import OptionError
from fa_bench.registry.options import option
from fa_bench.registry.registries import ANALYSES
from fa_bench.utils.sampling import seed_for

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Linear(NamedTuple):
    """A linear net y = W A x that learns the mapping y = T x by Forward Alignment with the matrix C.

    The shapes are T (O, I), W (O, H), A (H, I), C (H, I) and, for the covariance of the inputs, Σ (I, I).
    """

    teacher: np.ndarray
    w: np.ndarray
    a: np.ndarray
    c: np.ndarray
    covariance: np.ndarray


def trajectory(net: Linear, lr: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield W and A before each update, indefinitely. Each update is averaged over inputs x with mean zero and covariance Σ.

    The update is W <- W + η E Σ Cᵀ and A <- A + η Wᵀ E Σ with E = T - W A (eqs 26 and 27 of Woo et al. 2021, or eqs 28 and 29 if
    Σ = I).
    """
    w, a = net.w, net.a
    while True:
        yield w, a
        error = (net.teacher - w @ a) @ net.covariance
        w, a = w + lr * error @ net.c.T, a + lr * w.T @ error


@ANALYSES.register("forward_alignment_theorem")
@dataclasses.dataclass(eq=False)
class ForwardAlignmentTheorem(Analysis):
    """The error ‖E‖ over time in the linear net of the Forward Alignment theorem (appendix A.1 of Woo et al. 2021, eqs 25-38).

    The net y = W A x learns the mapping y = T x. The error is E = T - W A, and the continuous dynamics are Ẇ = E Cᵀ and Ȧ = Wᵀ E.
    The theorem states that E → 0 as t → ∞ (misprinted in the paper as t → 0) if k = A Cᵀ - ½ Wᵀ W is zero, C has full column
    rank, and the input is white. The Lyapunov function of the proof is V = ‖E Cᵀ‖². For each seed, all cases use the same T, C
    and initial values, except for a change that violates one of the conditions:

    - theorem: all conditions hold. W = M Cᵀ with a small random M, and A = ½ C Mᵀ M, so that k = 0 [derived].

    - k_random: Gaussian noise with standard deviation ``k`` is added to A.

    - k_negative: ``k`` C is subtracted from A, so that the hidden activation A x is approximately -``k`` C x.

    - rank_enough: C has rank O, which is less than the number of inputs.

    - rank_small: C has rank O - 1.

    - coloured: the covariance Σ of the input has eigenvalues from 1 to ``condition``, divided by their mean. The dynamics are Ẇ =
      E Σ Cᵀ and Ȧ = Wᵀ E Σ.

    [derived] The proof needs only the symmetric part of k to be zero, and only this part is conserved. To see that the symmetric
    part, sym(A Cᵀ) - ½ Wᵀ W, is constant for every Σ, add the transposes to both sides of eq. 32. The antisymmetric part is not
    constant in general, because eq. 33 holds only if WᵀẆ is symmetric. If W starts in the row space of Cᵀ, it stays there, so an
    error remains if the rank of C is lower than that of T.

    Each row contains the case, the seed, the time t = steps x ``lr``, ‖E‖ / ‖T‖, V / V(0), and the norms of the symmetric and
    antisymmetric parts of k.
    """

    size: ClassVar[tuple[float, float]] = (13, 4)

    cases: list[str] = option(
        ["theorem", "k_random", "k_negative", "rank_enough", "rank_small", "coloured"],
        "cases to run",
        choices=["theorem", "k_random", "k_negative", "rank_enough", "rank_small", "coloured"],
    )
    inputs: int = option(6, "I: inputs, more than outputs", minimum=2)
    hidden: int = option(9, "H: hidden units, at least as many as inputs", minimum=2)
    outputs: int = option(4, "O: outputs", minimum=2)
    start: float = option(0.1, "standard deviation of M", minimum=0)
    k: float = option(1.0, "change of A in k_random (standard deviation) and k_negative (factor of C)", above=0)
    condition: float = option(100.0, "largest eigenvalue of the coloured input's covariance, divided by the smallest", minimum=1)
    lr: float = option(0.01, "η: the step of the discrete dynamics, in units of time", above=0)
    time: float = option(100.0, "duration of each run", above=0)
    records: int = option(100, "maximum number of rows per run after time 0, equally spaced in the logarithm of time", minimum=2)
    seeds: int = option(5, "number of seeds; T, C, M and all other random numbers depend on the seed", minimum=1)

    def check(self) -> None:
        if not self.cases:
            raise OptionError("cases", "=[] is empty; list at least one case")
        if not self.outputs < self.inputs <= self.hidden:
            raise OptionError("inputs", f"={self.inputs} must be above outputs={self.outputs} and at most hidden={self.hidden}")
        if self.time < self.lr:
            raise OptionError("time", f"={self.time:g} is less than one step of lr={self.lr:g}")

    def net(self, case: str, seed: int) -> Linear:
        """The net of a case, which consists of T, Σ, C and the initial W and A."""
        generator = np.random.default_rng(seed_for("forward_alignment_theorem", seed))
        teacher = generator.standard_normal((self.outputs, self.inputs))
        c = generator.standard_normal((self.hidden, self.inputs)) / math.sqrt(self.inputs)
        m = self.start * generator.standard_normal((self.outputs, self.inputs))
        other = generator.standard_normal(c.shape)
        axes = np.linalg.qr(generator.standard_normal((self.inputs, self.inputs)))[0]
        if case.startswith("rank_"):
            c = of_rank(c, self.outputs - (case == "rank_small"))
        shift = {"k_random": self.k * other, "k_negative": -self.k * c}.get(case, 0)
        covariance = np.eye(self.inputs)
        if case == "coloured":
            eigenvalues = np.geomspace(1, self.condition, self.inputs)
            covariance = axes * (eigenvalues / eigenvalues.mean()) @ axes.T
        return Linear(teacher, m @ c.T, c @ m.T @ m / 2 + shift, c, covariance)

    def table(self) -> pd.DataFrame:
        import pandas as pd

        steps = round(self.time / self.lr)
        at = {0, *np.geomspace(1, steps, self.records).round().astype(int).tolist()}
        rows: list[dict[str, Any]] = []
        for case in self.cases:
            for seed in range(self.seeds):
                net, first = self.net(case, seed), None
                for step, (w, a) in zip(range(steps + 1), trajectory(net, self.lr), strict=False):
                    if step not in at:
                        continue
                    error, k = net.teacher - w @ a, a @ net.c.T - w.T @ w / 2
                    v = float(np.sum((error @ net.c.T) ** 2))
                    first = v if first is None else first
                    rows.append(
                        {
                            "case": case,
                            "seed": seed,
                            "time": step * self.lr,
                            "error": np.linalg.norm(error) / np.linalg.norm(net.teacher),
                            "lyapunov": v / first,
                            "k_symmetric": np.linalg.norm(k + k.T) / 2,
                            "k_antisymmetric": np.linalg.norm(k - k.T) / 2,
                        }
                    )
        return pd.DataFrame(rows)

    def summary(self, table: pd.DataFrame) -> pd.DataFrame:
        """One row for each case, with the smallest and largest final error, the highest V / V(0), and, for the first seed, the
        first and last norms of the parts of k."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for case, part in table.groupby("case", sort=False):
            runs = [run for _, run in part.groupby("seed")]
            last = [run["error"].iloc[-1] for run in runs]
            rows.append(
                {"case": case, "error_smallest": min(last), "error_largest": max(last), "lyapunov_max": part["lyapunov"].max()}
            )
            for name in ("k_symmetric", "k_antisymmetric"):
                rows[-1] |= {f"{name}_first": runs[0][name].iloc[0], f"{name}_last": runs[0][name].iloc[-1]}
        return pd.DataFrame(rows)

    def plot(self, figure: Figure, table: pd.DataFrame) -> None:
        from fa_bench.report.plot import COLOURS

        panels = figure.subplots(1, 3)
        for number, (case, part) in enumerate(table.groupby("case", sort=False)):
            for axes, column in zip(panels, ("error", "lyapunov", "k_symmetric"), strict=True):
                for seed, run in part.groupby("seed"):
                    axes.plot(
                        run["time"],
                        run[column],
                        color=COLOURS[number % len(COLOURS)],
                        lw=1,
                        alpha=0.7,
                        label=case if seed == 0 else None,
                    )
        titles = "‖E‖ / ‖T‖", "V / V(0), where V = ‖E Cᵀ‖²", "‖symmetric part of k‖"
        for axes, title in zip(panels, titles, strict=True):
            axes.set(title=title, xlabel="time")
            axes.set_xscale("symlog", linthresh=10 * self.lr)
        for axes in panels[:2]:
            axes.set(yscale="log", ylim=(1e-12, 20))
        panels[0].legend(frameon=False, fontsize=8)


def of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The closest matrix of the given rank."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s[rank:] = 0
    return u * s @ v
