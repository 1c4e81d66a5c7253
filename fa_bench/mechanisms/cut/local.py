"""Rules with auxiliary layers and a local loss at every cut."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from fa_bench.errors import CoverageError, StateError, missing_method, names
from fa_bench.mechanisms.cut.positions import class_axis, mean_loss
from fa_bench.mechanisms.cut.rule import CapturedActivation, CutRule
from fa_bench.mechanisms.feedback_tensors import AUXILIARY_PREFIX
from fa_bench.mechanisms.updates import LearnedTensor
from fa_bench.utils.lazy import nn, torch
from fa_bench.utils.sampling import fill, seed_for

if TYPE_CHECKING:
    from torch import Tensor
    from torch import nn as torch_nn

    from fa_bench.mechanisms.trace import Trace


#: Part of torch's error message for batch normalisation with only one value per channel.
TOO_FEW = "Expected more than 1 value per channel"
#: Part of torch's error message for activations with another number of features than a linear layer has.
_MISMATCH = "shapes cannot be multiplied"


@dataclasses.dataclass(eq=False)
class LocalRule(CutRule):
    """A cut rule whose error at a cut is the gradient of a local loss; subclasses implement `auxiliary` and `local_loss`.

    No error crosses a cut, unless `crosses` is set. The auxiliary layers belong to the rule, but their parameters and buffers are
    also registered in the module at the cut, as ``feedback_auxiliary_...``. Therefore, ``model.parameters()`` and
    ``model.state_dict()`` contain these tensors, which follow the model to its device and dtype. The layers are not registered as
    submodules, because a container such as ``nn.Sequential`` would run them. ``rule.feedback_parameters()`` returns the auxiliary
    parameters, and ``rule.feedback`` lists them by cut. Local losses are scaled like the model's loss and, even under autocast,
    computed in the model's dtype.

    If the output has positions, each cut must have the same positions, and each position counts as a sample. The auxiliary layers
    then receive activations (M, F), where M is N times the number of positions.
    """

    reads_values = True
    same_positions = True
    scales = True
    needs_target = True
    #: Whether earlier versions of the rule saved the auxiliary layers in the rule's state. The model then accepts a state without
    #: them.
    had_older_states: ClassVar[bool] = True

    # -------------------------------------------------------------------------------------------- for subclasses
    def auxiliary(self, cut: str, shape: tuple[int, ...], classes: int) -> torch_nn.Module:
        """Create the auxiliary layers of one cut, on the CPU. Torch's global generator is seeded before this call and restored
        after it.

        Args:
            cut: the cut's module path.
            shape: the activation's shape without the batch.
            classes: number of classes.
        """
        raise missing_method(self, "auxiliary")

    def local_loss(self, cut: str, auxiliary: torch_nn.Module, activation: Tensor, target: Tensor) -> Tensor:
        """The scalar loss at one cut, which implementations can compute with `loss_of`.

        Args:
            cut: the cut's module path.
            auxiliary: its auxiliary layers.
            activation: (N, ...); (M, F) if the output has positions.
            target: the labels, (N,) or (N, P...).
        """
        raise missing_method(self, "local_loss")

    def loss_of(self, scores: Tensor, target: Tensor) -> Tensor:
        """The objective's mean loss for the scores (N, C) or, if the labels are (N, P...), for the scores (M, C) with one row for
        each position."""
        if target.dim() > 1:
            scores = scores.unflatten(0, target.shape)
            scores = scores.movedim(-1, class_axis(scores.shape))
        return mean_loss(self.objective, scores, target)

    # -------------------------------------------------------------------------------------------- attach and detach
    def make_feedback(self, features: dict[str, tuple[int, ...]], classes: int) -> None:
        self._auxiliary: dict[str, Auxiliary] = {}
        self._made_for = dict(features)
        like = next(self.model.parameters())
        for cut, shape in features.items():
            with _seeded(seed_for(self.seed, cut, "auxiliary")):
                net = self.auxiliary(cut, shape, classes)
            net = net.to(like.device, like.dtype)
            self._auxiliary[cut] = Auxiliary(cut, self._cut_modules[cut], net, self._witness, self.had_older_states)

    def unwire(self) -> None:
        for auxiliary in getattr(self, "_auxiliary", {}).values():
            auxiliary.unregister()
        self._auxiliary = {}
        super().unwire()

    def auxiliary_at(self, cut: str) -> torch_nn.Module:
        """The auxiliary layers of one cut, with the tensors that the model currently holds."""
        return self._auxiliary[cut].net()

    # -------------------------------------------------------------------------------------------- training
    def learned_at(self, cut: str) -> list[LearnedTensor]:
        return self._auxiliary[cut].learned

    def error_and_gradients(
        self, cut: str, captured: CapturedActivation, broadcast: Tensor, delta: Tensor, target: Tensor | None, learns: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        assert target is not None
        net, dtype = self.auxiliary_at(cut), next(self.model.parameters()).dtype
        learned = [one.tensor for one in self.learned_at(cut)] if learns else []
        required = [tensor for tensor in learned if tensor.requires_grad]
        with torch.enable_grad():
            activation = captured.tensor.detach().to(dtype).requires_grad_(True)
            rows = self._layouts[cut].rows(activation).flatten(0, -2) if self._layouts else activation
            try:
                loss = self.local_loss(cut, net, rows, target)
            except RuntimeError as error:
                shape = tuple(rows.shape[1:])
                if shape == self._made_for[cut] or _MISMATCH not in str(error):
                    raise
                raise CoverageError(
                    f"cut '{cut}' has activations of shape {shape}, but its auxiliary layers were created for "
                    f"{self._made_for[cut]}; attach with a sample_input of the same size as the training data"
                ) from error
            error, *gradients = torch.autograd.grad(loss, [activation, *required])
        if self.loss_factor != 1:
            error, gradients = error * self.loss_factor, [gradient * self.loss_factor for gradient in gradients]
        remaining = iter(gradients)
        return error, [next(remaining) if tensor.requires_grad else None for tensor in learned]

    # -------------------------------------------------------------------------------------------- feedback, metrics
    def learned_feedback(self) -> list[LearnedTensor]:
        return [one for auxiliary in self._auxiliary.values() for one in auxiliary.learned]

    @property
    def feedback(self) -> dict[str, dict[str, Tensor]]:
        return {cut: {**fixed, **dict(self.auxiliary_at(cut).named_parameters())} for cut, fixed in super().feedback.items()}

    def readouts(self) -> dict[str, Tensor]:
        """An empty dictionary, because no cut has a matrix B that projects errors of the output."""
        return {}

    def weight_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """An empty dictionary, because no layer's backward pass uses feedback."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the auxiliary layers from a state saved by an earlier version; newer versions save them in the model's state."""
        states = {cut: dict(auxiliary.net().state_dict()) for cut, auxiliary in self._auxiliary.items()} if state else {}
        self.require_entries(state, {cut: tensors for cut, tensors in states.items() if tensors})
        for cut, auxiliary in self._auxiliary.items():
            if cut in state:
                auxiliary.load(state[cut])
            elif auxiliary.is_missing:
                raise StateError(
                    f"neither the model's state nor that of rule '{self.name}' has the auxiliary layers of cut '{cut}'"
                )


class Auxiliary:
    """The auxiliary layers of one cut, whose parameters and buffers are registered in the module at the cut.

    Args:
        cut: the cut's path.
        module: the module at the cut.
        net: the layers.
        witness: the layer of the model whose weight shows whether an update has happened.
        had_older_states: whether the model accepts a state without these tensors, which earlier versions saved elsewhere.

    Attributes:
        tensors: name of a tensor in the module -> the dictionaries of the module and of the net that contain it, and its name in
            the net.
        learned: the parameters, each as a `LearnedTensor`.
        is_missing: whether the model has loaded a state without these tensors.
    """

    def __init__(
        self,
        cut: str,
        module: torch_nn.Module,
        net: torch_nn.Module,
        witness: torch_nn.Module | None,
        had_older_states: bool = True,
    ) -> None:
        self._net = net
        self.is_missing = False
        self.tensors: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {}
        self.learned: list[LearnedTensor] = []
        #: For tensors that layers of the net share: the dictionary of the net, the name in it, and the key in `tensors`.
        self._shared: list[tuple[dict[str, Any], str, str]] = []
        keys: dict[int, str] = {}
        for path, part in net.named_modules():
            for source in ("_parameters", "_buffers"):
                for name, tensor in getattr(part, source).items():
                    if tensor is None:
                        continue
                    if (known := keys.get(id(tensor))) is not None:
                        self._shared.append((getattr(part, source), name, known))
                        continue
                    key = AUXILIARY_PREFIX + "_".join([*path.split("."), name] if path else [name])
                    while key in self.tensors:  # as for a.b and a_b
                        key += "_"
                    keys[id(tensor)] = key
                    if source == "_parameters":
                        module.register_parameter(key, tensor)
                        self.learned.append(LearnedTensor(cut, module, key, witness))
                    else:
                        module.register_buffer(key, tensor)
                    self.tensors[key] = (getattr(module, source), getattr(part, source), name)
        self._hook = module.register_load_state_dict_pre_hook(self._accept_older_state) if had_older_states else None

    def net(self) -> torch_nn.Module:
        """The layers, with the tensors that the module currently holds. Loading a state may have replaced them."""
        for key, (of_module, of_net, name) in self.tensors.items():
            tensor = of_module[key]
            if of_net[name] is not tensor:
                of_net[name] = tensor
        for of_net, name, key in self._shared:
            of_net[name] = self.tensors[key][0][key]
        return self._net

    def load(self, state: dict[str, Any]) -> None:
        """Load a saved state of the layers."""
        self.net().load_state_dict(state)
        self.is_missing = False

    def unregister(self) -> None:
        """Remove the tensors from the module."""
        if self._hook is not None:
            self._hook.remove()
        for key, (of_module, _, _) in self.tensors.items():
            of_module.pop(key, None)

    def _accept_older_state(self, module: Any, state: dict[str, Any], prefix: str, *others: Any) -> None:
        """Let the model load a state without the tensors, which earlier versions saved in the rule's state."""
        missing = [key for key in self.tensors if prefix + key not in state]
        self.is_missing = len(missing) == len(self.tensors) > 0
        if self.is_missing:
            state.update({prefix + key: self.tensors[key][0][key].detach() for key in missing})


