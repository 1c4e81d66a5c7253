"""The base class of architectures, which build a plain PyTorch model from their options."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from fa_bench.errors import missing_method
from fa_bench.registry.kinds import CLASSES, IMAGES, VALUES
from fa_bench.registry.options import Options, option
from fa_bench.utils.lazy import nn
from fa_bench.utils.sampling import CONTINUOUS, fill

if TYPE_CHECKING:
    from torch import nn as torch_nn

#: Former names of initialisers, which old configs may use.
OLD_NAMES = {"kaiming_normal": "kaiming_normal_fan_out"}

#: Activation function -> a function that creates its module; torch is imported when one of these functions is first called.
ACTIVATIONS = {
    "relu": lambda: nn.ReLU(),
    "leaky_relu": lambda: nn.LeakyReLU(0.01),
    "tanh": lambda: nn.Tanh(),
    "sigmoid": lambda: nn.Sigmoid(),
    "gelu": lambda: nn.GELU(),
    "identity": lambda: nn.Identity(),
}


@dataclasses.dataclass(eq=False)
class Architecture(Options):
    """Base class of architectures. Models are plain PyTorch modules and independent of the learning rules.

    A model may have an attribute ``cut_points`` that lists its cut points: the modules whose outputs are its hidden activations.
    A model may also have an attribute ``blocks`` that lists the last module of each block, in order; a block has one or more
    layers.

    Examples:
        >>> import dataclasses, math, torch, fa_bench
        >>> @dataclasses.dataclass(eq=False)
        ... class Line(fa_bench.Architecture):
        ...     def make(self, input_shape, classes):
        ...         return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(math.prod(input_shape), classes))
        >>> Line(init="zeros").build((1, 8, 8), 10)[1].weight.abs().max().item()
        0.0
    """

    #: The pairs of input kind and target kind (`fa_bench.registry.kinds`) that the architecture supports.
    tasks: ClassVar[tuple[tuple[str, str], ...]] = ((IMAGES, CLASSES), (IMAGES, VALUES))

    init: str = option(
        "pytorch",
        "initialiser of the weights; all except pytorch (PyTorch's default) also set biases to zero",
        choices=[*CONTINUOUS, *OLD_NAMES],
    )
    linear_init: str | None = option(None, "initialiser of the weights of fully connected layers; null: init", choices=CONTINUOUS)
    output_init: str | None = option(
        None,
        "initialiser of the weights of the output layer (the layer defined last); null: as specified by init and linear_init",
        choices=CONTINUOUS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init = OLD_NAMES.get(self.init, self.init)

    def build(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        """The model, with weights sampled from torch's global random state.

        Args:
            input_shape: the shape of one sample: (C, H, W) for images, (F,) for features, (T,) for tokens.
            classes: number of outputs of a sample or position; for tokens also the size of the vocabulary.

        Raises:
            OptionError: if the options do not fit the data.
        """
        model = self.make(input_shape, classes)
        layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))]
        for module in layers:
            init = self.linear_init if isinstance(module, nn.Linear) and self.linear_init is not None else self.init
            if module is layers[-1] and self.output_init is not None:
                init = self.output_init
            if init != "pytorch":  # `make` has already applied it
                fill(module.weight, init)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return model

    def make(self, input_shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        """The model, with PyTorch's default initial values in its linear layers and convolutions; each architecture must
        implement this method."""
        raise missing_method(self, "make")
