"""The predicted cost of a step (multiplications, bytes moved and peak memory) equals what is counted by hand or in an actual
step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fa_bench
from fa_bench.mechanisms.cut.sample_errors import SampleErrors
from fa_bench.metrics.cost import Counter, counting, multiplications, step_costs
from fa_bench.models.conv2 import Conv2
from fa_bench.models.mlp import MLP
from fa_bench.objectives.mse import MSE
from fa_bench.optim.muon import Muon
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD
from fa_bench.registry.kinds import VALUES

N = 5


def counted(
    model: nn.Module, shape: tuple[int, ...], output: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
) -> tuple[int, int]:
    """Count the multiplications of the forward and the backward pass; the input needs no gradient."""
    x = torch.randn(N, *shape)
    with counting() as counter:
        loss = output(model, x).sum()
        forward = counter.multiplications
        loss.backward()
    return forward, counter.multiplications - forward


def test_linear_layers_count_output_weight_and_input_products() -> None:
    first, second = 7 * 4, 4 * 3
    assert counted(nn.Sequential(nn.Linear(7, 4), nn.Linear(4, 3)), (7,)) == (N * (first + second), N * (first + 2 * second))


def test_strided_convolution_multiplications() -> None:
    layers = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Conv2d(3, 4, 3, padding=1))
    first, second = 4 * 4 * 3 * 2 * 9, 4 * 4 * 4 * 3 * 9  # 9x9 becomes 4x4, and the second layer keeps this size
    assert counted(layers, (2, 9, 9)) == (N * (first + second), N * (first + 2 * second))


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_groups_divide_the_multiplications_of_both_passes(layer: type[nn.Conv2d | nn.ConvTranspose2d]) -> None:
    """torch counts the gradient of a grouped weight once for each group, so the counter must correct this number."""
    layers = nn.Sequential(nn.Conv2d(2, 8, 1), layer(8, 8, 3, padding=1, groups=4))
    first, second = 6 * 6 * 8 * 2, 6 * 6 * 8 * 2 * 9
    assert counted(layers, (2, 6, 6)) == (N * (first + second), N * (first + 2 * second))


def test_lstm_multiplications_match_cell_products() -> None:
    steps, inputs, width = 6, 3, 4
    into, across = 4 * width * inputs, 4 * width * width
    forward, backward = counted(nn.LSTM(inputs, width, batch_first=True), (steps, inputs), lambda model, x: model(x)[0])
    assert forward == N * steps * (into + across)
    assert backward == N * (steps * into + steps * across + (steps - 1) * across)  # the input and the first state have no error


def test_attention_multiplications_include_backward_recomputation() -> None:
    heads, length, width = 2, 6, 4
    query, key, value = (torch.randn(N, heads, length, width, requires_grad=True) for _ in range(3))
    one = N * heads * length * length * width
    with Counter() as counter:
        out = F.scaled_dot_product_attention(query, key, value)
        assert counter.multiplications == 2 * one
        out.sum().backward()
    assert counter.multiplications == (2 + 5) * one


def test_bytes_moved_by_views_and_products() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with Counter() as counter:
        a.view(2, 6).t().detach()
        torch.empty(100)
        assert counter.moved == 0
        a @ b
    assert counter.moved == 4 * (12 + 20 + 15)
    with Counter() as counter:
        a.add_(1)
    assert counter.moved == 4 * (12 + 12)
    with Counter() as counter:
        torch.randn(1, 4).expand(3, 4) + a
    assert counter.moved == 4 * (4 + 4 + 12 + 12)


def test_memory_counts_only_live_tensors() -> None:
    with Counter() as counter:
        a = torch.zeros(10)
        b = a + 1
        del a
        c = b.view(2, 5) * 2
    assert counter.new == [40, 80, 40, 80] and c.shape == (2, 5)


def cost(rule_name: str, batch: int = 8, accumulate: int = 1, with_optimizer: bool = True, **options):
    torch.manual_seed(0)
    model = MLP(widths=[16, 12]).build((1, 3, 3), 4)
    rule = fa_bench.attach(model, rule_name, seed=0, sample_input=torch.randn(2, 1, 3, 3), **options)
    make = (lambda: Optimizers(SGD(lr=0.1, momentum=0.9), rule, 1)) if with_optimizer else None
    return step_costs(rule, (1, 3, 3), 4, batch, optimizers=make, accumulate=accumulate)


FIRST, HIDDEN, LAST = 9 * 16, 16 * 12, 12 * 4


@pytest.mark.parametrize(
    ("rule", "backward", "feedback"),
    [
        ("bp", FIRST + 2 * (HIDDEN + LAST), 0),
        ("fa", FIRST + 2 * (HIDDEN + LAST), 0),
        ("kp", FIRST + 2 * (HIDDEN + LAST), 0),  # B has the gradient of W
        ("dfa", FIRST + HIDDEN + LAST + 4 * (16 + 12), 0),
        ("frozen", LAST, 0),
    ],
)
def test_multiplications_by_phase_and_rule(rule: str, backward: int, feedback: int) -> None:
    own, reference = cost(rule)
    forward = FIRST + HIDDEN + LAST
    assert (own.forward, own.backward, own.feedback) == (8 * forward, 8 * backward, 8 * feedback)
    assert (reference.forward, reference.backward, reference.feedback) == (8 * forward, 8 * (FIRST + 2 * (HIDDEN + LAST)), 0)
    assert reference == cost("bp")[0]  # rules that add tensors or keep layers fixed have the same reference


def test_learning_the_feedback_is_counted_separately() -> None:
    """In pfa, with ten units for each output, the error passes through the feedback matrices of two layers. The gradient of R,
    which counts as feedback, also requires a product with a feedback matrix in the first layer."""
    own, reference = cost("pfa", ratio=10)
    hops = 10 * 12 * (12 + 16) + 10 * 4 * (4 + 12)
    assert own.forward == reference.forward
    assert own.backward == 8 * (FIRST + HIDDEN + LAST + hops)
    assert own.feedback == 8 * (10 * (FIRST + HIDDEN + LAST) + 10 * 16 * 16)
    assert cost("wm", initial_steps=0)[0].feedback > 0  # mirror steps run after the backward pass and must be counted, too


def test_cost_of_alternating_rule_is_that_of_first_step() -> None:
    """With anchor_period=2, every second update of grape uses backpropagation across the cuts, but the predicted cost is that of
    the first step."""
    second, never, always = (cost("grape", anchor_period=period)[0] for period in (2, 0, 1))
    assert second == never and second.backward < always.backward


def test_counting_does_not_communicate_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only process 0 counts, so an exchange would wait for the other processes forever."""
    exchanged = []
    monkeypatch.setattr(SampleErrors, "exchange", exchanged.append)
    assert cost("f3", samples=20)[0].multiplications > 0 and not exchanged


