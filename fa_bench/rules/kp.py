"""Kolen-Pollack."""

from __future__ import annotations

import dataclasses

from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.draws import INITIALISERS
from fa_bench.mechanisms.carriers import Carrier, Learned
from fa_bench.mechanisms.edge import EdgeRule, Site


@ALGORITHMS.register("kp")
@dataclasses.dataclass(eq=False)
class KP(EdgeRule):
    """Kolen-Pollack: learned feedback with the gradient of the weight.

    Kolen and Pollack 1994; eqs 16-18 of Akrout et al. 2019.

    e_in = g B; gradient of B = gradient of W, the same numbers; B is trained with W's optimizer, learning rate, momentum
    and decay. The gradients cancel in W - B, so that with decay λ, momentum m and rate lr, SGD shrinks the difference:
    ‖W - B‖ ≈ ‖W(0) - B(0)‖ exp(-Σ lr λ/(1-m)). Adam with coupled decay breaks this; AdamW keeps it.

    Choices: B is drawn as FA's (``b_init``, and ``linear_b_init`` for fully connected layers). The first layer's B carries no
    error and is trained all the same. Deviation, as an option: ``b_lr_scale`` other than 1 gives B a learning rate of its own,
    and the difference no longer vanishes exactly.
    """

    b_init: str = option("xavier_uniform", "initialiser of B", choices=[*INITIALISERS, "copy_w"])
    linear_b_init: str | None = option(None, "initialiser of B in fully connected layers; null: b_init",
                                       choices=[*INITIALISERS, "copy_w"])
    b_lr_scale: float = option(1.0, "learning rate of B relative to that of W", minimum=0)

    def carrier(self, site: Site) -> Carrier:
        linear = site.layer.weight.dim() == 2 and self.linear_b_init is not None
        site.put("B", self.linear_b_init if linear else self.b_init)
        return Learned()

    @property
    def feedback_lr_scale(self) -> float:
        return self.b_lr_scale
