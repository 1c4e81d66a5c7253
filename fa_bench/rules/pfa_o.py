"""Product feedback alignment with a semi-orthogonal first hop."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.draws import draw
from fa_bench.lazy import torch
from fa_bench.rules.pfa import ProductRule

if TYPE_CHECKING:
    from torch import Tensor


@ALGORITHMS.register("pfa_o")
@dataclasses.dataclass(eq=False)
class PFAO(ProductRule):
    """Product feedback alignment whose first hop is semi-orthogonal: B Bᵀ = I exactly.

    Li and Benna 2024.

    ē = g B, e_in = ē R, gradient of R = ēᵀ x, as `pfa`; B (O, M) has orthonormal rows, drawn once: the orthogonal factor of a
    Gaussian matrix, signs made unique. W and B R then agree but for their initial values.

    Choices: R is drawn as `pfa`'s (``r_init``); ``ratio`` 1, a square orthogonal B, as in the code behind the paper, which says
    only that M is at least O.
    """

    ratio: float = option(1.0, "expansion ratio: units of the population in between, over units of the layer's output", minimum=1)

    def first(self, outputs: int, between: int, seed: int) -> Tensor:
        gaussian = draw((between, outputs), "normal_fan_out", seed)
        q, r = torch.linalg.qr(gaussian.double())
        return (q * r.diagonal().sign()).t().to(gaussian.dtype)
