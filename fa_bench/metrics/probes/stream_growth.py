"""Measures how much the norm of the activation grows from block to block."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from fa_bench.errors import ConfigError
from fa_bench.metrics.alarm import Alarm
from fa_bench.metrics.probes.base import Probe, Quantities, Subject
from fa_bench.registry.registries import PROBES
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@PROBES.register("stream_growth")
@dataclasses.dataclass(eq=False)
class StreamGrowth(Probe):
    """Mean norm of a block's output divided by that of its input, which measures the growth of the residual stream.

    The norm is the Euclidean norm of each sample's activation or, for tokens (N, T, D), of each token's activation. Means are
    taken over the fixed batch. Batch normalisation uses the batch's statistics and dropout is off.

    The model declares its blocks in ``model.blocks`` or, if that is missing, in ``model.cut_points``. If the module that ends a
    block has parameters, as a residual block does, the input of the block is the input of this module. Otherwise, the input of
    the block is the output of the previous block. Feedback that the rule stores in the module does not count as a parameter. If
    the first block ends in a module without parameters, as the stem of a convolutional net does, the block has no row. Values
    are NaN if the input is zero.
    """

    alarms = {
        "stream_growth": Alarm(
            50,
            True,
            "The residual stream explodes: a final normalisation then divides the gradients of all blocks by the stream's norm "
            "(faeval protocol; healthy nets stay below 5 in late blocks, transformers below 25 in early ones).",
        )
    }

    def require(self, subject: Subject) -> None:
        from fa_bench.mechanisms.blocks import block_ends

        if not block_ends(subject.model):
            model = type(subject.model).__name__
            raise ConfigError(
                f"{model} declares no blocks; name the modules that end them in model.blocks, "
                "as architecture=residual_mlp, vit_mini and the residual nets do"
            )

    def measure(self, subject: Subject) -> Quantities:
        from fa_bench.mechanisms.blocks import block_ends
        from fa_bench.mechanisms.feedback_tensors import has_own_parameters
        from fa_bench.mechanisms.trace import tensors_in
        from fa_bench.metrics.meter import measurement_mode

        model = subject.model
        # If a block runs several times, the norms are from its first run.
        inputs: dict[str, float] = {}  # of blocks that have parameters
        outputs: dict[str, float] = {}  # in the order of execution

        def before(path: str) -> Any:
            def record(module: Any, args: Any, kwargs: Any) -> None:
                if path not in inputs and has_own_parameters(module):
                    inputs[path] = mean_norm(next(tensors_in((args, kwargs))))  # before the module can change it in place

            return record

        def after(path: str) -> Any:
            def record(module: Any, args: Any, output: Any) -> None:
                if path not in outputs:
                    outputs[path] = mean_norm(next(tensors_in(output)))

            return record

        handles = []
        for path in block_ends(model):
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after(path)))
        try:
            with measurement_mode(subject.rule), torch.no_grad():
                model(subject.meter.inputs())
        finally:
            for handle in handles:
                handle.remove()
        growth, previous = {}, None
        for path, norm in outputs.items():
            given = inputs.get(path, previous)
            if given is not None:
                growth[path] = norm / given if given else math.nan
            previous = norm
        return {self.name: growth}


def mean_norm(activation: Tensor) -> float:
    """Mean Euclidean norm of the samples (N, ...), or of the tokens (N, T, D)."""
    features = activation.flatten(0, 1) if activation.dim() == 3 else activation.flatten(1)
    return features.double().norm(dim=1).mean().item()
