"""Tests of the pfa_spectrum analysis: the Marchenko-Pastur density has the right moments, and sampled feedback matrices match the
predictions."""

from __future__ import annotations

import numpy as np
import pytest

from fa_bench.analyses.pfa_spectrum import MarchenkoPastur, PFASpectrum
from fa_bench.errors import OptionError


def density(law: MarchenkoPastur, v: np.ndarray) -> np.ndarray:
    """The density μ(v), without the point mass at zero."""
    root = np.sqrt(np.clip((law.high - v) * (v - law.low), 0, None))
    return root / (2 * np.pi * law.ratio * v)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 1.0, 4.0])
def test_marchenko_pastur_density_moments(ratio: float) -> None:
    law = MarchenkoPastur(ratio)
    # The midpoints are equally spaced in u = √v, because for a ratio of 1, the density grows like 1/√v near 0.
    edges = np.linspace(np.sqrt(law.low), np.sqrt(law.high), 200_001)
    v, weight = ((edges[1:] + edges[:-1]) / 2) ** 2, np.diff(edges**2)
    mass, mean, square = ((density(law, v) * v**power * weight).sum() for power in range(3))
    assert mass == pytest.approx(1 - law.zero_fraction, abs=1e-4)
    assert mean == pytest.approx(1, abs=1e-4)
    assert square - mean**2 == pytest.approx(ratio, rel=1e-3)
    middle = (law.low + law.high) / 2
    assert law.below(np.array([law.low, middle, law.high])) == pytest.approx(
        [0, (density(law, v) * weight)[v <= middle].sum(), 1 - law.zero_fraction], abs=1e-4
    )


def test_sampled_spectrum_and_angle_match_prediction() -> None:
    """Matrices of 80 x 800 and 80 x 40 are sampled 8 times. At a ratio of 10, the standard deviation of the 640 eigenvalues then
    has a relative error of about 0.5 %, and the angle has an error of about 0.1 degrees."""
    table = PFASpectrum(outputs=80, inputs=100, ratios=[0.5, 10.0], histograms=[10.0], bins=6, draws=8).table()
    found = {(row.quantity, row.ratio): row for row in table.itertuples() if row.quantity != "density"}
    assert found["eigenvalue_mean", 10].measured == pytest.approx(1, abs=0.01)
    assert found["eigenvalue_std", 10].measured == pytest.approx(0.3162, rel=0.03)
    assert found["angle", 10].measured == pytest.approx(17.55, abs=0.5)
    assert found["eigenvalue_max", 10].measured == pytest.approx(1.732, abs=0.15)
    assert found["zero_fraction", 0.5].measured == 0.5 == found["zero_fraction", 0.5].predicted
    assert found["angle", 0.5].measured == pytest.approx(54.74, abs=1)
    bins = table[table["quantity"] == "density"]
    assert len(bins) == 6 and (bins["measured"] - bins["predicted"]).abs().max() < 0.15
    assert bins["predicted"].sum() * (1.7325 - 0.4675) / 6 == pytest.approx(1, abs=1e-3)


def test_rejects_histogram_of_unsampled_ratio() -> None:
    with pytest.raises(OptionError, match=r"histograms=3.0 is not among ratios=1.0, 2.0"):
        PFASpectrum(ratios=[1.0, 2.0], histograms=[3.0])
