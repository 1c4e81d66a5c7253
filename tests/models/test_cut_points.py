"""Tests of the modules that the models name as their hidden activations and as the ends of their blocks."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
import torch
from torch import nn

from fa_bench.registry.registries import ARCHITECTURES

Shape = tuple[int, ...]
SMALL, LARGE = (3, 16, 16), (3, 64, 64)
STAGES = [f"stages.layer{number}.0" for number in (1, 2, 3)]
TWO = {"width": 2, "blocks": [1, 1]}
LAYERS = ["layers.0", "layers.1"]
INNER = [[f"{block}.attn", *(f"{block}.attn.{layer}" for layer in "qkv")] for block in LAYERS]

#: Pairs an architecture, its options and the input shape with the cut points and the blocks.
NAMED: list[tuple[str, dict[str, Any], Shape, list[str], list[str]]] = [
    ("mlp", {"widths": [5, 4, 3], "batch_norm": True}, SMALL, ["act1", "act2", "act3"], ["act1", "act2", "act3"]),
    ("conv2", {}, SMALL, ["act1", "act2", "act3"], ["act1", "pool", "act3"]),
    ("asap_alexnet", {"width": 2, "hidden": 5}, SMALL, *[["pool1", "pool2", "pool3", "act4", "act5"]] * 2),
    # The cuts are after the dropout that follows an activation.
    ("dkp_alexnet", {"width": 2, "hidden": 5}, LARGE, *[["pool1", "pool2", "act3", "act4", "drop6", "drop7", "act7"]] * 2),
    (
        "resnet20",
        {"width": 2, "blocks": 1},
        SMALL,
        ["relu", *(f"{block}.relu{number}" for block in STAGES for number in (1, 2))],
        ["relu", *STAGES],
    ),
    (
        "resnet18",
        TWO,
        SMALL,
        ["relu", *(f"{block}.relu{number}" for block in STAGES[:2] for number in (1, 2))],
        ["relu", *STAGES[:2]],
    ),
    (
        "resnet18_imagenet",
        TWO,
        LARGE,
        ["pool", *(f"{block}.relu{number}" for block in STAGES[:2] for number in (1, 2))],
        ["pool", *STAGES[:2]],
    ),
    # Only the block itself outputs the sum, and no ReLU follows it.
    (
        "resnet18_imagenet",
        TWO | {"bn": "after"},
        LARGE,
        ["pool", *(end for block in STAGES[:2] for end in (block, f"{block}.bn1"))],
        ["pool", *STAGES[:2]],
    ),
    (
        "resnet50_imagenet",
        TWO,
        LARGE,
        ["pool", *(f"{block}.relu{number}" for block in STAGES[:2] for number in (1, 2, 3))],
        ["pool", *STAGES[:2]],
    ),
    ("vgg", {"depth": 7, "width": 2}, (3, 32, 32), *[["pool1", "act2", "pool3", "act4", "pool5", "act6"]] * 2),
    # As a cut point, the final LayerNorm replaces the last block.
    (
        "residual_mlp",
        {"width": 4, "blocks": 2},
        SMALL,
        ["embed", "layers.0", "layers.0.act", "layers.1.act", "final_norm"],
        LAYERS,
    ),
    (
        "residual_mlp",
        {"width": 4, "blocks": 2, "final_norm": False},
        SMALL,
        ["embed", "layers.0", "layers.0.act", "layers.1", "layers.1.act"],
        LAYERS,
    ),
    *(
        (
            name,
            {"width": 4, blocks: 2},
            shape,
            ["embed", "layers.0", *INNER[0], "layers.0.act", *INNER[1], "layers.1.act", "final_norm"],
            LAYERS,
        )
        for name, blocks, shape in (("vit_mini", "blocks", SMALL), ("decoder", "depth", (5,)))
    ),
    (
        "decoder",
        {"width": 4, "depth": 2, "norm": "post"},
        (5,),
        [
            "embed",
            *(
                path
                for block, inner in zip(LAYERS, INNER, strict=True)
                for path in (*inner[1:], f"{block}.norm1", f"{block}.act", f"{block}.norm2")
            ),
        ],
        LAYERS,
    ),
]


def matched(model: nn.Module, names: list[str]) -> list[str]:
    """The paths of the modules that match names or patterns, in the order of the model."""
    return [path for path, _ in model.named_modules() if path and any(fnmatch.fnmatch(path, name) for name in names)]


@pytest.mark.parametrize(("name", "options", "shape", "cut_points", "blocks"), NAMED)
def test_cut_points_and_blocks(
    name: str, options: dict[str, Any], shape: Shape, cut_points: list[str], blocks: list[str]
) -> None:
    with torch.device("meta"):
        model = ARCHITECTURES[name](**options).build(shape, 3)
    assert matched(model, model.cut_points) == cut_points
    assert matched(model, model.blocks) == blocks


def test_launay_cut_patterns_match_decoder_modules() -> None:
    """The cuts of Launay et al. are three points in each block ("micro"), or the output of each block ("macro"). With dropout,
    the cut at the activation comes after the dropout."""
    model = ARCHITECTURES["decoder"](width=4, depth=2, norm="post", dropout=0.1).build((5,), 3)
    assert matched(model, ["*.norm1", "*.act", "*.norm2"]) == [
        f"{block}.{name}" for block in LAYERS for name in ("norm1", "act", "norm2")
    ]
    block = model.get_submodule("layers.1")
    assert [type(module).__name__ for module in block.act] == ["GELU", "Dropout"]
    outputs = []
    for path in ("layers.1", "layers.1.norm2"):
        model.get_submodule(path).register_forward_hook(lambda module, args, output: outputs.append(output))
    model(torch.zeros(1, 5, dtype=torch.int64))
    assert outputs[0] is outputs[1]
