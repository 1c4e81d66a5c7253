"""Tests of the papers' architectures: published sizes, torchvision's outputs, cut points and blocks, and every rule on each of
them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fa_bench
from fa_bench.cli import main
from fa_bench.errors import ConfigError, CoverageError, OptionError
from fa_bench.registry.registries import ALGORITHMS, ARCHITECTURES

CIFAR, MNIST, IMAGENET = (3, 32, 32), (1, 28, 28), (3, 224, 224)
# dkp_alexnet adds batch normalisation of 64 + 192 + 384 + 256 + 256 channels to torchvision's AlexNet.
ALEXNET, GAINS = 61_100_840, 2 * 1152


@pytest.mark.parametrize(
    ("name", "options", "shape", "classes", "parameters"),
    [
        ("asap_alexnet", {}, CIFAR, 10, 6_289_438),
        ("asap_alexnet", {}, MNIST, 10, 6_289_438 - 2 * 25 * 64),  # one colour instead of three
        ("asap_alexnet", {"output_norm": False}, CIFAR, 10, 6_289_438 - 20),
        ("resnet18", {}, CIFAR, 10, 11_173_982),
        ("resnet34", {}, CIFAR, 10, 21_282_142),
        # The difference is three projections, with C_in C_out weights, and a gain and a bias for each output channel.
        ("resnet18", {"shortcuts": False}, CIFAR, 10, 11_173_982 - sum(2 * c * c + 4 * c for c in (64, 128, 256))),
        ("dkp_alexnet", {"linear_norm": False}, IMAGENET, 1000, ALEXNET + GAINS),
        ("dkp_alexnet", {}, IMAGENET, 1000, ALEXNET + GAINS + 4 * 4096),
        # The five-layer net of the direct Kolen-Pollack paper, with batch normalisation, and the linear net of the Forward
        # Alignment paper.
        ("mlp", {"widths": [512] * 4, "batch_norm": True}, MNIST, 10, 785 * 512 + 3 * 513 * 512 + 5130 + 8 * 512),
        ("mlp", {"widths": [10] * 3, "activation": "identity"}, MNIST, 10, 7850 + 330),
        # He et al. 2016, Table 6, gives 0.27, 0.46, 0.66, 0.85 and 1.7 million. Six more layers are two more convolutions of
        # every width.
        *[
            (
                "resnet_cifar_small",
                {"depth": depth},
                CIFAR,
                10,
                269_722 + (depth - 20) // 6 * sum(2 * 9 * c * c + 4 * c for c in (16, 32, 64)),
            )
            for depth in (20, 32, 44, 56)
        ],
        ("resnet_cifar_small", {"depth": 110}, CIFAR, 10, 1_727_962),
        ("resnet20", {}, CIFAR, 10, 269_722),
        # The 13 convolutions have 14,714,688 parameters with biases, as in torchvision's vgg16.
        ("vgg", {"depth": 16}, CIFAR, 10, 14_714_688 + 5130),
        ("vgg", {"depth": 16, "batch_norm": True}, CIFAR, 10, 14_728_266),
        ("vgg", {}, (3, 64, 64), 200, 3584 + 295_168 + 1_180_160 + 2_359_808 + (512 * 4 * 4 + 1) * 200),
        ("vgg", {"depth": 7}, (3, 64, 64), 200, 4_576_384 + (512 * 5 * 5 + 1) * 200),
        ("residual_mlp", {}, CIFAR, 10, 3073 * 256 + 4 * (512 + 257 * 1024 + 1025 * 256) + 512 + 2570),
        ("residual_mlp", {"final_norm": False, "blocks": 8}, CIFAR, 10, 3073 * 256 + 8 * (512 + 257 * 1024 + 1025 * 256) + 2570),
        ("vit_mini", {}, CIFAR, 10, 49 * 128 + 66 * 128 + 4 * (512 + 4 * 129 * 128 + 129 * 512 + 513 * 128) + 256 + 1290),
        ("lstm", {"layers": 2}, MNIST, 10, 4 * 128 * (28 + 128 + 2 + 2 * 128 + 2) + 1290),
        ("lstm", {"cell": "gru", "scan": "pixels"}, (3, 5, 4), 10, 3 * 128 * (3 + 128 + 2) + 1290),
    ],
)
def test_parameter_counts_match_published_sizes(
    name: str, options: dict[str, Any], shape: tuple[int, int, int], classes: int, parameters: int
) -> None:
    with torch.device("meta"):
        net = ARCHITECTURES[name](**options).build(shape, classes)
        assert net(torch.zeros(2, *shape)).shape == (2, classes)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_outputs_match_torchvision(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=7)
    ours = ARCHITECTURES[f"{name}_imagenet"]().build((3, 64, 64), 7)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))  # the running statistics afterwards are equal, too
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name", ["resnet18", "alexnet"])
def test_grey_images_change_only_channels_of_first_convolution(name: str) -> None:
    """resnet18's first convolution has no bias, and alexnet's has one."""
    theirs = getattr(torchvision.models, name)(num_classes=7)
    ours = ARCHITECTURES["torchvision"](model=name).build((1, 64, 64), 7)
    first, *others = [(key, tensor.shape) for key, tensor in theirs.state_dict().items()]
    key, (outputs, _, *kernel) = first
    assert [(name, tensor.shape) for name, tensor in ours.state_dict().items()] == [(key, (outputs, 1, *kernel)), *others]
    conv, other = ours.get_submodule(key.removesuffix(".weight")), theirs.get_submodule(key.removesuffix(".weight"))
    assert (conv.stride, conv.padding) == (other.stride, other.padding)


def test_batch_norm_after_relu_matches_reference() -> None:
    """A block with a projection is written out as conv - ReLU - BN twice, plus the shortcut, with nothing after the sum."""
    torch.manual_seed(0)
    net = ARCHITECTURES["resnet18_imagenet"](width=3, blocks=[1, 1], bn="after").build((3, 32, 32), 4)
    block, x = net.get_submodule("stages.layer2.0"), torch.randn(5, 3, 6, 6)
    y = block.bn1(block.conv1(x).relu())
    y = block.bn2(block.conv2(y).relu()) + block.shortcut.bn(block.shortcut.conv(x))
    assert torch.equal(block(x), y) and y.min() < 0
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(6), atol=1e-6, rtol=0)  # both summands are normalised
    image = torch.randn(5, 3, 32, 32)
    stem = nn.functional.max_pool2d(net.bn1(net.conv1(image).relu()), 3, 2, 1)
    assert torch.equal(net(image), net.fc(net.stages(stem).mean((2, 3))))


def test_resnet_without_shortcuts_is_sequential() -> None:
    torch.manual_seed(0)
    net = ARCHITECTURES["resnet18"](width=2, blocks=[1, 1], shortcuts=False).build((3, 8, 8), 4)
    x = y = torch.randn(5, 3, 8, 8)
    blocks = [stage[0] for stage in net.stages]
    y = net.bn1(net.conv1(y)).relu()
    for block in blocks:
        y = block.bn1(block.conv1(y)).relu()
        y = block.bn2(block.conv2(y)).relu()
    assert torch.equal(net(x), net.bn_out(net.fc(y.mean((2, 3)))))


def test_dropout_positions_match_torchvision() -> None:
    net = ARCHITECTURES["dkp_alexnet"](width=1, hidden=2, dropout=0.25).build((3, 64, 64), 3)
    kinds = [type(module).__name__ for module in net if isinstance(module, (nn.Flatten, nn.Dropout, nn.Linear))]
    assert kinds == ["Flatten", "Dropout", "Linear", "Dropout", "Linear", "Linear"] and net.drop6.p == net.drop7.p == 0.25


@pytest.mark.parametrize(("shape", "name"), [((3, 15, 15), "pool2"), ((3, 62, 62), "pool5")])
def test_alexnet_rejects_too_small_images(shape: tuple[int, int, int], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{shape[1]}x{shape[1]} images are too small for {name} "):
        ARCHITECTURES["dkp_alexnet"](width=1, hidden=2).build(shape, 3)


def test_resnet_rejects_empty_blocks() -> None:
    for name in ("resnet18", "resnet50_imagenet"):
        with pytest.raises(OptionError, match=r"blocks=\[\]: at least one stage is required"):
            ARCHITECTURES[name](blocks=[])


def test_alexnet_accepts_sizes_rounded_by_pooling() -> None:
    """The forward pass fails unless the model predicts the sizes that PyTorch's pooling returns."""
    for size in range(1, 20):
        ARCHITECTURES["asap_alexnet"](width=1, hidden=2).build((1, size, size + 3), 3)(torch.zeros(2, 1, size, size + 3))
    for size in range(63, 100, 3):
        ARCHITECTURES["dkp_alexnet"](width=1, hidden=2).build((1, size, size + 5), 3)(torch.zeros(2, 1, size, size + 5))


