"""What each block of a trained net is worth."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fa_bench.errors import ConfigError
from fa_bench.metrics.probes.base import Probe, Quantities, Subject
from fa_bench.registry.registries import PROBES
from fa_bench.utils.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

    from fa_bench.data.base import Split


@PROBES.register("depth_utility")
@dataclasses.dataclass(eq=False)
class DepthUtility(Probe):
    """How much accuracy (a fraction) is lost when a block of the trained net gets its initial values back, one block at a time.

    Blocks are those that the model declares: from the end of one to the end of the next, in the order of execution, all
    parameters between, those of normalisation layers included. Without ``model.blocks`` the model's cut points end them. What
    comes behind the last one, the output layer, is no block. Initial values are those that training began with.

    The running statistics of all batch normalisation are estimated anew for every accuracy, that of the whole trained net too:
    as the plain mean over at most 2,000 training images as they are stored, in batches of the run's size. Statistics of another
    net would cost accuracy that says nothing of the weights. Accuracies are on at most 10,000 of the validation images, of the
    test set where there are none.

    The layers behind a block were trained to take its trained output, so that this bounds from above what training the block
    was worth: about 0 means nothing was gained by it.
    """

    needs_initial = True

    def require(self, subject: Subject) -> None:
        if not blocks_of(subject.model, subject.meter.x[:2]):
            raise ConfigError(f"{type(subject.model).__name__} declares no blocks that could be left untrained; name the modules "
                              "that they end with in model.blocks, as architecture=mlp, conv2 and the residual nets do")

    def measure(self, subject: Subject) -> Quantities:
        model, training, scored = subject.model, subject.training, subject.scored
        blocks, parameters = blocks_of(model, subject.meter.x[:2]), dict(model.named_parameters(remove_duplicate=False))

        def accuracy() -> float:
            from fa_bench.metrics.evaluation import evaluate

            refresh(model, training, subject.batch_size)
            return evaluate(model, subject.rule.objective, scored, subject.batch_size)[1] or 0.0

        whole, utility = accuracy(), {}
        with torch.no_grad():
            for block, names in blocks.items():
                trained = {name: parameters[name].detach().clone() for name in names}
                for name in names:
                    parameters[name].copy_(subject.initial[name])
                utility[block] = whole - accuracy()
                for name, value in trained.items():
                    parameters[name].copy_(value)
        return {self.name: utility}


def blocks_of(model: torch_nn.Module, sample: Tensor) -> dict[str, list[str]]:
    """{end of a block: names of the parameters in it}, in the order of execution, blocks without any left out.

    Args:
        model: an attached or plain model.
        sample: inputs (N, ...).
    """
    from fa_bench.mechanisms.coverage import matching
    from fa_bench.mechanisms.feedback_tensors import PREFIX
    from fa_bench.mechanisms.trace import evaluating

    modules = {path: module for path, module in model.named_modules() if path}
    declared = [getattr(model, name, None) for name in ("blocks", "cut_points")]
    # A list of names: a foreign model may call its own modules so.
    patterns = next((found for found in declared if isinstance(found, (list, tuple)) and found), ())
    ends = matching(patterns, modules, "blocks")
    blocks: dict[str, list[str]] = {}
    since: list[str] = []
    taken: set[str] = set()

    def ran(path: str) -> None:
        names = [f"{path}.{name}" for name, _ in modules[path].named_parameters(recurse=False) if not name.startswith(PREFIX)]
        since.extend(name for name in names if name not in taken)
        taken.update(names)

    def ended(path: str) -> None:
        if since:
            blocks[path] = [*blocks.get(path, []), *since]
            since.clear()

    handles = [module.register_forward_pre_hook(lambda *_, path=path: ran(path)) for path, module in modules.items()]
    handles += [modules[path].register_forward_hook(lambda *_, path=path: ended(path)) for path in ends]
    try:
        with evaluating(model), torch.no_grad():
            model(sample)
    finally:
        for handle in handles:
            handle.remove()
    return blocks


def refresh(model: torch_nn.Module, split: Split, batch_size: int) -> None:
    """Estimate the running statistics of all batch normalisation anew: the mean over the batches of one pass over `split`.

    Nothing happens to a model without any. Dropout is off. The model is left in evaluation mode.
    """
    norms = [module for module in model.modules()
             if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None]
    model.eval()
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean
            norm.train()
        with torch.no_grad():
            for x, _ in split.batches(batch_size, drop_last=True):
                model(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
