"""Tests that random feedback depends only on the seed, the layer and the tensor's name, and that its signs, masks and
distributions are correct."""

import math
from collections import OrderedDict
from itertools import combinations

import pytest
import torch
from torch import nn

import fa_bench
from fa_bench.registry.registries import ALGORITHMS
from fa_bench.utils.sampling import CONTINUOUS, magnitudes, resample_magnitudes, sample, sample_mask, seed_for, seed_words

from . import nets
from .helpers import QUICK, cut_options

SHARING = {"match": "random", "linear": "share"}
# Options that make a rule create all of its random tensors, at small sizes.
OPTIONS = {
    "asap": SHARING,
    "asfp": SHARING,
    "asfp_lc": SHARING | {"cuts": ["act1", "act2"]},
    "dgl": {"cuts": ["act1", "act2"]},
    "pfa": {"density": 0.5, "ratio": 2.0},
    "mixed": {"pfa": 0.4, "fa": 0.3, "kp": 0.3},
    "wm": {"initial_steps": 0},
    "local_error": {"separate": True},
    "fdfa": {"b_init": "pytorch"},
    "f3": {"samples": 4},
    "dfc": {"feedback_weights": "fixed"},  # learned feedback at the output starts as the identity
    **{name: {"density": 0.5} for name in ("usf", "brsf", "frsf", "fa", "dkp")},
}
#: Rules without random feedback.
WITHOUT = {
    "bp",
    "frozen",
    "frozen_blocks",
    "bp_fc",
    "dual_propagation",
    "node_perturbation",
    "weight_perturbation",
    "forward_forward",
    "forward_gradient",
    "epc",
    "pc",
}
RANDOM = sorted(set(ALGORITHMS) - WITHOUT)


def equal_layers() -> nn.Sequential:
    """A network of equally shaped layers, in which layers with equal seeds would get equal tensors. All weights are 1, so the
    signs of the weights cannot distinguish the layers."""
    parts = [(f"{kind}{n}", make()) for n in (1, 2, 3) for kind, make in (("fc", lambda: nn.Linear(6, 6)), ("act", nn.Tanh))]
    model = nn.Sequential(OrderedDict([*parts, ("fc4", nn.Linear(6, 3))])).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    return model


def random_tensors(name: str, seed: int, forwards: int = 1, **options) -> dict[tuple[str, str], torch.Tensor]:
    """The feedback tensors after `forwards` training forward passes, as {(layer or cut, name): tensor}.

    Tensors that are filled with a single value are left out.
    """
    model, x = equal_layers(), torch.ones(4, 6, dtype=torch.float64)
    rule = fa_bench.attach(model, name, seed=seed, sample_input=x, **cut_options(name, model, OPTIONS.get(name, {}) | options))
    for _ in range(forwards):
        model(x)
    tensors = {(at, key): tensor.detach().clone() for at, own in rule.feedback.items() for key, tensor in own.items()}
    return {key: tensor for key, tensor in tensors.items() if len(tensor.unique()) > 1}


@pytest.mark.parametrize("name", RANDOM)
def test_random_tensors_depend_only_on_seed(name: str) -> None:
    torch.manual_seed(1)
    first = random_tensors(name, seed=0)
    torch.manual_seed(2)
    again, other = random_tensors(name, seed=0), random_tensors(name, seed=1)
    assert first and set(first) == set(again) == set(other)
    assert [key for key in first if not torch.equal(first[key], again[key])] == []
    assert [key for key in first if torch.equal(first[key], other[key])] == []


@pytest.mark.parametrize("name", RANDOM)
def test_equally_shaped_random_tensors_differ(name: str) -> None:
    tensors = random_tensors(name, seed=0)
    equal = [
        (a, b)
        for a, b in combinations(tensors, 2)
        if tensors[a].shape == tensors[b].shape and torch.equal(tensors[a], tensors[b])
    ]
    assert tensors and equal == []


@pytest.mark.parametrize("name", ["fa", "usf", "brsf", "frsf", "dkp"])
def test_tensors_match_samples_seeded_by_path_and_name(name: str) -> None:
    """A change in how seeds are derived from the path and the name would change all results."""
    found = random_tensors(name, seed=7, forwards=0)
    for (path, key), tensor in found.items():
        # dkp's B is sampled together with its mask.
        seed = seed_for(7, path, "B" if name == "dkp" else key)
        if key == "mask":
            want = sample_mask(tensor.shape, 0.5, seed)
        elif key == "B" and name == "usf":
            continue  # usf computes B from the weight and the mask
        else:
            init = getattr(ALGORITHMS[name](), "m_init" if key == "M" else "b_init")
            want = sample(tensor.shape, init, seed, 0.5 if key == "B" else 1.0)
        assert torch.equal(tensor, (want.abs() if key == "M" else want).to(tensor))
    assert found


@pytest.mark.parametrize("name", ["pfa", "pfa_o", "ldfa", "mixed"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    ],
    ids=["plain", "transposed"],
)
def test_convolution_groups_have_different_b(name: str, make) -> None:
    model, options = nn.Sequential(make()), {"rank": 2} if name == "ldfa" else {"ratio": 2.0}
    rule = fa_bench.attach(model, name, seed=0, sample_input=torch.zeros(2, 4, 5, 5), **options)
    one, two = rule.feedback["0"]["B"].detach().chunk(2)
    assert one.shape == two.shape and not torch.equal(one, two) and one.any() and two.any()


