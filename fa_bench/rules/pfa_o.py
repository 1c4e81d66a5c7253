"""Product feedback alignment with a semi-orthogonal first hop."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.rules.pfa import ProductRule
from fa_bench.utils.lazy import torch
from fa_bench.utils.sampling import sample

if TYPE_CHECKING:
    from torch import Tensor


@ALGORITHMS.register("pfa_o")
@dataclasses.dataclass(eq=False)
class PFAO(ProductRule):
    """Product feedback alignment whose first hop is semi-orthogonal: B Bᵀ = I exactly.

    Li and Benna 2024.

    ē = g B, e_in = ē R, gradient of R = ēᵀ x, as in `pfa`; B (O, M) is fixed and has orthonormal rows: the orthogonal factor of a
    Gaussian matrix, with unique signs. W and B R then differ only by their initial values.

    Choices: R is sampled as in `pfa` (``r_init``); ``ratio`` is 1, with a square orthogonal B, as in the paper's code; the paper
    only says that M is at least O.
    """

    ratio: float = option(1.0, "expansion ratio: units of the intermediate population over units of the layer's output",
                          minimum=1)

    def first(self, outputs: int, between: int, seed: int) -> Tensor:
        gaussian = sample((between, outputs), "normal_fan_out", seed)
        q, r = torch.linalg.qr(gaussian.double())
        return (q * r.diagonal().sign()).t().to(gaussian.dtype)