class ModuleRule(LocalRule):
    """A local rule that trains each of the model's blocks, here called modules, as a unit. The last module is trained with the
    model's own loss.

    If `cuts` or ``model.blocks`` names a block that feeds the output layer, the block gets no cut and is part of the last module.
    """

    within = "block"
    #: What error messages call an auxiliary network.
    net_name = "auxiliary net"
    #: The remedy in the error message for batches that are too small for batch normalisation.
    larger_batches = "use larger batches, or drop the last incomplete one"

    def local_loss(self, cut: str, auxiliary: torch_nn.Module, activation: Tensor, target: Tensor) -> Tensor:
        try:
            return self.loss_of(auxiliary(activation), target)
        except ValueError as error:
            if TOO_FEW not in str(error):
                raise
            raise ValueError(
                f"rule '{self.name}': the {self.net_name} at '{cut}' has batch normalisation, which needs at "
                f"least two samples in a batch; {self.larger_batches} ({error})"
            ) from error

    def choose_cuts(self, cuts: tuple[str, ...], trace: Trace) -> tuple[str, ...]:
        last = {path for path, consumer in trace.consumer.items() if consumer in trace.outputs}
        chosen = tuple(cut for cut in cuts if last.isdisjoint(trace.feeds.get(cut, ())))
        if not chosen:
            raise CoverageError(
                f"rule '{self.name}' needs at least two modules, but {names(cuts)} already feeds the output "
                f"layer {names(trace.outputs)}; name the ends of earlier modules in cuts or in model.blocks"
            )
        return chosen


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A context in which torch's global CPU generator has this seed and the CPU is the default device. On exit, the generator's
    earlier state is restored."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_rng_state(state)


