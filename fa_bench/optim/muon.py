"""Muon."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import TYPE_CHECKING, Any

from fa_bench.errors import OptionError, names, nearest
from fa_bench.optim.base import OptimizerOptions, fusible
from fa_bench.registry.options import option
from fa_bench.registry.registries import OPTIMIZERS
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from fa_bench.mechanisms.rule import Rule


@OPTIMIZERS.register("muon")
@dataclasses.dataclass(eq=False)
class Muon(OptimizerOptions):
    """Momentum with orthogonalised updates for the weights of layers and for learned feedback; AdamW for the other parameters.

    Muon is due to Jordan et al. 2024. Boeshertz, Pascanu and Clopath 2026 (arXiv 2606.11123) combined Muon with feedback
    alignment, because orthogonal updates raise the rank of the errors. We do not know the settings of that paper, so our results
    are not a reproduction.

    The update of a matrix W with gradient G, momentum μ and weight decay λ is as follows; for convolution kernels, all dimensions
    after the first are flattened into one:

        M <- μ M + G;  X = M or, with ``nesterov``, G + μ M
        X <- X / ‖X‖, then five times (``ns_steps``) X <- a X + (b A + c A²) X,  A = X Xᵀ, (a, b, c) = (3.4445, -4.7750, 2.0315)
        W <- (1 - lr λ) W - lr s X,  s = √max(1, rows / columns) (``adjust_lr``)

    Multiplying all gradients by the same positive number does not change these updates. Learned feedback with the gradient of W
    gets the same update as W, so only the decoupled decay changes W - B, as with AdamW: ‖W - B‖ = ‖W(0) - B(0)‖ Π (1 - lr λ).
    Without weight decay, the feedback of `kp` therefore comes no closer to the weights. The same holds for W - B R in `pfa_o`
    with its default ratio of 1, but not in `pfa`, where B times the update of R differs from the update of W.

    ``layers=hidden`` leaves the first and the last layer to AdamW, as is common with Muon. ``exclude`` lists further layers that
    AdamW trains together with their feedback. AdamW also trains biases, normalisation layers, embeddings and position tables. The
    learning rate of AdamW is ``adam_lr``; its weight decay and schedule are those of the matrices.

    In contrast to ``torch.optim.Muon``, which rejects kernels and rounds to bfloat16, this optimizer accepts kernels and iterates
    in the precision of the weights, or in single precision if that is higher.
    """

    search_space = {
        **OptimizerOptions.search_space,
        "lr": "tag(log,interval(1e-3,0.3))",
        "adam_lr": "tag(log,interval(1e-5,1e-1))",
    }

    lr: float = option(0.02, "learning rate of matrices", above=0)
    momentum: float = option(0.95, "momentum of matrices", minimum=0, below=1)
    nesterov: bool = option(True, "Nesterov momentum of matrices")
    ns_steps: int = option(5, "Newton-Schulz iterations", minimum=1)
    adjust_lr: str = option(
        "original",
        "factor s of the learning rate: √max(1, rows / columns) (original), or 0.2 √max(rows, columns), which makes "
        "updates about as large as AdamW's (match_rms_adamw)",
        choices=["original", "match_rms_adamw"],
    )
    layers: str = option(
        "all",
        "layers whose updates are orthogonalised: all of them (all), or all but the first and the last that the model defines "
        "(hidden)",
        choices=["all", "hidden"],
    )
    exclude: list[str] = option(
        [], "other layers (names, or patterns; * also matches dots) that AdamW trains, together with their feedback"
    )
    adam_lr: float = option(1e-3, "learning rate of the other parameters", above=0)
    beta1: float = option(0.9, "AdamW's decay rate of the first moment", minimum=0, below=1)
    beta2: float = option(0.999, "AdamW's decay rate of the second moment", minimum=0, below=1)
    eps: float = option(1e-8, "added to the square root of AdamW's second moment", above=0)

    def check(self) -> None:
        super().check()
        try:
            self.schedule.check_rate(self.adam_lr)
        except OptionError as error:
            raise OptionError(f"schedule.{error.path}", error.problem.replace(" lr=", " adam_lr=")) from None

    def optimizers(self, groups: list[dict[str, Any]], rule: Rule) -> list[torch.optim.Optimizer]:
        chosen, matrices, others = self._chosen(rule), [], []
        for group in groups:
            lr = group.get("lr", self.lr)
            for part, is_chosen, rate in ((matrices, True, lr), (others, False, self.adam_lr * lr / self.lr)):
                if tensors := [tensor for tensor in group["params"] if (id(tensor) in chosen) == is_chosen]:
                    part.append({"params": tensors, "lr": rate})
        return [build(part) for build, part in ((self.build, matrices), (self._adamw, others)) if part]

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from fa_bench.utils import muon

        return muon.Muon(groups, self.lr, self.momentum, self.nesterov, self.ns_steps, self.adjust_lr, self.weight_decay)

    def _adamw(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups, betas=(self.beta1, self.beta2), eps=self.eps, weight_decay=self.weight_decay, fused=fusible(groups)
        )

    def _chosen(self, rule: Rule) -> set[int]:
        """The ids of the tensors whose updates are orthogonalised."""
        tensors = rule.matrices()
        excluded = rule.end_layers() if self.layers == "hidden" else set()
        for pattern in self.exclude:
            if not (matches := fnmatch.filter(tensors, pattern)):
                raise OptionError("exclude", f"={pattern} matches no layer{nearest(pattern, tensors)} (layers: {names(tensors)})")
            excluded |= set(matches)
        if excluded.issuperset(tensors):
            raise OptionError(
                "layers", f"={self.layers} with exclude={self.exclude} leaves no layer for muon (layers: {names(tensors)})"
            )
        # A weight that a layer shares with an excluded layer is excluded, too.
        return {id(tensor) for path in tensors for tensor in tensors[path]} - {
            id(tensor) for path in excluded for tensor in tensors.get(path, ())
        }