def test_counting_does_not_depend_on_the_number_of_training_samples() -> None:
    assert cost("f3", samples=2)[0].multiplications == cost("f3", samples=20)[0].multiplications


def test_step_is_counted_in_training_mode() -> None:
    """In training mode, normalisation computes the batch's statistics, which must be counted even if the model was in evaluation
    mode."""
    found = []
    for training in (True, False):
        torch.manual_seed(0)
        model = MLP(widths=[16], batch_norm=True).build((1, 3, 3), 4).train(training)
        found.append(step_costs(fa_bench.attach(model, "fa", seed=0), (1, 3, 3), 4, 8))
    assert found[0] == found[1]


def test_micro_batches_move_more_bytes_with_lower_peak_memory() -> None:
    whole, parts = (cost("bp", batch=4096, accumulate=count)[0] for count in (1, 4))
    assert whole.multiplications == parts.multiplications
    assert parts.bytes_moved > whole.bytes_moved and parts.peak_memory < whole.peak_memory


def test_predicted_peak_memory_of_large_batch_is_exact() -> None:
    """The predicted peak for 64 samples is exact, although other operations determine the peak for four samples."""
    model = Conv2(channels=3, hidden=200).build((1, 8, 8), 3)
    rule = fa_bench.attach(model, "bp", seed=0, sample_input=torch.randn(2, 1, 8, 8))
    predicted = step_costs(rule, (1, 8, 8), 3, 64)[0]
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64) % 3
    model.zero_grad()
    with counting() as counter:
        logits = model(x)
        loss = rule.objective.loss(logits, y)
        rule.backward(loss, logits, y)
    resident = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers(), x, y))
    assert predicted.peak_memory == resident + max(counter.new)
    assert predicted.bytes_moved == counter.moved and predicted.multiplications == counter.multiplications


def test_cost_with_numeric_targets() -> None:
    model = MLP(widths=[16]).build((1, 3, 3), 4)
    rule = fa_bench.attach(model, "bp", objective=MSE())
    predicted = step_costs(rule, (1, 3, 3), 4, 8, targets=VALUES)[0]
    x, y = torch.randn(8, 1, 3, 3), torch.randn(8, 4)
    model.zero_grad()
    with counting() as counter:
        logits = model(x)
        rule.backward(rule.objective.loss(logits, y), logits, y)
    assert (predicted.bytes_moved, predicted.multiplications) == (counter.moved, counter.multiplications)


def test_cost_includes_optimizer_state() -> None:
    with_state, without = cost("bp")[0], cost("bp", with_optimizer=False)[0]
    parameters = FIRST + HIDDEN + LAST + 16 + 12 + 4
    assert with_state.peak_memory - without.peak_memory >= 4 * parameters  # the momentum is included
    assert with_state.bytes_moved - without.bytes_moved >= 4 * 5 * parameters  # the update reads W, g and m, and writes W and m
    assert with_state.multiplications == without.multiplications


def test_products_of_the_optimizer_are_counted_separately() -> None:
    """Each of Muon's five iterations computes X Xᵀ on the smaller side, its square, and a product with X, for B as well as for
    W."""
    model = MLP(widths=[16, 12]).build((1, 3, 3), 4)
    rule = fa_bench.attach(model, "kp", seed=0, sample_input=torch.randn(2, 1, 3, 3))
    own, reference = step_costs(rule, (1, 3, 3), 4, 8, optimizers=lambda: Optimizers(Muon(), rule, 1))
    one = sum(5 * (2 * rows * rows * columns + rows**3) for rows, columns in ((9, 16), (12, 16), (4, 12)))
    assert (own.optimizer, reference.optimizer) == (2 * one, one)
    assert (own.feedback, reference.feedback) == (0, 0) and cost("kp")[0].optimizer == 0
    assert own.multiplications == own.forward + own.backward + own.optimizer


def test_counting_restores_mkldnn_setting() -> None:
    before = torch.backends.mkldnn.enabled
    assert multiplications(lambda: None) == 0 and torch.backends.mkldnn.enabled == before
