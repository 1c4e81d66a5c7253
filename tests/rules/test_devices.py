"""Tests that training steps neither mix devices nor make the CPU wait by reading values from an accelerator.

The tests use tensors without values, for which mixing devices or reading a number raises an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

import fa_bench
from fa_bench.mechanisms.cut.delivery import Delivery
from fa_bench.mechanisms.second_pass import Draws
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD
from fa_bench.registry.registries import ALGORITHMS, ARCHITECTURES
from fa_bench.rules import wm
from fa_bench.utils import lazy

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

NETS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "mlp": ({"widths": [8, 8]}, (1, 6, 6)),
    "resnet_cifar_small": ({"depth": 8, "width": 4}, (3, 8, 8)),
}
#: The rule frsf reads its magnitudes once, to check whether they have negative entries. Rules that learn from the objective check
#: in their first passes whether the gradient of the loss is a multiple of that of the objective.
READS_ONCE = {"frsf", *(name for name, rule in ALGORITHMS.items() if getattr(rule, "learns_by_objective", False))}


@pytest.fixture(autouse=True)
def meta_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace functions that do not work on the meta device, which the tests use because its autograd needs no driver."""
    autocast = torch.is_autocast_enabled
    for module in (torch, lazy.torch):  # the latter caches its results
        monkeypatch.setattr(module, "is_autocast_enabled", lambda device: device != "meta" and autocast(device))
    monkeypatch.setattr(wm.Noise, "sample", lambda noise, number, like: like.new_empty(noise.batch, *noise.shape))
    monkeypatch.setattr(Draws, "normal", lambda draws, name, like, is_shared=False: torch.empty_like(like))
    # The check reads the samples' indices, which are on the CPU in a training loop but have no values here.
    monkeypatch.setattr(Delivery, "_check_indices", lambda *_: None)
    with functorch_config.patch(fake_tensor_allow_meta=True):
        yield


def train(name: str, net: str, steps: int) -> None:
    """Run training steps of a rule with the model and the batch on the meta device."""
    options, shape = NETS[net]
    torch.manual_seed(0)
    model = ARCHITECTURES[net](**options).build(shape, 4)
    shortened: dict[str, Any] = {"wm": {"initial_steps": 1}, "f3": {"samples": 4}}.get(name, {})
    indices = torch.arange(4)
    rule = fa_bench.attach(model, name, seed=0, sample_input=torch.randn(2, *shape), **shortened)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for key, weight in module._parameters.items():
                if weight is not None:
                    empty = torch.empty(weight.shape, device="meta")
                    module._parameters[key] = torch.nn.Parameter(empty, requires_grad=weight.requires_grad)
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
        optimizers = Optimizers(SGD(lr=0.1), rule, epochs=1)
        optimizers.share_gradients()
        x, y = torch.empty(4, *shape, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
        for _ in range(steps):
            optimizers.zero_grad()
            logits = model(x)
            rule.backward(F.cross_entropy(logits, y), logits, y, 1.0, indices=indices)
            optimizers.step()
            rule.step()


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_training_steps_stay_on_device(name: str, net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in READS_ONCE:
        monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: False)
    train(name, net, steps=2)


def test_detects_tensor_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wm.Noise, "sample", lambda noise, number, like: torch.empty(noise.batch, *noise.shape))
    with pytest.raises(RuntimeError, match=r"two (different )?devices"):
        train("wm", "mlp", steps=1)


def test_detects_reading_values_from_device() -> None:
    with pytest.raises(DataDependentOutputException):
        train("frsf", "mlp", steps=1)
