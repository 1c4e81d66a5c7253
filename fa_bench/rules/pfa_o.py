"""Product feedback alignment with a semi-orthogonal fixed matrix."""

from __future__ import annotations

import dataclasses

from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.rules.pfa import ExpandingRule, SemiOrthogonalRule


@ALGORITHMS.register("pfa_o")
@dataclasses.dataclass(eq=False)
class PFAO(ExpandingRule, SemiOrthogonalRule):
    """Product feedback alignment with a semi-orthogonal fixed matrix: B Bᵀ = I exactly, if ``ratio`` is at least 1.

    The rule is due to Li and Benna 2024.

    As in `pfa`, ē = g B, e_in = ē R, gradient of R = ēᵀ x. B (O, M) is fixed and has orthonormal rows; it comes from the QR
    decomposition of a Gaussian matrix, with the signs that make the decomposition unique. With SGD, W and B R then differ only
    because of their initial values.

    With ``ratio`` below 1, the columns of B are orthonormal instead, Bᵀ B = I. Errors then lose all components outside a fixed
    random subspace of M dimensions, and B R approaches B Bᵀ W. The angle between B Bᵀ W and W is arccos √``ratio`` if W is
    independent of B. `ldfa` learns the subspace.

    R is sampled as in `pfa` (``r_init``). By default, ``ratio`` is 1 and B is square and orthogonal, as in the paper's code. The
    paper says only that M is at least O, so ratios below 1 are our extension.
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
