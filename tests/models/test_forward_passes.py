"""One forward pass of every published net equals that of the net written out by hand, in training and in evaluation mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fa_bench.models.nets.transformer import PatchEmbedding
from fa_bench.registry.registries import ARCHITECTURES

from . import by_hand
from .by_hand import ByHand

Shape = tuple[int, int, int]
Reference = Callable[..., Tensor]

#: Shapes of images: the published ones, and one of 36x28, which has different sides and gives odd sizes in the third stage.
#: CLASSES is the number of classes.
MNIST, CIFAR, ODD, CLASSES = (1, 28, 28), (3, 32, 32), (3, 36, 28), 10

#: Maps the name of a case to the architecture, its options, the shape of an image, the net written by hand, and its arguments.
#: Large nets are narrower than published; `test_layer_shapes_match_published_networks` checks their widths.
CASES: dict[str, tuple[str, dict[str, Any], Shape, Reference, dict[str, Any]]] = {
    "pfa_fig2": ("mlp", {"init": "xavier_uniform"}, MNIST, by_hand.mlp, {"hidden": 2}),
    "dkp_fig2": ("mlp", {"widths": [512] * 4, "batch_norm": True}, MNIST, by_hand.mlp, {"hidden": 4, "batch_norm": True}),
    "asap_fig6, linear": (
        "mlp",
        {"widths": [10] * 3, "activation": "identity", "init": "kaiming_uniform"},
        MNIST,
        by_hand.mlp,
        {"hidden": 3, "activation": "identity"},
    ),
    "asap_fig6, nonlinear": (
        "mlp",
        {"widths": [10] * 3, "batch_norm": True, "output_norm": True},
        MNIST,
        by_hand.mlp,
        {"hidden": 3, "batch_norm": True, "output_norm": True},
    ),
    **{
        f"mlp, {name}": ("mlp", {"widths": [9, 8], "activation": name}, (2, 4, 3), by_hand.mlp, {"hidden": 2, "activation": name})
        for name in by_hand.ACTIVATIONS
    },
    "mlp, output_norm": ("mlp", {"widths": [7], "output_norm": True}, (2, 4, 3), by_hand.mlp, {"hidden": 1, "output_norm": True}),
    "conv2, 28x28": ("conv2", {}, MNIST, by_hand.conv2, {"padding": 1}),
    "conv2, 32x32": ("conv2", {}, CIFAR, by_hand.conv2, {"padding": 0}),
    "conv2, other size": ("conv2", {"channels": 4}, ODD, by_hand.conv2, {"padding": 1}),
    "conv2, one side of 32": ("conv2", {"channels": 4}, (1, 32, 28), by_hand.conv2, {"padding": 1}),
    "conv2, other side of 32": ("conv2", {"channels": 4}, (1, 28, 32), by_hand.conv2, {"padding": 1}),
    "conv2, odd maps": ("conv2", {"channels": 4}, (2, 7, 9), by_hand.conv2, {"padding": 1}),
    "conv2, padding=2": ("conv2", {"channels": 4, "padding": 2}, CIFAR, by_hand.conv2, {"padding": 2}),
    "asap_alexnet, 28x28": ("asap_alexnet", {"width": 8, "hidden": 32}, MNIST, by_hand.asap_alexnet, {}),
    "asap_alexnet, 32x32": ("asap_alexnet", {"width": 16, "hidden": 64}, CIFAR, by_hand.asap_alexnet, {}),
    "asap_alexnet, output_norm=false": (
        "asap_alexnet",
        {"width": 4, "hidden": 8, "output_norm": False},
        ODD,
        by_hand.asap_alexnet,
        {"output_norm": False},
    ),
    "dkp_alexnet": ("dkp_alexnet", {"width": 8, "hidden": 64}, (3, 224, 224), by_hand.dkp_alexnet, {}),
    "dkp_alexnet, options": (
        "dkp_alexnet",
        {"width": 4, "hidden": 32, "dropout": 0.3, "linear_norm": False},
        (1, 97, 127),
        by_hand.dkp_alexnet,
        {"dropout": 0.3, "linear_norm": False},
    ),
    "resnet20": ("resnet20", {}, CIFAR, by_hand.resnet20, {}),
    "resnet20, shortcuts=false": (
        "resnet20",
        {"width": 4, "blocks": 2, "shortcuts": False},
        ODD,
        by_hand.resnet20,
        {"blocks": 2, "shortcuts": False},
    ),
    "resnet20, odd maps": ("resnet20", {"width": 6, "blocks": 1}, ODD, by_hand.resnet20, {"blocks": 1}),
    "resnet18": ("resnet18", {"width": 8}, CIFAR, by_hand.resnet_cifar, {"blocks": [2, 2, 2, 2]}),
    "resnet18, shortcuts=false": (
        "resnet18",
        {"width": 8, "shortcuts": False},
        CIFAR,
        by_hand.resnet_cifar,
        {"blocks": [2, 2, 2, 2], "shortcuts": False},
    ),
    "resnet18, output_norm=false": (
        "resnet18",
        {"width": 4, "blocks": [1, 2], "output_norm": False},
        ODD,
        by_hand.resnet_cifar,
        {"blocks": [1, 2], "output_norm": False},
    ),
    "resnet34": ("resnet34", {"width": 4}, (3, 64, 64), by_hand.resnet_cifar, {"blocks": [3, 4, 6, 3]}),
    "resnet34, shortcuts=false": (
        "resnet34",
        {"width": 4, "shortcuts": False},
        (3, 64, 64),
        by_hand.resnet_cifar,
        {"blocks": [3, 4, 6, 3], "shortcuts": False},
    ),
    **{
        f"{name}, bn={bn}": (
            name,
            {"width": 4} | chosen,
            (3, 96, 64),
            by_hand.resnet_imagenet,
            {"blocks": blocks, "bottleneck": bottleneck, "bn": bn},
        )
        for name, blocks, bottleneck in (("resnet18_imagenet", [2, 2, 2, 2], False), ("resnet50_imagenet", [3, 4, 6, 3], True))
        for bn, chosen in (("before", {}), ("after", {"bn": "after"}))
    },
    "resnet_cifar_small": (
        "resnet_cifar_small",
        {"depth": 26, "width": 4, "shortcuts": False},
        ODD,
        by_hand.resnet20,
        {"blocks": 4, "shortcuts": False},
    ),
    "vgg": ("vgg", {"width": 4}, CIFAR, by_hand.vgg, {"convolutions": "pppp", "activation": "gelu"}),
    "vgg, depth=7": ("vgg", {"depth": 7, "width": 4}, (3, 36, 44), by_hand.vgg, {"convolutions": "p.pvpv", "activation": "gelu"}),
    "vgg, depth=9": (
        "vgg",
        {"depth": 9, "width": 4, "activation": "tanh"},
        CIFAR,
        by_hand.vgg,
        {"convolutions": "p.p.p.p.", "activation": "tanh"},
    ),
    "vgg, depth=16": (
        "vgg",
        {"depth": 16, "width": 4},
        (3, 32, 64),
        by_hand.vgg,
        {"convolutions": ".p.p..p..p..p", "activation": "relu"},
    ),
    "vgg, batch_norm=true": (
        "vgg",
        {"width": 4, "batch_norm": True},
        ODD,
        by_hand.vgg,
        {"convolutions": "pppp", "activation": "gelu", "batch_norm": True},
    ),
    "residual_mlp": ("residual_mlp", {}, CIFAR, by_hand.residual_mlp, {"blocks": 4}),
    "residual_mlp, final_norm=false": (
        "residual_mlp",
        {"width": 6, "blocks": 2, "expansion": 1.5, "activation": "tanh", "final_norm": False},
        (2, 4, 3),
        by_hand.residual_mlp,
        {"blocks": 2, "activation": "tanh", "final_norm": False},
    ),
    "vit_mini": ("vit_mini", {"width": 12}, CIFAR, by_hand.vit_mini, {"patch": 4, "blocks": 4, "heads": 4}),
    "vit_mini, patch=2": (
        "vit_mini",
        {"width": 6, "patch": 2, "blocks": 1, "heads": 3, "activation": "relu"},
        (2, 4, 6),
        by_hand.vit_mini,
        {"patch": 2, "blocks": 1, "heads": 3, "activation": "relu"},
    ),
    **{
        f"lstm, cell={cell}, scan={scan}": (
            "lstm",
            {"width": 5, "layers": 2, "cell": cell, "scan": scan},
            (2, 4, 3),
            by_hand.recurrent,
            {"cell": cell, "layers": 2, "scan": scan},
        )
        for cell in ("lstm", "gru", "rnn")
        for scan in ("rows", "pixels")
    },
}


def build(architecture: str, options: dict[str, Any], shape: Shape) -> nn.Module:
    """Build the model in float64, with random values for tensors that are initialised to zeros or ones, so that errors are
    visible."""
    torch.manual_seed(0)
    net = ARCHITECTURES[architecture](**options).build(shape, CLASSES).double()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        elif isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        elif isinstance(module, PatchEmbedding):
            nn.init.normal_(module.token)
        elif isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.normal_(module.bias)
    return net


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", CASES)
def test_forward_pass_matches_reference(case: str, training: bool) -> None:
    """Over fifty layers, the rounding errors of float64 grow to about 1e-12, whereas a wrong layer changes the first digits."""
    architecture, options, shape, reference, arguments = CASES[case]
    net = build(architecture, options, shape).train(training)
    x = torch.randn(5, *shape, dtype=torch.float64)
    written_out = ByHand(net)
    torch.manual_seed(1)
    expected = reference(written_out, x, **arguments)
    torch.manual_seed(1)  # so that the dropout masks are the same
    logits = net(x)
    assert logits.shape == (5, CLASSES) and logits.std() > 0.01
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-9, atol=1e-9)
    # Running statistics change only in training mode.
    torch.testing.assert_close(dict(net.state_dict()), written_out.tensors, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [case for case, (name, *_) in CASES.items() if name == "dkp_alexnet"])
def test_dropout_is_active_only_in_training(case: str) -> None:
    architecture, options, shape, *_ = CASES[case]
    net, x = build(architecture, options, shape), torch.randn(4, *shape, dtype=torch.float64)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def stages(widths: list[int], blocks: list[int], kernels: tuple[int, ...], factor: int, projects: bool) -> list[tuple[int, ...]]:
    """The weight shapes of residual stages with these widths; the stem has the width of the first stage."""
    shapes, channels = [], widths[0]
    for width, count in zip(widths, blocks, strict=True):
        for _ in range(count):
            out, before = width * factor, channels
            outs = [width] * (len(kernels) - 1) + [out]
            for kernel, wide in zip(kernels, outs, strict=True):
                shapes.append((wide, before, kernel, kernel))
                before = wide
            shapes += [(out, channels, 1, 1)] if projects and out != channels else []
            channels = out
    return shapes


def chain(*channels: int) -> list[tuple[int, ...]]:
    """The weight shapes of 3x3 convolutions."""
    return [(out, before, 3, 3) for before, out in itertools.pairwise(channels)]


DOUBLING = [64, 128, 256, 512]
BASIC, BOTTLENECK = (3, 3), (1, 3, 1)
STEM, LARGE_STEM = [(64, 3, 3, 3)], [(64, 3, 7, 7)]
#: Pairs an architecture, its options and the image shape with the shapes of all weights in order, from the papers.
PUBLISHED: list[tuple[str, dict[str, Any], Shape, list[tuple[int, ...]]]] = [
    ("mlp", {}, MNIST, [(512, 784), (512, 512), (10, 512)]),
    ("conv2", {}, MNIST, [(32, 1, 3, 3), (32, 32, 3, 3), (128, 6272), (10, 128)]),
    ("conv2", {}, CIFAR, [(32, 3, 3, 3), (32, 32, 3, 3), (128, 6272), (10, 128)]),
    ("asap_alexnet", {}, MNIST, [(64, 1, 5, 5), (128, 64, 5, 5), (256, 128, 5, 5), (1024, 4096), (1024, 1024), (10, 1024)]),
    ("asap_alexnet", {}, CIFAR, [(64, 3, 5, 5), (128, 64, 5, 5), (256, 128, 5, 5), (1024, 4096), (1024, 1024), (10, 1024)]),
    (
        "dkp_alexnet",
        {},
        (3, 224, 224),
        [
            (64, 3, 11, 11),
            (192, 64, 5, 5),
            (384, 192, 3, 3),
            (256, 384, 3, 3),
            (256, 256, 3, 3),
            (4096, 9216),
            (4096, 4096),
            (10, 4096),
        ],
    ),
    ("resnet20", {}, CIFAR, [(16, 3, 3, 3), *stages([16, 32, 64], [3] * 3, BASIC, 1, False), (10, 64)]),
    ("resnet18", {}, CIFAR, [*STEM, *stages(DOUBLING, [2] * 4, BASIC, 1, True), (10, 512)]),
    ("resnet18", {"shortcuts": False}, CIFAR, [*STEM, *stages(DOUBLING, [2] * 4, BASIC, 1, False), (10, 512)]),
    ("resnet34", {}, CIFAR, [*STEM, *stages(DOUBLING, [3, 4, 6, 3], BASIC, 1, True), (10, 512)]),
    ("resnet18_imagenet", {}, (3, 224, 224), [*LARGE_STEM, *stages(DOUBLING, [2] * 4, BASIC, 1, True), (10, 512)]),
    ("resnet50_imagenet", {}, (3, 224, 224), [*LARGE_STEM, *stages(DOUBLING, [3, 4, 6, 3], BOTTLENECK, 4, True), (10, 2048)]),
    ("resnet_cifar_small", {"depth": 56}, CIFAR, [(16, 3, 3, 3), *stages([16, 32, 64], [9] * 3, BASIC, 1, False), (10, 64)]),
    ("vgg", {}, CIFAR, [*chain(3, 128, 256, 512, 512), (10, 2048)]),
    ("vgg", {"depth": 7}, CIFAR, [*chain(3, 128, 128, 256, 256, 512, 512), (10, 512)]),
    ("vgg", {"depth": 9}, CIFAR, [*chain(3, 128, 128, 256, 256, 512, 512, 512, 512), (10, 2048)]),
    ("vgg", {"depth": 16}, CIFAR, [*chain(3, 64, 64, 128, 128, *[256] * 3, *[512] * 6), (10, 512)]),
    ("residual_mlp", {}, CIFAR, [(256, 3072), *[(1024, 256), (256, 1024)] * 4, (10, 256)]),
    (
        "vit_mini",
        {},
        CIFAR,
        [(1, 1, 128), (65, 128), (128, 3, 4, 4), *[*[(128, 128)] * 4, (512, 128), (128, 512)] * 4, (10, 128)],
    ),
]


@pytest.mark.parametrize(("name", "options", "shape", "expected"), PUBLISHED)
def test_layer_shapes_match_published_networks(
    name: str, options: dict[str, Any], shape: Shape, expected: list[tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        net = ARCHITECTURES[name](**options).build(shape, CLASSES)
    assert [tuple(weight.shape) for weight in net.parameters() if weight.dim() > 1] == expected


@pytest.mark.parametrize(("name", "options", "shape"), [case[:3] for case in PUBLISHED])
def test_only_resnet_convolutions_have_no_bias(name: str, options: dict[str, Any], shape: Shape) -> None:
    """The convolutions of residual nets have no biases in torchvision and in the code of the PFA paper. The nets that the code of
    the ASAP paper uses for backpropagation have none, either."""
    with torch.device("meta"):
        net = ARCHITECTURES[name](**options).build(shape, CLASSES)
    for layer in (module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)):
        assert (layer.bias is None) == (name.startswith("resnet") and isinstance(layer, nn.Conv2d)), layer