@pytest.mark.parametrize("init", ["xavier_uniform", "xavier_normal"])
def test_brsf_samples_differ_between_seeds_layers_and_forwards(init: str) -> None:
    drawn = [
        random_tensors("brsf", seed, forwards, m_init=init)[layer, "M"]
        for seed in (0, 1)
        for forwards in (1, 2, 5)
        for layer in ("fc2", "fc3")
    ]
    assert not any(torch.equal(one, other) for one, other in combinations(drawn, 2))


# --- magnitudes and masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["brsf", "frsf"])
@pytest.mark.parametrize("init", [init for init in CONTINUOUS if init != "zeros"])
def test_magnitudes_are_nonnegative_and_signs_match_weight(name: str, init: str) -> None:
    """The test checks the feedback before the first training forward pass and after each of the first two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7))
    rule = fa_bench.attach(model, name, seed=0, m_init=init)
    for _ in range(3):
        for layer, tensors in rule.feedback.items():
            assert tensors["M"].min() >= 0
            assert torch.equal(rule.effective_feedback(layer).sign(), model.get_submodule(layer).weight.detach().sign())
        model(torch.zeros(2, 9))


@pytest.mark.parametrize("init", CONTINUOUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resampled_magnitudes_have_initialiser_distribution(init: str, dtype: torch.dtype) -> None:
    """Over 40 000 entries, the mean and the mean square of M match those of the absolute values of signed samples."""
    drawn, want = torch.empty(200, 200, dtype=dtype), sample((200, 200), init, seed=1).abs()
    resample_magnitudes(drawn, init, seed=2)
    assert drawn.min() >= 0
    # For normal numbers, the standard errors are 0.38 % of the mean and 0.7 % of the mean square.
    # The tolerances are five standard errors of the difference between two samples.
    assert drawn.mean().item() == pytest.approx(want.mean().item(), rel=0.03)
    assert drawn.square().mean().item() == pytest.approx(want.square().mean().item(), rel=0.05)


def test_resampled_magnitudes_are_nonzero() -> None:
    """The probability that none of a million uniform numbers is below 1e-5 is exp(-10), as is the probability that none is above
    1 - 1e-5."""
    drawn = torch.empty(1000, 1000)
    resample_magnitudes(drawn, "uniform_one", seed=3)
    assert 0 < drawn.min() < 1e-5 and 1 - 1e-5 < drawn.max() < 1


@pytest.mark.parametrize("init", ["uniform_one", "normal_fan_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_resampling_matches_single_formula(init: str, dtype: torch.dtype) -> None:
    """The 70 000 numbers are sampled in two parts, the first of which has 65 536. Each number depends only on its index and the
    seed, so applying the formula to all numbers at once must give the same result."""
    drawn = torch.empty(280, 250, dtype=dtype)
    resample_magnitudes(drawn, init, seed=4)
    at_once = magnitudes(torch.tensor(seed_words(4), dtype=torch.int32), drawn.shape, init, dtype)
    # The numbers may differ by rounding errors, which the inverse error function amplifies in the tails.
    torch.testing.assert_close(drawn, at_once, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-6)
    numbers = drawn.flatten().float()
    assert (numbers[:4464] - numbers[65536:]).abs().median() > 0.1 * numbers.mean()


@pytest.mark.parametrize("name", ["fa", "mixed"])
def test_copied_weights_are_masked(name: str) -> None:
    """With a density of 0.3, about 30 % of the 20 000 copied weights remain. The tolerance of 0.02 is about six standard
    errors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 200))
    options = {
        "fa": {"b_init": "copy_w", "density": 0.3},
        "mixed": {"f_init": "copy_w", "fa": 0.3, "pfa": 0.0, "kp": 0.7, "k_init": "zeros"},
    }
    rule = fa_bench.attach(model, name, seed=0, **options[name])
    effective, weight = rule.effective_feedback("0"), model[0].weight.detach()
    kept = effective != 0
    assert kept.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(effective[kept], weight[kept])


@pytest.mark.parametrize(
    ("name", "tensor", "options"),
    [
        ("fa", "B", {}),
        ("pfa", "R", {}),
        ("dkp", "B", {"cuts": ["1"]}),
        ("dfa", "B", {"cuts": ["1"]}),
    ],
)
def test_mask_does_not_change_remaining_entries(name: str, tensor: str, options: dict) -> None:
    """The remaining entries equal those of the dense sample: they are neither rescaled nor selected by size."""
    found = []
    for density in (1.0, 0.5):
        model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 60))
        rule = fa_bench.attach(model, name, seed=0, density=density, **options)
        found.append(rule.feedback["1" if options else "2"][tensor].detach().clone())
    dense, sparse = found
    kept = sparse != 0
    assert dense.all() and torch.equal(sparse[kept], dense[kept])
    # Each tensor has at least 3 000 entries.
    # The tolerances are five standard errors of the fraction and of means over half of the entries.
    assert kept.float().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(dense.numel()))
    error = 5 * dense.std().item() / math.sqrt(dense.numel() / 2)
    assert sparse[kept].abs().mean().item() == pytest.approx(dense.abs().mean().item(), abs=error)
    assert sparse[kept].mean().item() == pytest.approx(dense.mean().item(), abs=error)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_attach_does_not_change_global_rng(name: str) -> None:
    """Even rules that build auxiliary nets with torch's initialisers must not advance the global generator."""
    model, x = nets.mlp(), nets.batch("mlp")[0]
    options = {"match": "random", "linear": "share"} if name.startswith("as") else {}
    options |= {"cuts": ["act1"]} if name in ("dgl", "asfp_lc") else {}
    before = torch.get_rng_state()
    fa_bench.attach(model, name, sample_input=x, **cut_options(name, model, QUICK.get(name, {}) | options))
    assert torch.equal(torch.get_rng_state(), before)
