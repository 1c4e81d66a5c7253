"""Tests of ldfa: the rank of the errors, relations to kp and pfa_o, and Oja's rule, including its fixed point."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fa_bench
from fa_bench.mechanisms.edge.subspace import oja_gradient, orthonormalized

from . import nets
from .helpers import array, backward, distance, rule_grads


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(rows, columns, seed=seed))[0]


def attached(layer: nn.Module, **options) -> tuple[nn.Sequential, fa_bench.Rule]:
    model = nn.Sequential(layer.double())
    return model, fa_bench.attach(model, "ldfa", seed=0, **options)


def input_error(model: nn.Module, rule, x: Tensor, g: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    y = model(x)
    rule.backward((y * g).sum(), y)
    assert x.grad is not None
    return x.grad


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(("rank", "found"), [(3, 3), (10, 10), (11, 10), (1, 1)])
def test_input_error_rank_equals_rank_option(rank: int, found: int) -> None:
    model, rule = attached(nn.Linear(15, 10), rank=rank)
    assert rule.feedback["0"]["B"].shape == (10, found) and rule.feedback["0"]["R"].shape == (found, 15)
    errors = input_error(model, rule, random(30, 15), random(30, 10, seed=1))
    assert torch.linalg.matrix_rank(errors) == found


def test_rank_applies_per_convolution_group() -> None:
    _, rule = attached(nn.Conv2d(4, 6, 3, groups=2), rank=2)
    b = rule.feedback["0"]["B"]
    assert b.shape == (6, 2) and rule.feedback["0"]["R"].shape == (4, 2, 3, 3)
    for part in b.chunk(2):
        assert distance(array(part.t() @ part), torch.eye(2)) < 1e-6  # sampled in single precision
    assert not torch.equal(*b.chunk(2))


def test_subspace_containing_errors_matches_backprop() -> None:
    """If the columns of B are the right singular vectors of errors of rank 3 and R = Bᵀ W, then e_in = g B Bᵀ W = g W."""
    model, rule = attached(nn.Linear(15, 10), rank=3)
    g = random(20, 3) @ random(3, 10, seed=1)
    weight = model[0].weight.detach()
    with torch.no_grad():
        b = torch.linalg.svd(g, full_matrices=False)[2][:3].t()
        rule.feedback["0"]["B"].copy_(b)
        rule.feedback["0"]["R"].copy_(b.t() @ weight)
    assert distance(input_error(model, rule, random(20, 15, seed=2), g), array(g @ weight)) < 1e-12


# ------------------------------------------------------------------------------------------------ other rules
@pytest.mark.parametrize("net", ["mlp_tanh", "conv"])
def test_full_rank_with_fixed_subspace_matches_kp(net: str) -> None:
    """If B (O, O) is orthogonal, the gradient of B R is B Bᵀ gᵀ x = gᵀ x.

    Starting from the same values, B R therefore changes like KP's B.
    """
    models = [nets.NETS[net]() for _ in range(2)]
    ldfa, kp = fa_bench.attach(models[0], "ldfa", rank=100, b_rate=0.0), fa_bench.attach(models[1], "kp")
    with torch.no_grad():
        for tensors in ldfa.feedback.values():  # sampled in single precision
            b = tensors["B"]
            b.copy_(orthonormalized(b, len(b) // b.shape[1]))
        for path, tensors in kp.feedback.items():
            tensors["B"].copy_(ldfa.effective_feedback(path))
    for model, rule in zip(models, (ldfa, kp), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for step in range(4):
            x, y = nets.batch(net, seed=step)
            optimizer.zero_grad()
            logits = model(x)
            backward(rule, F.cross_entropy(logits, y), logits, y)
            optimizer.step()
            rule.step()
    for path, (effective, weight) in ldfa.weight_pairs().items():
        assert distance(array(effective), array(kp.feedback[path]["B"])) < 1e-11
        assert distance(array(weight), array(models[1].get_submodule(path).weight)) < 1e-11


@pytest.mark.parametrize(
    ("layer", "rank", "learned"),
    [
        (nn.Linear(6, 4), 3, ["B", "R"]),
        (nn.Linear(6, 4), 4, ["R"]),
        (nn.Linear(6, 4), 5, ["R"]),
        (nn.Conv2d(4, 6, 3, groups=2), 2, ["B", "R"]),
        (nn.Conv2d(4, 6, 3, groups=2), 3, ["R"]),
    ],
    ids=str,
)
def test_subspace_is_fixed_at_full_rank(layer: nn.Module, rank: int, learned: list[str]) -> None:
    _, rule = attached(layer, rank=rank)
    names = {name.removeprefix("feedback_") for name, _ in layer.named_parameters() if name.startswith("feedback_")}
    assert sorted(names) == learned and len(rule.feedback_parameters()) == len(learned)


def test_fixed_subspace_matches_pfa_o() -> None:
    found = []
    for name, options in (("ldfa", {"rank": 2, "b_rate": 0.0}), ("pfa_o", {"ratio": 0.4})):
        model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 5)).double()
        model.load_state_dict({key: random(*value.shape) for key, value in model.state_dict().items()})
        rule = fa_bench.attach(model, name, seed=0, **options)
        assert len(rule.feedback_parameters()) == 2
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = random(6, 7), torch.arange(6) % 5
        for _ in range(3):
            optimizer.zero_grad()
            logits = model(x)
            backward(rule, F.cross_entropy(logits, y), logits, y)
            optimizer.step()
            rule.step()
        found.append(model.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


# ------------------------------------------------------------------------------------------------ Oja's rule
def gaussian(count: int = 4000) -> tuple[Tensor, Tensor]:
    """Gaussian errors with eight variances from 0.25 to 16, and their axes in descending order of variance."""
    axes = orthonormal(8, 8, seed=3)
    return random(count, 8) * torch.tensor([4.0, 3.0, 2.0, 1.0, 0.9, 0.8, 0.7, 0.5], dtype=torch.float64) @ axes.t(), axes


def test_oja_gradient_converges_to_principal_subspace() -> None:
    """Even without orthonormalisation, the second term of Oja's rule makes Bᵀ B = I.

    The third axis contributes more than three times as much to C as the fourth.
    """
    errors, axes = gaussian()
    b = 0.3 * random(8, 3, seed=5)
    for _ in range(400):
        b = b - 0.2 / len(errors) * oja_gradient(b, 1, 1.0, errors)
    assert distance(array(b.t() @ b), torch.eye(3)) < 1e-3
    cosines = torch.linalg.svdvals(b.t() @ axes[:, :3])
    assert cosines.min() > math.cos(math.radians(2))  # 4000 samples determine the axes within a degree or two


def test_layer_converges_to_principal_subspace_of_errors() -> None:
    """With fixed errors, SGD with momentum and decay rotates B towards the leading eigenvectors of the errors' matrix C.

    The product B R follows B Bᵀ W.
    """
    model, rule = attached(nn.Linear(6, 8, bias=False), rank=3)
    errors = gaussian(500)[0]
    axes = torch.linalg.eigh((errors / errors.norm(dim=1, keepdim=True)).t() @ errors)[1][:, -3:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5, weight_decay=0.5)
    for step in range(200):
        optimizer.zero_grad()
        y = model(random(500, 6, seed=step))
        rule.backward((y * errors).sum() / 500, y)
        optimizer.step()
        rule.step()
        b = rule.feedback["0"]["B"].detach()
        assert distance(array(b.t() @ b), torch.eye(3)) < 1e-12
    assert torch.linalg.svdvals(b.t() @ axes).min() > 1 - 1e-6
    projected = b @ b.t() @ model[0].weight.detach()
    assert (rule.effective_feedback("0") - projected).norm() < 0.05 * projected.norm()


def test_oja_gradient_is_tangent_and_linear_in_errors() -> None:
    b, errors = orthonormal(8, 3), random(10, 8)
    gradient = oja_gradient(b, 1, 1.0, errors)
    assert (b.t() @ gradient).abs().max() < 1e-12
    assert distance(array(oja_gradient(b, 1, 0.5, 64 * errors)), array(32 * gradient)) < 1e-12
    both = oja_gradient(b, 1, 1.0, torch.cat([errors, random(4, 8, seed=1)]))
    assert distance(array(both - gradient), array(oja_gradient(b, 1, 1.0, random(4, 8, seed=1)))) < 1e-12
    assert not oja_gradient(b, 1, 1.0, torch.zeros(4, 8, dtype=torch.float64)).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_orthonormalized_preserves_orthonormal_columns(dtype: torch.dtype) -> None:
    b = torch.cat([orthonormal(5, 3), -orthonormal(5, 3, seed=1)]).to(dtype)
    again = orthonormalized(b, 2)
    assert again.dtype == dtype
    assert (again - b).abs().max() <= {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "tokens": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 7, 6)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 5, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), (2, 3, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_oja_gradient_sums_over_samples_and_positions(name: str) -> None:
    build, shape = LAYERS[name]
    model, rule = attached(build(), rank=2)
    y = model(random(*shape))
    g = random(*y.shape, seed=1)
    rule.backward((y * g).sum(), y)
    rows = g.reshape(-1, 4) if name in ("linear", "tokens") else g.movedim(1, -1).reshape(-1, g.shape[1])
    b = rule.feedback["0"]["B"]
    want = oja_gradient(b.detach(), getattr(model[0], "groups", 1), 1.0, rows)
    assert distance(b.grad, array(want)) < 1e-12


def test_packed_attention_weight_zero_pads_errors_of_other_rows() -> None:
    """Queries have a different input from keys and values, so the rows of the packed weight are not all applied to one input."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2, batch_first=True).double()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = model

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x[:, :2], x, x, need_weights=False)[0]

    net = Net()
    rule = fa_bench.attach(net, "ldfa", rank=2)
    path = next(path for path in rule.feedback if rule.feedback[path]["B"].shape[0] == 12)
    seen: list[Tensor] = []
    layer = net.get_submodule(path)
    plain = type(layer).apply_feedback

    def recorded(self, *args, rows=None, **kwargs):
        out = plain(self, *args, rows=rows, **kwargs)
        full = torch.zeros(12, dtype=torch.bool)
        full[rows if rows is not None else slice(None)] = True
        out.register_hook(
            lambda g: seen.append(
                torch.zeros(g.shape[:-1].numel(), 12).double().index_copy(1, full.nonzero().flatten(), g.reshape(-1, g.shape[-1]))
            )
        )
        return out

    type(layer).apply_feedback = recorded
    try:
        net(random(3, 4, 4)).square().sum().backward()
    finally:
        type(layer).apply_feedback = plain
    b = rule.feedback[path]["B"]
    assert len(seen) >= 2
    want = sum(oja_gradient(b.detach(), 1, 1.0, errors) for errors in seen)
    assert distance(b.grad, array(want)) < 1e-12


def test_frozen_subspace_is_bitwise_unchanged() -> None:
    x, y = nets.batch("conv")
    model = nets.convnet()
    rule = fa_bench.attach(model, "ldfa", rank=2)
    for tensors in rule.feedback.values():
        tensors["B"].requires_grad_(False)
    before = {path: tensors["B"].clone() for path, tensors in rule.feedback.items()}
    rule_grads(model, rule, x, y)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    rule.step()
    assert all(torch.equal(tensors["B"], before[path]) for path, tensors in rule.feedback.items())


def test_exact_and_measurement_passes_give_feedback_no_gradient() -> None:
    x, y = nets.batch("conv")
    model = nets.convnet()
    rule = fa_bench.attach(model, "ldfa", rank=2)
    with rule.exact():
        F.cross_entropy(model(x), y).backward()
    assert all(tensor.grad is None for tensor in rule.feedback_parameters())
    model.zero_grad()
    rule.mode.freeze_random = True
    F.cross_entropy(model(x), y).backward()
    assert all(tensor.grad is None for tensor in rule.feedback_parameters())
