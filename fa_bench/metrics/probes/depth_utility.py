"""The contribution of each block's training to the accuracy of a net."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fa_bench.errors import ConfigError
from fa_bench.metrics.probes.base import Probe, Quantities, Subject
from fa_bench.registry.registries import PROBES
from fa_bench.utils.lazy import nn, torch

if TYPE_CHECKING:
    from torch import nn as torch_nn

    from fa_bench.data.splits import Split


@PROBES.register("depth_utility")
@dataclasses.dataclass(eq=False)
class DepthUtility(Probe):
    """Accuracy (a fraction) that is lost when one block of the trained net is reset to its values before training.

    The model declares the ends of its blocks in ``model.blocks`` or, if that is missing, in ``model.cut_points``. In the order of
    execution, a block extends from the end of the previous block to its own end, and contains all parameters in between,
    including those of normalisation layers. Modules after the end of the last block, such as the output layer, belong to no
    block.

    The running statistics of batch normalisation are re-estimated for every accuracy, including that of the trained net. The
    statistics are plain means over batches of the run's size from at most 2,000 training samples, without augmentation. With the
    statistics of the trained net, the accuracy would also drop because these statistics do not fit the reset weights. Accuracies
    are measured on at most 10,000 validation samples, or test samples if there is no validation split. For tasks without
    classes, the utility is the deterioration of the primary score in its own unit, such as the decrease in R² or the increase in
    perplexity.

    The layers after the block were trained on the output of the trained block, so the utility tends to overestimate the
    contribution of the block's training. A value near 0 means that the block's training contributed nothing.
    """

    needs_initial = True

    def require(self, subject: Subject) -> None:
        from fa_bench.mechanisms.blocks import blocks_of

        if not blocks_of(subject.model, subject.meter.x[:2]):
            raise ConfigError(
                f"{type(subject.model).__name__} declares no blocks that could be left untrained; name the modules "
                "that end them in model.blocks, as architecture=mlp, conv2 and the residual nets do"
            )

    def measure(self, subject: Subject) -> Quantities:
        from fa_bench.mechanisms.blocks import blocks_of

        model, training, scored = subject.model, subject.training, subject.scored
        # The trained output may be named by the rule instead of the objective.
        objective = dataclasses.replace(subject.rule.objective, output=subject.rule.loss_output)
        primary = objective.scores[subject.splits.targets][0]
        blocks, parameters = blocks_of(model, subject.meter.x[:2]), dict(model.named_parameters(remove_duplicate=False))

        def merit() -> float:
            from fa_bench.metrics.evaluation import evaluate

            estimate_running_statistics(model, training, subject.batch_size)
            value = evaluate(model, objective, scored, subject.batch_size, predict=subject.rule.predict).get(primary.name)
            return math.nan if value is None else primary.merit(value)

        trained_merit, utility = merit(), {}
        with torch.no_grad():
            for block, names in blocks.items():
                trained = {name: parameters[name].detach().clone() for name in names}
                for name in names:
                    parameters[name].copy_(subject.initial[name])
                utility[block] = trained_merit - merit()
                for name, value in trained.items():
                    parameters[name].copy_(value)
        return {self.name: utility}


def estimate_running_statistics(model: torch_nn.Module, split: Split, batch_size: int) -> None:
    """Replace the running statistics of batch normalisation with the mean of the batches' statistics over one pass over `split`.

    The model is left in evaluation mode. If it has no running statistics, nothing else changes.
    """
    from fa_bench.mechanisms.contexts import set_temporarily

    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    model.eval()
    if not norms:
        return
    # If the momentum is None, the statistics are a plain mean.
    with torch.no_grad(), set_temporarily(norms, "momentum", None), set_temporarily(norms, "training", True):
        for norm in norms:
            norm.reset_running_stats()
        for x, _ in split.batches(batch_size, drop_last=True):
            model(x)
