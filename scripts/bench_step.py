"""Compares the time of one training step of every rule with that of plain backpropagation, in one process.

Each round times one block of steps of every rule in turn, so that changes in the machine's speed affect all rules alike. Ratios
are computed for each round, and the table shows their medians and quartiles. The row A/A compares backpropagation with itself.
The rows "written out" time bp, fa and dfa on the MLP without an attached rule: the forward pass is written out in a few lines.
These rows show the cost of the rules in eager PyTorch. With a rule, a step zeroes the gradients and calls the model, the loss,
rule.backward, optimizer.step and rule.step. The column "without optimizer" excludes optimizer.step. As in the runner, W and B
share one gradient and one update if their gradients are the same. The column "arithmetic" contains the number of multiplications
in matrix products and convolutions, as a ratio to that of backpropagation.

With --compile, the model and the loss are compiled as with the runner's option compile=true. Backpropagation is compiled, too.

On a GPU, a block has more steps, and the clock is read after the device has finished. Products are computed in single precision
without TF32.

    python scripts/bench_step.py [--nets mlp conv2 resnet20] [--rules fa kp wm:mirror_steps=0 ...] [--rounds 30] [--threads 2]
        [--compile] [--batch 64] [--device cpu]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import fa_bench
from fa_bench.config.job import RunOptions
from fa_bench.errors import CoverageError
from fa_bench.mechanisms.cut.function import DeliverFunction
from fa_bench.mechanisms.edge.ops import FeedbackLinearFunction
from fa_bench.mechanisms.edge.pathways import BackwardContext
from fa_bench.mechanisms.weighted_layers import weighted_layers
from fa_bench.metrics.cost import multiplications
from fa_bench.optim.optimizers import Optimizers
from fa_bench.optim.sgd import SGD
from fa_bench.registry.registries import ALGORITHMS, ARCHITECTURES
from fa_bench.registry.specs import parse_spec
from fa_bench.runs.execution import Execution
from fa_bench.runs.record import device_name

CPU = torch.device("cpu")
NETS = {"mlp": (1, 28, 28), "conv2": (1, 28, 28), "resnet20": (3, 32, 32)}
PLAIN, AGAIN = "bp (plain)", "bp (A/A)"


def make_step(
    net: str, rule_name: str | None, batch: int, with_optimizer: bool, compiled: bool = False, device: torch.device = CPU
) -> Callable[[], None]:
    """A function that performs one training step.

    If `rule_name` is None, the step uses the plain model and loss.backward().
    """
    torch.manual_seed(0)
    shape = NETS[net]
    model = ARCHITECTURES[net]().build(shape, 10).to(device)
    x, y = torch.randn(batch, *shape).to(device), torch.randint(0, 10, (batch,)).to(device)
    name, options = parse_spec(rule_name or "bp")
    rule = ALGORITHMS[name].from_mapping(options)
    rule.expect_samples(batch)
    fa_bench.attach(model, rule, seed=0, sample_input=x[:2])
    indices = torch.arange(batch) if rule.needs_indices else None
    optimizers = Optimizers(SGD(lr=1e-3), rule, epochs=1)
    if with_optimizer:
        optimizers.share_gradients()

    def forward(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(x)
        return logits, F.cross_entropy(logits, y)

    if compiled:
        run_options = RunOptions(batch_size=batch, compile=True)
        forward = Execution(run_options, device).forward(forward, model, steps=1)

    def step() -> None:
        optimizers.zero_grad()
        logits, loss = forward(x, y)
        if rule_name is None:
            loss.backward()
        else:
            rule.backward(loss, logits, y, 1.0, indices)
        if with_optimizer:
            optimizers.step()
        if rule_name is not None:
            rule.step()

    return step


def make_written_out(rule: str, batch: int, device: torch.device = CPU) -> Callable[[], None]:
    """A function that performs one step of bp, fa or dfa on the default MLP, without an optimizer or an attached rule."""
    torch.manual_seed(0)
    model = ARCHITECTURES["mlp"]().build(NETS["mlp"], 10).to(device)
    first, second, last = weighted_layers(model).values()
    x, y = torch.randn(batch, *NETS["mlp"]).to(device), torch.randint(0, 10, (batch,)).to(device)
    b2, b3 = torch.randn_like(second.weight), torch.randn_like(last.weight)
    rows = [torch.randn(10, 512).to(device), torch.randn(10, 512).to(device)]

    def bp() -> torch.Tensor:
        return last(second(first(x.flatten(1)).relu()).relu())

    def fa() -> torch.Tensor:
        h = first(x.flatten(1)).relu()
        h = FeedbackLinearFunction.apply(h, second.weight, second.bias, BackwardContext(b2)).relu()
        return FeedbackLinearFunction.apply(h, last.weight, last.bias, BackwardContext(b3))

    def dfa() -> torch.Tensor:
        h1 = first(x.flatten(1)).relu()
        h2 = second(h1.detach()).relu()
        return DeliverFunction.apply(lambda delta, _: [delta, *(delta.mm(b) for b in rows)], 2, False, last(h2.detach()), h1, h2)

    forward = {"bp": bp, "fa": fa, "dfa": dfa}[rule]

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(forward(), y).backward()

    return step


def measure(steps: dict[str, Callable[[], None]], rounds: int, block: int, device: torch.device = CPU) -> dict[str, list[float]]:
    """The seconds per step of every entry, with one number per round."""
    for step in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(rounds):
        # The order is reversed in every other round, to reduce its effect on the times.
        for name in order if number % 2 == 0 else reversed(order):
            start = clock(device)
            for _ in range(block):
                steps[name]()
            seconds[name].append((clock(device) - start) / block)
    return seconds


def clock(device: torch.device) -> float:
    """The time in seconds, read after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compare(steps: dict[str, Callable[[], None]], rounds: int, block: int, device: torch.device = CPU) -> dict[str, list[float]]:
    """The ratio of every entry's time to that of PLAIN, for each round."""
    seconds = measure(steps, rounds, block, device)
    return {name: [own / plain for own, plain in zip(times, seconds[PLAIN], strict=True)] for name, times in seconds.items()}


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument(
        "--rules", nargs="+", default=[name for name in ALGORITHMS if name != "bp"], metavar="RULE[:OPTION=VALUE,...]"
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", type=torch.device, default=CPU)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True  # as in runs
    print(
        f"torch {torch.__version__}, {device_name(arguments.device)}, {arguments.threads} threads, batch {arguments.batch}, "
        f"{'compiled' if arguments.compile else 'eager'}, median [quartiles] of "
        f"{arguments.rounds} rounds\n"
    )
    print("| net | rule | arithmetic | without optimizer | whole step |\n|---|---|---|---|---|")
    for net in arguments.nets:
        bench(net, arguments)


def bench(net: str, arguments: argparse.Namespace) -> None:
    """Print the table rows for one net."""
    device: torch.device = arguments.device
    block = 20 if device.type == "cuda" else 8 if net == "mlp" else 1
    columns: list[dict[str, list[float]]] = []
    arithmetic: dict[str, float] = {}
    for with_optimizer in (False, True):
        rules: dict[str, str | None] = {PLAIN: None, AGAIN: None, **{name: name for name in arguments.rules}}
        steps = {}
        for label, name in rules.items():
            try:
                steps[label] = make_step(net, name, arguments.batch, with_optimizer, arguments.compile, device)
            except CoverageError as error:
                if not with_optimizer:
                    print(f"{net}: {error}", file=sys.stderr)
        if net == "mlp" and not with_optimizer and not arguments.compile:
            steps |= {f"{rule} (written out)": make_written_out(rule, arguments.batch, device) for rule in ("bp", "fa", "dfa")}
        if not with_optimizer:
            # The products in a compiled step cannot be counted, so those of the eager step are counted.
            counts = {
                label: multiplications(
                    make_step(net, rules[label], arguments.batch, False, device=device) if arguments.compile else step
                )
                for label, step in steps.items()
            }
            arithmetic = {label: count / counts[PLAIN] for label, count in counts.items()}
        columns.append(compare(steps, arguments.rounds, block, device))
    for name, ratios in columns[0].items():
        if name != PLAIN:
            with_optimizer = _text(columns[1][name]) if name in columns[1] else "-"
            print(f"| {net} | {name} | {arithmetic[name]:.2f} | {_text(ratios)} | {with_optimizer} |", flush=True)


def _text(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def reexec_with_malloc_settings() -> None:
    """Restart the script, unless glibc is already configured to keep freed memory.

    With glibc's defaults, page faults would dominate the times of some steps and distort the ratios.
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    if any(os.environ.get(key) != value for key, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


if __name__ == "__main__":
    reexec_with_malloc_settings()
    main()
