"""Classification models of torchvision."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from fa_bench.errors import OptionError, nearest
from fa_bench.models.base import Architecture
from fa_bench.registry.options import option
from fa_bench.registry.registries import ARCHITECTURES
from fa_bench.utils.lazy import nn, torchvision

if TYPE_CHECKING:
    from torch import nn as torch_nn


@ARCHITECTURES.register("torchvision")
@dataclasses.dataclass(eq=False)
class Torchvision(Architecture):
    """Any classification model of torchvision, selected by its name, for example architecture.model=resnet18.

    The model has random weights, `classes` outputs and no auxiliary heads.

    If images do not have three channels, the first convolution is replaced. Cut rules need ``algorithm.cuts``.
    """

    model: str = option("resnet18", "the model's name in torchvision.models")

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        models = torchvision.models
        available = models.list_models(module=models)
        if self.model not in available:
            raise OptionError(
                "model",
                f"={self.model}: no such classification model of torchvision"
                f"{nearest(self.model, available)} (for example {', '.join(available[:8])}, ...)",
            )
        accepted = inspect.signature(models.get_model_builder(self.model)).parameters
        extra: dict[str, object] = {"num_classes": classes}
        if self.model in ("googlenet", "inception_v3"):
            # With auxiliary heads, these models would return a tuple in training. Without ``init_weights=False``, their
            # initialisation would take minutes.
            extra |= {"aux_logits": False, "init_weights": False}
        if "image_size" in accepted or self.model.startswith("vit"):
            extra["image_size"] = input_shape[1]
        model = models.get_model(self.model, **extra)
        if input_shape[0] != 3:
            _replace_first_convolution(model, input_shape[0])
        return model


def _replace_first_convolution(model: torch_nn.Module, channels: int) -> None:
    first: tuple[str, Any] = next((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    path, old = first
    parent, _, name = path.rpartition(".")
    setattr(
        model.get_submodule(parent),
        name,
        nn.Conv2d(
            channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, old.groups, old.bias is not None
        ),
    )