# ------------------------------------------------------------------------------------------------ auxiliary layers
def map_module(name: str, cut: str, shape: tuple[int, ...]) -> Any:
    """The class of ``torch.nn`` for maps of this shape, (C, ...) with one to three spatial dimensions. For the name Conv and two
    dimensions, for example, the class is ``nn.Conv2d``.

    Raises:
        CoverageError: for maps with more dimensions.
    """
    dims = len(shape) - 1
    if dims > 3:
        raise CoverageError(f"cut '{cut}' has activations of shape {shape}; local losses take (F,) or maps of 1 to 3 dimensions")
    return getattr(nn, f"{name}{dims}d")


def pooled_size(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """The spatial size to which a map (C, ...) is pooled. The dimensions are halved in turn, rounding up, until the map has at
    most `limit` features or a single position.

    The size is empty for flat activations (F,).
    """
    channels, *size = shape
    factors, axis = [1] * len(size), 0

    def halved() -> list[int]:
        return [math.ceil(length / factor) for length, factor in zip(size, factors, strict=True)]

    while channels * math.prod(halved()) > limit and max(halved(), default=1) > 1:
        factors[axis] *= 2
        axis = (axis + 1) % len(size)
    return tuple(halved())


def linear_classifier(
    cut: str, shape: tuple[int, ...], classes: int, limit: int, init: str, bias: bool = True
) -> torch_nn.Module:
    """A linear classifier for the activation of one cut. Maps are first average-pooled to the size from `pooled_size`.

    Args:
        cut: the cut's module path.
        shape: the activation's shape without the batch.
        classes: number of classes.
        limit: as for `pooled_size`.
        init: initialiser of its weight, the parameter ``out.weight``, which is sampled from torch's global generator.
        bias: whether it has a bias, the parameter ``out.bias``, which has torch's initial value.
    """
    layers, count = flattening(cut, shape, limit)
    layers["out"] = out = nn.Linear(count, classes, bias=bias)
    if init == "zeros":  # draws no random numbers, so later layers are initialised as in earlier versions
        nn.init.zeros_(out.weight)
    elif init != "pytorch":  # torch has already initialised the weight in this way
        fill(out.weight, init)
    return nn.Sequential(layers)


def flattening(cut: str, shape: tuple[int, ...], limit: int) -> tuple[OrderedDict[str, torch_nn.Module], int]:
    """Layers that average-pool a map to the size from `pooled_size` and flatten it, together with the number of features that
    they return."""
    layers: OrderedDict[str, torch_nn.Module] = OrderedDict()
    size = pooled_size(shape, limit)
    if size != shape[1:]:
        layers["pool"] = map_module("AdaptiveAvgPool", cut, shape)(size)
    layers["flatten"] = nn.Flatten()
    return layers, shape[0] * math.prod(size)
