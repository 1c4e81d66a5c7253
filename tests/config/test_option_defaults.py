"""The defaults and ranges of optimizers, schedules, objectives and architectures, repeated here because changing a default
changes runs."""

from __future__ import annotations

from dataclasses import MISSING

from fa_bench.registry.options import Options, option_fields
from fa_bench.registry.registries import ARCHITECTURES, OBJECTIVES, OPTIMIZERS, SCHEDULES

SIGNS = {"minimum": ">=", "above": ">", "maximum": "<=", "below": "<"}

RECORDED = {
    "lr 0.001 > 0": "adam adamw",
    "weight_decay 0.0 >= 0": "adam adamw muon sgd",
    "first_epoch_weight_decay None >= 0": "adam adamw muon sgd",
    "schedule constant": "adam adamw muon sgd",
    "beta1 0.9 >= 0 < 1": "adam adamw muon",
    "beta2 0.999 >= 0 < 1": "adam adamw muon",
    "eps 1e-08 > 0": "adam adamw muon",
    "lr 0.02 > 0": "muon",
    "momentum 0.95 >= 0 < 1": "muon",
    "nesterov True": "muon",
    "ns_steps 5 >= 1": "muon",
    "adjust_lr original original|match_rms_adamw": "muon",
    "layers all all|hidden": "muon",
    "exclude []": "muon",
    "adam_lr 0.001 > 0": "muon",
    "lr 0.05 > 0": "sgd",
    "momentum 0.9 >= 0 < 1": "sgd",
    "nesterov False": "sgd",
    "per epoch epoch|step": "constant cosine linear multistep step",
    "warmup 0 >= 0": "constant cosine linear multistep one_cycle step",
    "min_lr 0.0 >= 0": "cosine linear",
    "flat 0.0 >= 0 < 1": "linear",
    "gamma 0.1 > 0 <= 1": "multistep step",
    "milestones None >= 1": "multistep",
    "per step epoch|step": "one_cycle",
    "rise 0.3 > 0 < 1": "one_cycle",
    "start 25.0 >= 1": "one_cycle",
    "end 10000.0 >= 1": "one_cycle",
    "step_size None >= 1": "step",
    "label_smoothing 0.0 >= 0 <= 1": "cross_entropy",
    "init pytorch": "asap_alexnet conv2 decoder dkp_alexnet lstm mlp residual_mlp resnet18 resnet18_imagenet resnet20 "
    "resnet34 resnet50_imagenet resnet_cifar_small torchvision vgg vit_mini",
    "linear_init None": "asap_alexnet conv2 decoder dkp_alexnet lstm mlp residual_mlp resnet18 resnet18_imagenet resnet20 "
    "resnet34 resnet50_imagenet resnet_cifar_small torchvision vgg vit_mini",
    "output_init None": "asap_alexnet conv2 decoder dkp_alexnet lstm mlp residual_mlp resnet18 resnet18_imagenet resnet20 "
    "resnet34 resnet50_imagenet resnet_cifar_small torchvision vgg vit_mini",
    "ignore_index -100": "token_cross_entropy",
    "score perplexity perplexity|bits_per_token|bits_per_character|accuracy": "token_cross_entropy",
    "output None": "cross_entropy mse sigmoid_ce token_cross_entropy",
    "width 64 >= 1": "asap_alexnet dkp_alexnet resnet18 resnet18_imagenet resnet34 resnet50_imagenet",
    "hidden 1024 >= 1": "asap_alexnet",
    "output_norm True": "asap_alexnet resnet18 resnet34",
    "channels 32 >= 1": "conv2",
    "hidden 128 >= 1": "conv2",
    "padding None >= 0 <= 2": "conv2",
    "hidden 4096 >= 1": "dkp_alexnet",
    "linear_norm True": "dkp_alexnet",
    "dropout 0.5 >= 0 < 1": "dkp_alexnet",
    "widths [512, 512] >= 1": "mlp",
    "activation relu relu|leaky_relu|tanh|sigmoid|gelu|identity": "mlp",
    "batch_norm False": "mlp vgg",
    "output_norm False": "mlp",
    "blocks [2, 2, 2, 2] >= 1 <= 1000": "resnet18 resnet18_imagenet",
    "shortcuts True": "resnet18 resnet20 resnet34 resnet_cifar_small",
    "bn before before|after": "resnet18_imagenet resnet50_imagenet",
    "width 16 >= 1": "resnet20 resnet_cifar_small",
    "blocks 3 >= 1 <= 1000": "resnet20",
    "blocks [3, 4, 6, 3] >= 1 <= 1000": "resnet34 resnet50_imagenet",
    "model resnet18": "torchvision",
    "width 128 >= 1": "decoder lstm vit_mini",
    "heads 4 >= 1": "decoder vit_mini",
    "expansion 4.0 > 0 <= 100": "decoder residual_mlp vit_mini",
    "activation gelu relu|leaky_relu|tanh|sigmoid|gelu|identity": "decoder residual_mlp vit_mini",
    "depth 4 >= 1 <= 1000": "decoder",
    "context None >= 1": "decoder",
    "norm pre pre|post": "decoder",
    "positions learned learned|sinusoidal": "decoder",
    "dropout 0.1 >= 0 < 1": "decoder",
    "layers 1 >= 1 <= 100": "lstm",
    "dropout 0.0 >= 0 < 1": "lstm",
    "cell lstm lstm|gru|rnn": "lstm",
    "scan rows rows|pixels": "lstm",
    "width 256 >= 1": "residual_mlp",
    "blocks 4 >= 1 <= 1000": "residual_mlp vit_mini",
    "final_norm True": "residual_mlp",
    "depth 32 >= 8 <= 6002": "resnet_cifar_small",
    "depth 5": "vgg",
    "width None >= 1": "vgg",
    "activation None relu|leaky_relu|tanh|sigmoid|gelu|identity": "vgg",
    "patch 4 >= 1": "vit_mini",
}


def described() -> dict[str, str]:
    """Map each option, with its default and its range or choices, to the components that share it. The choices of initialisers
    are omitted."""
    found: dict[str, list[str]] = {}
    for registry in (OPTIMIZERS, SCHEDULES, OBJECTIVES, ARCHITECTURES):
        for name, cls in registry.items():
            for field in option_fields(cls) if cls.__module__.startswith("fa_bench.") else ():  # other tests register more
                default = field.default if field.default_factory is MISSING else field.default_factory()
                default = default.name if isinstance(default, Options) else default
                limits = [f"{SIGNS[key]} {value}" for key, value in field.metadata["limits"].items()]
                choices = "" if field.name.endswith("init") else "|".join(field.metadata["choices"] or ())
                found.setdefault(" ".join([field.name, str(default), *limits, choices]).strip(), []).append(name)
    return {option: " ".join(sorted(names)) for option, names in found.items()}


def test_defaults_and_ranges_match_record() -> None:
    assert described() == RECORDED
