"""Compares runs that use options of the runner with plain runs on the same device, and checks determinism."""

from __future__ import annotations

import itertools
import time
from typing import Any

from .jobs import RunFailed, can_compile, train
from .page import Section
from .parts import Context

#: The net for each rule; conv2 has too few layers for asap.
RULES = {
    "fa": "conv2",
    "kp": "conv2",
    "brsf": "conv2",
    "pfa_o": "conv2",
    "dfa": "conv2",
    "dkp": "conv2",
    "predsim": "conv2",
    "asap": "resnet_cifar_small",
}
OF_NET = {
    "conv2": ["architecture.channels=8", "architecture.hidden=32"],
    "resnet_cifar_small": ["architecture.depth=8", "architecture.width=4"],
}
COMMON = ["dataset=digits", "epochs=1", "optimizer.lr=0.01", "batch_size=64", "threads=1", "seed=0"]
#: Name -> overrides, tolerance of the relative difference of the training loss, and expected seconds of a run on a GPU.
VARIANTS: dict[str, tuple[list[str], float, float]] = {
    "again": ([], 2e-3, 6),
    "channels_last": (["channels_last=true"], 2e-3, 6),
    "tf32": (["precision=tf32"], 1e-2, 6),
    "bf16": (["precision=bf16"], 0.05, 6),
    "compile": (["compile=true"], 2e-3, 45),
    "graphs": (["compile=true", "graphs=true"], 2e-3, 45),
    "compile, bf16": (["compile=true", "precision=bf16"], 0.05, 45),
    "graphs, accumulate=2": (["compile=true", "graphs=true", "accumulate=2"], 2e-3, 45),
}
ONLY_ON_CUDA = ("tf32", "graphs", "graphs, accumulate=2")
#: Slow variants -> the rules that are run with them.
SOME = {"compile, bf16": ["fa", "brsf", "dfa"], "graphs, accumulate=2": ["fa"]}
HASHES = ("weights_hash", "feedback_hash", "optimizer_hash")
DETERMINISTIC = ["fa", "kp", "brsf", "dfa", "predsim", "wm", "dkp"]


def setting(rule: str) -> list[str]:
    """The overrides for a small run of a rule."""
    net = RULES.get(rule, "conv2")
    shorter = ["algorithm.initial_steps=5", "algorithm.mirror_batch=16"] if rule == "wm" else []
    return [*COMMON, f"algorithm={rule}", f"architecture={net}", *OF_NET[net], *shorter]


def some(rules: dict[str, Any], context: Context) -> dict[str, Any]:
    """All rules; on a CPU, only the first two, because only the logic of the check is tested."""
    return rules if context.device != "cpu" else dict(itertools.islice(rules.items(), 2))


def losses(result: dict[str, Any]) -> tuple[float, float]:
    """The training loss and the test loss of a run."""
    return result["train_loss"], result["test_loss"]


def skipped_graphs() -> int:
    """The number of times that torch has skipped capturing a CUDA graph in this process."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]


def run(context: Context, section: Section) -> None:
    """Add a row for each option and rule.

    Fast options come first, so that compilation uses the remaining time.
    """
    section.notes = [
        f"Runs with {' '.join(COMMON)}. Each run with an option is compared with its reference, the run of the same rule without "
        f"the option on the same device (rows 'plain'). The relative difference of the training loss must be within the "
        f"tolerance, which allows for rounding errors that 20 updates amplify. The rows 'again', without any option, show the "
        f"difference between two equal runs. The other columns are the seconds of training without compilation, the seconds of "
        f"compilation, and how often torch did not capture a CUDA graph. If an option includes accumulate=2, so does its "
        f"reference, which has no row."
    ]
    section.columns = [
        "option",
        "rule",
        "net",
        "train loss",
        "test loss",
        "difference",
        "tolerance",
        "seconds",
        "compiling",
        "not captured",
        "result",
    ]
    plain: dict[str, dict[str, Any]] = {}
    for rule, net in some(RULES, context).items():
        if context.fits(6):
            try:
                plain[rule] = train(context, *setting(rule))
            except RunFailed as error:
                section.add("plain", rule, net, f"{error}", *[""] * 6, passed=False)
            else:
                section.add(
                    "plain",
                    rule,
                    net,
                    *(f"{loss:.6f}" for loss in losses(plain[rule])),
                    "-",
                    "-",
                    f"{plain[rule]['seconds']:.2f}",
                )
        else:
            section.missing.append(f"plain {rule}")
    compiles = can_compile(section)
    for name, (overrides, tolerance, expected) in VARIANTS.items():
        if (name in ONLY_ON_CUDA and context.device == "cpu") or ("compile=true" in overrides and not compiles):
            continue
        slowest = 0.0
        for rule in SOME.get(name, RULES):
            if rule not in plain:
                continue
            if not context.fits(slowest * 1.2 if slowest else expected):
                section.missing.append(f"{name} {rule}")
                continue
            start = time.time()
            compare(context, section, name, rule, overrides, plain[rule], tolerance)
            slowest = max(slowest, time.time() - start)


def compare(
    context: Context, section: Section, name: str, rule: str, overrides: list[str], reference: dict[str, Any], tolerance: float
) -> None:
    """Add the row for one rule with one option."""
    net, before = RULES[rule], skipped_graphs()
    try:
        if "accumulate=2" in overrides:
            reference = train(context, *setting(rule), "accumulate=2")
        result = train(context, *setting(rule), *overrides)
    except RunFailed as error:
        section.add(name, rule, net, f"{error}", *[""] * 6, passed=False)
        return
    difference = abs(result["train_loss"] - reference["train_loss"]) / reference["train_loss"]
    section.add(
        name,
        rule,
        net,
        *(f"{loss:.6f}" for loss in losses(result)),
        f"{difference:.1e}",
        f"{tolerance:g}",
        f"{result['seconds']:.2f}",
        "-" if result["compile_seconds"] is None else f"{result['compile_seconds']:.1f}",
        skipped_graphs() - before if "graphs=true" in overrides else "-",
        passed=difference <= tolerance,
    )


def determinism(context: Context, section: Section) -> None:
    """Add a row for each rule, first for eager runs and then for compiled runs."""
    section.notes = [
        "Two runs with deterministic=true and the same seed in one process; the hashes of weights, feedback and the "
        "optimizer's state must be equal."
    ]
    section.columns = ["mode", "rule", "net", "first", "second", "result"]
    modes: list[tuple[str, list[str], float]] = [("eager", [], 6.0)]
    if can_compile(section):
        modes.append(("compiled", ["compile=true"], 60.0))
    for mode, overrides, expected in modes:
        slowest = 0.0
        for rule in some(dict.fromkeys(DETERMINISTIC), context):
            if not context.fits(slowest * 1.2 if slowest else expected):
                section.missing.append(f"{mode} {rule}")
                continue
            start, net = time.time(), RULES.get(rule, "conv2")
            try:
                results = [train(context, *setting(rule), "deterministic=true", *overrides) for _ in range(2)]
            except RunFailed as error:
                section.add(mode, rule, net, f"{error}", "", passed=False)
            else:
                first, second = ([result[key] for key in HASHES] for result in results)
                section.add(mode, rule, net, first[0], second[0], passed=first == second)
            slowest = max(slowest, time.time() - start)