def test_command_line_accepts_architecture_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["architecture=resnet34", "architecture.shortcuts=false", "--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    assert "name: resnet34" in shown and "shortcuts: false" in shown


TINY: dict[str, tuple[str, dict[str, Any], int]] = {
    "asap_alexnet": ("asap_alexnet", {"width": 2, "hidden": 4}, 8),
    "dkp_alexnet": ("dkp_alexnet", {"width": 2, "hidden": 4}, 64),
    "resnet18": ("resnet18", {"width": 2, "blocks": [1, 1]}, 8),
    "resnet18 without shortcuts": ("resnet18", {"width": 2, "blocks": [1, 1], "shortcuts": False}, 8),
    "resnet18_imagenet": ("resnet18_imagenet", {"width": 2, "blocks": [1, 1]}, 32),
    "resnet18_imagenet, bn=after": ("resnet18_imagenet", {"width": 2, "blocks": [1, 1], "bn": "after"}, 32),
    "resnet50_imagenet": ("resnet50_imagenet", {"width": 2, "blocks": [1, 1]}, 32),
    "resnet50_imagenet, bn=after": ("resnet50_imagenet", {"width": 2, "blocks": [1, 1], "bn": "after"}, 32),
    "dkp mlp": ("mlp", {"widths": [5] * 4, "batch_norm": True}, 8),
    "forward alignment mlp": ("mlp", {"widths": [6] * 3, "activation": "identity"}, 8),
    "residual_mlp": ("residual_mlp", {"width": 6, "blocks": 2}, 4),
    "vgg": ("vgg", {"width": 2}, 16),
}
# The steps of wm before training would take seconds; f3 needs the number of training samples.
FAST = {"wm": {"initial_steps": 1, "mirror_batch": 2}, "f3": {"samples": 9}}


def tiny(key: str) -> tuple[nn.Module, Tensor, Tensor]:
    name, options, size = TINY[key]
    torch.manual_seed(0)
    net = ARCHITECTURES[name](**options).build((3, size, size), 3)
    return net, torch.randn(9, 3, size, size), torch.tensor([0, 1, 2] * 3)


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_rule_trains_every_architecture(name: str, architecture: str) -> None:
    net, x, y = tiny(architecture)
    options = FAST.get(name, {})
    try:
        rule = fa_bench.attach(net, name, sample_input=x, **options)
    except CoverageError as error:  # follow the error's suggestion
        assert "match='random'" in str(error)
        rule = fa_bench.attach(net, name, sample_input=x, match="random", **options)
    assert not rule.coverage.uncovered
    learning = {key: p.detach().clone() for key, p in net.named_parameters() if p.requires_grad}
    frozen = {key: p.detach().clone() for key, p in net.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(rule.parameter_groups(lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        logits = net(x)
        loss = nn.functional.cross_entropy(logits, y)
        rule.backward(loss, logits, y, indices=torch.arange(len(y)))
        optimizer.step()
        rule.step()
    now = dict(net.named_parameters())
    assert learning and all(torch.isfinite(p).all() for p in now.values())
    # A bias before a normalisation has a gradient of rounding errors only, so it need not change.
    still = [key for key, before in learning.items() if before.dim() > 1 and torch.equal(now[key], before)]
    assert not still, f"{still} did not learn"
    assert all(torch.equal(now[key], before) for key, before in frozen.items())
    assert all(torch.isfinite(tensor).all() for tensor in rule.feedback_parameters())


@pytest.mark.parametrize(
    ("architecture", "cuts", "blocks"),
    [
        ("asap_alexnet", ["pool1", "pool2", "pool3", "act4", "act5"], ["pool1", "pool2", "pool3", "act4"]),
        (
            "dkp_alexnet",
            ["pool1", "pool2", "act3", "act4", "drop6", "drop7", "act7"],
            ["pool1", "pool2", "act3", "act4", "drop6", "drop7"],
        ),
        (
            "resnet18",
            ["relu", *(f"stages.layer{stage}.0.relu{number}" for stage in (1, 2) for number in (1, 2))],
            ["relu", "stages.layer1.0"],
        ),
        (
            "resnet50_imagenet",
            ["pool", *(f"stages.layer{stage}.0.relu{number}" for stage in (1, 2) for number in (1, 2, 3))],
            ["pool", "stages.layer1.0"],
        ),
        (
            "resnet50_imagenet, bn=after",
            [
                "pool",
                "stages.layer1.0",
                "stages.layer1.0.bn1",
                "stages.layer1.0.bn2",
                "stages.layer2.0",
                "stages.layer2.0.bn1",
                "stages.layer2.0.bn2",
            ],
            ["pool", "stages.layer1.0"],
        ),
        ("dkp mlp", ["act1", "act2", "act3", "act4"], ["act1", "act2", "act3"]),
    ],
)
def test_default_cuts_and_blocks_of_architectures(architecture: str, cuts: list[str], blocks: list[str]) -> None:
    """Errors are delivered after pooling and dropout, as in the papers' code. In residual nets, errors are delivered after every
    convolution, and for a block's last convolution at the sum."""
    for rule, wanted in (("dfa", cuts), ("dgl", blocks)):
        net, x, _ = tiny(architecture)
        assert list(fa_bench.attach(net, rule, sample_input=x).feedback) == wanted


def test_no_error_passes_cut_with_batch_norm_after_relu() -> None:
    """Every layer's gradient depends only on its own cut, so it is bitwise identical if the feedback of the other cuts is
    zero."""

    def gradients(zero: str | None) -> dict[str, Tensor]:
        net, x, y = tiny("resnet18_imagenet, bn=after")
        rule = fa_bench.attach(net, "dfa", sample_input=x)
        for cut, tensors in rule.feedback.items():
            if zero is not None and cut != zero:
                tensors["B"].zero_()
        logits = net(x)
        rule.backward(nn.functional.cross_entropy(logits, y), logits, y)
        return {key: p.grad for key, p in net.named_parameters() if p.grad is not None}

    whole, cut = gradients(None), "stages.layer2.0"
    part = gradients(cut)
    for key, gradient in whole.items():
        own = key.startswith(("stages.layer2.0.conv2", "stages.layer2.0.shortcut", "stages.layer2.0.bn2", "fc"))
        assert torch.equal(part[key], gradient) if own else not part[key].any(), key
    assert part.keys() == whole.keys()


def test_forward_alignment_network_sizes() -> None:
    linear = ARCHITECTURES["mlp"](widths=[10, 10, 10], activation="identity").build((1, 28, 28), 10)
    full = ARCHITECTURES["mlp"](widths=[10, 10, 10], batch_norm=True, output_norm=True).build((1, 28, 28), 10)
    assert [name for name, _ in full.named_children()][-2:] == ["fc4", "bn4"]
    assert sum(p.numel() for p in linear.parameters()) == 785 * 10 + 3 * 110
    assert sum(p.numel() for p in full.parameters()) == 785 * 10 + 3 * 110 + 4 * 20


def test_torchvision_models_use_image_size_and_no_auxiliary_heads() -> None:
    with torch.device("meta"):
        transformer = ARCHITECTURES["torchvision"](model="vit_b_16").build((3, 64, 64), 7)
        assert transformer.encoder.pos_embedding.shape[1] == (64 // 16) ** 2 + 1
        assert transformer(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
        for name, size in (("inception_v3", 299), ("googlenet", 64)):
            model = ARCHITECTURES["torchvision"](model=name).build((3, size, size), 7).train()
            assert model(torch.zeros(2, 3, size, size)).shape == (2, 7), "the output is not one tensor of logits"


@pytest.mark.parametrize("shape", [(1, 5, 28), (1, 28, 5)])
def test_conv2_rejects_images_with_one_too_small_side(shape: tuple[int, int, int]) -> None:
    with pytest.raises(OptionError, match=rf"padding=0: {shape[1]}x{shape[2]} images are too small"):
        ARCHITECTURES["conv2"](padding=0, channels=2).build(shape, 3)
    ARCHITECTURES["conv2"](padding=1, channels=2).build(shape, 3)


@pytest.mark.parametrize("colours", [1, 3, 5])
def test_torchvision_model_differs_only_in_first_convolution(colours: int) -> None:
    """Images with three colours use torchvision's net with its own initial values. For other images, only the first layer is
    replaced."""
    torch.manual_seed(0)
    theirs = torchvision.models.squeezenet1_1(num_classes=7)
    torch.manual_seed(0)
    ours = ARCHITECTURES["torchvision"](model="squeezenet1_1").build((colours, 32, 32), 7)
    first, wanted = dict(ours.named_modules())["features.0"], dict(theirs.named_modules())["features.0"]
    assert isinstance(first, nn.Conv2d) and isinstance(wanted, nn.Conv2d)
    for key in ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(first, key) == getattr(wanted, key)
    assert first.in_channels == colours and (first.bias is None) == (wanted.bias is None)
    states = [
        {key: value for key, value in net.state_dict().items() if colours == 3 or not key.startswith("features.0.")}
        for net in (ours, theirs)
    ]
    torch.testing.assert_close(*states, rtol=0, atol=0)
