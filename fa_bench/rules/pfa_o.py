"""Product feedback alignment with a semi-orthogonal first hop."""

from __future__ import annotations

import dataclasses

from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.rules.pfa import ExpandingRule, SemiOrthogonalRule


@ALGORITHMS.register("pfa_o")
@dataclasses.dataclass(eq=False)
class PFAO(ExpandingRule, SemiOrthogonalRule):
    """Product feedback alignment with a semi-orthogonal fixed matrix: B Bᵀ = I exactly.

    Li and Benna 2024.

    ē = g B, e_in = ē R, gradient of R = ēᵀ x, as in `pfa`; B (O, M) is fixed and has orthonormal rows: the orthogonal factor of a
    Gaussian matrix, with unique signs. W and B R then differ only by their initial values.

    With ``ratio`` below 1, the columns of B are orthonormal instead, Bᵀ B = I: errors lose every component outside a fixed random
    subspace of M dimensions, and B R approaches B Bᵀ W, at an angle to W of arccos √``ratio`` if W is independent of B. `ldfa`
    learns the subspace.

    Choices: R is sampled as in `pfa` (``r_init``); ``ratio`` is 1, with a square orthogonal B, as in the paper's code; the paper
    only says that M is at least O, so it has no ratio below 1.
    """

    equations = (
        r"\bar{e} &= g B,\quad e_{\text{in}} = \bar{e} R,\quad B B^\top = I",
        r"\nabla_W &= g^\top x",
        r"\nabla_R &= \bar{e}^\top x",
    )

    ratio: float = option(
        1.0,
        "expansion ratio: units of the intermediate population per unit of the layer's output; below 1, "
        "errors pass through a random subspace",
        above=0,
    )
