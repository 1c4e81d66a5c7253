"""Activation sharing in the feedback path with local classifiers."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import fa_bench
from fa_bench.config.options import option
from fa_bench.config.registries import ALGORITHMS
from fa_bench.draws import seed_for
from fa_bench.lazy import nn, torch
from fa_bench.mechanisms.auxiliary import normalising
from fa_bench.mechanisms.coverage import batch_note
from fa_bench.mechanisms.local import ModuleRule, cross_entropy, kind_of_map
from fa_bench.rules.asfp import ASFP

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

    from fa_bench.mechanisms.coverage import Coverage
    from fa_bench.mechanisms.trace import Trace
    from fa_bench.mechanisms.updates import LearnedFeedback


@dataclasses.dataclass(eq=False)
class Classifiers(ModuleRule):
    """A classifier at the end of every block but the last: average, linear layer by feedback alignment, normalisation.

    Attributes:
        pool: the side that a map is averaged to.
        b_init: initialiser of the linear layer's fixed feedback.
    """

    pool: int = option(2, "the side that a map is averaged to", minimum=1)
    b_init: str = option("uniform_one", "initialiser of the linear layer's fixed feedback")

    def auxiliary(self, cut: str, shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        layers: OrderedDict[str, torch_nn.Module] = OrderedDict()
        features, size = shape[0], tuple(min(length, self.pool) for length in shape[1:])
        for length in size:
            features *= length
        if size != shape[1:]:
            layers["pool"] = kind_of_map("AdaptiveAvgPool", cut, shape)(size)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(features, classes)
        layers["bn"] = nn.BatchNorm1d(classes, track_running_stats=False)
        classifier = nn.Sequential(layers)
        fa_bench.attach(classifier, "fa", seed=seed_for(self.seed, cut, "classifier"), b_init=self.b_init,
                        sample_input=torch.zeros(2, *shape))
        return classifier

    def local_loss(self, cut: str, auxiliary: torch_nn.Module, activation: Tensor, target: Tensor) -> Tensor:
        with normalising(self.name, "local classifier", cut, "use larger batches, or drop the last incomplete one"):
            scores = auxiliary(activation)
        return cross_entropy(scores, target)

    @property
    def feedback(self) -> dict[str, dict[str, Tensor]]:
        classifiers: dict[str, Any] = {cut: self.auxiliary_at(cut) for cut in self._auxiliary}
        return {cut: {**tensors, "B": classifiers[cut].fc.feedback_B} for cut, tensors in super().feedback.items()}


@ALGORITHMS.register("asfp_lc")
@dataclasses.dataclass(eq=False)
class ASFPLC(ASFP):
    """Activation sharing in the feedback path, with a local classifier at the end of every block.

    ASFP + LC, Table 2 of Woo et al. 2021.

    The model is a chain of blocks, and no error crosses from one to the next. Every block but the last ends in a classifier s =
    BN(V p + c), with p its activation averaged to ``pool`` x ``pool`` and flattened, and learns by CE(s, labels); the last has
    the network's own classifier. The classifier is a layer of feedback alignment: error at p = g B with a fixed B, uniform in
    [-1, 1) (``linear_b_init``); V, c and BN learn with W's optimizer. Within a block the rule is `asfp`, with its options `k`,
    `match`, `linear` and `b_init`: e_in = g B; gradient of W = gᵀ x; gradient of B = gᵀ h̃ with the shared activation h̃.

    Choices, for there is no code: blocks are the model's (``model.blocks``, or the modules in ``cuts`` that they end with):
    residual blocks, and the stem, whose normalisation learns by a classifier of its own (a frozen stem without one has none);
    activations are shared across the ends of blocks as in `asfp`; the classifier's normalisation uses the batch's own
    statistics, since it serves in training only, and refuses a batch of one sample: it depends on the batch itself, and under
    data parallelism each rank has the statistics of its own part.
    """

    cuts: list[str] | None = option(None, "modules (names or patterns) that the blocks end with; null: the model's blocks")
    output: str | int | None = option(None, "the output that the errors come from, where the model returns several: a key, or a "
                                            "number in a tuple")
    pool: int = option(2, "side that a classifier averages a map to", minimum=1)

    def put_in(self, sample_input: Any) -> Coverage:
        local = Classifiers(cuts=self.cuts, output=self.output, pool=self.pool, b_init=self.linear_b_init)
        # One mode for both: what measures the one measures the other.
        local.name, local.model, local.mode, local.seed = self.name, self.model, self.mode, self.seed
        local._frozen, local._structure, local._outside = self._frozen, None, {}
        local._passes, local._watch, local._unwatched = [], None, False
        self._local, local.part_of = local, self
        local.put_in(sample_input)
        return super().put_in(sample_input)

    def take_out(self) -> None:
        if (local := getattr(self, "_local", None)) is not None:
            local.take_out()
        super().take_out()

    def begin_forward(self, model: torch_nn.Module, args: Any, kwargs: Any) -> None:
        super().begin_forward(model, args, kwargs)
        self._local.begin_forward(model, args, kwargs)

    def end_forward(self, model: torch_nn.Module, args: Any, output: Any) -> Any:
        try:
            super().end_forward(model, args, output)
        except BaseException:
            output = None
            raise
        finally:
            # Both count the passes, and have one mode: this one's, for the other began later.
            training = self.mode.training
            try:
                delivered = self._local.end_forward(model, args, output)
            finally:
                self.mode.training = training
        return delivered

    def roots(self, output: Any) -> list[Any]:
        return self._local.roots(output)

    def deliver(
        self, loss: Tensor, logits: Tensor | None, target: Tensor | None, loss_scale: float | None = None
    ) -> None:
        self._local.deliver(loss, logits, target, loss_scale)

    @property
    def feedback(self) -> dict[str, dict[str, Tensor]]:
        return {**super().feedback, **self._local.feedback}

    def learned_feedback(self) -> list[LearnedFeedback]:
        return [*super().learned_feedback(), *self._local.learned_feedback()]

    def notes(self) -> tuple[str, ...]:
        return (batch_note("batch normalisation in the classifiers"),)

    def watched_modules(self) -> dict[str, torch_nn.Module]:
        return {**super().watched_modules(), **self._local.watched_modules()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        classifiers = {}
        if isinstance(state, Mapping) and "classifiers" in state:  # a state that an earlier version saved
            state = dict(state)
            classifiers = state.pop("classifiers")
        super().load_state_dict(state)
        self._local.load_state_dict(classifiers)

    def error_points(self, trace: Trace) -> dict[str, tuple[str, str]]:
        return {**super().error_points(trace), **self._local.error_points(trace)}
