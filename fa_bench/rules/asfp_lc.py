"""Activation sharing in the feedback path with local classifiers."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import fa_bench
from fa_bench.mechanisms.coverage import batch_note
from fa_bench.mechanisms.cut.local import ModuleRule, map_module
from fa_bench.mechanisms.feedback_options import init_option, output_option
from fa_bench.mechanisms.feedback_tensors import feedback_tensor
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.rules.asfp import ASFP
from fa_bench.utils.lazy import nn, torch
from fa_bench.utils.sampling import seed_for

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

    from fa_bench.mechanisms.coverage import Coverage
    from fa_bench.mechanisms.trace import Trace
    from fa_bench.mechanisms.updates import LearnedTensor


@dataclasses.dataclass(eq=False)
class Classifiers(ModuleRule):
    """Local classifiers at the end of every block except the last, each with pooling, a linear layer that learns by feedback
    alignment, and batch normalisation.

    Attributes:
        pool: side length to which larger maps are average-pooled.
        b_init: initialiser of the linear layer's fixed feedback.
    """

    net_name = "local classifier"
    pool: int = option(2, "side length to which larger maps are average-pooled", minimum=1)
    b_init: str = init_option("the linear layer's fixed feedback", "uniform_one")

    def auxiliary(self, cut: str, shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        layers: OrderedDict[str, torch_nn.Module] = OrderedDict()
        features, size = shape[0], tuple(min(length, self.pool) for length in shape[1:])
        for length in size:
            features *= length
        if size != shape[1:]:
            layers["pool"] = map_module("AdaptiveAvgPool", cut, shape)(size)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(features, classes)
        layers["bn"] = nn.BatchNorm1d(classes, track_running_stats=False)
        classifier = nn.Sequential(layers)
        fa_bench.attach(
            classifier, "fa", seed=seed_for(self.seed, cut, "classifier"), b_init=self.b_init, sample_input=torch.zeros(2, *shape)
        )
        return classifier

    @property
    def feedback(self) -> dict[str, dict[str, Tensor]]:
        classifiers: dict[str, Any] = {cut: self.auxiliary_at(cut) for cut in self._auxiliary}
        return {cut: {**tensors, "B": feedback_tensor(classifiers[cut].fc, "B")} for cut, tensors in super().feedback.items()}


@ALGORITHMS.register("asfp_lc")
@dataclasses.dataclass(eq=False)
class ASFPLC(ASFP):
    """Activation sharing in the feedback path, with a local classifier at the end of every block except the last.

    The rule is "ASFP + LC" in Table 2 of Woo et al. 2021.

    The model is a chain of blocks, and no error passes between blocks. Every block except the last learns from its own local
    classifier s = BN(V p + c), whose loss is that of the objective, such as CE(s, labels). Here p is the activation at the end of
    the block, average-pooled to at most ``pool`` x ``pool`` and flattened. The last block uses the network's own classifier. A
    local classifier learns by feedback alignment: the error at p is g B, where g is the error at V p + c, and B is fixed and
    uniform in [-1, 1) (``linear_b_init``). V, c and BN learn with the optimizer of W. Within a block, the rule is `asfp` with its
    options `k`, `match`, `linear` and `b_init`: e_in = g B; gradient of W = gᵀ x; gradient of B = gᵀ h̃ with the shared
    activation h̃.

    No code was published, so the following are our choices. The blocks are those that the model declares (``model.blocks``), such
    as the stem and the residual blocks, or those that end with the modules in ``cuts``. If the stem is a block, it has its own
    classifier, which trains the stem's normalisation; after a frozen stem without normalisation, the classifier does not learn.
    Activations are shared across blocks as in `asfp`. Local classifiers are used only in training, so their batch normalisation
    always uses batch statistics. Batch normalisation therefore rejects a batch of one sample, and each data-parallel rank has its
    own statistics.
    """

    equations = (
        r"e_{\text{in}} &= g B",
        r"\nabla_W &= g^\top x",
        r"\nabla_B &= g^\top \tilde{h}",
        r"s &= \operatorname{BN}(V p + c),\quad e_p = g_s B_V \quad \text{at the end of each block}",
    )

    cuts: list[str] | None = option(None, "modules (names or patterns) that end the blocks; null: the model's blocks")
    output: str | int | None = output_option()
    pool: int = option(2, "side length to which larger maps are average-pooled", minimum=1)

    def wire(self, sample_input: Any) -> Coverage:
        local: Any = Classifiers(cuts=self.cuts, output=self.output, pool=self.pool, b_init=self.linear_b_init)
        # This rule and the classifiers share one mode, so that `exact` and measurements apply to both.
        local.name, local.model, local.mode, local.seed = self.name, self.model, self.mode, self.seed
        local.objective, local._frozen, local._structure, local._uses_outside = self.objective, self._frozen, None, {}
        local.first_pass = None
        self._local, local.part_of = local, self
        local.wire(sample_input)
        return super().wire(sample_input)

    def unwire(self) -> None:
        if (local := getattr(self, "_local", None)) is not None:
            local.unwire()
        super().unwire()

    def begin_forward(self, model: torch_nn.Module, args: Any, kwargs: Any) -> None:
        super().begin_forward(model, args, kwargs)
        self._local._capture.begin()

    def end_forward(self, model: torch_nn.Module, args: Any, output: Any) -> Any:
        capture = self._local._capture
        tape = capture.tape
        try:
            super().end_forward(model, args, output)
        finally:
            capture.end()
        return self._local.connect(output, tape)

    def roots(self, output: Any) -> list[Any]:
        return self._local.roots(output)

    def deliver(self, loss: Tensor, logits: Tensor | None, target: Tensor | None, loss_scale: float | None = None) -> None:
        with self.derivatives_of(loss, logits, target, loss_scale):
            self._local.deliver(loss, logits, target, loss_scale)

    @property
    def feedback(self) -> dict[str, dict[str, Tensor]]:
        return {**super().feedback, **self._local.feedback}

    def learned_feedback(self) -> list[LearnedTensor]:
        return [*super().learned_feedback(), *self._local.learned_feedback()]

    def notes(self) -> tuple[str, ...]:
        return (batch_note("batch normalisation in the classifiers"),)

    def watched_modules(self) -> dict[str, torch_nn.Module]:
        return {**super().watched_modules(), **self._local.watched_modules()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        classifiers = {}
        if isinstance(state, Mapping) and "classifiers" in state:  # saved by an earlier version
            state = dict(state)
            classifiers = state.pop("classifiers")
        super().load_state_dict(state)
        self._local.load_state_dict(classifiers)

    def error_points(self, trace: Trace) -> dict[str, tuple[str, str]]:
        return {**super().error_points(trace), **self._local.error_points(trace)}
