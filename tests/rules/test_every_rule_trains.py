"""Every rule trains every architecture for two steps, or says before training what would work."""

import pytest
import torch
import torch.nn.functional as F

import fa_bench
from fa_bench.optim import SGD, Optimizers
from fa_bench.registries import ALGORITHMS, ARCHITECTURES

MODELS = {
    "mlp": ({"widths": [12, 12, 12]}, (1, 6, 6)),
    "conv2": ({"channels": 4, "hidden": 8}, (1, 8, 8)),
    "resnet20": ({"width": 2, "blocks": 2}, (3, 8, 8)),
}
#: (rule, architecture) -> what the refusal names.
REFUSED = {(rule, "conv2"): "resnet20" for rule in ("asap", "asfp", "asfp_lc")}
SHARE = {"linear": "share"}


def train(rule: str, architecture: str, **options):
    settings, shape = MODELS[architecture]
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture](**settings).build(shape, 3)
    x, y = torch.randn(6, *shape), torch.tensor([0, 1, 2, 0, 1, 2])
    attached = fa_bench.attach(model, rule, seed=0, sample_input=x[:2], **options)
    optimizers = Optimizers(SGD(lr=0.01), attached, epochs=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizers.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        attached.backward(loss, logits, y)
        optimizers.step()
        attached.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all(torch.isfinite(tensor).all() for tensor in optimizers.trained())
    return attached, moved


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("rule", ALGORITHMS)
def test_two_steps_or_a_reason(rule, architecture):
    if (rule, architecture) in REFUSED:
        with pytest.raises(fa_bench.errors.CoverageError, match=REFUSED[rule, architecture]):
            train(rule, architecture)
        _, moved = train(rule, architecture, **SHARE)  # what the refusal names does work
    else:
        _, moved = train(rule, architecture)
    assert moved
