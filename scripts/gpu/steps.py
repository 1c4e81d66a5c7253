"""Measures the time of a training step as `bench_step.py` does, and the speed of several processes on one device."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bench_step
import torch

from fa_bench.errors import CoverageError, first_line

from .jobs import can_compile
from .page import Section
from .parts import Context

RULES = ["fa", "kp", "frsf", "usf", "brsf", "dfa"]
NETS, BATCHES = ("mlp", "conv2", "resnet20"), (64, 512)
#: The rules whose compiled steps are timed, by net; compilation takes up to half a minute per rule.
COMPILED = {"mlp": RULES, "conv2": RULES, "resnet20": ["fa", "kp", "dfa"]}
#: Numbers of processes, and the seconds for which they train at the same time.
PROCESSES, SECONDS = (1, 2, 4, 8), 4.0


def run(context: Context, section: Section) -> None:
    """Add a row for each net, batch size and rule, first for eager steps and then for compiled steps."""
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True  # as in runs
    torch.set_num_threads(2)
    device = torch.device(context.device)
    block, rounds = (20, 7) if device.type == "cuda" else (2, 3)
    section.notes = [
        f"Whole steps with the optimizer, timed as by scripts/bench_step.py --device {context.device}, in {rounds} rounds of "
        f"{block} steps, in single precision without TF32. The last two columns have the median time of a step, and the median "
        f"[quartiles] of its ratio to plain backpropagation in the same round. Compiled steps are compared with compiled "
        f"backpropagation."
    ]
    section.columns = ["mode", "net", "batch", "rule", "ms per step", "ratio to plain bp"]
    for is_compiled in (False, True) if can_compile(section) else (False,):
        for net in NETS:
            for batch in BATCHES:
                mode = "compiled" if is_compiled else "eager"
                rules = COMPILED[net] if is_compiled else RULES
                expected = len(rules) * (30 if net == "resnet20" else 10) if is_compiled else 10
                if context.fits(expected):
                    measure(context, section, mode, net, batch, rules, device, rounds, block)
                else:
                    section.missing.append(f"{mode} {net}, batch {batch}")


def measure(
    context: Context,
    section: Section,
    mode: str,
    net: str,
    batch: int,
    rules: list[str],
    device: torch.device,
    rounds: int,
    block: int,
) -> None:
    """Add the rows for one net with one batch size."""
    steps: dict[str, Callable[[], None]] = {}
    for label, rule in {bench_step.PLAIN: None, bench_step.AGAIN: None, **{rule: rule for rule in rules}}.items():
        try:
            step = bench_step.make_step(net, rule, batch, True, mode == "compiled", device)
            step()  # compiles here rather than in the rounds; an error affects only this rule
        except CoverageError as error:
            section.add(mode, net, batch, label, f"not covered: {first_line(error)}")
        except Exception as error:
            section.add(mode, net, batch, label, f"{type(error).__name__}: {first_line(error)}", "", passed=False)
        else:
            steps[label] = step
        if not context.fits(5):
            section.missing.append(f"{mode} {net}, batch {batch}: rules after {label}")
            break
    if bench_step.PLAIN not in steps:
        return
    times = bench_step.measure(steps, rounds, block, device)
    for label, seconds in times.items():
        ratios = [own / plain for own, plain in zip(seconds, times[bench_step.PLAIN], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        section.add(mode, net, batch, label, f"{1000 * statistics.median(seconds):.3f}", f"{middle:.3f} [{low:.3f}, {high:.3f}]")


def processes(context: Context, section: Section) -> None:
    """Add a row for each number of processes that train at the same time."""
    section.notes = [
        f"Processes that train the MLP (feedback alignment, batch 64, single precision, one CPU thread each) on one device at "
        f"the same time for {SECONDS:g} s, after a warm-up. The columns have the steps per second of all processes together, the "
        f"ratio of this number to that of one process, and the steps per second of the slowest and the fastest process. "
        f"CUDA_VISIBLE_DEVICES is set so that all processes see the same single GPU."
    ]
    section.columns = ["processes", "steps per second", "ratio to one process", "slowest process", "fastest process"]
    alone = None
    for count in PROCESSES:
        if not context.fits(20 + 2 * count + SECONDS):
            section.missing.append(f"{count} processes")
            continue
        rates = rates_together(count, context)
        alone = alone or sum(rates)
        section.add(count, f"{sum(rates):.0f}", f"{sum(rates) / alone:.2f}", f"{min(rates):.0f}", f"{max(rates):.0f}")


def rates_together(count: int, context: Context, seconds: float = SECONDS) -> list[float]:
    """The steps per second of each of `count` processes that train at the same time.

    Raises:
        RuntimeError: if a process ends early; the message contains its last line.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": visible}
    script = Path(__file__).resolve().parents[1] / "gpu_check.py"
    command = [sys.executable, str(script), "--worker", context.device, str(seconds)]
    workers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        for _ in range(count)
    ]
    try:
        lines = [_line_of(worker, "ready") for worker in workers]
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        lines = [_line_of(worker, "rate") for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return [float(line.split()[1]) for line in lines]


def _line_of(worker: subprocess.Popen[str], first: str) -> str:
    """The worker's next line that begins with the word `first`.

    Other lines, such as warnings from torch, are skipped.
    """
    assert worker.stdout is not None
    last = ""
    for line in worker.stdout:
        if line.split()[:1] == [first]:
            return line
        last = line.strip() or last
    raise RuntimeError(f"a process ended early: {last}")


def work(device_name: str, seconds: str) -> None:
    """Print "ready", wait for a line on standard input, train for the given time, and print the steps per second.

    This function runs in each process that `rates_together` starts.
    """
    device = torch.device(device_name)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    step = bench_step.make_step("mlp", "fa", 64, True, device=device)
    for _ in range(20):
        step()
    bench_step.clock(device)
    print("ready", flush=True)
    sys.stdin.readline()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < float(seconds):
        for _ in range(20):
            step()
        count += 20
        bench_step.clock(device)
    print("rate", count / (bench_step.clock(device) - start), flush=True)
