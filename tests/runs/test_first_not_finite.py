"""The search for the first module whose output is not finite leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fa_bench.runs.divergence import first_nonfinite_output


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)))


@pytest.mark.parametrize(
    ("root", "others"),
    [
        (True, {"1": False}),  # a frozen normalisation in a model that trains
        (True, {"2": False, "2.0": True}),  # dropout that stays active inside a block in evaluation mode
        (False, {"2.0": True, "1": True}),  # a model in evaluation mode with parts that train
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_module_training_modes_are_restored(root: bool, others: dict[str, bool], fails: bool) -> None:
    model = net().train(root)
    for path, mode in others.items():
        model.get_submodule(path).training = mode
    before = {path: module.training for path, module in model.named_modules()}
    x = torch.full((5, 4), float("nan"))
    if fails:  # a batch with a shape that the model does not accept
        with pytest.raises(RuntimeError):
            first_nonfinite_output(model, x[:, :3])
    else:
        assert first_nonfinite_output(model, x) == "0"
    assert {path: module.training for path, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())
