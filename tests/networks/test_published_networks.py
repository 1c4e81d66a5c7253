"""Edge rules attach to published networks and train them, including those of timm and transformers if installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fa_bench import attach

#: Maps each rule to the options that it needs for these networks.
RULES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("fa", "kp", "pfa", "pfa_o", "ldfa", "usf", "frsf", "brsf", "mixed", "forward_alignment")},
    "wm": {"initial_steps": 1},
    "asap": {"linear": "share", "match": "random"},
    "asfp": {"linear": "share", "match": "random"},
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(14).reshape(2, 7)
LABELS = torch.tensor([0, 1])


def vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 24, 36, num_classes=5)


def swin_transformer() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 12, [2, 2], [2, 3], [2, 2], num_classes=5)


def of_timm(name: str, **options: Any) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=5, **options)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36, num_labels=5
        )
    )


#: Maps a name to a function that creates the network, to its inputs, and to the number of layers that rules cover.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "torchvision ViT": (vision_transformer, IMAGES, 10),
    "torchvision Swin": (swin_transformer, IMAGES, 19),
    "timm ViT": (
        lambda: of_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2),
        IMAGES,
        10,
    ),
    "timm SE-ResNet": (lambda: of_timm("seresnet18"), IMAGES, 37),
    "timm MobileNet": (lambda: of_timm("mobilenetv2_035"), IMAGES, 53),
    "transformers BERT": (bert, {"input_ids": TOKENS}, 14),
}


def perturbed(make: Callable[[], nn.Module]) -> nn.Module:
    """Make the model and perturb all its parameters; otherwise, zeros in output layers and gains would block every error in the
    first step."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def logits_of(model: nn.Module, x: Any) -> Tensor:
    return model(**x).logits if isinstance(x, dict) else model(x)


#: Networks with feature maps that cannot be matched by copies and pooling, as rules with shared activations require.
UNSHARABLE = ("timm SE-ResNet", "timm MobileNet")


@pytest.mark.parametrize(
    ("network", "name"),
    [(network, name) for network in NETWORKS for name in RULES if name not in ("asap", "asfp") or network not in UNSHARABLE],
)
def test_every_edge_rule_covers_and_trains(network: str, name: str) -> None:
    make, x, layers = NETWORKS[network]
    model = perturbed(make)
    rule = attach(model, name, sample_input=x, **RULES[name])
    assert len(rule.coverage.covered) == layers and not rule.coverage.uncovered
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    rule.backward(F.cross_entropy(logits_of(model, x), LABELS))
    optimizer.step()
    rule.step()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    # In deep networks with batch normalisation over two samples, the first layers hardly change.
    assert sum(not torch.equal(parameter, before[key]) for key, parameter in model.named_parameters()) > layers / 2
    rule.detach()


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_as_feedback_match_backprop(network: str) -> None:
    make, x, _ = NETWORKS[network]
    model = perturbed(make)
    rule = attach(model, "fa", sample_input=x)
    with torch.no_grad():
        for path, tensors in rule.feedback.items():
            tensors["B"].copy_(model.get_submodule(path).weight)  # type: ignore[arg-type]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(1)  # so that dropout is the same
        F.cross_entropy(logits_of(model, x), LABELS).backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}

    found = gradients()
    rule.detach()
    for key, gradient in gradients().items():
        assert torch.equal(found[key], gradient), key
