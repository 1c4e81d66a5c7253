"""Two ranks under DistributedDataParallel train in the same way as one process with the whole batch.

The exceptions are rules with values that depend on the batch, or with noise that each rank samples for itself.
The ranks are separate processes that communicate through gloo. Every rule trains in the same two processes, because starting
them is slow.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

import fa_bench
from fa_bench.registry.registries import ALGORITHMS

from .chain import draw_the_same_for_every_sample
from .scripts import data, net, sgd

# Options that the rules need here, or that avoid values that depend on the whole batch, such as similarities between samples.
OPTIONS: dict[str, dict] = {
    "predsim": {"loss": "pred"},
    "dgl": {"auxiliary_net": "linear"},
    "wm": {"initial_steps": 3, "mirror_batch": 8},
    "dkp": {"b_lr_scale": 1.0},
    "forward_forward": {"peer_norm": 0.0},
    "ldfa": {"rank": 2},
    "ldrl": {"b_lr_scale": 1.0},
    "f3": {"samples": 16},
}
CASES = {name: (name, OPTIONS.get(name, {})) for name in ALGORITHMS}
CASES |= {
    "drtp sign": ("drtp", {"error_sign": True}),
    "kp plain last": ("kp", {"plain_last": True}),
    "dkp sparse": ("dkp", {"density": 0.5, "b_lr_scale": 1.0}),
    "pfa sparse": ("pfa", {"density": 0.5}),
    "fa stem": ("fa", {"freeze_stem": True}),
    "asap random": ("asap", {"match": "random", "freeze_stem": False}),
    "conv kp": ("kp", {}),
    "conv pfa": ("pfa", {}),
    "conv dkp": ("dkp", {"b_lr_scale": 1.0}),
    "conv asfp": ("asfp", {}),
    "conv ldfa": ("ldfa", {"rank": 2}),
    "conv ia": ("information_alignment", {"update_forward": True}),
    "conv ia noise": ("information_alignment", {"signal": "noise", "noise_batch": 4}),
    "asfp_lc learning stem": ("asfp_lc", {"freeze_stem": False}),
    "predsim whole": ("predsim", {}),
    "dgl whole": ("dgl", {}),
    "node_perturbation whole": ("node_perturbation", {}),
    "np_feedback whole": ("np_feedback", {}),
    "ddtp_linear whole": ("ddtp_linear", {}),
    "ldrl whole": ("ldrl", {"b_lr_scale": 1.0}),
    "dfc whole": ("dfc", {}),
    "forward_forward whole": ("forward_forward", {}),
    "dfc jacobian whole": ("dfc", {"feedback_weights": "jacobian"}),
    "conv dfc": ("dfc", {}),
    "fdfa whole": ("fdfa", {}),
    "grape whole": ("grape", {}),
    "forward_gradient whole": ("forward_gradient", {}),
    "forward_gradient weight": ("forward_gradient", {"form": "weight"}),
    "grape anchors": ("grape", {"anchor_period": 2}),
}
#: Cases in which values depend on the whole batch, or in which each rank samples its own noise. The results differ from those of
#: one process, but the ranks agree with each other.
DIFFER = (
    "asfp_lc learning stem",
    "predsim whole",
    "dgl whole",
    "node_perturbation whole",
    "np_feedback whole",
    "ddtp_linear whole",
    "ldrl whole",
    "dfc whole",
    "forward_forward whole",
    "fdfa whole",
    "grape whole",
    "forward_gradient whole",
    "grape",
    "grape anchors",
)
STEPS = 5


def model_of(case: str) -> nn.Module:
    if not case.startswith("conv"):
        return net()
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)),
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()
    model.cut_points = ["2", "4", "6"]
    return model


def train(case: str, parts: slice, wrap=lambda model: model) -> dict[str, torch.Tensor]:
    """The state and the feedback of the model after a few steps on a part of each batch."""
    with pytest.MonkeyPatch.context() as patch:
        if not case.endswith("whole"):
            draw_the_same_for_every_sample(patch)
        return _train(case, parts, wrap)


def _train(case: str, parts: slice, wrap) -> dict[str, torch.Tensor]:
    name, options = CASES[case]
    model = model_of(case)
    rule = fa_bench.attach(model, name, seed=0, sample_input=data(2)[0], **options)
    called = wrap(model)
    optimizer = sgd([p for p in called.parameters() if p.requires_grad])
    for step in range(STEPS):
        x, y = (tensor[parts] for tensor in data(16, seed=step))
        optimizer.zero_grad()
        logits = called(x)
        # Each step assigns the samples to the ranks in a different order.
        indices = torch.randperm(16, generator=torch.Generator().manual_seed(step))[parts]
        rule.backward(F.cross_entropy(logits, y), logits, y, indices=indices)
        optimizer.step()
        rule.step()
    found = {key: value.detach().clone() for key, value in model.state_dict().items()}
    found |= {f"state: {key}": value.double() for key, value in rule.state_dict().items() if name == "f3"}
    for place, tensors in rule.feedback.items():
        found |= {f"feedback of {place}: {key}": tensor.detach().clone() for key, tensor in tensors.items()}
    return found


def rank(number: int, store: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    for case in CASES:
        # The global random numbers of the ranks differ, as they do without a seed, and no rule may depend on them.
        torch.manual_seed(100 + number)
        try:
            found = train(case, slice(8 * number, 8 * number + 8), nn.parallel.DistributedDataParallel)
            results.put((case, number, {key: value.numpy() for key, value in found.items()}))
        except Exception as error:
            results.put((case, number, f"{type(error).__name__}: {error}"))
    results.put(None)
    dist.destroy_process_group()


def on_two_ranks(store: Path) -> dict[str, dict[int, dict | str]]:
    """The results as {case: {rank: its state, or its error}}."""
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=rank, args=(number, str(store), results), daemon=True) for number in range(2)]
    for process in processes:
        process.start()
    found: dict[str, dict[int, dict | str]] = {case: {} for case in CASES}
    ended = 0
    try:
        while ended < 2:
            if (result := results.get(timeout=240)) is None:
                ended += 1
            else:
                case, number, state = result
                found[case][number] = state
    finally:
        for process in processes:
            process.join(20)
            if process.is_alive():
                process.terminate()
    return found


def test_two_ranks_match_one_process(tmp_path, monkeypatch):
    """Each rank sums over half the batch, so its results differ from those of one process by rounding errors of about 1e-16 per
    step."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    faults = []
    for case, of_rank in on_two_ranks(tmp_path / "store").items():
        one, two = of_rank[0], of_rank[1]
        if isinstance(one, str) or isinstance(two, str):
            faults.append(f"{case}: {one if isinstance(one, str) else two}")
            continue
        want = train(case, slice(None))
        assert one.keys() == two.keys() == want.keys()
        faults += [f"{case}: {key} differs between the ranks" for key in one if (one[key] != two[key]).any()]
        apart = max(float(abs(one[key] - want[key].numpy()).max()) for key in one)
        if (apart > 1e-6) if case in DIFFER else (apart < 1e-12):
            continue
        faults.append(f"{case}: {apart:.1e} off one process, expected " + ("> 1e-6" if case in DIFFER else "< 1e-12"))
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("asfp_lc learning stem", "batch"),
        ("predsim whole", "batch"),
        ("dgl whole", "batch"),
        ("fdfa", "noise"),
        ("grape", "noise"),
        ("forward_gradient", "noise"),
        ("forward_gradient weight", None),
        ("forward_alignment", None),
        ("predsim", None),
        ("dgl", None),
        ("kp", None),
    ],
)
def test_coverage_reports_batch_dependence_and_noise(case, says):
    name, options = CASES[case]
    text = str(fa_bench.attach(model_of(case), name, sample_input=data(2)[0], **options).coverage)
    assert (("depends on the batch" in text), ("its own random numbers" in text)) == (says == "batch", says == "noise"), text
