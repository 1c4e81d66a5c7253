"""Property tests over layer geometries: with B = W, the results are those of backpropagation; with a random B, they agree with
the explicit formula."""

import copy
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fa_bench

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
# Tolerances are relative to the largest entry. The formula sums the same products, but a convolution may sum them in a different
# order: the error is 1e-13 for the few hundred float64 products here, and 1e-5 in float32. bfloat16 rounds the result to 8 bits
# (0.4 %), and may also round intermediate sums.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def per_dimension(draw, dims: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(dims))


@st.composite
def convolutions(draw):
    """A convolution and its input, with random dimensions, stride, padding, dilation, groups, padding mode, dtype, memory format
    and direction."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, stride, dilation = (per_dimension(draw, dims, 1, high) for high in (3, 3, 2))
    transposed = draw(st.booleans())
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if transposed:
        options["padding"] = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True))
        options["output_padding"] = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        smallest = [5] * dims  # the output has at least one pixel: (5 - 1) stride + dilation (kernel - 1) >= 2 padding
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
        options["padding"] = draw(st.sampled_from(["same", "valid", "numbers", "numbers", "numbers"]))
        if options["padding"] == "numbers":
            options["padding"] = per_dimension(draw, dims, 0, 2)
        if options["padding"] == "same":
            options["stride"] = 1
        # The input is large enough for the kernel without padding, and for reflection by the largest padding.
        smallest = [max(d * (k - 1) + 1, 5) for k, d in zip(kernel, dilation, strict=True)]
    size = [draw(st.integers(low, low + 3)) for low in smallest]
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    channels = (groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = (TRANSPOSED if transposed else CONV)[dims](*channels, kernel, **options).to(dtype)
    x = torch.randn(draw(st.integers(1, 3)), channels[0], *size).to(dtype)
    if dims in CHANNELS_LAST and draw(st.booleans()):
        layer, x = layer.to(memory_format=CHANNELS_LAST[dims]), x.to(memory_format=CHANNELS_LAST[dims])
    return layer, x


@st.composite
def linears(draw):
    """A linear layer and its input, with random widths, bias, leading dimensions, dtype, and storage order of the input."""
    widths, dtype = per_dimension(draw, 2, 1, 6), draw(st.sampled_from(list(TOLERANCE)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = nn.Linear(*widths, bias=draw(st.booleans())).to(dtype)
    lead = per_dimension(draw, draw(st.integers(0, 3)), 1, 4)
    x = torch.randn(*lead, widths[0]).to(dtype)
    if lead and draw(st.booleans()):
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return layer, x


def passes(model: nn.Module, x: torch.Tensor, run) -> dict[str, torch.Tensor]:
    """The output, the input error and the parameter gradients for a fixed error at the output."""
    model.zero_grad(set_to_none=True)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    generator = torch.Generator().manual_seed(0)
    run((y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum(), y)
    return {"output": y.detach(), "input": x.grad} | {name: p.grad.clone() for name, p in model.named_parameters()}


def column_major(x: torch.Tensor) -> bool:
    """Return True if torch treats the rows of a linear layer's input as column-major. In this case, torch sums the input error in
    a different order."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.stride() == (1, rows.shape[0])


def has_two_formats(weight: torch.Tensor) -> bool:
    """Whether a kernel counts as contiguous in both memory formats, because it has one input channel. B then has other strides
    than the weight, and torch may choose another algorithm."""
    last = CHANNELS_LAST.get(weight.dim() - 2)
    return last is not None and weight.is_contiguous() and weight.is_contiguous(memory_format=last)


def check(layer: nn.Module, x: torch.Tensor) -> None:
    """Check the results for one layer and one input, first with a random B, then with B = W."""
    plain = nn.Sequential(OrderedDict(layer=layer))
    model = copy.deepcopy(plain)
    want = passes(plain, x, lambda loss, y: loss.backward())
    rule = fa_bench.attach(model, "fa", seed=0)

    def follow(loss, y):
        rule.backward(loss, y, None)

    got = passes(model, x, follow)
    assert got.keys() == want.keys()
    for name in want.keys() - {"input"}:
        assert torch.equal(got[name], want[name]), f"{name} depends on the feedback"

    # According to the formula, the input error is that of the same layer with the weight B, as computed by torch's own autograd.
    mirror = copy.deepcopy(plain)
    with torch.no_grad():
        mirror.layer.weight.copy_(rule.feedback["layer"]["B"])
    explicit = passes(mirror, x, lambda loss, y: loss.backward())["input"]
    scale = explicit.abs().max().item()
    assert (got["input"] - explicit).abs().max().item() <= TOLERANCE[x.dtype] * scale
    assert got["input"].dtype == x.dtype and got["input"].shape == x.shape

    with torch.no_grad():
        rule.feedback["layer"]["B"].copy_(layer.weight)
    got = passes(model, x, follow)
    for name in want:
        rounds = column_major(x) if isinstance(layer, nn.Linear) else has_two_formats(layer.weight)
        if name == "input" and rounds:
            assert (got[name] - want[name]).abs().max() <= TOLERANCE[x.dtype] * want[name].abs().max()
        else:
            assert torch.equal(got[name], want[name]), f"with B = W, {name} is not that of backpropagation"


# torch warns once that an even kernel with padding='same' needs a padded copy of the input.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@SETTINGS
@given(convolutions())
def test_random_convolution_geometries(case):
    check(*case)


@SETTINGS
@given(linears())
def test_random_linear_geometries(case):
    check(*case)


class Sized(nn.Module):
    """A layer that is called with the size of its output, if one is given."""

    def __init__(self, layer: nn.Module, size: list[int] | None) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if self.size is None else self.layer(x, output_size=self.size)


@pytest.mark.parametrize("needs_error", [False, True], ids=["image", "activation"])
@pytest.mark.parametrize("lead", [(), (1,), (4,)], ids=["one sample", "batch of one", "batch"])
@pytest.mark.parametrize("kind", ["plain", "transposed", "sized"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unbatched_and_sized_convolution_calls(dims, kind, lead, needs_error):
    """Inputs may lack a batch dimension, output sizes may be given, and the input may or may not need an error."""
    torch.manual_seed(0)
    layer = (CONV if kind == "plain" else TRANSPOSED)[dims](2, 3, 3, stride=2).double()
    plain = Sized(layer, [10] * dims if kind == "sized" else None)
    model, x = copy.deepcopy(plain), torch.randn(*lead, 2, *[4 if kind != "plain" else 7] * dims, dtype=torch.float64)
    rule, found = fa_bench.attach(model, "fa", seed=0), []
    with torch.no_grad():
        rule.feedback["layer"]["B"].copy_(layer.weight)
    for net in (plain, model):
        leaf = x.clone().requires_grad_(needs_error)
        y = net(leaf)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
        loss.backward() if net is plain else rule.backward(loss, y, None)
        found.append([y, leaf.grad, *(parameter.grad for parameter in net.parameters())])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_transposed_convolution_weight_gradient_for_each_output_size():
    """Two output sizes are possible for each input, and the caller chooses one of them."""
    plain = nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, bias=False).double()
    layer = copy.deepcopy(plain)
    fa_bench.attach(nn.Sequential(layer), "fa")
    x = torch.randn(2, 2, 4, dtype=torch.float64)
    for size in (7, 8):
        g = torch.randn(2, 3, size, dtype=torch.float64)
        (want,) = torch.autograd.grad(plain(x, output_size=[size]), plain.weight, g)
        torch.testing.assert_close(layer.weight_gradient(x, g), want)
