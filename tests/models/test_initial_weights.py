"""The initial weights of all architectures except torchvision's have the bounds or standard deviations of their distribution, and
biases are zero unless init=pytorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fa_bench.mechanisms.weighted_layers import weighted_layers
from fa_bench.models.base import Architecture
from fa_bench.registry.options import option_fields
from fa_bench.registry.registries import ARCHITECTURES

#: Small nets whose layers have different fans, with the shape of an image or the length of a sequence.
NETS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "mlp": ({"widths": [90, 30], "batch_norm": True, "output_norm": True}, (1, 10, 16)),
    "conv2": ({"channels": 24, "hidden": 40}, (3, 28, 28)),
    "asap_alexnet": ({"width": 24, "hidden": 40}, (3, 32, 32)),
    "dkp_alexnet": ({"width": 8, "hidden": 40}, (3, 96, 96)),
    "resnet20": ({"width": 24, "blocks": 1}, (3, 32, 32)),
    "resnet18": ({"width": 24, "blocks": [1, 1, 1]}, (3, 32, 32)),
    "resnet34": ({"width": 24, "blocks": [1, 1, 1]}, (3, 32, 32)),
    "resnet18_imagenet": ({"width": 24, "blocks": [1, 1, 1]}, (3, 64, 64)),
    "resnet50_imagenet": ({"width": 24, "blocks": [1, 1]}, (3, 64, 64)),
    "resnet_cifar_small": ({"width": 24, "depth": 8}, (3, 32, 32)),
    "vgg": ({"width": 24, "batch_norm": True}, (3, 32, 32)),
    "residual_mlp": ({"width": 24, "blocks": 1}, (3, 8, 8)),
    "vit_mini": ({"width": 24, "blocks": 1}, (3, 8, 8)),
    "decoder": ({"width": 24, "depth": 1}, (30,)),
    "lstm": ({"width": 24}, (30,)),
}
#: The standard deviations of weights outside of linear layers and convolutions; `init` does not change them.
OTHERS: dict[str, dict[str, float]] = {
    "vit_mini": {"embed.token": 0.0, "embed.positions": 0.02},
    "decoder": {"embed.tokens.weight": 0.02, "embed.positions": 0.02},
    "lstm": {"read.weight": 1.0, **{f"rnn.weight_{kind}_l0": 1 / math.sqrt(3 * 24) for kind in ("ih", "hh")}},
}
CLASSES = 20

Deviation = Callable[[int, int], float]
#: Maps an initialiser to its standard deviation, as a function of fan-in and fan-out (which include kernel positions), and to
#: True if it is uniform. The method xavier_uniform is that of Glorot and Bengio 2010, which the PFA paper uses. The methods
#: kaiming_uniform and kaiming_normal are those of He et al. 2015, with the fan-in and the fan-out, respectively. The latter is
#: used in torchvision's ResNets and therefore in the WM experiments. The method pytorch is torch's own, uniform within 1/√fan_in.
DRAWS: dict[str, tuple[Deviation, bool]] = {
    "pytorch": (lambda fan_in, fan_out: 1 / math.sqrt(3 * fan_in), True),
    "xavier_uniform": (lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)), True),
    "kaiming_uniform": (lambda fan_in, fan_out: math.sqrt(2 / fan_in), True),
    "kaiming_normal": (lambda fan_in, fan_out: math.sqrt(2 / fan_out), False),
    "kaiming_normal_fan_out": (lambda fan_in, fan_out: math.sqrt(2 / fan_out), False),
    "xavier_normal": (lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)), False),
    "normal_fan_sum": (lambda fan_in, fan_out: math.sqrt(1 / (fan_in + fan_out)), False),
    "normal_fan_out": (lambda fan_in, fan_out: math.sqrt(1 / fan_out), False),
    "lecun_uniform": (lambda fan_in, fan_out: math.sqrt(1 / fan_in), True),
    "uniform_one": (lambda fan_in, fan_out: math.sqrt(1 / 3), True),
}


def build(name: str, init: str) -> nn.Module:
    options, shape = NETS[name]
    torch.manual_seed(0)
    return ARCHITECTURES[name](init=init, **options).build(shape, CLASSES)


def check_draw(weight: Tensor, deviation: float, uniform: bool) -> None:
    """Check the standard deviation and the mean to within five standard errors, and check the largest value.

    The relative standard error of the standard deviation is √((κ - 1)/4n), where the kurtosis κ is 9/5 for uniform and 3 for
    normal draws. The largest of n uniform draws lies below 1 - 20/n of the bound with a probability of e^-20. Normal draws are
    unbounded. Of 400 or more normal draws, some exceed 1.2 √3 standard deviations, because 4 % of all draws do.
    """
    n = weight.numel()
    assert n >= 400
    kurtosis = 9 / 5 if uniform else 3
    assert weight.std().item() == pytest.approx(deviation, rel=5 * math.sqrt((kurtosis - 1) / (4 * n)))
    assert abs(weight.mean().item()) < 5 * deviation / math.sqrt(n)
    largest = weight.abs().max().item() / (math.sqrt(3) * deviation)
    # The bound itself is rounded to float32, with a relative error below 1e-6.
    assert 1 - 20 / n < largest <= 1 + 1e-6 if uniform else largest > 1.2


def test_every_architecture_and_every_initialiser_is_tested() -> None:
    [init] = [field for field in option_fields(Architecture) if field.name == "init"]
    assert set(NETS) == set(ARCHITECTURES) - {"torchvision"} and set(DRAWS) | {"zeros"} == set(init.metadata["choices"])


@pytest.mark.parametrize("init", DRAWS)
@pytest.mark.parametrize("name", NETS)
def test_initial_weights_match_distribution(name: str, init: str) -> None:
    net = build(name, init)
    deviation, uniform = DRAWS[init]
    layers = weighted_layers(net)
    others = {name for name, parameter in net.named_parameters() if parameter.dim() > 1} - {f"{path}.weight" for path in layers}
    assert others == OTHERS.get(name, {}).keys()
    for layer in layers:
        module = net.get_submodule(layer)
        positions = math.prod(module.weight.shape[2:])
        fan_in, fan_out = module.weight.shape[1] * positions, module.weight.shape[0] * positions
        check_draw(module.weight.detach(), deviation(fan_in, fan_out), uniform)
        if module.bias is None:
            continue
        if init == "pytorch":
            assert 0.5 < module.bias.abs().max().item() * math.sqrt(fan_in) <= 1 + 1e-6
        else:
            assert not module.bias.any()


@pytest.mark.parametrize("init", DRAWS)
@pytest.mark.parametrize("name", NETS)
def test_normalisation_layers_start_as_identity(name: str, init: str) -> None:
    norms = [
        module for module in build(name, init).modules() if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm)
    ]
    assert norms or name == "lstm"
    for norm in norms:
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
        if isinstance(norm, nn.LayerNorm):
            assert norm.eps == 1e-5
            continue
        assert (norm.running_mean == 0).all() and (norm.running_var == 1).all()
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)


@pytest.mark.parametrize("name", OTHERS)
def test_embeddings_positions_and_recurrent_weights_ignore_init(name: str) -> None:
    """The weights are the same for every initialiser, and their standard deviation is correct to within five standard errors for
    normal draws."""
    weights, other = dict(build(name, "pytorch").named_parameters()), dict(build(name, "uniform_one").named_parameters())
    for key, deviation in OTHERS[name].items():
        value = weights[key].detach()
        assert value.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * value.numel()))
        assert torch.equal(value, other[key])


def test_token_embeddings_have_unit_std_with_sinusoidal_positions() -> None:
    torch.manual_seed(0)
    net = ARCHITECTURES["decoder"](width=24, depth=1, positions="sinusoidal").build((30,), CLASSES)
    assert net.embed.tokens.weight.std().item() == pytest.approx(1, rel=5 / math.sqrt(2 * 24 * CLASSES))


def test_layers_are_drawn_independently() -> None:
    """Weights that are sampled one after another are independent: the cosine of two sets of n = 5184 values has a standard
    deviation of 1/√n = 0.014."""
    for init in DRAWS:
        net = build("conv2", init)
        other = ARCHITECTURES["conv2"](init=init, **NETS["conv2"][0]).build(NETS["conv2"][1], CLASSES)  # sampled later
        a, b = net.conv2.weight.flatten(), other.conv2.weight.flatten()
        assert abs(torch.cosine_similarity(a, b, dim=0).item()) < 0.07
        assert torch.equal(a, build("conv2", init).conv2.weight.flatten())  # the global seed determines them


def test_torchvision_googlenet_uses_torch_default_init() -> None:
    """torchvision's own initialiser would take minutes. The largest of 4,096 numbers within 1/√fan_in is close to this bound."""
    weight = ARCHITECTURES["torchvision"](model="googlenet").build((3, 32, 32), 5).conv2.conv.weight
    assert 0.99 / math.sqrt(64) < weight.abs().max().item() <= 1 / math.sqrt(64)
